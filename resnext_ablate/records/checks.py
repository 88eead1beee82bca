"""Studies that train nothing: a statement of the paper that can be computed.

A study file with `kind = "check"` names what is checked: the counts of its tables, each
against the paper's print and against what was measured of built nets, or the forms of
its block, which are to be one function. The answer is one table, a row for each number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pandas as pd
import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from resnext_ablate.architecture.complexity import (
    Complexity,
    complexity,
    layers_complexity,
    stage_table,
)
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.spec import InputError
from resnext_ablate.records import complaints, paper, records, study_file, tables

CHECKS = "checks"
"""Stem of the table's files in a study's folder."""
DIFFERENCE = "difference of outputs"
"""The count that is none: the largest one, as a share of the largest output."""
WITHIN_PCT = 1.0
"""A count agrees with print within this, or where it rounds to what is printed."""

_List = Field(strict=False)  # TOML has arrays, the config has tuples.


class CheckPart(BaseModel):
    """What is checked: one of the two."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    counts: Annotated[tuple[Literal["table1", "table2"], ...], _List] = ()
    """Tables of the paper whose counts of macs, params and channels are computed."""
    forms: Annotated[tuple[str, ...], _List] = ()
    """Nets that are built in the three forms of Fig. 3 and compared."""

    @field_validator("forms")
    @classmethod
    def _forms_are_nets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            parse_spec(name)
        return value

    @model_validator(mode="after")
    def _one_is_given(self) -> Self:
        if bool(self.counts) == bool(self.forms):
            raise ValueError("needs either counts = [...] or forms = [...]")
        return self


class CheckConfig(BaseModel):
    """A study file that trains nothing, parsed and checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    question: str
    kind: Literal["check"]
    check: CheckPart


@dataclass(frozen=True)
class Check:
    """One number held to what is expected of it."""

    name: str
    """Of the net."""
    part: str
    """Of it: whole, block, stem, a stage, head, or one of the block's forms."""
    count: str
    ours: float
    expected: float
    """Of a count, what was measured of the built net; of a difference, its bound."""
    printed: float
    """What the paper prints; NaN where it prints nothing."""
    printed_off_pct: float
    """Ours against print."""
    holds: bool


def load_check(
    path: Path, *, overrides: Sequence[str] = (), profile: str | None = None
) -> CheckConfig | None:
    """Reads a study file that trains nothing; None where it is of another kind.

    Raises:
        InputError: as `load_study` does.
    """
    found = study_file.read(path, profile=profile, overrides=overrides)
    if found.values.get("kind") != "check":
        return None
    try:
        return CheckConfig.model_validate(found.values)
    except ValidationError as error:
        told = complaints.describe(error, model=CheckConfig)
        raise InputError(
            "\n".join(f"{found.place_of(key)}: {told[key]}" for key in told)
        ) from None


def count_checks(names: Sequence[str]) -> tuple[Check, ...]:
    """Every count of the paper's tables, computed from shapes.

    Args:
        names: of tables, as `CheckPart.counts` has them.
    """
    counts = paper.load_counts()
    rows = counts[counts["table"].isin(names)].itertuples(index=False)
    return tuple(_count_check(row) for row in rows)


def _count_check(row: Any) -> Check:
    ours = _count(row.name, image_size=row.image_size, part=row.part, count=row.count)
    off_pct = 100 * (ours / row.printed - 1)
    step = row.printed_step
    rounds = not math.isnan(step) and round(ours / step) * step == row.printed
    agrees = math.isnan(off_pct) or abs(off_pct) <= WITHIN_PCT or rounds
    return Check(
        name=row.name,
        part=row.part,
        count=row.count,
        ours=ours,
        expected=row.measured,
        printed=row.printed,
        printed_off_pct=off_pct,
        holds=ours == row.measured and agrees,
    )


def _count(name: str, *, image_size: int, part: str, count: str) -> int:
    """Of a net or a part of it; the block is the last one of the first stage."""
    spec = parse_spec(name)
    if part == "whole":
        return _number(complexity(spec, image_size), count)
    if part != "block":
        stages = {row.stage: row for row in stage_table(spec, image_size)}
        return _number(stages[part].complexity, count)
    blocks = [one for one in spec.layout(image_size).blocks if one.stage == 1]
    if count == "inner_channels":
        return spec.cardinalities[0] * spec.bottleneck_widths[0]
    return _number(layers_complexity(blocks[-1].layers), count)


def _number(of: Complexity, count: str) -> int:
    return int(getattr(of, count))


def write_checks(config: CheckConfig, found: Sequence[Check], *, results: Path) -> Path:
    """Writes the table and the study file into the study's folder.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = results / config.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"results folder {folder}: cannot be written ({error.strerror}); choose "
            "another with --results."
        ) from None
    text = tomli_w.dumps(config.model_dump(mode="json"))
    records.write_atomically(folder / records.STUDY_FILE, text)
    provenance = {"study": config.name, **records.environment()}
    tables.write_table(pd.DataFrame(found), folder / CHECKS, provenance=provenance)
    return folder


def read_checks(folder: Path) -> tuple[Check, ...]:
    """The table of a study's folder; empty where it holds none."""
    path = folder / f"{CHECKS}.csv"
    if not path.exists():
        return ()
    rows = pd.read_csv(path).to_dict(orient="records")
    return tuple(Check(**row) for row in rows)


def summary(found: Sequence[Check]) -> str:
    """What the table says, in one sentence."""
    differences = [one for one in found if one.count == DIFFERENCE]
    counts = [one for one in found if one.count != DIFFERENCE]
    exact = sum(one.ours == one.expected for one in counts)
    text = f"{exact} of {len(counts)} counts are exact"
    if differences:
        largest = max(one.ours for one in differences)
        return f"{text}; outputs differ by at most {largest:.1g} of the largest"
    printed = [one for one in counts if not math.isnan(one.printed)]
    near = sum(abs(one.printed_off_pct) <= WITHIN_PCT for one in printed)
    worst = max(printed, key=lambda one: abs(one.printed_off_pct))
    return (
        f"{text}; {near} of {len(printed)} printed ones lie within {WITHIN_PCT:g} % of "
        f"print, {sum(one.holds for one in printed) - near} more round to it (at most "
        f"{worst.printed_off_pct:+.1f} %: {worst.part} of {worst.name})"
    )
