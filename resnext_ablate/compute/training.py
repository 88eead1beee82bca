"""One run: a net trained from a seed, epoch by epoch, and scored once on the test set.

Several seeds of a net may train together, as one net (see `together`): each is the run
that it would be alone, up to rounding, and ends on its own. Nothing here waits for a
CUDA device inside an epoch: losses and errors add up on the device, and a loss that is
not finite is found there every hundred steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from resnext_ablate.architecture.spec import InputError, ResNeXtSpec
from resnext_ablate.compute import together
from resnext_ablate.compute.checkpoint import Keeper
from resnext_ablate.compute.data import Batch, Feed, Part, SplitName, epoch_generator
from resnext_ablate.compute.endings import NonFiniteLossError, RunStoppedError
from resnext_ablate.compute.graphs import step_of
from resnext_ablate.compute.hardware import (
    device_name,
    kernel_choice,
    peak_memory_mib,
    reset_peak_memory,
    synchronised_time_s,
)
from resnext_ablate.compute.learner import compile_loops, evaluator, new_learner
from resnext_ablate.compute.optimization import learning_rate
from resnext_ablate.compute.peers import ALONE, Peers
from resnext_ablate.compute.training_state import (
    Progress,
    Run,
    RunResult,
    Seed,
    batch_size,
    begin,
    fresh_epoch,
    is_due,
    save,
    steps_per_epoch,
)
from resnext_ablate.records.config import TrainConfig
from resnext_ablate.records.data_config import DataConfig
from resnext_ablate.records.records import EpochRecord

_CUDA_CHECK_INTERVAL = 100
"""Steps between two looks at the losses of a CUDA device."""
_EVAL_BATCH_FACTOR = 4
"""Evaluation keeps no activations, so that larger batches fit on a GPU."""
_EVAL_BYTES = 4 << 20
"""Of an activation on a CPU: twice as fast as batches that leave a core's cache."""
_FEWEST_EVAL_IMAGES = 8


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
    """Trains a net from one seed; see `train_together`.

    Raises:
        NonFiniteLossError: a loss is not finite.
    """
    ended: list[RunResult | NonFiniteLossError] = []
    train_together(
        spec,
        config=config,
        data_config=data_config,
        dataset=dataset,
        seeds=[Seed(seed=seed, on_epoch=on_epoch, on_end=ended.append, keeper=keeper)],
        device=device,
        deterministic=deterministic,
        should_stop=should_stop,
        num_micro_batches=num_micro_batches,
    )
    (end,) = ended
    if isinstance(end, NonFiniteLossError):
        raise end
    return end


def train_together(
    spec: ResNeXtSpec,
    *,
    config: TrainConfig,
    data_config: DataConfig,
    dataset: Feed,
    seeds: Sequence[Seed],
    device: torch.device,
    deterministic: bool,
    should_stop: Callable[[], bool] = never,
    num_micro_batches: int = 1,
    peers: Peers = ALONE,
) -> None:
    """Trains a net from each seed and scores the test split once, with the last
    epoch's weights.

    With keepers it goes on from the newest checkpoint there, to the numbers that it
    would have had without a stop.

    Args:
        spec: the net; must fit the data set.
        config: how to train. Precision and kernels "auto" are resolved here on their
            own; `conv_forms` "auto" means torch's, since a study times them.
        data_config: padding of the crops and whether to mirror.
        dataset: on the same device.
        seeds: the runs.
        device: where to train. On a CPU the caller sets the number of threads.
        deterministic: same seed, same numbers on the same hardware.
        should_stop: asked before each batch, of evaluation too.
        num_micro_batches: parts of each batch, which batch normalisation sees alone.
        peers: who train it together, each a part of each batch, likewise.

    Raises:
        InputError: the net does not fit the data set.
        RunStoppedError: `should_stop` said so.
    """
    _check_fit(spec, dataset=dataset)
    _check_parts(config, dataset=dataset, peers=peers)
    reset_peak_memory(device)
    with kernel_choice(deterministic=deterministic):
        learner = new_learner(
            spec,
            generators=[_weights_generator(one.seed) for one in seeds],
            config=config,
            image_size=dataset.info.image_size,
            device=device,
            num_micro_batches=num_micro_batches,
            peers=peers,
        )
        run = Run(
            learner=learner,
            step=step_of(learner),
            config=config,
            data_config=data_config,
            dataset=dataset,
            seeds=tuple(seeds),
            device=device,
            should_stop=should_stop,
        )
        _train(run)


