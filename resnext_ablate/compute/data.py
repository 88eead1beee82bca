"""Data sets resident on a device, augmented in batches.

`load` puts on a device what `preparation` left in the cache; it imports neither
torchvision nor Pillow nor scikit-learn. The rest are pure functions that turn stored
images into batches; all their random draws come from a generator seeded by seed and
epoch alone. `Feed` is what a run wants of a data set, this kind or one that streams.

Stored images are uint8 (N, H, W, C), batches float (N, C, H, W).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.compute.preparation import META_FILE, DataInfo, info_from
from resnext_ablate.records.data_config import DataConfig

SplitName = Literal["train", "val", "test"]

_MOST_AT_ONCE, _VALUES_AT_ONCE = 8, 1 << 25
"""Batches that a GPU augments at once, and float32 values of these: 128 MiB."""


@dataclass(frozen=True)
class Part:
    """Which part of each batch and split a process takes, of how many."""

    index: int = 0
    count: int = 1

    def of(self, length: int) -> range:
        """Its positions of so many: parts differ by one at most, the first are longer.

        So `parts_of` divides a batch, too.
        """
        size, longer = divmod(length, self.count)
        start = self.index * size + min(self.index, longer)
        return range(start, start + size + (self.index < longer))


WHOLE = Part()


class Feed(Protocol):
    """A data set as a run sees it."""

    @property
    def info(self) -> DataInfo: ...

    def num_images(self, split: SplitName) -> int: ...

    def train_batches(
        self,
        config: DataConfig,
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        num_passed: int,
        part: Part = WHOLE,
    ) -> Iterator[Batch]:
        """A part of each augmented batch of an epoch but the first `num_passed`."""

    def eval_batches(
        self, split: SplitName, *, batch_size: int, part: Part = WHOLE
    ) -> Iterator[Batch]:
        """The images of a part of a split in their order, normalised."""


@dataclass(frozen=True)
class Split:
    """images: uint8 (N, H, W, C) on the device; labels: int64 (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """A data set on a device.

    mean, std: float32 (C,), of the training split, in units of pixel / 255.
    """

    train: Split
    val: Split
    test: Split
    mean: Tensor
    std: Tensor
    info: DataInfo

    def num_images(self, split: SplitName) -> int:
        return len(self._split(split).labels)

    def train_batches(
        self,
        config: DataConfig,
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        num_passed: int,
        part: Part = WHOLE,
    ) -> Iterator[Batch]:
        """A part of each augmented training batch of an epoch, after `num_passed`."""
        draws = draw_epoch(
            self.num_images("train"),
            crop_padding=config.crop_padding,
            flip=config.flip,
            generator=epoch_generator(seed, epoch=epoch),
        )
        return train_batches(
            self, draws=draws, batch_size=batch_size, num_passed=num_passed, part=part
        )

    def eval_batches(
        self, split: SplitName, *, batch_size: int, part: Part = WHOLE
    ) -> Iterator[Batch]:
        """A part of a split in its order, normalised, in batches."""
        held, taken = self._split(split), part.of(self.num_images(split))
        images, labels = (
            one[taken.start : taken.stop] for one in (held.images, held.labels)
        )
        return eval_batches(
            Split(images, labels), mean=self.mean, std=self.std, batch_size=batch_size
        )

    def _split(self, name: SplitName) -> Split:
        return {"train": self.train, "val": self.val, "test": self.test}[name]


def load(folder: Path, *, device: torch.device) -> Dataset:
    """Puts a prepared data set on a device.

    On a CPU the images stay mapped, so that processes share one copy of them.

    Raises:
        InputError: the folder holds no decoded data set.
    """
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        if meta.get("root"):
            raise InputError(
                f"{meta['info']['name']} streams from its files here, and this needs "
                'images in memory: data.loading = "memory".'
            )
        train, val, test = (
            _load_split(folder, split, device=device)
            for split in ("train", "val", "test")
        )
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} holds no decoded data set ({error.filename} is missing); "
            "prepare the data again."
        ) from None
    return Dataset(
        train=train,
        val=val,
        test=test,
        mean=torch.tensor(meta["mean"], device=device),
        std=torch.tensor(meta["std"], device=device),
        info=info_from(meta["info"]),
    )


