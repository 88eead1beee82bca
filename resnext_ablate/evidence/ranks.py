"""How far two rankings of the same variants agree (Kendall's tau), and could agree.

Seed noise turns rankings: two measurements of one true order do not reach a tau of one,
and a bootstrap of the seeds, noisier still, would deny that the orders can be equal.
The interval, of the true errors' tau, joins three parts: the quantiles of tau under the
noise, the same reflected at the tau seen, and the ends, 1 or -1, where equal or opposed
true orders would give a tau as far off as the one seen in more than 2.5 %. Simulated
(6 variants, 3 to 10 seeds, true tau 1, 0.6 and 0) it holds the truth in 95 % or more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from resnext_ablate.numbers.stats import ALPHA, Floats, pooled_sd

_NUM_DRAWS = 2000
_MANY = 40
_NUM_DRAWS_OF_MANY = 200


@dataclass(frozen=True)
class Agreement:
    """Kendall's tau of two rankings."""

    tau: float
    low: float
    high: float
    """95 % interval of the tau of true errors; NaN where the runs show no spread."""
    ceiling: float
    """What tau would be on average if the true orders were equal; NaN as above."""
    num_variants: int


def agreement(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]
) -> Agreement | None:
    """Two measurements of the same variants, such as after few and many epochs.

    Args:
        first: errors of the runs of each variant.
        second: the same, by other runs or another budget; one number for each variant
            is taken as it is, such as the paper's.

    Returns:
        None where fewer than three variants are in both.
    """
    labels = [label for label in first if first[label] and second.get(label)]
    if len(labels) < 3:
        return None
    a, b = (_ranking([runs[label] for label in labels]) for runs in (first, second))
    tau = float(stats.kendalltau(a.means, b.means).statistic)
    if math.isnan(a.error) or math.isnan(b.error):
        return Agreement(tau, math.nan, math.nan, math.nan, len(labels))
    rng = np.random.default_rng(0)
    noisy = _taus(a.drawn(a.means, rng), b.drawn(b.means, rng))
    low, high = np.quantile(noisy, [ALPHA / 2, 1 - ALPHA / 2])
    low, high = min(low, 2 * tau - high), max(high, 2 * tau - low)
    order = np.argsort(np.argsort(a.shrunk))
    same = np.sort(b.shrunk)[order]
    if_same = _taus(a.drawn(a.shrunk, rng), b.drawn(same, rng))
    opposed = np.sort(b.shrunk)[::-1][order]
    if_opposed = _taus(a.drawn(a.shrunk, rng), b.drawn(opposed, rng))
    if np.mean(if_same <= tau) > ALPHA / 2:
        high = 1.0
    if np.mean(if_opposed >= tau) > ALPHA / 2:
        low = -1.0
    return Agreement(
        tau,
        float(max(low, -1)),
        float(min(high, 1)),
        # Where the means differ by no more than noise it is zero, give or take a draw.
        max(0.0, float(if_same.mean())),
        len(labels),
    )


def sentence(found: Agreement, *, name: str) -> str:
    """Such as "Kendall's tau with the paper's order: +0.60 (95 % interval ...)."."""
    interval = noise = ""
    if not math.isnan(found.low):
        interval = f" (95 % interval {found.low:+.2f} to {found.high:+.2f})"
        noise = f"; with equal true orders seed noise leaves {found.ceiling:.2f}"
    return f"Kendall's tau {name}: {found.tau:+.2f}{interval}{noise}."


@dataclass(frozen=True)
class _Ranking:
    """Means of variants with their noise."""

    means: Floats
    error: float
    """Standard error of a mean; zero for numbers taken as they are, NaN if unknown."""
    df: int
    shrunk: Floats
    """The means drawn together: they spread wider than the truth by their noise."""

    def drawn(self, centre: Floats, rng: np.random.Generator) -> Floats:
        """(draws, variants) means as other seeds would give them."""
        count = len(self.means)
        shape = (_NUM_DRAWS if count <= _MANY else _NUM_DRAWS_OF_MANY, count)
        if self.error == 0:
            return np.broadcast_to(centre, shape)
        return centre + self.error * rng.standard_t(self.df, shape)


def _ranking(runs: Sequence[Sequence[float]]) -> _Ranking:
    groups = [np.array(values, dtype=float) for values in runs]
    means = np.array([group.mean() for group in groups])
    sizes = np.array([len(group) for group in groups])
    if sizes.max() == 1:
        return _Ranking(means, 0.0, 0, means)
    if pooled_sd(groups) == 0:
        return _Ranking(means, math.nan, 0, means)
    error = pooled_sd(groups) * math.sqrt(float(np.mean(1 / sizes)))
    seen = float(means.var(ddof=1))
    # As James and Stein shrink: a ratio of few variances is too large on average.
    factor = max(0, len(means) - 3) / (len(means) - 1)
    share = max(0.0, 1 - factor * error**2 / seen) if seen > 0 else 0.0
    shrunk = means.mean() + math.sqrt(share) * (means - means.mean())
    return _Ranking(means, error, int(sizes.sum()) - len(sizes), shrunk)


def _taus(first: Floats, second: Floats) -> Floats:
    """Kendall's tau of each row of (draws, variants) values without ties."""
    if first.shape[1] > _MANY:
        pairs = zip(first, second, strict=True)
        return np.array([stats.kendalltau(a, b).statistic for a, b in pairs])
    one, other = np.triu_indices(first.shape[1], 1)
    total = np.zeros(len(first))
    for i, j in zip(one, other, strict=True):
        total += np.sign(first[:, i] - first[:, j]) * np.sign(
            second[:, i] - second[:, j]
        )
    return total / len(one)
