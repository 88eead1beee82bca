"""One run: a net trained from a seed, epoch by epoch, and scored once on the test set.

Nothing here waits for a CUDA device inside an epoch: losses and errors add up on the
device, and a loss that is not finite is found there every hundred steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnext_ablate.config import DataConfig, TrainConfig
from resnext_ablate.data import (
    Batch,
    Dataset,
    Split,
    draw_epoch,
    epoch_generator,
    eval_batches,
    num_batches,
    train_batches,
)
from resnext_ablate.hardware import (
    Precision,
    device_name,
    kernel_choice,
    peak_memory_mib,
    reset_peak_memory,
    resolve_precision,
    synchronised_time_s,
)
from resnext_ablate.model import build
from resnext_ablate.records import EpochRecord
from resnext_ablate.spec import InputError, ResNeXtSpec

_CUDA_CHECK_INTERVAL = 100
"""Steps between two looks at the losses of a CUDA device."""
_EVAL_BATCH_FACTOR = 4
"""Evaluation keeps no activations, so that larger batches fit."""


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    epochs: tuple[EpochRecord, ...]
    test_loss: float
    test_error_pct: float
    train_time_s: float
    """The training parts of all epochs."""
    images_per_s: float
    peak_memory_mib: float
    device: str
    precision: Precision
    correct: npt.NDArray[np.bool_]
    """(N,): which test images were classified right, in the order of the split."""


class NonFiniteLossError(RuntimeError):
    """A loss became infinite or not a number.

    Attributes:
        epoch: from 1.
        step: from 1, within the epoch.
    """

    def __init__(self, *, split: str, loss: float, epoch: int, step: int) -> None:
        super().__init__(
            f"{split} loss is {loss} at epoch {epoch}, step {step}; a lower "
            "train.learning_rate or some train.warmup_fraction may help."
        )
        self.epoch = epoch
        self.step = step


def train(
    spec: ResNeXtSpec,
    *,
    config: TrainConfig,
    data_config: DataConfig,
    dataset: Dataset,
    seed: int,
    device: torch.device,
    deterministic: bool,
    on_epoch: Callable[[EpochRecord], None],
) -> RunResult:
    """Trains a net and scores the test split once, with the last epoch's weights.

    Args:
        spec: the net; must fit the data set.
        config: how to train. Precision "auto" is resolved here on its own.
        data_config: padding of the crops and whether to mirror.
        dataset: on the same device.
        seed: gives the weights, and the same draws of images for every net.
        device: where to train. On a CPU the caller sets the number of threads.
        deterministic: same seed, same numbers on the same hardware.
        on_epoch: told each epoch's metrics. What it raises ends the run.

    Raises:
        InputError: the net does not fit the data set.
        NonFiniteLossError: a loss is not finite.
    """
    _check_fit(spec, dataset=dataset)
    precision = resolve_precision(config.precision, device=device)
    reset_peak_memory(device)
    with kernel_choice(deterministic=deterministic):
        model = _initial_model(spec, seed=seed, device=device, config=config)
        run = _Run(
            model=model,
            optimizer=make_optimizer(model, config=config),
            config=config,
            data_config=data_config,
            dataset=dataset,
            seed=seed,
            device=device,
            precision=precision,
        )
        epochs = []
        for epoch in range(1, config.epochs + 1):
            epochs.append(_run_epoch(run, epoch=epoch))
            on_epoch(epochs[-1])
        test = _evaluate(run, dataset.test, name="test", epoch=config.epochs)
    time_s = sum(metrics.time_s for metrics in epochs)
    images = _steps_per_epoch(run) * _batch_size(run) * config.epochs
    return RunResult(
        epochs=tuple(epochs),
        test_loss=test.loss,
        test_error_pct=test.error_pct,
        train_time_s=time_s,
        images_per_s=images / time_s,
        peak_memory_mib=peak_memory_mib(device),
        device=device_name(device),
        precision=precision,
        correct=test.correct,
    )


def _initial_model(
    spec: ResNeXtSpec, *, seed: int, device: torch.device, config: TrainConfig
) -> nn.Module:
    weights = torch.Generator().manual_seed(_weights_seed(seed))
    model = build(spec, generator=weights).to(device)
    if config.channels_last:
        return model.to(memory_format=torch.channels_last)
    return model


def learning_rate(config: TrainConfig, *, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step, counted from 0 over all epochs.

    Each schedule first rises in a straight line over the warm-up; its last step has the
    full rate. Then `step` multiplies by `step_factor` at each milestone, a fraction of
    all epochs; `cosine` falls along half a cosine and `one_cycle` in a straight line,
    both over what the warm-up left and to zero just after the last step.
    """
    total = config.epochs * steps_per_epoch
    warmup = config.warmup_fraction * total
    if step < warmup:
        return config.learning_rate * min(1.0, (step + 1) / warmup)
    left = (total - step) / (total - warmup)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (1 - left)))
    if config.schedule == "one_cycle":
        return config.learning_rate * left
    drops = sum(step >= round(mark * total) for mark in config.step_milestones)
    return config.learning_rate * config.step_factor**drops


def make_optimizer(model: nn.Module, *, config: TrainConfig) -> torch.optim.SGD:
    """SGD whose weight decay may spare batch normalisation and biases."""
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.ndim > 1 or config.decay_norm_and_bias]
    spared = [p for p in parameters if p.ndim <= 1 and not config.decay_norm_and_bias]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=True,
    )


