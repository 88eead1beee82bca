"""Tests of several variants at once, from a few runs of each.

A difference counts where two tests agree. The family's test uses the spread pooled over
all variants and is corrected for the number of comparisons: Dunnett (1955, doi
10.2307/2281208) against a reference, Holm (1979) for other families. The pair's own
t-test (Welch's, or the paired one) at 5 % looks at the two variants alone, so that a
variant which scatters more than the others gains nothing from their small spread.

Two choices are made beforehand from the residuals, each run less its variant's mean,
which say nothing of the differences:

- Runs are paired by seed where the seeds' common shifts show (F-test of seeds in the
  two-way table, p < 0.01, at least 3 seeds, no run missing), unless the study file
  fixes it. The spread is then what variant and seed leave unexplained.
- Where the spreads of unpaired variants plainly differ (Bartlett's test, p < 0.01),
  nothing is pooled: Welch's tests with Holm's correction.

The choices themselves would let a study of equal variants claim 0.1 to 0.2 points more
often; p-values are multiplied by `PRICE_OF_CHOICE` for that, intervals widened alike.

What is looked at several times while seeds are added (`looks`) is tested so each time,
at a part of the error rate and with the whole family's number of comparisons.

Error rates and power, simulated, stand in `tests/test_error_rates.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special, stats

from resnext_ablate.numbers import power
from resnext_ablate.numbers.power import PRICE_OF_CHOICE, Family
from resnext_ablate.numbers.stats import (
    ALPHA,
    Floats,
    dunnett_p,
    holm,
    pooled_sd,
    spread,
)

Pairing = Literal["auto", "paired", "unpaired"]

BEFOREHAND = 0.01
"""Level of the two tests on residuals that choose the test of the differences."""
_MIN_SEEDS_TO_PAIR = 3


@dataclass(frozen=True)
class Look:
    """How much of a family's error rate one test of it may use, and what is past.

    A study of fixed seeds is looked at once, at the full rate; `looks` plans several.
    """

    level: float = ALPHA
    """How often this look alone may claim a difference that is not there."""
    num_comparisons: int | None = None
    """Of the whole family; None: as many as are tested."""
    num_equivalent: int = 0
    """Of those, how many earlier looks have found equivalent."""
    beside: tuple[Floats, ...] = ()
    """Runs of variants that are tested no more; they add to the pooled spread."""

    def num_others(self, num_tested: int) -> int:
        """Comparisons of the family that this look does not test."""
        return 0 if self.num_comparisons is None else self.num_comparisons - num_tested


@dataclass(frozen=True)
class PairTest:
    """Two variants compared; all but the difference is NaN where nothing varies."""

    difference: float
    """Mean of the first less mean of the second, in points."""
    num_first: int
    num_second: int
    half_width: float
    """From the difference to a bound of its interval, 95 % for the whole family."""
    p_value: float
    """The pair's own t-test, two-sided, not corrected."""
    p_corrected: float
    p_equivalent: float
    """Two one-sided tests against the margin, Holm-corrected."""
    detectable: float
    """True difference that these tests show 4 times out of 5."""
    sd: float
    """Spread of one run; within pairs where runs are paired."""
    method: str


@dataclass(frozen=True)
class _Estimate:
    """A difference with a standard error."""

    difference: float
    standard_error: float
    df: float


@dataclass(frozen=True)
class _Estimates:
    """Of each pair: by the spread of all variants, and by its own."""

    pooled: tuple[_Estimate, ...]
    own: tuple[_Estimate, ...]


@dataclass(frozen=True)
class _Sample:
    """Runs ready to be compared."""

    groups: tuple[Floats, ...]
    paired: bool
    sd: float
    """Spread of one run, pooled over all variants."""
    df: float

    def pooled(self, first: int, second: int) -> _Estimate:
        a, b = self.groups[first], self.groups[second]
        error = self.sd * math.sqrt(1 / len(a) + 1 / len(b))
        return _Estimate(float(a.mean() - b.mean()), error, self.df)

    def own(self, first: int, second: int) -> _Estimate:
        a, b = self.groups[first], self.groups[second]
        return _paired(a, b) if self.paired else _welch(a, b)


