"""A design space: a template with free axes, and the windows its nets must fit.

Axes are the cardinality, the bottleneck width and the depth, each one number for the
whole net or one for each stage, the template width, and the image size. The nets of a
space are never listed here; `feasible` counts, lists and samples them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product

import numpy as np
from numpy.typing import NDArray

from resnext_ablate.architecture.complexity import complexity
from resnext_ablate.architecture.costs import (
    CURRENCIES,
    LARGEST_COST,
    Currency,
    Ints,
    NetCosts,
    net_costs,
    stage_costs,
)
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec

MAX_CHOICES = 4_000_000
"""Combinations of values in one stage, or of shared values where no stage is free."""
MAX_SETTINGS = 10_000
"""Combinations of shared values, template widths and image sizes beside free stages."""


@dataclass(frozen=True, slots=True)
class Shared:
    """One number for the whole net; a width is stage 1's and doubles from there."""

    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PerStage:
    """One number for each stage, chosen on its own."""

    values: tuple[tuple[int, ...], ...]
    """Of each stage; a single tuple holds for all of them."""


Axis = Shared | PerStage


@dataclass(frozen=True, kw_only=True)
class Space:
    """Nets that differ from a template along free axes.

    Raises:
        InputError: an axis breaks its rule; the message names axis, rule and value.
    """

    template: ResNeXtSpec
    """Gives every number whose axis is not free."""
    image_sizes: tuple[int, ...]
    """Sides of the square images, pixels."""
    cardinality: Axis | None = None
    """C."""
    width: Axis | None = None
    """d, channels per group."""
    stage_depth: Axis | None = None
    """Blocks of a stage."""
    template_widths: tuple[int, ...] = ()
    """Default: the template's."""
    inner_multiple: int = 1
    """C d of every stage must be a multiple; 8 suits tensor cores."""

    def __post_init__(self) -> None:
        widths = self.template_widths or (self.template.template_width,)
        _check_values("inner_multiple", (self.inner_multiple,))
        for name, values in (
            ("image_sizes", self.image_sizes),
            ("template_widths", widths),
        ):
            _check_values(name, values)
            object.__setattr__(self, name, tuple(sorted(set(values))))
        for name in ("cardinality", "width", "stage_depth"):
            _check_axis(name, getattr(self, name), self.template.num_stages)
        self.template.layout(min(self.image_sizes))  # Refuses images too small.

    @property
    def num_nets(self) -> int:
        """How many nets the space has, windows aside."""
        return sum(
            math.prod(factor.size for factor in setting.factors)
            for setting in settings_of(self, currencies=())
        )


@dataclass(frozen=True, slots=True)
class Window:
    """What a net may cost in one currency, both ends included."""

    currency: Currency
    low: int
    high: int

    def __post_init__(self) -> None:
        if self.currency not in CURRENCIES:
            known = ", ".join(CURRENCIES)
            raise InputError(f"currency must be one of {known}; got {self.currency!r}.")
        if not 0 <= self.low <= self.high:
            raise InputError(
                f"a window of {self.currency} must rise from 0 or more, "
                f"got {self.low:,} to {self.high:,}."
            )


@dataclass(frozen=True, slots=True)
class Factor:
    """The choices for one stage, or for all at once where they share their numbers."""

    stages: tuple[int, ...]
    numbers: Ints
    """C, blocks and d of each choice and stage, in rising order: (n, stages, 3)."""
    costs: Ints
    """(currencies, n)."""

    @property
    def size(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True, slots=True)
class Setting:
    """The nets of one template width, image size and set of shared numbers."""

    template: ResNeXtSpec
    image_size: int
    fixed: tuple[int, ...]
    """What stem and head cost in each currency."""
    factors: tuple[Factor, ...]
    """Chosen on their own; each net is one choice of every factor."""


@dataclass(frozen=True, kw_only=True)
class Nets:
    """N nets of a space as arrays; `spec(row)` builds one."""

    template: ResNeXtSpec
    template_widths: Ints
    """(N,)."""
    image_sizes: Ints
    """(N,), pixels."""
    cardinalities: Ints
    """(N, stages)."""
    widths: Ints
    """d of each stage, (N, stages)."""
    stage_depths: Ints
    """(N, stages)."""

    def __len__(self) -> int:
        return len(self.image_sizes)

    def spec(self, row: int) -> ResNeXtSpec:
        """The net of a row."""
        return replace(
            self.template,
            template_width=int(self.template_widths[row]),
            cardinality=tuple(self.cardinalities[row].tolist()),
            bottleneck_widths=tuple(self.widths[row].tolist()),
            stage_depths=tuple(self.stage_depths[row].tolist()),
        )

    def specs(self) -> Iterator[ResNeXtSpec]:
        """Every net in turn."""
        return map(self.spec, range(len(self)))


