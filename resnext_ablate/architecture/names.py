"""Reads the names of nets; `ResNeXtSpec.name` writes them."""

from __future__ import annotations

import re
from typing import Any

from resnext_ablate.architecture.shapes import BlockKind, Family
from resnext_ablate.architecture.spec import (
    FROM_SCRATCH_STAGE_DEPTHS,
    InputError,
    ResNeXtSpec,
    block_of_depth,
    default_stem,
    doubled,
    stage_depths_of,
)

_NAME = re.compile(
    r"(?P<family>(?P<wide>wide_)?resnet|resnext|(?P<scratch>from_scratch))"
    r"(?P<stages>\d+(?:\.|(?:\.\d+)*)|(?(scratch)|(?!)))"
    r"(?(wide)_2|(?:[-_](?P<cardinality>\d+(?:\.\d+)*)x(?P<widths>\d+(?:\.\d+)*)d)?)"
    r"(?P<suffixes>(?:-[a-z_]+\d*)*)"
)
_SUFFIX = re.compile(r"-(?P<key>[a-z_]+)(?P<value>\d*)")
_NUMBERED_SUFFIXES = {"t": "template_width", "in": "in_channels", "c": "num_classes"}
_WORD_SUFFIXES = {
    "cifar": ("stem", "cifar"),
    "imagenet": ("stem", "imagenet"),
    "basic": ("block", "basic"),
    "form_a": ("block_form", "a"),
    "form_b": ("block_form", "b"),
    "preact": ("activation", "pre"),
    "shortcut_a": ("shortcut", "A"),
    "shortcut_c": ("shortcut", "C"),
    "noshortcut": ("shortcut", "none"),
}
_FROM_SCRATCH_SETTING = "32x4d"


def parse_spec(name: str) -> ResNeXtSpec:
    """The net of a name.

    `resnet50`, `resnext50-32x4d`, `resnext29-8x64d`; `resnet18` and `resnet34` with
    basic blocks; torchvision's `resnext50_32x4d` and `wide_resnet50_2`. In place of the
    depth stage depths may stand (`resnext2.3.2-4x8d`; a lone stage keeps its dot,
    `resnext3.-4x8d`), in place of the width or cardinality one for each stage
    (`resnext50-8x14.27.55.108d`, `resnext50-8.16.32.32x14d`). `from_scratch-32x4d` is
    the tutorial net.

    Suffixes where a net departs from the paper's: `-t16` template width, `-in1`
    in-channels, `-c100` classes, `-cifar` or `-imagenet` stem, `-basic` blocks,
    `-form_a` or `-form_b` of Fig. 3, `-preact`, `-shortcut_a`, `-shortcut_c` or
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
    stages = match["stages"]
    given = _parse_suffixes(name, match["suffixes"])
    family: Family = "from_scratch" if match["scratch"] else "paper"
    if stages.isdigit():
        stage_depths = stage_depths_of(int(stages))
        given = {"block": _block_of(int(stages), family), **given}
    elif stages:
        stage_depths = tuple(map(int, stages.removesuffix(".").split(".")))
    else:
        stage_depths = FROM_SCRATCH_STAGE_DEPTHS
    cardinality, widths = _setting_of(name, match, given.get("template_width", 64))
    if len(widths) == 1:
        widths = doubled(widths[0], len(stage_depths))
    return ResNeXtSpec(
        stage_depths=stage_depths,
        cardinality=cardinality,
        bottleneck_widths=widths,
        family=family,
        **{"stem": default_stem(family, len(stage_depths)), **given},
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


def _setting_of(
    name: str, match: re.Match[str], template_width: int
) -> tuple[int | tuple[int, ...], tuple[int, ...]]:
    """Cardinality and widths of a name; what it leaves out follows from its family."""
    if match["cardinality"] is not None:
        widths = tuple(map(int, match["widths"].split(".")))
        return _one_or_each(match["cardinality"]), widths
    if match["scratch"]:
        return parse_setting(_FROM_SCRATCH_SETTING)
    if match["family"] == "resnext":
        raise InputError(
            f"{name!r} lacks its cardinality and width, as in "
            f"resnext{match['stages']}-32x4d."
        )
    return 1, (template_width * (2 if match["wide"] else 1),)


def _block_of(depth: int, family: Family) -> BlockKind:
    return "bottleneck" if family == "from_scratch" else block_of_depth(depth)


def _one_or_each(numbers: str) -> int | tuple[int, ...]:
    first, *others = map(int, numbers.split("."))
    return (first, *others) if others else first


def _parse_suffixes(name: str, suffixes: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for match in _SUFFIX.finditer(suffixes):
        key, value = match["key"], match["value"]
        if key in _NUMBERED_SUFFIXES and value:
            given[_NUMBERED_SUFFIXES[key]] = int(value)
        elif key in _WORD_SUFFIXES and not value:
            field, word = _WORD_SUFFIXES[key]
            given[field] = word
        else:
            raise InputError(
                f"{name!r} has the unknown suffix {match[0]!r}; known: -t16 (template "
                "width), -in1 (in-channels), -c100 (classes), "
                f"{', '.join(f'-{word}' for word in _WORD_SUFFIXES)}."
            )
    if given.get("num_classes") == 0:
        raise InputError(f"{name!r}: num_classes must be at least 1, got 0.")
    return given
