"""The scheduler's loop: hands cells to executors and tells Optuna what they became."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Protocol

import optuna

from resnext_ablate import records, trials
from resnext_ablate.config import StudyConfig
from resnext_ablate.execution import ExecutorError, Executors, Job, Message
from resnext_ablate.records import Cell, EpochRecord, Plan, RunRecord
from resnext_ablate.trials import RunningRun

_MAX_FAILED_STARTS = 3
_POLL_S = 0.25


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a study stands."""

    num_planned: int
    num_complete: int
    num_failed: int
    num_pruned: int
    running: tuple[RunningRun, ...]
    eta_s: float | None
    """Seconds to the end by the epochs timed so far; None before the first."""
    finished: RunRecord | None = None
    """The run that has just ended."""
    note: str = ""
    """Something out of the ordinary, in a sentence."""


@dataclass
class _Attempt:
    """A cell in the hands of an executor."""

    cell: Cell
    trial: int
    since: float
    epoch: int = 0
    val_error_pct: float | None = None


class Grower(Protocol):
    """What makes a plan grow while it is carried out: a search."""

    @property
    def plan(self) -> Plan:
        """The plan so far, as its file has it."""

    @property
    def num_to_come(self) -> int:
        """About how many runs are not in the plan yet."""

    def next_cells(self) -> tuple[Cell, ...]:
        """Adds to the plan what can start now; nothing where runs must end first."""

    def wait_after(self, cell: Cell) -> tuple[int, ...]:
        """Epochs after which a run waits for word."""

    def stop_reason(self, cell: Cell, epochs: Sequence[EpochRecord]) -> str:
        """Why a waiting run is to stop; empty where it goes on."""

    def settle(self, run: RunRecord) -> None:
        """Takes note of a finished run."""


