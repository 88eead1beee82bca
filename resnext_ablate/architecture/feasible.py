"""The nets of a space that fit its windows: counted, listed, drawn, or the nearest.

Every answer is exact. The feasible nets are numbered from 0, so that to draw one
uniformly is to draw a number; the space itself is never listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from resnext_ablate.architecture.complexity import complexity
from resnext_ablate.architecture.costs import LARGEST_COST, Currency, Ints
from resnext_ablate.architecture.halves import Solutions
from resnext_ablate.architecture.halves import solve as solve_sums
from resnext_ablate.architecture.space import Nets, Setting, Space, Window, settings_of
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec

_KEPT_COMBINATIONS = 1 << 25
"""So many, both halves of all settings, stay in memory; others are solved anew."""
_FEW = 1000


@dataclass(frozen=True, slots=True)
class Feasible:
    """The nets of a space that fit all windows, numbered from 0 to count - 1."""

    space: Space
    windows: tuple[Window, ...]
    ends: tuple[int, ...]
    """Nets of the settings up to and with each, in the order of `settings_of`."""
    solved: dict[int, tuple[Setting, Solutions]]
    """By setting, as far as they are kept in memory."""

    @property
    def count(self) -> int:
        return self.ends[-1] if self.ends else 0


def solve(space: Space, windows: Sequence[Window]) -> Feasible:
    """Works out which nets fit; what is asked next is then quick.

    Args:
        space: the template and its free axes.
        windows: one or several, each in a currency of its own.

    Raises:
        InputError: two windows share a currency, or the space is too large for memory.
    """
    windows = tuple(windows)
    currencies = _currencies(windows)
    ends, solved = [], {}
    total = kept = 0
    for number, setting in enumerate(settings_of(space, currencies=currencies)):
        solutions = _solutions(setting, windows)
        if solutions is not None:
            total += solutions.count
            kept += solutions.size
            if kept <= _KEPT_COMBINATIONS:
                solved[number] = setting, solutions
        ends.append(total)
    if total >= 1 << 63:
        raise InputError(f"{total:,} nets fit, and 2**63 can be numbered.")
    return Feasible(space, windows, tuple(ends), solved)


def count(space: Space, windows: Sequence[Window]) -> int:
    """How many nets of the space fit all windows."""
    return solve(space, windows).count


def sample(
    space: Space, windows: Sequence[Window], k: int, rng: np.random.Generator
) -> Nets:
    """k nets, each drawn uniformly from all that fit; the same may come twice.

    Raises:
        InputError: none fits; the message names the nearest nets.
    """
    return draw(solve(space, windows), k, rng)


def draw(feasible: Feasible, k: int, rng: np.random.Generator) -> Nets:
    """k nets of a solved space, each drawn uniformly.

    Raises:
        InputError: none fits; the message names the nearest nets.
    """
    if k < 0:
        raise InputError(f"the number of nets must be at least 0, got {k}.")
    if not feasible.count:
        raise InputError(none_fits(feasible.space, feasible.windows))
    return nets(feasible, rng.integers(feasible.count, size=k))


def enumerate_nets(
    space: Space, windows: Sequence[Window], *, at_most: int = 1_000_000
) -> Nets:
    """Every net that fits, once.

    Raises:
        InputError: more than `at_most` fit.
    """
    feasible = solve(space, windows)
    if feasible.count > at_most:
        raise InputError(
            f"{feasible.count:,} nets fit, more than the {at_most:,} to be listed; "
            "draw some in place of listing them, or narrow the windows."
        )
    return nets(feasible, np.arange(feasible.count))


def nets(feasible: Feasible, numbers: Ints) -> Nets:
    """The nets of some numbers below the count, in that order."""
    space = feasible.space
    num_stages = space.template.num_stages
    values = np.empty((len(numbers), num_stages, 3), np.int64)
    widths, sizes = np.empty((2, len(numbers)), np.int64)
    owners = np.searchsorted(np.array(feasible.ends), numbers, side="right")
    wanted = set(np.unique(owners).tolist())
    for owner, (setting, solutions) in settings_with_solutions(feasible, wanted):
        mine = np.flatnonzero(owners == owner)
        start = feasible.ends[owner] - solutions.count
        choices = solutions.choices(numbers[mine] - start)
        for column, factor in enumerate(setting.factors):
            stages = np.array(factor.stages)
            values[mine[:, None], stages] = factor.numbers[choices[:, column]]
        widths[mine], sizes[mine] = setting.template.template_width, setting.image_size
    return Nets(
        template=space.template,
        template_widths=widths,
        image_sizes=sizes,
        cardinalities=values[:, :, 0],
        stage_depths=values[:, :, 1],
        widths=values[:, :, 2],
    )


def nearest(
    space: Space, windows: Sequence[Window]
) -> tuple[tuple[ResNeXtSpec, int], ...]:
    """Where none fits, the nets that miss by least, each with its image size.

    With one window the nearest net below it and the nearest above, as far as there are
    any. With several the one whose largest miss, as a share of the window's end that it
    passes, is least.
    """
    if len(windows) > 1:
        found = [_closest(space, lambda reach: _widened(windows, reach), 100, 10**12)]
    else:
        (window,) = windows
        least, most = _range(space, window.currency)
        currency, low, high = window.currency, window.low, window.high
        found = [
            _closest(
                space,
                lambda reach: [Window(currency, low - reach, low - 1)],
                max(1, low // 1000, low - most),
                low - least,
            ),
            _closest(
                space,
                lambda reach: [Window(currency, high + 1, high + reach)],
                max(1, high // 1000, least - high),
                most - high,
            ),
        ]
    near = []
    for some in found:
        if some is not None:
            rows = range(len(some))
            best = min(rows, key=lambda row: max(_misses(some, row, windows)))
            near.append((some.spec(best), int(some.image_sizes[best])))
    return tuple(near)


def none_fits(space: Space, windows: Sequence[Window]) -> str:
    """The message where no net fits: the nearest, and by how much they miss."""
    asked = " and ".join(f"{w.currency} {w.low:,} to {w.high:,}" for w in windows)
    near = []
    for spec, size in nearest(space, windows):
        cost = complexity(spec, size)
        costs = (f"{getattr(cost, w.currency):,} {w.currency}" for w in windows)
        at = f" at {size} pixels" if len(space.image_sizes) > 1 else ""
        near.append(f"{spec.name}{at} ({', '.join(costs)})")
    if not near:
        return f"no net fits {asked}: the space is empty."
    return f"no net fits {asked}; nearest: {', '.join(near)}."


def _currencies(windows: Sequence[Window]) -> tuple[Currency, ...]:
    currencies = tuple(window.currency for window in windows)
    if not currencies:
        raise InputError("windows must name at least one currency, got none.")
    if len(set(currencies)) < len(currencies):
        raise InputError(
            "windows must be of different currencies, got "
            f"{', '.join(currencies)}; give one window where two overlap."
        )
    return currencies


def _solutions(setting: Setting, windows: Sequence[Window]) -> Solutions | None:
    fixed = np.array(setting.fixed)
    low = np.array([window.low for window in windows])
    high = np.array([min(window.high, LARGEST_COST) for window in windows])
    costs = [factor.costs for factor in setting.factors]
    return solve_sums(costs, low - fixed, high - fixed)


def settings_with_solutions(
    feasible: Feasible, wanted: set[int]
) -> Iterator[tuple[int, tuple[Setting, Solutions]]]:
    """Some settings with their solutions; those not in memory are solved anew."""
    yield from ((one, feasible.solved[one]) for one in wanted & feasible.solved.keys())
    missing = wanted - feasible.solved.keys()
    if not missing:
        return
    windows = feasible.windows
    for number, setting in enumerate(
        settings_of(feasible.space, currencies=_currencies(windows))
    ):
        if number in missing:
            solutions = _solutions(setting, windows)
            assert solutions is not None
            yield number, (setting, solutions)


def _range(space: Space, currency: Currency) -> tuple[int, int]:
    """The least and the largest cost in the space; 0 and 0 where it is empty."""
    least, most = [], []
    for setting in settings_of(space, currencies=(currency,)):
        if all(factor.size for factor in setting.factors):
            costs = [factor.costs[0] for factor in setting.factors]
            least.append(setting.fixed[0] + sum(int(cost.min()) for cost in costs))
            most.append(setting.fixed[0] + sum(int(cost.max()) for cost in costs))
    return min(least, default=0), max(most, default=0)


def _closest(
    space: Space, at: Callable[[int], Sequence[Window]], start: int, stop: int
) -> Nets | None:
    """A few nets within the least reach that has any, from `start` to `stop`."""
    if stop < 1:
        return None
    empty, reach = 0, min(start, stop)
    while not (found := solve(space, at(reach))).count:
        if reach == stop:
            return None
        empty, reach = reach, min(2 * reach, stop)
    while found.count > _FEW and reach - empty > 1:
        middle = (empty + reach) // 2
        nearer = solve(space, at(middle))
        if nearer.count:
            found, reach = nearer, middle
        else:
            empty = middle
    return nets(found, np.arange(min(found.count, _FEW)))


def _widened(windows: Sequence[Window], reach: int) -> list[Window]:
    """Every window, its ends moved outwards by some millionths of themselves."""
    return [
        Window(
            window.currency,
            max(0, window.low - window.low * reach // 10**6),
            window.high + window.high * reach // 10**6,
        )
        for window in windows
    ]


def _misses(some: Nets, row: int, windows: Sequence[Window]) -> list[float]:
    """By how much a net misses each window, as a share of the end it passes."""
    cost = complexity(some.spec(row), int(some.image_sizes[row]))
    misses = []
    for window in windows:
        value = getattr(cost, window.currency)
        below = (window.low - value) / max(window.low, 1)
        above = (value - window.high) / max(window.high, 1)
        misses.append(max(below, above, 0.0))
    return misses