def around(
    reference: ResNeXtSpec,
    *,
    currency: Currency,
    tolerance_pct: float,
    image_size: int,
) -> Window:
    """The window of what a net costs, plus and minus a percentage of it.

    Raises:
        InputError: the tolerance is no percentage, or the image is too small.
    """
    if not 0 <= tolerance_pct <= 100:  # so that nan fails as well
        raise InputError(
            f"tolerance_pct must lie between 0 and 100 percent, got {tolerance_pct}."
        )
    cost = getattr(complexity(reference, image_size), currency)
    margin = cost * Fraction(str(tolerance_pct)) / 100
    return Window(currency, math.ceil(cost - margin), math.floor(cost + margin))


def multiples(of: int, *, low: int, high: int) -> tuple[int, ...]:
    """The multiples of a number from `low` to `high`, both included."""
    return tuple(range(-(-low // of) * of, high + 1, of))


def powers_of_two(low: int, high: int) -> tuple[int, ...]:
    """1, 2, 4, ... as far as they lie from `low` to `high`, both included."""
    powers = (1 << exponent for exponent in range(max(high, 0).bit_length()))
    return tuple(power for power in powers if low <= power <= high)


_RANGE = re.compile(r"(\d+)\.\.(\d+)(?:/(\d+)|(\*2))?")


def parse_values(text: str) -> tuple[int, ...]:
    """Whole numbers of a text: `1,2,4`, `1..64`, `8..256/8` (multiples), `1..64*2`.

    Raises:
        InputError: the text is not of that form, or names no number.
    """
    values: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match:
            low, high = int(match[1]), int(match[2])
            step = int(match[3] or 1)
            if match[4]:
                values += powers_of_two(low, high)
            elif step:
                values += multiples(step, low=low, high=min(high, low + MAX_CHOICES))
        elif re.fullmatch(r"\d+", part.strip()):
            values.append(int(part))
        else:
            values = []
            break
    if not values:
        raise InputError(
            f"{text!r} names no values; write 1,2,4 or 1..64, with steps 8..256/8 "
            "(multiples of 8) or 1..64*2 (powers of two)."
        )
    return tuple(values)


def settings_of(space: Space, *, currencies: tuple[Currency, ...]) -> Iterator[Setting]:
    """The space as sets of independent choices, costs in these currencies.

    Raises:
        InputError: an axis has more values than memory holds, or a net costs too much.
    """
    axes = resolved_axes(space)
    rows = _shared_rows(axes)
    num_settings = len(space.template_widths) * len(space.image_sizes)
    by_stage = is_by_stage(axes)
    if by_stage:
        num_settings *= len(rows)
    if num_settings > MAX_SETTINGS:
        raise InputError(
            f"the space has {num_settings:,} combinations of shared numbers, template "
            f"widths and image sizes; at most {MAX_SETTINGS:,} can be worked through."
        )
    for width, size in product(space.template_widths, space.image_sizes):
        template = replace(space.template, template_width=width)
        costs = net_costs(template, size)
        fixed = tuple(
            costs.fixed[CURRENCIES.index(currency)] for currency in currencies
        )
        for group in rows[:, None] if by_stage else rows[None]:
            table = (_grids if by_stage else _joint)(axes, group, space)
            factors = tuple(
                Factor(stages, numbers, _costs(costs, stages, numbers, currencies))
                for stages, numbers in table
            )
            _check_sums(fixed, factors)
            yield Setting(template, size, fixed, factors)


_Table = list[tuple[tuple[int, ...], Ints]]
"""Stages, and the choices for them: (n, stages, 3) of C, blocks and d."""

_WIDTH = 2  # Position of the width among the three axes.


def resolved_axes(space: Space) -> tuple[Axis, ...]:
    """Cardinality, blocks and width, as `Shared` only where one number varies."""
    template = space.template
    given = (
        (space.cardinality, template.cardinalities),
        (space.stage_depth, template.stage_depths),
        (space.width, template.bottleneck_widths),
    )
    axes: list[Axis] = []
    for position, (axis, fixed) in enumerate(given):
        if axis is None:
            axes.append(PerStage(tuple((value,) for value in fixed)))
        elif isinstance(axis, PerStage):
            values = tuple(tuple(sorted(set(stage))) for stage in axis.values)
            axes.append(PerStage(values * (template.num_stages // len(values))))
        elif len(set(axis.values)) > 1:
            axes.append(Shared(tuple(sorted(set(axis.values)))))
        else:
            stages = range(template.num_stages)
            values = tuple((_at(axis.values[0], position, s),) for s in stages)
            axes.append(PerStage(values))
    return tuple(axes)


def is_by_stage(axes: tuple[Axis, ...]) -> bool:
    """Whether any number is chosen by each stage."""
    return any(
        len(values) > 1
        for axis in axes
        if isinstance(axis, PerStage)
        for values in axis.values
    )


def _at(value: int, position: int, stage: int) -> int:
    """A shared number as it stands in a stage."""
    return value << stage if position == _WIDTH else value


def _shared_rows(axes: tuple[Axis, ...]) -> Ints:
    """Combinations of the shared numbers, (n, 3); 0 where stages have their own."""
    values = [axis.values if isinstance(axis, Shared) else (0,) for axis in axes]
    return _grid([np.array(choices, np.int64) for choices in values])


def _grids(axes: tuple[Axis, ...], rows: Ints, space: Space) -> _Table:
    """The choices of each stage beside one row of shared numbers."""
    table: _Table = []
    for stage in range(space.template.num_stages):
        columns = [
            [_at(int(rows[0, position]), position, stage)]
            if isinstance(axis, Shared)
            else list(axis.values[stage])
            for position, axis in enumerate(axes)
        ]
        grid = _grid([np.array(column, np.int64) for column in columns])
        table.append(((stage,), grid[_fits(grid, space)][:, None]))
    return table


def _joint(axes: tuple[Axis, ...], rows: Ints, space: Space) -> _Table:
    """All stages at once, a choice for each row of shared numbers."""
    stages = range(space.template.num_stages)
    numbers = np.empty((len(rows), len(stages), 3), np.int64)
    for (position, axis), stage in product(enumerate(axes), stages):
        numbers[:, stage, position] = (
            rows[:, position] << (stage if position == _WIDTH else 0)
            if isinstance(axis, Shared)
            else axis.values[stage][0]
        )
    return [(tuple(stages), numbers[_fits(numbers, space).all(axis=1)])]


def _grid(columns: Sequence[Ints]) -> Ints:
    """All combinations of some values, the last varying fastest: (n, columns)."""
    size = math.prod(map(len, columns))
    if size > MAX_CHOICES:
        raise InputError(
            f"{size:,} combinations of cardinality, depth and width in one stage; at "
            f"most {MAX_CHOICES:,} fit into memory. Use steps, or powers of two."
        )
    return np.stack([g.ravel() for g in np.meshgrid(*columns, indexing="ij")], axis=1)


def _fits(numbers: Ints, space: Space) -> NDArray[np.bool_]:
    inner: Ints = numbers[..., 0] * numbers[..., _WIDTH]
    fits: NDArray[np.bool_] = inner % space.inner_multiple == 0
    return fits


def _costs(
    costs: NetCosts,
    stages: tuple[int, ...],
    numbers: Ints,
    currencies: tuple[Currency, ...],
) -> Ints:
    """What the choices cost, their stages summed: (currencies, n)."""
    total = np.zeros((len(currencies), len(numbers)), np.int64)
    for position, stage in enumerate(stages):
        c, n, d = np.ascontiguousarray(numbers[:, position].T)
        total += stage_costs(
            costs, stage, currencies=currencies, cardinality=c, width=d, depth=n
        )
    return total


def _check_sums(fixed: tuple[int, ...], factors: tuple[Factor, ...]) -> None:
    for row, ends in enumerate(fixed):
        tops = [int(factor.costs[row].max(initial=0)) for factor in factors]
        if ends + sum(tops) > LARGEST_COST:
            raise InputError("a net's cost passes 2**62; take smaller values.")


def _check_values(name: str, values: Iterable[object]) -> None:
    values = tuple(values)
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(
                f"{name} must be whole numbers of at least 1, got {value!r}."
            )
    if not values:
        raise InputError(f"{name} must name at least one value, got none.")


def _check_axis(name: str, axis: Axis | None, num_stages: int) -> None:
    if isinstance(axis, Shared):
        _check_values(name, axis.values)
    elif isinstance(axis, PerStage):
        if len(axis.values) not in (1, num_stages):
            raise InputError(
                f"{name} must give values for all stages alike, or for each of "
                f"{num_stages}; got {len(axis.values)} sets of values."
            )
        for stage, values in enumerate(axis.values, start=1):
            _check_values(f"{name}, stage {stage}", values)
