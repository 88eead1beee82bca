"""Verdicts claim what the runs show and no more."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from resnext_ablate.numbers.verdicts import Comparison, Rules, compare, study_verdict

SPREAD = np.array([-0.1, 0.0, 0.1])
SETTING = "At equal FLOPs (within 2.6 %)"


def _compare(**runs: object) -> dict[str, Comparison]:
    found = compare(_by_seed(runs), reference="base", rules=Rules(0.5))
    return {comparison.variant: comparison for comparison in found}


def _by_seed(runs: Mapping[str, object]) -> dict[str, dict[int, float]]:
    return {
        label: dict(enumerate(np.asarray(values, dtype=float).tolist()))
        for label, values in runs.items()
    }


def _sentence(**runs: object) -> str:
    values = _by_seed(runs)
    found = compare(values, reference="base", rules=Rules(0.5))
    return study_verdict(values, found, reference="base", setting=SETTING)


def test_each_verdict() -> None:
    """Clear differences, clear equality and open cases get their own words."""
    found = _compare(
        base=5 + 2 * SPREAD,
        good=4 + 2 * SPREAD,
        bad=6 + 2 * SPREAD,
        same=5.01 + 2 * SPREAD,
        close=4.6 + 2 * SPREAD,
    )
    assert {label: one.verdict for label, one in found.items()} == {
        "good": "better",
        "bad": "worse",
        "same": "equivalent within 0.5 points",
        "close": "undecided",
    }
    assert found["good"].difference == pytest.approx(-1)
    # 3 runs in 5 groups: 10 degrees of freedom, Dunnett's critical value for 4.8 %.
    half = 2.914 * 0.2 * math.sqrt(2 / 3)
    assert found["good"].low == pytest.approx(-1 - half, abs=0.002)
    assert found["good"].high == pytest.approx(-1 + half, abs=0.002)
    assert found["close"].detectable > half
    assert "go unseen" in found["close"].explanation
    assert found["close"].seeds_to_decide > 3


def test_noisy_runs_are_undecided() -> None:
    """A difference inside the noise is neither better nor equivalent."""
    found = _compare(base=5 + 10 * SPREAD, other=4.5 + 10 * SPREAD)
    assert found["other"].verdict == "undecided"
    assert found["other"].seeds_to_decide > 3


@pytest.mark.parametrize(
    ("base", "other", "why"),
    [
        ([5.0], [4.0], "one run"),
        ([5.0, 5.1], [4.0], "one run"),
        ([5.0, 5.1], [], "no complete run of other"),
        ([], [4.0, 4.1], "no complete run of base"),
        ([5.0, 5.0, 5.0], [4.0, 4.0, 4.0], "equal values"),
        ([0.3, 0.3, 0.3], [0.1, 0.1, 0.1], "equal values"),
    ],
)
def test_no_spread_no_claim(base: list[float], other: list[float], why: str) -> None:
    """Without a spread on both sides there is no interval, no p-value, no claim."""
    found = _compare(base=base, other=other)["other"]
    assert found.verdict == "undecided"
    assert why in found.explanation
    assert found.correction == "none"
    unknown = (found.low, found.high, found.p_value, found.p_corrected)
    assert all(math.isnan(value) for value in unknown)


def test_equal_values_in_one_variant() -> None:
    """A variant whose seeds agree by chance is judged by the spread of the others."""
    found = _compare(base=5 + SPREAD, tied=[4, 4, 4], same=[5, 5, 5], far=6 + SPREAD)
    assert found["tied"].verdict == "better"
    assert found["tied"].high - found["tied"].low > 0.2
    assert found["same"].difference == 0
    assert found["same"].p_corrected == pytest.approx(1)


def test_single_runs_do_not_disturb_the_others() -> None:
    """A variant with one run changes nothing for the variants that have more."""
    alone = _compare(base=5 + SPREAD, good=4 + SPREAD)
    beside = _compare(base=5 + SPREAD, good=4 + SPREAD, new=[9.0])
    assert beside["good"] == alone["good"]
    assert beside["new"].verdict == "undecided"
    assert beside["new"].difference == pytest.approx(4)


def test_sentence_names_the_best() -> None:
    """The sentence gives the largest shown difference, its interval and the rest."""
    text = _sentence(base=5 + SPREAD, a=4 + SPREAD, b=3.5 + SPREAD, c=5.0 + SPREAD)
    assert text.startswith(f"{SETTING}, b has 1.50 points less test error than base ")
    assert "3 runs each). Of the others, 1 is better, 1 is equivalent within" in text


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ({"base": [], "a": []}, "No run is complete"),
        ({"base": [], "a": [4.0, 4.1]}, "The reference base has no complete run"),
        ({"base": [5.0], "a": [4.0]}, "nothing can be claimed: one run"),
        ({"base": [5.0, 5.2]}, "base has a test error of 5.10 % [3.83, 6.37]; there"),
        ({"base": [5.0]}, "base has a test error of 5.00 %; there is no other"),
        ({"base": 5 + SPREAD, "a": 5 + SPREAD}, "a is equivalent to base within 0.5"),
        ({"base": 5 + SPREAD, "a": 6 + SPREAD}, "no variant is shown to be better"),
        (
            {"base": 5 + 9 * SPREAD, "a": 4.4 + 9 * SPREAD},
            "no variant can be told from base: a true difference below",
        ),
    ],
)
def test_sentence_of_other_outcomes(runs: dict[str, object], expected: str) -> None:
    """Each kind of outcome has its own sentence."""
    assert expected in _sentence(**runs)
