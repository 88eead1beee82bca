"""Block forms, shortcuts, pre-activation, basic blocks and the from-scratch net."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from strategies import any_specs, small_specs
from torch import Tensor, nn
from torch.nn import functional

from resnext_ablate.architecture.complexity import complexity
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.shapes import BlockForm
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec, spec_from_dict
from resnext_ablate.compute.blocks import ResidualBlock
from resnext_ablate.compute.model import (
    ResNeXt,
    build,
    convert_form,
    load_weights,
    measure_fvcore,
)

FORMS: tuple[BlockForm, ...] = get_args(BlockForm)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(num: int, channels: int, side: int) -> Tensor:
    return torch.randn(num, channels, side, side, generator=_generator(9))


def _scrambled(model: nn.Module) -> None:
    """Gives every batch norm and bias its own numbers: no two can be exchanged."""
    generator = _generator(3)
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1:
            low = 0.3 if name.endswith(("weight", "var")) else -0.1
            nn.init.uniform_(tensor, low, low + 0.4, generator=generator)


def _both_modes(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model.train()(images), model.eval()(images)


# Block forms


@pytest.mark.parametrize(
    "name",
    [
        "resnext20-32x2d-t16",
        "resnext11-1x3d-t8",
        "resnext2.2-4.3x3.5d-t8-imagenet",
        "resnext20-4x3d-t8-preact",
        "resnext2.2-3x4d-t8-basic",
        "resnext2.2-3x4d-t8-basic-preact",
        "resnext20-4x3d-t8-shortcut_a",
        "resnext20-4x3d-t8-shortcut_c-preact",
        "resnext20-4x3d-t8-noshortcut",
    ],
)
def test_forms_are_one_function(name: str) -> None:
    """Forms a, b and c give equal outputs and statistics, in train and eval mode."""
    grouped = build(name, generator=_generator())
    _scrambled(grouped)
    images = _images(4, 3, 32)
    nets = {form: convert_form(grouped, form=form) for form in FORMS}
    expected = _both_modes(grouped, images)
    for form, net in nets.items():
        assert net.spec.block_form == form
        for ours, theirs in zip(_both_modes(net, images), expected, strict=True):
            assert (ours - theirs).abs().max() < 1e-5
        back = convert_form(net, form="c").state_dict()
        for key, value in grouped.state_dict().items():
            torch.testing.assert_close(back[key], value, atol=1e-5, rtol=1e-5)


def test_forms_agree_at_depth_in_double_precision() -> None:
    """Over 50 layers nothing but rounding tells the forms apart."""
    grouped = build("resnext50-32x4d-c10", generator=_generator()).double()
    images = _images(2, 3, 64).double()
    summed = convert_form(grouped, form="a")
    pairs = zip(_both_modes(grouped, images), _both_modes(summed, images), strict=True)
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() < 1e-11


@settings(deadline=None, max_examples=40)
@given(spec=small_specs())
def test_conversion_loses_nothing(spec: ResNeXtSpec) -> None:
    """Through the other forms and back every tensor is the same, and its own copy."""
    start = build(replace(spec, family="paper"), generator=_generator())
    net = start
    for form in (*FORMS, start.spec.block_form):
        net = convert_form(net, form=form)
    assert net.spec == start.spec
    for key, value in start.state_dict().items():
        assert torch.equal(value, net.state_dict()[key]), key
        assert value.data_ptr() != net.state_dict()[key].data_ptr(), key


def test_equal_seeds_are_equal_functions_in_every_form() -> None:
    """A study of block forms starts each seed from one and the same function."""
    images = _images(2, 3, 32)
    outputs = [
        build(f"resnext11-4x3d-t8{suffix}", generator=_generator(5))(images)
        for suffix in ("", "-form_a", "-form_b")
    ]
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0])


def test_conversion_keeps_the_mode() -> None:
    """A net in eval mode is converted into one in eval mode."""
    model = build("resnext11-2x2d-t8", generator=_generator())
    assert convert_form(model, form="a").training
    assert not convert_form(model.eval(), form="a").training


@given(spec=any_specs())
def test_forms_have_one_complexity(spec: ResNeXtSpec) -> None:
    """Macs and params are equal; only the summed branches put out more."""
    size = spec.total_stride
    a, b, c = (
        complexity(replace(spec, family="paper", block_form=form), size)
        for form in FORMS
    )
    assert b == c
    assert replace(a, activations=c.activations) == c
    assert (a.activations > c.activations) == (max(spec.cardinalities) > 1)


# Shortcuts


def test_option_a_adds_zero_channels() -> None:
    """The identity keeps every second pixel, and the new channels stay zero."""
    net = build("resnext1.1-2x3d-t8-shortcut_a", generator=_generator())
    block = net.get_submodule("layer2.0")
    assert isinstance(block, ResidualBlock)
    nn.init.zeros_(block.get_submodule("bn3").weight)  # type: ignore[arg-type]
    features = _images(2, 32, 5).abs()
    out = block(features)
    assert torch.equal(out[:, :32], features[:, :, ::2, ::2])
    assert out.shape == (2, 64, 3, 3)
    assert (out[:, 32:] == 0).all()


@pytest.mark.parametrize(
    ("name", "params", "macs", "num_projections"),
    [
        ("resnet50-shortcut_a", 22780456, 3729522688, 0),
        ("resnet50", 25557032, 4089184256, 4),
        ("resnet50-shortcut_c", 40128552, 6555435008, 16),
    ],
)
def test_shortcut_options_of_resnet_50(
    name: str, params: int, macs: int, num_projections: int
) -> None:
    """A costs what no shortcut costs; C has a projection in each of 16 blocks."""
    spec = parse_spec(name)
    cost = complexity(spec, 224)
    assert (cost.params, cost.macs) == (params, macs)
    blocks = spec.layout(224).blocks
    assert sum(bool(block.projection) for block in blocks) == num_projections


def test_earlier_word_for_the_projection() -> None:
    """Files that call option B by its earlier word still open."""
    spec = parse_spec("resnext11-4x3d")
    assert spec == spec_from_dict({**spec.to_dict(), "shortcut": "projection"})


# Pre-activation


def _norm_relu(state: dict[str, Tensor], name: str, features: Tensor) -> Tensor:
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    scale, shift = state[f"{name}.weight"], state[f"{name}.bias"]
    return functional.batch_norm(features, mean, var, scale, shift).relu()


def test_preactivation_as_the_paper_writes_it() -> None:
    """Norm and ReLU come first; where a stage opens, the shortcut takes their output.

    The first block of the net stands behind the stem's norm and ReLU and has none.
    """
    net = build("resnext2.1-2x3d-t4-preact", generator=_generator()).eval()
    _scrambled(net)
    state = net.state_dict()
    images = _images(2, 3, 8)

    def conv(name: str, features: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        padding = weight.shape[-1] // 2
        return functional.conv2d(features, weight, None, stride, padding, 1, groups)

    def branch(path: str, activated: Tensor, stride: int) -> Tensor:
        out = conv(f"{path}.conv1", activated)
        out = _norm_relu(state, f"{path}.bn2", out)
        out = conv(f"{path}.conv2", out, stride, groups=2)
        out = _norm_relu(state, f"{path}.bn3", out)
        return conv(f"{path}.conv3", out)

    with torch.no_grad():
        out = _norm_relu(state, "bn1", conv("conv1", images))
        shortcut = conv("layer1.0.downsample.0", out)
        out = branch("layer1.0", out, 1) + shortcut
        out = branch("layer1.1", _norm_relu(state, "layer1.1.bn1", out), 1) + out
        out = _norm_relu(state, "layer2.0.bn1", out)
        shortcut = conv("layer2.0.downsample.0", out, stride=2)
        out = branch("layer2.0", out, 2) + shortcut
        out = _norm_relu(state, "norm", out).mean((2, 3))
        expected = functional.linear(out, state["fc.weight"], state["fc.bias"])
        torch.testing.assert_close(net(images), expected)
    assert "layer1.0.bn1.weight" not in state
    assert "layer1.0.downsample.1.weight" not in state


def test_resnet_200_of_table_4() -> None:
    """The paper's pre-activation ResNet-200: fewer batch norms, the same macs."""
    pre, post = (
        complexity(parse_spec(name), 224) for name in ("resnet200-preact", "resnet200")
    )
    assert (pre.params, post.params) == (64666152, 64673832)
    assert pre.macs == post.macs == 15007481856
    assert pre.params_without_bn == post.params_without_bn


