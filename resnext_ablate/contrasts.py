"""Weighted sums of variants' mean errors, and what a few seeds let them say.

A claim such as "without shortcuts a ResNeXt loses less than a ResNet" is one number
over several variants: the sum of their means, each with its weight. Every variant keeps
a spread of its own (Welch and Satterthwaite); where the residuals show that seeds shift
all variants alike (`families.seeds_correlate`), the sum is taken seed by seed instead.
A claim of several contrasts has intervals that hold together at 95 % (Bonferroni), and
the verdict is read off them, so that it is wrong in at most 5 % of studies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from resnext_ablate import families, power
from resnext_ablate.stats import Floats, spread

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
        errors: of all variants of the study, whose residuals tell whether runs pair.
        contrasts: tested together; each over variants that have at least one run.
    """
    level = power.LEVEL / len(contrasts)
    is_paired = _are_paired(errors)
    return tuple(
        _estimate(errors, contrast=one, level=level, is_paired=is_paired)
        for one in contrasts
    )


def verdict_of(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim: consistent where all of it is, contradicted where any part is."""
    if "contradicted" in verdicts:
        return "contradicted"
    return "undecided" if "undecided" in verdicts else "consistent"


def _are_paired(errors: Errors) -> bool:
    """Whether every variant has the same seeds, and those shift all of them alike."""
    seeds = set().union(*errors.values())
    if len(errors) < 2 or len(seeds) < 3:
        return False
    if any(len(of_one) < len(seeds) for of_one in errors.values()):
        return False
    order = sorted(seeds)
    table = np.array([[of_one[seed] for seed in order] for of_one in errors.values()])
    return families.seeds_correlate(table)


@dataclass(frozen=True)
class _Error:
    """How far the sum may be off."""

    standard_error: float
    df: float


def _estimate(
    errors: Errors, *, contrast: Contrast, level: float, is_paired: bool
) -> Estimate:
    groups = [np.array(list(errors[v].values())) for v in contrast.weights]
    weights = np.array(list(contrast.weights.values()))
    points = contrast.of_means({v: _mean(errors[v]) for v in contrast.weights})
    num_runs = min(map(len, groups))
    error = _paired(errors, contrast) if is_paired else _unpaired(weights, groups)
    if error is None:
        unknown = math.nan, math.nan
        return Estimate(
            points, *unknown, num_runs, is_paired, math.nan, verdict="undecided"
        )
    critical = float(special.stdtrit(error.df, 1 - level / 2))
    half = critical * error.standard_error
    verdict = _verdict(points, half_width=half, sign=contrast.sign)
    return Estimate(
        points=points,
        low=points - half,
        high=points + half,
        num_runs=num_runs,
        is_paired=is_paired,
        seeds_to_decide=_seeds_to_decide(
            points, error=error, num_runs=num_runs, level=level
        )
        if verdict == "undecided"
        else math.nan,
        verdict=verdict,
    )


def _mean(by_seed: Mapping[int, float]) -> float:
    return math.fsum(by_seed.values()) / len(by_seed)


def _paired(errors: Errors, contrast: Contrast) -> _Error | None:
    seeds = next(iter(errors.values()))
    sums = np.array(
        [
            math.fsum(w * errors[v][seed] for v, w in contrast.weights.items())
            for seed in seeds
        ]
    )
    sd = spread(sums)
    return _Error(sd / math.sqrt(len(sums)), len(sums) - 1) if sd > 0 else None


def _unpaired(weights: Floats, groups: Sequence[Floats]) -> _Error | None:
    """Satterthwaite's approximation; None where a spread is unknown."""
    sizes = np.array([len(group) for group in groups])
    parts = weights**2 * [spread(group) ** 2 for group in groups] / sizes
    if sizes.min() < 2 or parts.sum() == 0:
        return None
    df = parts.sum() ** 2 / (parts**2 / (sizes - 1)).sum()
    return _Error(math.sqrt(parts.sum()), float(df))


def _verdict(points: float, *, half_width: float, sign: Sign) -> Verdict:
    if abs(points) <= half_width:
        return "undecided"
    return "consistent" if points * sign > 0 else "contradicted"


def _seeds_to_decide(
    points: float, *, error: _Error, num_runs: int, level: float
) -> float:
    """Seeds of which 4 studies in 5 would decide, if `points` is true."""

    def enough(num_seeds: int) -> bool:
        df = round(error.df * (num_seeds - 1) / (num_runs - 1), 3)
        critical = float(special.stdtrit(df, 1 - level / 2))
        scale = error.standard_error * math.sqrt(num_runs / num_seeds)
        return abs(points) >= power.detectable_shift(critical, df=df) * scale

    low, high = num_runs, power.MAX_SEEDS
    if num_runs >= high or not enough(high):
        return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return float(high)
