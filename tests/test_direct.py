"""Convolutions by compiled loops: the same as torch's, up to rounding."""

import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.shapes import Conv
from resnext_ablate.compute import direct, layers, tuning
from resnext_ablate.compute.dots import HAS_DOTS
from resnext_ablate.compute.hardware import Precision
from resnext_ablate.compute.layers import Conv2d, conv_key, has_direct
from resnext_ablate.compute.model import build, for_evaluation

CPU = torch.device("cpu")
HALF_BIT = 2.0**-8
"""Of a bfloat16, relative to it."""

needs_dots = pytest.mark.skipif(
    not HAS_DOTS, reason="this CPU does not multiply pairs of bfloat16"
)
each_precision = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.bfloat16, id="bf16", marks=needs_dots),
    ],
)


def _values(*size: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator).to(dtype)


def _exact(
    features: Tensor, weight: Tensor, grad: Tensor, *, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of the same values in float64."""
    features, weight = (t.double().requires_grad_() for t in (features, weight))
    groups, padding = features.shape[1] // weight.shape[1], weight.shape[2] // 2
    out = F.conv2d(features, weight, None, stride, padding, 1, groups)
    grads = torch.autograd.grad(out, [features, weight], grad.double())
    return out.detach(), *grads


def _check(
    size: tuple[int, int, int, int],
    *,
    width: int,
    stride: int,
    dtype: torch.dtype,
    given: int | None = None,
) -> None:
    """Outputs and both gradients of a random convolution, each value.

    It is 3 x 3 in groups of a width, or of single pixels where it puts out channels
    `given`.
    """
    features = _values(*size, seed=0, dtype=dtype).requires_grad_()
    kernel = (size[1], width, 3, 3) if given is None else (given, size[1], 1, 1)
    weight = _values(*kernel, seed=1).float().requires_grad_()
    out = direct.convolve(features, weight, stride=stride)
    grad = _values(*out.shape, seed=2, dtype=dtype)
    out.backward(grad)  # type: ignore[no-untyped-call]
    ours = (out.detach(), features.grad, weight.grad)
    exact = _exact(features.detach(), weight.detach(), grad, stride=stride)
    names = ("output", "features", "weight")
    for name, value, expected in zip(names, ours, exact, strict=True):
        assert value is not None and value.shape == expected.shape
        # From sums of up to 432 products in float32, of which bfloat16 rounds the first
        # two once.
        is_rounded = dtype == torch.bfloat16 and name != "weight"
        rounding = HALF_BIT if is_rounded else 0
        scale = expected.abs().max().item()
        off = (value.double() - expected).abs() - 1.01 * rounding * expected.abs()
        assert off.max() <= 2e-6 * scale, (name, off.max().item(), scale)


@each_precision
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", [*range(1, 18), 20, 24, 31, 40])
def test_every_width_is_the_same_convolution(
    width: int, stride: int, dtype: torch.dtype
) -> None:
    """Groups that end where vectors do and not, rows of 8, 4 and fewer pixels."""
    for groups in (-(-16 // width), -(-33 // width), -(-100 // width)):
        channels = groups * width
        for side in ((3, channels, 11, 9), (2, channels, 4, 5), (1, channels, 3, 1)):
            _check(side, width=width, stride=stride, dtype=dtype)


@each_precision
@given(
    count=st.integers(1, 5),
    groups=st.integers(1, 24),
    width=st.integers(1, 48),
    height=st.integers(1, 20),
    columns=st.integers(1, 20),
    stride=st.sampled_from([1, 2]),
)
@settings(max_examples=60, deadline=None)
def test_every_size_is_the_same_convolution(
    count: int,
    groups: int,
    width: int,
    height: int,
    columns: int,
    stride: int,
    dtype: torch.dtype,
) -> None:
    """Odd batches, odd sides, images of one pixel."""
    channels = max(groups, -(-16 // width)) * width
    size = (count, channels, height, columns)
    _check(size, width=width, stride=stride, dtype=dtype)


@needs_dots
@given(
    count=st.integers(1, 5),
    taken=st.integers(16, 70),
    given=st.integers(16, 70),
    height=st.integers(1, 20),
    columns=st.integers(1, 20),
)
@settings(max_examples=100, deadline=None)
def test_every_product_is_the_same_convolution(
    count: int, taken: int, given: int, height: int, columns: int
) -> None:
    """Channels that fill vectors and not, odd ones, pixels that fill no tile, no pair
    and several blocks."""
    size = (count, taken, height, columns)
    _check(size, width=1, stride=1, dtype=torch.bfloat16, given=given)


@needs_dots
@pytest.mark.parametrize(
    ("taken", "given", "side"), [(16, 64, 9), (64, 33, 7), (40, 16, 23), (17, 20, 1)]
)
def test_moments_are_those_of_the_output(taken: int, given: int, side: int) -> None:
    """Also where a channel lies far from zero: a large mean costs no digits."""
    features = _values(3, taken, side, side, seed=0)
    features = features.contiguous(memory_format=torch.channels_last)
    features[:, 0] = 16.0
    weight = _values(given, taken, 1, 1, seed=1)
    weight[5, 0] = 40.0
    _, moments = direct.forward(features, weight, stride=1)
    assert moments is not None
    exact = F.conv2d(features.double(), weight.double()).transpose(0, 1).flatten(1)
    variance = exact.var(dim=1, unbiased=False).numpy()
    np.testing.assert_allclose(moments[0], exact.mean(dim=1), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(moments[1], variance, rtol=1e-4)


@needs_dots
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [16, 23, 40, 64])
def test_one_group_is_the_same_convolution(channels: int, stride: int) -> None:
    """torch's output, and gradients of the weight and, at stride 2, of the features."""
    for size in ((3, channels, 9, 10), (2, channels, 4, 5), (1, channels, 1, 3)):
        _check(size, width=channels, stride=stride, dtype=torch.bfloat16)


@each_precision
def test_large_images_go_in_bands(dtype: torch.dtype) -> None:
    """Rows that do not fit the scratch memory together, and those between two bands."""
    _check((2, 64, 41, 70), width=2, stride=1, dtype=dtype)
    _check((1, 96, 67, 64), width=3, stride=2, dtype=dtype)
    _check((1, 40, 9, 300), width=20, stride=1, dtype=dtype)


def _reads_nothing_beside(
    weight: Tensor, *, taken: int, stride: int, dtype: torch.dtype
) -> bool:
    """Whether all results are numbers where none lies around features and gradient."""

    def framed(values: Tensor) -> Tensor:
        around = 4096
        rows = values.permute(0, 2, 3, 1)
        room = torch.full((rows.numel() + 2 * around,), float("nan"), dtype=dtype)
        inside = room[around:-around].view(rows.shape)
        return inside.copy_(rows).permute(0, 3, 1, 2)

    features = framed(_values(3, taken, 7, 6, seed=0, dtype=dtype))
    out, _ = direct.forward(features, weight, stride=stride)
    grad = framed(_values(*out.shape, seed=2, dtype=dtype))
    found = (out, *direct.gradients(grad, features, weight, stride=stride))
    return all(bool(values.isfinite().all()) for values in found)


@each_precision
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("channels", "width"), [(40, 5), (20, 10), (18, 9), (18, 3)])
def test_nothing_but_the_image_is_read(
    channels: int, width: int, stride: int, dtype: torch.dtype
) -> None:
    """What lies before and behind the tensors in memory is not a number."""
    weight = _values(channels, width, 3, 3, seed=1, dtype=dtype)
    assert _reads_nothing_beside(weight, taken=channels, stride=stride, dtype=dtype)


