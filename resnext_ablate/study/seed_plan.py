"""The plan of a study with adaptive seeds, which grows look by look.

What a look decides follows from the run files alone (`looks.replay`), and new cells are
in the plan's file before they run. So a study that was killed decides the same again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from resnext_ablate.architecture.spec import spec_from_dict
from resnext_ablate.numbers import looks
from resnext_ablate.numbers.verdicts import Rules
from resnext_ablate.records import records
from resnext_ablate.records.config import StudyConfig
from resnext_ablate.records.records import Cell, EpochRecord, NetRecord, Plan, RunRecord

FIXED = ("run.seeds", "net.cardinality", "net.variants", "report")
"""What looks rest on: settings that cannot change once a study has begun."""


def cells_of(nets: Sequence[NetRecord], *, seeds: Sequence[int]) -> tuple[Cell, ...]:
    """Every net with every seed, seed by seed."""
    return tuple(_cell(net, seed) for seed in seeds for net in nets)


class SeedPlan:
    """Adds the seeds that the next look needs, and keeps the plan's file up to date."""

    def __init__(self, plan: Plan, *, config: StudyConfig, folder: Path) -> None:
        """Goes on with a plan.

        Args:
            plan: as far as it has grown; the reference stands first among its nets.
            config: resolved, with adaptive seeds.
            folder: of the study.
        """
        assert config.run.max_seeds is not None
        self._plan = plan
        self._max_seeds = config.run.max_seeds
        self._rules = Rules(
            margin=config.report.equivalence_margin_pct,
            family=config.report.family,
            pairing=config.report.pairing,
        )
        self._folder = folder
        self._errors = {
            run.cell: _error(run) for run in records.read_runs(folder, plan)
        }
        self._num_to_come = self._most_to_come(self._standing())

    @property
    def plan(self) -> Plan:
        return self._plan

    @property
    def num_to_come(self) -> int:
        """Runs that are not in the plan yet, if no further comparison closes."""
        return self._num_to_come

    def next_cells(self) -> tuple[Cell, ...]:
        """Adds the cells of the next look; none while runs of this one are to end."""
        if len(self._errors) < len(self._plan.cells):
            return ()
        standing = self._standing()
        cells = tuple(
            _cell(self._plan.net(variant), seed) for variant, seed in standing.missing
        )
        if cells:
            self._plan = replace(self._plan, cells=(*self._plan.cells, *cells))
            records.write_plan(self._plan, self._folder)
        self._num_to_come = self._most_to_come(standing)
        return cells

    def wait_after(self, cell: Cell) -> tuple[int, ...]:
        """No run is stopped here."""
        return ()

    def stop_reason(self, cell: Cell, epochs: Sequence[EpochRecord]) -> str:
        """No run is stopped here."""
        return ""

    def settle(self, run: RunRecord) -> None:
        """Takes note of a finished run."""
        self._errors[run.cell] = _error(run)

    def _standing(self) -> looks.Standing:
        ended: dict[str, dict[int, float]] = {
            net.variant: {} for net in self._plan.nets
        }
        for cell in self._plan.cells:
            if cell.id in self._errors:
                ended[cell.variant][cell.seed] = self._errors[cell.id]
        return looks.replay(
            ended,
            reference=self._plan.nets[0].variant,
            rules=self._rules,
            max_seeds=self._max_seeds,
        )

    def _most_to_come(self, standing: looks.Standing) -> int:
        still = {variant for variant, _ in standing.missing}
        planned = sum(cell.variant in still for cell in self._plan.cells)
        return max(0, len(still) * self._max_seeds - planned)


def _error(run: RunRecord) -> float:
    """Test error in percent; NaN where the run ended without one."""
    return math.nan if run.test_error_pct is None else run.test_error_pct


def _cell(net: NetRecord, seed: int) -> Cell:
    spec = spec_from_dict(net.spec)
    return Cell(records.cell_id(spec, seed), net.variant, seed)
