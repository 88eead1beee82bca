"""Complexity of many nets at once, in int64 and equal to `complexity` to the unit.

A stage costs the sum of its first block, which changes the shape, and of its further
blocks, which are all alike. Each of the two is a polynomial in the stage's cardinality
C and width d, of degree 2 in either; interpolation at nine nets of `spec.layout` gives
its coefficients, so there is no second formula that can drift from the shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import product
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from resnext_ablate.architecture.complexity import (
    complexity,
    head_complexity,
    layers_complexity,
)
from resnext_ablate.architecture.shapes import Block
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec

Currency = Literal["macs", "params", "activations"]
"""What a net is counted in; params include batch normalisation."""
CURRENCIES: tuple[Currency, ...] = get_args(Currency)

Ints = NDArray[np.int64]

LARGEST_COST = 2**62
"""No cost may pass this, so that sums and differences of two stay within int64."""

_NODES = (1, 2, 3)
# Row p of twice the inverse Vandermonde matrix: x^p's coefficient from the nodes.
_INTERPOLATION = ((6, -6, 2), (-5, 8, -3), (1, -2, 1))


@dataclass(frozen=True, slots=True)
class Term:
    """One monomial of a block's cost, C^i d^j, with a coefficient for each currency."""

    cardinality_power: int
    width_power: int
    first: tuple[int, ...]
    """Coefficients in the stage's first block, in the order of `CURRENCIES`."""
    further: tuple[int, ...]
    """The same in each further block."""


@dataclass(frozen=True, slots=True)
class NetCosts:
    """What nets of one template cost at one image size."""

    fixed: tuple[int, ...]
    """Stem and head, in the order of `CURRENCIES`."""
    stages: tuple[tuple[Term, ...], ...]


