"""The scheduler's loop: hands cells to executors, and deals with what these become."""

from __future__ import annotations

import contextlib
import errno
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.engines.execution import (
    Channel,
    Event,
    ExecutorError,
    Executors,
    Message,
    refuse_other_versions,
)
from resnext_ablate.records.attempts import Cause
from resnext_ablate.records.config import StudyConfig
from resnext_ablate.records.progress import EpochEnd, Progress
from resnext_ablate.records.records import Plan, RunRecord, RunState
from resnext_ablate.study.cells import Cells
from resnext_ablate.study.seats import Attempt, Grower
from resnext_ablate.study.trials import Ledger

_MAX_FAILED_STARTS = 3
_MAX_KILLED_STARTS = 20  # by signals, which say nothing about the next start
_POLL_S = 0.25
_GRACE_S = 7.0
"""For executors to save their runs in when the study is to stop."""
_GOES_ON = "the same command goes on with it"
_PROGRESS_EVERY_S = 0.2


class Schedule:
    """Brings every cell without a run file to one, then ends."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        config: StudyConfig,
        plan: Plan,
        states: Mapping[str, RunState],
        folder: Path,
        data_folder: Path,
        devices: Sequence[str],
        open_channel: Callable[[int], Channel],
        on_progress: Callable[[Progress], None],
        grower: Grower | None = None,
    ) -> None:
        self._ledger = ledger
        self._lease_s = config.run.lease_s
        self._devices_per_run = config.run.devices_per_run
        self._cells = Cells(
            ledger,
            config=config,
            plan=plan,
            states=states,
            folder=folder,
            data_folder=data_folder,
            grower=grower,
        )
        self._folder = folder
        self._devices = devices
        self._open_channel = open_channel
        self._on_progress = on_progress
        # Executors by what they do; busy ones are those that have cells in hand.
        self._starting: set[int] = set()
        self._idle: set[int] = set()
        self._hung: set[int] = set()
        self._dead: set[int] = set()
        self._last_sign: dict[int, float] = {}
        """Of those that are neither idle nor dead."""
        self._failed_starts: Counter[bool] = Counter()
        self._is_silent = False
        self._progress_due = 0.0

    def run(self, *, should_stop: Callable[[], bool]) -> None:
        """Runs until nothing is left to do, or `should_stop` says so: then executors
        save their runs, within seconds.

        Raises:
            ExecutorError: executors die before they can take a job, or run other
                versions than this process.
            OSError: nothing more can be written.
            InputError: another process has taken over the storage.
        """
        if not self._cells.has_work():
            return
        count = len(self._devices)
        if (at_most := self._cells.num_at_most) is not None:
            count = min(count, at_most)
        with Executors(count, open_channel=self._open_channel) as executors:
            self._starting = set(range(count))
            self._last_sign = dict.fromkeys(range(count), time.monotonic())
            try:
                while not should_stop() and self._cells.is_open():
                    self._take(executors, timeout_s=_POLL_S)
                    self._flush()
                    if note := self._cells.look_around():
                        self._tell_progress(note=note)
                    self._hand_out(executors)
                self._hand_back(executors)
            finally:
                executors.close()
                self._release_attempts()

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

    def _take(self, executors: Executors, *, timeout_s: float) -> None:
        """Deals with the next message, or with silence."""
        asked_at = time.monotonic()
        message = executors.next_message(timeout_s=timeout_s)
        now = time.monotonic()
        if message is None:
            self._end_hung(executors, now=now)
            self._tell_progress()
            return
        if message.executor in self._last_sign:
            self._last_sign[message.executor] = now
        if now - asked_at > self._lease_s / 2:
            # This process was stopped itself: silence in that time says nothing.
            self._last_sign = dict.fromkeys(self._last_sign, now)
        self._handle(message, executors)

    def _handle(self, message: Message, executors: Executors) -> None:
        index = message.executor
        if message.event == "ready":
            refuse_other_versions(message.versions or {})
            self._failed_starts.clear()
            self._set_idle(index)
            return
        if message.event == "died":
            return self._bury(message)
        attempt = self._cells.attempt_of(message)
        if attempt is not None:  # Else it is late word of one that is over.
            self._hear(message, attempt, executors)

    def _hear(self, message: Message, attempt: Attempt, executors: Executors) -> None:
        index = message.executor
        if message.event == "epoch":
            assert message.epoch is not None
            self._cells.note_epoch(attempt, message.epoch, now=self._last_sign[index])
            self._tell_progress(EpochEnd(attempt.cell, message.epoch))
        elif message.event == "waiting":
            reason = self._cells.stop_reason(attempt, message.epochs)
            executors.give_word(index, stop_reason=reason)
        elif message.event == "finished":
            if not self._settle(attempt):
                reason = "the executor left no whole run file"
                self._lose(attempt, cause="killed", reason=reason)
            self._free(index, after=message.event)
        elif message.event == "stopped":
            self._lose(attempt, cause="terminated", reason=message.reason)
        elif message.event == "out_of_memory":
            cause: Cause = "crowded" if attempt.num_fused > 1 else "out_of_memory"
            self._lose(attempt, cause=cause, reason=message.reason)
            self._free(index, after=message.event)
        elif message.event == "disk_full":
            self._lose(attempt, cause="interrupted", reason=message.reason)
            raise OSError(errno.ENOSPC, message.reason)

    def _free(self, index: int, *, after: Event) -> None:
        """Gives an executor more to do once it has ended all that it had."""
        # Several processes end with the one that lacks memory.
        ends = after == "out_of_memory" and self._devices_per_run > 1
        if not ends and not self._cells.held_by(index):
            self._set_idle(index)

    def _set_idle(self, index: int) -> None:
        self._starting.discard(index)
        self._last_sign.pop(index, None)
        self._idle.add(index)

    def _hand_out(self, executors: Executors) -> None:
        """Gives idle executors what there is to do, and replaces dead ones."""
        while self._idle and self._cells.has_work():
            index = min(self._idle)
            job = self._cells.claim(index, device=self._devices[index])
            if job is None:
                break  # The storage does not answer.
            self._idle.remove(index)
            self._last_sign[index] = time.monotonic()
            executors.submit(index, job)
        while self._dead and self._cells.may_have_work():
            index = self._dead.pop()
            self._starting.add(index)
            self._last_sign[index] = time.monotonic()
            executors.start(index)

    def _end_hung(self, executors: Executors, *, now: float) -> None:
        for index, last_sign in self._last_sign.items():
            if now - last_sign > self._lease_s:
                self._hung.add(index)
                self._last_sign[index] = now
                executors.kill(index)

    def _bury(self, death: Message) -> None:
        """Deals with a dead executor: its cells are tried again, within bounds."""
        index, reason = death.executor, death.reason
        cause: Cause = "killed"
        if index in self._hung:
            cause = "hung"
            reason = f"executor hung: no step in {self._lease_s:g} s (run.lease_s)"
        for attempt in self._cells.held_by(index):
            if not self._settle(attempt):
                self._lose(attempt, cause=cause, reason=reason)
        is_failed_start = index in self._starting
        self._last_sign.pop(index, None)
        for others in (self._starting, self._idle, self._hung):
            others.discard(index)
        self._dead.add(index)
        if is_failed_start:
            self._count_failed_start(death)

    def _count_failed_start(self, death: Message) -> None:
        self._failed_starts[death.by_signal] += 1
        limit = _MAX_KILLED_STARTS if death.by_signal else _MAX_FAILED_STARTS
        if self._failed_starts[death.by_signal] >= limit:
            log = self._folder / "logs" / f"executor-{death.executor}.log"
            raise ExecutorError(f"no executor starts: {death.reason}; see {log}.")

    def _settle(self, attempt: Attempt) -> bool:
        """Whether an attempt left a run file, which is told then."""
        run = self._cells.settle(attempt)
        if run is None:
            return False
        self._tell_progress(run)
        return True

    def _lose(self, attempt: Attempt, *, cause: Cause, reason: str) -> None:
        outcome = self._cells.lose(attempt, cause=cause, reason=reason)
        if isinstance(outcome, RunRecord):
            self._tell_progress(outcome)
        elif outcome:
            self._tell_progress(note=outcome)

    def _hand_back(self, executors: Executors) -> None:
        """Lets executors save what they are doing, as far as the time allows."""
        if not self._cells.all_held():
            return
        executors.stop()
        deadline = time.monotonic() + _GRACE_S
        while self._cells.all_held() and (left := deadline - time.monotonic()) > 0:
            message = executors.next_message(timeout_s=left)
            if message is None:
                return
            attempt = self._cells.attempt_of(message)
            if attempt is not None and message.event == "stopped":
                reason = f"{message.reason}; {_GOES_ON}"
                self._lose(attempt, cause="interrupted", reason=reason)
            elif attempt is not None or self._cells.held_by(message.executor):
                self._handle(message, executors)

    def _release_attempts(self) -> None:
        """Ends the trials of runs that the scheduler's own end has cut off."""
        for attempt in self._cells.all_held():
            # What cannot be written now is told when the study goes on.
            with contextlib.suppress(OSError, InputError):
                if not self._settle(attempt):
                    reason = f"cut off; {_GOES_ON}"
                    self._lose(attempt, cause="interrupted", reason=reason)

    def _tell_progress(
        self, event: RunRecord | EpochEnd | None = None, *, note: str = ""
    ) -> None:
        now = time.monotonic()
        if event is None and not note and now < self._progress_due:
            return
        self._progress_due = now + _PROGRESS_EVERY_S
        self._on_progress(
            replace(
                self._cells.progress(num_executors=len(self._devices)),
                finished=event if isinstance(event, RunRecord) else None,
                epoch=event if isinstance(event, EpochEnd) else None,
                note=note,
            )
        )
