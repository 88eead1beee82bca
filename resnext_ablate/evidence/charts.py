"""Error against what a net is and costs: for each chart a function frame -> data.

Frames are the `variants`, `comparisons`, `runs` and `epochs` tables of a study, with
complete runs only in `runs`. Data functions hold every number and the finding that the
title states; `figures` only draws. `charts_compare`, `charts_cost` and `charts_ranking`
do the same for other questions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd
from scipy import stats

from resnext_ablate.evidence import chart_style as style

MAX_SEEDS_DRAWN = 60
"""With more variants than this only means are drawn."""
MIN_GROWTH = 1.1
"""A way to grow a net is shown where its largest has so many times the parameters."""

Currency = Literal["macs", "params"]
CURRENCIES: dict[Currency, str] = {"macs": "FLOPs", "params": "parameters"}
_AXES = {"macs": style.FLOPS_AXIS, "params": "parameters"}


@dataclass(frozen=True)
class PointsData:
    """Variants as points with interval, their seeds, and what they show."""

    title: str
    note: str
    x_title: str
    y_title: str
    log2_x: bool
    from_zero: bool
    """Whether the axis starts at zero, as ratios need it."""
    points: pd.DataFrame
    """variant, x, mean, low, high, n."""
    seeds: pd.DataFrame
    """variant, seed, x, y; empty where there are too many to draw."""


@dataclass(frozen=True)
class CardinalityData:
    """Error against cardinality; below it differences, the paper's beside ours."""

    main: PointsData
    differences: pd.DataFrame
    """source ("ours" or "paper"), label, x, difference, low, high; maybe empty."""
    paper: str

    @property
    def title(self) -> str:
        return self.main.title

    @property
    def note(self) -> str:
        return self.main.note


@dataclass(frozen=True)
class FamiliesData:
    """Error against parameters, for each way to grow a net."""

    title: str
    note: str
    points: pd.DataFrame
    """family, variant, x, mean, low, high, n; the reference is in every family."""
    seeds: pd.DataFrame
    """family, variant, seed, x, y."""


def cardinality_data(
    variants: pd.DataFrame,
    runs: pd.DataFrame,
    *,
    comparisons: pd.DataFrame,
    paper: pd.DataFrame,
    equal_pct: float,
) -> CardinalityData:
    """Test error against cardinality.

    Args:
        variants, runs, comparisons: the study's tables.
        paper: the paper's rows that match variants (`variant`, `setting`,
            `cardinality`, `paper_difference`, `model`, `source`); may be empty.
        equal_pct: FLOPs that differ by no more than this are held equal.
    """
    title = _trend_title(variants, comparisons, equal_pct=equal_pct)
    main = points_data(variants, runs, x="cardinality", title=title)
    ours = variants[["variant", "cardinality"]].merge(
        comparisons[["variant", "difference_pct", "ci_low", "ci_high"]],
        on="variant",
        how="left",
    )
    is_reference = variants["is_reference"].to_numpy()
    ours.loc[is_reference, "difference_pct"] = 0.0
    ours = ours.set_axis(["label", "x", "difference", "low", "high"], axis=1)
    rows = [ours.assign(source="ours")]
    if len(paper):
        theirs = pd.DataFrame(
            {
                "label": paper["setting"],
                "x": paper["cardinality"],
                "difference": paper["paper_difference"],
                "low": math.nan,
                "high": math.nan,
                "source": "paper",
            }
        )
        rows.append(theirs)
    differences = pd.concat(rows, ignore_index=True) if len(paper) else ours.iloc[:0]
    name = f"paper, {paper['model'].iloc[0]}" if len(paper) else ""
    if len(paper):
        below = (
            " Below: differences from each one's own reference; ours with the interval "
            "that holds for all comparisons together at 95 %."
        )
        main = replace(main, note=main.note + below)
    return CardinalityData(main=main, differences=differences, paper=name)


def complexity_data(
    variants: pd.DataFrame,
    runs: pd.DataFrame,
    *,
    currency: Currency,
    equal_pct: float,
) -> PointsData:
    """Test error against FLOPs or parameters.

    Args:
        variants, runs: the study's tables.
        currency: which of the two.
        equal_pct: differences up to this hold it equal.
    """
    word = CURRENCIES[currency]
    known = variants.dropna(subset=["test_error_pct_mean"])
    off = off_pct(variants, currency)
    means = known["test_error_pct_mean"]
    if len(known) < 2:
        title = f"Test error and {word} of {_only(known)}"
    elif off <= equal_pct:
        title = (
            f"{word[0].upper()}{word[1:]} equal within {off:.1f} %, mean test errors "
            f"{means.max() - means.min():.2f} points apart"
        )
    else:
        tau = stats.kendalltau(known[currency], means).statistic
        trend = "falls" if tau < 0 else "rises"
        title = f"Test error {trend} with {word} (rank correlation {tau:+.2f})"
        if math.isnan(tau) or abs(tau) < 0.5:
            title = f"Test error does not follow {word} (rank correlation {tau:+.2f})"
    return points_data(variants, runs, x=currency, title=title)


