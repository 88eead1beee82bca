"""One run: a net trained from a seed, epoch by epoch, and scored once on the test set.

Nothing here waits for a CUDA device inside an epoch: losses and errors add up on the
device, and a loss that is not finite is found there every hundred steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from resnext_ablate import checkpoint
from resnext_ablate.checkpoint import Checkpoint, Keeper
from resnext_ablate.config import TrainConfig
from resnext_ablate.data import Feed, SplitName, epoch_generator, num_batches
from resnext_ablate.data_config import DataConfig
from resnext_ablate.endings import NonFiniteLossError, RunStoppedError
from resnext_ablate.hardware import (
    Precision,
    device_name,
    kernel_choice,
    peak_memory_mib,
    reset_peak_memory,
    synchronised_time_s,
)
from resnext_ablate.learner import Learner, evaluator, new_learner, update
from resnext_ablate.optimization import learning_rate
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


def never() -> bool:
    """The `should_stop` of a run that nobody stops."""
    return False


def train(
    spec: ResNeXtSpec,
    *,
    config: TrainConfig,
    data_config: DataConfig,
    dataset: Feed,
    seed: int,
    device: torch.device,
    deterministic: bool,
    on_epoch: Callable[[EpochRecord], None],
    keeper: Keeper | None = None,
    should_stop: Callable[[], bool] = never,
    num_micro_batches: int = 1,
) -> RunResult:
    """Trains a net and scores the test split once, with the last epoch's weights.

    With a keeper it goes on from the newest checkpoint there, to the numbers that it
    would have had without a stop.

    Args:
        spec: the net; must fit the data set.
        config: how to train. Precision and kernels "auto" are resolved here on their
            own; `conv_forms` "auto" means torch's, since a study times them.
        data_config: padding of the crops and whether to mirror.
        dataset: on the same device.
        seed: gives the weights, and the same draws of images for every net.
        device: where to train. On a CPU the caller sets the number of threads.
        deterministic: same seed, same numbers on the same hardware.
        on_epoch: told each epoch's metrics, those of a checkpoint too. What it raises
            ends the run.
        keeper: where checkpoints are kept; None keeps none.
        should_stop: asked before each batch, of evaluation too.
        num_micro_batches: parts of each batch, which batch normalisation sees alone.

    Raises:
        InputError: the net does not fit the data set.
        NonFiniteLossError: a loss is not finite.
        RunStoppedError: `should_stop` said so.
    """
    _check_fit(spec, dataset=dataset)
    reset_peak_memory(device)
    with kernel_choice(deterministic=deterministic):
        run = _Run(
            learner=new_learner(
                spec,
                generator=torch.Generator().manual_seed(_weights_seed(seed)),
                config=config,
                image_size=dataset.info.image_size,
                device=device,
                num_micro_batches=num_micro_batches,
            ),
            config=config,
            data_config=data_config,
            dataset=dataset,
            seed=seed,
            device=device,
            keeper=keeper,
            should_stop=should_stop,
        )
        return _train(run, on_epoch=on_epoch)


def _train(run: _Run, *, on_epoch: Callable[[EpochRecord], None]) -> RunResult:
    progress = _begin(run)
    for metrics in progress.epochs:
        on_epoch(metrics)
    while len(progress.epochs) < run.config.epochs:
        progress = _run_epoch(run, progress)
        on_epoch(progress.epochs[-1])
        if run.keeper and run.keeper.is_due(at_epoch_end=True):
            run.keeper.save(_checkpoint(run, progress))
    test = _evaluate(run, "test", progress=progress)
    time_s = sum(metrics.time_s for metrics in progress.epochs)
    images = _steps_per_epoch(run) * _batch_size(run) * run.config.epochs
    return RunResult(
        epochs=progress.epochs,
        test_loss=test.loss,
        test_error_pct=test.error_pct,
        train_time_s=time_s,
        images_per_s=images / time_s,
        peak_memory_mib=_peak_memory_mib(run, progress),
        device=device_name(run.device),
        precision=run.learner.precision,
        correct=test.correct,
    )


@dataclass(frozen=True)
class _Run:
    learner: Learner
    config: TrainConfig
    data_config: DataConfig
    dataset: Feed
    seed: int
    device: torch.device
    keeper: Keeper | None
    should_stop: Callable[[], bool]


@dataclass
class _Progress:
    """How far a run is: with the weights, all there is to it between two steps."""

    epochs: tuple[EpochRecord, ...]
    """Those that are over."""
    step: int
    """Steps done of the epoch under way."""
    losses: Tensor
    """(steps of an epoch,) on the device."""
    wrong: Tensor
    """int64 () on the device: training images that these steps got wrong."""
    time_s: float
    """Training time of these steps, at the last checkpoint or the epoch's end."""

    @property
    def epoch(self) -> int:
        """The epoch under way, from 1."""
        return len(self.epochs) + 1


@dataclass(frozen=True)
class _Score:
    loss: float
    error_pct: float
    correct: npt.NDArray[np.bool_]


def _begin(run: _Run) -> _Progress:
    """The start of a run, or the place where its newest checkpoint has it."""
    progress = _fresh_epoch(run, epochs=())
    kept = run.keeper.load() if run.keeper else None
    if kept is None:
        return progress
    run.learner.model.load_state_dict(kept.model)
    run.learner.optimizer.load_state_dict(kept.optimizer)
    checkpoint.set_random_states(kept.random_states, device=run.device)
    progress.losses[: kept.step] = kept.losses.to(run.device)
    progress.wrong += kept.num_wrong
    return replace(progress, epochs=kept.epochs, step=kept.step, time_s=kept.time_s)


