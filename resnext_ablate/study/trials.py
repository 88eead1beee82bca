"""One Optuna trial for each attempt at a run, kept in line with the run files.

Only the scheduler writes here. A cell is claimed by one atomic add of a RUNNING trial;
a run's file, not its trial, is the truth about its result, so `reconcile` can bring the
trials in line with the files after any crash.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from optuna.distributions import IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from resnext_ablate.architecture.spec import spec_from_dict
from resnext_ablate.records.attempts import AttemptRecord, attempt_path, write_attempt
from resnext_ablate.records.progress import RunningRun
from resnext_ablate.records.records import (
    Cell,
    EpochRecord,
    NetRecord,
    Plan,
    RunRecord,
    RunState,
    is_cell_id,
    read_run,
)
from resnext_ablate.study.storage import (
    NO_ANSWER,
    Report,
    Storage,
    WriterLock,
    add_reports,
    close,
    only_writer,
    open_storage,
    opening_errors,
    running_trials,
    told_cells,
)

# One set of distributions for every study, so that variants can be added later:
# Optuna refuses a parameter whose range changes.
_ANY = IntDistribution(1, 2**31 - 1)
_DISTRIBUTIONS = {
    "cardinality": _ANY,
    "base_width": _ANY,
    "template_width": _ANY,
    "depth": _ANY,
    "seed": IntDistribution(0, 2**31 - 1),
}

_STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "diverged": TrialState.FAIL,
    "failed": TrialState.FAIL,
}

_TRY_EVERY_S = 1.0
_REPORT_EVERY_S = 0.3


class Ledger:
    """Writes the trials of attempts, in order.

    What the storage cannot take now waits its turn, and is written once it answers.

    Args:
        storage: the study's.
        lock: that keeps other processes from writing to it, where it needs one.
    """

    def __init__(self, storage: Storage, *, lock: WriterLock | None) -> None:
        self._storage = storage
        self._lock = lock
        self._reports: list[Report] = []
        self._reports_due = 0.0
        self._acts: deque[Callable[[], None]] = deque()
        self._unsure: set[str] = set()  # cells whose claim had no answer
        self._silent_since: float | None = None
        self._next_try = 0.0
        self.was_silent = False
        """Whether the storage ever failed to answer."""

    @property
    def num_waiting(self) -> int:
        return len(self._reports) + len(self._acts)

    @property
    def silent_s(self) -> float:
        """Seconds for which the storage has not answered; 0 where it does."""
        since = self._silent_since
        return 0.0 if since is None else time.monotonic() - since

    def claim(self, *, net: NetRecord, cell: Cell, attempt: int) -> int | None:
        """Adds the RUNNING trial of an attempt; its id, or None without an answer.

        Raises:
            InputError: another process has taken the study over.
        """
        if not self.flush():
            return None
        number: dict[str, str | float] = {"attempt": attempt}
        trial = _trial(net, cell, state=TrialState.RUNNING, attributes=number)
        found: int | None = None
        with self.silence_noted():
            self._keep_lock()
            if cell.id in self._unsure:
                found = self._find(cell, attempt)
            if found is None:
                storage = self._storage
                found = storage.backend.create_new_trial(storage.study_id, trial)
        if found is None:
            self._unsure.add(cell.id)
        else:
            self._unsure.discard(cell.id)
        return found

    def report(self, trial: int, *, epoch: EpochRecord) -> None:
        """Notes an epoch's validation error as intermediate value of a trial.

        Those of some tenths of a second are written together.
        """
        self._reports.append((trial, epoch.epoch, epoch.val_error_pct))

    def tell(self, trial: int, *, run: RunRecord) -> None:
        """Ends a RUNNING trial with its run's result.

        The value is the last epoch's validation error; the test error is an attribute
        only, so that nothing in Optuna can select on it. A run that did not complete
        is FAIL.
        """
        attributes = _result_attributes(run)
        self._write(
            partial(self._end, trial, _STATES[run.state], _values(run), attributes)
        )

    def tell_lost(self, trial: int, *, reason: str) -> None:
        """Ends a RUNNING trial that left no result, so that its cell is free again."""
        attributes: dict[str, str | float] = {"reason": reason}
        self._write(partial(self._end, trial, TrialState.FAIL, None, attributes))

    def add_finished(self, *, net: NetRecord, cell: Cell, run: RunRecord) -> None:
        """Adds the trial of a run that came from elsewhere."""
        self._write(partial(_add_finished, self._storage, net, cell, run))

    def flush(self) -> bool:
        """Writes what waits, where it is due; whether the storage answers."""
        now = time.monotonic()
        if now < self._next_try:
            return False
        has_reports = bool(self._reports) and now >= self._reports_due
        if self._acts or has_reports or self._silent_since is not None:
            with self.silence_noted():
                self._write_all()
        return self._silent_since is None

    @contextlib.contextmanager
    def silence_noted(self) -> Iterator[None]:
        """Takes note where the storage does not answer what is asked of it here.

        Raises:
            OSError: it has no room left.
        """
        try:
            yield
        except NO_ANSWER as error:
            text = f"{error} {error.__cause__}"
            if "disk is full" in text or "disk I/O error" in text:
                raise OSError(errno.ENOSPC, "the storage has no room left") from None
            now = time.monotonic()
            self._next_try = now + _TRY_EVERY_S
            self.was_silent = True
            if self._silent_since is None:
                self._silent_since = now

    def _write(self, act: Callable[[], None]) -> None:
        self._acts.append(act)
        self.flush()

    def _write_all(self) -> None:
        self._keep_lock()
        if self._silent_since is not None:
            self._storage.backend.get_study_name_from_id(self._storage.study_id)
        # Reports first: an act may end their trial, and none comes after its end.
        if self._reports:
            add_reports(self._storage, self._reports)
            self._reports.clear()
            self._reports_due = time.monotonic() + _REPORT_EVERY_S
        while self._acts:
            self._acts[0]()
            self._acts.popleft()
        self._silent_since = None

    def _end(
        self,
        trial: int,
        state: TrialState,
        values: Sequence[float] | None,
        attributes: dict[str, str | float],
    ) -> None:
        backend = self._storage.backend
        try:
            for key, value in attributes.items():
                backend.set_trial_user_attr(trial, key, value)
            backend.set_trial_state_values(trial, state, values)
        except UpdateFinishedTrialError:
            return  # Written before an answer was lost.

    def _find(self, cell: Cell, attempt: int) -> int | None:
        """The trial of an attempt whose claim was written, but its answer lost."""
        for trial in _running(self._storage):
            attributes = trial.user_attrs
            if (attributes.get("cell"), attributes.get("attempt")) == (
                cell.id,
                attempt,
            ):
                return trial._trial_id
        return None

    def _keep_lock(self) -> None:
        if self._lock is not None and not self._lock.is_held():
            self._lock.take()


def reconcile(
    storage: Storage, *, plan: Plan, states: Mapping[str, RunState], folder: Path
) -> None:
    """Brings the trials in line with the run files. No executor may be alive.

    Args:
        storage: the study's.
        plan: what is to run.
        states: how the runs that have a file ended, by cell.
        folder: of the study.

    Raises:
        InputError: the storage cannot be read or written.
    """
    with opening_errors(storage.place):
        ledger = Ledger(storage, lock=None)
        for trial in _running(storage):
            cell_id = trial.user_attrs.get("cell", "")
            run = read_run(folder, cell_id) if cell_id in states else None
            if run is None:
                reason = "its scheduler ended before the run did"
                _record_lost(trial, folder=folder, reason=reason)
                ledger.tell_lost(trial._trial_id, reason=reason)
            else:
                for epoch in run.epochs:
                    ledger.report(trial._trial_id, epoch=epoch)
                ledger.tell(trial._trial_id, run=run)
        told = told_cells(storage)
        for cell in plan.cells:
            if cell.id not in states or cell.id in told:
                continue
            run = read_run(folder, cell.id)
            if run is not None:
                _add_finished(storage, plan.net(cell.variant), cell, run)


def _add_finished(storage: Storage, net: NetRecord, cell: Cell, run: RunRecord) -> None:
    finished = _trial(
        net,
        cell,
        state=_STATES[run.state],
        values=_values(run),
        attributes=_result_attributes(run),
        epochs=run.epochs,
    )
    storage.backend.create_new_trial(storage.study_id, finished)


def pin_charts(
    url: str, *, folder: Path, name: str, study_id: str, figures: Mapping[str, Any]
) -> bool:
    """Shows charts beside the trials in optuna-dashboard, where that is installed.

    Only the scheduler's process calls this, when its runs are done.

    Args:
        url, folder, name, study_id: as for `storage.open_storage`.
        figures: `plotly.graph_objects.Figure` by key; one of an earlier time makes way.

    Returns:
        Whether they are there to be seen.

    Raises:
        InputError: the storage cannot be opened, or another process writes to it.
    """
    if importlib.util.find_spec("optuna_dashboard") is None:
        return False
    import optuna_dashboard

    with only_writer(url, name=name):
        opened = open_storage(url, folder=folder, name=name, study_id=study_id)
        for key, figure in figures.items():
            optuna_dashboard.save_plotly_graph_object(
                opened.study, figure, graph_object_id=key
            )
        close(opened)
    return True


def running(url: str, *, folder: Path, name: str) -> tuple[RunningRun, ...]:
    """The runs that a storage holds as under way."""
    return tuple(
        RunningRun(
            variant=trial.user_attrs["variant"],
            seed=trial.params["seed"],
            epoch=trial.last_step or 0,
            val_error_pct=trial.intermediate_values.get(trial.last_step or 0),
        )
        for trial in running_trials(url, folder=folder, name=name)
    )


def _running(storage: Storage) -> Sequence[FrozenTrial]:
    return storage.backend.get_all_trials(
        storage.study_id, deepcopy=False, states=(TrialState.RUNNING,)
    )


def _record_lost(trial: FrozenTrial, *, folder: Path, reason: str) -> None:
    attributes = trial.user_attrs
    number = attributes.get("attempt")
    if not isinstance(number, int) or not is_cell_id(attributes.get("cell")):
        return  # Not of ours, or of a release that kept no record of attempts.
    lost = AttemptRecord(
        cell=attributes["cell"],
        variant=attributes["variant"],
        seed=trial.params["seed"],
        number=number,
        cause="scheduler_died",
        reason=reason,
        epoch=trial.last_step or 0,
        ended_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if not attempt_path(folder, lost).exists():
        write_attempt(lost, folder)


def _trial(
    net: NetRecord,
    cell: Cell,
    *,
    state: TrialState,
    values: Sequence[float] | None = None,
    attributes: dict[str, str | float] | None = None,
    epochs: Sequence[EpochRecord] = (),
) -> FrozenTrial:
    spec = spec_from_dict(net.spec)
    return create_trial(
        state=state,
        values=values,
        params={
            "cardinality": spec.cardinalities[0],  # of stage 1, as the base width
            "base_width": spec.base_width,
            "template_width": spec.template_width,
            "depth": spec.depth,
            "seed": cell.seed,
        },
        distributions=dict(_DISTRIBUTIONS),
        intermediate_values={one.epoch: one.val_error_pct for one in epochs},
        user_attrs={
            "cell": cell.id,
            "variant": cell.variant,
            "macs": net.macs,
            "params": net.params,
            **(attributes or {}),
        },
    )


def _values(run: RunRecord) -> tuple[float] | None:
    return (run.epochs[-1].val_error_pct,) if run.state == "complete" else None


def _result_attributes(run: RunRecord) -> dict[str, str | float]:
    attributes: dict[str, str | float] = {"state": run.state}
    if run.reason:
        attributes["reason"] = run.reason
    if run.test_error_pct is not None:
        attributes["test_error_pct"] = run.test_error_pct
    return attributes
