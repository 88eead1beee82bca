"""The paper's effects against ours: table -> data."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class EffectsData:
    """Effects of claims, in points of error."""

    title: str
    note: str
    rows: pd.DataFrame
    """claim, label, paper, ours, low, high, n, verdict; in the order of the table."""


def effects_data(table: pd.DataFrame) -> EffectsData:
    """The findings that are differences of errors and have results.

    Args:
        table: as `claims_report.claims_table` makes it.
    """
    points = table[table["unit"] == "points"]
    rows = points.rename(columns={"num_runs": "n"})[
        ["claim", "label", "paper", "ours", "low", "high", "n", "verdict"]
    ].reset_index(drop=True)
    same = int((rows["paper"] * rows["ours"] > 0).sum())
    shown = int((rows["verdict"] == "consistent").sum())
    return EffectsData(
        title=f"{same} of {len(rows)} differences have the paper's sign; "
        f"{shown} are shown to",
        note="Filled: ours, with the interval that holds for the whole claim at 95 %. "
        "Hollow: the paper's, on other images and with larger nets, so that signs "
        "compare and sizes do not.",
        rows=rows,
    )
