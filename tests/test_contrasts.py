"""Contrasts of several variants: estimates, intervals, verdicts, error rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from resnext_ablate.evidence.contrasts import Contrast, Estimate, estimate, verdict_of

PAIR = Contrast("b less a", {"b": 1.0, "a": -1.0}, -1)
DOUBLE = Contrast("what b loses less a", {"d": 1, "c": -1, "b": -1, "a": 1}, -1)


def drawn(
    means: dict[str, float],
    *,
    num_seeds: int,
    sd: float = 1.0,
    shared_sd: float = 0.0,
    rng: np.random.Generator,
) -> dict[str, dict[int, float]]:
    shared = shared_sd * rng.standard_normal(num_seeds)
    return {
        variant: dict(enumerate(mean + shared + sd * rng.standard_normal(num_seeds)))
        for variant, mean in means.items()
    }


def test_pair_without_common_shifts_is_welchs_test() -> None:
    """Difference and interval are scipy's, at the level that pays for the choice."""
    errors = drawn({"a": 6.0, "b": 5.0}, num_seeds=5, rng=np.random.default_rng(0))
    (found,) = estimate(errors, contrasts=[PAIR])
    test = stats.ttest_ind(
        list(errors["b"].values()), list(errors["a"].values()), equal_var=False
    )
    low, high = test.confidence_interval(1 - 0.05 / 1.04)
    assert not found.is_paired
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.points == pytest.approx((low + high) / 2)


def test_common_shifts_of_seeds_are_taken_out() -> None:
    """Where seeds shift all variants alike, the sum is that of each seed."""
    errors = drawn(
        {"a": 6.0, "b": 5.0, "c": 6.0, "d": 5.5},
        num_seeds=6,
        sd=0.1,
        shared_sd=2.0,
        rng=np.random.default_rng(1),
    )
    (found,) = estimate(errors, contrasts=[PAIR])
    assert found.is_paired
    assert found.high - found.low < 0.6
    assert found.verdict == "consistent"


def test_sum_over_four_variants_is_exact() -> None:
    """Weights multiply means; the variances of all four count."""
    errors = {
        "a": {0: 1.0, 1: 3.0},
        "b": {0: 10.0, 1: 12.0},
        "c": {0: 5.0, 1: 7.0},
        "d": {0: 11.0, 1: 13.0},
    }
    (found,) = estimate(errors, contrasts=[DOUBLE])
    assert found.points == pytest.approx((12 - 6) - (11 - 2))
    # Four equal variances of 2, two runs each: standard error 2 with 4 df.
    half = stats.t.isf(0.05 / 1.04 / 2, 4) * 2
    assert found.high - found.points == pytest.approx(half)


@pytest.mark.parametrize(
    ("errors", "why"),
    [
        ({"a": {0: 1.0}, "b": {0: 2.0, 1: 3.0}}, "one run has no spread"),
        ({"a": {0: 1.0, 1: 1.0}, "b": {0: 2.0, 1: 2.0}}, "equal runs show none"),
    ],
)
def test_no_spread_decides_nothing(
    errors: dict[str, dict[int, float]], why: str
) -> None:
    """Without a spread there is no interval, and no verdict but undecided."""
    (found,) = estimate(errors, contrasts=[PAIR])
    assert found.verdict == "undecided", why
    assert math.isnan(found.low) and math.isnan(found.seeds_to_decide)


def test_several_contrasts_widen_each_interval() -> None:
    """The intervals of one claim hold together."""
    rng = np.random.default_rng(2)
    errors = drawn(dict.fromkeys("abcd", 5.0), num_seeds=5, rng=rng)
    (alone,) = estimate(errors, contrasts=[PAIR])
    among, _, _ = estimate(errors, contrasts=[PAIR, DOUBLE, DOUBLE])
    assert among.points == alone.points
    assert among.low < alone.low < alone.high < among.high


def test_claim_holds_where_all_of_it_does() -> None:
    """One contradicted part contradicts the whole, one open part leaves it open."""
    assert verdict_of(["consistent", "consistent"]) == "consistent"
    assert verdict_of(["consistent", "undecided"]) == "undecided"
    assert verdict_of(["undecided", "contradicted"]) == "contradicted"


