"""The effect of cardinality and the agreement of rankings, on runs of known truth."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic
from scipy import stats as scipy_stats

from resnext_ablate.evidence.effects import (
    CardinalityEffect,
    cardinality_effect,
    effect_sentence,
)
from resnext_ablate.evidence.ranks import agreement
from resnext_ablate.evidence.report import write_report

CARDINALITIES = (1, 2, 4, 8, 32)


def drawn_effect(
    rng: np.random.Generator,
    *,
    per_doubling: float,
    up_to: float = math.inf,
    num_seeds: int = 5,
) -> CardinalityEffect:
    """An effect on runs with 0.2 points of noise, flat beyond a cardinality."""
    runs = [
        list(rng.normal(5 + per_doubling * math.log2(min(c, up_to)), 0.2, num_seeds))
        for c in CARDINALITIES
    ]
    found = cardinality_effect(runs, cardinalities=CARDINALITIES)
    assert found is not None and found.bend is not None
    return found


def test_slope_is_that_of_a_regression() -> None:
    """The slope is least squares over all runs, unequal numbers of them too."""
    rng = np.random.default_rng(1)
    runs = [list(rng.normal(5 - 0.1 * i, 0.2, 3 + i)) for i in range(5)]
    found = cardinality_effect(runs, cardinalities=CARDINALITIES)
    x = np.repeat(np.log2(CARDINALITIES), [len(values) for values in runs])
    theirs = scipy_stats.linregress(x, np.concatenate(runs))
    assert found is not None
    assert found.slope.points == pytest.approx(theirs.slope)
    half = scipy_stats.t.ppf(0.975, len(x) - 2) * theirs.stderr
    assert found.slope.high - found.slope.points == pytest.approx(half, rel=0.5)
    assert found.num_runs == len(x) == 25


@pytest.mark.slow
def test_rates_of_the_effect_model() -> None:
    """The slope's interval covers; a straight line bends in 5 % at most."""
    rng = np.random.default_rng(2)
    num_studies = 500
    effects = [
        drawn_effect(rng, per_doubling=-0.1, num_seeds=3) for _ in range(num_studies)
    ]
    covered = np.mean([e.slope.low <= -0.1 <= e.slope.high for e in effects])
    assert 0.93 <= covered <= 0.98
    bends = np.mean([e.bend is not None and e.bend.is_shown for e in effects])
    assert bends < 0.05 + 2 * math.sqrt(0.05 * 0.95 / num_studies)


def test_saturation_is_said_where_it_is() -> None:
    """A fall that stops at 4 is said to saturate there; an even fall is not."""
    rng = np.random.default_rng(3)
    text = effect_sentence(drawn_effect(rng, per_doubling=-0.6, up_to=4))
    assert "lowers the test error by" in text
    assert "saturates: -0." in text
    assert "up to cardinality 4" in text
    rng = np.random.default_rng(31)
    even = effect_sentence(drawn_effect(rng, per_doubling=-0.3))
    assert "no saturation is shown" in even
    nothing = effect_sentence(drawn_effect(rng, per_doubling=0.0))
    assert nothing.startswith("No effect of cardinality")


def test_a_rise_after_a_fall_is_no_even_effect() -> None:
    """Errors that fall and rise again saturate by the fall, not by their average."""
    rng = np.random.default_rng(4)
    shape = (5.0, 4.5, 4.0, 4.5, 5.5)
    runs = [list(rng.normal(mean, 0.05, 4)) for mean in shape]
    found = cardinality_effect(runs, cardinalities=CARDINALITIES)
    assert found is not None and found.bend is not None
    assert found.bend.cardinality == 4
    assert found.bend.after.low > 0


@pytest.mark.parametrize(
    "runs", [[[5.0], [4.0]], [[5.0, 5.0], [4.0, 4.0]], [[5.0, 5.1], [4.0]]]
)
def test_no_spread_no_effect(runs: list[list[float]]) -> None:
    """Single or equal runs tell no effect."""
    assert cardinality_effect(runs, cardinalities=(1, 2)) is None


