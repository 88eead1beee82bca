"""How nets rank: their distribution, short against long budgets, what matters.

A search draws nets where it expects good ones. What its nets look like is then no
distribution of the design space, and charts of them carry a badge that says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from resnext_ablate.evidence.ranks import Agreement

BADGE = "not a uniform sample"
MIN_DISTRIBUTION = 8
"""Fewer nets than this are listed, not shown as a distribution."""
MAX_AXES = 12


@dataclass(frozen=True)
class DistributionData:
    """Empirical distribution of an error over nets."""

    title: str
    note: str
    badge: str
    """Why this is no distribution of the design space; empty where it is one."""
    x_title: str
    steps: pd.DataFrame
    """error, share, low, high; share of nets at or below each error."""
    nets: pd.DataFrame
    """variant, error; sorted."""


@dataclass(frozen=True)
class BudgetsData:
    """Error after few epochs against error after all of them."""

    title: str
    note: str
    x_title: str
    y_title: str
    points: pd.DataFrame
    """variant, x, y, short_rank, long_rank; 1 is the best."""
    seeds: pd.DataFrame
    """variant, seed, x, y."""


@dataclass(frozen=True)
class ImportanceData:
    """How much of the error each free axis of a search explains."""

    title: str
    note: str
    badge: str
    axes: pd.DataFrame
    """axis, importance; the largest first."""


def distribution_data(
    nets: pd.DataFrame, *, is_uniform: bool, sampler: str, measure: str = "test error"
) -> DistributionData:
    """The share of nets at or below each error, with a 95 % bootstrap band.

    The bootstrap of a share is binomial, so its band is exact and needs no draws.

    Args:
        nets: `variant` and `error` (percent), one row per net.
        is_uniform: whether the nets were drawn uniformly from their space.
        sampler: how they were chosen, such as "TPE".
        measure: what `error` is.
    """
    rows = nets[["variant", "error"]].dropna().sort_values("error", ignore_index=True)
    count = len(rows)
    errors, below = np.unique(rows["error"].to_numpy(dtype=float), return_counts=True)
    share = np.cumsum(below) / count
    steps = pd.DataFrame(
        {
            "error": errors,
            "share": share,
            "low": stats.binom.ppf(0.025, count, share) / count,
            "high": stats.binom.ppf(0.975, count, share) / count,
        }
    )
    median = float(rows["error"].median())
    title = f"Half of {count:,} nets have a {measure} of {median:.2f} % or less"
    if not is_uniform:
        title += f" ({BADGE})"
    note = "Share of nets at or below each error, with its 95 % bootstrap band."
    badge = ""
    if not is_uniform:
        badge = f"{BADGE}: chosen by {sampler}"
        note += (
            f" The nets were chosen by {sampler}, not drawn uniformly: this tells of "
            "them, not of the design space."
        )
    return DistributionData(title, note, badge, f"{measure} (%)", steps, rows)


def budgets_data(
    epochs: pd.DataFrame, *, short_epoch: int, agreement: Agreement
) -> BudgetsData:
    """Validation error of each variant after `short_epoch` epochs and after all.

    Args:
        epochs: of complete runs of at least two variants.
        short_epoch: the shorter budget, below the last epoch.
        agreement: of the two, by the statistics of the study.
    """
    last = int(epochs["epoch"].max())
    seeds = (
        epochs[epochs["epoch"].isin((short_epoch, last))]
        .pivot_table(
            index=["variant", "seed"],
            columns="epoch",
            values="val_error_pct",
            sort=False,
            observed=True,
        )
        .dropna()
        .rename(columns={short_epoch: "x", last: "y"})
        .reset_index()
    )
    points = seeds.groupby("variant", sort=False)[["x", "y"]].mean().reset_index()
    points = _with_ranks(points)
    best = points.loc[points["y"].idxmin()]
    ranks = f"{best['variant']}, best after {last}, is {_ordinal(best['short_rank'])}"
    note = (
        f"{_tau_note(agreement)} Each large mark is a mean, each small dot one seed. "
        "The shorter budget is the same run stopped early, its learning rate not yet "
        "decayed."
    )
    return BudgetsData(
        title=f"Rank correlation {agreement.tau:+.2f} between {short_epoch} and {last} "
        f"epochs: {ranks} after {short_epoch}",
        note=note,
        x_title=f"validation error after {_epochs(short_epoch)} (%)",
        y_title=f"after {last} epochs (%)",
        points=points,
        seeds=seeds,
    )


def orders_data(
    names: tuple[str, str], means: pd.DataFrame, *, agreement: Agreement
) -> BudgetsData:
    """Mean test error of each net in one study and in another.

    Args:
        names: of the studies.
        means: variant, x, y: the means of nets that both have trained, in percent.
        agreement: of the two orders.
    """
    points = _with_ranks(means.reset_index(drop=True))
    best = points.loc[points["y"].idxmin()]
    return BudgetsData(
        title=f"Rank correlation {agreement.tau:+.2f} between {names[0]} and "
        f"{names[1]}: {best['variant']}, best in {names[1]}, is "
        f"{_ordinal(best['short_rank'])} in {names[0]}",
        note=f"{_tau_note(agreement)} Each mark is the mean of a net's runs.",
        x_title=f"test error in {names[0]} (%)",
        y_title=f"in {names[1]} (%)",
        points=points,
        seeds=pd.DataFrame(columns=["variant", "seed", "x", "y"]),
    )


def _with_ranks(points: pd.DataFrame) -> pd.DataFrame:
    return points.assign(
        short_rank=points["x"].rank(method="min").astype(int),
        long_rank=points["y"].rank(method="min").astype(int),
    )


def _tau_note(agreement: Agreement) -> str:
    """Kendall's tau, its interval, and what noise leaves of it."""
    interval = noise = ""
    if not np.isnan(agreement.low):
        interval = f" [{agreement.low:+.2f}, {agreement.high:+.2f}]"
        noise = (
            " If the true orders were equal, seed noise would hold tau at "
            f"{agreement.ceiling:+.2f}."
        )
    return f"Rank correlation (Kendall's tau) {agreement.tau:+.2f}{interval}.{noise}"


