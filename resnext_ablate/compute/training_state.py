"""How far seeds that train together are: where that is kept, and begun again from.

A checkpoint is each seed's own, as if it trained alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from resnext_ablate.compute import checkpoint, together
from resnext_ablate.compute.checkpoint import Checkpoint, Keeper
from resnext_ablate.compute.data import Feed, Part, num_batches
from resnext_ablate.compute.endings import NonFiniteLossError
from resnext_ablate.compute.graphs import Step
from resnext_ablate.compute.hardware import Precision
from resnext_ablate.compute.learner import Learner
from resnext_ablate.records.config import TrainConfig
from resnext_ablate.records.data_config import DataConfig
from resnext_ablate.records.records import EpochRecord


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    epochs: tuple[EpochRecord, ...]
    test_loss: float
    test_error_pct: float
    train_time_s: float
    """The training parts of all epochs; of seeds that train together each one's share.
    """
    images_per_s: float
    peak_memory_mib: float
    device: str
    precision: Precision
    correct: npt.NDArray[np.bool_]
    """(N,): which test images were classified right, in the order of the split."""


@dataclass(frozen=True, kw_only=True)
class Seed:
    """One run of those that train together."""

    seed: int
    """Gives the weights, and the same draws of images for every net."""
    on_epoch: Callable[[EpochRecord], None]
    """Told each epoch's metrics, those of a checkpoint too. What it raises ends all."""
    on_end: Callable[[RunResult | NonFiniteLossError], None]
    """Told once what became of it; the others go on."""
    keeper: Keeper | None = None
    """Where its checkpoints are kept, as if it trained alone; None keeps none."""


@dataclass(frozen=True)
class Run:
    learner: Learner
    step: Step
    """The learner's."""
    config: TrainConfig
    data_config: DataConfig
    dataset: Feed
    seeds: tuple[Seed, ...]
    device: torch.device
    should_stop: Callable[[], bool]

    @property
    def part(self) -> Part:
        """What this process takes of each batch and split."""
        return Part(self.learner.peers.rank, self.learner.peers.count)


@dataclass
class Progress:
    """How far the seeds are: with the weights, all there is to them between steps."""

    epochs: list[tuple[EpochRecord, ...]]
    """Of each seed, those that are over."""
    live: set[int]
    """Places of the seeds that go on; the others have diverged."""
    num_over: int
    """Epochs that are over."""
    step: int
    """Steps done of the epoch under way."""
    losses: Tensor
    """(steps of an epoch, seeds) on the device."""
    wrong: Tensor
    """int64 (seeds,) on the device: training images that these steps got wrong."""
    time_s: float
    """Training time of these steps, at the last checkpoint or the epoch's end."""

    @property
    def epoch(self) -> int:
        """The epoch under way, from 1."""
        return self.num_over + 1


def begin(run: Run) -> Progress:
    """The start of a run, or the place where the newest checkpoints have it."""
    count = len(run.seeds)
    progress = fresh_epoch(run, epochs=[()] * count, live=set(range(count)))
    keepers = [one.keeper for one in run.seeds if one.keeper]
    loaded: Sequence[Checkpoint | None] = ()
    if keepers:  # One after the other, since bad checkpoints are taken away.
        load = partial(checkpoint.load_together, keepers)
        loaded = run.learner.peers.after_leader(load)
    kept = [one for one in loaded if one]
    if not kept:
        return progress
    model, optimizer = run.learner.model, run.learner.optimizer
    model.load_state_dict(together.joint([one.model for one in kept]))
    optimizer.load_state_dict(together.joint_optimizer([one.optimizer for one in kept]))
    first = kept[0]
    checkpoint.set_random_states(first.random_states, device=run.device)
    losses = torch.stack([one.losses for one in kept], dim=1)
    progress.losses[: first.step] = losses.to(run.device)
    wrong = torch.tensor([one.num_wrong for one in kept], device=run.device)
    return replace(
        progress,
        epochs=[one.epochs for one in kept],
        num_over=len(first.epochs),
        step=first.step,
        wrong=wrong,
        time_s=sum(one.time_s for one in kept),
    )


def fresh_epoch(
    run: Run, *, epochs: list[tuple[EpochRecord, ...]], live: set[int]
) -> Progress:
    """The start of the epoch after those that are over, for the seeds still alive."""
    shape = (steps_per_epoch(run), len(run.seeds))
    losses = torch.zeros(shape, device=run.device)
    wrong = torch.zeros(shape[1], dtype=torch.int64, device=run.device)
    num_over = max(map(len, epochs))
    return Progress(epochs, live, num_over, 0, losses, wrong, 0.0)


def is_due(run: Run, progress: Progress, *, at_epoch_end: bool) -> bool:
    if not run.learner.peers.leads:
        return False
    keepers = [run.seeds[index].keeper for index in progress.live]
    return any(one.is_due(at_epoch_end=at_epoch_end) for one in keepers if one)


def save(run: Run, progress: Progress) -> None:
    """A checkpoint for each seed that goes on, as it would be alone."""
    if not run.learner.peers.leads:
        return  # It holds what the leader holds.
    count = len(run.seeds)
    models = together.apart(run.learner.model.state_dict(), count=count)
    optimizers = together.optimizer_apart(
        run.learner.optimizer.state_dict(), count=count
    )
    wrong = progress.wrong.tolist()
    for index in sorted(progress.live):
        keeper = run.seeds[index].keeper
        if keeper is None:
            continue
        keeper.save(
            Checkpoint(
                epochs=progress.epochs[index],
                step=progress.step,
                losses=progress.losses[: progress.step, index].clone(),
                num_wrong=wrong[index],
                time_s=progress.time_s / count,
                model=models[index],
                optimizer=optimizers[index],
                random_states=checkpoint.random_states(run.device),
            )
        )


def steps_per_epoch(run: Run) -> int:
    count = run.dataset.num_images("train")
    return num_batches(count, batch_size=run.config.batch_size)


def batch_size(run: Run) -> int:
    return min(run.config.batch_size, run.dataset.num_images("train"))