def test_sign_decides_between_consistent_and_contradicted() -> None:
    """The same runs speak for one claim and against its opposite."""
    errors = drawn({"a": 9.0, "b": 2.0}, num_seeds=4, rng=np.random.default_rng(3))
    opposite = Contrast("b less a", PAIR.weights, 1)
    (found,) = estimate(errors, contrasts=[PAIR])
    (against,) = estimate(errors, contrasts=[opposite])
    assert (found.verdict, against.verdict) == ("consistent", "contradicted")


def simulated(
    means: dict[str, float],
    *,
    contrasts: list[Contrast],
    num_seeds: int,
    shared_sd: float,
    num_studies: int = 1500,
) -> list[tuple[Estimate, ...]]:
    rng = np.random.default_rng(7)
    return [
        estimate(
            drawn(means, num_seeds=num_seeds, shared_sd=shared_sd, rng=rng),
            contrasts=contrasts,
        )
        for _ in range(num_studies)
    ]


@pytest.mark.parametrize("num_seeds", [3, 5])
@pytest.mark.parametrize("shared_sd", [0.0, 2.0])
def test_equal_variants_are_seldom_told_apart(num_seeds: int, shared_sd: float) -> None:
    """Where nothing differs, a claim of three parts is decided in at most 5 %.

    1,500 studies leave 0.6 points of doubt.
    """
    other = Contrast("c less a", {"c": 1.0, "a": -1.0}, -1)
    found = simulated(
        dict.fromkeys("abcd", 6.0),
        contrasts=[PAIR, other, DOUBLE],
        num_seeds=num_seeds,
        shared_sd=shared_sd,
    )
    decided = [any(one.verdict != "undecided" for one in claim) for claim in found]
    assert np.mean(decided) <= 0.05 + 3 * 0.006


def test_variant_that_scatters_more_gains_little() -> None:
    """Beside small spreads of others, 4 claims of 100 too many at most, at 3 seeds."""
    rng = np.random.default_rng(8)
    decided = []
    for _ in range(1500):
        errors = drawn(dict.fromkeys("abcd", 6.0), num_seeds=3, rng=rng)
        errors["b"] = {seed: 6 + 5 * (x - 6) for seed, x in errors["b"].items()}
        (found,) = estimate(errors, contrasts=[PAIR])
        decided.append(found.verdict != "undecided")
    assert np.mean(decided) <= 0.09


def test_intervals_hold_the_truth_and_power_is_what_was_promised() -> None:
    """95 % of the intervals hold the truth; the seeds asked for decide 4 times in 5."""
    truth = {"a": 6.0, "b": 4.6, "c": 6.0, "d": 6.0}
    few = simulated(truth, contrasts=[PAIR], num_seeds=5, shared_sd=0.0)
    inside = [one.low <= -1.4 <= one.high for (one,) in few]
    assert abs(np.mean(inside) - 0.95) < 0.02
    # By the noncentral t: 10 seeds show 1.4 spreads in 84 %, 9 in 79 %.
    assert (
        np.median([one.seeds_to_decide for (one,) in few if one.low < 0 < one.high]) > 5
    )
    many = simulated(truth, contrasts=[PAIR], num_seeds=10, shared_sd=0.0)
    assert np.mean([one.verdict == "consistent" for (one,) in many]) > 0.8


def test_seeds_to_decide_are_those_of_the_noncentral_t() -> None:
    """So many have 80 % power if the difference seen is true; one less has not."""
    spread = np.array([-1.0, 0.0, 1.0, 0.5, -0.5])
    errors = {
        "a": dict(enumerate(spread)),
        "b": dict(enumerate(spread[[2, 0, 3, 4, 1]] - 0.8)),
    }
    (found,) = estimate(errors, contrasts=[PAIR])
    sd = float(np.std(spread, ddof=1))

    def power(num_seeds: int) -> float:
        df = 2 * (num_seeds - 1)
        critical = stats.t.isf(0.05 / 1.04 / 2, df)
        shift = 0.8 / (sd * math.sqrt(2 / num_seeds))
        return float(stats.nct.sf(critical, df, shift))

    needed = int(found.seeds_to_decide)
    assert power(needed) >= 0.8 > power(needed - 1)
