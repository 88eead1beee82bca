"""Looks keep the error rate, save runs, and are replayed from the runs alone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats
from test_error_rates import draw_study, noise_pct

from resnext_ablate.numbers import looks, power, stats
from resnext_ablate.numbers.verdicts import Rules, compare

RULES = Rules(0.5)
MAX_SEEDS = 10
NUM_FULL = 4_000


def replayed(runs: dict[str, dict[int, float]], rules: Rules = RULES) -> looks.Standing:
    return looks.replay(runs, reference="base", rules=rules, max_seeds=MAX_SEEDS)


def test_looks_are_those_of_the_readme() -> None:
    """Six looks, whose levels rise; more comparisons change them little."""
    plan = looks.planned(max_seeds=10, num_comparisons=5, family="reference")
    assert [look.num_seeds for look in plan] == [3, 4, 5, 6, 8, 10]
    assert [look.level for look in plan] == pytest.approx(
        [0.0090, 0.0079, 0.0097, 0.0119, 0.0204, 0.0269], abs=5e-5
    )
    pairs = looks.planned(max_seeds=10, num_comparisons=15, family="pairs")
    assert [look.level for look in pairs] == pytest.approx(
        [look.level for look in plan], rel=0.25
    )


def test_one_look_has_the_whole_rate() -> None:
    """At three seeds at most there is one look, and it is the fixed test."""
    (only,) = looks.planned(max_seeds=3, num_comparisons=4, family="reference")
    assert only.level == pytest.approx(stats.ALPHA, rel=1e-6)


def test_looks_err_together_as_often_as_one_test() -> None:
    """Sums of normal draws leave some bound in the rate that was to be spent."""
    plan = looks.planned(max_seeds=10, num_comparisons=1, family="reference")
    bounds = scipy_stats.norm.isf([look.level / 2 for look in plan])
    rng = np.random.default_rng(0)
    sums = rng.standard_normal((400_000, 10)).cumsum(axis=1)
    numbers = np.array([look.num_seeds for look in plan])
    left = np.abs(sums[:, numbers - 1]) > bounds * np.sqrt(numbers)
    by_look = left.cumsum(axis=1).astype(bool).mean(axis=0)
    spent = stats.ALPHA * (numbers / 10) ** 1.5
    assert by_look == pytest.approx(spent, abs=0.001)


def test_replay_asks_for_what_the_next_look_needs() -> None:
    """First three seeds of all, then seeds of what is open and of the reference."""
    rng = np.random.default_rng(1)
    whole = {
        label: dict(enumerate(rng.normal(mean, 0.2, MAX_SEEDS).tolist()))
        for label, mean in {"base": 5.0, "far": 3.0, "near": 4.6}.items()
    }
    have: dict[str, dict[int, float]] = {label: {} for label in whole}
    first = replayed(have)
    assert first.missing == tuple((v, s) for s in range(3) for v in whole)
    assert {one.num_looks for one in first.comparisons} == {0}
    assert "first look comes after 3 seeds" in first.comparisons[0].explanation
    asked = []
    while (standing := replayed(have)).missing:
        asked.append(standing.missing)
        for variant, seed in standing.missing:
            have[variant][seed] = whole[variant][seed]
    assert set(asked[1]) == {("base", 3), ("near", 3)}
    far, near = standing.comparisons
    assert (far.verdict, far.num_looks, far.num_variant) == ("worse", 1, 3) or (
        far.verdict,
        far.num_looks,
        far.num_reference,
    ) == ("better", 1, 3)
    assert "closed at look 1 of 6, 3 seeds" in far.explanation
    assert near.num_looks > 1
    assert standing.num_seeds["far"] == 3
    assert standing.num_seeds["base"] == standing.num_seeds["near"] == len(have["near"])
    # What would have come later changes nothing.
    assert replayed(whole) == standing


def test_p_values_are_those_of_the_look() -> None:
    """At the first look p-values are multiplied by 0.05 / level, intervals widened."""
    runs = draw_study(np.random.default_rng(2), num_seeds=3)
    fixed = compare(runs, reference="base", rules=RULES)
    seen = replayed(runs).comparisons
    level = looks.planned(max_seeds=10, num_comparisons=5, family="reference")[0].level
    for before, now in zip(fixed, seen, strict=True):
        expected = min(1.0, before.p_corrected * stats.ALPHA / level)
        assert now.p_corrected == pytest.approx(expected)
        assert now.low < before.low and now.high > before.high
        assert now.p_value == before.p_value


def test_closed_variants_count_in_the_family_and_in_the_spread() -> None:
    """A look at one open pair of five is Dunnett's test of five arms at its level."""
    runs = draw_study(
        np.random.default_rng(7), num_seeds=4, effects=(0, -0.4, 3, 3, 3, 3)
    )
    pair = replayed(runs).comparisons[0]
    assert pair.num_looks == 2
    groups = [list(runs[v].values()) for v in ("base", "a")]
    groups += [list(runs[v].values())[:3] for v in "bcde"]
    arrays = [np.array(group) for group in groups]
    sd, df = stats.pooled_sd(arrays), 3 + 3 + 4 * 2
    t = abs(arrays[0].mean() - arrays[1].mean()) / (sd * math.sqrt(2 / 4))
    family = stats.dunnett_p(
        np.array([t]), correlations=np.full(5, math.sqrt(0.5)), df=df
    )[0]
    own = scipy_stats.ttest_ind(arrays[1], arrays[0], equal_var=False).pvalue
    level = looks.planned(max_seeds=10, num_comparisons=5, family="reference")[1].level
    raw = power.PRICE_OF_CHOICE * max(family, own)
    assert pair.p_corrected == pytest.approx(min(1.0, raw * 0.05 / level))


