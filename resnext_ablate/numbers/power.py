"""What a number of seeds can show: detectable differences, and seeds that decide.

A difference is claimed where two tests agree: one on the spread pooled over all
variants, corrected for the number of comparisons, and the two variants' own t-test
(`families`). Power is that of both together, by quadrature over the spreads.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import numpy as np
from scipy import optimize, special

from resnext_ablate.numbers.stats import ALPHA, Floats, dunnett_critical, spread_nodes

POWER = 0.8
PRICE_OF_CHOICE = 1.04
"""What p-values are multiplied by because residuals choose the test (`families`)."""
LEVEL = ALPHA / PRICE_OF_CHOICE
MAX_SEEDS = 100
"""More seeds than this are not counted out, only called "more than 100"."""

Family = Literal["reference", "pairs"]
"""Which variants are compared: each with the reference, or each with each."""

_NODES = 24


def critical_value(
    *,
    num_comparisons: int,
    family: Family,
    df: float,
    correlations: Floats,
    level: float = LEVEL,
) -> float:
    """Pooled standard errors from a difference to the bounds of its interval.

    Dunnett's value against a reference, Bonferroni's for other families.
    """
    if family == "reference":
        return dunnett_critical(correlations=correlations, df=df, level=level)
    return _t_quantile(1 - level / num_comparisons / 2, df)


@cache
def detectable_shift(critical: float, *, df: float) -> float:
    """True difference, in standard errors, that one t-test shows with 80 % power.

    The noncentral t by quadrature, which stays finite where scipy's turns NaN.
    """
    s, weights = spread_nodes(df)
    return _shift(critical * s, weights)


@cache
def detectable_in_sd(
    critical: float,
    *,
    df: float,
    num_first: int,
    num_second: int,
    paired: bool,
    level: float = LEVEL,
) -> float:
    """True difference, in spreads of one run, that both tests show with 80 % power.

    Args:
        critical: of the test on the pooled spread.
        df: degrees of freedom of the pooled spread.
        num_first: runs of one variant, at least 2.
        num_second: runs of the other.
        paired: runs are paired by seed; the spread is then the one left within pairs.
        level: of the pair's own test.
    """
    scale = math.sqrt(1 / num_first + 1 / num_second)
    if paired:
        own_df = np.array([num_first - 1.0])
        s, weights = spread_nodes(num_first - 1, num_nodes=_NODES)
        own_variance, own_error = s**2, scale * s
        sum_of_squares = (num_first - 1) * own_variance
    else:
        a, b, weights = _two_spreads(num_first, num_second)
        parts = a / num_first, b / num_second
        own_df = (parts[0] + parts[1]) ** 2 / (
            parts[0] ** 2 / (num_first - 1) + parts[1] ** 2 / (num_second - 1)
        )
        own_error = np.sqrt(parts[0] + parts[1])
        sum_of_squares = (num_first - 1) * a + (num_second - 1) * b
    own_bound = special.stdtrit(own_df, 1 - level / 2) * own_error
    own_total = num_first - 1 + (0 if paired else num_second - 1)
    rest, rest_weights = _other_spread(df - own_total)
    pooled = np.sqrt((sum_of_squares[:, None] + rest) / df)
    bound = np.maximum(critical * scale * pooled, own_bound[:, None]) / scale
    return _shift(bound.ravel(), np.outer(weights, rest_weights).ravel()) * scale


def _two_spreads(num_first: int, num_second: int) -> tuple[Floats, Floats, Floats]:
    """Variances of two groups with the weight of each pair."""
    first, first_weights = spread_nodes(num_first - 1, num_nodes=_NODES)
    second, second_weights = spread_nodes(num_second - 1, num_nodes=_NODES)
    a, b = np.meshgrid(first**2, second**2, indexing="ij")
    return a.ravel(), b.ravel(), np.outer(first_weights, second_weights).ravel()


def _other_spread(df: float) -> tuple[Floats, Floats]:
    """Sums of squares of the variants not compared, with weights."""
    if df <= 0:
        return np.zeros(1), np.ones(1)
    s, weights = spread_nodes(df, num_nodes=_NODES)
    return df * s**2, weights


def _shift(bounds: Floats, weights: Floats) -> float:
    """The shift of a standard normal that leaves +-bounds with 80 % probability."""

    def lack(shift: float) -> float:
        tails = special.ndtr(shift - bounds) + special.ndtr(-shift - bounds)
        return float(weights @ tails) - POWER * float(weights.sum())

    return float(optimize.brentq(lack, 0.0, 10 * bounds.max() + 10, xtol=1e-5))


@cache
def planned_detectable_in_sd(
    num_seeds: int,
    *,
    num_variants: int,
    family: Family,
    paired: bool,
    level: float = LEVEL,
) -> float:
    """True difference, in spreads of one run, that a study would show 4 times of 5.

    Args:
        num_seeds: of each variant, at least 2.
        num_variants: at least 2, the reference among them.
        family: which variants are compared.
        paired: whether the runs are paired by seed.
        level: of the whole family.
    """
    df = float((num_variants - 1 if paired else num_variants) * (num_seeds - 1))
    comparisons = num_comparisons(num_variants, family=family)
    critical = critical_value(
        num_comparisons=comparisons,
        family=family,
        df=df,
        correlations=np.full(comparisons, math.sqrt(0.5)),
        level=level,
    )
    return detectable_in_sd(
        critical,
        df=df,
        num_first=num_seeds,
        num_second=num_seeds,
        paired=paired,
        level=level,
    )


def num_comparisons(num_variants: int, *, family: Family) -> int:
    if family == "reference":
        return num_variants - 1
    return num_variants * (num_variants - 1) // 2


def seeds_to_decide(
    difference: float,
    *,
    sd: float,
    margin: float,
    num_variants: int,
    family: Family,
    paired: bool,
) -> float:
    """Seeds for each variant that decide with 80 % power if `difference` is true.

    The shorter of two ways: showing the difference, or showing that it lies within
    the margin.

    Args:
        difference: points.
        sd: spread of one run in points; within pairs where runs are paired.
        margin: points that count as no difference.
        num_variants: at least 2, the reference among them.
        family: which variants are compared.
        paired: whether the runs are paired by seed.

    Returns:
        A number from 2 to `MAX_SEEDS`, or infinity.
    """

    def shown(num_seeds: int) -> bool:
        in_sd = planned_detectable_in_sd(
            num_seeds, num_variants=num_variants, family=family, paired=paired
        )
        return in_sd * sd <= abs(difference)

    def within(num_seeds: int) -> bool:
        level = LEVEL / num_comparisons(num_variants, family=family)
        df = (num_variants - 1 if paired else num_variants) * (num_seeds - 1)
        quantiles = _t_quantile(1 - level, df) + _t_quantile((1 + POWER) / 2, df)
        return quantiles * sd * math.sqrt(2 / num_seeds) <= margin - abs(difference)

    def enough(num_seeds: int) -> bool:
        return within(num_seeds) or shown(num_seeds)

    low, high = 1, MAX_SEEDS
    if not enough(high):
        return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return float(high)


def _t_quantile(level: float, df: float) -> float:
    return float(special.stdtrit(df, level))