@lru_cache(maxsize=1024)
def net_costs(template: ResNeXtSpec, image_size: int) -> NetCosts:
    """The coefficients of a template; its cardinality, widths and depths are free.

    Raises:
        InputError: the image is smaller than the net's total stride, or a stage of the
            template costs what its neighbours decide.
    """
    values: dict[tuple[int, int], list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for cardinality, width in product(_NODES, _NODES):
        probe = replace(
            template,
            stage_depths=(2,) * template.num_stages,
            cardinality=cardinality,
            bottleneck_widths=(width,) * template.num_stages,
        )
        layout = probe.layout(image_size)
        pairs = zip(layout.blocks[::2], layout.blocks[1::2], strict=True)
        values[cardinality, width] = [(_cost(one), _cost(two)) for one, two in pairs]
    layout = template.layout(image_size)
    ends = layers_complexity(layout.ends) + head_complexity(layout.head)
    costs = NetCosts(
        fixed=tuple(getattr(ends, currency) for currency in CURRENCIES),
        stages=tuple(
            _terms({node: stages[stage] for node, stages in values.items()})
            for stage in range(template.num_stages)
        ),
    )
    _check_additive(template, image_size, costs)
    return costs


def stage_costs(
    costs: NetCosts,
    stage: int,
    *,
    currencies: tuple[Currency, ...],
    cardinality: ArrayLike,
    width: ArrayLike,
    depth: ArrayLike,
) -> Ints:
    """Costs of one stage at N choices; whole numbers of at least 1 that broadcast.

    Args:
        costs: of the template, from `net_costs`.
        stage: 0 for the first.
        currencies: K of them.
        cardinality: C of the stage.
        width: d of the stage, channels per group.
        depth: blocks of the stage.

    Returns:
        int64 (K, N).

    Raises:
        InputError: a number is below 1, or a cost passes 2**62.
    """
    named = {"cardinality": cardinality, "width": width, "depth": depth}
    c, d, n = np.broadcast_arrays(*(_whole(name, named[name]) for name in named))
    _check_bound(costs, stage, _largest(c), _largest(d), _largest(n))
    powers = [
        _power(c, term.cardinality_power, d, term.width_power)
        for term in costs.stages[stage]
    ]
    sums = np.zeros((len(currencies), c.size), np.int64)
    for row, currency in zip(sums, currencies, strict=True):
        position = CURRENCIES.index(currency)
        further = np.zeros_like(row)
        for term, power in zip(costs.stages[stage], powers, strict=True):
            if coefficient := term.further[position]:
                further += coefficient * power
            if coefficient := term.first[position]:
                row += coefficient * power
        row += (n - 1) * further
    return sums


def costs_of(
    template: ResNeXtSpec,
    image_size: int,
    *,
    cardinalities: ArrayLike,
    widths: ArrayLike,
    depths: ArrayLike,
    currencies: tuple[Currency, ...] = CURRENCIES,
) -> dict[Currency, Ints]:
    """Complexity of N nets of a template with S stages.

    Args:
        template: gives all but cardinalities, widths and depths.
        image_size: side of the square images, pixels.
        cardinalities: C of each stage, (N, S).
        widths: d of each stage, (N, S).
        depths: blocks of each stage, (N, S).
        currencies: what to count.

    Returns:
        int64 (N,) for each currency.

    Raises:
        InputError: a number is below 1, a cost passes 2**62, or the images are too
            small.
    """
    costs = net_costs(template, image_size)
    c, d, n = (
        np.ascontiguousarray(np.asarray(values).reshape(-1, template.num_stages).T)
        for values in (cardinalities, widths, depths)
    )
    fixed = [costs.fixed[CURRENCIES.index(currency)] for currency in currencies]
    totals = np.repeat(np.array(fixed, np.int64)[:, None], c.shape[1], axis=1)
    for stage in range(template.num_stages):
        more = stage_costs(
            costs,
            stage,
            currencies=currencies,
            cardinality=c[stage],
            width=d[stage],
            depth=n[stage],
        )
        if _largest(totals) + _largest(more) > LARGEST_COST:
            raise InputError("a net's cost passes 2**62; take smaller values.")
        totals += more
    return dict(zip(currencies, totals, strict=True))


def _cost(block: Block) -> tuple[int, ...]:
    total = layers_complexity(block.layers)
    return tuple(getattr(total, currency) for currency in CURRENCIES)


def _terms(
    values: dict[tuple[int, int], tuple[tuple[int, ...], tuple[int, ...]]],
) -> tuple[Term, ...]:
    """The monomials with a coefficient, from the costs at the nine nodes."""
    terms = []
    for i, j in product(range(3), range(3)):
        first, further = (
            tuple(
                _coefficient(
                    {node: value[block][position] for node, value in values.items()},
                    i,
                    j,
                )
                for position in range(len(CURRENCIES))
            )
            for block in (0, 1)
        )
        if any(first) or any(further):
            terms.append(Term(i, j, first, further))
    return tuple(terms)


def _coefficient(values: dict[tuple[int, int], int], i: int, j: int) -> int:
    four_times = sum(
        _INTERPOLATION[i][p] * _INTERPOLATION[j][q] * values[c, d]
        for p, c in enumerate(_NODES)
        for q, d in enumerate(_NODES)
    )
    coefficient, rest = divmod(four_times, 4)
    assert rest == 0, "a block's cost is no polynomial with whole coefficients"
    return coefficient


def _check_additive(template: ResNeXtSpec, image_size: int, costs: NetCosts) -> None:
    """A net whose stages all differ must cost what its stages sum to."""
    stages = range(template.num_stages)
    probe = replace(
        template,
        stage_depths=tuple(3 + stage % 2 for stage in stages),
        cardinality=tuple(5 + stage for stage in stages),
        bottleneck_widths=tuple(7 + 2 * stage for stage in stages),
    )
    exact = complexity(probe, image_size)
    total = np.array(costs.fixed) + sum(
        stage_costs(
            costs,
            stage,
            currencies=CURRENCIES,
            cardinality=[probe.cardinalities[stage]],
            width=[probe.bottleneck_widths[stage]],
            depth=[probe.stage_depths[stage]],
        )[:, 0]
        for stage in stages
    )
    if total.tolist() != [getattr(exact, currency) for currency in CURRENCIES]:
        raise InputError(
            f"{template.name}: what a stage costs depends on the stages beside it, so "
            "nets of this template cannot be counted many at once."
        )


def _check_bound(
    costs: NetCosts, stage: int, cardinality: int, width: int, depth: int
) -> None:
    """Refuses numbers whose cost, or a part of it, may pass the bound."""
    for position, currency in enumerate(CURRENCIES):
        bound = sum(
            (abs(term.first[position]) + depth * abs(term.further[position]))
            * cardinality**term.cardinality_power
            * width**term.width_power
            for term in costs.stages[stage]
        )
        if bound > LARGEST_COST:
            raise InputError(
                f"{currency} of stage {stage + 1} pass 2**62 at cardinality "
                f"{cardinality}, width {width} and depth {depth}; take smaller values."
            )


def _power(c: Ints, i: int, d: Ints, j: int) -> Ints | int:
    """C^i d^j, without a pass over the arrays where a power is 0."""
    factors = [c] * i + [d] * j
    return reduce(np.multiply, factors) if factors else 1


def _whole(name: str, values: ArrayLike) -> Ints:
    array = np.atleast_1d(np.asarray(values))
    if array.dtype.kind not in "iu" or (array.size and array.min() < 1):
        raise InputError(
            f"{name} must be whole numbers of at least 1, got {values!s:.60}."
        )
    if array.size and int(array.max()) > LARGEST_COST:
        raise InputError(f"{name} must not pass 2**62, got {array.max()}.")
    return array.astype(np.int64, copy=False)


def _largest(values: Ints) -> int:
    return int(values.max()) if values.size else 0
