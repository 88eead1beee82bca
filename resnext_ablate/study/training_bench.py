"""Our training beside the loops that people ship, in turns, on the whole machine.

Each turn of a loop is what it makes of the machine: one run on all cores for the loops
as shipped, one run on each core for ours, as a study trains them. Processes start, load
and warm up first, and go at one word, so that only training and evaluation are timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from resnext_ablate.architecture.roofline import Peaks, training_floor_s
from resnext_ablate.architecture.spec import MeasuringError, ResNeXtSpec, spec_from_dict
from resnext_ablate.compute import data, training
from resnext_ablate.compute.data import Dataset, Split
from resnext_ablate.compute.hardware import (
    TRAINING_ENVIRONMENT,
    Precision,
    device_name,
    usable_cores,
)
from resnext_ablate.compute.peaks import measure_peaks
from resnext_ablate.compute.reference_loops import LoopTimes, train_plainly
from resnext_ablate.records.config import StudyConfig
from resnext_ablate.records.records import NetRecord
from resnext_ablate.records.training_costs import (
    LOOPS,
    Loop,
    TrainedRun,
    TrainingCosts,
    loop_costs,
)
from resnext_ablate.study.study_plan import PreparedStudy

_SUBSET_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What all loops train."""

    spec: ResNeXtSpec
    config: StudyConfig
    """Resolved: nothing in it is `auto`."""
    data_folder: Path
    device: str
    num_images: int
    """Training images of each run, a subset by seed; all where there are fewer. A
    tenth as many validate, and at most as many test."""


def contest(prepared: PreparedStudy, *, net: NetRecord, num_images: int) -> Contest:
    """One net of a study, trained as the study says on some of its images."""
    return Contest(
        spec=spec_from_dict(net.spec),
        config=prepared.config,
        data_folder=prepared.data.folder,
        device=prepared.devices[0],
        num_images=num_images,
    )


def compete(
    contest: Contest,
    *,
    num_turns: int,
    on_turn: Callable[[str], None] = lambda text: None,
) -> TrainingCosts:
    """Lets each loop train in turn, several times over.

    Args:
        contest: net, data and recipe.
        num_turns: turns of each loop; each has seeds of its own.
        on_turn: told of each turn in a line.

    Raises:
        MeasuringError: a training process failed.
    """
    turns: dict[Loop, list[list[TrainedRun]]] = {loop: [] for loop in LOOPS}
    for turn in range(num_turns):
        # Another loop begins each turn, so that none is always behind the same one.
        for place in range(len(LOOPS)):
            loop = LOOPS[(turn + place) % len(LOOPS)]
            runs = _turn(contest, loop=loop, turn=turn)
            turns[loop].append(runs)
            rate = sum(run.num_images / run.train_s for run in runs)
            on_turn(f"turn {turn + 1} of {num_turns}, {loop}: {rate:,.0f} images/s")
    return _summary(contest, turns)


def _turn(contest: Contest, *, loop: Loop, turn: int) -> list[TrainedRun]:
    """One run, or one on each core at once."""
    count = _num_processes(loop, contest.device)
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(_started(contest, loop=loop, seed=turn * count + index))
            for index in range(count)
        ]
        for process in processes:
            _line_of(process)  # ready
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [TrainedRun(**json.loads(_line_of(process))) for process in processes]


def _num_processes(loop: Loop, device: str) -> int:
    per_core = loop in ("ours", "tutorial_per_core") and device == "cpu"
    return usable_cores() if per_core else 1


@contextlib.contextmanager
def _started(
    contest: Contest, *, loop: Loop, seed: int
) -> Iterator[subprocess.Popen[str]]:
    job = {
        "spec": contest.spec.to_dict(),
        "config": contest.config.model_dump_json(),
        "data_folder": str(contest.data_folder),
        "device": contest.device,
        "num_images": contest.num_images,
        "loop": loop,
        "seed": seed,
    }
    alone = _num_processes(loop, contest.device) == 1
    threads = {} if alone else {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(TRAINING_ENVIRONMENT if loop == "ours" else threads)},
    ) as process:
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            yield process
        finally:
            process.kill()


def _line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    if not line:
        words = process.stderr.read().strip().splitlines()
        last = words[-1] if words else f"exit code {process.wait()}"
        raise MeasuringError(f"a training process failed: {last}")
    return line


