"""The cells of a study: those to do, those in the hands of executors, and their ends.

It knows nothing of executors but their numbers: `schedule` speaks to them.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from resnext_ablate.engines.execution import Job, Message, Seat
from resnext_ablate.records import attempts, records, run_files
from resnext_ablate.records.attempts import AttemptRecord, Cause, Tally
from resnext_ablate.records.config import StudyConfig
from resnext_ablate.records.progress import Pace, Progress, RunningRun
from resnext_ablate.records.records import (
    Cell,
    EpochRecord,
    Plan,
    RunRecord,
    RunState,
)
from resnext_ablate.study.seats import Attempt, Grower, taken_on
from resnext_ablate.study.trials import Ledger

_LAST_WORD_S = 60.0
"""For a storage that does not answer, once all runs are done."""
_SMALLEST_MICRO_BATCH = 2  # Batch normalisation needs two values.


class Cells:
    """Hands out cells, and brings each to a run file that Optuna knows of."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        config: StudyConfig,
        plan: Plan,
        states: Mapping[str, RunState],
        folder: Path,
        data_folder: Path,
        grower: Grower | None,
    ) -> None:
        self._ledger = ledger
        self._config = config
        self._config_json = config.model_dump_json()
        self._fixed_plan = plan
        self._grower = grower
        self._folder = folder
        self._data_folder = data_folder
        self._environment = records.environment()
        self._todo = deque(cell for cell in plan.cells if cell.id not in states)
        self._in_hand: dict[str, Attempt] = {}
        self._states = dict(states)
        self._counts = Counter(states.values())
        self._watch = run_files.Watch(folder)
        self._tally = Tally(attempts.read_attempts(folder))
        self._pace = Pace(num_epochs=config.train.epochs)

    @property
    def plan(self) -> Plan:
        return self._grower.plan if self._grower else self._fixed_plan

    @property
    def num_at_most(self) -> int | None:
        """Runs that can be under way at once; None where the plan may grow."""
        return None if self._grower else len(self._todo)

    def has_work(self) -> bool:
        """Whether a cell is to be done; a search is asked for one where none is."""
        if not self._todo and self._grower and self._ledger.flush():
            with self._ledger.silence_noted():
                self._todo.extend(self._grower.next_cells())
        return bool(self._todo)

    def may_have_work(self) -> bool:
        """Whether an executor is of use, be it later."""
        return bool(self._todo) or self._grower is not None

    def is_open(self) -> bool:
        """Whether something is to be done, under way or still to be told."""
        if self.has_work() or self._in_hand:
            return True
        if self._ledger.silent_s == 0:
            return self._ledger.num_waiting > 0
        may_grow = self._grower is not None and self._grower.num_to_come > 0
        return may_grow or self._ledger.silent_s < _LAST_WORD_S

    def held_by(self, executor: int) -> tuple[Attempt, ...]:
        """What an executor has in hand."""
        return tuple(one for one in self._in_hand.values() if one.executor == executor)

    def all_held(self) -> tuple[Attempt, ...]:
        return tuple(self._in_hand.values())

    def attempt_of(self, message: Message) -> Attempt | None:
        """The attempt that a message is about; None for one that is over."""
        attempt = self._in_hand.get(message.cell or "")
        if attempt is None or (attempt.executor, attempt.number) != (
            message.executor,
            message.attempt,
        ):
            return None
        return attempt

    def claim(self, executor: int, *, device: str) -> Job | None:
        """Takes the next cell in hand, with others that are one net with it.

        None where the storage does not answer.
        """
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
            net = self.plan.net(cell.variant)
            trial = self._ledger.claim(net=net, cell=cell, attempt=number)
            if trial is None:
                break
            self._todo.remove(cell)
            parts = 2 ** self._tally.count(cell.id, cause="out_of_memory")
            now = time.monotonic()
            claimed.append(Attempt(cell, executor, number, trial, now, parts))
        for attempt in claimed:
            attempt.num_fused = len(claimed)
            self._in_hand[attempt.cell.id] = attempt
        return self._job(claimed, device=device) if claimed else None

    def _job(self, claimed: Sequence[Attempt], *, device: str) -> Job:
        first, *others = claimed
        cell = first.cell
        return Job(
            cell=cell.id,
            variant=cell.variant,
            seed=cell.seed,
            spec=self.plan.net(cell.variant).spec,
            config=self._config_json,
            data_folder=str(self._data_folder),
            study_folder=str(self._folder),
            checkpoint_root=str(self._folder.resolve()),
            device=device,
            environment=self._environment,
            attempt=first.number,
            num_micro_batches=first.num_micro_batches,
            wait_after=self._grower.wait_after(cell) if self._grower else (),
            beside=tuple(
                Seat(cell=one.cell.id, seed=one.cell.seed, attempt=one.number)
                for one in others
            ),
        )

    def note_epoch(self, attempt: Attempt, epoch: EpochRecord, *, now: float) -> None:
        """Takes note of an epoch that has ended."""
        seconds = (now - attempt.since) / attempt.num_fused
        if seconds >= epoch.time_s:  # Else it came from a checkpoint.
            self._pace.add(attempt.cell.variant, seconds=seconds)
        attempt.since = now
        attempt.epoch = epoch.epoch
        attempt.val_error_pct = epoch.val_error_pct
        self._ledger.report(attempt.trial, epoch=epoch)

    def stop_reason(self, attempt: Attempt, epochs: Sequence[EpochRecord]) -> str:
        """Why a waiting run is to stop; empty where it goes on.

        Where the storage does not answer it goes on, to be judged where it waits next.
        """
        assert self._grower is not None
        reason = ""
        if self._ledger.flush():
            with self._ledger.silence_noted():
                reason = self._grower.stop_reason(attempt.cell, epochs)
        return reason

    def settle(self, attempt: Attempt) -> RunRecord | None:
        """Tells Optuna of the run file that an attempt left; None if it left none."""
        run = records.read_run(self._folder, attempt.cell.id)
        if run is None:
            run_files.set_damaged_aside(self._folder, attempt.cell.id)
            return None
        del self._in_hand[attempt.cell.id]
        self._ledger.tell(attempt.trial, run=run)
        records.remove_checkpoints(self._folder, attempt.cell.id)
        self._note_run(run)
        return run

    def look_around(self) -> str:
        """Holds the run files against what is known, where any came or went.

        One that came from elsewhere is taken for its cell's; a cell whose file is gone
        is to be done again.

        Returns:
            What to say of it, if anything.
        """
        present = self._watch.changed_cells()
        if present is None:
            return ""
        came = [cell for cell in self._todo if cell.id in present]
        taken = [run for cell in came if (run := self._take_in(cell))]
        gone = [
            cell
            for cell in self.plan.cells
            if cell.id in self._states and cell.id not in present
        ]
        for cell in gone:
            self._counts[self._states.pop(cell.id)] -= 1
            self._todo.append(cell)
        said = [f"{len(taken)} run files came from elsewhere"] if taken else []
        said += [f"{len(gone)} run files are gone: they run again"] if gone else []
        return "; ".join(said)

    def _take_in(self, cell: Cell) -> RunRecord | None:
        run = records.read_run(self._folder, cell.id)
        if run is not None:
            self._todo.remove(cell)
            self._ledger.add_finished(
                net=self.plan.net(cell.variant), cell=cell, run=run
            )
            self._note_run(run)
        return run

    def _note_run(self, run: RunRecord) -> None:
        self._states[run.cell] = run.state
        self._counts[run.state] += 1
        if self._grower:
            with self._ledger.silence_noted():
                self._grower.settle(run)

    def lose(self, attempt: Attempt, *, cause: Cause, reason: str) -> RunRecord | str:
        """Ends an attempt without a result: its cell is free again, or has failed.

        Returns:
            The failed run; or what to say of another attempt, if anything.
        """
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
            return self.settle(attempt) or ""
        del self._in_hand[cell.id]
        self._ledger.tell_lost(attempt.trial, reason=reason)
        self._todo.appendleft(cell)
        place = f"{cell.variant} seed {cell.seed}"
        if cause == "crowded":
            return f"{place}: {reason}; it goes on alone"
        if not is_bounded:
            return ""
        what = f"trying again ({count} of {limit})"
        if cause == "out_of_memory":
            parts = 2 * attempt.num_micro_batches
            what += f", each batch in {parts} micro-batches"
        return f"{place}: {reason}; {what}"

    def progress(self, *, num_executors: int) -> Progress:
        """Where the study stands."""
        to_come = self._grower.num_to_come if self._grower else 0
        running = tuple(
            RunningRun(
                variant=attempt.cell.variant,
                seed=attempt.cell.seed,
                epoch=attempt.epoch,
                val_error_pct=attempt.val_error_pct,
            )
            for attempt in self._in_hand.values()
        )
        eta_s = self._pace.eta_s(
            todo=[cell.variant for cell in self._todo],
            running=running,
            num_to_come=to_come,
            num_executors=num_executors,
        )
        return Progress(
            num_planned=len(self.plan.cells) + to_come,
            num_complete=self._counts["complete"],
            num_failed=sum(self._counts[state] for state in records.FAILURES),
            num_pruned=self._counts["pruned"],
            running=running,
            eta_s=eta_s,
        )

    def _is_too_small(self, attempt: Attempt, cause: Cause) -> bool:
        """Whether memory ran out with micro-batches that cannot be halved."""
        parts = 2 * attempt.num_micro_batches
        smallest = self._config.train.batch_size // parts
        return cause == "out_of_memory" and smallest < _SMALLEST_MICRO_BATCH

    def _failed_run(self, attempt: Attempt, reason: str) -> RunRecord:
        return RunRecord(
            cell=attempt.cell.id,
            variant=attempt.cell.variant,
            seed=attempt.cell.seed,
            state="failed",
            reason=reason,
            device=self._config.run.device,
            precision=self._config.train.precision,
            data_checksum=self.plan.provenance["data_checksum"],
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            environment=self._environment,
            num_micro_batches=attempt.num_micro_batches,
        )
