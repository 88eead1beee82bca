"""What the runs of a study allow to be said: intervals, tests, verdicts.

Values are test errors in percent, one for each run, and a lower one is better. Every
difference is variant minus reference, in points.

The rules are fixed before any mean is seen. Runs that ended well count, no others. Each
variant is compared with the reference; the error rate of 5 % holds for all comparisons
together. Where the spreads agree, the test is Dunnett's (1955, doi 10.2307/2281208) on
the pooled spread; where they do not (Bartlett's test, p < 0.05), Welch's with Holm's
correction. "Equivalent" takes two one-sided tests against a margin, with Holm's
correction. All else is undecided.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

ALPHA = 0.05
"""How often, at most, a study may claim at least one difference that is not there."""
POWER = 0.8
MAX_SEEDS = 100
"""More seeds than this are not counted out, only called "more than 100"."""

_SPREADS_DIFFER = 0.05
_NODES = 64

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Summary:
    """Mean of the runs of one variant, with its 95 % t-interval.

    The bounds are NaN where the runs show no spread: one run, or equal values.
    """

    num_runs: int
    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """One variant against the reference; NaN where the runs do not tell."""

    variant: str
    reference: str
    num_variant: int
    num_reference: int
    difference: float
    """Points, variant minus reference; below zero the variant is better."""
    low: float
    high: float
    """Bounds of the simultaneous 95 % interval."""
    p_value: float
    """Welch's t-test, two-sided, not corrected."""
    p_corrected: float
    correction: str
    p_equivalent: float
    """Two one-sided tests against the margin, Holm-corrected."""
    margin: float
    detectable: float
    """Smallest true difference that these runs would have shown 4 times out of 5."""
    seeds_to_decide: float
    """Seeds for each variant that would decide if the difference seen were the true
    one; infinite for more than `MAX_SEEDS`, NaN where nothing is open or known."""
    verdict: str
    explanation: str


@dataclass(frozen=True)
class _Pair:
    variant: str
    reference: str
    num_variant: int
    num_reference: int
    margin: float


@dataclass(frozen=True)
class _Arm:
    """Difference of one variant from the reference with its standard error."""

    difference: float
    standard_error: float
    df: float


@dataclass(frozen=True)
class _Result:
    """Outcome of the tests of one arm, before it is put into words."""

    arm: _Arm
    critical: float
    p_value: float
    p_corrected: float
    p_equivalent: float
    correction: str


def summarize(values: Sequence[float] | Floats) -> Summary:
    """Mean, standard deviation (n - 1) and 95 % t-interval of the mean."""
    runs = np.asarray(values, dtype=float)
    num_runs = len(runs)
    if num_runs == 0:
        return Summary(0, math.nan, math.nan, math.nan, math.nan)
    mean = float(runs.mean())
    if num_runs == 1:
        return Summary(1, mean, math.nan, math.nan, math.nan)
    sd = _sd(runs)
    if sd == 0:
        return Summary(num_runs, mean, 0.0, math.nan, math.nan)
    half = float(stats.t.ppf(1 - ALPHA / 2, num_runs - 1)) * sd / math.sqrt(num_runs)
    return Summary(num_runs, mean, sd, mean - half, mean + half)


def compare(
    runs: Mapping[str, Sequence[float] | Floats], *, reference: str, margin: float
) -> tuple[Comparison, ...]:
    """Every other variant against the reference.

    Args:
        runs: test errors in percent of the finished runs of each variant.
        reference: one of the variants.
        margin: points of error that count as no difference.
    """
    values = {label: np.asarray(v, dtype=float) for label, v in runs.items()}
    base = values[reference]
    others = [label for label in values if label != reference]
    tested = [label for label in others if min(len(values[label]), len(base)) >= 2]
    groups = [base, *(values[label] for label in tested)]
    results: dict[str, _Result] = {}
    if tested and (pooled := pooled_sd(groups)) > 0:
        found = _test(groups, pooled=pooled, margin=margin)
        results = dict(zip(tested, found, strict=True))
    comparisons = []
    for label in others:
        pair = _Pair(label, reference, len(values[label]), len(base), margin)
        if (result := results.get(label)) and result.arm.standard_error > 0:
            comparisons.append(_conclude(pair, result=result, family=len(tested)))
        else:
            difference = _mean(values[label]) - _mean(base)
            comparisons.append(_untested(pair, difference=difference))
    return tuple(comparisons)


def pooled_sd(groups: Sequence[Floats]) -> float:
    """Standard deviation within groups, each around its own mean."""
    squares = sum((len(group) - 1) * _sd(group) ** 2 for group in groups)
    return math.sqrt(squares / sum(len(group) - 1 for group in groups))


