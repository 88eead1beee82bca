"""The closed form against the paper, against the built net and against fvcore."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from importlib.resources import files

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import any_specs, sizes_for, small_specs
from torch import Tensor, nn

from resnext_ablate.architecture.complexity import (
    Complexity,
    block_params,
    complexity,
    stage_table,
)
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec
from resnext_ablate.compute.model import ResNeXt, measure_fvcore

PAPER = tuple(
    csv.DictReader(
        files("resnext_ablate.records")
        .joinpath("paper.csv")
        .read_text("utf-8")
        .splitlines()
    )
)


def _row_id(row: dict[str, str]) -> str:
    return f"{row['table']}/{row['model']}/{row['name']}/{row['image_size']}"


def _on_meta(spec: ResNeXtSpec) -> ResNeXt:
    with torch.device("meta"):
        return ResNeXt(spec)


def _num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _hook_count(spec: ResNeXtSpec, image_size: int) -> tuple[int, int]:
    """Macs and activations from the tensors of a forward pass of the built net."""
    counts = [0, 0]

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        positions = output.numel() // weight.shape[0]
        counts[0] += weight.numel() * positions
        counts[1] += output.numel() if isinstance(module, nn.Conv2d) else 0

    model = _on_meta(spec).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    side = image_size
    model(torch.empty(1, spec.in_channels, side, side, device="meta"))
    return counts[0], counts[1]


def test_paper_table_is_whole() -> None:
    """The packaged table holds every net of the paper's tables, each row once."""
    assert len(set(map(_row_id, PAPER))) == len(PAPER)
    assert Counter(row["table"] for row in PAPER) == {
        "table1": 2,
        "table2": 39,  # 13 settings, 8 of them neighbours, on three templates
        "table3": 10,
        "table4": 6,
        "table5": 5,  # of this family; two of the nets at two image sizes
        "table6": 8,  # four nets, each scored 5K-way and 1K-way
        "table7": 4,  # two nets, each with 10 and 100 classes
        "fig7": 14,
        "residual": 4,
        "fig5": 4,  # training errors
    }


@pytest.mark.parametrize("row", PAPER, ids=_row_id)
def test_paper_counts(row: dict[str, str]) -> None:
    """Macs and parameters of every net of the paper are exact, where it is counted."""
    spec = parse_spec(row["name"])
    assert row["name"] == spec.name
    assert (row["cardinality"], row["base_width"], row["depth"], row["setting"]) == (
        str(spec.cardinality),
        str(spec.base_width),
        str(spec.depth),
        spec.setting,
    )
    cost = complexity(spec, int(row["image_size"]))
    for currency in ("macs", "params", "params_without_bn"):
        if row[currency]:
            assert int(row[currency]) == getattr(cost, currency), currency


@pytest.mark.parametrize(
    ("name", "params"),
    sorted({(row["name"], row["params"]) for row in PAPER if row["params"]}),
)
def test_paper_params_of_built_nets(name: str, params: str) -> None:
    """The built nets have the parameters of the paper's nets."""
    assert int(params) == _num_params(_on_meta(parse_spec(name)))


@pytest.mark.parametrize(
    "row",
    [
        row
        for row in PAPER
        if row["fvcore_total"] and row["name"] in ("resnet50", "resnext50-32x4d")
    ],
)
def test_fvcore_golden(row: dict[str, str]) -> None:
    """fvcore's eval-mode total and its conv and linear part are exact."""
    measured = measure_fvcore(parse_spec(row["name"]), image_size=224)
    assert int(row["fvcore_total"]) == measured.total
    assert int(row["macs"]) == measured.conv_linear


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("resnet50-noshortcut", 22780456, 3729522688),
        ("resnext50-32x4d-noshortcut", 22252328, 3870818304),
        ("resnext29-8x64d-c100", 34518948, 5387358208),
    ],
)
def test_counts_beside_the_tables(name: str, params: int, macs: int) -> None:
    """Without shortcuts the projections go too; classes cost their head alone."""
    spec = parse_spec(name)
    cost = complexity(spec, 224 if spec.stem == "imagenet" else 32)
    assert (params, macs) == (cost.params, cost.macs)


@settings(deadline=None)
@given(data=st.data(), spec=small_specs())
def test_closed_form_is_hook_count(data: st.DataObject, spec: ResNeXtSpec) -> None:
    """Macs and activations equal those counted from a forward pass, at any size."""
    image_size = data.draw(sizes_for(spec))
    cost = complexity(spec, image_size)
    assert (cost.macs, cost.activations) == _hook_count(spec, image_size)


