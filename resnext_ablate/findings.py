"""What the runs say beyond the verdicts: sentences with the tables they rest on."""

from __future__ import annotations

import pandas as pd

from resnext_ablate.page import Column, Finding, Table

_PAIR_COLUMNS = (
    Column("variant", "variant", "text"),
    Column("reference", "against", "text"),
    Column("verdict", "verdict", "verdict"),
    Column("difference_pct", "difference", signed=True),
    Column("ci_low", "from", signed=True),
    Column("ci_high", "to", signed=True),
    Column("p_corrected", "p corrected", "p_value"),
    Column("detectable_pct", "detectable"),
    Column("explanation", "explanation", "text"),
)


def of_pairs(pairs: pd.DataFrame) -> tuple[Finding, ...]:
    """The comparisons of variants with each other; none where there are none."""
    if pairs.empty:
        return ()
    differ = int(pairs["verdict"].isin(["better", "worse"]).sum())
    text = (
        f"{differ} of the {len(pairs)} pairs of variants without the reference differ. "
        "All pairs, those with the reference too, are corrected as one family."
    )
    table = Table("pairs", "Each with each", "", pairs, _PAIR_COLUMNS)
    return (Finding(text, table),)