def points_data(
    variants: pd.DataFrame,
    runs: pd.DataFrame,
    *,
    x: str,
    title: str,
    y: str = "test_error_pct",
    y_title: str = "test error (%)",
) -> PointsData:
    """Means of `y` against a column `x` of the variants, and every seed."""
    has_interval = f"{y}_ci_low" in variants
    points = pd.DataFrame(
        {
            "variant": variants["variant"],
            "x": variants[x],
            "mean": variants[f"{y}_mean"],
            "low": variants[f"{y}_ci_low"] if has_interval else math.nan,
            "high": variants[f"{y}_ci_high"] if has_interval else math.nan,
            "n": variants["n"],
        }
    )
    notes = ["Each small dot is one seed, each large mark a mean"]
    if has_interval:
        notes[0] += " with its 95 % t-interval"
    seeds = runs.merge(points[["variant", "x"]], on="variant")
    seeds = seeds[["variant", "seed", "x", y]].set_axis(
        ["variant", "seed", "x", "y"], axis=1
    )
    if len(points) > MAX_SEEDS_DRAWN:
        notes = [
            f"Means of {len(points):,} variants; seeds and intervals are in the table"
        ]
        seeds = seeds.iloc[:0]
    single = [v for v, n in zip(points["variant"], points["n"], strict=True) if n == 1]
    if single and len(single) <= style.MAX_LABELLED:
        notes.append(f"one run only, so no interval: {', '.join(single)}")
    log2_x = x == "cardinality"
    x_title = "cardinality (log2 scale)" if log2_x else _AXES[x]
    return PointsData(
        title=title,
        note="; ".join(notes) + ".",
        x_title=x_title,
        y_title=y_title,
        log2_x=log2_x,
        from_zero=y != "test_error_pct",
        points=points,
        seeds=seeds,
    )


FAMILIES = {
    "width": ("cardinality", "depth"),
    "cardinality": ("base_width", "depth"),
    "depth": ("cardinality", "base_width"),
}
"""Ways to grow a net, each with what stays as the reference has it."""


def families_data(variants: pd.DataFrame, runs: pd.DataFrame) -> FamiliesData | None:
    """Test error against parameters where nets grow in more than one way (Fig. 7).

    Returns:
        None where fewer than two families have a net of another size.
    """
    reference = variants[variants["is_reference"]].iloc[0]
    all_points = points_data(variants, runs, x="params", title="")
    parts, seeds, slopes = [], [], {}
    for family, same in FAMILIES.items():
        held = (variants[list(same)] == reference[list(same)]).all(axis=1)
        members = set(variants.loc[held, "variant"])
        known = all_points.points.dropna(subset=["mean"])
        rows = known[known["variant"].isin(members)].sort_values("x")
        if len(rows) < 2 or rows["x"].max() < MIN_GROWTH * rows["x"].min():
            continue
        doublings = rows["x"].map(math.log2)
        slopes[family] = float(stats.linregress(doublings, rows["mean"]).slope)
        parts.append(rows.assign(family=family))
        own = all_points.seeds["variant"].isin(members)
        seeds.append(all_points.seeds[own].assign(family=family))
    if len(parts) < 2:
        return None
    said = ", ".join(f"{family} {slope:+.2f}" for family, slope in slopes.items())
    return FamiliesData(
        title=f"Points of test error per doubling of parameters: {said}",
        note="Each line grows the reference in one way and holds the rest: "
        f"{', '.join(slopes)}. {all_points.note} Slopes: least squares through means.",
        points=pd.concat(parts, ignore_index=True),
        seeds=pd.concat(seeds, ignore_index=True),
    )


def _trend_title(
    variants: pd.DataFrame, comparisons: pd.DataFrame, *, equal_pct: float
) -> str:
    known = variants.dropna(subset=["test_error_pct_mean"])
    if len(known) < 2:
        return f"Test error of {_only(known)}"
    best = known.loc[known["test_error_pct_mean"].idxmin()]
    off = off_pct(variants, "macs")
    held = f" at FLOPs equal within {off:.1f} %" if off <= equal_pct else ""
    reference = known[known["is_reference"]]
    if len(reference) == 0 or bool(best["is_reference"]):
        gap = known["test_error_pct_mean"].max() - best["test_error_pct_mean"]
        return (
            f"Lowest mean test error{held}: {best['variant']}, {gap:.2f} points below "
            "the highest"
        )
    gap = reference["test_error_pct_mean"].iloc[0] - best["test_error_pct_mean"]
    verdict = comparisons.set_index("variant")["verdict"][best["variant"]]
    return (
        f"Lowest mean test error{held}: {best['variant']}, {gap:.2f} points below "
        f"{reference['variant'].iloc[0]} ({verdict})"
    )


def _only(known: pd.DataFrame) -> str:
    return str(known["variant"].iloc[0]) if len(known) else "no variant yet"


def off_pct(variants: pd.DataFrame, currency: Currency) -> float:
    """Largest distance from the reference in percent."""
    return float(variants[f"{currency}_error_pct"].abs().max())
