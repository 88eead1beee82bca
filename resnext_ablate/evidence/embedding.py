"""A study's tables inside its page: in as JSON, out again exact, with a checksum.

Runs and nets are embedded to the last digit, so that every number of a report follows
from its own page. Epochs, which no verdict rests on, are kept to five digits, and in a
large study not all of them; the page is drawn from what is kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from typing import Any

import numpy as np
import pandas as pd
from pydantic import ValidationError

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.evidence import page
from resnext_ablate.records.config import StudyConfig
from resnext_ablate.records.records import pack_bits, unpack_bits
from resnext_ablate.records.tables import SearchTables, StudyTables

MAX_WHOLE_EPOCHS = 12_000
"""With more epochs than this a page keeps their errors only."""
MAX_BITS = 2_400_000
"""With more answers to test images than this a page says nothing of them."""
MAX_EPOCHS = 30_000
"""With more than this it keeps as many of each run."""
_EPOCH_DIGITS = 5
_FRAMES = ("nets", "runs", "epochs", "attempts")
_TRIALS, _IMPORTANCE = "trials", "importance"  # Of a search alone.
_FORMAT = 1
_DATA = ("format", "frames", "study_file", "provenance", "num_planned", "correct")
_CURVES = ("study", "variant", "seed", "epoch", "train_error_pct", "val_error_pct")


def reduced(tables: StudyTables) -> StudyTables:
    """The tables as a page holds them; what they are reduced to stays as it is."""
    epochs = _thinned(tables.epochs)
    floats = epochs.select_dtypes("float").columns
    rounded = {key: _rounded(epochs[key].to_numpy(dtype=float)) for key in floats}
    return dataclasses.replace(
        tables,
        nets=tables.nets.reset_index(drop=True),
        runs=tables.runs.reset_index(drop=True),
        epochs=epochs.assign(**rounded).reset_index(drop=True),
        correct=tables.correct if _num_bits(tables) <= MAX_BITS else {},
    )


def _num_bits(tables: StudyTables) -> int:
    return sum(len(one) for runs in tables.correct.values() for one in runs.values())


def epochs_note(kept: StudyTables) -> str:
    """Says which epochs a page holds, where not all."""
    count = int(kept.runs["epochs"].sum())
    if len(kept.epochs) == count <= MAX_WHOLE_EPOCHS:
        return ""
    what = f"{len(kept.epochs):,} of {count:,} epochs, evenly chosen"
    if len(kept.epochs) == count:
        what = f"Errors of all {count:,} epochs"
    return f"{what}, are in this file; the files beside it hold all there is of them."


def to_value(tables: StudyTables) -> dict[str, Any]:
    """The tables as plain values for JSON."""
    frames = {name: getattr(tables, name) for name in _FRAMES}
    if tables.search is not None:
        frames[_TRIALS] = tables.search.trials
        frames[_IMPORTANCE] = tables.search.importance
    return {
        "format": _FORMAT,
        "frames": {name: _frame_value(frame) for name, frame in frames.items()},
        "study_file": tables.config.to_toml(),
        "provenance": tables.provenance,
        "num_planned": tables.num_planned,
        "correct": {
            variant: {
                str(seed): {"num_images": len(one), "bits": pack_bits(one)}
                for seed, one in runs.items()
            }
            for variant, runs in tables.correct.items()
        },
    }


def from_value(value: dict[str, Any]) -> StudyTables:
    """The tables that `to_value` has put into a page.

    Raises:
        InputError: the values are damaged, or of another format.
    """
    try:
        if value["format"] != _FORMAT:
            raise InputError(
                f"the page's data have format {value['format']}, not {_FORMAT}; verify "
                "it with the version that made it."
            )
        config = StudyConfig.model_validate(tomllib.loads(value["study_file"]))
        frames = {name: _frame(value["frames"][name]) for name in _FRAMES}
        return StudyTables(
            study=config.name,
            config=config,
            provenance=value["provenance"],
            num_planned=value["num_planned"],
            correct={
                variant: {
                    int(seed): unpack_bits(one["bits"], num_images=one["num_images"])
                    for seed, one in runs.items()
                }
                for variant, runs in value["correct"].items()
            },
            search=_search(value["frames"]),
            **frames,
        )
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        first_line = str(error).splitlines()[0]
        raise InputError(f"the page's data are damaged: {first_line}.") from None


def checksum(value: dict[str, Any]) -> str:
    """SHA-256 of embedded tables, whatever else the page carries beside them."""
    text = json.dumps({key: value[key] for key in _DATA}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _search(frames: dict[str, Any]) -> SearchTables | None:
    """A search as far as a page needs it: what became of each net, what mattered."""
    if _TRIALS not in frames:
        return None
    nothing = pd.DataFrame()
    return SearchTables(
        trials=_frame(frames[_TRIALS]),
        runs=nothing,
        epochs=nothing,
        importance=_frame(frames[_IMPORTANCE]),
    )


def _frame_value(frame: pd.DataFrame) -> dict[str, Any]:
    return {
        "values": page.frame_values(frame),
        "dtypes": {key: str(dtype) for key, dtype in frame.dtypes.items()},
    }


def _frame(value: dict[str, Any]) -> pd.DataFrame:
    columns = {
        key: pd.Series(value["values"][key], dtype=dtype)
        for key, dtype in value["dtypes"].items()
    }
    return pd.DataFrame(columns)


def _thinned(epochs: pd.DataFrame) -> pd.DataFrame:
    """The epochs that a page keeps: evenly spaced, the last of each run among them."""
    if len(epochs) <= MAX_WHOLE_EPOCHS:
        return epochs
    epochs = epochs[list(_CURVES)]
    if len(epochs) <= MAX_EPOCHS:
        return epochs
    runs = epochs.groupby(["variant", "seed"], sort=False)["epoch"]
    count = runs.transform("size")
    from_end = count - 1 - runs.cumcount()
    kept = max(2, MAX_EPOCHS // runs.ngroups)
    step = (count - 1).clip(lower=1) / (kept - 1)
    nearest = (np.round(from_end / step) * step).round()
    return epochs[(nearest == from_end) | (count <= kept)]


def _rounded(values: np.ndarray) -> np.ndarray:
    """To five digits."""
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.floor(np.log10(np.abs(values)))
        scale = 10.0 ** (_EPOCH_DIGITS - 1 - size)
        rounded = np.round(values * scale) / scale
    return np.where(np.isfinite(rounded), rounded, values)
