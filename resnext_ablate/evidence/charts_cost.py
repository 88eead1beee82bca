"""What errors cost in time, and where a study's own time went: frame -> data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from resnext_ablate.evidence.charts import PointsData, points_data
from resnext_ablate.records.records import FAILURES

PER_IMAGE = "time_per_image_ms"
STEP_TIME = "step_time_ms"


@dataclass(frozen=True)
class CostsData:
    """Time and activations, one above the other, against FLOPs."""

    time: PointsData
    activations: PointsData

    @property
    def title(self) -> str:
        return self.time.title

    @property
    def note(self) -> str:
        return self.time.note


@dataclass(frozen=True)
class ParetoData:
    """Error against time, with the variants that no other beats in both."""

    title: str
    note: str
    x_title: str
    points: pd.DataFrame
    """variant, x, mean, low, high, n, dominated."""
    seeds: pd.DataFrame
    """variant, seed, x, y, dominated."""


@dataclass(frozen=True)
class TimelineData:
    """When each run trained, and how it ended."""

    title: str
    note: str
    unit: str
    """Of `start` and `length`: s, min or h."""
    bars: pd.DataFrame
    """variant, seed, state, reason, has_failed, start, length, lane; from the first."""
    order: tuple[str, ...]


def time_data(variants: pd.DataFrame, runs: pd.DataFrame) -> PointsData:
    """Measured training time per image against cardinality, at FLOPs held equal."""
    known = variants.dropna(subset=[f"{PER_IMAGE}_mean"])
    return points_data(
        variants,
        with_time_per_image(runs),
        x="cardinality",
        title=_time_title(known),
        y=PER_IMAGE,
        y_title="training time per image (ms)",
    )


def costs_data(variants: pd.DataFrame, runs: pd.DataFrame) -> CostsData:
    """Time and activations against FLOPs.

    The time is that of a training step where the certificate has measured it, else the
    training time per image of the runs.
    """
    column = time_column(variants)
    title = _costs_title(variants.dropna(subset=[column]), column)
    if column == STEP_TIME:
        shown = variants.assign(
            step_mean=variants[STEP_TIME],
            step_ci_low=variants[f"{STEP_TIME}_low"],
            step_ci_high=variants[f"{STEP_TIME}_high"],
        )
        time = points_data(
            shown,
            runs.iloc[:0].assign(step=math.nan),
            x="macs",
            title=title,
            y="step",
            y_title="training step (ms)",
        )
        note = (
            "Above: median time of a training step with its 95 % interval, as measured."
        )
    else:
        time = points_data(
            variants,
            with_time_per_image(runs),
            x="macs",
            title=title,
            y=PER_IMAGE,
            y_title="time per image (ms)",
        )
        note = "Above: training time per image, each small dot one seed."
    note += _roofline_note(runs)
    note += " Below: activations, the outputs of all convolutions for one image."
    activations = points_data(
        variants.assign(acts_mean=variants["activations"]),
        runs.iloc[:0].assign(acts=math.nan),
        x="macs",
        title="",
        y="acts",
        y_title="activations",
    )
    time = PointsData(**{**vars(time), "note": note})
    return CostsData(time=time, activations=activations)


def _roofline_note(runs: pd.DataFrame) -> str:
    """How much of the device the runs used, where they know."""
    if "roofline_pct" not in runs or runs["roofline_pct"].isna().all():
        return ""
    low, high = runs["roofline_pct"].min(), runs["roofline_pct"].max()
    return (
        f" The runs reached {low:.0f} to {high:.0f} % of the roofline: the images per "
        "second that their layers' multiply-adds and traffic allow on the device."
    )


def time_column(variants: pd.DataFrame) -> str:
    """The column that holds the time of a variant: a step's, else per image."""
    if STEP_TIME in variants and variants[STEP_TIME].notna().any():
        return STEP_TIME
    return f"{PER_IMAGE}_mean"


