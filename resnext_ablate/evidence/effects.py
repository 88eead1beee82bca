"""What a doubling of cardinality is worth at equal FLOPs, and where it stops paying.

The effect is the slope of a straight line through the test errors over log2 of the
cardinality. Its interval lets every variant have a spread of its own (Satterthwaite's
degrees of freedom). A bend is stated only where the line is refuted: the largest change
of slope over all knots, in standard errors, against its own distribution under a line
with the same runs, drawn with a fixed seed, at 5 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from resnext_ablate.numbers.stats import ALPHA, Floats, pooled_sd, spread

_NUM_DRAWS = 20_000
_MANY = 40


@dataclass(frozen=True)
class Slope:
    """Points of test error per doubling, with a 95 % t-interval."""

    points: float
    low: float
    high: float

    @property
    def is_shown(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Bend:
    """Where a straight line fails most, and the slopes on either side."""

    cardinality: int
    before: Slope
    after: Slope
    p_value: float

    @property
    def is_shown(self) -> bool:
        return self.p_value < ALPHA

    @property
    def saturates(self) -> bool:
        """The error falls up to here, and no fall is shown beyond."""
        falls_before = self.before.high < 0
        return self.is_shown and falls_before and not self.after.high < 0


@dataclass(frozen=True)
class CardinalityEffect:
    """What the runs of one study say of cardinality."""

    slope: Slope
    bend: Bend | None
    """None where there are fewer than three cardinalities or no replicates."""
    num_runs: int


def cardinality_effect(
    runs: Sequence[Sequence[float]], *, cardinalities: Sequence[int]
) -> CardinalityEffect | None:
    """The effect of doubling cardinality.

    Args:
        runs: test errors of the runs of each variant.
        cardinalities: of the variants, which are otherwise matched.

    Returns:
        None where fewer than two cardinalities have two runs that differ.
    """
    measured = [
        (np.array(values, dtype=float), cardinality)
        for values, cardinality in zip(runs, cardinalities, strict=True)
        if len(values) >= 2
    ]
    groups = [group for group, _ in measured]
    doublings = np.log2([cardinality for _, cardinality in measured])
    if len(set(doublings)) < 2 or pooled_sd(groups) == 0:
        return None
    sizes = np.array([len(group) for group in groups])
    design = np.stack([np.ones_like(doublings), doublings])
    weights = _estimators(design, sizes)[1]
    slope = _slope(weights, groups)
    bend = _bend(groups, doublings=doublings)
    return CardinalityEffect(slope, bend, int(sizes.sum()))


def _estimators(design: Floats, sizes: Floats) -> Floats:
    """(coefficients, variants): least-squares coefficients as sums over the means."""
    weighted = design * sizes
    return np.asarray(np.linalg.solve(weighted @ design.T, weighted))


def _slope(weights: Floats, groups: Sequence[Floats]) -> Slope:
    """A weighted sum of means; each variance is the variant's own."""
    points = float(weights @ [group.mean() for group in groups])
    parts = np.array(
        [
            w**2 * spread(group) ** 2 / len(group)
            for w, group in zip(weights, groups, strict=True)
        ]
    )
    if parts.sum() == 0:
        return Slope(points, math.nan, math.nan)
    dfs = np.array([len(group) - 1 for group in groups])
    df = parts.sum() ** 2 / (parts**2 / dfs).sum()
    half = special.stdtrit(df, 1 - ALPHA / 2) * math.sqrt(parts.sum())
    return Slope(points, points - half, points + half)


def _bend(groups: Sequence[Floats], *, doublings: Floats) -> Bend | None:
    knots = np.unique(doublings)[1:-1]
    if not len(knots):
        return None
    sizes = np.array([len(group) for group in groups])
    means = np.array([group.mean() for group in groups])
    fits = [
        _estimators(
            np.stack(
                [
                    np.ones_like(doublings),
                    np.minimum(doublings - knot, 0),
                    np.maximum(doublings - knot, 0),
                ]
            ),
            sizes,
        )
        for knot in knots
    ]
    changes = np.stack([fit[2] - fit[1] for fit in fits])
    changes /= np.sqrt((changes**2 / sizes).sum(axis=1, keepdims=True))
    seen = np.abs(changes @ means) / pooled_sd(groups)
    best = int(seen.argmax())
    return Bend(
        cardinality=round(2 ** knots[best]),
        before=_slope(fits[best][1], groups),
        after=_slope(fits[best][2], groups),
        p_value=_largest_p(float(seen.max()), changes=changes, sizes=sizes),
    )


def _largest_p(seen: float, *, changes: Floats, sizes: Floats) -> float:
    """How often the largest change under a straight line is at least that seen."""
    rng = np.random.default_rng(0)
    df = float(sizes.sum() - len(sizes))
    if len(sizes) <= _MANY:
        noise = rng.standard_normal((_NUM_DRAWS, len(sizes))) / np.sqrt(sizes)
        drawn = noise @ changes.T
    else:
        # The same distribution, from as many draws as there are knots.
        values, vectors = np.linalg.eigh((changes / sizes) @ changes.T)
        factor = vectors * np.sqrt(np.maximum(values, 0.0))
        drawn = rng.standard_normal((_NUM_DRAWS, len(values))) @ factor.T
    sd = np.sqrt(rng.chisquare(df, _NUM_DRAWS) / df)
    largest = np.abs(drawn).max(axis=1) / sd
    return (1 + int((largest >= seen).sum())) / (1 + _NUM_DRAWS)


def effect_sentence(effect: CardinalityEffect) -> str:
    """The effect in words fixed by rule."""
    slope = effect.slope
    interval = f"(95 % interval {slope.low:+.2f} to {slope.high:+.2f})"
    if not slope.is_shown:
        text = (
            "No effect of cardinality on the test error is shown: "
            f"{slope.points:+.2f} points per doubling {interval}"
        )
    else:
        verb = "lowers" if slope.points < 0 else "raises"
        text = (
            f"Each doubling of cardinality {verb} the test error by "
            f"{abs(slope.points):.2f} points {interval}"
        )
    bend = effect.bend
    if bend is None:
        return f"{text}."
    if bend.saturates:
        return (
            f"{text}, but it saturates: {bend.before.points:+.2f} per doubling up to "
            f"cardinality {bend.cardinality}, {bend.after.points:+.2f} "
            f"[{bend.after.low:+.2f}, {bend.after.high:+.2f}] beyond."
        )
    if bend.is_shown:
        return (
            f"{text}, but not evenly: {bend.before.points:+.2f} per doubling up to "
            f"cardinality {bend.cardinality}, {bend.after.points:+.2f} beyond."
        )
    return f"{text}; no saturation is shown (p = {bend.p_value:.2f})."


def by_cardinality(
    errors: Mapping[str, Mapping[int, float]], *, cardinality: Mapping[str, int]
) -> CardinalityEffect | None:
    """`cardinality_effect` of a study's errors by variant and seed."""
    return cardinality_effect(
        [list(values.values()) for values in errors.values()],
        cardinalities=[cardinality[label] for label in errors],
    )
