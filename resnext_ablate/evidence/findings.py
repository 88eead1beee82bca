"""What the runs say beyond the verdicts: sentences with the tables they rest on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pandas as pd

from resnext_ablate.evidence import effects, ranks
from resnext_ablate.evidence.charts_ranking import errors_after
from resnext_ablate.evidence.page import Column, Finding, Table

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
_EFFECT_COLUMNS = (
    Column("effect", "effect", "text"),
    Column("estimate", "estimate", signed=True),
    Column("ci_low", "from", signed=True),
    Column("ci_high", "to", signed=True),
    Column("p_value", "p", "p_value"),
    Column("ceiling", "noise ceiling"),
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


@dataclass(frozen=True)
class _Effect:
    """A row of the table of effects; NaN where a number has no meaning."""

    effect: str
    estimate: float
    ci_low: float
    ci_high: float
    p_value: float
    """That a straight line shows as large a bend; NaN for other effects."""
    ceiling: float
    """For ranks: the tau that seed noise would leave if the true orders were equal."""
    n: int
    """Runs, for ranks variants."""
    statement: str


def effects_table(
    errors: Mapping[str, Mapping[int, float]],
    *,
    variants: pd.DataFrame,
    epochs: pd.DataFrame,
    paper: pd.DataFrame,
    is_matched: bool,
) -> pd.DataFrame:
    """What cardinality does, and how far rankings agree; one row for each effect.

    Args:
        errors: test errors of complete runs by variant and seed.
        variants: `variant` and `cardinality`.
        epochs: of complete runs.
        paper: rows of the paper that belong to variants; may be empty.
        is_matched: whether the variants differ in nothing but cardinality and width,
            at equal FLOPs.
    """
    rows: list[_Effect] = []
    if is_matched:
        cardinality = dict(
            zip(variants["variant"], variants["cardinality"], strict=True)
        )
        if found := effects.by_cardinality(errors, cardinality=cardinality):
            rows += _cardinality_rows(found)
    measured = {label: list(values.values()) for label, values in errors.items()}
    if found_ranks := _budget_ranks(epochs):
        rows.append(found_ranks)
    order = {
        label: [value]
        for label, value in zip(
            paper["variant"], paper["paper_difference"], strict=True
        )
    }
    if found_order := ranks.agreement(measured, order):
        rows.append(_rank_row("the paper's order", found_order))
    columns = [field.name for field in dataclasses.fields(_Effect)]
    return pd.DataFrame([dataclasses.asdict(row) for row in rows], columns=columns)


def _cardinality_rows(found: effects.CardinalityEffect) -> Iterator[_Effect]:
    nan = float("nan")
    bend = found.bend

    def row(name: str, slope: effects.Slope, p_value: float, text: str) -> _Effect:
        return _Effect(
            effect=f"points per doubling of cardinality{name}",
            estimate=slope.points,
            ci_low=slope.low,
            ci_high=slope.high,
            p_value=p_value,
            ceiling=nan,
            n=found.num_runs,
            statement=text,
        )

    yield row("", found.slope, nan, effects.effect_sentence(found))
    if bend and bend.is_shown:
        yield row(f", up to {bend.cardinality}", bend.before, bend.p_value, "")
        yield row(f", beyond {bend.cardinality}", bend.after, bend.p_value, "")


def _budget_ranks(epochs: pd.DataFrame) -> _Effect | None:
    """The order after a quarter of the epochs against that after all."""
    last = int(epochs["epoch"].max()) if len(epochs) else 0
    # A large study's page keeps some epochs only.
    earlier = epochs.loc[epochs["epoch"] <= last / 4, "epoch"]
    if earlier.empty:
        return None
    short = int(earlier.max())
    found = ranks.agreement(errors_after(epochs, short), errors_after(epochs, last))
    name = f"the order after {short} of {last} epochs"
    return _rank_row(name, found) if found else None


def _rank_row(name: str, found: ranks.Agreement) -> _Effect:
    return _Effect(
        effect=f"rank correlation with {name}",
        estimate=found.tau,
        ci_low=found.low,
        ci_high=found.high,
        p_value=float("nan"),
        ceiling=found.ceiling,
        n=found.num_variants,
        statement=ranks.sentence(found, name=f"with {name}"),
    )


def of_effects(table: pd.DataFrame) -> tuple[Finding, ...]:
    """What `effects_table` holds, in words."""
    if table.empty:
        return ()
    text = " ".join(text for text in table["statement"] if text)
    shown = Table("effects", "Effect of cardinality, ranks", "", table, _EFFECT_COLUMNS)
    return (Finding(text, shown),)