# Basic blocks


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [("resnet18", 11689512, 1814073344), ("resnet34", 21797672, 3663761408)],
)
def test_basic_nets(name: str, params: int, macs: int) -> None:
    """18 and 34 layers mean basic blocks, with torchvision's counts."""
    spec = parse_spec(name)
    assert (spec.block, spec.name) == ("basic", name)
    cost = complexity(spec, 224)
    assert (cost.params, cost.macs) == (params, macs)


def test_grouping_two_layers_is_dense() -> None:
    """32 branches of width 2 in two layers are one dense block of width 64 (Fig. 4)."""
    grouped, dense = parse_spec("resnext18-32x2d-c10"), parse_spec("resnet18-c10")
    assert complexity(grouped, 64) == complexity(dense, 64)
    model = build(dense, generator=_generator())
    branches = build(replace(grouped, block_form="a"), generator=_generator())
    assert branches.get_submodule("layer1.0.branches.31.conv2").weight.shape[1] == 2
    images = _images(1, 3, 64)
    torch.testing.assert_close(branches.eval()(images), model.eval()(images))


# The from-scratch net


class _TutorialBlock(nn.Module):
    """As issue 3 tells of it: biased, twice the inner channels, stride in the 3x3."""

    def __init__(self, ins: int, cardinality: int, width: int, stride: int) -> None:
        super().__init__()
        inner = cardinality * width
        self.conv1, self.bn1 = nn.Conv2d(ins, inner, 1), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=cardinality)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = (
            nn.Conv2d(inner, 2 * inner, 1),
            nn.BatchNorm2d(2 * inner),
        )
        self.identity_downsample: nn.Module | None = None
        if stride != 1 or ins != 2 * inner:
            self.identity_downsample = nn.Sequential(
                nn.Conv2d(ins, 2 * inner, 1, stride), nn.BatchNorm2d(2 * inner)
            )

    def forward(self, features: Tensor) -> Tensor:
        down = self.identity_downsample
        out = self.bn1(self.conv1(features)).relu()
        out = self.bn3(self.conv3(self.bn2(self.conv2(out)).relu()))
        shortcut: Tensor = features if down is None else down(features)
        return (out + shortcut).relu()