def _summary(
    contest: Contest, turns: dict[Loop, list[list[TrainedRun]]]
) -> TrainingCosts:
    config = contest.config
    precision = config.train.precision
    assert precision != "auto", "resolved before loops compete"
    device = torch.device(contest.device)
    dataset = _subset(
        data.load(contest.data_folder, device=torch.device("cpu")), contest.num_images
    )
    peaks = _peaks_of_machine(device, precision=precision)
    batch_size = min(config.train.batch_size, len(dataset.train.labels))
    floor_s = training_floor_s(
        contest.spec,
        image_size=dataset.info.image_size,
        batch_size=batch_size,
        peaks=peaks,
    )
    return TrainingCosts(
        net=contest.spec.name,
        data=dataset.info.name,
        num_train=len(dataset.train.labels),
        num_test=len(dataset.test.labels),
        image_size=dataset.info.image_size,
        batch_size=batch_size,
        epochs=config.train.epochs,
        precision=precision,
        device=device_name(device),
        num_cores=usable_cores(),
        peaks=peaks,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        torch_version=torch.__version__,
        loops=loop_costs(turns, floor_s_per_image=floor_s / batch_size),
    )


def _peaks_of_machine(device: torch.device, *, precision: Precision) -> Peaks:
    before = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    try:
        return measure_peaks(device, precision=precision)
    finally:
        torch.set_num_threads(before)


def _subset(dataset: Dataset, num_images: int) -> Dataset:
    """Some images of each split, the same for every loop and seed."""
    generator = torch.Generator().manual_seed(_SUBSET_SEED)

    def some(split: Split, count: int) -> Split:
        chosen = torch.randperm(len(split.labels), generator=generator)[:count]
        chosen = chosen.to(split.labels.device)
        return Split(split.images[chosen], split.labels[chosen])

    return dataclasses.replace(
        dataset,
        train=some(dataset.train, num_images),
        val=some(dataset.val, max(1, num_images // 10)),
        test=some(dataset.test, num_images),
    )


def _train_ours(
    spec: ResNeXtSpec,
    *,
    config: StudyConfig,
    dataset: Dataset,
    seed: int,
    device: torch.device,
) -> LoopTimes:
    """A run as an executor trains it."""
    start = time.perf_counter()
    result = training.train(
        spec,
        config=config.train,
        data_config=config.data,
        dataset=dataset,
        seed=seed,
        device=device,
        deterministic=config.run.deterministic,
        on_epoch=lambda epoch: None,
    )
    return LoopTimes(
        train_s=result.train_time_s,
        total_s=time.perf_counter() - start,
        num_images=round(result.images_per_s * result.train_time_s),
        test_error_pct=result.test_error_pct,
    )


def _serve() -> None:
    """A training process: loads, warms up, says so, trains at a word, answers."""
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # What libraries print must not garble the answers.
    loop: Loop = job["loop"]
    config = StudyConfig.model_validate_json(job["config"])
    device = torch.device(job["device"])
    spec = spec_from_dict(job["spec"])
    ours = loop == "ours"
    if ours or loop == "tutorial_per_core":
        torch.set_num_threads(1)
    where = device if ours else torch.device("cpu")
    dataset = _subset(
        data.load(Path(job["data_folder"]), device=where), job["num_images"]
    )

    def train(config: StudyConfig, dataset: Dataset) -> LoopTimes:
        if ours:
            return _train_ours(
                spec, config=config, dataset=dataset, seed=job["seed"], device=device
            )
        return train_plainly(
            spec,
            config=config.train,
            data_config=config.data,
            dataset=dataset,
            seed=job["seed"],
            device=device,
            mixed_precision=loop == "recipe",
            num_workers=usable_cores() if loop == "recipe" else 0,
        )

    once = config.train.model_copy(update={"epochs": 1})
    few = _subset(dataset, 2 * config.train.batch_size)
    train(config.model_copy(update={"train": once}), few)
    answers.write("ready\n")
    answers.flush()
    sys.stdin.readline()
    times = train(config, dataset)
    values = {"loop": loop, "seed": job["seed"], **dataclasses.asdict(times)}
    answers.write(json.dumps(values) + "\n")
    answers.flush()


if __name__ == "__main__":
    _serve()
