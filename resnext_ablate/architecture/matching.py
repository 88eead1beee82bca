"""Widths that hold a budget as the cardinality changes, and the certificate of a match.

The paper holds the parameters of a block (Eq. 4, Table 2); whole nets then drift apart
by a few percent of macs. Here the width is solved in the currency that is to be held,
and every match states its residual in all of them. Where no whole base width that
doubles by stage comes near enough, each stage may take a width of its own.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from resnext_ablate.architecture.complexity import Complexity, block_params, complexity
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec

Hold = Literal[
    "block_params", "macs", "params", "activations", "step_time", "peak_memory"
]
"""What is held: parameters of a stage-1 block (Eq. 4), or what the whole net costs."""
MEASURED: tuple[Hold, ...] = ("step_time", "peak_memory")
"""What only a device can tell: `measured.match_measured` holds it."""
Widths = Literal["doubling", "free", "auto"]
"""Whether d doubles by stage as in the paper or is free in each stage; auto: doubles
where a whole base width is within the tolerance, else free."""
WhenNone = Literal["refuse", "nearest"]
"""What becomes of a cardinality that no width brings within the tolerance."""


@dataclass(frozen=True, slots=True)
class Match:
    """A net beside its reference. Errors are signed: positive costs more than it."""

    spec: ResNeXtSpec
    image_size: int
    complexity: Complexity
    macs_error_pct: float
    params_error_pct: float
    """Batch normalisation included, on both sides."""
    activations_error_pct: float
    block_params_error_pct: float
    """Of the stage-1 block that keeps its shape, by Eq. 4: without batch norm. Every
    other stage has the same error where both nets double their widths."""

    def error_pct(self, hold: Hold) -> float:
        """The error in the held currency, which must not be a measured one."""
        errors = {
            "block_params": self.block_params_error_pct,
            "macs": self.macs_error_pct,
            "params": self.params_error_pct,
            "activations": self.activations_error_pct,
        }
        return errors[hold]


def match(
    template: ResNeXtSpec,
    *,
    cardinalities: Sequence[int],
    hold: Hold,
    tolerance_pct: float,
    image_size: int,
    reference: ResNeXtSpec | None = None,
    widths: Widths = "doubling",
    when_none: WhenNone = "refuse",
) -> tuple[Match, ...]:
    """The template at each cardinality, at widths that meet the reference's budget.

    Where widths double, the base width is the one unknown, and it is the best of all
    whole numbers from 1 up. Where they are free, of all nets within the tolerance the
    one nearest to doubling is taken (`tightest.nearest_to_doubling` has the distance).

    Args:
        template: gives all but cardinality and widths.
        cardinalities: C of each match, each once.
        hold: the currency in which to be near.
        tolerance_pct: largest error in that currency, percent of the reference.
        image_size: side of the square images, pixels.
        reference: sets the budget; the template itself when None.
        widths: whether they double by stage or are free in each.
        when_none: `nearest` takes the net nearest to the budget where none is within
            the tolerance; its error is in its certificate.

    Returns:
        One match for each cardinality, in the order given.

    Raises:
        InputError: an argument breaks its rule, or no width is within the tolerance;
            the message then names the nearest widths on either side.
    """
    check_request(cardinalities, hold, tolerance_pct, widths)
    if hold in MEASURED:
        raise InputError(f"hold = {hold} needs a device: measured.match_measured.")
    reference = template if reference is None else reference
    matches: list[Match] = []
    failures: dict[int, list[Match]] = {}
    for cardinality in cardinalities:
        candidates: list[Match] = []
        for solve in _SOLVERS[widths]:
            specs = solve(
                template, cardinality, hold, tolerance_pct, image_size, reference
            )
            candidates += (
                certify(spec, reference=reference, image_size=image_size)
                for spec in specs
            )
            best = min(candidates, key=lambda one: abs(one.error_pct(hold)))
            if abs(best.error_pct(hold)) <= tolerance_pct:
                break
        else:
            failures[cardinality] = candidates
        matches.append(best)
    if failures and when_none == "refuse":
        raise InputError(_no_match(failures, hold, tolerance_pct, reference))
    return tuple(matches)


def certify(
    spec: ResNeXtSpec,
    *,
    reference: ResNeXtSpec,
    image_size: int,
    reference_image_size: int | None = None,
) -> Match:
    """Any net beside a reference, both on square images of `image_size` pixels.

    Where the image size is an axis, the reference may have another.

    Raises:
        InputError: the image is smaller than the total stride of one of them.
    """
    ours = complexity(spec, image_size)
    theirs = complexity(reference, reference_image_size or image_size)
    return Match(
        spec=spec,
        image_size=image_size,
        complexity=ours,
        macs_error_pct=_error_pct(ours.macs, theirs.macs),
        params_error_pct=_error_pct(ours.params, theirs.params),
        activations_error_pct=_error_pct(ours.activations, theirs.activations),
        block_params_error_pct=_error_pct(
            _first_block_params(spec), _first_block_params(reference)
        ),
    )


def _doubling(
    template: ResNeXtSpec,
    cardinality: int,
    hold: Hold,
    tolerance_pct: float,
    image_size: int,
    reference: ResNeXtSpec,
) -> tuple[ResNeXtSpec, ...]:
    """The widest base width within the budget and the next one; 1 if none is within."""
    cost = _cost(hold, image_size)
    budget = cost(reference)

    def cost_at(width: int) -> int:
        return cost(template.with_setting(cardinality, width))

    # Every cost grows with the width, so bisection finds the crossing exactly.
    ceiling = 1
    while cost_at(ceiling) <= budget:
        ceiling *= 2
    within = bisect_right(range(1, ceiling), budget, key=cost_at)
    bases = (within, within + 1) if within else (1,)
    return tuple(template.with_setting(cardinality, base) for base in bases)


def _free(
    template: ResNeXtSpec,
    cardinality: int,
    hold: Hold,
    tolerance_pct: float,
    image_size: int,
    reference: ResNeXtSpec,
) -> tuple[ResNeXtSpec, ...]:
    """The net in the window nearest to doubling; where none is in it, those beside."""
    from resnext_ablate.architecture import (  # They load numpy; most verbs do not.
        space,
        tightest,
    )

    # block_params fixes stage 1, from where widths can only double.
    if hold != "macs" and hold != "params" and hold != "activations":
        return ()
    window = space.around(
        reference,
        currency=hold,
        tolerance_pct=min(tolerance_pct, 100),
        image_size=image_size,
    )
    found = tightest.nearest_to_doubling(
        template, cardinality=cardinality, window=window, image_size=image_size
    )
    if found is not None:
        return (found,)
    return tightest.tightest(
        template, cardinality=cardinality, window=window, image_size=image_size
    )


_SOLVERS = {
    "doubling": (_doubling,),
    "free": (_free,),
    "auto": (_doubling, _free),
}


def _cost(hold: Hold, image_size: int) -> Callable[[ResNeXtSpec], int]:
    if hold == "block_params":
        return _first_block_params
    return lambda spec: int(getattr(complexity(spec, image_size), hold))


def _first_block_params(spec: ResNeXtSpec) -> int:
    return block_params(spec.cardinalities[0], spec.base_width, spec.out_channels[0])


def _error_pct(value: int, reference: int) -> float:
    return 100 * (value - reference) / reference


def check_request(
    cardinalities: Sequence[int], hold: str, tolerance_pct: float, widths: str
) -> None:
    """Refuses a match that cannot be meant.

    Raises:
        InputError: an argument breaks its rule.
    """
    if widths not in get_args(Widths):
        known = ", ".join(get_args(Widths))
        raise InputError(f"widths must be one of {known}; got {widths!r}.")
    if hold == "block_params" and widths == "free":
        raise InputError(
            "hold = block_params fixes stage 1, from where widths double; free widths "
            "need macs, params or activations held."
        )
    if hold not in get_args(Hold):
        known = ", ".join(get_args(Hold))
        raise InputError(f"hold must be one of {known}; got {hold!r}.")
    if not tolerance_pct > 0:  # so that nan fails as well
        raise InputError(
            "tolerance_pct must be a number of percent above 0, such as 5; "
            f"got {tolerance_pct}."
        )
    if not cardinalities:
        raise InputError("cardinalities must name at least one, such as 32; got none.")
    for cardinality in cardinalities:
        if cardinality < 1:
            raise InputError(
                f"cardinalities must be whole numbers of at least 1, got {cardinality}."
            )
    repeated = sorted({c for c in cardinalities if cardinalities.count(c) > 1})
    if repeated:
        raise InputError(
            "cardinalities must differ from one another; "
            f"given more than once: {', '.join(map(str, repeated))}."
        )


def _no_match(
    failures: dict[int, list[Match]],
    hold: Hold,
    tolerance_pct: float,
    reference: ResNeXtSpec,
) -> str:
    """The error message: nearest candidates and the tolerance that admits them."""
    lines = []
    needed = 0.0
    for cardinality, candidates in failures.items():
        errors = {match.spec.setting: match.error_pct(hold) for match in candidates}
        nearest = ", ".join(f"{name} ({percent(pct)})" for name, pct in errors.items())
        lines.append(f"cardinality {cardinality}: nearest {nearest}")
        needed = max(needed, min(map(abs, errors.values())))
    digits = 2 if needed >= 0.005 else 6
    admits = math.ceil(10**digits * needed) / 10**digits
    return (
        f"no width holds {hold} within {tolerance_pct:g} % of {reference.name} at "
        f"{'; at '.join(lines)}. A tolerance of {admits:.{digits}f} % admits the "
        "nearest."
    )


def percent(error_pct: float) -> str:
    """A signed error with two digits, or those that tell a small one from none."""
    digits = 2 if error_pct == 0 or abs(error_pct) >= 0.05 else 4
    return f"{error_pct:+.{digits}f} %"