def _train(run: Run) -> None:
    compile_loops(run.learner)
    progress = begin(run)
    for one, epochs in zip(run.seeds, progress.epochs, strict=True):
        for metrics in epochs:
            one.on_epoch(metrics)
    while progress.live and progress.num_over < run.config.epochs:
        progress = _run_epoch(run, progress)
        for index in sorted(progress.live):
            run.seeds[index].on_epoch(progress.epochs[index][-1])
        if progress.live and is_due(run, progress, at_epoch_end=True):
            save(run, progress)
    if not progress.live:
        return
    scores = _evaluate(run, "test", progress=progress)
    for index, test in scores.items():
        run.seeds[index].on_end(_result(run, progress, index=index, test=test))


def _result(run: Run, progress: Progress, *, index: int, test: _Score) -> RunResult:
    epochs = progress.epochs[index]
    time_s = sum(metrics.time_s for metrics in epochs)
    images = steps_per_epoch(run) * batch_size(run) * run.config.epochs
    return RunResult(
        epochs=epochs,
        test_loss=test.loss,
        test_error_pct=test.error_pct,
        train_time_s=time_s,
        images_per_s=images / time_s,
        peak_memory_mib=_peak_memory_mib(run, epochs),
        device=device_name(run.device),
        precision=run.learner.precision,
        correct=test.correct,
    )


@dataclass(frozen=True)
class _Score:
    loss: float
    error_pct: float
    correct: npt.NDArray[np.bool_]


def _run_epoch(run: Run, progress: Progress) -> Progress:
    """Brings the epoch under way to its end, and begins the next one."""
    _train_epoch(run, progress)
    if not progress.live:
        return progress
    vals = _evaluate(run, "val", progress=progress)
    steps, epoch = steps_per_epoch(run), progress.epoch
    images = steps * batch_size(run)
    time_s = progress.time_s / len(run.seeds)
    losses = progress.losses.double().mean(dim=0).tolist()
    wrong = progress.wrong.tolist()
    rate = learning_rate(run.config, step=epoch * steps - 1, steps_per_epoch=steps)
    epochs = progress.epochs.copy()
    for index, val in vals.items():
        record = EpochRecord(
            epoch=epoch,
            train_loss=losses[index],
            train_error_pct=100 * wrong[index] / images,
            val_loss=val.loss,
            val_error_pct=val.error_pct,
            learning_rate=rate,
            time_s=time_s,
            images_per_s=images / time_s,
            peak_memory_mib=_peak_memory_mib(run, epochs[index]),
        )
        epochs[index] = (*epochs[index], record)
    return fresh_epoch(run, epochs=epochs, live=progress.live)


def _peak_memory_mib(run: Run, epochs: tuple[EpochRecord, ...]) -> float:
    # A run that goes on in another process had its peak in an earlier one, perhaps.
    earlier = (metrics.peak_memory_mib for metrics in epochs)
    return max(peak_memory_mib(run.device), *earlier, 0.0)


def _train_epoch(run: Run, progress: Progress) -> None:
    steps, epoch = steps_per_epoch(run), progress.epoch
    interval = 1 if run.device.type == "cpu" else _CUDA_CHECK_INTERVAL
    run.learner.model.train()
    start = synchronised_time_s(run.device) - progress.time_s
    batches = zip(
        *(_batches(run, progress, seed=one.seed) for one in run.seeds), strict=True
    )
    for step, own in enumerate(batches, start=progress.step):
        start = _between_steps(run, progress, start=start)
        rate = learning_rate(
            run.config, step=(epoch - 1) * steps + step, steps_per_epoch=steps
        )
        progress.losses[step] = run.step(
            together.joint_batch(own), learning_rate=rate, wrong=progress.wrong
        )
        progress.step = step + 1
        if progress.step % interval == 0 or progress.step == steps:
            done = progress.losses[: progress.step]
            for index, error in _diverged(done, interval=interval, epoch=epoch).items():
                _drop(run, progress, index=index, error=error)
            if not progress.live:
                return
    progress.time_s = synchronised_time_s(run.device) - start


def _batches(run: Run, progress: Progress, *, seed: int) -> Iterator[Batch]:
    """What is left of a seed's batches of the epoch under way."""
    return run.dataset.train_batches(
        run.data_config,
        seed=seed,
        epoch=progress.epoch,
        batch_size=run.config.batch_size,
        num_passed=progress.step,
        part=run.part,
    )


def _drop(
    run: Run, progress: Progress, *, index: int, error: NonFiniteLossError
) -> None:
    """Ends a seed that has diverged, unless it has ended before."""
    if index in progress.live:
        progress.live.remove(index)
        run.seeds[index].on_end(error)


def _between_steps(run: Run, progress: Progress, *, start: float) -> float:
    """Saves or stops the run where that is due; moves `start` by what saving took."""
    if run.should_stop():
        progress.time_s = synchronised_time_s(run.device) - start
        _stop(run, progress)
    if not is_due(run, progress, at_epoch_end=False):
        return start
    progress.time_s = synchronised_time_s(run.device) - start
    save(run, progress)
    return synchronised_time_s(run.device) - progress.time_s


