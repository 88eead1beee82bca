"""Intervals and tests against tables, hand calculations and other libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower
from statsmodels.stats.weightstats import ttost_ind

from resnext_ablate import stats


def test_interval_by_hand() -> None:
    """The t-interval of 1, 2, 3 is 2 +- 4.303 / sqrt(3)."""
    summary = stats.summarize([1.0, 2.0, 3.0])
    assert (summary.num_runs, summary.mean, summary.sd) == (3, 2.0, 1.0)
    assert summary.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert summary.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)


@pytest.mark.parametrize("values", [[], [4.2], [4.2] * 3, [0.1] * 3])
def test_no_spread_no_interval(values: list[float]) -> None:
    """None, one or equal values get no bounds, least of all narrow ones."""
    summary = stats.summarize(values)
    assert summary.num_runs == len(values)
    assert math.isnan(summary.low)
    assert math.isnan(summary.high)


def test_interval_covers() -> None:
    """At three runs 94 to 96 % of the intervals hold the true mean."""
    draws = np.random.default_rng(3).normal(5, 0.2, size=(3000, 3))
    summaries = [stats.summarize(draw) for draw in draws]
    assert 0.94 < np.mean([s.low <= 5 <= s.high for s in summaries]) < 0.96


@pytest.mark.parametrize(
    ("df", "expected"),
    [
        (5, [2.57, 3.03, 3.29, 3.48, 3.62]),
        (10, [2.23, 2.57, 2.76, 2.89, 2.99]),
        (20, [2.09, 2.38, 2.54, 2.65, 2.73]),
    ],
)
def test_dunnett_table(df: int, expected: list[float]) -> None:
    """Critical values are those of Dunnett's two-sided 5 % table (1964)."""
    found = [
        stats.dunnett_critical(correlations=np.full(arms, math.sqrt(0.5)), df=df)
        for arms in range(1, 6)
    ]
    assert found == pytest.approx(expected, abs=0.0065)


def test_dunnett_against_scipy() -> None:
    """Unequal group sizes give scipy's p-values, which it integrates at random."""
    rng = np.random.default_rng(5)
    base, *arms = (rng.normal(5 - 0.1 * i, 0.2, n) for i, n in enumerate((4, 3, 6, 5)))
    found = stats.many_to_one([base, *arms], margin=0.5)
    theirs = scipy_stats.dunnett(*arms, control=base, rng=np.random.default_rng(1))
    assert {one.correction for one in found} == {"Dunnett"}
    assert [one.p_corrected for one in found] == pytest.approx(theirs.pvalue, abs=1e-3)
    interval = theirs.confidence_interval(0.95)
    halves = [one.critical * one.standard_error for one in found]
    assert halves == pytest.approx((interval.high - interval.low) / 2, rel=5e-3)


def test_unequal_spreads_fall_back_to_holm() -> None:
    """Where one variant scatters far more, Welch's p-values are Holm-corrected."""
    base = np.array([5.0, 5.1, 4.9, 5.05])
    arms = [np.array([3.0, 7.0, 1.0, 8.0]), base - 0.4, base - 0.15]
    found = stats.many_to_one([base, *arms], margin=0.5)
    welch = [scipy_stats.ttest_ind(arm, base, equal_var=False).pvalue for arm in arms]
    assert all(one.correction.startswith("Holm") for one in found)
    assert [one.p_value for one in found] == pytest.approx(welch)
    holm = multipletests(welch, method="holm")[1]
    assert [one.p_corrected for one in found] == pytest.approx(holm)
    tost = [ttost_ind(arm, base, -0.5, 0.5, usevar="unequal")[0] for arm in arms]
    expected = multipletests(tost, method="holm")[1]
    assert [one.p_equivalent for one in found] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("num_seeds", "expected"), [(3, 0.61), (5, 0.41), (10, 0.27), (20, 0.18)]
)
def test_detectable_difference(num_seeds: int, expected: float) -> None:
    """One comparison at a spread of 0.2 points detects what power analysis says."""
    df = 2 * num_seeds - 2
    critical = float(scipy_stats.t.isf(0.025, df))
    found = stats.detectable_shift(critical, df=df) * 0.2 * math.sqrt(2 / num_seeds)
    effect = TTestIndPower().solve_power(nobs1=num_seeds, alpha=0.05, power=0.8)
    assert found == pytest.approx(0.2 * effect, rel=1e-4)
    assert found == pytest.approx(expected, abs=0.006)


def test_detectable_difference_stays_finite() -> None:
    """Huge critical values, where the noncentral t of scipy fails, stay finite."""
    shift = stats.detectable_shift(200.0, df=2)
    assert 200 < shift < 400


def test_seeds_to_decide() -> None:
    """Seeds grow as the difference shrinks, and end as more than can be counted."""

    def seeds(difference: float) -> float:
        return stats.seeds_to_decide(difference, sd=0.2, margin=0.2, num_comparisons=1)

    # 9 seeds per arm see 0.3 points at a spread of 0.2 with 80 % power.
    assert seeds(0.3) == pytest.approx(9, abs=1)
    assert seeds(-0.3) == seeds(0.3)
    assert seeds(1.0) < seeds(0.3)
    assert seeds(0.0) < 30  # That it lies within the margin can be shown.
    assert math.isinf(
        stats.seeds_to_decide(0.05, sd=1.0, margin=0.1, num_comparisons=1)
    )
