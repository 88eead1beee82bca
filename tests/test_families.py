"""Families of tests against scipy, statsmodels and hand calculations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower
from statsmodels.stats.weightstats import ttost_ind, ttost_paired

from resnext_ablate.numbers import families, power
from resnext_ablate.numbers.families import Look, Pairing, PairTest
from resnext_ablate.numbers.power import LEVEL, PRICE_OF_CHOICE
from resnext_ablate.numbers.stats import Floats


def against_first(
    groups: list[Floats], *, margin: float = 0.5, pairing: Pairing = "auto"
) -> tuple[PairTest, ...]:
    return families.compare_pairs(
        [dict(enumerate(group.tolist())) for group in groups],
        pairs=[(i, 0) for i in range(1, len(groups))],
        margin=margin,
        family="reference",
        pairing=pairing,
        look=Look(),
    )


def drawn(sizes: tuple[int, ...], *, step: float = 0.1, seed: int = 5) -> list[Floats]:
    rng = np.random.default_rng(seed)
    return [rng.normal(5 - step * i, 0.2, n) for i, n in enumerate(sizes)]


def test_dunnett_and_welch_against_scipy() -> None:
    """The larger of Dunnett's and Welch's p-value, the wider of their intervals."""
    base, *arms = drawn((4, 3, 6, 5))
    found = against_first([base, *arms])
    dunnett = scipy_stats.dunnett(*arms, control=base, rng=np.random.default_rng(1))
    welch = [scipy_stats.ttest_ind(arm, base, equal_var=False) for arm in arms]
    assert {one.method for one in found} == {"Dunnett"}
    assert [one.p_value for one in found] == pytest.approx([w.pvalue for w in welch])
    larger = np.maximum(dunnett.pvalue, [w.pvalue for w in welch])
    expected = np.minimum(PRICE_OF_CHOICE * larger, 1)
    assert [one.p_corrected for one in found] == pytest.approx(expected, abs=1e-3)
    simultaneous = dunnett.confidence_interval(1 - LEVEL)
    own = [w.confidence_interval(1 - LEVEL) for w in welch]
    halves = np.maximum(
        (simultaneous.high - simultaneous.low) / 2, [(w.high - w.low) / 2 for w in own]
    )
    assert [one.half_width for one in found] == pytest.approx(halves, rel=5e-3)


def test_equivalence_against_statsmodels() -> None:
    """Two one-sided tests: the larger of the pooled, Holm-corrected, and Welch's."""
    base, arm = drawn((5, 6), step=0.02)
    (found,) = against_first([base, arm], margin=0.3)
    pooled = ttost_ind(arm, base, -0.3, 0.3, usevar="pooled")[0]
    welch = ttost_ind(arm, base, -0.3, 0.3, usevar="unequal")[0]
    assert found.p_equivalent == pytest.approx(PRICE_OF_CHOICE * max(pooled, welch))


def test_one_noisy_variant_is_judged_by_its_own_spread() -> None:
    """A wild variant is no discovery, though the pooled spread would have it so."""
    base, *quiet = (5 + x - x.mean() for x in drawn((3, 3, 3, 3, 3), step=0))
    wild = 5.6 + np.array([-0.35, 0.0, 0.35])
    *_, found = against_first([base, *quiet, wild])
    alone = scipy_stats.ttest_ind(wild, base, equal_var=False).pvalue
    dunnett = scipy_stats.dunnett(
        *quiet, wild, control=base, rng=np.random.default_rng(1)
    )
    assert dunnett.pvalue[-1] < 0.05 < alone
    assert found.p_corrected == pytest.approx(PRICE_OF_CHOICE * alone)
    assert found.half_width > abs(found.difference)


