"""Triton's kernels on a CPU, against torch in float64; `test_triton` runs this file.

Triton's interpreter must be asked for before Triton is imported, hence a process of its
own. It cuts bfloat16 short instead of rounding it, and cannot multiply it.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.compute import fused, residual, triton_conv, triton_norms
from resnext_ablate.compute.layers import BatchNorm2d, Conv2d, Kernels, settle
from resnext_ablate.compute.model import build


@pytest.fixture(autouse=True)
def _by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a CPU go to Triton, with products in full float32."""
    monkeypatch.setattr(fused, "_is_on_cpu", lambda features: False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def _counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops may count to what a kernel was given: the interpreter of Triton 3.6 makes a
    number of an array of one, which NumPy 2.4 no longer does."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda one: int(one.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def _randn(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def _passed(kernels: Kernels, *, size: Sequence[int], kind: str, dtype: torch.dtype):
    """Output, gradients and running averages of norms and what follows them."""
    norms = [BatchNorm2d(size[1]) for _ in range(2)]
    for index, norm in enumerate(norms):
        with torch.no_grad():
            norm.weight.copy_(0.5 + _randn(size[1], seed=index).abs())
            norm.bias.copy_(_randn(size[1], seed=index + 7))
        norm.kernels = kernels
        if dtype == torch.float64:
            norm.double()
    first, second = norms
    features = (3 + 2 * _randn(*size, seed=1)).bfloat16().to(dtype).requires_grad_()
    skip = (_randn(*size, seed=2) - 1).bfloat16().to(dtype).requires_grad_()
    if kind == "alone":
        out, seen = first.relu(features), [features, first.weight, first.bias]
    else:
        skip_norm = second if kind == "both" else None
        out = first.relu_of_sum(features, skip, skip_norm)
        seen = [features, skip, first.weight, first.bias]
        seen += [second.weight, second.bias] if skip_norm else []
    grads = torch.autograd.grad(out, seen, _randn(*size, seed=3).bfloat16().to(dtype))
    buffers = [one for norm in norms for one in norm.buffers()]
    return [out.detach(), *grads, *buffers]


@pytest.mark.parametrize("kind", ["alone", "identity", "both"])
@pytest.mark.parametrize(
    ("size", "dtype", "tolerance", "cut"),
    [
        ((3, 5, 5, 7), torch.float32, 3e-6, False),
        ((3, 5, 5, 7), torch.float32, 3e-6, True),
        ((4, 20, 3, 4), torch.float32, 3e-6, True),
        ((2, 140, 3, 3), torch.float32, 3e-6, False),
        ((1, 1, 3, 1), torch.float32, 3e-6, False),
        ((4, 14, 4, 3), torch.bfloat16, 1e-2, False),
    ],
)
def test_one_pass_equals_torchs_layers(
    size: tuple[int, ...],
    kind: str,
    dtype: torch.dtype,
    tolerance: float,
    cut: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Outputs, gradients and running averages, also of many tiles and parts."""
    if cut:
        small = {"_WIDEST": 16, "_TILE": 64, "_PROGRAMS": 5, "_PARTS": 2}
        for name, value in {**small, "_CHANNELS": 4}.items():
            monkeypatch.setattr(triton_norms, name, value)
    ours = _passed("fused", size=size, kind=kind, dtype=dtype)
    theirs = _passed("torch", size=size, kind=kind, dtype=torch.float64)
    assert ours[0].dtype == dtype
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert _relative(one, other) <= tolerance if other.any() else not one.any()


def test_a_large_mean_costs_no_digits() -> None:
    """The variance of values around 1000 is right to five digits."""
    norm = BatchNorm2d(3)
    norm.kernels = "fused"
    features = 1000 + _randn(8, 3, 16, 16, seed=0)
    norm.relu(features)
    expected = 0.9 + 0.1 * features.double().var(dim=(0, 2, 3))
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_var.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["alone", "identity", "both"])
def test_what_is_no_number_stays_none(kind: str) -> None:
    """ReLU lets NaN through, in the channels that have one and only there."""
    norm, other = BatchNorm2d(5), BatchNorm2d(5)
    norm.kernels = "fused"
    features, skip = _randn(2, 5, 3, 3, seed=0), _randn(2, 5, 3, 3, seed=1)
    features[0, 1, 2, 2] = float("nan")
    features.requires_grad_()
    if kind == "alone":
        out = norm.relu(features)
    else:
        out = norm.relu_of_sum(features, skip, other if kind == "both" else None)
    (grad,) = torch.autograd.grad(out, features, torch.ones_like(out))
    for seen in (out, grad):
        assert seen[:, 1].isnan().all() and not seen[:, [0, 2, 3, 4]].isnan().any()


@pytest.mark.parametrize(
    ("width", "out_width", "groups", "kernel", "stride", "side", "cut"),
    [
        (4, 4, 3, 3, 1, 5, False),
        (4, 4, 2, 3, 2, 6, True),
        (14, 14, 2, 3, 1, 4, True),
        (14, 14, 2, 3, 2, 7, False),
        (24, 24, 2, 3, 2, 6, False),
        (40, 40, 2, 3, 1, 5, False),
        (3, 18, 2, 3, 1, 5, False),
        (2, 2, 2, 1, 2, 5, False),
        (4, 4, 2, 5, 2, 5, False),
    ],
)
def test_a_convolution_equals_torchs(
    width: int,
    out_width: int,
    groups: int,
    kernel: int,
    stride: int,
    side: int,
    cut: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Output and gradients, also of several blocks of pixels and parts of a sum."""
    if cut:
        small = {"_PIXELS": 16, "_PROGRAMS": 1, "_LONGEST": 2, "_PARTS": 2}
        for name, value in {**small, "_WEIGHTS": 64}.items():
            monkeypatch.setattr(triton_conv, name, value)
    features = _randn(2, width * groups, side, side + 2, seed=0).requires_grad_()
    size = (out_width * groups, width, kernel, kernel)
    weight = _randn(*size, seed=1).requires_grad_()
    shape = triton_conv.Grouped(stride, kernel // 2, groups)
    out = triton_conv.conv2d(features, weight, shape)
    assert out.is_contiguous(memory_format=torch.channels_last)
    exact = torch.conv2d(
        features.double(), weight.double(), None, stride, kernel // 2, 1, groups
    )
    grad = _randn(*exact.shape, seed=2)
    ours = torch.autograd.grad(out, [features, weight], grad)
    theirs = torch.autograd.grad(exact, [features, weight], grad.double())
    for one, other in zip((out, *ours), (exact, *theirs), strict=True):
        assert _relative(one.detach(), other.detach()) < 1e-6


def test_groups_keep_to_themselves() -> None:
    """What is no number in one group stays there, forward and backward."""
    features = _randn(1, 12, 4, 4, seed=0)
    features[:, 4:8] = float("nan")
    features.requires_grad_()
    weight = _randn(12, 4, 3, 3, seed=1).requires_grad_()
    out = triton_conv.conv2d(features, weight, triton_conv.Grouped(1, 1, 3))
    _, grad = torch.autograd.grad(out, [features, weight], torch.ones_like(out))
    for seen in (out[0], grad):
        assert seen[4:8].isnan().all()
        assert not seen[:4].isnan().any() and not seen[8:].isnan().any()


@pytest.mark.parametrize("form", ["triton", "triton+merge2"])
def test_a_layer_has_its_form(form: str) -> None:
    """With bias, as in evaluation, and without weights of other groups."""
    results = []
    conv = Conv2d(12, 12, 3, stride=2, padding=1, groups=4)
    for one in ("plain", form):
        conv.form = one
        features = _randn(2, 12, 5, 5, seed=0).requires_grad_()
        out = conv(features)
        grads = torch.autograd.grad(out.square().sum(), [features, *conv.parameters()])
        results.append((out, *grads))
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)


def test_a_block_in_one_node_learns_the_same() -> None:
    """A net's output, gradients and averages, with both kernels at once."""
    spec = parse_spec("resnext11-4x3d-t4-in1-c4")
    results = []
    for kernels in ("torch", "fused"):
        model = build(spec, generator=torch.Generator().manual_seed(0))
        settle(model, spec.layout(8), kernels=kernels, forms={})
        if kernels == "fused":
            model.layer1[0].conv2.form = "triton"
            model.layer2[0].conv2.form = model.layer3[0].conv2.form = "triton+merge2"
        out = model(_randn(3, 1, 8, 8, seed=5))
        assert residual.is_possible(*model.layer2[0]._layers()) == (kernels == "fused")
        out.square().sum().backward()
        held = model.state_dict(keep_vars=True)
        grads = {key: value.grad for key, value in held.items() if value.is_leaf}
        averages = {key: one for key, one in held.items() if "running" in key}
        results.append({"out": out.detach(), **grads, **averages})
    theirs, ours = results
    compared = [key for key, value in theirs.items() if value is not None]
    assert len(compared) > 60
    for key in compared:
        assert _relative(ours[key], theirs[key]) < 1e-4, key
