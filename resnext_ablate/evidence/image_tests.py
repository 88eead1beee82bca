"""What the test images allow to be said: which of them each run gets right.

Three claims, from narrow to wide. McNemar's exact test for two runs of one seed, and
the exact sign test for all runs of two variants together, hold for other images like
these, but for these trained nets only. The verdicts hold for other seeds, but on these
images only. The interval over seeds and images holds for other seeds and other images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import signal, special

from resnext_ablate.numbers.power import LEVEL
from resnext_ablate.numbers.stats import holm
from resnext_ablate.numbers.verdicts import Comparison

Correct = NDArray[np.bool_]
"""(N,): which test images one run gets right."""


@dataclass(frozen=True)
class SeedTest:
    """Two variants with one seed: the images that only one of the runs gets right."""

    seed: int
    only_first: int
    only_second: int
    p_value: float
    """McNemar's exact test, two-sided."""


@dataclass(frozen=True)
class ImageComparison:
    """Two variants compared over test images; NaN where the runs do not tell."""

    variant: str
    reference: str
    p_images: float
    """Exact sign test over images, Holm-corrected: other images, these nets only."""
    low: float
    high: float
    """Bounds of the interval of the difference over seeds and images."""
    by_seed: tuple[SeedTest, ...]


def compare_images(
    comparisons: Sequence[Comparison],
    *,
    correct: Mapping[str, Mapping[int, Correct]],
) -> tuple[ImageComparison, ...]:
    """The images' say on each comparison.

    Args:
        comparisons: the verdicts of a study, one family.
        correct: (N,) by variant and seed; variants may lack.
    """
    sides = [
        (correct.get(c.variant, {}), correct.get(c.reference, {})) for c in comparisons
    ]
    signs = [
        sign_test(list(a.values()), list(b.values())) if a and b else math.nan
        for a, b in sides
    ]
    level = LEVEL / max(1, len(comparisons))
    return tuple(
        _compare_images(c, first=a, second=b, p_images=p, level=level)
        for c, (a, b), p in zip(comparisons, sides, holm(signs), strict=True)
    )


def _compare_images(
    comparison: Comparison,
    *,
    first: Mapping[int, Correct],
    second: Mapping[int, Correct],
    p_images: float,
    level: float,
) -> ImageComparison:
    half = math.nan
    known = (len(first), len(second))
    if known == (comparison.num_variant, comparison.num_reference) and min(known) > 1:
        half = widened(
            comparison.high - comparison.difference,
            variance=image_variance(
                first, second, paired="paired" in comparison.correction
            ),
            level=level,
        )
    shared = sorted(first.keys() & second.keys())
    return ImageComparison(
        variant=comparison.variant,
        reference=comparison.reference,
        p_images=p_images,
        low=comparison.difference - half,
        high=comparison.difference + half,
        by_seed=tuple(mcnemar(first[s], second[s], seed=s) for s in shared),
    )


def mcnemar(first: Correct, second: Correct, *, seed: int) -> SeedTest:
    """Exact test that two trained nets are right equally often (McNemar 1947)."""
    only_first = int((first & ~second).sum())
    only_second = int((second & ~first).sum())
    smaller, total = min(only_first, only_second), only_first + only_second
    p_value = min(1.0, 2 * float(special.bdtr(smaller, total, 0.5))) if total else 1.0
    return SeedTest(seed, only_first, only_second, p_value)


def sign_test(first: Sequence[Correct], second: Sequence[Correct]) -> float:
    """Exact two-sided p-value over images, all runs of two variants together.

    An image counts by how much oftener the runs of one variant get it right. If the
    variants are equal, each image is as likely to lean one way as the other; the sum
    over all such signs is enumerated by convolution. With one run each this is
    McNemar's test.

    Args:
        first: (N,) for each run of one variant.
        second: the same for the other.
    """
    # Whole numbers: means over the runs, times both numbers of runs.
    leaning = len(second) * np.sum(first, axis=0, dtype=int)
    leaning -= len(first) * np.sum(second, axis=0, dtype=int)
    sizes, counts = np.unique(np.abs(leaning[leaning != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    unit = np.gcd.reduce(sizes)
    chances = np.ones(1)
    for size, count in zip(sizes // unit, counts, strict=True):
        # The sum of `count` signs is 2 B - count, B binomial; on the lattice of B.
        heads = np.arange(count + 1)
        step = np.zeros(int(size) * int(count) + 1)
        step[:: int(size)] = np.exp(
            special.gammaln(count + 1)
            - special.gammaln(heads + 1)
            - special.gammaln(count - heads + 1)
            - count * math.log(2)
        )
        chances = signal.oaconvolve(chances, step)
    sums = 2 * np.arange(len(chances)) - (len(chances) - 1)
    seen = abs(int(leaning.sum() // unit))
    return float(np.clip(chances[np.abs(sums) >= seen].sum(), 0.0, 1.0))


def image_variance(
    first: Mapping[int, Correct], second: Mapping[int, Correct], *, paired: bool
) -> float:
    """Variance of a difference of mean errors, in points, that other images would add.

    The variance over images of the mean difference holds the noise of the seeds too;
    that part is in the spread of the seeds already and is taken off.

    Args:
        first: (N,) by seed, of one variant; at least two seeds.
        second: the same for the other.
        paired: only seeds that both have count, and their noise is that of the
            differences.
    """
    if paired:
        seeds = sorted(first.keys() & second.keys())
        table = 100.0 * np.array([second[s].astype(float) - first[s] for s in seeds])
        per_image = table.mean(axis=0)
        noise = table.var(axis=0, ddof=1) / len(seeds)
    else:
        a = 100.0 * np.array(list(first.values()), dtype=float)
        b = 100.0 * np.array(list(second.values()), dtype=float)
        per_image = b.mean(axis=0) - a.mean(axis=0)
        noise = a.var(axis=0, ddof=1) / len(a) + b.var(axis=0, ddof=1) / len(b)
    num_images = len(per_image)
    total = float(per_image.var(ddof=1)) / num_images
    return max(0.0, total - float(noise.mean()) / num_images)


def widened(half_width: float, *, variance: float, level: float) -> float:
    """Half an interval over seeds, widened to hold for other images too.

    Args:
        half_width: of the interval on these images, in points.
        variance: what other images would add (`image_variance`).
        level: two-sided, of this one interval.
    """
    return math.hypot(half_width, _normal_bound(level) * math.sqrt(variance))


def _normal_bound(level: float) -> float:
    return float(special.ndtri(1 - level / 2))
