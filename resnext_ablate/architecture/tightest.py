"""Widths free in each stage: the net within a window that is nearest to doubling.

No whole base width brings C = 8 or 16 near a ResNet-50's macs; where each stage has a
width of its own, many nets come within a hundredth of a percent. To keep the shape
comparable, the one wins whose widths are nearest to the paper's rule.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from resnext_ablate.architecture.costs import CURRENCIES, NetCosts, net_costs
from resnext_ablate.architecture.feasible import Feasible, nearest, nets, solve
from resnext_ablate.architecture.space import PerStage, Space, Window
from resnext_ablate.architecture.spec import ResNeXtSpec

_FIRST_REACH = 0.02
_GROWTH = 1.5


def nearest_to_doubling(
    template: ResNeXtSpec, *, cardinality: int, window: Window, image_size: int
) -> ResNeXtSpec | None:
    """The net in the window whose widths are nearest to doubling by stage.

    The distance is the sum over stages of ln(d / d*) squared, where d* are the widths
    that double exactly and, as real numbers, meet the middle of the window exactly.

    Args:
        template: gives all but cardinality and widths.
        cardinality: C of every stage.
        window: what the net may cost.
        image_size: side of the square images, pixels.

    Returns:
        The nearest of all nets, or None where no widths fit.
    """
    costs = net_costs(template, image_size)
    ideal = _doubling_widths(template, costs, cardinality, window)
    largest = _largest_widths(template, costs, cardinality, window)
    if min(largest) < 1:
        return None
    reach = _FIRST_REACH
    while True:
        widths = _widths_within(ideal, reach, largest)
        found = _solve(template, cardinality, widths, window, image_size)
        if found is not None and found.count:
            break
        if widths == [range(1, top + 1) for top in largest]:
            return None
        reach *= _GROWTH
    best, distance = _best(found, ideal, window)
    if math.sqrt(distance) <= reach:
        return best
    # A nearer net has no stage further off than the whole distance of this one.
    widths = _widths_within(ideal, math.sqrt(distance) + 1e-9, largest)
    wider = _solve(template, cardinality, widths, window, image_size)
    assert wider is not None
    return _best(wider, ideal, window)[0]


def tightest(
    template: ResNeXtSpec, *, cardinality: int, window: Window, image_size: int
) -> tuple[ResNeXtSpec, ...]:
    """Where no widths fit the window, the nets that miss it by least on either side."""
    costs = net_costs(template, image_size)
    largest = _largest_widths(template, costs, cardinality, window)
    # One more in each stage, so that the nets just above the window are among them.
    widths = PerStage(tuple(tuple(range(1, max(top, 0) + 2)) for top in largest))
    space = Space(
        template=replace(template, cardinality=cardinality),
        image_sizes=(image_size,),
        width=widths,
    )
    return tuple(spec for spec, _ in nearest(space, [window]))


def _solve(
    template: ResNeXtSpec,
    cardinality: int,
    widths: list[range],
    window: Window,
    image_size: int,
) -> Feasible | None:
    if not all(widths):
        return None
    space = Space(
        template=replace(template, cardinality=cardinality),
        image_sizes=(image_size,),
        width=PerStage(tuple(map(tuple, widths))),
    )
    return solve(space, [window])


def _best(
    found: Feasible, ideal: list[float], window: Window
) -> tuple[ResNeXtSpec, float]:
    """The nearest to the ideal widths, and its distance."""
    some = nets(found, np.arange(found.count))
    distances = (np.log(some.widths / np.array(ideal)) ** 2).sum(axis=1)
    row = int(distances.argmin())
    return some.spec(row), float(distances[row])


def _widths_within(ideal: list[float], reach: float, largest: list[int]) -> list[range]:
    """Of each stage the whole widths whose ratio to the ideal is at most e**reach."""
    ranges = []
    for width, top in zip(ideal, largest, strict=True):
        low = max(1, math.ceil(width * math.exp(-reach)))
        high = width * math.exp(min(reach, 50.0))
        ranges.append(range(low, min(top, math.floor(high)) + 1))
    return ranges


def _doubling_widths(
    template: ResNeXtSpec, costs: NetCosts, cardinality: int, window: Window
) -> list[float]:
    """The real widths that double by stage and meet the middle of the window."""
    budget = (window.low + window.high) / 2
    stages = range(template.num_stages)
    position = CURRENCIES.index(window.currency)

    def cost_at(base: float) -> float:
        return costs.fixed[position] + sum(
            _stage_cost(costs, template, stage, position, cardinality, base * 2**stage)
            for stage in stages
        )

    low, high = 2.0**-40, 1.0
    while cost_at(high) < budget:
        high *= 2
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if cost_at(middle) < budget else (low, middle)
    return [high * 2**stage for stage in stages]


def _largest_widths(
    template: ResNeXtSpec, costs: NetCosts, cardinality: int, window: Window
) -> list[int]:
    """Of each stage the largest width that fits beside widths of 1; 0 if none does."""
    position = CURRENCIES.index(window.currency)
    stages = range(template.num_stages)
    least = [
        round(_stage_cost(costs, template, stage, position, cardinality, 1))
        for stage in stages
    ]
    largest = []
    for stage in stages:
        room = window.high - costs.fixed[position] - sum(least) + least[stage]
        top = 1
        while _stage_cost(costs, template, stage, position, cardinality, top) <= room:
            top *= 2
        low, high = 0, top  # The cost grows with the width: bisection is exact.
        while high - low > 1:
            middle = (low + high) // 2
            cost = _stage_cost(costs, template, stage, position, cardinality, middle)
            low, high = (middle, high) if cost <= room else (low, middle)
        largest.append(low)
    return largest


def _stage_cost(
    costs: NetCosts,
    template: ResNeXtSpec,
    stage: int,
    position: int,
    cardinality: int,
    width: float,
) -> float:
    """What a stage costs at a width, whole (then exactly) or not."""
    further = template.stage_depths[stage] - 1
    cost: float = sum(
        (term.first[position] + further * term.further[position])
        * cardinality**term.cardinality_power
        * width**term.width_power
        for term in costs.stages[stage]
    )
    return cost
