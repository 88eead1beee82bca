"""Two training loops as people ship them, to be measured beside ours.

Both feed a net from `torch.utils.data.DataLoader` with torchvision's transforms on PIL
images. The one is PyTorch's tutorial: fp32, contiguous, `loss.item()` in each step. The
other has the shape of torchvision's reference training: bf16 autocast and workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from resnext_ablate.architecture.spec import ResNeXtSpec
from resnext_ablate.compute.data import Dataset, Split
from resnext_ablate.compute.model import build
from resnext_ablate.compute.optimization import learning_rate
from resnext_ablate.records.config import TrainConfig
from resnext_ablate.records.data_config import DataConfig

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True, kw_only=True)
class LoopTimes:
    """Seconds of all training epochs and of everything, and the test error."""

    train_s: float
    total_s: float
    num_images: int
    test_error_pct: float


@dataclass(frozen=True)
class _Images(TorchDataset[tuple[Tensor, int]]):
    """A split as a data set of PIL images, as torchvision's own are."""

    split: Split
    transform: Transform

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.split.images[index].numpy()
        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        return self.transform(image), int(self.split.labels[index])


def train_plainly(
    spec: ResNeXtSpec,
    *,
    config: TrainConfig,
    data_config: DataConfig,
    dataset: Dataset,
    seed: int,
    device: torch.device,
    mixed_precision: bool,
    num_workers: int,
) -> LoopTimes:
    """Trains a net by such a loop, with the schedule and optimizer of a study.

    Args:
        spec: the net.
        config: epochs, batch size, optimizer and schedule.
        data_config, seed: of the augmentation; the seed of weights and order too.
        dataset: on the CPU.
        device: where the net is.
        mixed_precision: bf16 autocast; else fp32.
        num_workers: processes that load.
    """
    torch.manual_seed(seed)
    model = build(spec, generator=torch.Generator().manual_seed(seed)).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
    train, val, test = (
        _loader(
            split,
            transform=_transform(dataset, data_config, augment=augment),
            batch_size=config.batch_size,
            is_training=augment,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
        )
        for split, augment in (
            (dataset.train, True),
            (dataset.val, False),
            (dataset.test, False),
        )
    )
    start, train_s, num_images = time.perf_counter(), 0.0, 0
    for epoch in range(config.epochs):
        begun = time.perf_counter()
        num_images += _train_epoch(
            model, optimizer, train, config, epoch, device, mixed_precision
        )
        train_s += time.perf_counter() - begun
        _error_pct(model, val, device, mixed_precision)
    return LoopTimes(
        test_error_pct=_error_pct(model, test, device, mixed_precision),
        train_s=train_s,
        total_s=time.perf_counter() - start,
        num_images=num_images,
    )


def _loader(
    split: Split,
    *,
    transform: Transform,
    batch_size: int,
    is_training: bool,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader[tuple[Tensor, int]]:
    return DataLoader(
        _Images(split, transform),
        batch_size=batch_size,
        shuffle=is_training,
        drop_last=is_training,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.SGD,
    loader: DataLoader[tuple[Tensor, int]],
    config: TrainConfig,
    epoch: int,
    device: torch.device,
    mixed_precision: bool,
) -> int:
    model.train()
    running_loss, num_images = 0.0, 0
    for step, (images, labels) in enumerate(loader):
        images, labels = images.to(device), labels.to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                config,
                step=epoch * len(loader) + step,
                steps_per_epoch=len(loader),
            )
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed_precision):
            loss = F.cross_entropy(
                model(images).float(), labels, label_smoothing=config.label_smoothing
            )
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        running_loss += loss.item()
        num_images += len(labels)
    return num_images


def _error_pct(
    model: nn.Module,
    loader: DataLoader[tuple[Tensor, int]],
    device: torch.device,
    mixed_precision: bool,
) -> float:
    model.eval()
    wrong = total = 0
    with torch.no_grad():
        for images, labels in loader:
            with torch.autocast(
                device.type, dtype=torch.bfloat16, enabled=mixed_precision
            ):
                found = model(images.to(device)).argmax(dim=1).cpu()
            wrong += int((found != labels).sum())
            total += len(labels)
    return 100 * wrong / total


def _transform(
    dataset: Dataset, data_config: DataConfig, *, augment: bool
) -> Transform:
    # Torchvision costs seconds to import, and only these loops need it here.
    from torchvision import transforms

    steps: list[object] = []
    if augment and data_config.crop_padding:
        size = dataset.info.image_size
        steps.append(transforms.RandomCrop(size, padding=data_config.crop_padding))
    if augment and data_config.flip:
        steps.append(transforms.RandomHorizontalFlip())
    steps.append(transforms.ToTensor())
    steps.append(transforms.Normalize(dataset.mean.tolist(), dataset.std.tolist()))
    composed: Transform = transforms.Compose(steps)
    return composed
