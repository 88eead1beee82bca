"""Intervals, corrections and power for a few runs of each variant.

Values are test errors in percent, one for each run. The pieces here say nothing of a
study; `families` puts them together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

ALPHA = 0.05
"""How often a study may claim at least one difference that is not there."""

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


def summarize(values: Sequence[float] | Floats) -> Summary:
    """Mean, standard deviation (n - 1) and 95 % t-interval of the mean."""
    runs = np.asarray(values, dtype=float)
    num_runs = len(runs)
    if num_runs == 0:
        return Summary(0, math.nan, math.nan, math.nan, math.nan)
    mean = float(runs.mean())
    if num_runs == 1:
        return Summary(1, mean, math.nan, math.nan, math.nan)
    sd = spread(runs)
    if sd == 0:
        return Summary(num_runs, mean, 0.0, math.nan, math.nan)
    half = float(stats.t.ppf(1 - ALPHA / 2, num_runs - 1)) * sd / math.sqrt(num_runs)
    return Summary(num_runs, mean, sd, mean - half, mean + half)


def pooled_sd(groups: Sequence[Floats]) -> float:
    """Standard deviation within groups, each around its own mean."""
    squares = sum((len(group) - 1) * spread(group) ** 2 for group in groups)
    return math.sqrt(squares / sum(len(group) - 1 for group in groups))


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


def dunnett_critical(*, correlations: Floats, df: float, level: float = ALPHA) -> float:
    """The t-value that the largest of all arms exceeds in `level` of null studies."""
    return _dunnett_critical(tuple(correlations.tolist()), df, level)


@cache
def _dunnett_critical(
    correlations: tuple[float, ...], df: float, level: float
) -> float:
    arms = np.array(correlations)

    def excess(t: float) -> float:
        cdf = _dunnett_cdf(np.array([t]), correlations=arms, df=df)
        return float(cdf[0]) - (1 - level)

    bonferroni = float(stats.t.isf(level / len(arms) / 2, df))
    return float(optimize.brentq(excess, 0.5, bonferroni + 0.01, xtol=1e-8))


def _dunnett_cdf(t_values: Floats, *, correlations: Floats, df: float) -> Floats:
    """P(all |T_i| <= t), T_i = (b_i Z + sqrt(1 - b_i^2) X_i) / S."""
    s, s_weights = spread_nodes(df)
    z, z_weights = _legendre(-8.0, 8.0, num_nodes=_NODES)
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
def spread_nodes(df: float, *, num_nodes: int = _NODES) -> tuple[Floats, Floats]:
    """Nodes and weights for S = sqrt(chi-square / df)."""
    low, high = np.sqrt(special.chdtri(df, [1 - 1e-12, 1e-12]) / df)
    s, weights = _legendre(float(low), float(high), num_nodes=num_nodes)
    log_pdf = (
        (df - 1) * np.log(s)
        - df * s**2 / 2
        + df / 2 * math.log(df / 2)
        - special.gammaln(df / 2)
        + math.log(2)
    )
    return s, weights * np.exp(log_pdf)


def _legendre(low: float, high: float, *, num_nodes: int) -> tuple[Floats, Floats]:
    nodes, weights = _unit_legendre(num_nodes)
    half = (high - low) / 2
    return low + half * (nodes + 1), weights * half


@cache
def _unit_legendre(num_nodes: int) -> tuple[Floats, Floats]:
    return np.polynomial.legendre.leggauss(num_nodes)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction; unknown p-values count in the family and stay unknown."""
    # statsmodels' multipletests runs a full garbage collection on each call (60 ms).
    p = np.array(p_values)
    order = np.argsort(p)  # NaN goes last.
    corrected = np.empty(len(p))
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected[order] = np.minimum(steps, 1.0)
    return [float(value) for value in corrected]


def spread(values: Floats) -> float:
    """Standard deviation; exactly zero where all values are equal."""
    if len(values) < 2 or np.ptp(values) <= 1e-9 * max(1.0, abs(float(values[0]))):
        return 0.0
    return float(values.std(ddof=1))
