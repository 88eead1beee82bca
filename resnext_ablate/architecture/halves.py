"""Sums of independent choices that lie in windows: counted and selected, exactly.

The factors of a setting are split into two halves. Each half's combinations are
tabulated and sorted by cost; then the partners of an entry of the first half are a run
of the second. How many partners each entry has gives the count, and any number below
the count names one solution. Nothing is ever rejected.

A second window makes the partners those of a run whose second cost lies in a range,
which a wavelet matrix counts and selects. Where the first window leaves few pairs, or
with a third window, the pairs are listed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from resnext_ablate.architecture.costs import Ints
from resnext_ablate.architecture.spec import InputError
from resnext_ablate.architecture.wavelet import WaveletMatrix

MAX_COMBINATIONS = 1 << 24
"""Of one half; with their partners they take about 1 GiB."""
MAX_RANGED = 1 << 23
"""The same beside a second window, whose wavelet matrix takes 0.8 GiB more."""
MAX_LISTED = 1 << 24
"""Pairs that may be listed where there is a third window."""
_FEW_LISTED = 1 << 21  # Listing these is quicker than a wavelet matrix.
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """Combinations of some factors."""

    factors: tuple[int, ...]
    costs: Ints
    """(K, n)."""
    index: Ints | None
    """Where each stands in its source; None: in the same place."""
    source: Join | None
    """How they were combined; None for the choices of one factor."""

    @property
    def size(self) -> int:
        return int(self.costs.shape[1])

    def choices(self, positions: Ints) -> Ints:
        """Which choice of each factor makes a combination: (m, factors)."""
        if self.index is not None:
            positions = self.index[positions].astype(np.int64)
        if self.source is None:  # One factor, or none at all.
            return positions[:, None][:, : len(self.factors)]
        return self.source.choices(positions)

    def take(self, index: Ints) -> Options:
        """Some of them, in another order."""
        whole = index if self.index is None else self.index[index]
        return Options(self.factors, self.costs[:, index], whole, self.source)


@dataclass(frozen=True, slots=True)
class Join:
    """For each of the rows a run of the columns."""

    rows: Options
    columns: Options
    starts: Ints
    """First combination of each row."""
    lows: Ints
    """First column of each row."""

    def choices(self, positions: Ints) -> Ints:
        row = np.searchsorted(self.starts, positions, side="right") - 1
        column = self.lows[row] + positions - self.starts[row]
        return np.hstack([self.rows.choices(row), self.columns.choices(column)])


@dataclass(frozen=True, slots=True)
class Run:
    """Partners that stand together: all from `low` on."""

    low: Ints
    counts: Ints

    def select(self, entries: Ints, ordinals: Ints) -> Ints:
        return self.low[entries] + ordinals


@dataclass(frozen=True, slots=True)
class Listed:
    """Partners one by one."""

    starts: Ints
    counts: Ints
    partners: Ints

    def select(self, entries: Ints, ordinals: Ints) -> Ints:
        places: Ints = self.partners[self.starts[entries] + ordinals]
        return places


@dataclass(frozen=True, slots=True)
class Ranged:
    """Partners of a run whose second cost, as a rank, lies in a range."""

    run: Run
    matrix: WaveletMatrix
    below: Ints
    """Of the run, those whose rank is below the range."""
    counts: Ints
    place: Ints
    """Where each rank stands."""

    def select(self, entries: Ints, ordinals: Ints) -> Ints:
        low = self.run.low[entries]
        high = low + self.run.counts[entries]
        ordinals = self.below[entries] + ordinals
        places: Ints = self.place[self.matrix.quantile(low, high, ordinals)]
        return places


Partners = Run | Listed | Ranged


@dataclass(frozen=True, slots=True)
class Solutions:
    """All combinations of the factors whose costs lie in the windows."""

    first: Options
    second: Options
    partners: Partners
    ends: Ints
    """Solutions of the first half's entries up to and with each."""

    @property
    def count(self) -> int:
        return int(self.ends[-1])

    @property
    def size(self) -> int:
        """Combinations in memory."""
        return self.first.size + self.second.size

    def choices(self, ranks: Ints) -> Ints:
        """The choice of each factor in the solutions of some ranks: (m, factors)."""
        order = np.argsort(ranks)  # In order, because memory is read so.
        ranks = ranks[order]
        entries = np.searchsorted(self.ends, ranks, side="right")
        ordinals = ranks - (self.ends[entries] - self.partners.counts[entries])
        partners = self.partners.select(entries, ordinals)
        halves = [self.first.choices(entries), self.second.choices(partners)]
        columns = np.argsort((*self.first.factors, *self.second.factors))
        found = np.empty((len(ranks), len(columns)), np.int64)
        found[order] = np.hstack(halves)[:, columns]
        return found


