"""Which cells an executor takes on at once, and its attempts at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from resnext_ablate.records.attempts import Tally
from resnext_ablate.records.records import Cell, EpochRecord, Plan, RunRecord


@dataclass
class Attempt:
    """A cell in the hands of an executor, perhaps beside other seeds of its variant."""

    cell: Cell
    executor: int
    number: int
    trial: int
    since: float
    """When it began, or its last epoch ended."""
    num_micro_batches: int
    num_fused: int = 1
    """Cells that the executor trains as one net, this one among them."""
    epoch: int = 0
    val_error_pct: float | None = None


class Grower(Protocol):
    """What makes a plan grow while it is carried out: a search, or adaptive seeds."""

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
        """Takes note of a finished run; what the storage cannot take now, later."""


def taken_on(
    todo: Sequence[Cell], *, tally: Tally, seeds: Sequence[int], fuse_seeds: int
) -> tuple[Cell, ...]:
    """The next cell, with the others that are trained as one net with it.

    Those are always the same: each `fuse_seeds` seeds of a study, in their order. A
    cell that a fault has hit is tried again alone.

    Args:
        todo: what is to be done, the next one first; not empty.
        tally: earlier attempts.
        seeds: of the study.
        fuse_seeds: how many seeds of a variant are one net.
    """
    cell = todo[0]
    if fuse_seeds == 1 or cell.seed not in seeds or tally.has_faults(cell.id):
        return (cell,)
    first = seeds.index(cell.seed) // fuse_seeds * fuse_seeds
    fused = seeds[first : first + fuse_seeds]
    beside = [
        one
        for one in todo
        if one.variant == cell.variant
        and one.seed in fused
        and not tally.has_faults(one.id)
    ]
    return tuple(sorted(beside, key=lambda one: fused.index(one.seed)))