# Batches and augmentation.


@dataclass(frozen=True)
class Batch:
    """images: float32 (N, C, H, W), strided channels-last; labels: int64 (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class EpochDraws:
    """All random draws of an epoch over N images.

    order: int64 (N,), a permutation; shift: int64 (N, 2), how far the image at each
    position of the epoch moves up and left, in pixels from -padding to padding;
    mirrored: bool (N,).
    """

    order: Tensor
    shift: Tensor
    mirrored: Tensor


def epoch_generator(seed: int, *, epoch: int) -> torch.Generator:
    """The generator of one epoch, on the CPU so that devices agree."""
    state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def draw_epoch(
    num_images: int, *, crop_padding: int, flip: bool, generator: torch.Generator
) -> EpochDraws:
    """Draws order, crops and mirrorings of an epoch."""
    order = torch.randperm(num_images, generator=generator)
    size = (num_images, 2)
    shift = torch.randint(-crop_padding, crop_padding + 1, size, generator=generator)
    mirrored = torch.randint(0, 2, (num_images,), generator=generator).bool()
    return EpochDraws(order, shift, mirrored & flip)


def num_batches(num_images: int, *, batch_size: int) -> int:
    """Batches of an epoch: the last partial one is dropped unless it is the only."""
    return max(1, num_images // batch_size)


def train_batches(
    dataset: Dataset,
    *,
    draws: EpochDraws,
    batch_size: int,
    num_passed: int = 0,
    part: Part = WHOLE,
) -> Iterator[Batch]:
    """The augmented training batches of an epoch, in the order of `draws`.

    The first `num_passed` are left out: those are done.
    """
    images, labels = dataset.train.images, dataset.train.labels
    places = [
        torch.arange(taken.start, taken.stop)
        for taken in batch_slices(
            len(draws.order), batch_size=batch_size, num_passed=num_passed, part=part
        )
    ]
    if not places:
        return
    place = torch.cat(places)
    order, shift, mirrored = (
        drawn[place].to(images.device)
        for drawn in (draws.order, draws.shift, draws.mirrored)
    )
    size = len(places[0])
    at_once = size * _batches_at_once(images, size)
    for first in range(0, len(order), at_once):
        taken = slice(first, first + at_once)
        augmented = augment(
            images,
            positions=order[taken],
            shift=shift[taken],
            mirrored=mirrored[taken],
            mean=dataset.mean,
            std=dataset.std,
        )
        count = len(augmented) // size
        yield from parts_of(Batch(augmented, labels[order[taken]]), count=count)


def _batches_at_once(images: Tensor, size: int) -> int:
    """How many batches of a size are augmented at once.

    On a GPU some two dozen kernels are launched for it, which take longer to launch
    than to run.
    """
    if images.is_cpu:
        return 1
    values = size * images[0].numel()
    return max(1, min(_MOST_AT_ONCE, _VALUES_AT_ONCE // values))


def batch_slices(
    num_images: int, *, batch_size: int, num_passed: int, part: Part
) -> Iterator[slice]:
    """The places of a part of each batch in the order of an epoch."""
    size = min(batch_size, num_images)
    taken = part.of(size)
    for batch in range(num_passed, num_batches(num_images, batch_size=batch_size)):
        yield slice(batch * size + taken.start, batch * size + taken.stop)


def parts_of(batch: Batch, *, count: int) -> tuple[Batch, ...]:
    """A batch in parts of nearly equal size, in order."""
    if count == 1:
        return (batch,)
    images, labels = (t.tensor_split(count) for t in (batch.images, batch.labels))
    return tuple(map(Batch, images, labels))


def eval_batches(
    split: Split, *, mean: Tensor, std: Tensor, batch_size: int
) -> Iterator[Batch]:
    """All images of a split in their order, normalised."""
    for start in range(0, len(split.labels), batch_size):
        part = slice(start, start + batch_size)
        images = normalise(split.images[part], mean=mean, std=std)  # (N, H, W, C)
        yield Batch(images.permute(0, 3, 1, 2), split.labels[part])


def normalise(images: Tensor, *, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (..., C) to float32: (pixel / 255 - mean) / std."""
    return torch.addcmul(-mean / std, images.float(), 1 / (255 * std))


