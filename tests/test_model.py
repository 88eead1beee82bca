"""The built net against torchvision, its initialisation and its weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from strategies import small_specs
from torch import Tensor, nn

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec
from resnext_ablate.compute.blocks import ResidualBlock
from resnext_ablate.compute.model import (
    ResNeXt,
    build,
    load_weights,
    measure_fvcore,
)

TORCHVISION_NAMES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
SMALL = "resnext11-4x3d-t8"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two threads that wait for a busy core cost six times the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(spec: ResNeXtSpec, *, num: int = 2, side: int = 64) -> Tensor:
    return torch.randn(num, spec.in_channels, side, side, generator=_generator(9))


def _torchvision(name: str) -> nn.Module:
    """torchvision's net with empty weights: no time spent on its initialisation."""
    import torchvision.models

    make: Callable[[], nn.Module] = getattr(torchvision.models, name)
    with torch.device("meta"):
        net = make()
    return net.to_empty(device="cpu")


def _scramble_norms(model: nn.Module) -> None:
    """Gives every batch norm its own numbers, so that no two can be exchanged."""
    generator = _generator(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.2, 0.6, generator=generator)
            nn.init.uniform_(module.bias, -0.1, 0.1, generator=generator)
            nn.init.uniform_(module.running_mean, -0.1, 0.1, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 1.5, generator=generator)


def _outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in train mode, then in eval mode with the statistics just updated."""
    with torch.no_grad():
        return model.train()(images), model.eval()(images)


@pytest.mark.parametrize("name", TORCHVISION_NAMES)
def test_torchvision_parity(name: str) -> None:
    """Weights go to torchvision and back; outputs agree in train and eval mode."""
    ours, theirs = build(name, generator=_generator()), _torchvision(name)
    _scramble_norms(ours)
    images = _images(ours.spec)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    expected = _outputs(theirs, images)
    for ours_out, theirs_out in zip(_outputs(ours, images), expected, strict=True):
        assert torch.isfinite(theirs_out).all()
        torch.testing.assert_close(ours_out, theirs_out)

    back = build(name, generator=_generator(1))
    load_weights(back, theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(back.eval()(images), theirs(images))


@settings(deadline=None, max_examples=40)
@given(spec=small_specs())
def test_state_dict_follows_the_layout(spec: ResNeXtSpec) -> None:
    """Weights stand where the layout says, in its shapes, and nowhere else."""
    layout = spec.layout(spec.total_stride)
    expected: dict[str, tuple[int, ...]] = {
        "fc.weight": (spec.num_classes, layout.head.in_features),
        "fc.bias": (spec.num_classes,),
    }
    for conv in layout.convs:
        kernel = (conv.kernel_size, conv.kernel_size)
        ins, outs = conv.in_channels // conv.groups, conv.out_channels
        for path in conv.paths:
            expected[f"{path}.weight"] = (outs, ins, *kernel)
            if conv.has_bias:
                expected[f"{path}.bias"] = (outs,)
    for norm in layout.norms:
        for path in norm.paths:
            for part in ("weight", "bias", "running_mean", "running_var"):
                expected[f"{path}.{part}"] = (norm.channels,)
            expected[f"{path}.num_batches_tracked"] = ()
    state_dict = build(spec, generator=_generator()).state_dict()
    assert expected == {key: tuple(value.shape) for key, value in state_dict.items()}


@settings(deadline=None, max_examples=30)
@given(spec=small_specs())
def test_any_net_trains_one_step(spec: ResNeXtSpec) -> None:
    """Every kind of net gives finite logits and a gradient for every parameter."""
    model = build(spec, generator=_generator())
    logits = model(_images(spec, num=4, side=2 * spec.total_stride))
    assert (4, spec.num_classes) == tuple(logits.shape)
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_equal_seeds_equal_weights() -> None:
    """Equal seeds give equal weights; another seed changes every drawn tensor."""
    one, same, other = (
        build(SMALL, generator=_generator(seed)).state_dict() for seed in (1, 1, 2)
    )
    for name, value in one.items():
        assert torch.equal(value, same[name]), name
        drawn = "conv" in name or name.endswith("downsample.0.weight")
        drawn = drawn or name == "fc.weight"
        assert drawn != torch.equal(value, other[name]), name


def test_global_generator_is_untouched() -> None:
    """With a generator given, building and measuring draw from no global one."""
    before = torch.random.get_rng_state()
    build(SMALL, generator=_generator())
    measure_fvcore(parse_spec(SMALL), image_size=32)
    assert torch.equal(before, torch.random.get_rng_state())


def test_global_generator_by_default() -> None:
    """Without a generator, torch's global seed decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        first = build(SMALL).conv1.weight
        torch.manual_seed(4)
        assert torch.equal(first, build(SMALL).conv1.weight)
        assert not torch.equal(first, build(SMALL).conv1.weight)


