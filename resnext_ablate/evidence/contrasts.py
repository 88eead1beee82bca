"""Weighted sums of variants' mean errors, and what a few seeds let them say.

A claim such as "without shortcuts a ResNeXt loses less than a ResNet" is one number
over several variants: the sum of their means, each with its weight. It is tested as
`families` tests a pair, twice, and the wider interval counts: with the spread pooled
over all variants of the study, corrected for the number of contrasts of the claim
(Bonferroni), and with the spreads of its own variants (Welch and Satterthwaite). Where
spreads plainly differ nothing is pooled; where seeds shift all variants alike, sums are
taken seed by seed. The intervals of a claim hold together at 95 %, and the verdict is
read off them, so that it is wrong in about 5 % of studies at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from resnext_ablate.numbers import families, power
from resnext_ablate.numbers.stats import Floats, pooled_sd, spread

Verdict = Literal["consistent", "contradicted", "undecided"]
Sign = Literal[-1, 1]

Errors = Mapping[str, Mapping[int, float]]
"""In percent, by variant and seed."""


@dataclass(frozen=True)
class Contrast:
    """A sum over variants, and on which side of zero a claim puts it."""

    label: str
    weights: Mapping[str, float]
    """By variant; they add up to zero."""
    sign: Sign

    def of_means(self, means: Mapping[str, float]) -> float:
        """The sum for given means, such as the paper's."""
        return math.fsum(weight * means[v] for v, weight in self.weights.items())


@dataclass(frozen=True)
class Estimate:
    """What the runs say of a contrast; NaN where they do not tell."""

    points: float
    low: float
    high: float
    """Bounds of the interval that holds for all contrasts of the claim at 95 %."""
    num_runs: int
    """Of the variant that has the fewest."""
    is_paired: bool
    seeds_to_decide: float
    """Seeds for each variant that would decide if `points` were the truth; infinite
    for more than `power.MAX_SEEDS`, NaN where nothing is open or known."""
    verdict: Verdict


def estimate(errors: Errors, *, contrasts: Sequence[Contrast]) -> tuple[Estimate, ...]:
    """Estimates the contrasts of one claim.

    Args:
        errors: of all variants of the study, whose residuals tell how to test.
        contrasts: tested together; each over variants that have at least one run.
    """
    sample = _sample(errors)
    corrected = power.LEVEL / len(contrasts)
    return tuple(_estimate(sample, contrast=one, level=corrected) for one in contrasts)


