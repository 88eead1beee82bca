"""Names, rules and shapes of a spec."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given
from strategies import any_specs

from resnext_ablate.architecture.names import parse_setting, parse_spec
from resnext_ablate.architecture.shapes import Block, BlockForm, Conv
from resnext_ablate.architecture.spec import (
    InputError,
    ResNeXtSpec,
    doubled,
    spec_from_dict,
    stage_depths_of,
)


@given(spec=any_specs())
def test_name_round_trip(spec: ResNeXtSpec) -> None:
    """The name of any net parses back to that net."""
    assert spec == parse_spec(spec.name)


@given(spec=any_specs())
def test_json_round_trip(spec: ResNeXtSpec) -> None:
    """A net survives JSON, where tuples become lists."""
    assert spec == spec_from_dict(json.loads(json.dumps(spec.to_dict())))


@pytest.mark.parametrize(
    ("name", "depths", "cardinality", "widths", "template_width", "stem"),
    [
        ("resnet50", (3, 4, 6, 3), 1, (64, 128, 256, 512), 64, "imagenet"),
        ("resnext50-32x4d", (3, 4, 6, 3), 32, (4, 8, 16, 32), 64, "imagenet"),
        ("resnext50_32x4d", (3, 4, 6, 3), 32, (4, 8, 16, 32), 64, "imagenet"),
        ("resnext101-64x4d", (3, 4, 23, 3), 64, (4, 8, 16, 32), 64, "imagenet"),
        ("resnet152", (3, 8, 36, 3), 1, (64, 128, 256, 512), 64, "imagenet"),
        ("resnet200", (3, 24, 36, 3), 1, (64, 128, 256, 512), 64, "imagenet"),
        ("wide_resnet50_2", (3, 4, 6, 3), 1, (128, 256, 512, 1024), 64, "imagenet"),
        ("wide_resnet11_2-t16", (1, 1, 1), 1, (32, 64, 128), 16, "cifar"),
        ("resnext29-8x64d", (3, 3, 3), 8, (64, 128, 256), 64, "cifar"),
        ("resnet20-t16", (2, 2, 2), 1, (16, 32, 64), 16, "cifar"),
        ("resnext11-4x3d-t8", (1, 1, 1), 4, (3, 6, 12), 8, "cifar"),
        ("resnext11-4x3d-imagenet", (1, 1, 1), 4, (3, 6, 12), 64, "imagenet"),
        ("resnext2.3.2-4x8d", (2, 3, 2), 4, (8, 16, 32), 64, "cifar"),
        ("resnext3.-4x8d", (3,), 4, (8,), 64, "cifar"),
        ("resnext50-8x14.27.55.108d", (3, 4, 6, 3), 8, (14, 27, 55, 108), 64, None),
        (
            "resnext50-8.16.32.32x1d",
            (3, 4, 6, 3),
            (8, 16, 32, 32),
            (1, 2, 4, 8),
            64,
            None,
        ),
        ("resnext11-4.4.4x3d", (1, 1, 1), 4, (3, 6, 12), 64, "cifar"),
        ("resnext11-4.2.1x3.4.5d", (1, 1, 1), (4, 2, 1), (3, 4, 5), 64, "cifar"),
    ],
)
def test_names_parse(
    name: str,
    depths: tuple[int, ...],
    cardinality: int | tuple[int, ...],
    widths: tuple[int, ...],
    template_width: int,
    stem: str | None,
) -> None:
    """Each form of a name gives its net."""
    spec = parse_spec(name)
    assert depths == spec.stage_depths
    assert cardinality == spec.cardinality
    assert widths == spec.bottleneck_widths
    assert template_width == spec.template_width
    assert (stem or "imagenet") == spec.stem


def test_suffixes_parse() -> None:
    """Suffixes set template width, in-channels, classes, stem and shortcut."""
    spec = parse_spec("resnext11-2x3d-t8-imagenet-in1-c7-noshortcut")
    assert (
        spec.template_width,
        spec.stem,
        spec.in_channels,
        spec.num_classes,
        spec.shortcut,
    ) == (8, "imagenet", 1, 7, "none")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "names no net"),
        ("densenet121", "'densenet121' names no net; write resnet50"),
        ("resnet50_2", "names no net"),
        ("wide_resnet50", "names no net"),
        ("wide_resnet50-32x4d", "names no net"),
        ("wide_resnext50_2", "names no net"),
        ("resnext50-32x4", "names no net"),
        ("resnext50", "lacks its cardinality and width, as in resnext50-32x4d"),
        ("resnext50-32x4d-q8", "unknown suffix '-q8'; known: -t16"),
        ("resnext50-32x4d-t", "unknown suffix '-t'"),
        ("resnext50-32x4d-cifar3", "unknown suffix '-cifar3'"),
        ("resnext50-32x4d-c0", "num_classes must be at least 1, got 0"),
        ("resnext50-0x4d", "cardinality must be a whole number of at least 1, got 0"),
        ("resnext50-4x0d", "bottleneck_widths, stage 1 must be .* got 0"),
        ("resnext1.0.1-4x4d", "stage_depths, stage 2 must be .* got 0"),
        ("resnext50-8x4.8d", "one width per stage: 4 stages .* got 2 widths"),
        ("resnext50-8.16x4d", "one for each stage: 4 stages, got 2 card.* \\(8, 16\\)"),
        ("resnext11-8.0.8x4d", "cardinality, stage 2 must be .* got 0"),
        ("resnet51", "got 51; nearest: 50 or 56"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    """A name that is no net raises with the rule it breaks."""
    with pytest.raises(InputError, match=message):
        parse_spec(name)


@pytest.mark.parametrize(
    ("depth", "nearest"),
    [
        (-7, "11"),
        (3, "11"),
        (12, "11 or 18"),
        (33, "29 or 34"),
        (49, "47 or 50"),
        (51, "50 or 56"),
        (199, "191 or 200"),
    ],
)
def test_nearest_depths(depth: int, nearest: str) -> None:
    """An impossible depth names the nearest valid ones, ImageNet depths included."""
    with pytest.raises(InputError, match=f"got {depth}; nearest: {nearest}\\.$"):
        stage_depths_of(depth)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("32x4d", (32, (4,))),
        ("2x40", (2, (40,))),
        ("8x14.27d", (8, (14, 27))),
        ("8.16x14d", ((8, 16), (14,))),
    ],
)
def test_settings_parse(setting: str, expected: tuple[int, tuple[int, ...]]) -> None:
    """A setting gives cardinality and widths."""
    assert expected == parse_setting(setting)


def test_bad_setting() -> None:
    """A setting that does not parse raises with the form to write."""
    with pytest.raises(InputError, match=r"'32d' is no setting; .* as in 32x4d"):
        parse_setting("32d")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("cardinality", 0, "cardinality must be a whole number of at least 1, got 0"),
        ("cardinality", 2.0, "cardinality must be a whole number"),
        ("cardinality", True, "cardinality must be a whole number"),
        ("template_width", -1, "template_width must be a whole number"),
        ("in_channels", 0, "in_channels must be a whole number"),
        ("num_classes", -1, "num_classes must be a whole number"),
        ("stem", "mnist", "stem must be 'imagenet' or 'cifar', got 'mnist'"),
        ("shortcut", "a", "shortcut must be 'A' or 'B' or 'C' or 'none', got 'a'"),
        ("block", "wide", "block must be 'bottleneck' or 'basic', got 'wide'"),
        ("block_form", "d", "block_form must be 'a' or 'b' or 'c', got 'd'"),
        ("activation", "", "activation must be 'post' or 'pre', got ''"),
        ("family", "x", "family must be 'paper' or 'from_scratch', got 'x'"),
        ("stage_depths", (1, 0, 1), "stage_depths, stage 2 must be .* got 0"),
        ("bottleneck_widths", (1, 2), "one width per stage: 3 stages .* got 2 widths"),
    ],
)
def test_bad_fields(field: str, value: object, message: str) -> None:
    """A field that breaks its rule raises with field, rule and value."""
    values = parse_spec("resnext11-4x3d").to_dict()
    with pytest.raises(InputError, match=message):
        ResNeXtSpec(**{**values, field: value})


def test_no_stages() -> None:
    """A net without stages is refused."""
    with pytest.raises(InputError, match="at least one stage"):
        ResNeXtSpec(stage_depths=(), cardinality=1, bottleneck_widths=())


@pytest.mark.parametrize("name", ["resnet50", "resnext29-8x64d", "resnext3.-4x8d"])
def test_smallest_image(name: str) -> None:
    """The smallest image ends as one pixel; a smaller one is refused by its size."""
    spec = parse_spec(name)
    smallest = spec.total_stride
    assert spec.layout(smallest).convs[-1].out_side == 1
    message = f"image_size must be at least {smallest}, .* of {re.escape(spec.name)}; "
    with pytest.raises(InputError, match=f"{message}got {smallest - 1}"):
        spec.layout(smallest - 1)


def test_table_1_shapes() -> None:
    """ResNeXt-50 (32x4d) has the stages of the paper's Table 1."""
    layout = parse_spec("resnext50-32x4d").layout(224)
    last = {block.stage: block for block in layout.blocks}
    assert layout.stem.out_side == 112
    assert [block.out_side for block in last.values()] == [56, 28, 14, 7]
    assert [b.convs[1].out_channels for b in last.values()] == [128, 256, 512, 1024]
    assert [block.out_channels for block in last.values()] == [256, 512, 1024, 2048]
    assert {32} == {block.convs[1].groups for block in layout.blocks}


