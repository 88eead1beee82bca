"""Rungs: the compute at which nets of a search are compared, equal for all of them.

A net that needs half the multiply-adds of another is as far in its twentieth epoch as
that one is in its tenth. Compared by epochs, cheap nets would be judged after less work
and costly ones after more; here all are judged after the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from resnext_ablate.records.records import EpochRecord


@dataclass(frozen=True, kw_only=True)
class Rungs:
    """Where runs are compared."""

    compute: tuple[float, ...]
    """Rising; in `unit`."""
    unit: Literal["macs", "seconds"]
    """macs: in epochs of the reference, by multiply-adds. seconds: of training."""
    tolerance: float
    """Share of a rung's compute that a run may be off it and still counts as there."""
    guess_error_pct: float
    """Error of a net that has not learnt anything."""


def epochs_to_wait(
    rungs: Rungs, *, relative_macs: float, num_epochs: int
) -> tuple[int, ...]:
    """The epochs of a run behind which it has passed a rung, or may have.

    Args:
        rungs: where runs are compared.
        relative_macs: the net's macs in terms of the reference's.
        num_epochs: of a whole run; nothing is to be saved behind the last one.
    """
    if not rungs.compute:
        return ()
    if rungs.unit == "seconds":
        return tuple(range(1, num_epochs))
    passed = [epoch * relative_macs for epoch in range(1, num_epochs + 1)]
    places = {_place(passed, rung, rungs.tolerance) for rung in rungs.compute}
    return tuple(sorted(at + 1 for at in places if at < num_epochs - 1))


def errors_at(
    rungs: Rungs, epochs: Sequence[EpochRecord], *, relative_macs: float
) -> tuple[float, ...]:
    """Validation error (percent) of a run at each rung it has passed, lowest first.

    Between two epochs it is read off the straight line through both.
    """
    passed = (
        [epoch.epoch * relative_macs for epoch in epochs]
        if rungs.unit == "macs"
        else list(accumulate(epoch.time_s for epoch in epochs))
    )
    errors = [epoch.val_error_pct for epoch in epochs]
    found = []
    for rung in rungs.compute:
        at = _place(passed, rung, rungs.tolerance)
        if at == len(passed):
            break
        error = errors[at]
        if passed[at] > rung * (1 + rungs.tolerance):
            before = passed[at - 1] if at else 0.0
            error_before = errors[at - 1] if at else rungs.guess_error_pct
            share = (rung - before) / (passed[at] - before)
            error = error_before + share * (error - error_before)
        found.append(error)
    return tuple(found)


def _place(passed: Sequence[float], rung: float, tolerance: float) -> int:
    """Position of the first epoch that is on a rung or beyond; the length if none."""
    low = rung * (1 - tolerance)
    return next((at for at, done in enumerate(passed) if done >= low), len(passed))
