"""What became of the nets that a search has tried, by its plan and run files.

Only validation errors are looked at: the test split has no say in what is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from resnext_ablate.records.records import FAILURES, NetRecord, Plan, RunRecord, Trial
from resnext_ablate.records.search_config import SecondAim

TrialState = Literal["running", "complete", "pruned", "failed"]


@dataclass(frozen=True, kw_only=True)
class TrialOutcome:
    """How far a trial is."""

    trial: Trial
    net: NetRecord
    runs: tuple[RunRecord, ...]
    """Its finished runs, by seed."""
    state: TrialState
    is_ended: bool
    """Nothing of it is to be run any more."""
    val_error_pct: float | None
    """Mean of the last epochs over its seeds; None unless every seed is complete."""
    step_time_ms: float | None
    """Mean training time of an image, in milliseconds; None as above."""

    def second(self, aim: SecondAim) -> float:
        """What a second aim wants small, of a complete trial."""
        if aim == "step_time":
            assert self.step_time_ms is not None
            return self.step_time_ms
        return float(self.net.activations if aim == "activations" else self.net.params)


def trial_outcomes(
    plan: Plan, runs: Sequence[RunRecord], *, seeds: Sequence[int]
) -> tuple[TrialOutcome, ...]:
    """How far each trial of a search is, in their order."""
    by_run = {(run.variant, run.seed): run for run in runs}
    planned = {(cell.variant, cell.seed) for cell in plan.cells}
    nets = {net.variant: net for net in plan.nets}
    return tuple(
        _outcome(trial, nets[trial.variant], by_run, planned, seeds)
        for trial in plan.trials
    )


def chosen(
    outcomes: Sequence[TrialOutcome], *, count: int, also_minimize: SecondAim | None
) -> tuple[TrialOutcome, ...]:
    """The best trials by validation error, best first, of all trained to the end.

    With a second aim only those that no other beats in both.
    """
    complete = [one for one in outcomes if one.val_error_pct is not None]
    if also_minimize:
        points = [(_error(one), one.second(also_minimize)) for one in complete]
        complete = [
            one
            for one, point in zip(complete, points, strict=True)
            if not any(_beats(other, point) for other in points)
        ]
    ranked = sorted(complete, key=lambda one: (_error(one), one.trial.number))
    return tuple(ranked[:count])


def _outcome(
    trial: Trial,
    net: NetRecord,
    by_run: dict[tuple[str, int], RunRecord],
    planned: set[tuple[str, int]],
    seeds: Sequence[int],
) -> TrialOutcome:
    keys = [(trial.variant, seed) for seed in seeds]
    runs = tuple(by_run[key] for key in keys if key in by_run)
    has_open_cells = any(key in planned and key not in by_run for key in keys)
    failed = any(run.state in FAILURES for run in runs)
    whole = len(runs) == len(keys) and all(run.state == "complete" for run in runs)
    stopped = trial.pruned_at is not None and not trial.is_audited
    is_ended = not has_open_cells and (failed or whole or stopped)
    state: TrialState = "running"
    if trial.pruned_at is not None:
        state = "pruned"
    elif is_ended:
        state = "failed" if failed else "complete"
    speeds = [run.images_per_s for run in runs if run.images_per_s]
    return TrialOutcome(
        trial=trial,
        net=net,
        runs=runs,
        state=state,
        is_ended=is_ended,
        val_error_pct=fmean(r.epochs[-1].val_error_pct for r in runs)
        if whole
        else None,
        step_time_ms=fmean(1000 / speed for speed in speeds) if whole else None,
    )


def _error(outcome: TrialOutcome) -> float:
    assert outcome.val_error_pct is not None
    return outcome.val_error_pct


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]