def _fresh_epoch(run: _Run, *, epochs: tuple[EpochRecord, ...]) -> _Progress:
    losses = torch.zeros(_steps_per_epoch(run), device=run.device)
    wrong = torch.zeros((), dtype=torch.int64, device=run.device)
    return _Progress(epochs, 0, losses, wrong, 0.0)


def _checkpoint(run: _Run, progress: _Progress) -> Checkpoint:
    return Checkpoint(
        epochs=progress.epochs,
        step=progress.step,
        losses=progress.losses[: progress.step].clone(),
        num_wrong=int(progress.wrong.item()),
        time_s=progress.time_s,
        model=run.learner.model.state_dict(),
        optimizer=run.learner.optimizer.state_dict(),
        random_states=checkpoint.random_states(run.device),
    )


def _run_epoch(run: _Run, progress: _Progress) -> _Progress:
    """Brings the epoch under way to its end, and begins the next one."""
    _train_epoch(run, progress)
    val = _evaluate(run, "val", progress=progress)
    steps, epoch = _steps_per_epoch(run), progress.epoch
    images = steps * _batch_size(run)
    record = EpochRecord(
        epoch=epoch,
        train_loss=progress.losses.double().mean().item(),
        train_error_pct=100 * progress.wrong.item() / images,
        val_loss=val.loss,
        val_error_pct=val.error_pct,
        learning_rate=learning_rate(
            run.config, step=epoch * steps - 1, steps_per_epoch=steps
        ),
        time_s=progress.time_s,
        images_per_s=images / progress.time_s,
        peak_memory_mib=_peak_memory_mib(run, progress),
    )
    return _fresh_epoch(run, epochs=(*progress.epochs, record))


def _peak_memory_mib(run: _Run, progress: _Progress) -> float:
    # A run that goes on in another process had its peak in an earlier one, perhaps.
    earlier = (metrics.peak_memory_mib for metrics in progress.epochs)
    return max(peak_memory_mib(run.device), *earlier, 0.0)


def _train_epoch(run: _Run, progress: _Progress) -> None:
    steps, epoch = _steps_per_epoch(run), progress.epoch
    interval = 1 if run.device.type == "cpu" else _CUDA_CHECK_INTERVAL
    run.learner.model.train()
    start = synchronised_time_s(run.device) - progress.time_s
    batches = run.dataset.train_batches(
        run.data_config,
        seed=run.seed,
        epoch=epoch,
        batch_size=run.config.batch_size,
        num_passed=progress.step,
    )
    for step, batch in enumerate(batches, start=progress.step):
        start = _between_steps(run, progress, start=start)
        rate = learning_rate(
            run.config, step=(epoch - 1) * steps + step, steps_per_epoch=steps
        )
        progress.losses[step] = update(
            run.learner, batch, learning_rate=rate, wrong=progress.wrong
        )
        progress.step = step + 1
        if progress.step % interval == 0 or progress.step == steps:
            done = progress.losses[: progress.step]
            _check_finite(done, interval=interval, epoch=epoch)
    progress.time_s = synchronised_time_s(run.device) - start


def _between_steps(run: _Run, progress: _Progress, *, start: float) -> float:
    """Saves or stops the run where that is due; moves `start` by what saving took."""
    if run.should_stop():
        progress.time_s = synchronised_time_s(run.device) - start
        _stop(run, progress)
    if run.keeper is None or not run.keeper.is_due(at_epoch_end=False):
        return start
    progress.time_s = synchronised_time_s(run.device) - start
    run.keeper.save(_checkpoint(run, progress))
    return synchronised_time_s(run.device) - progress.time_s


def _stop(run: _Run, progress: _Progress) -> NoReturn:
    if run.keeper is not None:
        run.keeper.save(_checkpoint(run, progress))
    epoch, step = progress.epoch, progress.step
    raise RunStoppedError(f"stopped in epoch {epoch} after step {step}")


def _check_finite(losses: Tensor, *, interval: int, epoch: int) -> None:
    """Looks at the last `interval` of an epoch's losses so far."""
    seen = max(0, len(losses) - interval)
    values = losses[seen:].tolist()
    for step, loss in enumerate(values, start=seen + 1):
        if not math.isfinite(loss):
            raise NonFiniteLossError(split="train", loss=loss, epoch=epoch, step=step)


def _evaluate(run: _Run, split: SplitName, *, progress: _Progress) -> _Score:
    """Plain cross entropy and error of a split, as it is, by the current weights."""
    losses, right = [], []
    logits_of = evaluator(run.learner)
    with torch.inference_mode():
        for batch in run.dataset.eval_batches(
            split, batch_size=_EVAL_BATCH_FACTOR * run.config.batch_size
        ):
            if run.should_stop():
                _stop(run, progress)
            logits = logits_of(batch.images)
            losses.append(F.cross_entropy(logits, batch.labels, reduction="sum"))
            right.append(logits.argmax(dim=1) == batch.labels)
        loss = torch.stack(losses).double().sum().item()
        correct = torch.cat(right).cpu().numpy()
    loss /= len(correct)
    if not math.isfinite(loss):
        steps, epoch = _steps_per_epoch(run), min(progress.epoch, run.config.epochs)
        name = {"val": "validation"}.get(split, split)
        raise NonFiniteLossError(split=name, loss=loss, epoch=epoch, step=steps)
    return _Score(loss, 100 * int((~correct).sum()) / len(correct), correct)


def _steps_per_epoch(run: _Run) -> int:
    count = run.dataset.num_images("train")
    return num_batches(count, batch_size=run.config.batch_size)


def _batch_size(run: _Run) -> int:
    return min(run.config.batch_size, run.dataset.num_images("train"))


def _check_fit(spec: ResNeXtSpec, *, dataset: Feed) -> None:
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
