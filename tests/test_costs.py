"""Many nets counted at once, against the sum over the shapes of each."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import any_specs, sizes_for

from resnext_ablate.architecture.complexity import complexity
from resnext_ablate.architecture.costs import (
    CURRENCIES,
    costs_of,
    net_costs,
    stage_costs,
)
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec
from resnext_ablate.compute.model import measure_fvcore

# In the from-scratch net a stage costs what its neighbour decides.
PAPER_NETS = any_specs().filter(lambda spec: spec.family == "paper")


def _random_nets(
    num_nets: int, *, num_stages: int, seed: int, largest: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cardinalities, widths and depths, each (num_nets, num_stages)."""
    rng = np.random.default_rng(seed)
    c, d, n = (rng.integers(1, high + 1, (num_nets, num_stages)) for high in largest)
    return c, d, n


def _with(
    template: ResNeXtSpec, c: np.ndarray, d: np.ndarray, n: np.ndarray
) -> ResNeXtSpec:
    return replace(
        template,
        cardinality=tuple(c.tolist()),
        bottleneck_widths=tuple(d.tolist()),
        stage_depths=tuple(n.tolist()),
    )


@settings(deadline=None)
@given(data=st.data(), template=PAPER_NETS, seed=st.integers(0, 2**32))
def test_many_nets_cost_what_each_costs(
    data: st.DataObject, template: ResNeXtSpec, seed: int
) -> None:
    """For any template and image size, macs, params and activations are the sums."""
    image_size = data.draw(sizes_for(template))
    c, d, n = _random_nets(
        5, num_stages=template.num_stages, seed=seed, largest=(130, 700, 40)
    )
    many = costs_of(template, image_size, cardinalities=c, widths=d, depths=n)
    assert tuple(many) == CURRENCIES
    for row in range(5):
        one = complexity(_with(template, c[row], d[row], n[row]), image_size)
        for currency in CURRENCIES:
            assert many[currency][row] == getattr(one, currency)


def test_ten_thousand_nets() -> None:
    """10,000 nets of the ResNet-50 template equal their scalar counts, to the unit."""
    template = parse_spec("resnet50")
    c, d, n = _random_nets(10_000, num_stages=4, seed=7, largest=(64, 256, 6))
    many = costs_of(template, 224, cardinalities=c, widths=d, depths=n)
    wrong = []
    for row in range(0, 10_000):
        one = complexity(_with(template, c[row], d[row], n[row]), 224)
        if any(getattr(one, cur) != many[cur][row] for cur in CURRENCIES):
            wrong.append(row)
    assert wrong == []


TEMPLATES = (
    "resnet11-t8",
    "resnet3.3.3.3-t4",
    "resnet2.2-t12-basic",
    "resnet11-t8-preact",
    "resnet2.2.2-t6-shortcut_c-in1",
)


@pytest.mark.parametrize(
    "nets_each", [1, pytest.param(2_000, marks=pytest.mark.full)], ids=["few", "10,000"]
)
def test_macs_of_random_nets_are_fvcore(nets_each: int) -> None:
    """The macs of random nets of five templates, counted many at once, equal fvcore's
    convolutions and linear layers, to the unit."""
    wrong = []
    for seed, name in enumerate(TEMPLATES):
        template = parse_spec(name)
        c, d, n = _random_nets(
            nets_each, num_stages=template.num_stages, seed=seed, largest=(6, 9, 3)
        )
        many = costs_of(template, 33, cardinalities=c, widths=d, depths=n)
        for row, macs in enumerate(many["macs"].tolist()):
            spec = _with(template, c[row], d[row], n[row])
            if measure_fvcore(spec, image_size=33).conv_linear != macs:
                wrong.append(spec.name)
    assert wrong == []


def test_order_of_currencies_is_the_callers() -> None:
    """Only the currencies asked for come back, in that order."""
    found = costs_of(
        parse_spec("resnet50"),
        224,
        cardinalities=[[1, 1, 1, 1]],
        widths=[[64, 128, 256, 512]],
        depths=[[3, 4, 6, 3]],
        currencies=("params", "macs"),
    )
    assert {key: value.tolist() for key, value in found.items()} == {
        "params": [25_557_032],
        "macs": [4_089_184_256],
    }
    assert list(found) == ["params", "macs"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("cardinality", [0], "cardinality must be whole numbers of at least 1, got"),
        ("width", [-3], "width must be whole numbers of at least 1"),
        ("depth", [1.5], "depth must be whole numbers of at least 1"),
        ("width", [2**40], "macs of stage 1 pass 2\\*\\*62 at cardinality 1, width 10"),
        ("depth", [2**63], "depth must not pass 2\\*\\*62"),
        ("width", [2**70], "width must be whole numbers"),
    ],
)
def test_bad_numbers(field: str, value: list[float], message: str) -> None:
    """Numbers below 1, fractions and costs beyond int64 are refused."""
    costs = net_costs(parse_spec("resnet50"), 224)
    numbers = {"cardinality": [1], "width": [1], "depth": [1], field: value}
    with pytest.raises(InputError, match=message):
        stage_costs(costs, 0, currencies=CURRENCIES, **numbers)


def test_a_whole_net_beyond_int64_is_refused() -> None:
    """Stages that each fit but overflow in sum are refused, never wrapped."""
    template = parse_spec("resnext2.2-4x8d")
    costs = net_costs(template, 32)
    depths = []
    for stage in (0, 1):
        one, two = (
            stage_costs(
                costs,
                stage,
                currencies=("macs",),
                cardinality=1,
                width=2**20,
                depth=depth,
            ).item()
            for depth in (1, 2)
        )
        depths.append(int(0.6 * 2**62) // (two - one))
    numbers = {"cardinalities": [[1, 1]], "widths": [[2**20] * 2]}
    with pytest.raises(InputError, match=r"a net's cost passes 2\*\*62"):
        costs_of(template, 32, depths=[depths], **numbers)
    half = [depths[0], 1]
    exact = complexity(
        _with(template, *map(np.array, ([1, 1], [2**20] * 2, [9, 1]))), 32
    )
    assert costs_of(template, 32, depths=[[9, 1]], **numbers)["macs"] == exact.macs
    assert costs_of(template, 32, depths=[half], **numbers)["macs"] > 0.5 * 2**62


def test_broadcasting() -> None:
    """A single number stands for all nets, as in numpy."""
    costs = net_costs(parse_spec("resnext29-8x64d"), 32)
    table = stage_costs(
        costs, 1, currencies=("macs",), cardinality=4, width=[3, 5, 9], depth=2
    )
    alone = [
        stage_costs(
            costs, 1, currencies=("macs",), cardinality=4, width=width, depth=2
        ).item()
        for width in (3, 5, 9)
    ]
    assert table.tolist() == [alone]


def test_node_grid_is_not_special() -> None:
    """Polynomials found at C, d = 1, 2, 3 hold far from there as well."""
    template = parse_spec("resnext2.3-4x8d-imagenet")
    for cardinality, width in product((1, 17, 1024), (1, 50, 4096)):
        spec = template.with_setting(cardinality, width, width)
        many = costs_of(
            template,
            64,
            cardinalities=[spec.cardinalities],
            widths=[spec.bottleneck_widths],
            depths=[spec.stage_depths],
        )
        assert many["params"].item() == complexity(spec, 64).params


def test_from_scratch_is_not_counted_at_once() -> None:
    """A stage whose cost depends on its neighbour is refused, not miscounted."""
    with pytest.raises(InputError, match="depends on the stages beside it"):
        net_costs(parse_spec("from_scratch-32x4d"), 224)
