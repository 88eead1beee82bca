"""Spaces and windows from the texts of the command line."""

from __future__ import annotations

from collections.abc import Sequence

from resnext_ablate.architecture.costs import CURRENCIES
from resnext_ablate.architecture.space import (
    Axis,
    PerStage,
    Shared,
    Space,
    Window,
    around,
    parse_values,
)
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec

_FIELDS = {"cardinality": "cardinality", "width": "width", "depth": "stage_depth"}
_LISTS = {"template-width": "template_widths", "image-size": "image_sizes"}
AXES = (*_FIELDS, *(f"stage-{name}" for name in _FIELDS), *_LISTS)
"""What may vary: `width` is one number for the net, `stage-width` one per stage."""


def space_around(
    template: ResNeXtSpec,
    *,
    image_size: int,
    cardinalities: tuple[int, ...],
    axes: Sequence[str],
    inner_multiple: int = 1,
) -> Space:
    """The nets around a template at some cardinalities, with axes such as `depth=2..6`.

    Where no width is given it is free in each stage, up to the stage's output channels.

    Raises:
        InputError: an axis is unknown, given twice or empty.
    """
    fields: dict[str, Axis] = {}
    lists: dict[str, tuple[int, ...]] = {"image_sizes": (image_size,)}
    if cardinalities:
        fields["cardinality"] = Shared(cardinalities)
    for text in axes:
        name, equals, values = (part.strip() for part in text.partition("="))
        field = _FIELDS.get(name.removeprefix("stage-"))
        if not equals or name not in AXES:
            raise InputError(
                f"an axis is NAME=VALUES, with a name of {', '.join(AXES)}; "
                f"got {text!r}."
            )
        if field is None:
            lists[_LISTS[name]] = parse_values(values)
        elif field in fields:
            raise InputError(f"{name.removeprefix('stage-')} is given more than once.")
        else:
            numbers = parse_values(values)
            by_stage = name.startswith("stage-")
            fields[field] = PerStage((numbers,)) if by_stage else Shared(numbers)
    if "width" not in fields:
        tops = template.out_channels
        fields["width"] = PerStage(tuple(tuple(range(1, top + 1)) for top in tops))
    return Space(
        template=template,
        cardinality=fields.get("cardinality"),
        width=fields["width"],
        stage_depth=fields.get("stage_depth"),
        image_sizes=lists["image_sizes"],
        template_widths=lists.get("template_widths", ()),
        inner_multiple=inner_multiple,
    )


def windows_around(
    reference: ResNeXtSpec, *, image_size: int, within_pct: dict[str, float]
) -> tuple[Window, ...]:
    """The window of each currency around what a net costs.

    Raises:
        InputError: a currency is unknown, or a tolerance no percentage.
    """
    windows = []
    for currency in within_pct:
        if currency not in CURRENCIES:
            raise InputError(
                f"nets are counted within {', '.join(CURRENCIES)}; got {currency!r}."
            )
    for currency in CURRENCIES:
        if currency in within_pct:
            tolerance_pct = within_pct[currency]
            windows.append(
                around(
                    reference,
                    currency=currency,
                    tolerance_pct=tolerance_pct,
                    image_size=image_size,
                )
            )
    return tuple(windows)
