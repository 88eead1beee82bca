"""Variants by epoch, beside the reference and beside the paper: frame -> data."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

MAX_CURVES = 6
MAX_DIFFERENCES = 30
MAX_SEED_CURVES = 10
"""With more seeds than this a band alone shows them."""


@dataclass(frozen=True)
class CurvesData:
    """Errors by epoch: mean over seeds, and their range."""

    title: str
    note: str
    curves: pd.DataFrame
    """variant, epoch, train, val, val_low, val_high, n."""
    seeds: pd.DataFrame
    """variant, seed, epoch, val; empty where there are too many to draw."""
    order: tuple[str, ...]
    """All variants of the study, which fixes the colours."""


@dataclass(frozen=True)
class DifferencesData:
    """Differences from the reference with simultaneous intervals."""

    title: str
    note: str
    rows: pd.DataFrame
    """variant, difference, low, high, verdict, n; in plan order."""
    seeds: pd.DataFrame
    """variant, seed, difference: single runs minus the reference's mean."""
    margin: float
    order: tuple[str, ...]


@dataclass(frozen=True)
class PaperData:
    """The paper's differences beside ours."""

    title: str
    note: str
    rows: pd.DataFrame
    """variant, cardinality, paper, ours, low, high."""
    seeds: pd.DataFrame
    """variant, seed, difference: single runs minus the reference's mean."""
    paper: str
    order: tuple[str, ...]


def curves_data(epochs: pd.DataFrame, variants: pd.DataFrame) -> CurvesData:
    """Mean error by epoch over the seeds of each variant, with the seeds' range."""
    shown = variants.dropna(subset=["test_error_pct_mean"])
    if len(shown) > MAX_CURVES:
        best = shown.sort_values("test_error_pct_mean").head(MAX_CURVES - 1)
        keep = set(best["variant"]) | set(shown[shown["is_reference"]]["variant"])
        shown = shown[shown["variant"].isin(keep)]
    drawn = epochs[epochs["variant"].isin(shown["variant"])]
    curves = (
        drawn.groupby(["variant", "epoch"], observed=True)
        .agg(
            train=("train_error_pct", "mean"),
            val=("val_error_pct", "mean"),
            val_low=("val_error_pct", "min"),
            val_high=("val_error_pct", "max"),
            n=("seed", "nunique"),
        )
        .reset_index()
    )
    note = (
        "Solid: validation, mean over seeds; thin lines are single seeds, the band is "
        "their range. Dashed: training, on augmented batches as they pass."
    )
    if len(shown) < len(variants):
        note += (
            f" {len(shown)} of {len(variants)} variants: the reference and those of "
            "lowest error."
        )
    title = "Training curves"
    if len(curves):
        last = curves[curves["epoch"] == curves["epoch"].max()]
        low, high = last.loc[last["val"].idxmin()], last.loc[last["val"].idxmax()]
        title = (
            f"After {low['epoch']} epochs the mean validation error is "
            f"{low['val']:.1f} % ({low['variant']})"
        )
        if len(last) > 1:
            title += f" to {high['val']:.1f} % ({high['variant']})"
    seeds = drawn[["variant", "seed", "epoch", "val_error_pct"]]
    seeds = seeds.set_axis(["variant", "seed", "epoch", "val"], axis=1)
    if drawn.groupby("variant")["seed"].nunique().max() > MAX_SEED_CURVES:
        seeds = seeds.iloc[:0]
    return CurvesData(title, note, curves, seeds, tuple(variants["variant"]))


def differences_data(
    comparisons: pd.DataFrame, variants: pd.DataFrame, runs: pd.DataFrame
) -> DifferencesData:
    """Each variant's difference from the reference."""
    rows = pd.DataFrame(
        {
            "variant": comparisons["variant"],
            "difference": comparisons["difference_pct"],
            "low": comparisons["ci_low"],
            "high": comparisons["ci_high"],
            "verdict": comparisons["verdict"],
            "n": comparisons["n_variant"],
        }
    ).dropna(subset=["difference"])
    reference = str(comparisons["reference"].iloc[0])
    counts = rows["verdict"].str.split().str[0].value_counts()
    words = [
        f"{counts[word]} {word}"
        for word in ("better", "worse", "equivalent", "undecided")
        if word in counts
    ]
    title = f"Against {reference}: {', '.join(words) or 'nothing to compare yet'}"
    note = (
        "Difference in test error, variant minus reference, with the interval that "
        "holds for all comparisons together at 95 %. Small dots: single runs minus the "
        "reference's mean. Shaded: differences that count as none."
    )
    if len(rows) > MAX_DIFFERENCES:
        note += f" Drawn: the {MAX_DIFFERENCES} lowest of {len(rows):,}."
        lowest = rows.sort_values("difference").head(MAX_DIFFERENCES).index
        rows = rows.loc[sorted(lowest)]
    rows = rows.reset_index(drop=True)
    return DifferencesData(
        title=title,
        note=note,
        rows=rows,
        seeds=_seed_differences(runs, variants, shown=rows["variant"]),
        margin=float(comparisons["margin_pct"].iloc[0]),
        order=tuple(variants["variant"]),
    )


def _seed_differences(
    runs: pd.DataFrame, variants: pd.DataFrame, *, shown: pd.Series
) -> pd.DataFrame:
    """Single runs of the variants shown, minus the reference's mean."""
    base = variants.loc[variants["is_reference"], "test_error_pct_mean"].iloc[0]
    own = runs[runs["variant"].isin(shown)]
    return pd.DataFrame(
        {
            "variant": own["variant"],
            "seed": own["seed"],
            "difference": own["test_error_pct"] - base,
        }
    ).reset_index(drop=True)


def paper_data(
    variants: pd.DataFrame,
    comparisons: pd.DataFrame,
    *,
    runs: pd.DataFrame,
    paper: pd.DataFrame,
) -> PaperData:
    """The paper's differences from its reference beside ours, variant by variant."""
    ours = comparisons[["variant", "difference_pct", "ci_low", "ci_high"]]
    rows = paper[["variant", "cardinality", "paper_difference"]].merge(
        ours, on="variant"
    )
    rows = rows.dropna(subset=["difference_pct"])
    rows = rows.set_axis(
        ["variant", "cardinality", "paper", "ours", "low", "high"], axis=1
    )
    name = str(paper["model"].iloc[0])
    if len(rows) == 0:
        title = "No variant of the paper is complete yet"
    else:
        inside = int(
            ((rows["low"] <= rows["paper"]) & (rows["paper"] <= rows["high"])).sum()
        )
        title = (
            f"The paper's difference lies inside our interval for {inside} of "
            f"{len(rows)} variants"
        )
    note = (
        f"{name} of {paper['source'].iloc[0]}: another data set and longer training, "
        "so only differences from each one's own reference are set side by side. A "
        "level line is full agreement. Small dots: single runs minus the reference's "
        "mean."
    )
    return PaperData(
        title=title,
        note=note,
        rows=rows.reset_index(drop=True),
        seeds=_seed_differences(runs, variants, shown=rows["variant"]),
        paper=name,
        order=tuple(variants["variant"]),
    )
