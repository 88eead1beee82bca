"""Widths that hold a budget as the cardinality changes, and the certificate of a match.

The paper holds the parameters of a block (Eq. 4, Table 2); whole nets then drift apart
by a few percent of macs. Here the width is solved in the currency that is to be held,
and every match states its residual in all of them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from resnext_ablate.complexity import Complexity, block_params, complexity
from resnext_ablate.spec import InputError, ResNeXtSpec

Hold = Literal["block_params", "macs", "params"]
"""What is held: parameters of a stage-1 block (Eq. 4), the net's macs or params."""


@dataclass(frozen=True, slots=True)
class Match:
    """A net beside its reference. Errors are signed: positive costs more than it."""

    spec: ResNeXtSpec
    complexity: Complexity
    macs_error_pct: float
    params_error_pct: float
    """Batch normalisation included, on both sides."""
    activations_error_pct: float
    block_params_error_pct: float
    """Of the stage-1 block that keeps its shape, by Eq. 4: without batch norm. Every
    other stage has the same error where both nets double their widths."""

    def error_pct(self, hold: Hold) -> float:
        """The error in the held currency."""
        errors = {
            "block_params": self.block_params_error_pct,
            "macs": self.macs_error_pct,
            "params": self.params_error_pct,
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
) -> tuple[Match, ...]:
    """The template at each cardinality, at the width nearest to the reference's budget.

    Widths double from stage to stage; the base width is the one unknown, and it is the
    best of all whole numbers from 1 up.

    Args:
        template: gives all but cardinality and widths.
        cardinalities: C of each match, each once.
        hold: the currency in which to be near.
        tolerance_pct: largest error in that currency, percent of the reference.
        image_size: side of the square images, pixels.
        reference: sets the budget; the template itself when None.

    Returns:
        One match for each cardinality, in the order given.

    Raises:
        InputError: an argument breaks its rule, or no width is within the tolerance;
            the message then names the nearest widths on either side.
    """
    _check(cardinalities, hold, tolerance_pct)
    reference = template if reference is None else reference
    matches: list[Match] = []
    failures: dict[int, list[Match]] = {}
    for cardinality in cardinalities:
        widths = _widths_around(template, cardinality, hold, image_size, reference)
        candidates = [
            certify(
                template.with_setting(cardinality, width),
                reference=reference,
                image_size=image_size,
            )
            for width in widths
        ]
        best = min(candidates, key=lambda candidate: abs(candidate.error_pct(hold)))
        if abs(best.error_pct(hold)) <= tolerance_pct:
            matches.append(best)
        else:
            failures[cardinality] = candidates
    if failures:
        raise InputError(_no_match(failures, hold, tolerance_pct, reference))
    return tuple(matches)


def certify(spec: ResNeXtSpec, *, reference: ResNeXtSpec, image_size: int) -> Match:
    """Any net beside a reference, both on square images of `image_size` pixels.

    Raises:
        InputError: the image is smaller than the total stride of one of them.
    """
    ours = complexity(spec, image_size)
    theirs = complexity(reference, image_size)
    return Match(
        spec=spec,
        complexity=ours,
        macs_error_pct=_error_pct(ours.macs, theirs.macs),
        params_error_pct=_error_pct(ours.params, theirs.params),
        activations_error_pct=_error_pct(ours.activations, theirs.activations),
        block_params_error_pct=_error_pct(
            _first_block_params(spec), _first_block_params(reference)
        ),
    )


def _widths_around(
    template: ResNeXtSpec,
    cardinality: int,
    hold: Hold,
    image_size: int,
    reference: ResNeXtSpec,
) -> tuple[int, ...]:
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
    return (within, within + 1) if within else (1,)


def _cost(hold: Hold, image_size: int) -> Callable[[ResNeXtSpec], int]:
    if hold == "block_params":
        return _first_block_params
    if hold == "macs":
        return lambda spec: complexity(spec, image_size).macs
    return lambda spec: complexity(spec, image_size).params


def _first_block_params(spec: ResNeXtSpec) -> int:
    return block_params(spec.cardinalities[0], spec.base_width, spec.out_channels[0])


def _error_pct(value: int, reference: int) -> float:
    return 100 * (value - reference) / reference


def _check(cardinalities: Sequence[int], hold: str, tolerance_pct: float) -> None:
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
        nearest = ", ".join(f"{name} ({pct:+.2f} %)" for name, pct in errors.items())
        lines.append(f"cardinality {cardinality}: nearest {nearest}")
        needed = max(needed, min(map(abs, errors.values())))
    admits = math.ceil(100 * needed) / 100
    return (
        f"no width holds {hold} within {tolerance_pct:g} % of {reference.name} at "
        f"{'; at '.join(lines)}. A tolerance of {admits:.2f} % admits the nearest."
    )
