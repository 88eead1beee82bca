"""What the charts of a study show: for each chart a function frame -> data.

Frames are the `variants`, `comparisons`, `runs` and `epochs` tables of a study, with
complete runs only in `runs`. The data functions hold every number and the finding that
the title states; `figures` only draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd
from scipy import stats

from resnext_ablate import chart_style as style

MAX_SEEDS_DRAWN = 60
"""With more variants than this only means are drawn."""
MAX_CURVES = 6
MAX_DIFFERENCES = 30
EQUAL_PCT = 10.0
"""Variants whose FLOPs differ by less than this are held equal."""

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
class CurvesData:
    """Errors by epoch: mean over seeds, and their range."""

    title: str
    note: str
    curves: pd.DataFrame
    """variant, epoch, train, val, val_low, val_high, n."""
    order: tuple[str, ...]
    """All variants of the study, which fixes the colours."""


@dataclass(frozen=True)
class DifferencesData:
    """Differences from the reference with simultaneous intervals."""

    title: str
    note: str
    rows: pd.DataFrame
    """variant, difference, low, high, verdict, n; in plan order."""
    margin: float
    order: tuple[str, ...]


@dataclass(frozen=True)
class PaperData:
    """The paper's differences against ours."""

    title: str
    note: str
    rows: pd.DataFrame
    """variant, cardinality, paper, ours, low, high."""
    paper: str
    order: tuple[str, ...]


def cardinality_data(
    variants: pd.DataFrame,
    runs: pd.DataFrame,
    *,
    comparisons: pd.DataFrame,
    paper: pd.DataFrame,
) -> CardinalityData:
    """Test error against cardinality.

    Args:
        variants, runs, comparisons: the study's tables.
        paper: the paper's rows that match variants (`variant`, `setting`,
            `cardinality`, `paper_difference`, `model`, `source`); may be empty.
    """
    main = _points(
        variants, runs, x="cardinality", title=_trend_title(variants, comparisons)
    )
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
    variants: pd.DataFrame, runs: pd.DataFrame, *, currency: Currency
) -> PointsData:
    """Test error against FLOPs or parameters."""
    word = CURRENCIES[currency]
    known = variants.dropna(subset=["test_error_pct_mean"])
    off = _off_pct(variants, currency)
    means = known["test_error_pct_mean"]
    if len(known) < 2:
        title = f"Test error and {word} of {_only(known)}"
    elif off <= EQUAL_PCT:
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
    return _points(variants, runs, x=currency, title=title)


def time_data(variants: pd.DataFrame, runs: pd.DataFrame) -> PointsData:
    """Measured training time per image, against FLOPs or, where those are held equal,
    against cardinality."""
    equal = _off_pct(variants, "macs") <= EQUAL_PCT
    x = "cardinality" if equal and variants["cardinality"].nunique() > 1 else "macs"
    per_image = "time_per_image_ms"
    known = variants.dropna(subset=[f"{per_image}_mean"])
    timed = runs.assign(**{per_image: 1000.0 / runs["images_per_s"]})
    means = known[f"{per_image}_mean"]
    title = "Training time per image"
    if len(known) > 1:
        slow, fast = known.loc[means.idxmax()], known.loc[means.idxmin()]
        ratio = slow[f"{per_image}_mean"] / fast[f"{per_image}_mean"]
        start = "Equal FLOPs, unequal time: " if equal and ratio >= 1.1 else ""
        title = (
            f"{start}{slow['variant']} takes {ratio:.1f} times as long per image as "
            f"{fast['variant']}"
        )
    return _points(
        variants,
        timed,
        x=x,
        title=title,
        y=per_image,
        y_title="training time per image (ms)",
    )


def _points(
    variants: pd.DataFrame,
    runs: pd.DataFrame,
    *,
    x: str,
    title: str,
    y: str = "test_error_pct",
    y_title: str = "test error (%)",
) -> PointsData:
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


def _trend_title(variants: pd.DataFrame, comparisons: pd.DataFrame) -> str:
    known = variants.dropna(subset=["test_error_pct_mean"])
    if len(known) < 2:
        return f"Test error of {_only(known)}"
    best = known.loc[known["test_error_pct_mean"].idxmin()]
    off = _off_pct(variants, "macs")
    held = f" at FLOPs equal within {off:.1f} %" if off <= EQUAL_PCT else ""
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


def _off_pct(variants: pd.DataFrame, currency: Currency) -> float:
    """Largest distance from the reference in percent."""
    return float(variants[f"{currency}_error_pct"].abs().max())


def curves_data(epochs: pd.DataFrame, variants: pd.DataFrame) -> CurvesData:
    """Mean error by epoch over the seeds of each variant, with the seeds' range."""
    shown = variants.dropna(subset=["test_error_pct_mean"])
    if len(shown) > MAX_CURVES:
        best = shown.sort_values("test_error_pct_mean").head(MAX_CURVES - 1)
        keep = set(best["variant"]) | set(shown[shown["is_reference"]]["variant"])
        shown = shown[shown["variant"].isin(keep)]
    curves = (
        epochs[epochs["variant"].isin(shown["variant"])]
        .groupby(["variant", "epoch"], observed=True)
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
        "Solid: validation, mean over seeds, with a band over all seeds. Dashed: "
        "training, on augmented batches as they pass."
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
    return CurvesData(title, note, curves, tuple(variants["variant"]))


def differences_data(
    comparisons: pd.DataFrame, variants: pd.DataFrame
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
        "holds for all comparisons together at 95 %. Shaded: differences that count as "
        "none."
    )
    if len(rows) > MAX_DIFFERENCES:
        note += f" Drawn: the {MAX_DIFFERENCES} lowest of {len(rows):,}."
        lowest = rows.sort_values("difference").head(MAX_DIFFERENCES).index
        rows = rows.loc[sorted(lowest)]
    margin = float(comparisons["margin_pct"].iloc[0])
    return DifferencesData(
        title, note, rows.reset_index(drop=True), margin, tuple(variants["variant"])
    )


def paper_data(
    variants: pd.DataFrame, comparisons: pd.DataFrame, *, paper: pd.DataFrame
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
        "so only differences from each one's own reference are set side by side. On "
        "the dashed line both agree."
    )
    return PaperData(title, note, rows, name, tuple(variants["variant"]))
