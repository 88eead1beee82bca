"""Attempts at runs that ended without a result: a file for each, and why it ended.

The runs themselves are told apart from how often they were tried: a study that was
killed all along has the same run files as an unbroken one, and more files here.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from resnext_ablate.records.records import SCHEMA_VERSION, write_atomically

ATTEMPTS_FOLDER = "attempts"

Cause = Literal[
    "killed",  # its executor died
    "terminated",  # its executor was asked to end by a signal
    "hung",  # its executor gave no sign of life
    "out_of_memory",
    "crowded",  # memory ran out for several seeds as one net
    "interrupted",  # the study was asked to stop
    "scheduler_died",
]
_ENDED_STUDY: tuple[Cause, ...] = ("interrupted", "scheduler_died")
NOT_COUNTED: tuple[Cause, ...] = (*_ENDED_STUDY, "crowded")
"""Causes that end a study, not a run: a person goes on with it or does not. And one
that says nothing of the run alone."""


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """An attempt at a run that ended without a result."""

    cell: str
    variant: str
    seed: int
    number: int
    """From 1, over all attempts at the cell."""
    cause: Cause
    reason: str
    epoch: int
    """Epochs that were over."""
    ended_at: str
    """UTC, ISO 8601."""
    gave_up: bool = False
    """Whether the run was recorded as failed after it."""


def attempt_path(folder: Path, attempt: AttemptRecord) -> Path:
    return folder / ATTEMPTS_FOLDER / f"{attempt.cell}-{attempt.number:04}.json"


def write_attempt(attempt: AttemptRecord, folder: Path) -> None:
    values = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(attempt)}
    write_atomically(attempt_path(folder, attempt), json.dumps(values))


def read_attempts(folder: Path) -> tuple[AttemptRecord, ...]:
    """The attempts of a study's folder, by cell and number; damaged files are none."""
    found = []
    for path in sorted((folder / ATTEMPTS_FOLDER).glob("[0-9a-f]*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("schema_version") == SCHEMA_VERSION:
                found.append(AttemptRecord(**values))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return tuple(found)


class Tally:
    """How often each cell was tried, and why in vain."""

    def __init__(self, attempts: Iterable[AttemptRecord]) -> None:
        self._last: dict[str, int] = {}
        self._causes: defaultdict[str, Counter[Cause]] = defaultdict(Counter)
        for attempt in attempts:
            self.add(attempt)

    def add(self, attempt: AttemptRecord) -> None:
        """Counts an attempt that ended without a result."""
        self._last[attempt.cell] = max(attempt.number, self._last.get(attempt.cell, 0))
        if attempt.gave_up:
            # Who asks for another try after that gets all of them again.
            self._causes[attempt.cell].clear()
        else:
            self._causes[attempt.cell][attempt.cause] += 1

    def next_number(self, cell: str) -> int:
        return self._last.get(cell, 0) + 1

    def has_faults(self, cell: str) -> bool:
        """Whether an attempt ended for a cause that is not the study's end."""
        return any(
            count and cause not in _ENDED_STUDY
            for cause, count in self._causes[cell].items()
        )

    def count(self, cell: str, *, cause: Cause) -> int:
        """Attempts that ended so since the run was last given up."""
        return self._causes[cell][cause]


def lost_by_cell(attempts: Iterable[AttemptRecord]) -> dict[str, str]:
    """For each cell tried in vain the causes, as `killed x2, hung`."""
    causes: defaultdict[str, Counter[Cause]] = defaultdict(Counter)
    for attempt in attempts:
        causes[attempt.cell][attempt.cause] += 1
    return {
        cell: ", ".join(
            cause if count == 1 else f"{cause} x{count}"
            for cause, count in counts.items()
        )
        for cell, counts in causes.items()
    }