class _TutorialNet(nn.Module):
    def __init__(
        self,
        layers: tuple[int, ...],
        cardinality: int,
        bwidth: int,
        img_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(img_channels, 64, 7, 2, 3), nn.BatchNorm2d(64)
        channels = 64
        self.stages = len(layers)
        for stage, depth in enumerate(layers):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                width = bwidth << stage
                blocks.append(_TutorialBlock(channels, cardinality, width, stride))
                channels = 2 * cardinality * width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        out = self.bn1(self.conv1(images)).relu()
        out = functional.max_pool2d(out, 3, 2, 1)
        for stage in range(self.stages):
            out = self.get_submodule(f"layer{stage + 1}")(out)
        logits: Tensor = self.fc(out.mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("name", "params", "fvcore_total"),
    [
        ("from_scratch-32x4d", 25063016, 4259381248),
        ("from_scratch-1x64d", 17780968, 2973048832),
    ],
)
def test_from_scratch_golden(name: str, params: int, fvcore_total: int) -> None:
    """Parameters and fvcore's total are those of the copied net."""
    spec = parse_spec(name)
    cost, measured = complexity(spec, 224), measure_fvcore(spec, image_size=224)
    assert (cost.params, measured.total) == (params, fvcore_total)
    assert cost.macs == measured.conv_linear


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("from_scratch2.1.3.1-4x3d-in1-c7", ((2, 1, 3, 1), 4, 3, 1, 7)),
        ("from_scratch1.2.1-1x32d-c3", ((1, 2, 1), 1, 32, 3, 3)),
    ],
)
def test_from_scratch_loads_its_own_weights(
    name: str, arguments: tuple[tuple[int, ...], int, int, int, int]
) -> None:
    """The tutorial's state dict loads by name, biases too, and outputs agree."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = _TutorialNet(*arguments)
    _scrambled(theirs)
    ours = build(name, generator=_generator())
    load_weights(ours, theirs.state_dict())
    images = _images(2, arguments[3], 64)
    pairs = zip(_both_modes(ours, images), _both_modes(theirs, images), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_from_scratch_names() -> None:
    """The name alone is the tutorial's ResNeXt-50; stages and depths may be given."""
    assert parse_spec("from_scratch").name == "from_scratch-32x4d"
    assert parse_spec("from_scratch50-32x4d").name == "from_scratch-32x4d"
    assert parse_spec("from_scratch101-8x4d").stage_depths == (3, 4, 23, 3)
    assert parse_spec("from_scratch3.4.6-8x4d").stem == "imagenet"


@pytest.mark.parametrize(
    "suffix", ["form_a", "preact", "basic", "shortcut_a", "noshortcut"]
)
def test_from_scratch_has_one_style(suffix: str) -> None:
    """What the copied net does not have is refused by field, rule and value."""
    with pytest.raises(InputError, match=r"in the family from_scratch, .* one copied"):
        parse_spec(f"from_scratch-32x4d-{suffix}")


def test_no_branches_in_from_scratch() -> None:
    """Its biases have no place in summed branches: the conversion is refused."""
    model = build("from_scratch1.-2x2d", generator=_generator())
    with pytest.raises(InputError, match="block_form must be 'c'"):
        convert_form(model, form="a")
    assert isinstance(convert_form(model, form="c"), ResNeXt)
