"""Intervals and tests against tables, hand calculations and other libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from resnext_ablate.numbers import stats


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


def test_holm_against_statsmodels() -> None:
    """Corrected p-values are statsmodels', in the order given."""
    p_values = [0.04, 0.001, 0.03, 0.8, 0.011]
    assert stats.holm(p_values) == pytest.approx(
        multipletests(p_values, method="holm")[1]
    )


def test_unknown_p_values_count_in_the_family() -> None:
    """An unknown p-value makes the others no smaller, and stays unknown."""
    first, second = stats.holm([0.02, math.nan])
    assert first == pytest.approx(0.04)
    assert math.isnan(second)
