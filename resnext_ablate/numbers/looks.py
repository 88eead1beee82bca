"""Seeds added where a comparison is open: when a study looks, and what it then knows.

A study of adaptive seeds runs a few seeds of every variant, looks, and gives further
seeds to those variants only that are neither shown to differ nor to be equivalent, and
to what they are compared with. Looks and their share of the error rate are fixed before
the first run, and what a look decides follows from the runs alone, so that scheduler
and report replay the same decisions from the same run files.

Each comparison may be wrong over all its looks as often as in one test: the share
(n / N)^1.5 of that has been spent after n of at most N seeds (Kim and DeMets 1987,
doi 10.1093/biomet/74.1.149). Levels of the single looks follow by the recursion of
Armitage, McPherson and Rowe (1969, doi 10.2307/2343787) for normal means, and are taken
over for the tests on few seeds. Error rates, simulated, stand in `tests/test_looks.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy import optimize, special

from resnext_ablate.numbers import families, power, stats, verdicts
from resnext_ablate.numbers.power import Family
from resnext_ablate.numbers.stats import Floats
from resnext_ablate.numbers.verdicts import Comparison, Rules

FIRST_SEEDS = 3
"""Of each variant before the first look."""
_STEP = 1.25
"""From one look to the next, seeds grow by this factor, and by one at least."""
_SPENDING = 1.5
_MANY = 1e5
"""Degrees of freedom that are as good as infinite."""
_NODES = 101
_NUM_SIMULATED = 100


@dataclass(frozen=True)
class PlannedLook:
    """A look that is fixed beforehand."""

    num_seeds: int
    """Of each variant that is still compared."""
    level: float
    """How often it alone may claim a difference that is not there, of any family."""


@dataclass(frozen=True)
class Standing:
    """Where a study of adaptive seeds stands by the runs that have ended."""

    comparisons: tuple[Comparison, ...]
    """Closed ones as they were when they closed, open ones as the last look left
    them."""
    num_looks: int
    """Looks that are past."""
    looks: tuple[PlannedLook, ...]
    """All there can be."""
    missing: tuple[tuple[str, int], ...]
    """(variant, seed) of the runs that the next look waits for; none at the end."""
    num_seeds: Mapping[str, int]
    """Seeds of each variant that the looks so far have used."""
    num_open: int
    """Comparisons that are neither shown to differ nor to be equivalent."""


@cache
def planned(
    *, max_seeds: int, num_comparisons: int, family: Family
) -> tuple[PlannedLook, ...]:
    """The looks of a study, the last one at `max_seeds`.

    Args:
        max_seeds: `FIRST_SEEDS` or more.
        num_comparisons: of the whole family, at least 1.
        family: which variants are compared.
    """
    numbers = [FIRST_SEEDS]
    while numbers[-1] < max_seeds:
        following = max(numbers[-1] + 1, int(numbers[-1] * _STEP + 0.5))
        # No last step that is a small one.
        numbers.append(following if following * 1.1 < max_seeds else max_seeds)
    correlations = np.full(num_comparisons, math.sqrt(0.5))
    whole = power.critical_value(
        num_comparisons=num_comparisons,
        family=family,
        df=_MANY,
        correlations=correlations,
        level=stats.ALPHA,
    )
    bounds = _bounds(numbers, rate=2 * float(special.ndtr(-whole)))
    if family == "reference":
        levels = stats.dunnett_p(bounds, correlations=correlations, df=_MANY)
    else:
        levels = num_comparisons * 2 * special.ndtr(-bounds)
    return tuple(
        PlannedLook(number, float(level))
        for number, level in zip(numbers, levels, strict=True)
    )


def _bounds(numbers: Sequence[int], *, rate: float) -> Floats:
    """(looks,): z-values that a sum of normal draws leaves as often as is spent.

    Args:
        numbers: of draws before each look.
        rate: how often any of them is left.
    """
    bounds = np.empty(len(numbers))
    # The sum of the draws where no bound was left so far: nodes, weights times density.
    sums, weights, before, spent = np.zeros(1), np.ones(1), 0, 0.0
    roots, shares = np.polynomial.legendre.leggauss(_NODES)
    for i, number in enumerate(numbers):
        sd = math.sqrt(number - before)
        due = rate * (number / numbers[-1]) ** _SPENDING

        def excess(
            z: float,
            *,
            edge: float = math.sqrt(number),
            sd: float = sd,
            sums: Floats = sums,
            weights: Floats = weights,
            due: float = due - spent,
        ) -> float:
            below = special.ndtr((-z * edge - sums) / sd)
            above = special.ndtr((sums - z * edge) / sd)
            return float(weights @ (below + above)) - due

        bounds[i] = optimize.brentq(excess, 0.1, 40.0, xtol=1e-9)
        edge = bounds[i] * math.sqrt(number)
        steps = (edge * roots[:, None] - sums) / sd
        density = np.exp(-(steps**2) / 2) @ weights / (sd * math.sqrt(2 * math.pi))
        sums, weights = edge * roots, edge * shares * density
        before, spent = number, due
    return bounds


def replay(
    ended: Mapping[str, Mapping[int, float]],
    *,
    reference: str,
    rules: Rules,
    max_seeds: int,
) -> Standing:
    """What a study has decided, by the runs that have ended.

    Args:
        ended: test errors in percent of each variant's runs by seed, in the plan's
            order; NaN where a run ended without one.
        reference: one of the variants.
        rules: of the study.
        max_seeds: of each variant.
    """
    pairs = verdicts.pairs_of(list(ended), reference=reference, family=rules.family)
    looks = planned(
        max_seeds=max_seeds, num_comparisons=max(1, len(pairs)), family=rules.family
    )
    found = {pair: _before_any(pair, rules=rules) for pair in pairs}
    used = dict.fromkeys(ended, 0)
    missing: tuple[tuple[str, int], ...] = ()
    num_looks = 0
    for look in looks:
        still = [pair for pair, one in found.items() if _is_open(one)]
        wanted = [variant for variant in ended if any(variant in p for p in still)]
        if not pairs and num_looks == 0:
            wanted = list(ended)  # A single variant has its first seeds all the same.
        missing = tuple(
            (variant, seed)
            for seed in range(look.num_seeds)
            for variant in wanted
            if seed not in ended[variant]
        )
        if missing or not wanted:
            break
        num_looks += 1
        used |= dict.fromkeys(wanted, look.num_seeds)
        runs = {variant: _first(ended[variant], n) for variant, n in used.items()}
        found |= _look(runs, found, level=look.level, number=num_looks, rules=rules)
    return Standing(
        comparisons=tuple(_with_place(one, looks) for one in found.values()),
        num_looks=num_looks,
        looks=looks,
        missing=missing,
        num_seeds=used,
        num_open=sum(map(_is_open, found.values())),
    )


def _look(
    runs: Mapping[str, Mapping[int, float]],
    found: Mapping[tuple[str, str], Comparison],
    *,
    level: float,
    number: int,
    rules: Rules,
) -> dict[tuple[str, str], Comparison]:
    """The comparisons that are open, tested once more."""
    still = [pair for pair, one in found.items() if _is_open(one)]
    tested = {variant for pair in still for variant in pair}
    past = [
        list(one.values()) for variant, one in runs.items() if variant not in tested
    ]
    equivalent = [one for one in found.values() if one.verdict.startswith("equiv")]
    compared = verdicts.compare_pairs(
        {variant: one for variant, one in runs.items() if variant in tested},
        pairs=still,
        rules=rules,
        look=families.Look(
            level=level,
            num_comparisons=len(found),
            num_equivalent=len(equivalent),
            beside=tuple(np.array(values) for values in past if len(values) > 1),
        ),
    )
    return {
        pair: replace(one, num_looks=number)
        for pair, one in zip(still, compared, strict=True)
    }


def expected_runs(
    *, num_variants: int, difference: float, sd: float, rules: Rules, max_seeds: int
) -> float:
    """Mean number of runs of simulated studies, which the same call draws alike.

    Args:
        num_variants: the reference among them.
        difference: points between the reference and every other variant.
        sd: spread between seeds in points.
        rules: of the study.
        max_seeds: of each variant.
    """
    rng = np.random.default_rng(0)
    numbers = []
    for _ in range(_NUM_SIMULATED):
        table = sd * rng.standard_normal((num_variants, max_seeds))
        table[1:] += difference
        runs = {str(i): dict(enumerate(row)) for i, row in enumerate(table.tolist())}
        standing = replay(runs, reference="0", rules=rules, max_seeds=max_seeds)
        numbers.append(sum(standing.num_seeds.values()))
    return float(np.mean(numbers))


def _first(runs: Mapping[int, float], num_seeds: int) -> dict[int, float]:
    """The results of the first seeds."""
    seeds = (seed for seed in range(num_seeds) if not math.isnan(runs[seed]))
    return {seed: runs[seed] for seed in seeds}


def _is_open(comparison: Comparison) -> bool:
    return comparison.verdict == "undecided"


def _before_any(pair: tuple[str, str], *, rules: Rules) -> Comparison:
    none: dict[str, dict[int, float]] = {label: {} for label in pair}
    return replace(
        verdicts.untested(pair, runs=none, rules=rules),
        explanation=f"the first look comes after {FIRST_SEEDS} seeds of each variant",
    )


def _with_place(comparison: Comparison, looks: Sequence[PlannedLook]) -> Comparison:
    """Says at which look a comparison was closed, or left open."""
    number = comparison.num_looks
    if number == 0:
        return comparison
    place = f"look {number} of {len(looks)}, {looks[number - 1].num_seeds} seeds"
    if _is_open(comparison):
        text = f"open after {place}: {comparison.explanation}"
    else:
        text = f"{comparison.explanation} (closed at {place})"
    return replace(comparison, explanation=text)


def sentence(standing: Standing) -> str:
    """At which looks comparisons closed, and how many are open."""
    if standing.num_looks == 0:
        return f"The first look comes after {FIRST_SEEDS} seeds of each variant."
    counts = Counter(one.num_looks for one in standing.comparisons if not _is_open(one))
    parts = [
        f"{count} closed at look {number} ({standing.looks[number - 1].num_seeds} "
        "seeds)"
        for number, count in sorted(counts.items())
    ]
    if standing.num_open:
        is_last = standing.num_looks == len(standing.looks)
        last = "the last look" if is_last else f"look {standing.num_looks}"
        seeds = standing.looks[standing.num_looks - 1].num_seeds
        parts.append(f"{standing.num_open} open after {last} ({seeds} seeds)")
    return (
        f"Seeds were added where a comparison was open, with looks at the runs after "
        f"{', '.join(str(look.num_seeds) for look in standing.looks)} seeds: "
        f"{', '.join(parts)}."
    )
