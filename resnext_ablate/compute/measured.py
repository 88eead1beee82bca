"""Widths that hold what only a device can tell: step time or peak memory.

Neither follows from shapes, and step time is noisy besides. So the macs of a net at
each cardinality are moved until what is measured meets the reference: nets of equal
cardinality form one line from few macs to many, whose widths double by stage or come as
near to that as their macs allow. What is found is measured afresh, so that a lucky
measurement cannot pass for a match.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

from resnext_ablate.architecture import tightest
from resnext_ablate.architecture.complexity import complexity
from resnext_ablate.architecture.matching import (
    MEASURED,
    Hold,
    Widths,
    check_request,
    percent,
)
from resnext_ablate.architecture.space import Window
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec
from resnext_ablate.records.certificate import DeviceCosts, NetCost, Spread

Measure = Callable[[Sequence[ResNeXtSpec]], DeviceCosts]
"""Costs of nets beside the first of them, as `benchmark.measure` gives them."""

_MAX_ROUNDS = 8
_FREE_WINDOW_PCT = 0.2
"""Of macs: how far a net with free widths may be from where it is looked for."""


def match_measured(
    template: ResNeXtSpec,
    *,
    cardinalities: Sequence[int],
    hold: Hold,
    tolerance_pct: float,
    image_size: int,
    reference: ResNeXtSpec,
    widths: Widths,
    search: Measure,
    confirm: Measure,
) -> tuple[tuple[ResNeXtSpec, ...], DeviceCosts]:
    """The template at each cardinality, at widths that meet the reference as measured.

    Args:
        template: gives all but cardinality and widths.
        cardinalities, widths: as `matching.match` takes them.
        hold: what is measured and held.
        tolerance_pct: largest error of the median, percent of the reference.
        image_size: side of the square images, pixels.
        reference: what all are compared with; its own match where it is of the
            template and its cardinality is asked for.
        search: measures while widths are looked for; may be short.
        confirm: measures what was found, once.

    Returns:
        One net for each cardinality, and the costs of the reference and of those nets.

    Raises:
        InputError: an argument breaks its rule; no net is within the tolerance, or the
            noise is too large to tell. The message names what was nearest.
    """
    check_request(cardinalities, hold, tolerance_pct, widths)
    assert hold in MEASURED
    tried = {c: _known(template, c, reference) for c in cardinalities}
    for rule in _RULES[widths]:
        net_at = partial(_net_at, template, rule, image_size)
        # Half of the tolerance leaves the other half to noise.
        missed = [c for c in cardinalities if not _holds(tried[c], tolerance_pct)]
        for _ in range(_MAX_ROUNDS):
            open_ones = [c for c in missed if not _holds(tried[c], tolerance_pct / 2)]
            asked = {}
            for cardinality in open_ones:
                line_at = partial(net_at, cardinality)
                spec = _proposed(tried[cardinality], line_at, reference, image_size)
                if spec:
                    asked[cardinality] = spec
            if not asked:
                break
            costs = search([reference, *asked.values()])
            for cardinality, cost in zip(asked, costs.nets[1:], strict=True):
                tried[cardinality][asked[cardinality]] = error_of(cost, hold).median
    found = tuple(_best(tried[cardinality]) for cardinality in cardinalities)
    costs = confirm([reference, *(spec for spec in found if spec != reference)])
    advice = "; free widths may come nearer" if widths == "doubling" else ""
    _check_found(costs, hold=hold, tolerance_pct=tolerance_pct, advice=advice)
    return found, costs


def error_of(cost: NetCost, hold: Hold) -> Spread:
    """The error of a net in what is held, with its noise."""
    if hold == "step_time":
        return cost.step_time_error_pct
    error = cost.peak_memory_error_pct
    return Spread(median=error, low=error, high=error, num_repeats=1)


Rule = Literal["doubling", "free"]
_RULES: dict[Widths, tuple[Rule, ...]] = {
    "doubling": ("doubling",),
    "free": ("free",),
    "auto": ("doubling", "free"),
}


def _known(
    template: ResNeXtSpec, cardinality: int, reference: ResNeXtSpec
) -> dict[ResNeXtSpec, float]:
    """The reference itself needs no measurement to have no error."""
    widths = reference.bottleneck_widths
    is_own = reference == template.with_setting(cardinality, *widths)
    return {reference: 0.0} if is_own else {}


def _holds(tried: Mapping[ResNeXtSpec, float], tolerance_pct: float) -> bool:
    return any(abs(error_pct) <= tolerance_pct for error_pct in tried.values())


def _best(tried: Mapping[ResNeXtSpec, float]) -> ResNeXtSpec:
    return min(tried, key=lambda spec: abs(tried[spec]))


def _proposed(
    tried: Mapping[ResNeXtSpec, float],
    line_at: Callable[[float], ResNeXtSpec],
    reference: ResNeXtSpec,
    image_size: int,
) -> ResNeXtSpec | None:
    """The net of a line to measure next; None where nothing new is likely nearer.

    Args:
        tried: errors of nets so far, in percent.
        line_at: the net of the line that is nearest to some macs.
        reference: has the macs of the first net.
        image_size: side of the square images, pixels.
    """
    points = sorted(
        (complexity(spec, image_size).macs, error_pct)
        for spec, error_pct in tried.items()
    )
    first = complexity(reference, image_size).macs
    for macs in _crossings(points) if points else [first]:
        spec = line_at(macs)
        if spec not in tried:
            return spec
    return None


def _crossings(points: Sequence[tuple[float, float]]) -> list[float]:
    """Macs at which the error may vanish, the likeliest first.

    Args:
        points: (macs, error in percent) measured so far.
    """
    low = max((p for p in points if p[1] < 0), key=lambda p: p[1], default=None)
    high = min((p for p in points if p[1] >= 0), key=lambda p: p[1], default=None)
    if low and high:
        share = -low[1] / (high[1] - low[1])
        return [low[0] * (high[0] / low[0]) ** share, math.sqrt(low[0] * high[0])]
    macs, error_pct = low or high or points[0]
    step = 1 / (1 + error_pct / 100)  # As if the cost were proportional to macs.
    return [macs * step, macs * step**2, macs * step**4]


def _net_at(
    template: ResNeXtSpec, rule: Rule, image_size: int, cardinality: int, macs: float
) -> ResNeXtSpec:
    """The net of a cardinality's line that is nearest to these macs."""

    def distance(spec: ResNeXtSpec) -> float:
        return abs(math.log(complexity(spec, image_size).macs / macs))

    if rule == "doubling":
        width = 1
        at = partial(template.with_setting, cardinality)
        while complexity(at(2 * width), image_size).macs <= macs:
            width *= 2
        return min(map(at, range(width, 2 * width + 1)), key=distance)
    margin = macs * _FREE_WINDOW_PCT / 100
    window = Window("macs", max(0, round(macs - margin)), round(macs + margin))
    found = tightest.nearest_to_doubling(
        template, cardinality=cardinality, window=window, image_size=image_size
    )
    if found is not None:
        return found
    around = tightest.tightest(
        template, cardinality=cardinality, window=window, image_size=image_size
    )
    return min(around, key=distance)