@needs_dots
@pytest.mark.parametrize(("taken", "given"), [(16, 16), (35, 21), (17, 40)])
def test_nothing_but_the_pixels_is_read(taken: int, given: int) -> None:
    """As above, by products."""
    dtype = torch.bfloat16
    weight = _values(given, taken, 1, 1, seed=1, dtype=dtype)
    assert _reads_nothing_beside(weight, taken=taken, stride=1, dtype=dtype)


_GUARDED = """
import ctypes, math, mmap, sys, torch
from resnext_ablate.compute import bf16_groups, bf16_products, direct, fp32_groups

def room(*size):
    # Between two pages that nobody may touch, behind the first or before the last.
    page, dtype = mmap.PAGESIZE, getattr(torch, sys.argv[1])
    length = math.prod(size) * dtype.itemsize
    pages = mmap.mmap(-1, -(-length // page) * page + 2 * page)
    kept.append(pages)
    last = len(pages) - page
    first = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for begin in (0, last):
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(first + begin), page, 0):
            sys.exit("no guard")
    begin = last - length if sys.argv[2] == "end" else page
    values = torch.frombuffer(pages, dtype=dtype, count=math.prod(size), offset=begin)
    return values.view(size).permute(0, 3, 1, 2)

def empty(like, height, width, *, channels=None):
    return room(len(like), height, width, channels or like.shape[1])

def drawn(count, channels, height, width):
    return room(count, height, width, channels).normal_()

bf16_groups.empty = bf16_products.empty = fp32_groups.empty = empty
kept = []
for channels, width in ((20, 10), (18, 9), (18, 3), (40, 5), (40, 20), (33, 11)):
    for stride in (1, 2):
        features = drawn(3, channels, 7, 6)
        weight = torch.randn(channels, width, 3, 3).to(features.dtype)
        out, _ = direct.forward(features, weight, stride=stride)
        direct.gradients(drawn(*out.shape), features, weight, stride=stride)
has_products = sys.argv[1] == "bfloat16"
for taken, given in ((16, 16), (17, 40), (40, 17), (33, 65)) * has_products:
    features = drawn(3, taken, 5, 7)
    weight = drawn(given, taken, 1, 1)
    out, _ = direct.forward(features, weight, stride=1)
    direct.gradients(drawn(*out.shape), features, weight, stride=1)
print("done", len(kept), flush=True)
"""