def two_rankings(
    rng: np.random.Generator, *, span: float, num_seeds: int, is_same: bool
) -> tuple[dict[str, list[float]], dict[str, list[float]], float]:
    """Six variants measured twice, with 0.2 points of noise, and the true tau."""
    truth = np.linspace(0, span, 6)
    other = truth if is_same else rng.permutation(truth)
    first, second = (
        {str(i): list(rng.normal(mean, 0.2, num_seeds)) for i, mean in enumerate(means)}
        for means in (truth, other)
    )
    return first, second, float(scipy_stats.kendalltau(truth, other).statistic)


@pytest.mark.slow
@pytest.mark.parametrize("is_same", [True, False])
def test_interval_of_tau_covers(is_same: bool) -> None:
    """Noisy rankings of one order, or of two, hold the true tau in 95 % or more."""
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(100):
        first, second, true = two_rankings(rng, span=0.5, num_seeds=3, is_same=is_same)
        found = agreement(first, second)
        assert found is not None
        held += found.low - 1e-9 <= true <= found.high + 1e-9
    assert held >= 91


def test_tau_and_its_ceiling() -> None:
    """Tau is scipy's; the ceiling rises with the seeds towards one."""
    rng = np.random.default_rng(6)
    ceilings = []
    for num_seeds in (2, 5, 100):
        first, second, _ = two_rankings(
            rng, span=0.5, num_seeds=num_seeds, is_same=True
        )
        found = agreement(first, second)
        means = [[np.mean(runs) for runs in side.values()] for side in (first, second)]
        assert found is not None
        assert found.tau == pytest.approx(scipy_stats.kendalltau(*means).statistic)
        ceilings.append(found.ceiling)
    assert ceilings[0] < ceilings[1] < ceilings[2]
    assert ceilings[2] > 0.9


def test_known_numbers_have_no_noise() -> None:
    """The paper's numbers are taken as they are; the runs' noise is all there is."""
    runs = {
        name: [mean, mean + 0.01]
        for name, mean in zip("abcd", (4, 3, 2, 1), strict=True)
    }
    order = {"d": [0.1], "c": [0.2], "b": [0.3], "a": [0.4], "z": [9.0]}
    found = agreement(runs, order)
    assert found is not None
    assert (found.tau, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))
    assert found.num_variants == 4
    assert agreement({"a": [1.0, 2.0]}, order) is None


def test_report_states_effect_and_ranks(tmp_path: Path) -> None:
    """The table of effects, the page and the closing sentence agree."""
    files = write_report(synthetic.study(num_seeds=5), folder=tmp_path)
    table = pd.read_csv(tmp_path / "effects.csv").set_index("effect")
    slope = table.loc["points per doubling of cardinality"]
    assert slope["ci_low"] < slope["estimate"] < slope["ci_high"] < 0
    assert files.evidence.effect == slope["statement"]
    ranks = table.loc["rank correlation with the paper's order"]
    assert ranks["ci_low"] <= ranks["estimate"] <= ranks["ci_high"]
    budgets = table.loc["rank correlation with the order after 5 of 20 epochs"]
    assert -1 <= budgets["estimate"] <= 1
    html = files.html.read_text(encoding="utf-8")
    assert "Each doubling of cardinality lowers the test error by" in html


def test_unmatched_nets_have_no_effect_of_cardinality(tmp_path: Path) -> None:
    """Where FLOPs differ, no effect at equal FLOPs is stated."""
    tables = synthetic.study()
    tables.nets["macs_error_pct"] = [0.0, 40.0, 80.0, 90.0, 96.0]
    files = write_report(tables, folder=tmp_path)
    assert files.evidence.effect == ""
    effects = pd.read_csv(tmp_path / "effects.csv")["effect"].tolist()
    assert not any("doubling" in effect for effect in effects)


def test_a_ceiling_is_never_below_zero() -> None:
    """Means that differ by noise alone leave no order: a ceiling of zero, not -0.00."""
    first = {v: [5.0 + 0.01 * i, 9.0, 1.0] for i, v in enumerate("abcdef")}
    second = {v: [5.0 - 0.01 * i, 1.0, 9.0] for i, v in enumerate("abcdef")}
    found = agreement(first, second)
    assert found is not None
    assert 0 <= found.ceiling < 0.1
    assert math.copysign(1, found.ceiling) == 1