@settings(deadline=None)
@given(spec=small_specs())
def test_params_of_built_net(spec: ResNeXtSpec) -> None:
    """Parameters equal those of the built net, with and without batch norm."""
    model = _on_meta(spec)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    in_norms = sum(map(_num_params, norms))
    cost = complexity(spec, spec.total_stride)
    assert _num_params(model) == cost.params
    assert _num_params(model) - in_norms == cost.params_without_bn


@settings(deadline=None, max_examples=12)
@given(data=st.data(), spec=small_specs())
def test_closed_form_is_fvcore(data: st.DataObject, spec: ResNeXtSpec) -> None:
    """Macs equal fvcore's count of convolutions and linear layers."""
    image_size = data.draw(sizes_for(spec))
    measured = measure_fvcore(spec, image_size=image_size)
    assert complexity(spec, image_size).macs == measured.conv_linear


@given(spec=any_specs())
def test_stage_table_sums(spec: ResNeXtSpec) -> None:
    """The rows of the stage table sum to the whole net."""
    rows = stage_table(spec, spec.total_stride)
    total = sum((row.complexity for row in rows), Complexity(0, 0, 0, 0))
    assert complexity(spec, spec.total_stride) == total
    assert spec.stage_depths == tuple(row.num_blocks for row in rows[1:-1])


@pytest.mark.parametrize(
    ("name", "widths", "params", "macs"),
    [
        (
            "resnet50",
            [None, 64, 128, 256, 512, None],
            [9536, 215808, 1219584, 7098368, 14964736, 2049000],
            [118013952, 667942912, 1027604480, 1464336384, 809238528, 2048000],
        ),
        (
            "resnext50-32x4d",
            [None, 4, 8, 16, 32, None],
            [9536, 205824, 1197056, 7022592, 14544896, 2049000],
            [118013952, 634224640, 1085407232, 1525350400, 865435648, 2048000],
        ),
    ],
)
def test_stage_table_of_table_1(
    name: str, widths: list[int | None], params: list[int], macs: list[int]
) -> None:
    """Each row has its name, side, channels and width, and costs its share exactly."""
    rows = stage_table(parse_spec(name), 224)
    assert [row.stage for row in rows] == [
        "stem",
        "stage 1",
        "stage 2",
        "stage 3",
        "stage 4",
        "head",
    ]
    assert [row.out_side for row in rows] == [112, 56, 28, 14, 7, 1]
    assert [row.out_channels for row in rows] == [64, 256, 512, 1024, 2048, 1000]
    assert [row.bottleneck_width for row in rows] == widths
    assert [row.complexity.params for row in rows] == params
    assert [row.complexity.macs for row in rows] == macs


@pytest.mark.parametrize(
    ("setting", "params"),
    [
        ((1, 64), 69632),
        ((2, 40), 69760),
        ((4, 24), 69888),
        ((8, 14), 71456),
        ((32, 4), 70144),
    ],
)
def test_block_params_of_table_2(setting: tuple[int, int], params: int) -> None:
    """Eq. 4 gives the block parameters of Table 2, about 70 k each."""
    cardinality, width = setting
    assert params == block_params(cardinality, width, 256)


@given(spec=small_specs())
def test_block_params_are_of_the_layout(spec: ResNeXtSpec) -> None:
    """Eq. 4 counts a stage-1 bottleneck whose shape does not change."""
    spec = replace(spec, block="bottleneck", block_form="c")
    channels = spec.out_channels[0]
    convs = spec.layout(spec.total_stride).blocks[0].convs[1:3]
    weights = [
        conv.kernel_size**2 * conv.in_channels * conv.out_channels // conv.groups
        for conv in convs
    ]
    # The first 1x1 mirrors the last where the block keeps its channels.
    expected = weights[0] + 2 * weights[1]
    assert expected == block_params(spec.cardinalities[0], spec.base_width, channels)


def test_small_image_is_refused() -> None:
    """An image below the net's stride is refused by closed form and measurement."""
    spec = parse_spec("resnext11-2x4d-t8")
    for count in (complexity, lambda s, n: measure_fvcore(s, image_size=n)):
        with pytest.raises(InputError, match="image_size must be at least 4"):
            count(spec, 3)