def test_runs_without_a_result_do_not_hold_a_look_up() -> None:
    """A failed run counts as ended; its variant is compared by what it has."""
    runs = draw_study(np.random.default_rng(3), num_seeds=10)
    runs["a"] |= {0: math.nan, 1: math.nan}
    standing = replayed(runs)
    assert not standing.missing
    one = standing.comparisons[0]
    assert one.num_looks > 1
    assert one.num_variant == one.num_reference - 2


def test_a_study_of_one_variant_takes_its_first_seeds() -> None:
    """Nothing to compare: three seeds, and no look adds any."""
    assert replayed({"base": {}}).missing == (("base", 0), ("base", 1), ("base", 2))
    assert replayed({"base": {0: 5.0, 1: 5.1, 2: 5.2}}).missing == ()


def test_pairs_go_on_while_any_of_theirs_is_open() -> None:
    """Each with each: two far variants close against the rest, a near pair goes on."""
    rng = np.random.default_rng(4)
    means = {"base": 5.0, "near": 4.5, "far": 9.0}
    runs = {
        label: dict(enumerate(rng.normal(mean, 0.3, 10).tolist()))
        for label, mean in means.items()
    }
    standing = replayed(runs, replace(RULES, family="pairs"))
    assert standing.num_seeds["far"] < standing.num_seeds["near"]
    assert [one.verdict for one in standing.comparisons].count("worse") == 2


def test_sentence_says_where_comparisons_closed() -> None:
    """Before any look, in between, and at the end."""
    runs = draw_study(
        np.random.default_rng(7), num_seeds=10, effects=(0, -0.4, 3, 3, 3, 3)
    )
    empty: dict[str, dict[int, float]] = {label: {} for label in runs}
    assert "first look comes after 3 seeds" in looks.sentence(replayed(empty))
    three = {v: {s: one[s] for s in range(3)} for v, one in runs.items()}
    assert "4 closed at look 1 (3 seeds), 1 open after look 1 (3 seeds)." in (
        looks.sentence(replayed(three))
    )
    end = looks.sentence(replayed(runs))
    assert (
        "after 3, 4, 5, 6, 8, 10 seeds: 4 closed at look 1 (3 seeds), 1 closed" in end
    )