def solve(costs: Sequence[Ints], low: Ints, high: Ints) -> Solutions | None:
    """The combinations of one choice of each factor whose summed costs fit windows.

    Args:
        costs: of each factor's choices, each (K, n).
        low: least sum of each cost, (K,).
        high: largest sum of each cost, (K,).

    Returns:
        The solutions, or None where there are none.

    Raises:
        InputError: they are too many for memory.
    """
    narrow = _narrow_first(costs, low, high)
    low, high = low[narrow], high[narrow]
    factors = [
        Options((number,), table[narrow], None, None)
        for number, table in enumerate(costs)
    ]
    factors = _pruned(factors, low, high)
    if not all(options.size for options in factors):
        return None
    one, two = _split([options.size for options in factors])
    limit = MAX_COMBINATIONS if len(low) == 1 else MAX_RANGED
    others = [factors[number] for number in two]
    first = _combined([factors[n] for n in one], *_room(others, low, high), limit)
    if not first.size:
        return None
    second = _combined(others, *_room([first], low, high), limit)
    if not second.size:
        return None
    first, partners = _partners(first, second, low, high)
    ends = np.cumsum(partners.counts)
    return Solutions(first, second, partners, ends) if ends.size and ends[-1] else None


def _narrow_first(costs: Sequence[Ints], low: Ints, high: Ints) -> Ints:
    """The windows in order, the one that leaves least of what sums can be first."""
    spans = np.ones(len(low))
    for table in costs:
        if table.size:
            spans += np.ptp(table, axis=1)
    return np.argsort((high - low) / spans, kind="stable")


def _pruned(factors: list[Options], low: Ints, high: Ints) -> list[Options]:
    """The choices that fit beside the cheapest and the dearest of the others."""
    before = -1
    while before != sum(options.size for options in factors):
        before = sum(options.size for options in factors)
        for number, options in enumerate(factors):
            others = [*factors[:number], *factors[number + 1 :]]
            if not all(other.size for other in factors):
                return factors
            floor, ceiling = _room(others, low, high)
            fits = _within(options.costs, floor, ceiling)
            factors[number] = options.take(np.flatnonzero(fits))
    return factors


def _room(others: Sequence[Options], low: Ints, high: Ints) -> tuple[Ints, Ints]:
    """What is left for a choice beside the dearest and the cheapest of the others."""
    for other in others:
        low = low - other.costs.max(axis=1)
        high = high - other.costs.min(axis=1)
    return low, high


def _within(costs: Ints, floor: Ints, ceiling: Ints) -> NDArray[np.bool_]:
    fits = np.ones(costs.shape[1], bool)
    for row, least, most in zip(costs, floor, ceiling, strict=True):
        fits &= (row >= least) & (row <= most)
    return fits


