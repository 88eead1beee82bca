"""The run files of a study as its scheduler keeps them: tidied, told apart, watched."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
from pathlib import Path

from resnext_ablate.records.records import (
    CHECKPOINTS_FOLDER,
    RUNS_FOLDER,
    EpochRecord,
    Plan,
    RunRecord,
    RunState,
    read_versioned,
    remove_checkpoints,
    run_path,
)

_WATCH_EVERY_S = 1.0
_HALF_WRITTEN = re.compile(r"\..+\.[a-z0-9_]{8}")
"""Names that `tempfile` makes of those of our files."""


def _field_names(kind: type[RunRecord | EpochRecord]) -> tuple[set[str], set[str]]:
    """Those that a record must have, and all that it may have."""
    fields = dataclasses.fields(kind)
    needed = {one.name for one in fields if one.default is dataclasses.MISSING}
    return needed, {one.name for one in fields}


_NEEDED, _KNOWN = _field_names(RunRecord)
_NEEDED_OF_EPOCH, _KNOWN_OF_EPOCH = _field_names(EpochRecord)


def tidy(folder: Path, plan: Plan) -> dict[str, RunState]:
    """Clears what killed processes left in a study's folder. None may be alive.

    Halves of files go, and checkpoints of finished runs; a run file that cannot be read
    is renamed, so that its cell can run again.

    Returns:
        How the finished runs ended, by their cells.
    """
    for path in folder.rglob(".*"):
        if _HALF_WRITTEN.fullmatch(path.name):
            path.unlink()
    kept = {path.name for path in (folder / CHECKPOINTS_FOLDER).glob("*")}
    states = states_of(folder, plan)
    for cell in plan.cells:
        if cell.id not in states:
            set_damaged_aside(folder, cell.id)
        elif cell.id in kept:
            remove_checkpoints(folder, cell.id)
    return states


def states_of(folder: Path, plan: Plan) -> dict[str, RunState]:
    """How the finished runs of a plan ended, by their cells."""
    names = _cells_with_files(folder / RUNS_FOLDER)
    states = {
        cell.id: read_state(folder, cell.id) for cell in plan.cells if cell.id in names
    }
    return {cell: state for cell, state in states.items() if state is not None}


def read_state(folder: Path, cell: str) -> RunState | None:
    """How a run ended; None where it has no whole file.

    Several times faster than `records.read_run`, which reads such files without fault.
    """
    try:
        values = read_versioned(run_path(folder, cell))
        epochs = values["epochs"]
        is_whole = _NEEDED <= values.keys() <= _KNOWN and all(
            _NEEDED_OF_EPOCH <= epoch.keys() <= _KNOWN_OF_EPOCH for epoch in epochs
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return values["state"] if is_whole else None


def set_damaged_aside(folder: Path, cell: str) -> None:
    """Renames a run file that cannot be read, so that a new one can come."""
    path = run_path(folder, cell)
    with contextlib.suppress(FileNotFoundError):
        path.replace(path.with_name(f"{path.name}.damaged"))


class Watch:
    """Tells which cells have a run file whenever that may have changed.

    It costs one `stat` of the folder each second, and a listing after changes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / RUNS_FOLDER
        self._due = 0.0
        self._changed_at = 0
        self._is_sure = False

    def changed_cells(self) -> frozenset[str] | None:
        """The cells that have a file; None where none came or went since asked last."""
        if time.monotonic() < self._due:
            return None
        self._due = time.monotonic() + _WATCH_EVERY_S
        changed_at = self._folder.stat().st_mtime_ns
        is_new = changed_at != self._changed_at
        if not is_new and self._is_sure:
            return None
        # A change just after a listing may bear the same time: one more is made.
        self._is_sure = not is_new
        self._changed_at = changed_at
        return _cells_with_files(self._folder)


def _cells_with_files(runs_folder: Path) -> frozenset[str]:
    with os.scandir(runs_folder) as entries:
        return frozenset(
            entry.name.removesuffix(".json")
            for entry in entries
            if entry.name.endswith(".json") and not entry.name.startswith(".")
        )
