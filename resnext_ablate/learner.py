"""A net that learns: one training step, and one forward pass of evaluation.

Both are what a study does and what `bench` measures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resnext_ablate.config import TrainConfig
from resnext_ablate.data import Batch, parts_of
from resnext_ablate.hardware import Precision
from resnext_ablate.layers import settle
from resnext_ablate.model import ResNeXt, build, for_evaluation
from resnext_ablate.optimization import make_optimizer
from resnext_ablate.spec import ResNeXtSpec
from resnext_ablate.tuning import resolve_kernels, resolve_precision


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A net with all that its steps need."""

    model: ResNeXt
    optimizer: torch.optim.SGD
    config: TrainConfig
    device: torch.device
    precision: Precision
    num_micro_batches: int = 1
    """Parts of each batch, which batch normalisation sees alone."""


def new_learner(
    spec: ResNeXtSpec,
    *,
    generator: torch.Generator,
    config: TrainConfig,
    image_size: int,
    device: torch.device,
    num_micro_batches: int = 1,
) -> Learner:
    """A net before its first step, in train mode.

    Args:
        spec: the net.
        generator: draws its weights, on the CPU.
        config: how to train. Precision and kernels "auto" are resolved here on their
            own; `conv_forms` "auto" means torch's, since a study times them.
        image_size: pixels of a side.
        device: where it trains.
        num_micro_batches: parts of each batch.
    """
    model = build(spec, generator=generator).to(device)
    kernels = resolve_kernels(
        config.kernels, device=device, channels_last=config.channels_last
    )
    forms = {} if config.conv_forms == "auto" else config.conv_forms
    settle(model, spec.layout(image_size), kernels=kernels, forms=forms)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return Learner(
        model=model,
        optimizer=make_optimizer(model, config=config),
        config=config,
        device=device,
        precision=resolve_precision(config.precision, device=device),
        num_micro_batches=num_micro_batches,
    )


def update(
    learner: Learner, batch: Batch, *, learning_rate: float, wrong: Tensor
) -> Tensor:
    """One training step of a net in train mode.

    Args:
        learner: its weights, statistics and optimizer change.
        batch: augmented images, on its device.
        learning_rate: of this step.
        wrong: int64 () on the device; the batch's wrong answers are added.

    Returns:
        The batch's mean loss as minimised, float32 () on the device.
    """
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate
    learner.optimizer.zero_grad()
    losses = [
        _add_gradients(
            learner, part, share=len(part.labels) / len(batch.labels), wrong=wrong
        )
        for part in parts_of(batch, count=learner.num_micro_batches)
    ]
    learner.optimizer.step()
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def evaluator(learner: Learner) -> Callable[[Tensor], Tensor]:
    """The net as it is now, for evaluation; training goes on after `model.train()`.

    Returns:
        What turns float images (N, C, H, W) into logits, float32 (N, num_classes).
    """
    learner.optimizer.zero_grad()  # A copy of the net must not copy its gradients.
    model = for_evaluation(learner.model)

    def logits(images: Tensor) -> Tensor:
        with torch.inference_mode(), _autocast(learner):
            answers: Tensor = model(_arranged(learner, images))
        return answers.float()

    return logits


def _add_gradients(
    learner: Learner, batch: Batch, *, share: float, wrong: Tensor
) -> Tensor:
    """Adds the gradients of a part of a batch; returns its share of the mean loss."""
    with _autocast(learner):
        logits = learner.model(_arranged(learner, batch.images))
        loss = F.cross_entropy(
            logits.float(),
            batch.labels,
            label_smoothing=learner.config.label_smoothing,
        )
    if share < 1:
        loss = loss * share
    loss.backward()  # type: ignore[no-untyped-call]
    wrong += (logits.detach().argmax(dim=1) != batch.labels).sum()
    return loss.detach()


def _arranged(learner: Learner, images: Tensor) -> Tensor:
    """Images come channels-last."""
    return images if learner.config.channels_last else images.contiguous()


def _autocast(learner: Learner) -> torch.autocast:
    return torch.autocast(
        learner.device.type,
        dtype=torch.bfloat16,
        enabled=learner.precision == "bf16",
    )
