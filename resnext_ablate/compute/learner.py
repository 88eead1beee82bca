"""A net that learns: one training step, and one forward pass of evaluation.

Both are what a study does and what `bench` measures. Several seeds may learn together,
as one net: losses, errors and logits then have a place for each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnext_ablate.architecture.spec import ResNeXtSpec
from resnext_ablate.compute.data import Batch, augment, parts_of
from resnext_ablate.compute.hardware import Precision
from resnext_ablate.compute.layers import apart, settle
from resnext_ablate.compute.model import ResNeXt, build, for_evaluation
from resnext_ablate.compute.optimization import Sgd, make_optimizer
from resnext_ablate.compute.peers import ALONE, Peers
from resnext_ablate.compute.together import fuse, repeated
from resnext_ablate.compute.tuning import resolve_kernels, resolve_precision
from resnext_ablate.records.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A net, or several seeds of it as one, with all that its steps need."""

    model: ResNeXt
    optimizer: Sgd
    config: TrainConfig
    device: torch.device
    precision: Precision
    trained: nn.Module
    """The net as it learns: itself, or with the gradients of its peers."""
    peers: Peers = ALONE
    num_micro_batches: int = 1
    """Parts of each batch, which batch normalisation sees alone."""


def new_learner(
    spec: ResNeXtSpec,
    *,
    generators: Sequence[torch.Generator],
    config: TrainConfig,
    image_size: int,
    device: torch.device,
    num_micro_batches: int = 1,
    peers: Peers = ALONE,
) -> Learner:
    """A net before its first step, in train mode.

    Args:
        spec: the net.
        generators: draw the weights of each seed, on the CPU.
        config: how to train. Precision and kernels "auto" are resolved here on their
            own; `conv_forms` "auto" means torch's, since a study times them.
        image_size: pixels of a side.
        device: where it trains.
        num_micro_batches: parts of each batch.
        peers: those who train it too, each on a part of each batch.
    """
    nets = [build(spec, generator=generator) for generator in generators]
    model = fuse(nets).to(device)
    kernels = resolve_kernels(
        config.kernels, device=device, channels_last=config.channels_last
    )
    forms = {} if config.conv_forms == "auto" else config.conv_forms
    layout = spec.layout(image_size).times(len(nets))
    settle(model, layout, kernels=kernels, forms=forms)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    channels = spec.in_channels * len(nets)
    example = torch.zeros(2, channels, image_size, image_size, device=device)
    return Learner(
        model=model,
        trained=peers.wrapped(model, example=example),
        peers=peers,
        optimizer=make_optimizer(model, config=config),
        config=config,
        device=device,
        precision=resolve_precision(config.precision, device=device),
        num_micro_batches=num_micro_batches,
    )


def compile_loops(learner: Learner) -> None:
    """Compiles what a net on a CPU trains by, where this process has not yet.

    That takes seconds, which are no time of a run. A copy of the net sees two small
    images; its layers meet there whatever they will meet later.
    """
    if learner.device.type != "cpu":
        return
    model = copy.deepcopy(learner.model).train()
    spec = model.spec
    side, channels = spec.total_stride, spec.in_channels
    images = augment(
        torch.zeros(2, side, side, channels, dtype=torch.uint8),
        positions=torch.arange(2),
        shift=torch.zeros(2, 2, dtype=torch.int64),
        mirrored=torch.zeros(2, dtype=torch.bool),
        mean=torch.zeros(channels),
        std=torch.ones(channels),
    )
    images = repeated(images, count=model.copies)
    with _autocast(learner):
        logits = model(_arranged(learner, images))
    logits.float().sum().backward()


def update(
    learner: Learner, batch: Batch, *, learning_rate: float | Tensor, wrong: Tensor
) -> Tensor:
    """One training step of a net in train mode.

    Args:
        learner: its weights, statistics and optimizer change.
        batch: augmented images on its device, see `together.joint_batch`; the part of
            this process where it has peers.
        learning_rate: of this step; a tensor () on the device where it is captured.
        wrong: int64 (K,) on the device; each seed's wrong answers are added.

    Returns:
        Each seed's mean loss as minimised, float32 (K,) on the device.
    """
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate
    learner.optimizer.zero_grad()
    peers, here = learner.peers, wrong
    if peers.count > 1:
        here = torch.zeros_like(wrong)
    *first, last = parts_of(batch, count=learner.num_micro_batches)
    losses = []
    with peers.apart(learner.trained):
        for part in first:
            share = len(part.labels) / len(batch.labels)
            losses.append(_add_gradients(learner, part, share=share, wrong=here))
    share = len(last.labels) / len(batch.labels)
    losses.append(_add_gradients(learner, last, share=share, wrong=here))
    learner.optimizer.step()
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum(dim=0)
    if peers.count == 1:
        return loss
    shared = peers.share_step(learner.model, torch.cat([loss, here.float()]))
    wrong += (shared[len(loss) :] * peers.count).round().long()
    return shared[: len(loss)]


def evaluator(learner: Learner) -> Callable[[Tensor], Tensor]:
    """The net as it is now, for evaluation; training goes on after `model.train()`.

    Returns:
        What turns float images (N, C, H, W) into the logits of each seed, float32
        (N, K, num_classes).
    """
    learner.optimizer.zero_grad()  # A copy of the net must not copy its gradients.
    model = for_evaluation(learner.model)

    def logits(images: Tensor) -> Tensor:
        shown = _arranged(learner, repeated(images, count=learner.model.copies))
        with torch.inference_mode(), _autocast(learner):
            answers: Tensor = model(shown)
        return _of_each(learner, answers)

    return logits


def _add_gradients(
    learner: Learner, batch: Batch, *, share: float, wrong: Tensor
) -> Tensor:
    """Adds the gradients of a part of a batch; returns its share of the mean losses."""
    smoothing = learner.config.label_smoothing
    with _autocast(learner):
        answers = learner.trained(_arranged(learner, batch.images))
    logits = _of_each(learner, answers)
    losses = torch.stack(
        [
            F.cross_entropy(own, labels, label_smoothing=smoothing)
            for own, labels in zip(
                logits.unbind(1), batch.labels.unbind(1), strict=True
            )
        ]
    )
    if share < 1:
        losses = losses * share
    # The seeds share no weight: the gradient of the sum is that of each.
    losses.sum().backward()  # type: ignore[no-untyped-call]
    wrong += (logits.detach().argmax(dim=2) != batch.labels).sum(dim=0)
    return losses.detach()


def _of_each(learner: Learner, answers: Tensor) -> Tensor:
    """(N, K * num_classes) -> float32 (N, K, num_classes)."""
    return apart(answers.float(), learner.model.copies)


def _arranged(learner: Learner, images: Tensor) -> Tensor:
    """Images come channels-last."""
    return images if learner.config.channels_last else images.contiguous()


def _autocast(learner: Learner) -> torch.autocast:
    return torch.autocast(
        learner.device.type,
        dtype=torch.bfloat16,
        enabled=learner.precision == "bf16",
    )