def _stop(run: Run, progress: Progress) -> NoReturn:
    save(run, progress)
    epoch, step = progress.epoch, progress.step
    raise RunStoppedError(f"stopped in epoch {epoch} after step {step}")


def _diverged(
    losses: Tensor, *, interval: int, epoch: int
) -> dict[int, NonFiniteLossError]:
    """The first bad step of each seed in the last `interval` of an epoch's so far.

    Args:
        losses: (steps, seeds).
        interval: how many to look at.
        epoch: the epoch under way.
    """
    seen = max(0, len(losses) - interval)
    found: dict[int, NonFiniteLossError] = {}
    for step, row in enumerate(losses[seen:].tolist(), start=seen + 1):
        for index, loss in enumerate(row):
            if not math.isfinite(loss) and index not in found:
                found[index] = NonFiniteLossError(
                    split="train", loss=loss, epoch=epoch, step=step
                )
    return found


def _evaluate(run: Run, split: SplitName, *, progress: Progress) -> dict[int, _Score]:
    """Plain cross entropy and error of a split, as it is, by the current weights.

    Returns:
        The score of each seed that goes on; one without a finite loss ends here.
    """
    totals, correct = _answers(run, split, progress=progress)
    scores = {}
    for index in sorted(progress.live):
        bits = correct[index]
        loss = totals[index] / len(bits)
        if math.isfinite(loss):
            error_pct = 100 * int((~bits).sum()) / len(bits)
            scores[index] = _Score(loss, error_pct, bits)
        else:
            steps, epoch = steps_per_epoch(run), min(progress.epoch, run.config.epochs)
            name = {"val": "validation"}.get(split, split)
            error = NonFiniteLossError(split=name, loss=loss, epoch=epoch, step=steps)
            _drop(run, progress, index=index, error=error)
    return scores


def _answers(
    run: Run, split: SplitName, *, progress: Progress
) -> tuple[list[float], npt.NDArray[np.bool_]]:
    """Each seed's summed loss, and (K, N) which images it got right."""
    peers, count = run.learner.peers, len(run.seeds)
    num_images = run.dataset.num_images(split)
    losses, place = [], run.part.of(num_images).start
    right = torch.zeros((count, num_images), dtype=torch.uint8, device=run.device)
    logits_of = evaluator(run.learner)
    with torch.inference_mode():
        for batch in _eval_rounds(run, split):
            if run.should_stop():
                _stop(run, progress)
            if batch is None:
                continue
            own, labels = logits_of(batch.images).unbind(1), batch.labels
            losses += [F.cross_entropy(one, labels, reduction="sum") for one in own]
            end = place + len(labels)
            right[:, place:end] = torch.stack([o.argmax(dim=1) == labels for o in own])
            place = end
        totals = torch.stack(losses).view(-1, count).double().sum(dim=0)
    totals = peers.total(totals.clone())
    return totals.tolist(), peers.total(right).bool().cpu().numpy()


def _eval_rounds(run: Run, split: SplitName) -> Iterator[Batch | None]:
    """Batches of this process's part; None where only others have one left."""
    count = run.learner.peers.count
    size = _eval_batch_size(run)
    longest = len(Part(0, count).of(run.dataset.num_images(split)))
    batches = run.dataset.eval_batches(split, batch_size=size, part=run.part)
    for _ in range(-(-longest // size)):
        yield next(batches, None)


def _eval_batch_size(run: Run) -> int:
    """Images that one process evaluates at once."""
    size = _EVAL_BATCH_FACTOR * run.config.batch_size // run.learner.peers.count
    if run.device.type == "cpu":
        layout = run.learner.model.spec.layout(run.dataset.info.image_size)
        largest = max(
            conv.branches * conv.out_channels * conv.out_side**2
            for conv in layout.times(len(run.seeds)).convs
        )
        value_bytes = 2 if run.learner.precision == "bf16" else 4
        fitting = _EVAL_BYTES // (value_bytes * largest)
        size = min(size, max(fitting, _FEWEST_EVAL_IMAGES))
    return size


def _check_parts(config: TrainConfig, *, dataset: Feed, peers: Peers) -> None:
    if peers.count == 1:
        return
    size = min(config.batch_size, dataset.num_images("train"))
    fewest = min(dataset.num_images("val"), dataset.num_images("test"))
    if size % peers.count or fewest < peers.count:
        raise InputError(
            f"run.devices_per_run = {peers.count} must divide a batch of {size} images "
            "and leave each device some of every split."
        )


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


def _weights_generator(seed: int) -> torch.Generator:
    # Epoch 0 of the seed: apart from every epoch's own draws.
    state = epoch_generator(seed, epoch=0).initial_seed()
    return torch.Generator().manual_seed(state)