@dataclass(frozen=True)
class _Run:
    model: nn.Module
    optimizer: torch.optim.SGD
    config: TrainConfig
    data_config: DataConfig
    dataset: Dataset
    seed: int
    device: torch.device
    precision: Precision


@dataclass(frozen=True)
class _Score:
    loss: float
    error_pct: float
    correct: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Passed:
    """The training part of an epoch."""

    loss: float
    error_pct: float
    time_s: float


def _run_epoch(run: _Run, *, epoch: int) -> EpochRecord:
    passed = _train_epoch(run, epoch=epoch)
    val = _evaluate(run, run.dataset.val, name="validation", epoch=epoch)
    steps = _steps_per_epoch(run)
    return EpochRecord(
        epoch=epoch,
        train_loss=passed.loss,
        train_error_pct=passed.error_pct,
        val_loss=val.loss,
        val_error_pct=val.error_pct,
        learning_rate=learning_rate(
            run.config, step=epoch * steps - 1, steps_per_epoch=steps
        ),
        time_s=passed.time_s,
        images_per_s=steps * _batch_size(run) / passed.time_s,
        peak_memory_mib=peak_memory_mib(run.device),
    )


def _train_epoch(run: _Run, *, epoch: int) -> _Passed:
    steps = _steps_per_epoch(run)
    interval = 1 if run.device.type == "cpu" else _CUDA_CHECK_INTERVAL
    losses = torch.zeros(steps, device=run.device)
    wrong = torch.zeros((), dtype=torch.int64, device=run.device)
    run.model.train()
    start = synchronised_time_s(run.device)
    draws = draw_epoch(
        len(run.dataset.train.labels),
        crop_padding=run.data_config.crop_padding,
        flip=run.data_config.flip,
        generator=epoch_generator(run.seed, epoch=epoch),
    )
    batches = train_batches(run.dataset, draws=draws, batch_size=run.config.batch_size)
    for step, batch in enumerate(batches):
        rate = learning_rate(
            run.config, step=(epoch - 1) * steps + step, steps_per_epoch=steps
        )
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        losses[step] = _step(run, batch, wrong=wrong)
        if (step + 1) % interval == 0 or step + 1 == steps:
            _check_finite(losses[: step + 1], interval=interval, epoch=epoch)
    time_s = synchronised_time_s(run.device) - start
    return _Passed(
        loss=losses.double().mean().item(),
        error_pct=100 * wrong.item() / (steps * _batch_size(run)),
        time_s=time_s,
    )


def _step(run: _Run, batch: Batch, *, wrong: Tensor) -> Tensor:
    """One update; returns the batch's loss and adds its wrong answers to `wrong`."""
    images = batch.images
    if not run.config.channels_last:
        images = images.contiguous()
    with _autocast(run):
        logits = run.model(images)
        loss = F.cross_entropy(
            logits.float(), batch.labels, label_smoothing=run.config.label_smoothing
        )
    run.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    run.optimizer.step()
    wrong += (logits.detach().argmax(dim=1) != batch.labels).sum()
    return loss.detach()


def _check_finite(losses: Tensor, *, interval: int, epoch: int) -> None:
    """Looks at the last `interval` of an epoch's losses so far."""
    seen = max(0, len(losses) - interval)
    values = losses[seen:].tolist()
    for step, loss in enumerate(values, start=seen + 1):
        if not math.isfinite(loss):
            raise NonFiniteLossError(split="train", loss=loss, epoch=epoch, step=step)


def _evaluate(run: _Run, split: Split, *, name: str, epoch: int) -> _Score:
    """Plain cross entropy and error of a split, as it is, by the current weights."""
    losses, right = [], []
    run.model.eval()
    with torch.inference_mode():
        for batch in eval_batches(
            split,
            mean=run.dataset.mean,
            std=run.dataset.std,
            batch_size=_EVAL_BATCH_FACTOR * run.config.batch_size,
        ):
            images = batch.images
            if not run.config.channels_last:
                images = images.contiguous()
            with _autocast(run):
                logits = run.model(images).float()
            losses.append(F.cross_entropy(logits, batch.labels, reduction="sum"))
            right.append(logits.argmax(dim=1) == batch.labels)
        loss = torch.stack(losses).double().sum().item() / len(split.labels)
        correct = torch.cat(right).cpu().numpy()
    if not math.isfinite(loss):
        steps = _steps_per_epoch(run)
        raise NonFiniteLossError(split=name, loss=loss, epoch=epoch, step=steps)
    return _Score(loss, 100 * int((~correct).sum()) / len(correct), correct)


def _autocast(run: _Run) -> torch.autocast:
    return torch.autocast(
        run.device.type, dtype=torch.bfloat16, enabled=run.precision == "bf16"
    )


def _steps_per_epoch(run: _Run) -> int:
    return num_batches(len(run.dataset.train.labels), batch_size=run.config.batch_size)


def _batch_size(run: _Run) -> int:
    return min(run.config.batch_size, len(run.dataset.train.labels))


def _check_fit(spec: ResNeXtSpec, *, dataset: Dataset) -> None:
    info = dataset.info
    spec.layout(info.image_size)
    for what, wants, has in (
        ("in_channels", spec.in_channels, info.in_channels),
        ("num_classes", spec.num_classes, info.num_classes),
    ):
        if wants != has:
            raise InputError(
                f"{spec.name}: {what} must be {has}, as in the data set {info.name}; "
                f"got {wants}."
            )


def _weights_seed(seed: int) -> int:
    # Epoch 0 of the seed: apart from every epoch's own draws.
    return epoch_generator(seed, epoch=0).initial_seed()