def test_plainly_unequal_spreads_are_not_pooled() -> None:
    """Where Bartlett's test says so, Welch's p-values are Holm-corrected."""
    base = np.array([5.0, 5.1, 4.9, 5.05])
    arms = [np.array([3.0, 7.0, 1.0, 8.0]), base[::-1] - 0.4, base[::-1] - 0.15]
    found = against_first([base, *arms])
    welch = [scipy_stats.ttest_ind(arm, base, equal_var=False).pvalue for arm in arms]
    assert all(one.method.startswith("Welch, Holm") for one in found)
    holm = multipletests(welch, method="holm")[1]
    assert [one.p_corrected for one in found] == pytest.approx(PRICE_OF_CHOICE * holm)
    tost = [ttost_ind(arm, base, -0.5, 0.5, usevar="unequal")[0] for arm in arms]
    expected = np.minimum(PRICE_OF_CHOICE * multipletests(tost, method="holm")[1], 1)
    assert [one.p_equivalent for one in found] == pytest.approx(expected)


def test_pairs_are_corrected_by_holm() -> None:
    """Each with each: pooled t-tests of all pairs, Holm-corrected, and Welch's."""
    groups = drawn((4, 4, 4, 4), step=0.25)
    pairs = [(a, b) for a in range(4) for b in range(a)]
    found = families.compare_pairs(
        [dict(enumerate(group.tolist())) for group in groups],
        pairs=pairs,
        margin=0.5,
        family="pairs",
        pairing="unpaired",
        look=Look(),
    )
    sd = math.sqrt(np.mean([group.var(ddof=1) for group in groups]))
    t = [abs(groups[a].mean() - groups[b].mean()) / sd * math.sqrt(2) for a, b in pairs]
    holm = multipletests(2 * scipy_stats.t.sf(t, 12), method="holm")[1]
    welch = [
        scipy_stats.ttest_ind(groups[a], groups[b], equal_var=False).pvalue
        for a, b in pairs
    ]
    expected = np.minimum(PRICE_OF_CHOICE * np.maximum(holm, welch), 1)
    assert [one.p_corrected for one in found] == pytest.approx(expected)
    bonferroni = scipy_stats.t.isf(LEVEL / 2 / 6, 12) * sd / math.sqrt(2)
    assert all(one.half_width >= bonferroni * (1 - 1e-9) for one in found)


def shared_shifts(num_seeds: int, *, num_variants: int = 4) -> list[Floats]:
    """Groups whose seeds shift all variants alike, far more than they scatter."""
    rng = np.random.default_rng(8)
    shifts = rng.normal(0, 1.0, num_seeds)
    return [
        5 - 0.3 * i + shifts + rng.normal(0, 0.1, num_seeds)
        for i in range(num_variants)
    ]


def test_pairing_by_hand() -> None:
    """Paired runs: a t-test on the differences, Dunnett on the residual spread."""
    base, arm = shared_shifts(6, num_variants=2)
    (found,) = against_first([base, arm], pairing="paired", margin=0.6)
    theirs = scipy_stats.ttest_rel(arm, base)
    # Two variants: the residual spread is that of the differences, one test is both.
    assert found.p_value == pytest.approx(theirs.pvalue)
    assert found.p_corrected == pytest.approx(1.04 * theirs.pvalue, abs=1e-6)
    interval = theirs.confidence_interval(1 - LEVEL)
    assert found.half_width == pytest.approx((interval.high - interval.low) / 2)
    tost = ttost_paired(arm, base, -0.6, 0.6)[0]
    assert found.p_equivalent == pytest.approx(1.04 * tost)


def test_residuals_choose_the_pairing() -> None:
    """Common shifts of the seeds pair the runs; independent seeds do not."""
    correlated, independent = shared_shifts(4), drawn((4, 4, 4, 4))
    assert {one.method for one in against_first(correlated)} == {
        "Dunnett, paired by seed"
    }
    assert {one.method for one in against_first(independent)} == {"Dunnett"}
    fixed = against_first(correlated, pairing="unpaired")
    assert {one.method for one in fixed} == {"Dunnett"}
    assert fixed[2].half_width > 3 * against_first(correlated)[2].half_width