def _test(
    groups: Sequence[Floats], *, pooled: float, margin: float
) -> tuple[_Result, ...]:
    """Tests of all groups against the first."""
    base, *others = groups
    welch = [_welch(group, base) for group in others]
    p_values = [_two_sided(arm) for arm in welch]
    if _spreads_agree(groups):
        df = sum(len(group) - 1 for group in groups)
        errors = [pooled * math.sqrt(1 / len(g) + 1 / len(base)) for g in others]
        arms = [
            _Arm(arm.difference, error, df)
            for arm, error in zip(welch, errors, strict=True)
        ]
        correlations = np.sqrt([len(g) / (len(g) + len(base)) for g in others])
        t_values = np.array([abs(arm.difference) / arm.standard_error for arm in arms])
        p_corrected = dunnett_p(t_values, correlations=correlations, df=df)
        critical = [dunnett_critical(correlations=correlations, df=df)] * len(others)
        correction = "Dunnett"
    else:
        arms = welch
        p_corrected = np.array(_holm(p_values))
        level = 1 - ALPHA / len(others) / 2
        critical = [float(stats.t.ppf(level, arm.df)) for arm in arms]
        correction = "Holm (spreads differ; intervals Bonferroni)"
    p_equivalent = _holm([_two_one_sided(arm, margin) for arm in arms])
    return tuple(
        _Result(arms[i], critical[i], p_values[i], float(p_corrected[i]), p, correction)
        for i, p in enumerate(p_equivalent)
    )


def dunnett_p(t_values: Floats, *, correlations: Floats, df: float) -> Floats:
    """P-values of Dunnett's two-sided many-to-one test.

    Dunnett's own integral, by quadrature: no random draws, so results repeat, and any
    number of arms takes a moment.

    Args:
        t_values: (arms,) absolute t-values on the pooled spread.
        correlations: (arms,) b, where arms i and j correlate with b_i b_j:
            sqrt(n_i / (n_i + n_reference)).
        df: degrees of freedom of the pooled spread.
    """
    cdf = _dunnett_cdf(t_values, correlations=correlations, df=df)
    return np.clip(1 - cdf, 0.0, 1.0)


def dunnett_critical(*, correlations: Floats, df: float) -> float:
    """The t-value that the largest of all arms exceeds in 5 % of null studies."""

    def excess(t: float) -> float:
        cdf = _dunnett_cdf(np.array([t]), correlations=correlations, df=df)
        return float(cdf[0]) - (1 - ALPHA)

    bonferroni = float(stats.t.isf(ALPHA / len(correlations) / 2, df))
    return float(optimize.brentq(excess, 0.5, bonferroni + 0.01, xtol=1e-8))


def _dunnett_cdf(t_values: Floats, *, correlations: Floats, df: float) -> Floats:
    """P(all |T_i| <= t), T_i = (b_i Z + sqrt(1 - b_i^2) X_i) / S."""
    s, s_weights = _spread_nodes(df)
    z, z_weights = _legendre(-8.0, 8.0)
    z_weights = z_weights * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    shares, counts = np.unique(correlations, return_counts=True)
    cdf = np.empty(len(t_values))
    for i, t in enumerate(t_values):
        inside = np.ones((len(s), len(z)))
        for b, count in zip(shares, counts, strict=True):
            scale = math.sqrt(1 - b * b)
            upper = special.ndtr((t * s[:, None] + b * z) / scale)
            lower = special.ndtr((-t * s[:, None] + b * z) / scale)
            inside *= (upper - lower) ** count
        cdf[i] = s_weights @ inside @ z_weights
    return cdf


@cache
def detectable_shift(critical: float, *, df: float) -> float:
    """True difference, in standard errors, that a test shows with 80 % power.

    The noncentral t by quadrature, which stays finite where scipy's turns NaN.
    """
    s, weights = _spread_nodes(df)

    def lack(shift: float) -> float:
        tails = special.ndtr(shift - critical * s) + special.ndtr(-shift - critical * s)
        return float(weights @ tails) - POWER

    return float(optimize.brentq(lack, 0.0, 10 * critical + 10, xtol=1e-6))


@cache
def _spread_nodes(df: float) -> tuple[Floats, Floats]:
    """Nodes and weights for S = sqrt(chi-square / df)."""
    low, high = np.sqrt(special.chdtri(df, [1 - 1e-12, 1e-12]) / df)
    s, weights = _legendre(float(low), float(high))
    log_pdf = (
        (df - 1) * np.log(s)
        - df * s**2 / 2
        + df / 2 * math.log(df / 2)
        - special.gammaln(df / 2)
        + math.log(2)
    )
    return s, weights * np.exp(log_pdf)


