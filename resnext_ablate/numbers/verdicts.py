"""What a study's runs allow to be said, in words fixed by rule.

Values are test errors in percent, one for each run, and a lower one is better. Every
difference is variant minus reference, in points.

The rules are fixed before any mean is seen. Runs that ended well count, no others. The
tests are those of `families`; their error rate of 5 % holds for all comparisons of the
family together. Corrected p below 0.05: better or worse. Two one-sided tests place the
difference within the margin: equivalent. All else is undecided, and says so with the
difference that would have gone unseen, and the seeds and minutes that would decide.
What is said holds for other seeds on the same test images.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from resnext_ablate.numbers import families, power, stats
from resnext_ablate.numbers.power import Family


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
    """The pair's own t-test, two-sided, not corrected."""
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
    minutes_to_decide: float
    """What the missing runs of both would add to the study's time; NaN if unknown."""
    verdict: str
    explanation: str
    num_looks: int
    """How often it was tested; 1 in a study of fixed seeds, 0 where nothing was."""


@dataclass(frozen=True)
class Rules:
    """What a study says of its comparisons before any result is seen."""

    margin: float
    """Points of error that count as no difference."""
    family: Family = "reference"
    """Which variants are compared: each with the reference, or each with each."""
    pairing: families.Pairing = "auto"
    """Whether runs are paired by seed; "auto" leaves it to the residuals."""
    run_minutes: Mapping[str, float] = field(default_factory=dict)
    """Of each variant, what one more run adds to the study's time; may be empty."""


def compare(
    runs: Mapping[str, Mapping[int, float]], *, reference: str, rules: Rules
) -> tuple[Comparison, ...]:
    """Every other variant against the reference, or each variant against each.

    Args:
        runs: test errors in percent of the finished runs of each variant, by seed.
        reference: one of the variants.
        rules: of the study.
    """
    pairs = pairs_of(list(runs), reference=reference, family=rules.family)
    return compare_pairs(runs, pairs=pairs, rules=rules, look=families.Look())


def compare_pairs(
    runs: Mapping[str, Mapping[int, float]],
    *,
    pairs: Sequence[tuple[str, str]],
    rules: Rules,
    look: families.Look,
) -> tuple[Comparison, ...]:
    """Some pairs of variants, as one family or as what is left of one.

    Args:
        runs: as for `compare`, of the variants in `pairs`.
        pairs: variant and what it is compared with.
        rules: of the study.
        look: the only one, or one of several.
    """
    enough = _varied(runs)
    if rules.pairing == "paired":
        enough = _sharing_seeds(runs, enough)
    tested = [pair for pair in pairs if enough.issuperset(pair)]
    labels = list(dict.fromkeys(label for pair in tested for label in pair))
    found = (
        families.compare_pairs(
            [runs[label] for label in labels],
            pairs=[(labels.index(a), labels.index(b)) for a, b in tested],
            margin=rules.margin,
            family=rules.family,
            pairing=rules.pairing,
            look=look,
        )
        if tested
        else ()
    )
    results = dict(zip(tested, found, strict=True))
    num_variants = len(labels) + len(look.beside)
    return tuple(
        _conclude(pair, result=results[pair], rules=rules, num_variants=num_variants)
        if pair in results and not math.isnan(results[pair].half_width)
        else untested(pair, runs=runs, rules=rules)
        for pair in pairs
    )


def pairs_of(
    labels: Sequence[str], *, reference: str, family: Family
) -> list[tuple[str, str]]:
    """Each variant and what it is compared with."""
    others = [label for label in labels if label != reference]
    pairs = [(label, reference) for label in others]
    if family == "pairs":
        pairs += [(b, a) for a, b in itertools.combinations(others, 2)]
    return pairs


def _sharing_seeds(
    runs: Mapping[str, Mapping[int, float]], labels: set[str]
) -> set[str]:
    """The variants, if all of them share at least two seeds."""
    seeds = [set(runs[label]) for label in labels]
    shared = set[int].intersection(*seeds) if seeds else set()
    return labels if len(shared) >= 2 else set()


