"""How much of the error each axis of a finished search explains, kept in its folder."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.records.records import write_atomically

IMPORTANCE_FILE = "importance.json"


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Shares of the variance of the validation error, by axis."""

    evaluator: str
    """Such as "fANOVA"."""
    seed: int
    """Of the evaluator."""
    num_nets: int
    """Trained to the end."""
    shares: dict[str, float]
    """By the names that the sampler knows; together 1."""


def write_importance(found: Importance, folder: Path) -> None:
    """Keeps what a search's evaluator said."""
    text = json.dumps(dataclasses.asdict(found), indent=1)
    write_atomically(folder / IMPORTANCE_FILE, text)


def read_importance(folder: Path) -> Importance | None:
    """What was kept; None where nothing was.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / IMPORTANCE_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = Importance(**values)
        shares = {str(key): float(value) for key, value in found.shares.items()}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged: {error}.") from None
    return dataclasses.replace(found, shares=shares)