def _legendre(low: float, high: float) -> tuple[Floats, Floats]:
    nodes, weights = _unit_legendre()
    half = (high - low) / 2
    return low + half * (nodes + 1), weights * half


@cache
def _unit_legendre() -> tuple[Floats, Floats]:
    return np.polynomial.legendre.leggauss(_NODES)


def _spreads_agree(groups: Sequence[Floats]) -> bool:
    """Bartlett's test; groups of equal values say nothing about the spread."""
    spread = [group for group in groups if _sd(group) > 0]
    return len(spread) < 2 or stats.bartlett(*spread).pvalue >= _SPREADS_DIFFER


def _welch(group: Floats, base: Floats) -> _Arm:
    difference = float(group.mean() - base.mean())
    a, b = _sd(group) ** 2 / len(group), _sd(base) ** 2 / len(base)
    if a + b == 0:
        return _Arm(difference, 0.0, len(group) + len(base) - 2)
    df = (a + b) ** 2 / (a**2 / (len(group) - 1) + b**2 / (len(base) - 1))
    return _Arm(difference, math.sqrt(a + b), df)


def _two_sided(arm: _Arm) -> float:
    if arm.standard_error == 0:  # Equal values in both arms tell nothing of chance.
        return math.nan
    return float(2 * stats.t.sf(abs(arm.difference) / arm.standard_error, arm.df))


def _two_one_sided(arm: _Arm, margin: float) -> float:
    if arm.standard_error == 0:
        return math.nan
    above = stats.t.sf((margin + arm.difference) / arm.standard_error, arm.df)
    below = stats.t.sf((margin - arm.difference) / arm.standard_error, arm.df)
    return float(max(above, below))