def _main_path(block: Block) -> tuple[Conv, ...]:
    return tuple(step for step in block.steps if isinstance(step, Conv))


@given(spec=any_specs())
def test_stride_and_projection(spec: ResNeXtSpec) -> None:
    """The first 3x3 alone strides; a projection stands just where the option has it."""
    layout = spec.layout(spec.total_stride)
    for block in layout.blocks:
        convs = _main_path(block)
        first = next(conv for conv in convs if conv.kernel_size == 3)
        assert first.stride == block.stride
        assert all(conv.stride == 1 for conv in convs if conv is not first)
        changes = block.stride == 2 or block.in_channels != block.out_channels
        wanted = {"A": False, "B": changes, "C": True, "none": False}
        assert wanted[spec.shortcut] == bool(block.projection)


@given(spec=any_specs())
def test_layers_chain(spec: ResNeXtSpec) -> None:
    """Each layer takes what the one before puts out, and the depth counts them all."""
    layout = replace(spec, block_form="c").layout(spec.total_stride + 5)
    main = [conv for block in layout.blocks for conv in _main_path(block)]
    for before, after in pairwise(main):
        assert (before.out_channels, before.out_side) == (
            after.in_channels,
            after.in_side,
        )
    assert main[-1].out_channels == layout.head.in_features == spec.out_channels[-1]
    assert spec.depth == len(main) + 2
    for block in layout.blocks:
        first, last = _main_path(block)[0], _main_path(block)[-1]
        assert (block.in_channels, block.in_side) == (first.in_channels, first.in_side)
        assert (block.out_channels, block.out_side) == (
            last.out_channels,
            last.out_side,
        )


