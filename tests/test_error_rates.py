"""How often a report is wrong, by simulated studies of known truth.

The default run is bounded; `-m full` runs the sizes whose figures the README gives.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from resnext_ablate.numbers import stats
from resnext_ablate.numbers.verdicts import Comparison, Rules, compare, study_verdict

VARIANTS = ("base", "a", "b", "c", "d", "e")
CLAIM = re.compile(r"less test error than|\d (is|are) (better|worse)")
Runs = dict[str, dict[int, float]]


def draw_study(
    rng: np.random.Generator,
    *,
    num_seeds: int,
    effects: tuple[float, ...] = (0.0,) * 6,
    sds: tuple[float, ...] = (0.2,) * 6,
    correlation: float = 0.0,
) -> Runs:
    """Test errors of six variants, in percent, whose seeds may shift all alike."""
    shared = rng.standard_normal(num_seeds) * math.sqrt(correlation)
    own = rng.standard_normal((len(sds), num_seeds)) * math.sqrt(1 - correlation)
    table = 5 + np.array(effects)[:, None] + np.array(sds)[:, None] * (shared + own)
    return {
        label: dict(enumerate(row))
        for label, row in zip(VARIANTS, table.tolist(), strict=True)
    }


def concluded(runs: Runs) -> tuple[tuple[Comparison, ...], str]:
    """What the report says of a study: its comparisons and its sentence."""
    found = compare(runs, reference="base", rules=Rules(0.5))
    text = study_verdict(runs, found, reference="base", setting="At equal FLOPs")
    return found, text


def false_claims_pct(
    num_studies: int,
    *,
    num_seeds: int,
    sds: tuple[float, ...] = (0.2,) * 6,
    correlation: float = 0.0,
) -> float:
    """Studies of equal variants whose sentence claims a difference, in percent."""
    rng = np.random.default_rng(20)
    false = 0
    for _ in range(num_studies):
        runs = draw_study(rng, num_seeds=num_seeds, sds=sds, correlation=correlation)
        found, text = concluded(runs)
        claims = any(one.verdict in ("better", "worse") for one in found)
        assert claims == bool(CLAIM.search(text)), text
        false += claims
    return 100 * false / num_studies


def noise_pct(num_studies: int, *, rate_pct: float = 5.0) -> float:
    """Two standard errors of a simulated rate."""
    return 2 * math.sqrt(rate_pct * (100 - rate_pct) / num_studies)


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_null_studies_are_rarely_claimed(num_seeds: int) -> None:
    """Of six equal variants the sentence claims a difference in at most 5 %."""
    rate = false_claims_pct(1000, num_seeds=num_seeds)
    assert rate < 5 + noise_pct(1000)


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.3, 0.8])
def test_choosing_the_pairing_costs_no_error(correlation: float) -> None:
    """Seeds that shift all variants alike leave the rate where it was."""
    rate = false_claims_pct(600, num_seeds=5, correlation=correlation)
    assert rate < 5 + noise_pct(600)


@pytest.mark.slow
def test_one_noisy_variant_makes_few_claims() -> None:
    """One variant scattering five times more: 7 %, where pooling alone gives 16 %."""
    sds = (0.2, 1.0, 0.2, 0.2, 0.2, 0.2)
    assert false_claims_pct(600, num_seeds=3, sds=sds) < 7.5 + noise_pct(600)


def test_equivalence_is_rarely_false() -> None:
    """At a true difference of the margin, equivalence is claimed in at most 5 %."""
    rng = np.random.default_rng(21)
    effects = (0.0, 0.5, 0.5, 0.5, 0.5, 0.5)
    false = 0
    for _ in range(600):
        found, _ = concluded(draw_study(rng, num_seeds=5, effects=effects))
        false += any(one.verdict.startswith("equivalent") for one in found)
    assert 100 * false / 600 < 5 + noise_pct(600)


def coverage_pct(num_studies: int, *, num_seeds: int) -> tuple[float, float]:
    """How often intervals hold the truth: of one mean, of all differences at once."""
    rng = np.random.default_rng(3)
    effects = (0.0, -0.2, -0.5, 0.1, 0.9, 0.0)
    mean_held = all_held = 0
    for _ in range(num_studies):
        runs = draw_study(rng, num_seeds=num_seeds, effects=effects)
        summary = stats.summarize(list(runs["base"].values()))
        mean_held += summary.low <= 5 <= summary.high
        found, _ = concluded(runs)
        all_held += all(
            one.low <= effect <= one.high
            for one, effect in zip(found, effects[1:], strict=True)
        )
    return 100 * mean_held / num_studies, 100 * all_held / num_studies


def test_intervals_cover() -> None:
    """Intervals of means hold the truth in 94 to 96 %, all differences in 95 % or more.

    At three seeds the pair's own test widens the latter beyond Dunnett's.
    """
    of_mean, of_all = coverage_pct(2000, num_seeds=3)
    assert 94 <= of_mean <= 96
    assert of_all >= 95 - noise_pct(2000)


EQUAL = (0.2,) * 6
NOISY_ONE = (0.2, 1.0, 0.2, 0.2, 0.2, 0.2)
NOISY_REFERENCE = (1.0, 0.2, 0.2, 0.2, 0.2, 0.2)
NUM_FULL = 20_000


@pytest.mark.full
@pytest.mark.parametrize("num_seeds", [3, 5, 10])
@pytest.mark.parametrize(
    ("sds", "correlation", "limit_pct"),
    [
        (EQUAL, 0.0, 5.0),
        (EQUAL, 0.3, 5.0),
        (EQUAL, 0.8, 5.0),
        (NOISY_ONE, 0.0, 7.5),
        (NOISY_REFERENCE, 0.0, 8.5),
    ],
)
def test_false_claims_full_size(
    num_seeds: int, sds: tuple[float, ...], correlation: float, limit_pct: float
) -> None:
    """The README's rates of false claims."""
    rate = false_claims_pct(
        NUM_FULL, num_seeds=num_seeds, sds=sds, correlation=correlation
    )
    print(f"{num_seeds} seeds, sds {sds}, correlation {correlation}: {rate:.1f} %")
    assert rate < limit_pct + noise_pct(NUM_FULL)


@pytest.mark.full
@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_coverage_full_size(num_seeds: int) -> None:
    """The README's coverage of intervals."""
    of_mean, of_all = coverage_pct(NUM_FULL, num_seeds=num_seeds)
    print(f"{num_seeds} seeds: means {of_mean:.1f} %, differences {of_all:.1f} %")
    assert 94 <= of_mean <= 96
    assert of_all >= 95 - noise_pct(NUM_FULL)
