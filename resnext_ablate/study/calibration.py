"""Times short runs of a study's variants as the study would run them.

The study's own executors train every variant for two epochs on a part of the images,
all of them at work at once, in a folder that is then thrown away. The first epoch
warms up, the second is timed.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from resnext_ablate.compute import data, preparation
from resnext_ablate.engines.execution import (
    LOCK_FILE,
    ExecutorError,
    Executors,
    Job,
    Message,
    open_locally,
)
from resnext_ablate.records import records
from resnext_ablate.records.config import StudyConfig
from resnext_ablate.records.records import NetRecord
from resnext_ablate.study.planner import Calibration, RunCost, Workload

BUDGET_S = 60.0
_EPOCHS = 2
_PILOT_STEPS = 3
_ENOUGH_S = 9.0
"""Longer runs of a variant would tell little more."""
_TARGET_S = 40.0
"""Planned for the runs: the budget less start-up and what slow machines add."""


@dataclass
class _Timed:
    """One calibration run as its messages tell it."""

    variant: str
    begun: float
    work: Workload
    epoch_ends: list[float] = field(default_factory=list)
    epoch_seconds: list[float] = field(default_factory=list)
    peak_memory_mib: float = 0.0
    ended: float = 0.0

    def cost(self) -> RunCost:
        """What a run of the variant costs, from the last of the timed epochs."""
        train_s = self.epoch_seconds[-1]
        eval_s = max(0.0, self.epoch_ends[-1] - self.epoch_ends[-2] - train_s)
        step_s = train_s / self.work.steps_per_epoch
        eval_image_s = eval_s / self.work.num_val
        modelled = _EPOCHS * (train_s + eval_s) + self.work.num_test * eval_image_s
        return RunCost(
            variant=self.variant,
            fixed_s=max(0.0, self.ended - self.begun - modelled),
            step_s=step_s,
            eval_image_s=eval_image_s,
            peak_memory_mib=self.peak_memory_mib,
        )


def workload(config: StudyConfig, info: preparation.DataInfo) -> Workload:
    """What one run of a study does."""
    batch = min(config.train.batch_size, info.num_train)
    return Workload(
        epochs=config.train.epochs,
        steps_per_epoch=data.num_batches(info.num_train, batch_size=batch),
        num_val=info.num_val,
        num_test=info.num_test,
    )


def calibrate(
    config: StudyConfig,
    *,
    nets: Sequence[NetRecord],
    prepared: preparation.Prepared,
    devices: Sequence[str],
    prepared_s: float = 0.0,
) -> Calibration:
    """Times every variant on the study's images and executors, in at most a minute.

    Args:
        config: resolved.
        nets: the variants.
        prepared: the decoded images.
        devices: one for each executor.
        prepared_s: what a command takes before its executors start.

    Raises:
        ExecutorError: a run fails, or the budget does not suffice for one each.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="resnext-ablate-") as name:
        folder = Path(name)
        (folder / records.RUNS_FOLDER).mkdir()
        (folder / LOCK_FILE).touch()
        bench = _Bench(config, prepared, devices, folder, start + BUDGET_S)
        open_channel = open_locally(
            folder, devices=devices, devices_per_run=config.run.devices_per_run
        )
        with Executors(len(devices), open_channel=open_channel) as executors:
            startup_s = bench.wait_until_ready(executors) - start + prepared_s
            largest = max(nets, key=lambda net: net.macs)
            pilot = bench.run(
                executors,
                itertools.repeat(largest, len(devices)),
                wanted=len(devices),
                steps=_PILOT_STEPS,
            )
            step_s = max(one.cost().step_s for one in pilot)
            rounds = -(-len(nets) // len(devices))
            share_s = min(_ENOUGH_S, min(_TARGET_S, bench.left_s() * 2 / 3) / rounds)
            steps = max(_PILOT_STEPS + 1, int(share_s / (_EPOCHS + 1) / step_s))
            timed = bench.run(
                executors, itertools.cycle(nets), wanted=len(nets), steps=steps
            )
    costs = {one.variant: one.cost() for one in timed}
    return Calibration(
        costs=tuple(costs[net.variant] for net in nets),
        startup_s=startup_s,
        took_s=time.monotonic() - start,
    )


@dataclass
class _Bench:
    """The executors' work of a calibration."""

    config: StudyConfig
    prepared: preparation.Prepared
    devices: Sequence[str]
    folder: Path
    deadline: float
    num_jobs: int = 0

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def wait_until_ready(self, executors: Executors) -> float:
        num_ready = 0
        while num_ready < len(self.devices):
            num_ready += self._next_message(executors).event == "ready"
        return time.monotonic()

    def run(
        self,
        executors: Executors,
        nets: Iterator[NetRecord],
        *,
        wanted: int,
        steps: int,
    ) -> list[_Timed]:
        """Short runs until the first `wanted` of the nets are done, none idle."""
        work, images = self._part(steps)
        under_way: dict[int, _Timed] = {}
        timed: list[_Timed] = []

        def hand_out(index: int) -> None:
            if (net := next(nets, None)) is None:
                return
            one = _Timed(net.variant, time.monotonic(), work)
            under_way[index] = one
            timed.append(one)
            executors.submit(index, self._job(net, images, self.devices[index]))

        for index in range(len(self.devices)):
            hand_out(index)
        while not all(one.ended for one in timed[:wanted]) or len(timed) < wanted:
            message = self._next_message(executors)
            one = under_way[message.executor]
            if message.event == "epoch" and message.epoch is not None:
                one.epoch_ends.append(time.monotonic())
                one.epoch_seconds.append(message.epoch.time_s)
                one.peak_memory_mib = message.epoch.peak_memory_mib
            elif message.event == "finished":
                one.ended = time.monotonic()
                self._check(message)
                hand_out(message.executor)
        return timed[:wanted]

    def _next_message(self, executors: Executors) -> Message:
        message = executors.next_message(timeout_s=max(0.0, self.left_s()))
        if message is None:
            raise ExecutorError(
                f"calibration: {BUDGET_S:.0f} s do not suffice for a short run of each "
                "variant; plan without --calibrate."
            )
        if message.event in ("died", "out_of_memory", "disk_full"):
            reason = message.reason or message.event.replace("_", " ")
            raise ExecutorError(f"calibration: {reason}.")
        return message

    def _check(self, message: Message) -> None:
        assert message.cell is not None
        run = records.read_run(self.folder, message.cell)
        if run is None or run.state != "complete":
            reason = run.reason if run else "its run file is missing"
            raise ExecutorError(f"calibration: a run failed: {reason}")

    def _job(self, net: NetRecord, images: Path, device: str) -> Job:
        self.num_jobs += 1
        # Rates as low as this change no time, and no loss can overflow.
        train = self.config.train.model_copy(
            update={"epochs": _EPOCHS, "learning_rate": 1e-4}
        )
        return Job(
            cell=f"calibration-{self.num_jobs}",
            variant=net.variant,
            seed=0,
            spec=net.spec,
            config=self.config.model_copy(update={"train": train}).model_dump_json(),
            data_folder=str(images),
            study_folder=str(self.folder),
            checkpoint_root=str(self.folder),
            device=device,
            environment={},
            attempt=1,
            num_micro_batches=1,
        )

    def _part(self, steps: int) -> tuple[Workload, Path]:
        """So many batches, and not too many images to evaluate, in a folder."""
        whole = workload(self.config, self.prepared.info)
        batch = min(self.config.train.batch_size, self.prepared.info.num_train)
        steps = min(steps, whole.steps_per_epoch)
        num_eval = max(batch, steps * batch // 4)
        work = Workload(
            epochs=_EPOCHS,
            steps_per_epoch=steps,
            num_val=min(whole.num_val, num_eval),
            num_test=min(whole.num_test, num_eval),
        )
        folder = self.folder / f"images-{steps}"
        folder.mkdir()
        shutil.copy(self.prepared.folder / "meta.json", folder)
        counts = {"train": steps * batch, "val": work.num_val, "test": work.num_test}
        for split, count in counts.items():
            for kind in ("images", "labels"):
                whole_array = np.load(
                    self.prepared.folder / f"{split}_{kind}.npy", mmap_mode="r"
                )
                np.save(folder / f"{split}_{kind}.npy", whole_array[:count])
        return work, folder