def _split(sizes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The factors in two halves with the fewest combinations between them."""
    numbers = range(len(sizes))

    def work(half: tuple[int, ...]) -> int:
        rest = [sizes[n] for n in numbers if n not in half]
        return math.prod(sizes[n] for n in half) + math.prod(rest)

    halves = [
        half
        for length in range(1, len(sizes) // 2 + 1)
        for half in combinations(numbers, length)
    ]
    best = min(halves, key=work, default=tuple(numbers))
    return best, tuple(n for n in numbers if n not in best)


def _combined(
    parts: Sequence[Options], floor: Ints, ceiling: Ints, limit: int
) -> Options:
    """The combinations of one half within some bounds, in the order of their cost."""
    neutral = Options((), np.zeros((len(floor), 1), np.int64), None, None)
    total = parts[0] if parts else neutral
    for number, part in enumerate(parts[1:], start=1):
        total = _join(total, part, *_room(parts[number + 1 :], floor, ceiling), limit)
        if not total.size:
            return total
    fits = _within(total.costs, floor, ceiling)
    return _sorted(total if fits.all() else total.take(np.flatnonzero(fits)))


def _join(
    one: Options, other: Options, floor: Ints, ceiling: Ints, limit: int
) -> Options:
    """Each of the one with each of the other, as far as they stay within bounds."""
    rows, columns = sorted((one, other), key=lambda options: options.size)
    columns = _sorted(columns)
    lows = np.searchsorted(columns.costs[0], floor[0] - rows.costs[0], side="left")
    highs = np.searchsorted(columns.costs[0], ceiling[0] - rows.costs[0], side="right")
    starts = np.concatenate([[0], np.cumsum(highs - lows)])
    total = int(starts[-1])
    if total > limit:
        raise InputError(
            f"half of the stages have {total:,} combinations near the windows, and at "
            f"most {limit:,} fit into memory: take steps or powers of two, make "
            "numbers shared, or narrow the space."
        )
    costs = np.empty((len(floor), total), np.int64)
    for row in np.flatnonzero(highs > lows):
        place, run = slice(starts[row], starts[row + 1]), slice(lows[row], highs[row])
        np.add(columns.costs[:, run], rows.costs[:, row, None], out=costs[:, place])
    joined = Options(
        (*rows.factors, *columns.factors),
        costs,
        None,
        Join(rows, columns, starts[:-1], lows),
    )
    fits = _within(costs[1:], floor[1:], ceiling[1:])
    return joined if fits.all() else joined.take(np.flatnonzero(fits))


def _sorted(options: Options) -> Options:
    """In the order of the first cost."""
    costs = options.costs[0]
    if not costs.size:
        return options
    least, bits = costs.min(), int(costs.size).bit_length()
    if int(np.ptp(costs)).bit_length() + bits < 63:
        # Cost and place in one number: sorts in half the time of argsort.
        packed = costs - least
        packed <<= bits
        packed |= np.arange(costs.size)
        packed.sort()
        order = (packed & ((1 << bits) - 1)).astype(np.int32)
        packed >>= bits
        packed += least
    else:
        order = np.argsort(costs).astype(np.int32)
        packed = costs[order]
    if len(options.costs) > 1:
        return options.take(order)
    index = order if options.index is None else options.index[order]
    return Options(options.factors, packed[None], index, options.source)


def _partners(
    first: Options, second: Options, low: Ints, high: Ints
) -> tuple[Options, Partners]:
    """The entries of the first half that have partners, and who these are."""
    # Backwards, so that the places looked for rise: memory is read in order.
    costs = first.costs[0, ::-1]
    lows = np.searchsorted(second.costs[0], low[0] - costs, side="left")[::-1]
    counts = np.searchsorted(second.costs[0], high[0] - costs, side="right")[::-1]
    counts = counts - lows
    if len(low) == 1:
        return first, Run(lows, counts)
    some = np.flatnonzero(counts)
    first, run = first.take(some), Run(lows[some], counts[some])
    if run.counts.sum() <= _FEW_LISTED:
        return first, _listed(run, first, second, low, high)
    ranged = _ranged(run, first, second, low, high)
    if len(low) == 2:
        return first, ranged
    return first, _listed(ranged, first, second, low, high)


def _ranged(run: Run, first: Options, second: Options, low: Ints, high: Ints) -> Ranged:
    """Of the partners of each run those that fit the second window."""
    order = np.argsort(second.costs[1])
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    matrix = WaveletMatrix.of(ranks)
    costs = second.costs[1, order]
    below, upto = np.empty_like(run.low), np.empty_like(run.low)
    for start in range(0, first.size, _CHUNK):
        some = slice(start, start + _CHUNK)
        lows, highs = run.low[some], run.low[some] + run.counts[some]
        least, most = low[1] - first.costs[1, some], high[1] - first.costs[1, some]
        limits = np.searchsorted(costs, least, side="left")
        below[some] = matrix.count_below(lows, highs, limits)
        limits = np.searchsorted(costs, most, side="right")
        upto[some] = matrix.count_below(lows, highs, limits)
    return Ranged(run, matrix, below, upto - below, order)


def _listed(
    partners: Partners, first: Options, second: Options, low: Ints, high: Ints
) -> Listed:
    """Of the partners those that fit all windows, one by one."""
    total = int(partners.counts.sum())
    if total > MAX_LISTED:
        raise InputError(
            f"{total:,} pairs of halves fit the two narrowest windows, and at most "
            f"{MAX_LISTED:,} can be checked against a third: narrow a window, or "
            "leave one out."
        )
    ends = np.cumsum(partners.counts)
    found, counts = [], np.zeros(first.size, np.int64)
    for start in range(0, total, _CHUNK):
        ranks = np.arange(start, min(start + _CHUNK, total))
        entries = np.searchsorted(ends, ranks, side="right")
        ordinals = ranks - (ends[entries] - partners.counts[entries])
        chosen = partners.select(entries, ordinals)
        fits = _within(first.costs[:, entries] + second.costs[:, chosen], low, high)
        found.append(chosen[fits])
        counts += np.bincount(entries[fits], minlength=first.size)
    starts = np.cumsum(counts) - counts
    return Listed(starts, counts, np.concatenate([*found, np.empty(0, np.int64)]))
