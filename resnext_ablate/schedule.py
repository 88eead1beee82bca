"""The scheduler's loop: hands cells to executors and tells Optuna what they became."""

from __future__ import annotations

import contextlib
import errno
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from resnext_ablate import attempts, records
from resnext_ablate.attempts import AttemptRecord, Cause, Tally
from resnext_ablate.config import StudyConfig
from resnext_ablate.execution import (
    Channel,
    ExecutorError,
    Executors,
    Job,
    Message,
    Seat,
    refuse_other_versions,
)
from resnext_ablate.progress import EpochEnd, Pace, Progress, RunningRun
from resnext_ablate.records import Plan, RunRecord
from resnext_ablate.seats import Attempt, Grower, of_executor, taken_on
from resnext_ablate.spec import InputError
from resnext_ablate.trials import Ledger

_MAX_FAILED_STARTS = 3
_MAX_KILLED_STARTS = 20  # by signals, which say nothing about the next start
_POLL_S = 0.25
_GRACE_S = 7.0
"""For executors to save their runs in when the study is to stop."""
_GOES_ON = "the same command goes on with it"
_LAST_WORD_S = 60.0
"""For a storage that does not answer, once all runs are done."""
_PROGRESS_EVERY_S = 0.2
_SMALLEST_MICRO_BATCH = 2  # Batch normalisation needs two values.