def compare_pairs(
    groups: Sequence[Mapping[int, float]],
    *,
    pairs: Sequence[tuple[int, int]],
    margin: float,
    family: Family,
    pairing: Pairing,
    look: Look,
) -> tuple[PairTest, ...]:
    """Tests pairs of groups as one family.

    Args:
        groups: values by seed, at least two of each.
        pairs: positions of the groups compared; with a reference the second position
            is the same in all of them.
        margin: points that count as no difference.
        family: whether there is a reference.
        pairing: "auto" leaves the choice to the residuals.
        look: the only one, or one of several.
    """
    sample = _sample(groups, pairing, beside=look.beside)
    pooled = [sample.pooled(*pair) for pair in pairs]
    if sample.sd == 0:
        return tuple(
            _unknown(estimate, sample, pair)
            for estimate, pair in zip(pooled, pairs, strict=True)
        )
    own = [sample.own(*pair) for pair in pairs]
    if not sample.paired and not spreads_agree(sample.groups):
        return _each_alone(sample, pairs=pairs, own=own, margin=margin, look=look)
    estimates = _Estimates(tuple(pooled), tuple(own))
    return _both(
        sample, pairs=pairs, of=estimates, margin=margin, family=family, look=look
    )


def seeds_correlate(table: Floats) -> bool:
    """Whether the seeds shift all variants alike, by the residuals alone.

    Args:
        table: (variants, seeds) values.
    """
    num_variants, num_seeds = table.shape
    by_seed = table.mean(axis=0)
    between = num_variants * float(by_seed.var(ddof=1))
    within = residual_sd(table) ** 2
    if within == 0:
        return False  # Nothing is left to judge a difference by.
    df = num_seeds - 1, (num_variants - 1) * (num_seeds - 1)
    return float(special.fdtrc(*df, between / within)) < BEFOREHAND


def _sample(
    groups: Sequence[Mapping[int, float]],
    pairing: Pairing,
    *,
    beside: tuple[Floats, ...],
) -> _Sample:
    seeds = sorted(set(groups[0]).intersection(*groups[1:]))
    table = np.array([[group[seed] for seed in seeds] for group in groups])
    nothing_missing = all(len(group) == len(seeds) for group in groups)
    paired = pairing == "paired" or (
        pairing == "auto"
        and nothing_missing
        and len(seeds) >= _MIN_SEEDS_TO_PAIR
        and seeds_correlate(table)
    )
    if paired:
        df = (len(groups) - 1) * (len(seeds) - 1)
        return _Sample(tuple(table), True, residual_sd(table), df)
    arrays = (*(np.array(list(group.values())) for group in groups), *beside)
    df = sum(len(array) - 1 for array in arrays)
    return _Sample(arrays, False, pooled_sd(arrays), df)


def residual_sd(table: Floats) -> float:
    """What variant and seed leave unexplained in a (variants, seeds) table."""
    centred = table - table.mean(axis=1, keepdims=True)
    residuals = centred - centred.mean(axis=0)
    if np.ptp(residuals) <= 1e-9 * max(1.0, float(np.abs(table).max())):
        return 0.0
    df = (table.shape[0] - 1) * (table.shape[1] - 1)
    return math.sqrt(float((residuals**2).sum()) / df)


def _both(
    sample: _Sample,
    *,
    pairs: Sequence[tuple[int, int]],
    of: _Estimates,
    margin: float,
    family: Family,
    look: Look,
) -> tuple[PairTest, ...]:
    """The family's test on the pooled spread and each pair's own, both needed."""
    pooled, own = of.pooled, of.own
    level = look.level / PRICE_OF_CHOICE
    num_others = look.num_others(len(pairs))
    sizes = [[len(sample.groups[i]) for i in pair] for pair in pairs]
    # Of comparisons that are not tested here, as if their variants had as many runs.
    others = np.full(num_others, math.sqrt(0.5))
    correlations = np.append(np.sqrt([a / (a + b) for a, b in sizes]), others)
    critical = power.critical_value(
        num_comparisons=len(pairs) + num_others,
        family=family,
        df=sample.df,
        correlations=correlations,
        level=level,
    )
    if family == "reference":
        t_values = np.array([abs(e.difference) / e.standard_error for e in pooled])
        by_family = dunnett_p(t_values, correlations=correlations, df=sample.df)
    else:
        p_values = [_two_sided(estimate) for estimate in pooled]
        by_family = np.array(_holm_among(p_values, num_others=num_others))
    equivalent = _equivalent(pooled, margin=margin, look=look)
    name = "Dunnett" if family == "reference" else "Holm (intervals Bonferroni)"
    method = f"{name}, paired by seed" if sample.paired else name
    return tuple(
        PairTest(
            difference=pooled[i].difference,
            num_first=sizes[i][0],
            num_second=sizes[i][1],
            half_width=max(
                critical * pooled[i].standard_error,
                _t_bound(level, own[i]) * own[i].standard_error,
            ),
            p_value=_two_sided(own[i]),
            p_corrected=_larger(float(by_family[i]), _two_sided(own[i]), look),
            p_equivalent=_larger(equivalent[i], _two_one_sided(own[i], margin), look),
            detectable=sample.sd
            * power.detectable_in_sd(
                critical,
                df=sample.df,
                num_first=sizes[i][0],
                num_second=sizes[i][1],
                paired=sample.paired,
                level=level,
            ),
            sd=sample.sd,
            method=method,
        )
        for i in range(len(pairs))
    )


