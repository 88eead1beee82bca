"""Optuna's side of a study: the storage, and one trial for each attempt at a run.

Only the scheduler writes here. A cell is claimed by one atomic add of a RUNNING trial;
a run's file, not its trial, is the truth about its result, so `reconcile` can bring the
trials in line with the files after any crash.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from resnext_ablate.records import Cell, EpochRecord, NetRecord, Plan, RunRecord
from resnext_ablate.records import read_run as read_run_file
from resnext_ablate.spec import InputError, spec_from_dict

STORAGE_FILE = "study.db"

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

_SQLITE_HEADER = b"SQLite format 3\x00"


@dataclass(frozen=True, kw_only=True)
class RunningRun:
    """A run under way, as the storage knows it."""

    variant: str
    seed: int
    epoch: int
    val_error_pct: float | None


def open_storage(folder: Path, *, name: str) -> optuna.Study:
    """The study's `optuna.Study` on SQLite in its folder, created where new.

    Raises:
        InputError: the storage file is none, or cannot be opened.
    """
    path = (folder / STORAGE_FILE).resolve()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            header = file.read(len(_SQLITE_HEADER))
        if header != _SQLITE_HEADER:
            raise InputError(
                f"{path}: is no SQLite storage. Move it away and run again: results "
                "come from the run files beside it, none is lost."
            )
    try:
        return optuna.create_study(
            storage=f"sqlite:///{path}",
            study_name=name,
            direction="minimize",
            # An ablation's plan is fixed; nothing is sampled or pruned.
            sampler=optuna.samplers.RandomSampler(seed=0),
            pruner=optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
    except (SQLAlchemyError, RuntimeError) as error:
        first_line = str(error).splitlines()[0]
        raise InputError(
            f"{path}: cannot be opened as Optuna's storage: {first_line}. Move it away "
            "and run again: results come from the run files beside it."
        ) from None


def claim(study: optuna.Study, *, net: NetRecord, cell: Cell) -> int:
    """Adds the RUNNING trial of an attempt at a cell; returns its number."""
    study.add_trial(_trial(net, cell, state=TrialState.RUNNING))
    return max(trial.number for trial in _of_cell(study, cell.id))


def report(study: optuna.Study, *, number: int, epoch: EpochRecord) -> None:
    """Notes an epoch's validation error as intermediate value of a trial."""
    _live(study, number).report(epoch.val_error_pct, step=epoch.epoch)


def tell(study: optuna.Study, *, number: int, run: RunRecord) -> None:
    """Ends a RUNNING trial with its run's result.

    The value is the last epoch's validation error; the test error is an attribute only,
    so that nothing in Optuna can select on it. A run that did not complete is FAIL.
    """
    trial = _live(study, number)
    for key, value in _result_attributes(run).items():
        trial.set_user_attr(key, value)
    study.tell(number, _value(run), state=_STATES[run.state])


def tell_lost(study: optuna.Study, *, number: int, reason: str) -> None:
    """Ends a RUNNING trial that left no result, so that its cell is free again."""
    _live(study, number).set_user_attr("reason", reason)
    study.tell(number, state=TrialState.FAIL)


def reconcile(study: optuna.Study, *, plan: Plan, folder: Path) -> None:
    """Brings the trials in line with the run files. No executor may be alive."""
    for trial in _trials(study, TrialState.RUNNING):
        run = read_run_file(folder, trial.user_attrs.get("cell", ""))
        if run is None:
            reason = "its scheduler ended before the run did"
            tell_lost(study, number=trial.number, reason=reason)
        else:
            tell(study, number=trial.number, run=run)
    told = {
        trial.user_attrs.get("cell")
        for trial in _trials(
            study, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
        )
        if "state" in trial.user_attrs
    }
    for cell in plan.cells:
        run = None if cell.id in told else read_run_file(folder, cell.id)
        if run is not None:
            study.add_trial(
                _trial(
                    plan.net(cell.variant),
                    cell,
                    state=_STATES[run.state],
                    value=_value(run),
                    attributes=_result_attributes(run),
                )
            )


def lost_attempts(study: optuna.Study) -> Counter[str]:
    """How many attempts at each cell ended without a result."""
    return Counter(
        trial.user_attrs["cell"]
        for trial in _trials(study, TrialState.FAIL)
        if "state" not in trial.user_attrs and "cell" in trial.user_attrs
    )


def running(folder: Path, *, name: str) -> tuple[RunningRun, ...]:
    """The runs that the storage holds as under way."""
    if not (folder / STORAGE_FILE).exists():
        return ()
    study = open_storage(folder, name=name)
    return tuple(
        RunningRun(
            variant=trial.user_attrs["variant"],
            seed=trial.params["seed"],
            epoch=trial.last_step or 0,
            val_error_pct=trial.intermediate_values.get(trial.last_step or 0),
        )
        for trial in _trials(study, TrialState.RUNNING)
    )


def _trials(study: optuna.Study, *states: TrialState) -> Sequence[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=states)


def _of_cell(study: optuna.Study, cell: str) -> list[FrozenTrial]:
    running = _trials(study, TrialState.RUNNING)
    return [trial for trial in running if trial.user_attrs.get("cell") == cell]


def _live(study: optuna.Study, number: int) -> optuna.Trial:
    """The writable trial of a number; Optuna hands these out to `ask` alone."""
    frozen = next(
        trial for trial in _trials(study, TrialState.RUNNING) if trial.number == number
    )
    return optuna.Trial(study, frozen._trial_id)


def _trial(
    net: NetRecord,
    cell: Cell,
    *,
    state: TrialState,
    value: float | None = None,
    attributes: dict[str, str | float] | None = None,
) -> FrozenTrial:
    spec = spec_from_dict(net.spec)
    return create_trial(
        state=state,
        value=value,
        params={
            "cardinality": spec.cardinalities[0],  # of stage 1, as the base width
            "base_width": spec.base_width,
            "template_width": spec.template_width,
            "depth": spec.depth,
            "seed": cell.seed,
        },
        distributions=dict(_DISTRIBUTIONS),
        user_attrs={
            "cell": cell.id,
            "variant": cell.variant,
            "macs": net.macs,
            "params": net.params,
            **(attributes or {}),
        },
    )


def _value(run: RunRecord) -> float | None:
    return run.epochs[-1].val_error_pct if run.state == "complete" else None


def _result_attributes(run: RunRecord) -> dict[str, str | float]:
    attributes: dict[str, str | float] = {"state": run.state}
    if run.reason:
        attributes["reason"] = run.reason
    if run.test_error_pct is not None:
        attributes["test_error_pct"] = run.test_error_pct
    return attributes