def with_time_per_image(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs with their training time per image in ms."""
    return runs.assign(**{PER_IMAGE: 1000.0 / runs["images_per_s"]})


def _time_title(known: pd.DataFrame) -> str:
    column = f"{PER_IMAGE}_mean"
    if len(known) < 2:
        return "Training time of an image"
    slow, fast = known.loc[known[column].idxmax()], known.loc[known[column].idxmin()]
    ratio = slow[column] / fast[column]
    start = "Equal FLOPs, unequal time: " if ratio >= 1.1 else ""
    return (
        f"{start}{slow['variant']} takes {ratio:.1f} times as long per image as "
        f"{fast['variant']}"
    )


def _costs_title(known: pd.DataFrame, column: str) -> str:
    if len(known) < 2:
        return "Time, activations and FLOPs"
    ratios = [
        f"{word} differ by a factor of {known[key].max() / known[key].min():.2f}"
        for word, key in (("FLOPs", "macs"), ("activations", "activations"))
    ]
    time = known[column].max() / known[column].min()
    return f"{', '.join(ratios)}, time by one of {time:.2f}"


def pareto_data(variants: pd.DataFrame, runs: pd.DataFrame) -> ParetoData:
    """Test error against training time per image, dominated variants marked.

    A variant is dominated where another is at least as good in mean error and in mean
    time, and better in one of them.
    """
    known = variants.dropna(subset=["test_error_pct_mean", f"{PER_IMAGE}_mean"])
    error = known["test_error_pct_mean"].to_numpy(dtype=float)
    time = known[f"{PER_IMAGE}_mean"].to_numpy(dtype=float)
    no_worse = (error[:, None] <= error) & (time[:, None] <= time)
    better = (error[:, None] < error) | (time[:, None] < time)
    points = pd.DataFrame(
        {
            "variant": known["variant"],
            "x": time,
            "mean": error,
            "low": known["test_error_pct_ci_low"],
            "high": known["test_error_pct_ci_high"],
            "n": known["n"],
            "dominated": (no_worse & better).any(axis=0),
        }
    ).reset_index(drop=True)
    seeds = with_time_per_image(runs).merge(
        points[["variant", "dominated"]], on="variant"
    )
    seeds = seeds[["variant", "seed", PER_IMAGE, "test_error_pct", "dominated"]]
    front = points[~points["dominated"]].sort_values("x")
    names = front["variant"].tolist()
    said = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
    return ParetoData(
        title=f"No other variant is both faster and better on average: {said}",
        note="The line joins the variants of lowest mean error for their time; faded "
        "ones are beaten in both. Each small dot is one seed. Means decide, whatever "
        "their intervals.",
        x_title="training time per image (ms)",
        points=points,
        seeds=seeds.set_axis(["variant", "seed", "x", "y", "dominated"], axis=1),
    )


def timeline_data(runs: pd.DataFrame, order: tuple[str, ...]) -> TimelineData:
    """Training of all runs over time, failed and diverged ones included.

    Args:
        runs: all finished runs.
        order: the study's variants, which fixes the colours.
    """
    begun = pd.to_datetime(runs["started_at"], format="ISO8601", utc=True)
    start = (begun - begun.min()).dt.total_seconds().to_numpy(dtype=float)
    length = runs["train_time_s"].fillna(0.0).to_numpy(dtype=float)
    end = float((start + length).max())
    unit, seconds = _time_unit(end)
    bars = pd.DataFrame(
        {
            **{key: runs[key] for key in ("variant", "seed", "state", "reason")},
            "has_failed": runs["state"].isin(FAILURES),
            "start": start / seconds,
            "length": length / seconds,
            "lane": _lanes(start, start + length),
        }
    )
    num_failed = int(runs["state"].isin(FAILURES).sum())
    failed = f"{num_failed} failed" if num_failed else "none failed"
    title = (
        f"{len(runs)} run{'' if len(runs) == 1 else 's'}, {failed}: "
        f"{_duration(float(length.sum()))} of training within {_duration(end)}"
    )
    note = (
        "One bar per run, as long as its training; validation, start-up and pauses lie "
        "between the bars. A cross marks a run that failed or diverged."
    )
    return TimelineData(title, note, unit, bars.reset_index(drop=True), order)


def _lanes(start: np.ndarray, end: np.ndarray) -> list[int]:
    """A lane for each bar, so that none overlap and lanes are few."""
    free_at: list[float] = []
    lanes = [0] * len(start)
    for i in np.argsort(start, kind="stable"):
        free = next((k for k, at in enumerate(free_at) if at <= start[i]), None)
        if free is None:
            free = len(free_at)
            free_at.append(0.0)
        free_at[free] = max(end[i], start[i] + 1e-9)
        lanes[i] = free
    return lanes


def _time_unit(seconds: float) -> tuple[str, float]:
    """A unit in which so many seconds are at least 2, and its length in seconds."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return unit, size
    return "s", 1


def _duration(seconds: float) -> str:
    unit, size = _time_unit(seconds)
    return f"{seconds / size:.1f} {unit}"
