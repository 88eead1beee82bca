"""How far a study is, and how long the rest takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from resnext_ablate.records.records import Cell, EpochRecord, RunRecord


@dataclass(frozen=True, kw_only=True)
class RunningRun:
    """A run under way."""

    variant: str
    seed: int
    epoch: int
    """Epochs that are over."""
    val_error_pct: float | None


@dataclass(frozen=True)
class EpochEnd:
    """An epoch that has just ended."""

    cell: Cell
    record: EpochRecord


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a study stands."""

    num_planned: int
    num_complete: int
    num_failed: int
    num_pruned: int = 0
    """Of a search."""
    running: tuple[RunningRun, ...]
    eta_s: float | None
    """Seconds to the end by the epochs timed so far; None before the first."""
    finished: RunRecord | None = None
    """The run that has just ended."""
    epoch: EpochEnd | None = None
    note: str = ""
    """Something out of the ordinary, in a sentence."""


class Pace:
    """Seconds that epochs take, variant by variant."""

    def __init__(self, *, num_epochs: int) -> None:
        self._num_epochs = num_epochs
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)

    def add(self, variant: str, *, seconds: float) -> None:
        self._sums[variant] += seconds
        self._counts[variant] += 1

    def eta_s(
        self,
        *,
        todo: Sequence[str],
        num_to_come: int,
        running: Sequence[RunningRun],
        num_executors: int,
    ) -> float | None:
        """Seconds to the end; None before the first epoch.

        Args:
            todo: variants of the runs that are planned.
            num_to_come: runs of variants that are not known yet.
            running: those under way.
            num_executors: how many run side by side.
        """
        if not self._counts:
            return None
        means = {key: self._sums[key] / count for key, count in self._counts.items()}
        overall = fmean(means.values())
        left = sum(self._num_epochs * means.get(variant, overall) for variant in todo)
        left += self._num_epochs * overall * num_to_come
        for run in running:
            each = means.get(run.variant, overall)
            left += (self._num_epochs - run.epoch) * each
        return left / max(1, min(num_executors, len(running) or 1))