def _check_found(
    costs: DeviceCosts, *, hold: Hold, tolerance_pct: float, advice: str
) -> None:
    """Refuses nets beyond the tolerance, and noise that hides whether they are."""
    errors = {cost.name: error_of(cost, hold) for cost in costs.nets[1:]}
    beyond = {n: e for n, e in errors.items() if abs(e.median) > tolerance_pct}
    if beyond:
        nearest = "; ".join(
            f"{name} ({percent(error.median)}{_interval(error)})"
            for name, error in beyond.items()
        )
        needed = max(abs(error.median) for error in beyond.values())
        raise InputError(
            f"no net found holds {hold} within {tolerance_pct:g} % of "
            f"{costs.nets[0].name} on {costs.device}; nearest: {nearest}. A tolerance "
            f"of {math.ceil(needed)} % admits what was found{advice}."
        )
    noise = max((e.high - e.low for e in errors.values()), default=0.0) / 2
    if noise > tolerance_pct:
        raise InputError(
            f"{hold} on {costs.device} is measured to +-{noise:.1f} %, which cannot "
            f"show a match within {tolerance_pct:g} %: measure for longer or on a "
            f"quieter machine, or take a tolerance above {math.ceil(noise)} %."
        )


def _interval(error: Spread) -> str:
    if error.num_repeats == 1:
        return ""
    return f", 95 % interval {percent(error.low)} to {percent(error.high)}"