@each_precision
@pytest.mark.parametrize("at", ["begin", "end"])
def test_no_memory_beside_the_tensors_is_touched(at: str, dtype: torch.dtype) -> None:
    """The last pixel of few channels fills no vector: to read or write one would be a
    fault, as it would be before the first."""
    name = str(dtype).removeprefix("torch.")
    code = [sys.executable, "-c", _GUARDED, name, at]
    end = subprocess.run(code, capture_output=True, text=True, check=False)
    num_products = 4 if dtype == torch.bfloat16 else 0
    expected = f"done {6 * 2 * 4 + num_products * 5}\n"
    assert end.stdout == expected, (end.returncode, end.stderr[-500:])


@each_precision
@pytest.mark.parametrize("width", [3, 5, 8, 11, 20])
def test_what_is_no_number_stays_in_its_group(width: int, dtype: torch.dtype) -> None:
    """Seeds trained as one net are groups beside each other: one may diverge."""
    channels = 8 * width
    size, third, seventh = (2, channels, 6, 6), 2 * width, 6 * width
    features = _values(*size, seed=0, dtype=dtype)
    weight = _values(channels, width, 3, 3, seed=1).float().requires_grad_()
    features[0, third + 2, 3, 3] = float("nan")
    features.requires_grad_()
    out = direct.convolve(features, weight, stride=1)
    grad = _values(*out.shape, seed=2, dtype=dtype)
    grad[1, seventh + 1, 2, 2] = float("inf")
    out.backward(grad)  # type: ignore[no-untyped-call]

    def channels_of(values: Tensor | None) -> set[int]:
        assert values is not None
        return set(values.detach().isfinite().logical_not().nonzero()[:, 1].tolist())

    assert channels_of(out) == set(range(third, third + width))
    assert not out[1].isnan().any() and not out[0, :, 0, 0].isnan().any()
    assert channels_of(features.grad) == set(range(seventh, seventh + width))
    assert weight.grad is not None
    bad = set(weight.grad.isfinite().logical_not().nonzero()[:, 0].tolist())
    assert bad == {*range(third, third + width), seventh + 1}


# As a form of a layer.


def _layer(*, bias: bool, form: str) -> Conv2d:
    torch.manual_seed(0)
    conv = Conv2d(32, 32, 3, stride=2, padding=1, groups=16, bias=bias)
    conv.form = form
    return conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