def test_initial_distributions() -> None:
    """Convolutions start He normal by fan-out, norms at 1 and 0, the head uniform."""
    model = build("resnext29-8x16d", generator=_generator())
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            std = module.weight.std().item()
            assert std == pytest.approx((2 / fan_out) ** 0.5, rel=0.06), name
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
            assert module.running_mean is not None
            assert (module.running_mean == 0).all(), name
            assert module.running_var is not None
            assert (module.running_var == 1).all(), name
            assert module.num_batches_tracked == 0, name
    bound = 1024**-0.5
    assert model.fc.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert model.fc.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert (model.fc.bias == 0).all()


def test_shortcut_adds_its_input() -> None:
    """With silent branches a block passes its input; without shortcuts, nothing."""
    for name, expected in ((SMALL, 1.5), (f"{SMALL}-noshortcut", 0.0)):
        model = build(name.replace("11", "20"), generator=_generator())
        block = model.get_submodule("layer1.1")
        assert isinstance(block, ResidualBlock)
        nn.init.zeros_(block.bn3.weight)
        features = torch.full((2, 32, 4, 4), 1.5)
        assert (block(features) == expected).all()
        assert (features == 1.5).all()


def test_channels_last_agrees() -> None:
    """Channels-last weights and images give the same logits."""
    model = build(SMALL, generator=_generator())
    images = _images(model.spec, side=32)
    expected = model.eval()(images)
    model.to(memory_format=torch.channels_last)
    actual = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected)


def test_compiles_as_one_graph() -> None:
    """torch.compile takes the whole net without a break, shortcuts or not."""
    for name in (SMALL, f"{SMALL}-imagenet-noshortcut"):
        model = build(name, generator=_generator()).eval()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        images = _images(model.spec, side=32)
        torch.testing.assert_close(compiled(images), model(images))


def test_unbuildable_name() -> None:
    """A name that does not parse is the user's error."""
    with pytest.raises(InputError, match="names no net"):
        build("resnet-fifty")


def _model_and_weights() -> tuple[ResNeXt, dict[str, object]]:
    model = build(SMALL, generator=_generator())
    return model, dict(build(SMALL, generator=_generator(1)).state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv1.weight": None}, r"1 missing: conv1.weight\.$"),
        ({"head.bias": torch.zeros(3)}, r"1 unexpected: head.bias\.$"),
        (
            {"fc.bias": torch.zeros(3)},
            r"1 misshapen: fc.bias \(3,\), must be \(10,\)\.$",
        ),
        ({"fc.bias": [0.0] * 10}, r"1 misshapen: fc.bias \(a list, must be a tensor"),
        (
            {"conv1.weight": None, "bn1.weight": None, "x": torch.zeros(1)},
            "of resnext11-4x3d-t8, .* 2 missing: bn1.weight, conv1.weight; 1 unexp",
        ),
    ],
)
def test_weights_that_do_not_fit(change: dict[str, object], message: str) -> None:
    """Weights of another net are refused by name, and nothing is copied."""
    model, weights = _model_and_weights()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights.update(change)
    given = {name: value for name, value in weights.items() if value is not None}
    with pytest.raises(InputError, match=message):
        load_weights(model, given)
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value), name


def test_many_missing_weights_are_counted() -> None:
    """A long list of names is counted and cut."""
    model, _ = _model_and_weights()
    with pytest.raises(InputError, match=r"67 missing: bn1.bias, .*, \.\.\.\.$"):
        load_weights(model, {})


def test_old_weights_load() -> None:
    """State dicts from before `num_batches_tracked` load as well."""
    model, weights = _model_and_weights()
    old = {n: v for n, v in weights.items() if not n.endswith("num_batches_tracked")}
    load_weights(model, old)
    for name, value in model.state_dict().items():
        expected = weights[name]
        assert isinstance(expected, Tensor)
        assert torch.equal(expected, value), name


def test_fvcore_is_silent(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Measuring logs, prints and warns nothing (warnings are errors here)."""
    with caplog.at_level(logging.DEBUG):
        count = measure_fvcore(parse_spec(SMALL), image_size=32)
    assert 0 < count.conv_linear < count.total
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")