def _each_alone(
    sample: _Sample,
    *,
    pairs: Sequence[tuple[int, int]],
    own: Sequence[_Estimate],
    margin: float,
    look: Look,
) -> tuple[PairTest, ...]:
    """Each pair's own test, Holm-corrected: nothing is pooled."""
    num_others = look.num_others(len(pairs))
    p_values = [_two_sided(estimate) for estimate in own]
    corrected = _holm_among(p_values, num_others=num_others)
    equivalent = _equivalent(own, margin=margin, look=look)
    level = look.level / PRICE_OF_CHOICE / (len(pairs) + num_others)
    tests = []
    for i, (estimate, pair) in enumerate(zip(own, pairs, strict=True)):
        if estimate.standard_error == 0:
            tests.append(_unknown(estimate, sample, pair))
            continue
        bound = _t_bound(level, estimate)
        shift = power.detectable_shift(bound, df=estimate.df)
        a, b = (len(sample.groups[position]) for position in pair)
        tests.append(
            PairTest(
                difference=estimate.difference,
                num_first=a,
                num_second=b,
                half_width=bound * estimate.standard_error,
                p_value=p_values[i],
                p_corrected=_larger(corrected[i], p_values[i], look),
                p_equivalent=_larger(equivalent[i], 0.0, look),
                detectable=shift * estimate.standard_error,
                sd=estimate.standard_error / math.sqrt(1 / a + 1 / b),
                method="Welch, Holm (spreads differ; intervals Bonferroni)",
            )
        )
    return tuple(tests)


def _unknown(estimate: _Estimate, sample: _Sample, pair: tuple[int, int]) -> PairTest:
    first, second = (len(sample.groups[position]) for position in pair)
    return PairTest(
        difference=estimate.difference,
        num_first=first,
        num_second=second,
        half_width=math.nan,
        p_value=math.nan,
        p_corrected=math.nan,
        p_equivalent=math.nan,
        detectable=math.nan,
        sd=math.nan,
        method="none",
    )


def _equivalent(
    estimates: Sequence[_Estimate], *, margin: float, look: Look
) -> list[float]:
    """Two one-sided tests, Holm-corrected; what is shown equivalent counts no more."""
    p_values = [_two_one_sided(estimate, margin) for estimate in estimates]
    num_others = look.num_others(len(p_values)) - look.num_equivalent
    return _holm_among(p_values, num_others=max(0, num_others))


def _holm_among(p_values: Sequence[float], *, num_others: int) -> list[float]:
    """Holm's correction in a family with others that are not tested here."""
    return holm([*p_values, *[math.nan] * num_others])[: len(p_values)]


def _larger(by_family: float, by_pair: float, look: Look) -> float:
    """The p-value of two tests that must both reject, for a rate of `ALPHA` in all."""
    # Equal values in both variants tell nothing of chance; the family's test does.
    larger = by_family if math.isnan(by_pair) else max(by_family, by_pair)
    return min(1.0, ALPHA / look.level * PRICE_OF_CHOICE * larger)


def spreads_agree(groups: Sequence[Floats]) -> bool:
    """Bartlett's test; groups of equal values say nothing about the spread."""
    varied = [group for group in groups if spread(group) > 0]
    if len(varied) < 2:
        return True
    # Spreads equal to the last digit can give a NaN.
    return not stats.bartlett(*varied).pvalue < BEFOREHAND


def _welch(first: Floats, second: Floats) -> _Estimate:
    difference = float(first.mean() - second.mean())
    a, b = spread(first) ** 2 / len(first), spread(second) ** 2 / len(second)
    if a + b == 0:
        return _Estimate(difference, 0.0, len(first) + len(second) - 2)
    df = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    return _Estimate(difference, math.sqrt(a + b), df)


def _paired(first: Floats, second: Floats) -> _Estimate:
    differences = first - second
    error = spread(differences) / math.sqrt(len(differences))
    return _Estimate(float(differences.mean()), error, len(differences) - 1)


def _t_bound(level: float, estimate: _Estimate) -> float:
    return float(special.stdtrit(estimate.df, 1 - level / 2))


def _two_sided(estimate: _Estimate) -> float:
    if estimate.standard_error == 0:
        return math.nan
    t = abs(estimate.difference) / estimate.standard_error
    return float(2 * special.stdtr(estimate.df, -t))


def _two_one_sided(estimate: _Estimate, margin: float) -> float:
    if estimate.standard_error == 0:
        return math.nan
    room = margin - abs(estimate.difference)
    return float(special.stdtr(estimate.df, -room / estimate.standard_error))