def augment(
    images: Tensor,
    *,
    positions: Tensor,
    shift: Tensor,
    mirrored: Tensor,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """Pads, crops, mirrors and normalises chosen images, all at once.

    Equals normalising, padding with zeros, cropping each image at its own place and
    then mirroring it: what comes from outside the image is 0 in normalised units.

    Args:
        images: uint8 (N, H, W, C).
        positions: int64 (B,), which of the images.
        shift: int64 (B, 2), pixels up and left.
        mirrored: bool (B,), swaps left and right.
        mean, std: float32 (C,), in units of pixel / 255.

    Returns:
        float32 (B, C, H, W), strided channels-last.
    """
    how = _augment_by_loops if images.is_cpu else _augment_at_once
    return how(images, EpochDraws(positions, shift, mirrored), mean, std)


def _augment_by_loops(
    images: Tensor, draws: EpochDraws, mean: Tensor, std: Tensor
) -> Tensor:
    """As `augment`, on a CPU: a third of the time that torch takes at once."""
    # Imported here because it brings a compiler, and few who read data augment it.
    from resnext_ablate.compute import image_loops

    out = torch.empty((len(draws.order), *images.shape[1:]))
    given = (images, draws.order, draws.shift, draws.mirrored)
    arrays = [tensor.contiguous().numpy() for tensor in given]
    of_bytes = _of_bytes(tuple(mean.tolist()), tuple(std.tolist()))
    image_loops.augment(*arrays, of_bytes, out.numpy())
    return out.permute(0, 3, 1, 2)


@lru_cache(maxsize=8)
def _of_bytes(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> npt.NDArray[np.float32]:
    """What each byte becomes, (C, 256); the same in every batch."""
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    moments = {"mean": torch.tensor(mean), "std": torch.tensor(std)}
    table: npt.NDArray[np.float32] = (
        normalise(every, **moments).t().contiguous().numpy()
    )
    return table


def _augment_at_once(
    images: Tensor, draws: EpochDraws, mean: Tensor, std: Tensor
) -> Tensor:
    """As `augment`, on any device."""
    _, height, width, channels = images.shape
    rows = torch.arange(height, device=images.device) + draws.shift[:, :1]  # (B, H)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(draws.mirrored[:, None], width - 1 - columns, columns)
    columns = columns + draws.shift[:, 1:]  # (B, W)
    inside_rows = (rows >= 0) & (rows < height)
    inside_columns = (columns >= 0) & (columns < width)
    inside = inside_rows[:, :, None] & inside_columns[:, None, :]  # (B, H, W)
    rows = draws.order[:, None] * height + rows.clamp(0, height - 1)
    strips = images.reshape(-1, width * channels).index_select(0, rows.flatten())
    strips = strips.view(-1, height, width * channels)
    first = columns.clamp(0, width - 1)[:, :, None] * channels  # (B, W, 1)
    taken = (first + torch.arange(channels, device=images.device)).flatten(1)
    gathered = strips.gather(2, taken[:, None].expand_as(strips))
    gathered = gathered.view(-1, height, width, channels)
    padded = normalise(gathered, mean=mean, std=std) * inside[..., None]
    return padded.permute(0, 3, 1, 2)


def _load_split(folder: Path, split: str, *, device: torch.device) -> Split:
    # Copy-on-write: torch wants memory that it may write to, though nobody does.
    images, labels = (
        torch.from_numpy(np.load(folder / f"{split}_{kind}.npy", mmap_mode="c"))
        for kind in ("images", "labels")
    )
    return Split(images.to(device), labels.to(device))