def errors_after(epochs: pd.DataFrame, epoch: int) -> dict[str, list[float]]:
    """Validation errors of all runs after an epoch, by variant."""
    then = epochs[epochs["epoch"] == epoch]
    by_variant = then.groupby("variant", sort=False, observed=True)["val_error_pct"]
    return {str(variant): errors.tolist() for variant, errors in by_variant}


def importance_data(
    axes: pd.DataFrame, *, is_uniform: bool, sampler: str
) -> ImportanceData:
    """The axes of a search by how much of the error they explain.

    Args:
        axes: `axis` and `importance`, which sum to about 1; `evaluator`, `seed` and
            `num_nets`, the same in every row.
        is_uniform, sampler: as for `distribution_data`.
    """
    rows = axes.sort_values("importance", ascending=False, ignore_index=True)
    first = rows.iloc[0]
    note = (
        f"Importance by {first['evaluator']} (seed {first['seed']}) over "
        f"{first['num_nets']} nets trained to the end; all axes sum to 1. An axis is "
        "what the sampler sets: where its value lies among those that still fit."
    )
    if len(rows) > MAX_AXES:
        note += f" The {MAX_AXES} largest of {len(rows)} axes are drawn."
    rows = rows[["axis", "importance"]].head(MAX_AXES)
    badge = ""
    if not is_uniform:
        badge = f"{BADGE}: chosen by {sampler}"
        note += f" Seen where {sampler} looked, not over the whole space."
    return ImportanceData(
        title=f"{first['axis']} explains most of the validation error "
        f"({100 * first['importance']:.0f} % of what the axes explain)",
        note=note,
        badge=badge,
        axes=rows,
    )


def _epochs(count: int) -> str:
    return f"{count} epoch{'' if count == 1 else 's'}"


def _ordinal(rank: int) -> str:
    ending = (
        "th"
        if rank % 100 in (11, 12, 13)
        else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")
    )
    return f"{rank}{ending}"