def _conclude(
    pair: tuple[str, str],
    *,
    result: families.PairTest,
    rules: Rules,
    num_variants: int,
) -> Comparison:
    if result.p_corrected < stats.ALPHA:
        verdict = "better" if result.difference < 0 else "worse"
    elif result.p_equivalent < stats.ALPHA:
        verdict = f"equivalent within {rules.margin:g} points"
    else:
        verdict = "undecided"
    seeds = minutes = math.nan
    if verdict == "undecided":
        seeds = power.seeds_to_decide(
            result.difference,
            sd=result.sd,
            margin=rules.margin,
            num_variants=num_variants,
            family=rules.family,
            paired="paired" in result.method,
        )
        seeds = max(seeds, max(result.num_first, result.num_second) + 1)
        sizes = (result.num_first, result.num_second)
        minutes = sum(
            (seeds - size) * rules.run_minutes.get(label, math.nan)
            for label, size in zip(pair, sizes, strict=True)
        )
    comparison = Comparison(
        variant=pair[0],
        reference=pair[1],
        num_variant=result.num_first,
        num_reference=result.num_second,
        difference=result.difference,
        low=result.difference - result.half_width,
        high=result.difference + result.half_width,
        p_value=result.p_value,
        p_corrected=result.p_corrected,
        correction=result.method,
        p_equivalent=result.p_equivalent,
        margin=rules.margin,
        detectable=result.detectable,
        seeds_to_decide=seeds,
        minutes_to_decide=minutes,
        verdict=verdict,
        explanation="",
        num_looks=1,
    )
    return replace(comparison, explanation=_explain(comparison))


def _explain(comparison: Comparison) -> str:
    if comparison.verdict in ("better", "worse"):
        near, far = sorted((abs(comparison.low), abs(comparison.high)))
        return f"by {near:.2f} to {far:.2f} points"
    if comparison.verdict != "undecided":
        return "the difference, if any, is smaller than the margin"
    return (
        f"a true difference below {comparison.detectable:.2f} points would often go "
        f"unseen; {_need(comparison)} would decide if the difference seen is true"
    )


def _need(comparison: Comparison) -> str:
    """Such as "4 more seeds of both (about 7 minutes)"."""
    if math.isinf(comparison.seeds_to_decide):
        return f"more than {power.MAX_SEEDS} seeds per variant"
    more = comparison.seeds_to_decide - max(
        comparison.num_variant, comparison.num_reference
    )
    minutes = comparison.minutes_to_decide
    time = "" if math.isnan(minutes) else f" ({_duration(minutes)})"
    return f"about {more:.0f} more seed{'s' if more > 1 else ''} of both{time}"


def _duration(minutes: float) -> str:
    if minutes < 1:
        return "under a minute"
    if minutes < 120:
        return f"about {minutes:.0f} minute{'s' if round(minutes) > 1 else ''}"
    return f"about {minutes / 60:.0f} hours"


def untested(
    pair: tuple[str, str], *, runs: Mapping[str, Mapping[int, float]], rules: Rules
) -> Comparison:
    """A comparison that the runs do not allow: no interval, no test, no claim."""
    sizes = [len(runs[label]) for label in pair]
    if min(sizes) == 0:
        why = f"no complete run of {pair[sizes.index(0)]}"
    elif min(sizes) == 1:
        why = "one run shows no spread; both sides need at least 2 seeds"
    elif rules.pairing == "paired" and not _sharing_seeds(runs, _varied(runs)):
        why = "the variants share fewer than 2 seeds to pair the runs by"
    else:
        why = "the seeds gave equal values, so there is no spread to judge by"
    unknown = math.nan
    return Comparison(
        variant=pair[0],
        reference=pair[1],
        num_variant=sizes[0],
        num_reference=sizes[1],
        difference=_mean(runs[pair[0]]) - _mean(runs[pair[1]]),
        low=unknown,
        high=unknown,
        p_value=unknown,
        p_corrected=unknown,
        correction="none",
        p_equivalent=unknown,
        margin=rules.margin,
        detectable=unknown,
        seeds_to_decide=unknown,
        minutes_to_decide=unknown,
        verdict="undecided",
        explanation=why,
        num_looks=0,
    )


def _varied(runs: Mapping[str, Mapping[int, float]]) -> set[str]:
    return {label for label, values in runs.items() if len(values) >= 2}


def _mean(values: Mapping[int, float]) -> float:
    return fmean(values.values()) if values else math.nan


def study_verdict(
    runs: Mapping[str, Mapping[int, float]],
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
    others = [c for c in comparisons if c.reference != reference]
    comparisons = [c for c in comparisons if c.reference == reference]
    sentence = _against_reference(
        runs, comparisons, reference=reference, setting=setting
    )
    if not others:
        return sentence
    differ = sum(c.verdict in ("better", "worse") for c in others)
    return f"{sentence} Of the other {len(others)} pairs, {differ} differ."


def _against_reference(
    runs: Mapping[str, Mapping[int, float]],
    comparisons: Sequence[Comparison],
    *,
    reference: str,
    setting: str,
) -> str:
    if not any(len(values) for values in runs.values()):
        return "No run is complete, so there is nothing to say yet."
    if not comparisons:
        alone = stats.summarize(list(runs[reference].values()))
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
