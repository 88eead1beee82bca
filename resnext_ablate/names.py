"""Reads the names of nets; `ResNeXtSpec.name` writes them."""

from __future__ import annotations

import re
from typing import Any, get_args

from resnext_ablate.spec import (
    STEM_OF_NUM_STAGES,
    InputError,
    ResNeXtSpec,
    Stem,
    doubled,
    stage_depths_of,
)

_NAME = re.compile(
    r"(?P<family>(?P<wide>wide_)?resnet|resnext)(?P<stages>\d+(?:\.|(?:\.\d+)*))"
    r"(?(wide)_2|(?:[-_](?P<cardinality>\d+(?:\.\d+)*)x(?P<widths>\d+(?:\.\d+)*)d)?)"
    r"(?P<suffixes>(?:-[a-z]+\d*)*)"
)
_SUFFIX = re.compile(r"-(?P<key>[a-z]+)(?P<value>\d*)")
_NUMBERED_SUFFIXES = {"t": "template_width", "in": "in_channels", "c": "num_classes"}


def parse_spec(name: str) -> ResNeXtSpec:
    """The net of a name.

    `resnet50`, `resnext50-32x4d`, `resnext29-8x64d`; torchvision's `resnext50_32x4d`
    and `wide_resnet50_2`. In place of the depth stage depths may stand
    (`resnext2.3.2-4x8d`; a lone stage keeps its dot, `resnext3.-4x8d`), in place of the
    width or cardinality one for each stage (`resnext50-8x14.27.55.108d`,
    `resnext50-8.16.32.32x14d`). Suffixes where a net departs from the paper's: `-t16`
    template width, `-in1` in-channels, `-c100` classes, `-cifar` or `-imagenet` stem,
    `-noshortcut`.

    Raises:
        InputError: the name does not parse, or the net breaks a rule.
    """
    match = _NAME.fullmatch(name.strip())
    if match is None:
        raise InputError(
            f"{name!r} names no net; write resnet50, resnext50-32x4d or "
            "resnext29-8x64d-t16 (depth, cardinality x base width, template width)."
        )
    family, stages = match["family"], match["stages"]
    if "." in stages:
        stage_depths = tuple(map(int, stages.removesuffix(".").split(".")))
    else:
        stage_depths = stage_depths_of(int(stages))
    fields = _parse_suffixes(name, match["suffixes"])
    fields.setdefault("stem", STEM_OF_NUM_STAGES.get(len(stage_depths), "cifar"))
    template_width = fields.get("template_width", 64)
    cardinality: int | tuple[int, ...]
    if match["cardinality"] is not None:
        cardinality = _one_or_each(match["cardinality"])
        widths = tuple(map(int, match["widths"].split(".")))
    elif family == "resnext":
        raise InputError(
            f"{name!r} lacks its cardinality and width, as in resnext{stages}-32x4d."
        )
    else:
        cardinality, widths = 1, (template_width * (2 if match["wide"] else 1),)
    if len(widths) == 1:
        widths = doubled(widths[0], len(stage_depths))
    return ResNeXtSpec(
        stage_depths=stage_depths,
        cardinality=cardinality,
        bottleneck_widths=widths,
        **fields,
    )


def parse_setting(setting: str) -> tuple[int | tuple[int, ...], tuple[int, ...]]:
    """Cardinality and widths of a setting such as `32x4d` or `8x14.27.55.108d`.

    A lone cardinality holds in every stage and comes as a number.

    Raises:
        InputError: the text is not of that form.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)*)x(\d+(?:\.\d+)*)d?", setting.strip())
    if match is None:
        raise InputError(
            f"{setting!r} is no setting; write cardinality x base width, as in 32x4d."
        )
    return _one_or_each(match[1]), tuple(map(int, match[2].split(".")))


def _one_or_each(numbers: str) -> int | tuple[int, ...]:
    first, *others = map(int, numbers.split("."))
    return (first, *others) if others else first


def _parse_suffixes(name: str, suffixes: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for match in _SUFFIX.finditer(suffixes):
        key, value = match["key"], match["value"]
        if key in _NUMBERED_SUFFIXES and value:
            fields[_NUMBERED_SUFFIXES[key]] = int(value)
        elif key in get_args(Stem) and not value:
            fields["stem"] = key
        elif key == "noshortcut" and not value:
            fields["shortcut"] = "none"
        else:
            raise InputError(
                f"{name!r} has the unknown suffix {match[0]!r}; known: -t16 (template "
                "width), -in1 (in-channels), -c100 (classes), -cifar, -imagenet, "
                "-noshortcut."
            )
    if fields.get("num_classes") == 0:
        raise InputError(f"{name!r}: num_classes must be at least 1, got 0.")
    return fields