@needs_dots
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_computed_directly_in_bfloat16(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast, whatever the precision of the features; gradients are float32."""
    calls = []
    convolve = direct.convolve

    def spied(*args: Tensor, **options: int) -> Tensor:
        calls.append(args[0].dtype)
        return convolve(*args, **options)

    monkeypatch.setattr(direct, "convolve", spied)
    results = []
    for form in ("plain", "direct"):
        conv = _layer(bias=bias, form=form)
        features = _values(2, 32, 9, 9, seed=3).float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = conv(features)
        assert out.dtype == torch.bfloat16
        grads = torch.autograd.grad(
            out.float().square().sum(), [features, *conv.parameters()]
        )
        assert all(grad.dtype == torch.float32 for grad in grads)
        results.append((out.float(), *grads))
    assert calls == [torch.bfloat16]
    for ours, theirs in zip(*results, strict=True):
        # Of bfloat16 gradients both; torch rounds the weight's once more.
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01 * scale)


@needs_dots
@pytest.mark.parametrize(("channels", "groups"), [(44, 4), (40, 8)])
def test_evaluation_adds_the_bias_before_it_rounds(channels: int, groups: int) -> None:
    """A folded norm's: once rounded, where training rounds the sum and adds to it."""
    torch.manual_seed(0)
    conv = Conv2d(channels, channels, 3, padding=1, groups=groups)
    conv.form = "direct"
    features = _values(2, channels, 9, 9, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = conv(features)
        with torch.inference_mode():
            evaluated = conv(features)
    assert conv.bias is not None
    weight = conv.weight.detach().bfloat16().double()
    bias = conv.bias.detach().double()
    exact = F.conv2d(features.double(), weight, bias, padding=1, groups=groups)
    off = (evaluated.double() - exact).abs()
    assert (off <= 1.01 * HALF_BIT * exact.abs() + 1e-6).all()
    torch.testing.assert_close(trained, evaluated, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("channels", "groups"), [(32, 16), (44, 4), (40, 8)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_computed_directly_in_float32(
    channels: int, groups: int, bias: bool
) -> None:
    """Outputs and gradients are torch's up to rounding, whether or not it trains."""
    torch.manual_seed(0)
    conv = Conv2d(channels, channels, 3, padding=1, groups=groups, bias=bias)
    features = _values(2, channels, 9, 9, seed=3, dtype=torch.float32).requires_grad_()
    results = []
    for form in ("plain", "direct"):
        conv.form = form
        out = conv(features)
        grads = torch.autograd.grad(out.square().sum(), [features, *conv.parameters()])
        with torch.inference_mode():
            results.append((out, conv(features), *grads))
    for ours, theirs in zip(*results, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * scale)
    assert any(not torch.equal(*both) for both in zip(*results, strict=True))


def test_a_layer_is_torchs_own_where_the_loops_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float64, and in bfloat16 on a CPU without the instruction; to the bit."""
    features = _values(2, 32, 5, 5, seed=3)
    plain, other = (_layer(bias=True, form=form) for form in ("plain", "direct"))
    exact = [conv.double()(features.double()) for conv in (other, plain)]
    assert torch.equal(*exact)
    plain.float(), other.float()
    monkeypatch.setattr(direct, "HAS_DOTS", False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(other(features), plain(features))


def _stepped(name: str, *, form: str, precision: str) -> tuple[Tensor, Tensor]:
    """Gradients of one step of a net with fused kernels, and its folded logits.

    In float64 torch's own kernels take both.
    """
    spec = parse_spec(name)
    model = build(spec, generator=torch.Generator().manual_seed(0))
    model = model.to(memory_format=torch.channels_last)
    layout = spec.layout(16)
    forms = {conv_key(conv): form for conv in layout.convs if has_direct(conv)}
    assert forms
    is_exact = precision == "fp64"
    layers.settle(model, layout, kernels="torch" if is_exact else "fused", forms=forms)
    images = _values(32, spec.in_channels, 16, 16, seed=4).float()
    if is_exact:
        model, images = model.double(), images.double()
    images = images.contiguous(memory_format=torch.channels_last)
    is_bf16 = precision == "bf16"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
        logits = model(images)
    labels = torch.arange(32) % spec.num_classes
    F.cross_entropy(logits.to(images), labels).backward()  # type: ignore[no-untyped-call]
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    flat = torch.cat(grads)
    model.zero_grad()
    evaluated = for_evaluation(model)
    with (
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16),
    ):
        return flat, evaluated(images).to(images)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_dots)])
@pytest.mark.parametrize(
    "name",
    [
        "resnext11-16x2d-t32",
        "resnext20-32x1d-t32",
        "resnext11-32x1.4.8d-t32",
        "resnext11-3x9.14.20d-t32",
    ],
)
def test_a_step_and_an_evaluation_are_as_exact_as_with_torchs_groups(
    name: str, precision: Precision
) -> None:
    """Beside float64, gradients of all weights and logits are as near as torch's own,
    which round in other places."""
    exact = _stepped(name, form="plain", precision="fp64")
    off = {
        form: [
            ((ours - theirs).norm() / theirs.norm()).item()
            for ours, theirs in zip(
                _stepped(name, form=form, precision=precision), exact, strict=True
            )
        ]
        for form in ("plain", "direct")
    }
    assert off["direct"] != off["plain"]
    for ours, theirs in zip(off["direct"], off["plain"], strict=True):
        assert ours < 1.25 * theirs, off


# Among the other forms.


def _convs(name: str) -> tuple[Conv, ...]:
    return parse_spec(name).layout(16).convs


def test_it_is_timed_where_it_can_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, in bfloat16 where it has the instruction: 3 x 3, with channels enough
    for a vector; in float32 in groups alone."""
    for name, expected in (
        ("resnext11-32x1d-t32", True),
        ("resnext11-4x8d-t32", True),
        ("resnext11-2x10d-t16", True),
        ("resnext11-2x17d-t32", True),
        ("resnext11-2x7d-t16", False),
        ("resnext11-4x2d-t16", False),  # Too few channels, in the first stage.
        ("resnet11-t32", True),
        ("resnet11-t8", False),
    ):
        conv = next(c for c in _convs(name) if c.kernel_size == 3 and c.in_channels > 3)
        assert has_direct(conv) == expected, name
        for precision in get_args(Precision):
            for has_dots in (True, False):
                monkeypatch.setattr(direct, "HAS_DOTS", has_dots)
                timed = tuning.candidate_forms(conv, precision=precision, device=CPU)
                can_be = conv.groups > 1 if precision == "fp32" else has_dots
                assert ("direct" in timed) == (expected and can_be), name
        on_gpu = torch.device("cuda")
        timed = tuning.candidate_forms(conv, precision="bf16", device=on_gpu)
        assert "direct" not in timed
        forms = {conv_key(conv): "direct"}
        spec = parse_spec(name)
        if expected:
            layers.settle(build(spec), spec.layout(16), kernels="torch", forms=forms)
        else:
            with pytest.raises(layers.InputError, match="a 3x3 one, of 16"):
                layers.settle(
                    build(spec), spec.layout(16), kernels="torch", forms=forms
                )


def test_a_form_that_the_cache_does_not_know_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Times kept by an earlier version are completed; those of today stand."""
    monkeypatch.setenv("RESNEXT_ABLATE_CACHE", str(tmp_path_factory.mktemp("cache")))
    candidates = tuning.candidate_forms
    timed: list[str] = []
    times = {"plain": 1.0, "direct": 0.5}

    def fake(conv: Conv, **about: object) -> dict[str, float]:
        timed.append(conv_key(conv))
        forms = tuning.candidate_forms(conv, **about)  # type: ignore[arg-type]
        return {form: times.get(form, 2.0) for form in forms}

    def earlier(conv: Conv, **about: object) -> tuple[str, ...]:
        known = candidates(conv, **about)  # type: ignore[arg-type]
        return tuple(form for form in known if form != "direct")

    monkeypatch.setattr(
        tuning,
        "_times_ms",
        lambda conv, *, batch_size, **about: fake(conv, **about),
    )
    convs = _convs("resnext11-32x1d-t32")
    direct_ones = {
        conv_key(conv) for conv in convs if has_direct(conv) and conv.groups > 1
    }

    def fastest() -> dict[str, str]:
        return tuning.fastest_forms(convs, batch_size=4, precision="fp32", device=CPU)

    monkeypatch.setattr(tuning, "candidate_forms", earlier)
    assert "direct" not in fastest().values()
    timed.clear()
    monkeypatch.setattr(tuning, "candidate_forms", candidates)
    found = fastest()
    assert set(timed) == direct_ones
    assert {key for key, form in found.items() if form == "direct"} == direct_ones
    timed.clear()
    assert fastest() == found and not timed