def _holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction; unknown p-values count in the family and stay unknown."""
    # statsmodels' multipletests runs a full garbage collection on each call (60 ms).
    p = np.array(p_values)
    order = np.argsort(p)  # NaN goes last.
    corrected = np.empty(len(p))
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected[order] = np.minimum(steps, 1.0)
    return [float(value) for value in corrected]


def _sd(values: Floats) -> float:
    """Standard deviation; exactly zero where all values are equal."""
    if len(values) < 2 or np.ptp(values) <= 1e-9 * max(1.0, abs(float(values[0]))):
        return 0.0
    return float(values.std(ddof=1))


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan


def _conclude(pair: _Pair, *, result: _Result, family: int) -> Comparison:
    arm = result.arm
    half = result.critical * arm.standard_error
    detectable = detectable_shift(result.critical, df=arm.df) * arm.standard_error
    if result.p_corrected < ALPHA:
        verdict = "better" if arm.difference < 0 else "worse"
    elif result.p_equivalent < ALPHA:
        verdict = f"equivalent within {pair.margin:g} points"
    else:
        verdict = "undecided"
    seeds = math.nan
    if verdict == "undecided":
        sizes = (pair.num_variant, pair.num_reference)
        sd = arm.standard_error / math.sqrt(sum(1 / size for size in sizes))
        seeds = seeds_to_decide(
            arm.difference, sd=sd, margin=pair.margin, num_comparisons=family
        )
        seeds = max(seeds, max(sizes) + 1)
    comparison = Comparison(
        **vars(pair),
        difference=arm.difference,
        low=arm.difference - half,
        high=arm.difference + half,
        p_value=result.p_value,
        p_corrected=result.p_corrected,
        correction=result.correction,
        p_equivalent=result.p_equivalent,
        detectable=detectable,
        seeds_to_decide=seeds,
        verdict=verdict,
        explanation="",
    )
    return replace(comparison, explanation=_explain(comparison))


def _explain(comparison: Comparison) -> str:
    if comparison.verdict in ("better", "worse"):
        near, far = sorted((abs(comparison.low), abs(comparison.high)))
        return f"by {near:.2f} to {far:.2f} points"
    if comparison.verdict != "undecided":
        return "the difference, if any, is smaller than the margin"
    seeds = comparison.seeds_to_decide
    need = f"more than {MAX_SEEDS}" if math.isinf(seeds) else f"about {seeds:.0f}"
    return (
        f"a true difference below {comparison.detectable:.2f} points would often go "
        f"unseen; {need} seeds per variant would decide if the difference seen is true"
    )


def _untested(pair: _Pair, *, difference: float) -> Comparison:
    """A comparison that the runs do not allow: no interval, no test, no claim."""
    if min(pair.num_variant, pair.num_reference) == 0:
        lacking = pair.variant if pair.num_variant == 0 else pair.reference
        why = f"no complete run of {lacking}"
    elif min(pair.num_variant, pair.num_reference) == 1:
        why = "one run shows no spread; both sides need at least 2 seeds"
    else:
        why = "the seeds gave equal values, so there is no spread to judge by"
    return Comparison(
        **vars(pair),
        difference=difference,
        low=math.nan,
        high=math.nan,
        p_value=math.nan,
        p_corrected=math.nan,
        correction="none",
        p_equivalent=math.nan,
        detectable=math.nan,
        seeds_to_decide=math.nan,
        verdict="undecided",
        explanation=why,
    )


def seeds_to_decide(
    difference: float, *, sd: float, margin: float, num_comparisons: int
) -> float:
    """Seeds for each variant that decide with 80 % power if `difference` is true.

    The shorter of two ways: showing the difference, or showing that it lies within
    the margin. Bonferroni stands in for the correction, so the count errs high.

    Returns:
        A number from 2 to `MAX_SEEDS`, or infinity.
    """
    num_seeds = np.arange(2, MAX_SEEDS + 1)
    df = 2 * (num_seeds - 1)
    error = sd * np.sqrt(2 / num_seeds)
    level = ALPHA / num_comparisons
    shown = stats.t.isf(level / 2, df) + stats.t.ppf(POWER, df)
    within = stats.t.isf(level, df) + stats.t.ppf((1 + POWER) / 2, df)
    enough = (shown * error <= abs(difference)) | (
        within * error <= margin - abs(difference)
    )
    return float(num_seeds[enough][0]) if enough.any() else math.inf


def study_verdict(
    runs: Mapping[str, Sequence[float] | Floats],
    comparisons: Sequence[Comparison],
    *,
    reference: str,
    setting: str,
) -> str:
    """One sentence on the whole study, worded by rule.

    Args:
        runs: as for `compare`.
        comparisons: what `compare` found.
        setting: what is held equal, such as "At equal FLOPs (within 2.6 %)".
    """
    if not any(len(values) for values in runs.values()):
        return "No run is complete, so there is nothing to say yet."
    if not comparisons:
        alone = summarize(runs[reference])
        known = not math.isnan(alone.low)
        interval = f" [{alone.low:.2f}, {alone.high:.2f}]" if known else ""
        return (
            f"{reference} has a test error of {alone.mean:.2f} %{interval}; there is "
            "no other variant to compare it with."
        )
    if len(runs[reference]) == 0:
        return f"The reference {reference} has no complete run, so nothing is compared."
    kinds = [comparison.verdict.split()[0] for comparison in comparisons]
    tested = [c for c in comparisons if not math.isnan(c.p_corrected)]
    if not tested:
        return f"{setting}, nothing can be claimed: {comparisons[0].explanation}."
    if "better" in kinds:
        return f"{setting}, {_best_sentence(comparisons)}"
    detectable = max(c.detectable for c in tested)
    unseen = f"a true difference below {detectable:.2f} points would often go unseen"
    if set(kinds) == {"equivalent"}:
        every = (
            f"all {len(kinds)} variants are"
            if len(kinds) > 1
            else (f"{comparisons[0].variant} is")
        )
        margin = comparisons[0].margin
        return f"{setting}, {every} equivalent to {reference} within {margin:g} points."
    if set(kinds) == {"undecided"}:
        return f"{setting}, no variant can be told from {reference}: {unseen}."
    tail = f"; {unseen}" if "undecided" in kinds else ""
    return (
        f"{setting}, no variant is shown to be better than {reference}: "
        f"{_counts(comparisons)}{tail}."
    )


def _best_sentence(comparisons: Sequence[Comparison]) -> str:
    best = min(
        (c for c in comparisons if c.verdict == "better"), key=lambda c: c.difference
    )
    others = [c for c in comparisons if c is not best]
    rest = f" Of the others, {_counts(others)}." if others else ""
    return (
        f"{best.variant} has {-best.difference:.2f} points less test error than "
        f"{best.reference} (95 % interval {-best.high:.2f} to {-best.low:.2f}, "
        f"{best.num_variant} against {best.num_reference} runs).{rest}"
    )


def _counts(comparisons: Sequence[Comparison]) -> str:
    """Such as "1 is better, 2 are equivalent within 0.5 points, 1 is undecided"."""
    counts = Counter(comparison.verdict for comparison in comparisons)
    order = ("better", "worse", "equivalent", "undecided")
    return ", ".join(
        f"{counts[verdict]} {'is' if counts[verdict] == 1 else 'are'} {verdict}"
        for verdict in sorted(counts, key=lambda v: order.index(v.split()[0]))
    )