@given(spec=any_specs())
def test_branches_split_the_grouped_block(spec: ResNeXtSpec) -> None:
    """Forms a and b have C branches of width d with as many weights as form c."""
    spec = replace(spec, family="paper")
    forms = {
        form: replace(spec, block_form=form).layout(spec.total_stride).blocks
        for form in get_args(BlockForm)
    }
    for blocks in zip(*forms.values(), strict=True):
        a, b, c = map(_main_path, blocks)
        cardinality = spec.cardinalities[blocks[0].stage - 1]
        assert [conv.branches for conv in a] == [cardinality] * len(a)
        assert [conv.branches for conv in b] == [cardinality] * (len(b) - 1) + [1]
        for one in zip(a, b, c, strict=True):
            assert len({conv.num_weights * conv.branches for conv in one}) == 1
            assert len({(conv.in_side, conv.stride) for conv in one}) == 1
            assert all(conv.groups == 1 for conv in one[:2])


def test_with_setting() -> None:
    """One width doubles by stage, several stand as they are."""
    spec = parse_spec("resnet29-t16")
    assert parse_spec("resnext29-4x6d-t16") == spec.with_setting(4, 6)
    assert spec.with_setting(4, 5, 6, 7).bottleneck_widths == (5, 6, 7)
    assert doubled(3, 4) == (3, 6, 12, 24)


def test_cardinality_of_each_stage() -> None:
    """Stages may differ in cardinality; where all agree it is kept as one number."""
    spec = parse_spec("resnext50-8.16.32.32x14d")
    assert spec.inner_channels == (112, 448, 1792, 3584)
    assert spec.name == "resnext50-8.16.32.32x14d"
    groups = {
        conv.stage: conv.groups
        for conv in spec.layout(224).convs[1:]
        if conv.kernel_size == 3
    }
    assert groups == {1: 8, 2: 16, 3: 32, 4: 32}
    same = spec.with_setting((8, 8, 8, 8), 14)
    assert same.cardinality == 8
    assert same.cardinalities == (8, 8, 8, 8)
    assert same == parse_spec("resnext50-8x14d")