def rates_pct(
    num_studies: int,
    *,
    effects: tuple[float, ...] = (0.0,) * 6,
    sds: tuple[float, ...] = (0.2,) * 6,
    correlation: float = 0.0,
) -> dict[str, float]:
    """Percent of runs saved, of studies with a false claim, of differences shown.

    `shown` and `shown_fixed` compare with ten seeds of every variant.
    """
    rng = np.random.default_rng(30)
    runs = false = false_equal = 0
    shown = {"shown": 0, "shown_fixed": 0}
    for _ in range(num_studies):
        study = draw_study(
            rng, num_seeds=10, effects=effects, sds=sds, correlation=correlation
        )
        standing = replayed(study)
        runs += sum(standing.num_seeds.values())
        found = list(zip(standing.comparisons, effects[1:], strict=True))
        claimed = [(one, d) for one, d in found if one.verdict in ("better", "worse")]
        false += any(one.verdict != _truth(d) for one, d in claimed)
        false_equal += any(
            one.verdict.startswith("equivalent") and abs(d) >= 0.5 for one, d in found
        )
        if any(effects):
            fixed = compare(study, reference="base", rules=RULES)
            shown["shown_fixed"] += sum(
                one.verdict == _truth(d)
                for one, d in zip(fixed, effects[1:], strict=True)
                if d
            )
        shown["shown"] += sum(one.verdict == _truth(d) for one, d in found if d)
    num_different = max(1, np.count_nonzero(effects))
    return {
        "saved": 100 - 100 * runs / num_studies / 60,
        "false": 100 * false / num_studies,
        "false_equal": 100 * false_equal / num_studies,
        **{k: 100 * v / num_studies / num_different for k, v in shown.items()},
    }


def _truth(difference: float) -> str:
    return "better" if difference < 0 else "worse" if difference > 0 else "equal"


def test_equal_variants_save_runs_at_the_error_rate() -> None:
    """Six equal variants: 40 % of the runs are saved, false claims stay rare."""
    found = rates_pct(400)
    assert found["saved"] > 40
    assert found["false"] < 5 + noise_pct(400)


def test_different_variants_save_runs_at_little_power() -> None:
    """Differences of the paper's size are shown with a third of the runs."""
    found = rates_pct(60, effects=(0.0, -0.9, -1.3, -1.6, -1.7, -1.5))
    assert found["saved"] > 55
    assert found["shown"] == 100


NOISY_ONE = (0.2, 1.0, 0.2, 0.2, 0.2, 0.2)
NOISY_REFERENCE = (1.0, 0.2, 0.2, 0.2, 0.2, 0.2)


@pytest.mark.full
@pytest.mark.parametrize(
    ("sds", "correlation", "limit_pct"),
    [
        ((0.2,) * 6, 0.0, 5.0),
        ((0.4,) * 6, 0.0, 5.0),
        ((0.2,) * 6, 0.8, 5.0),
        (NOISY_ONE, 0.0, 7.5),
        (NOISY_REFERENCE, 0.0, 7.5),
    ],
)
def test_false_claims_full_size(
    sds: tuple[float, ...], correlation: float, limit_pct: float
) -> None:
    """The README's rates of false claims over all looks."""
    found = rates_pct(NUM_FULL, sds=sds, correlation=correlation)
    print(f"sds {sds}, correlation {correlation}: {found}")
    assert found["false"] < limit_pct + noise_pct(NUM_FULL)


@pytest.mark.full
@pytest.mark.parametrize(
    ("effects", "sd", "least_saved_pct"),
    [
        ((0.0, -0.9, -1.3, -1.6, -1.7, -1.5), 0.2, 60),
        ((0.0, -0.5, 0.0, 0.0, 0.0, 0.0), 0.2, 40),
        ((0.0, -0.2, -0.4, -0.6, -0.8, -1.0), 0.2, 40),
        ((0.0, 0.5, 0.5, 0.5, 0.5, 0.5), 0.2, 40),
        ((0.0, -0.6, 0.0, 0.0, 0.0, 0.0), 0.3, 10),
    ],
)
def test_savings_and_power_full_size(
    effects: tuple[float, ...], sd: float, least_saved_pct: float
) -> None:
    """The README's savings, and power beside ten seeds of every variant."""
    found = rates_pct(NUM_FULL // 5, effects=effects, sds=(sd,) * 6)
    print(f"effects {effects}, sd {sd}: {found}")
    assert found["saved"] > least_saved_pct
    assert found["false_equal"] < 5 + noise_pct(NUM_FULL // 5)