@pytest.mark.parametrize("moved", [0.0, 3.0, -40.0])
def test_pairing_does_not_see_the_differences(moved: float) -> None:
    """Moving a variant's mean changes neither choice made beforehand."""
    for groups in (shared_shifts(4), drawn((4, 4, 4, 4))):
        before = against_first(groups)
        after = against_first([groups[0], groups[1] + moved, *groups[2:]])
        assert [a.method for a in after] == [b.method for b in before]
        assert [a.half_width for a in after] == pytest.approx(
            [b.half_width for b in before]
        )


def test_a_missing_run_unpairs_unless_pairing_is_fixed() -> None:
    """Auto pairs whole tables only; "paired" takes the seeds that all share."""
    groups = [dict(enumerate(group.tolist())) for group in shared_shifts(5)]
    del groups[2][3]
    pairs = [(i, 0) for i in range(1, 4)]

    def of(pairing: Pairing) -> tuple[PairTest, ...]:
        return families.compare_pairs(
            groups,
            pairs=pairs,
            margin=0.5,
            family="reference",
            pairing=pairing,
            look=Look(),
        )

    auto = of("auto")
    assert {one.method for one in auto} == {"Dunnett"}
    assert [one.num_first for one in auto] == [5, 4, 5]
    fixed = of("paired")
    assert {one.method for one in fixed} == {"Dunnett, paired by seed"}
    assert [one.num_first for one in fixed] == [4, 4, 4]


@pytest.mark.parametrize(
    ("num_seeds", "expected"), [(3, 0.61), (5, 0.41), (10, 0.27), (20, 0.18)]
)
def test_detectable_difference_of_one_test(num_seeds: int, expected: float) -> None:
    """One t-test at a spread of 0.2 points detects what power analysis says."""
    df = 2 * num_seeds - 2
    critical = float(scipy_stats.t.isf(0.025, df))
    found = power.detectable_shift(critical, df=df) * 0.2 * math.sqrt(2 / num_seeds)
    effect = TTestIndPower().solve_power(nobs1=num_seeds, alpha=0.05, power=0.8)
    assert found == pytest.approx(0.2 * effect, rel=1e-4)
    assert found == pytest.approx(expected, abs=0.006)


def test_detectable_difference_stays_finite() -> None:
    """Huge critical values, where the noncentral t of scipy fails, stay finite."""
    shift = power.detectable_shift(200.0, df=2)
    assert 200 < shift < 400


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("num_seeds", [3, 5])
def test_detectable_difference_of_both_tests(num_seeds: int, paired: bool) -> None:
    """The difference said to be detectable is claimed in about 80 % of studies."""
    shift = power.planned_detectable_in_sd(
        num_seeds, num_variants=4, family="reference", paired=paired
    )
    rng = np.random.default_rng(11)
    num_studies = 1500
    claimed = 0
    for _ in range(num_studies):
        groups = rng.normal(5, 1, (4, num_seeds))
        groups[1] -= shift
        tests = against_first(list(groups), pairing="paired" if paired else "unpaired")
        claimed += tests[0].p_corrected < 0.05
    # Two and a half standard errors; Bartlett's test costs up to one point besides.
    assert claimed / num_studies == pytest.approx(0.8, abs=0.026)


def test_seeds_to_decide() -> None:
    """Seeds grow as the difference shrinks, and end as more than can be counted."""

    def seeds(difference: float, *, sd: float = 0.2, margin: float = 0.2) -> float:
        return power.seeds_to_decide(
            difference,
            sd=sd,
            margin=margin,
            num_variants=2,
            family="reference",
            paired=False,
        )

    # 9 seeds per arm see 0.3 points at a spread of 0.2 with 80 % power.
    assert seeds(0.3) == 9
    assert seeds(-0.3) == seeds(0.3)
    assert seeds(1.0) < seeds(0.3)
    assert seeds(0.0) < 30  # That it lies within the margin can be shown.
    assert math.isinf(seeds(0.05, sd=1.0, margin=0.1))
