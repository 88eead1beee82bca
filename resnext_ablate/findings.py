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
_IMAGE_COLUMNS = (
    Column("variant", "variant", "text"),
    Column("reference", "against", "text"),
    Column("seed", "seed", digits=0),
    Column("only_variant_right", "only the variant right", digits=0),
    Column("only_reference_right", "only the other right", digits=0),
    Column("p_value", "McNemar's exact p", "p_value"),
)
MAX_IMAGE_ROWS = 2_000
"""More rows than this stay in the files beside the report."""


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


def of_images(images: pd.DataFrame, comparisons: pd.DataFrame) -> tuple[Finding, ...]:
    """What holds for other test images; nothing where no run kept its images.

    Args:
        images: one row per comparison and seed.
        comparisons: each variant against the reference.
    """
    tested = comparisons[comparisons["p_images"].notna()]
    if images.empty or tested.empty:
        return ()
    nets = int((tested["p_images"] < 0.05).sum())
    text = (
        f"{_other_images(tested)} The nets as trained differ over images like these in "
        f"{nets} of {len(tested)} comparisons (exact sign test over images, "
        "Holm-corrected); that says nothing of other seeds."
    )
    rows = images.head(MAX_IMAGE_ROWS)
    return (Finding(text, Table("images", "Test images", "", rows, _IMAGE_COLUMNS)),)


def _other_images(tested: pd.DataFrame) -> str:
    shown = tested[tested["verdict"].isin(["better", "worse"])]
    if shown.empty:
        return "No difference is shown for other seeds, so none holds for other images."
    zero_outside = (shown["ci_low_images"] > 0) | (shown["ci_high_images"] < 0)
    differences = "difference" if len(shown) == 1 else "differences"
    return (
        f"The verdicts hold for other seeds on these test images. Of the {len(shown)} "
        f"{differences} shown, {int(zero_outside.sum())} would also hold for other "
        "seeds and other images at once (95 % interval over both)."
    )