class Schedule:
    """Brings every cell without a run file to one, then ends."""

    def __init__(
        self,
        study: optuna.Study,
        *,
        config: StudyConfig,
        plan: Plan,
        folder: Path,
        data_folder: Path,
        devices: Sequence[str],
        on_progress: Callable[[Progress], None],
        grower: Grower | None = None,
    ) -> None:
        self._study = study
        self._config = config
        self._config_json = config.model_dump_json()
        self._fixed_plan = plan
        self._grower = grower
        self._folder = folder
        self._data_folder = data_folder
        self._devices = devices
        self._on_progress = on_progress
        self._environment = records.environment()
        runs = {run.cell: run for run in records.read_runs(folder, plan)}
        self._todo = deque(cell for cell in plan.cells if cell.id not in runs)
        self._states = Counter(run.state for run in runs.values())
        self._attempts: dict[int, _Attempt] = {}
        self._idle: set[int] = set()
        self._deaths: Counter[str] = Counter()
        self._failed_starts = 0
        self._epoch_seconds: defaultdict[str, list[float]] = defaultdict(list)

    def run(self, *, should_stop: Callable[[], bool]) -> None:
        """Runs until nothing is left to do, or `should_stop` says so.

        Raises:
            ExecutorError: executors die before they can take a job.
        """
        if not self._has_work():
            return
        count = len(self._devices)
        if self._grower is None:
            count = min(count, len(self._todo))
        with Executors(count, study_folder=self._folder) as executors:
            try:
                while not should_stop() and (self._has_work() or self._attempts):
                    message = executors.next_message(timeout_s=_POLL_S)
                    if message is None:
                        self._tell_progress()
                    else:
                        self._handle(message, executors)
                        self._hand_out(executors)
            finally:
                executors.close()
                self._release_attempts()

    @property
    def _plan(self) -> Plan:
        return self._grower.plan if self._grower else self._fixed_plan

    def _has_work(self) -> bool:
        """Whether a cell is to be done; a search is asked for one where none is."""
        if not self._todo and self._grower:
            self._todo.extend(self._grower.next_cells())
        return bool(self._todo)

    def _hand_out(self, executors: Executors) -> None:
        """Gives idle executors what there is to do."""
        while self._idle and self._has_work():
            index = min(self._idle)
            self._idle.remove(index)
            executors.submit(index, self._claim(index))

    def _handle(self, message: Message, executors: Executors) -> None:
        index = message.executor
        attempt = self._attempts.get(index)
        if message.event == "ready":
            self._failed_starts = 0
            self._idle.add(index)
        elif message.event == "epoch":
            assert attempt is not None and message.epoch is not None
            now = time.monotonic()
            self._epoch_seconds[attempt.cell.variant].append(now - attempt.since)
            attempt.since = now
            attempt.epoch = message.epoch.epoch
            attempt.val_error_pct = message.epoch.val_error_pct
            trials.report(self._study, number=attempt.trial, epoch=message.epoch)
            self._tell_progress()
        elif message.event == "waiting":
            assert attempt is not None and self._grower is not None
            reason = self._grower.stop_reason(attempt.cell, message.epochs)
            executors.give_word(index, stop_reason=reason)
        elif message.event == "finished":
            self._settle(index)
            self._idle.add(index)
        else:
            self._bury(index, message.reason)
            self._idle.discard(index)
            if self._has_work() or self._grower:
                executors.start(index)

    def _claim(self, index: int) -> Job:
        cell = self._todo.popleft()
        net = self._plan.net(cell.variant)
        number = trials.claim(self._study, net=net, cell=cell)
        self._attempts[index] = _Attempt(cell, number, since=time.monotonic())
        return Job(
            cell=cell.id,
            variant=cell.variant,
            seed=cell.seed,
            spec=net.spec,
            config=self._config_json,
            data_folder=str(self._data_folder),
            study_folder=str(self._folder),
            device=self._devices[index],
            environment=self._environment,
            wait_after=self._grower.wait_after(cell) if self._grower else (),
        )

    def _settle(self, index: int) -> bool:
        """Tells Optuna of the run file that an attempt left; False if it left none."""
        attempt = self._attempts[index]
        run = records.read_run(self._folder, attempt.cell.id)
        if run is None:
            return False
        del self._attempts[index]
        trials.tell(self._study, number=attempt.trial, run=run)
        self._states[run.state] += 1
        if self._grower:
            self._grower.settle(run)
        self._tell_progress(finished=run)
        return True

    def _bury(self, index: int, reason: str) -> None:
        """Deals with a dead executor: its cell is tried again, within bounds."""
        if index not in self._attempts:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                log = self._folder / "logs" / f"executor-{index}.log"
                raise ExecutorError(f"no executor starts: {reason}; see {log}.")
            return
        if self._settle(index):
            return
        attempt = self._attempts[index]
        cell = attempt.cell
        self._deaths[cell.id] += 1
        deaths, limit = self._deaths[cell.id], self._config.run.max_attempts
        note = f"{cell.variant} seed {cell.seed}: {reason}"
        if deaths < limit:
            del self._attempts[index]
            trials.tell_lost(self._study, number=attempt.trial, reason=reason)
            self._todo.appendleft(cell)
            self._tell_progress(note=f"{note}; trying again ({deaths} of {limit})")
        else:
            records.write_run(
                self._failed_run(attempt, f"{reason} (attempt {deaths} of {limit})"),
                self._folder,
            )
            self._settle(index)

    def _release_attempts(self) -> None:
        """Ends the trials of runs that the scheduler's own end has cut off."""
        for index, attempt in list(self._attempts.items()):
            if not self._settle(index):
                reason = "interrupted; the same command runs it again"
                trials.tell_lost(self._study, number=attempt.trial, reason=reason)
        self._attempts.clear()

    def _failed_run(self, attempt: _Attempt, reason: str) -> RunRecord:
        return RunRecord(
            cell=attempt.cell.id,
            variant=attempt.cell.variant,
            seed=attempt.cell.seed,
            state="failed",
            reason=reason,
            device=self._config.run.device,
            precision=self._config.train.precision,
            data_checksum=self._plan.provenance["data_checksum"],
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            environment=self._environment,
        )

    def _tell_progress(
        self, *, finished: RunRecord | None = None, note: str = ""
    ) -> None:
        self._on_progress(
            Progress(
                num_planned=len(self._plan.cells) + self._num_to_come(),
                num_pruned=self._states["pruned"],
                num_complete=self._states["complete"],
                num_failed=self._states["failed"] + self._states["diverged"],
                running=tuple(
                    RunningRun(
                        variant=attempt.cell.variant,
                        seed=attempt.cell.seed,
                        epoch=attempt.epoch,
                        val_error_pct=attempt.val_error_pct,
                    )
                    for attempt in self._attempts.values()
                ),
                eta_s=self._eta_s(),
                finished=finished,
                note=note,
            )
        )

    def _num_to_come(self) -> int:
        return self._grower.num_to_come if self._grower else 0

    def _eta_s(self) -> float | None:
        if not self._epoch_seconds:
            return None
        means = {variant: fmean(s) for variant, s in self._epoch_seconds.items()}
        overall = fmean(means.values())
        epochs = self._config.train.epochs
        left = sum(epochs * means.get(cell.variant, overall) for cell in self._todo)
        left += epochs * overall * self._num_to_come()
        for attempt in self._attempts.values():
            each = means.get(attempt.cell.variant, overall)
            left += (epochs - attempt.epoch) * each
        return left / max(1, min(len(self._devices), len(self._attempts) or 1))