class Schedule:
    """Brings every cell without a run file to one, then ends."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        config: StudyConfig,
        plan: Plan,
        runs: Mapping[str, RunRecord],
        folder: Path,
        data_folder: Path,
        devices: Sequence[str],
        open_channel: Callable[[int], Channel],
        on_progress: Callable[[Progress], None],
        grower: Grower | None = None,
    ) -> None:
        self._ledger = ledger
        self._config = config
        self._config_json = config.model_dump_json()
        self._fixed_plan = plan
        self._grower = grower
        self._folder = folder
        self._data_folder = data_folder
        self._devices = devices
        self._open_channel = open_channel
        self._on_progress = on_progress
        self._environment = records.environment()
        self._todo = deque(cell for cell in plan.cells if cell.id not in runs)
        self._states = Counter(run.state for run in runs.values())
        self._tally = Tally(attempts.read_attempts(folder))
        self._attempts: dict[str, Attempt] = {}  # by cell
        self._idle: set[int] = set()
        self._dead: set[int] = set()
        self._starting: dict[int, float] = {}
        self._failed_starts: Counter[bool] = Counter()
        self._is_silent = False
        self._progress_due = 0.0
        self._pace = Pace(num_epochs=config.train.epochs)

    def run(self, *, should_stop: Callable[[], bool]) -> None:
        """Runs until nothing is left to do, or `should_stop` says so: then executors
        save their runs, within seconds.

        Raises:
            ExecutorError: executors die before they can take a job, or run other
                versions than this process.
            OSError: nothing more can be written.
            InputError: another process has taken over the storage.
        """
        if not self._has_work():
            return
        count = len(self._devices)
        if self._grower is None:
            count = min(count, len(self._todo))
        with Executors(count, open_channel=self._open_channel) as executors:
            self._starting = dict.fromkeys(range(count), time.monotonic())
            try:
                while not should_stop() and self._is_open():
                    self._take(executors, timeout_s=_POLL_S)
                    self._flush()
                    self._hand_out(executors)
                if self._attempts:
                    self._hand_back(executors)
            finally:
                executors.close()
                self._release_attempts()

    @property
    def _plan(self) -> Plan:
        return self._grower.plan if self._grower else self._fixed_plan

    def _is_open(self) -> bool:
        """Whether something is to be done, under way or still to be told."""
        if self._has_work() or self._attempts:
            return True
        waits = self._ledger.num_waiting > 0
        return waits and self._ledger.silent_s < _LAST_WORD_S

    def _flush(self) -> None:
        self._ledger.flush()
        is_silent = self._ledger.silent_s > 0
        if is_silent and not self._is_silent:
            self._tell_progress(
                note="the storage does not answer: runs go on, their results wait"
            )
        elif self._is_silent and not is_silent:
            self._tell_progress(note="the storage answers again")
        self._is_silent = is_silent

    def _has_work(self) -> bool:
        """Whether a cell is to be done; a search is asked for one where none is."""
        if not self._todo and self._grower:
            self._todo.extend(self._grower.next_cells())
        return bool(self._todo)

    def _take(self, executors: Executors, *, timeout_s: float) -> None:
        """Deals with the next message, or with silence."""
        asked_at = time.monotonic()
        message = executors.next_message(timeout_s=timeout_s)
        now = time.monotonic()
        if message is None:
            self._end_hung(executors, now=now)
            self._tell_progress()
            return
        for attempt in self._in_hand(message.executor):
            attempt.last_sign = now
        if message.executor in self._starting:
            self._starting[message.executor] = now
        if now - asked_at > self._config.run.lease_s / 2:
            # This process was stopped itself: silence in that time says nothing.
            for other in self._attempts.values():
                other.last_sign = now
        self._handle(message, executors)

    def _in_hand(self, index: int) -> list[Attempt]:
        return of_executor(self._attempts.values(), index)

    def _handle(self, message: Message, executors: Executors) -> None:
        index = message.executor
        if message.event == "ready":
            refuse_other_versions(message.versions or {})
            self._failed_starts.clear()
            self._starting.pop(index, None)
            self._idle.add(index)
            return
        if message.event == "died":
            self._idle.discard(index)
            self._dead.add(index)
            return self._bury(message)
        attempt = self._attempts.get(message.cell or "")
        if attempt is None or (index, message.attempt) != (
            attempt.executor,
            attempt.number,
        ):
            return  # Late word of an attempt that is over.
        if message.event == "epoch":
            self._note_epoch(message, attempt)
        elif message.event == "waiting":
            assert self._grower is not None
            reason = self._grower.stop_reason(attempt.cell, message.epochs)
            executors.give_word(index, stop_reason=reason)
        elif message.event == "finished":
            self._settle(attempt)
            self._free(index)
        elif message.event == "stopped":
            self._lose(attempt, cause="terminated", reason=message.reason)
        elif message.event == "out_of_memory":
            cause: Cause = "crowded" if attempt.num_fused > 1 else "out_of_memory"
            self._lose(attempt, cause=cause, reason=message.reason)
            self._free(index)
        elif message.event == "disk_full":
            self._lose(attempt, cause="interrupted", reason=message.reason)
            raise OSError(errno.ENOSPC, message.reason)

    def _free(self, index: int) -> None:
        """Gives an executor more to do once it has ended all that it had."""
        if not self._in_hand(index):
            self._idle.add(index)

    def _note_epoch(self, message: Message, attempt: Attempt) -> None:
        assert message.epoch is not None
        seconds = (attempt.last_sign - attempt.since) / attempt.num_fused
        if seconds >= message.epoch.time_s:  # Else it came from a checkpoint.
            self._pace.add(attempt.cell.variant, seconds=seconds)
        attempt.since = attempt.last_sign
        attempt.epoch = message.epoch.epoch
        attempt.val_error_pct = message.epoch.val_error_pct
        self._ledger.report(attempt.trial, epoch=message.epoch)
        self._tell_progress(EpochEnd(attempt.cell, message.epoch))

    def _hand_out(self, executors: Executors) -> None:
        """Gives idle executors what there is to do, and replaces dead ones."""
        while self._idle and self._has_work():
            job = self._claim(min(self._idle))
            if job is None:
                break  # The storage does not answer.
            index = min(self._idle)
            self._idle.remove(index)
            executors.submit(index, job)
        while self._dead and (self._todo or self._grower):
            index = self._dead.pop()
            self._starting[index] = time.monotonic()
            executors.start(index)

    def _end_hung(self, executors: Executors, *, now: float) -> None:
        lease_s = self._config.run.lease_s
        for attempt in self._attempts.values():
            if now - attempt.last_sign > lease_s:
                attempt.is_hung = True
                attempt.last_sign = now
                executors.kill(attempt.executor)
        for index, since in self._starting.items():
            if now - since > lease_s:
                executors.kill(index)

    def _claim(self, index: int) -> Job | None:
        run = self._config.run
        cells = taken_on(
            self._todo,
            tally=self._tally,
            seeds=run.seed_list(),
            fuse_seeds=run.fuse_seeds,
        )
        claimed: list[Attempt] = []
        for cell in cells:
            number = self._tally.next_number(cell.id)
            net = self._plan.net(cell.variant)
            trial = self._ledger.claim(net=net, cell=cell, attempt=number)
            if trial is None:
                break
            self._todo.remove(cell)
            now = time.monotonic()
            parts = 2 ** self._tally.count(cell.id, cause="out_of_memory")
            claimed.append(Attempt(cell, index, number, trial, now, now, parts))
        for attempt in claimed:
            attempt.num_fused = len(claimed)
            self._attempts[attempt.cell.id] = attempt
        return self._job(claimed) if claimed else None

    def _job(self, attempts: Sequence[Attempt]) -> Job:
        first, *others = attempts
        cell = first.cell
        return Job(
            cell=cell.id,
            variant=cell.variant,
            seed=cell.seed,
            spec=self._plan.net(cell.variant).spec,
            config=self._config_json,
            data_folder=str(self._data_folder),
            study_folder=str(self._folder),
            device=self._devices[first.executor],
            environment=self._environment,
            attempt=first.number,
            num_micro_batches=first.num_micro_batches,
            wait_after=self._grower.wait_after(cell) if self._grower else (),
            beside=tuple(
                Seat(cell=one.cell.id, seed=one.cell.seed, attempt=one.number)
                for one in others
            ),
        )

    def _settle(self, attempt: Attempt) -> bool:
        """Tells Optuna of the run file that an attempt left; False if it left none."""
        run = records.read_run(self._folder, attempt.cell.id)
        if run is None:
            return False
        del self._attempts[attempt.cell.id]
        self._ledger.tell(attempt.trial, run=run)
        records.remove_checkpoints(self._folder, attempt.cell.id)
        self._states[run.state] += 1
        if self._grower:
            self._grower.settle(run)
        self._tell_progress(run)
        return True

    def _bury(self, death: Message) -> None:
        """Deals with a dead executor: its cells are tried again, within bounds."""
        if self._starting.pop(death.executor, None) is not None:
            self._count_failed_start(death)
        for attempt in self._in_hand(death.executor):
            if self._settle(attempt):
                continue
            if attempt.is_hung:
                silence = f"no step in {self._config.run.lease_s:g} s (run.lease_s)"
                self._lose(attempt, cause="hung", reason=f"executor hung: {silence}")
            else:
                self._lose(attempt, cause="killed", reason=death.reason)

    def _count_failed_start(self, death: Message) -> None:
        self._failed_starts[death.by_signal] += 1
        limit = _MAX_KILLED_STARTS if death.by_signal else _MAX_FAILED_STARTS
        if self._failed_starts[death.by_signal] >= limit:
            log = self._folder / "logs" / f"executor-{death.executor}.log"
            raise ExecutorError(f"no executor starts: {death.reason}; see {log}.")

    def _lose(self, attempt: Attempt, *, cause: Cause, reason: str) -> None:
        """Ends an attempt without a result: its cell is free again, or has failed."""
        cell, limit = attempt.cell, self._config.run.max_attempts
        count = self._tally.count(cell.id, cause=cause) + 1
        is_bounded = cause not in attempts.NOT_COUNTED
        gave_up = is_bounded and (count >= limit or self._is_too_small(attempt, cause))
        lost = AttemptRecord(
            cell=cell.id,
            variant=cell.variant,
            seed=cell.seed,
            number=attempt.number,
            cause=cause,
            reason=reason,
            epoch=attempt.epoch,
            ended_at=datetime.now(UTC).isoformat(timespec="seconds"),
            gave_up=gave_up,
        )
        attempts.write_attempt(lost, self._folder)
        self._tally.add(lost)
        if gave_up:
            failed = self._failed_run(attempt, f"{reason} (attempt {count} of {limit})")
            records.write_run(failed, self._folder)
            self._settle(attempt)
            return
        del self._attempts[cell.id]
        self._ledger.tell_lost(attempt.trial, reason=reason)
        self._todo.appendleft(cell)
        place = f"{cell.variant} seed {cell.seed}"
        if cause == "crowded":
            self._tell_progress(note=f"{place}: {reason}; it goes on alone")
        if is_bounded:
            what = f"trying again ({count} of {limit})"
            if cause == "out_of_memory":
                parts = 2 * attempt.num_micro_batches
                what += f", each batch in {parts} micro-batches"
            self._tell_progress(note=f"{place}: {reason}; {what}")

    def _is_too_small(self, attempt: Attempt, cause: Cause) -> bool:
        """Whether memory ran out with micro-batches that cannot be halved."""
        parts = 2 * attempt.num_micro_batches
        smallest = self._config.train.batch_size // parts
        return cause == "out_of_memory" and smallest < _SMALLEST_MICRO_BATCH

    def _hand_back(self, executors: Executors) -> None:
        """Lets executors save what they are doing, as far as the time allows."""
        executors.stop()
        deadline = time.monotonic() + _GRACE_S
        while self._attempts and (left := deadline - time.monotonic()) > 0:
            message = executors.next_message(timeout_s=left)
            if message is None:
                return
            attempt = self._attempts.get(message.cell or "")
            if attempt is not None and message.event == "stopped":
                reason = f"{message.reason}; {_GOES_ON}"
                self._lose(attempt, cause="interrupted", reason=reason)
            elif self._in_hand(message.executor):
                self._handle(message, executors)

    def _release_attempts(self) -> None:
        """Ends the trials of runs that the scheduler's own end has cut off."""
        for attempt in list(self._attempts.values()):
            # What cannot be written now is told when the study goes on.
            with contextlib.suppress(OSError, InputError):
                if not self._settle(attempt):
                    reason = f"cut off; {_GOES_ON}"
                    self._lose(attempt, cause="interrupted", reason=reason)

    def _failed_run(self, attempt: Attempt, reason: str) -> RunRecord:
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
            num_micro_batches=attempt.num_micro_batches,
        )

    def _tell_progress(
        self, event: RunRecord | EpochEnd | None = None, *, note: str = ""
    ) -> None:
        now = time.monotonic()
        if event is None and not note and now < self._progress_due:
            return
        self._progress_due = now + _PROGRESS_EVERY_S
        to_come = self._grower.num_to_come if self._grower else 0
        running = tuple(
            RunningRun(
                variant=attempt.cell.variant,
                seed=attempt.cell.seed,
                epoch=attempt.epoch,
                val_error_pct=attempt.val_error_pct,
            )
            for attempt in self._attempts.values()
        )
        eta_s = self._pace.eta_s(
            todo=[cell.variant for cell in self._todo],
            running=running,
            num_to_come=to_come,
            num_executors=len(self._devices),
        )
        self._on_progress(
            Progress(
                num_planned=len(self._plan.cells) + to_come,
                num_complete=self._states["complete"],
                num_failed=self._states["failed"] + self._states["diverged"],
                num_pruned=self._states["pruned"],
                running=running,
                eta_s=eta_s,
                finished=event if isinstance(event, RunRecord) else None,
                epoch=event if isinstance(event, EpochEnd) else None,
                note=note,
            )
        )