def verdict_of(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim: consistent where all of it is, contradicted where any part is."""
    if "contradicted" in verdicts:
        return "contradicted"
    return "undecided" if "undecided" in verdicts else "consistent"


@dataclass(frozen=True)
class _Error:
    """How far a sum may be off."""

    standard_error: float
    df: float
    level: float
    """Two-sided, of its interval."""

    def half_width(self) -> float:
        critical = float(special.stdtrit(self.df, 1 - self.level / 2))
        return critical * self.standard_error

    def detectable(self, *, num_runs: int, num_seeds: int) -> float:
        """True sum that so many seeds in place of `num_runs` show 4 times out of 5."""
        df = round(self.df * (num_seeds - 1) / (num_runs - 1), 3)
        critical = float(special.stdtrit(df, 1 - self.level / 2))
        scale = self.standard_error * math.sqrt(num_runs / num_seeds)
        return power.detectable_shift(critical, df=df) * scale


@dataclass(frozen=True)
class _Sample:
    """The runs of a study, and how they are tested."""

    errors: Errors
    is_paired: bool
    pooled_sd: float | None
    """Of one run; None where nothing is pooled."""
    df: float


def _sample(errors: Errors) -> _Sample:
    table = _table(errors)
    if table is not None and families.seeds_correlate(table):
        df = (table.shape[0] - 1) * (table.shape[1] - 1)
        return _Sample(errors, True, families.residual_sd(table), df)
    groups = [np.array(list(one.values())) for one in errors.values() if len(one) > 1]
    if not groups or not families.spreads_agree(groups):
        return _Sample(errors, False, None, math.nan)
    df = sum(len(group) - 1 for group in groups)
    return _Sample(errors, False, pooled_sd(groups), df)


def _table(errors: Errors) -> Floats | None:
    """(variants, seeds) errors where all have the same seeds, three or more."""
    seeds = sorted(set().union(*errors.values()))
    is_whole = all(len(of_one) == len(seeds) for of_one in errors.values())
    if not is_whole or len(errors) < 2 or len(seeds) < 3:
        return None
    return np.array([[of_one[seed] for seed in seeds] for of_one in errors.values()])


def _estimate(sample: _Sample, *, contrast: Contrast, level: float) -> Estimate:
    errors = {v: sample.errors[v] for v in contrast.weights}
    points = contrast.of_means({v: _mean(one) for v, one in errors.items()})
    num_runs = min(map(len, errors.values()))
    tests = _tests(sample, contrast=contrast, level=level)
    if not tests:
        nan = math.nan
        return Estimate(
            points, nan, nan, num_runs, sample.is_paired, nan, verdict="undecided"
        )
    half = max(one.half_width() for one in tests)
    verdict = _verdict(points, half_width=half, sign=contrast.sign)
    seeds = math.nan
    if verdict == "undecided":
        seeds = _seeds_to_decide(points, tests=tests, num_runs=num_runs)
    return Estimate(
        points=points,
        low=points - half,
        high=points + half,
        num_runs=num_runs,
        is_paired=sample.is_paired,
        seeds_to_decide=seeds,
        verdict=verdict,
    )


def _tests(sample: _Sample, *, contrast: Contrast, level: float) -> tuple[_Error, ...]:
    """The tests that must agree; none where no spread is known."""
    errors = sample.errors
    groups = [np.array(list(errors[v].values())) for v in contrast.weights]
    weights = np.array(list(contrast.weights.values()))
    sizes = np.array([len(group) for group in groups])
    if sizes.min() < 2:
        return ()
    alone = level if sample.pooled_sd is None else power.LEVEL
    if sample.is_paired:
        own = _paired(errors, contrast=contrast, level=alone)
    else:
        own = _welch(weights, groups, level=alone)
    if sample.pooled_sd is None:
        return (own,) if own else ()
    if sample.pooled_sd == 0:
        return ()
    error = sample.pooled_sd * math.sqrt(float((weights**2 / sizes).sum()))
    pooled = _Error(error, sample.df, level)
    # Equal values in all of its variants tell nothing of chance; the pooled test does.
    return (pooled, own) if own else (pooled,)


def _mean(by_seed: Mapping[int, float]) -> float:
    return math.fsum(by_seed.values()) / len(by_seed)


def _paired(errors: Errors, *, contrast: Contrast, level: float) -> _Error | None:
    """By the sum of each seed; None where they show no spread."""
    sums = np.array(
        [
            math.fsum(w * errors[v][seed] for v, w in contrast.weights.items())
            for seed in next(iter(errors.values()))
        ]
    )
    sd = spread(sums)
    return _Error(sd / math.sqrt(len(sums)), len(sums) - 1, level) if sd > 0 else None


def _welch(weights: Floats, groups: Sequence[Floats], *, level: float) -> _Error | None:
    """Satterthwaite's approximation; None where the runs show no spread."""
    sizes = np.array([len(group) for group in groups])
    parts = weights**2 * [spread(group) ** 2 for group in groups] / sizes
    if parts.sum() == 0:
        return None
    df = parts.sum() ** 2 / (parts**2 / (sizes - 1)).sum()
    return _Error(math.sqrt(parts.sum()), float(df), level)


def _verdict(points: float, *, half_width: float, sign: Sign) -> Verdict:
    if abs(points) <= half_width:
        return "undecided"
    return "consistent" if points * sign > 0 else "contradicted"


def _seeds_to_decide(points: float, *, tests: Sequence[_Error], num_runs: int) -> float:
    """Seeds of which about 4 studies in 5 would decide, if `points` is true."""

    def enough(num_seeds: int) -> bool:
        return all(
            one.detectable(num_runs=num_runs, num_seeds=num_seeds) <= abs(points)
            for one in tests
        )

    low, high = num_runs, power.MAX_SEEDS
    if num_runs >= high or not enough(high):
        return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return float(high)
