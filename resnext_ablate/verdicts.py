"""What a study's runs allow to be said, in words fixed by rule.

Values are test errors in percent, one for each run, and a lower one is better. Every
difference is variant minus reference, in points.

The rules are fixed before any mean is seen. Runs that ended well count, no others. Each
variant is compared with the reference; the error rate of 5 % holds for all comparisons
together. Corrected p below 0.05: better or worse. Two one-sided tests place the
difference within the margin: equivalent. All else is undecided, and says so with the
difference that would have gone unseen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from resnext_ablate import stats


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


def compare(
    runs: Mapping[str, Sequence[float] | stats.Floats], *, reference: str, margin: float
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
    found = stats.many_to_one(groups, margin=margin) if tested else ()
    results = dict(zip(tested, found, strict=True))
    comparisons = []
    for label in others:
        pair = _Pair(label, reference, len(values[label]), len(base), margin)
        if (result := results.get(label)) and result.standard_error > 0:
            comparisons.append(_conclude(pair, result=result, family=len(tested)))
        else:
            difference = _mean(values[label]) - _mean(base)
            comparisons.append(_untested(pair, difference=difference))
    return tuple(comparisons)


def _mean(values: stats.Floats) -> float:
    return float(values.mean()) if len(values) else math.nan


def _conclude(pair: _Pair, *, result: stats.ArmTest, family: int) -> Comparison:
    half = result.critical * result.standard_error
    detectable = (
        stats.detectable_shift(result.critical, df=result.df) * result.standard_error
    )
    if result.p_corrected < stats.ALPHA:
        verdict = "better" if result.difference < 0 else "worse"
    elif result.p_equivalent < stats.ALPHA:
        verdict = f"equivalent within {pair.margin:g} points"
    else:
        verdict = "undecided"
    seeds = math.nan
    if verdict == "undecided":
        sizes = (pair.num_variant, pair.num_reference)
        sd = result.standard_error / math.sqrt(sum(1 / size for size in sizes))
        seeds = stats.seeds_to_decide(
            result.difference, sd=sd, margin=pair.margin, num_comparisons=family
        )
        seeds = max(seeds, max(sizes) + 1)
    comparison = Comparison(
        **vars(pair),
        difference=result.difference,
        low=result.difference - half,
        high=result.difference + half,
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
    need = f"more than {stats.MAX_SEEDS}" if math.isinf(seeds) else f"about {seeds:.0f}"
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


def study_verdict(
    runs: Mapping[str, Sequence[float] | stats.Floats],
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
        alone = stats.summarize(runs[reference])
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
    runs = f"{best.num_variant} runs each"
    if best.num_variant != best.num_reference:
        runs = f"{best.num_variant} against {best.num_reference} runs"
    others = [c for c in comparisons if c is not best]
    rest = f" Of the others, {_counts(others)}." if others else ""
    return (
        f"{best.variant} has {-best.difference:.2f} points less test error than "
        f"{best.reference} (95 % interval {-best.high:.2f} to {-best.low:.2f}, "
        f"{runs}).{rest}"
    )


def _counts(comparisons: Sequence[Comparison]) -> str:
    """Such as "1 is better, 2 are equivalent within 0.5 points, 1 is undecided"."""
    counts = Counter(comparison.verdict for comparison in comparisons)
    order = ("better", "worse", "equivalent", "undecided")
    return ", ".join(
        f"{counts[verdict]} {'is' if counts[verdict] == 1 else 'are'} {verdict}"
        for verdict in sorted(counts, key=lambda v: order.index(v.split()[0]))
    )
