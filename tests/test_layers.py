"""Exact forms of convolutions, and batch norm with what follows it in one pass."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numba
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.shapes import Conv
from resnext_ablate.architecture.spec import InputError
from resnext_ablate.compute import fused, lanes, layers, loops, residual, tuning
from resnext_ablate.compute.blocks import ResidualBlock
from resnext_ablate.compute.hardware import Precision
from resnext_ablate.compute.layers import BatchNorm2d, Conv2d, Kernels
from resnext_ablate.compute.model import ResNeXt, build, for_evaluation
from resnext_ablate.records.config import TrainConfig

CPU = torch.device("cpu")
NETS = [
    "resnext11-8x2d-t8",
    "resnext20-4x3d-t8",
    "resnext3.3-2x8d-t8-basic-in1",
    "resnet29-t8-preact",
    "resnext11-2x4d-t8-shortcut_a",
    "resnext11-2x4d-t8-shortcut_c",
    "resnext11-2x4d-t8-noshortcut",
    "resnext11-4x4d-t8-form_a",
    "resnext11-4x4d-t8-form_b",
]


def _randn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype, memory_format=torch.channels_last)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


# Convolutions.


@given(
    log_groups=st.integers(0, 3),
    log_merged=st.integers(0, 3),
    width_in=st.integers(1, 3),
    width_out=st.integers(1, 3),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    bias=st.booleans(),
    nchw=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_merged_groups_are_the_same_convolution(
    log_groups: int,
    log_merged: int,
    width_in: int,
    width_out: int,
    kernel: int,
    stride: int,
    bias: bool,
    nchw: bool,
) -> None:
    """Outputs and all gradients of every merge equal torch's, up to rounding alone."""
    groups = 2**log_groups
    merged = 2 ** min(log_merged, log_groups)
    conv = Conv2d(
        groups * width_in,
        groups * width_out,
        kernel,
        stride=stride,
        padding=kernel // 2,
        groups=groups,
        bias=bias,
    ).double()
    results = []
    for form in ("plain", f"{'nchw+' if nchw else ''}merge{merged}"):
        conv.form = form
        features = _randn(2, groups * width_in, 6, 6).double().requires_grad_()
        out = conv(features)
        weights = list(conv.parameters())
        grads = torch.autograd.grad(out.square().sum(), [features, *weights])
        results.append((out, *grads))
    for plain, other in zip(*results, strict=True):
        assert plain.shape == other.shape
        torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_1x1_convolution_is_a_product_of_matrices(stride: int) -> None:
    """Output and gradients of the product equal the convolution's."""
    conv = Conv2d(6, 10, 1, stride=stride).double()
    results = []
    for form in ("plain", "matmul", "nchw"):
        conv.form = form
        features = _randn(3, 6, 7, 7).double().requires_grad_()
        out = conv(features)
        grads = torch.autograd.grad(out.square().sum(), [features, *conv.parameters()])
        results.append((out, *grads))
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


# Batch norm, ReLU and addition in one pass.


def _norms(count: int, *, kernels: Kernels, channels: int) -> list[BatchNorm2d]:
    norms = []
    for index in range(count):
        norm = BatchNorm2d(channels)
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            norm.weight.uniform_(0.5, 2, generator=generator)
            norm.bias.uniform_(-1, 1, generator=generator)
        norm.kernels = kernels
        norms.append(norm)
    return norms


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values that bfloat16 holds, so that inputs are the same in every type."""
    return values.bfloat16().to(dtype)


def _passed(kernels: Kernels, *, kind: str, dtype: torch.dtype) -> list[Tensor]:
    """Output, gradients and running averages of a fused layer and of torch's."""
    channels, size = 24, (6, 24, 5, 7)
    features = _rounded(3 + 2 * _randn(*size, seed=1), dtype).requires_grad_()
    skip = _rounded(_randn(*size, seed=2) - 1, dtype).requires_grad_()
    first, second = _norms(2, kernels=kernels, channels=channels)
    if dtype == torch.float64:
        first.double()
        second.double()
    if kind == "alone":
        out = first.relu(features)
    else:
        out = first.relu_of_sum(features, skip, second if kind == "both" else None)
    out.backward(_rounded(_randn(*size, seed=3), dtype))  # type: ignore[no-untyped-call]
    held = [features.grad, first.weight.grad, first.bias.grad]
    if kind != "alone":
        held.append(skip.grad)
    if kind == "both":
        held += [second.weight.grad, second.bias.grad, second.running_var]
    tensors = [out.detach(), *held, first.running_mean, first.running_var]
    assert int(first.num_batches_tracked) == 1  # type: ignore[arg-type]
    return [tensor for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("kind", ["alone", "identity", "both"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)]
)
def test_one_pass_equals_torchs_layers(
    kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Outputs, gradients and running averages are those of torch in float64."""
    ours = _passed("fused", kind=kind, dtype=dtype)
    stored = _passed("torch", kind=kind, dtype=torch.float64)
    assert len(ours) == len(stored)
    assert ours[0].dtype == dtype
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(ours, stored, strict=True):
        assert _relative(one, other) < tolerance


def test_one_pass_is_nearer_to_the_truth_than_torch_in_bf16() -> None:
    """Without roundings in between, the output in bfloat16 errs less than torch's."""
    exact = _passed("torch", kind="both", dtype=torch.float64)[0]
    ours = _passed("fused", kind="both", dtype=torch.bfloat16)[0]
    torchs = _passed("torch", kind="both", dtype=torch.bfloat16)[0]
    assert _relative(ours, exact) < _relative(torchs, exact)


def test_a_large_mean_costs_no_digits() -> None:
    """The variance of values around 1000 is right to five digits."""
    (norm,) = _norms(1, kernels="fused", channels=3)
    features = 1000 + _randn(64, 3, 16, 16)
    norm.relu(features)
    assert norm.running_var is not None
    expected = 0.9 + 0.1 * features.double().var(dim=(0, 2, 3))
    torch.testing.assert_close(norm.running_var.double(), expected, rtol=1e-5, atol=0)


def test_what_is_no_number_stays_none() -> None:
    """ReLU lets NaN through, so that a run that diverges is noticed."""
    for dtype in (torch.float32, torch.bfloat16):
        (norm,) = _norms(1, kernels="fused", channels=4)
        features = _randn(2, 4, 3, 3).to(dtype)
        features[0, 1, 0, 0] = float("nan")
        out = norm.relu(features)
        assert out[:, 1].isnan().all() and not out[:, [0, 2, 3]].isnan().any()


def test_loops_compile_where_no_folder_can_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a place for compiled code they are compiled in each process."""
    njit = numba.njit

    def refusing(function: Any, *, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(function, **options)

    monkeypatch.setattr(numba, "njit", refusing)
    doubled = lanes.compiled(lambda value: 2 * value)
    assert doubled(21) == 42


def test_evaluation_is_torchs() -> None:
    """In eval mode the running averages are used, and stay as they are."""
    results = []
    for kernels in ("torch", "fused"):
        (norm,) = _norms(1, kernels=kernels, channels=8)  # type: ignore[arg-type]
        norm.eval()
        results.append(norm.relu(_randn(2, 8, 4, 4)))
        assert int(norm.num_batches_tracked) == 0  # type: ignore[arg-type]
    assert results[0].equal(results[1])


@pytest.mark.parametrize("side", [1, 4, 7])
def test_pooling_as_a_sum_is_the_mean(side: int) -> None:
    """Values and gradients are those of torch's average pooling, for any side."""
    results = []
    for kernels in ("torch", "fused"):
        pool = layers.GlobalAvgPool2d()
        pool.kernels = kernels  # type: ignore[assignment]
        features = _randn(3, 5, side, side).requires_grad_()
        out = pool(features)
        assert out.shape == (3, 5, 1, 1)
        (grad,) = torch.autograd.grad(out, features, _randn(3, 5, 1, 1, seed=1))
        results.append((out.detach(), grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


# Whole nets.


def _forms(model: ResNeXt, *, side: int) -> dict[str, str]:
    """Every 1x1 as a product, every grouped layer merged whole."""
    forms = {}
    for conv in model.spec.layout(side).convs:
        if conv.kernel_size == 1 and conv.groups == 1:
            forms[layers.conv_key(conv)] = "matmul"
        elif conv.groups > 1:
            forms[layers.conv_key(conv)] = f"merge{conv.groups}"
    return forms


def _stepped(
    name: str, *, kernels: Kernels, forms: bool
) -> tuple[float, Mapping[str, Tensor], Tensor]:
    """Loss of one SGD step, the gradients, and the logits in eval mode after it."""
    spec = parse_spec(name)
    side = max(8, spec.total_stride)
    model = build(spec, generator=torch.Generator().manual_seed(0)).double()
    model = model.to(memory_format=torch.channels_last)
    table = _forms(model, side=side) if forms else {}
    if kernels == "fused":
        model = model.float()
    layers.settle(model, spec.layout(side), kernels=kernels, forms=table)
    dtype = torch.float32 if kernels == "fused" else torch.float64
    images = _randn(8, spec.in_channels, side, side, seed=4).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = F.cross_entropy(model(images), torch.arange(8))
    loss.backward()  # type: ignore[no-untyped-call]
    grads = {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }
    optimizer.step()
    with torch.no_grad():
        return loss.item(), grads, model.eval()(images)


@pytest.mark.parametrize("name", NETS)
def test_one_training_step_is_the_same_in_every_form(name: str) -> None:
    """Merged groups and products change nothing in float64; fused kernels rounding."""
    loss, grads, logits = _stepped(name, kernels="torch", forms=False)
    merged = _stepped(name, kernels="torch", forms=True)
    assert merged[0] == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(merged[2], logits, rtol=1e-9, atol=1e-9)
    fused_loss, fused_grads, fused_logits = _stepped(name, kernels="fused", forms=True)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    whole = torch.cat([grad.flatten() for grad in grads.values()])
    ours = torch.cat([fused_grads[key].flatten() for key in grads])
    assert _relative(ours, whole) < 1e-3  # a value near 0 may pass the ReLU or not
    assert _relative(fused_logits, logits) < 1e-3


@pytest.mark.parametrize("name", [NETS[0], NETS[2], NETS[5]])
@pytest.mark.parametrize("forms", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-5), ("bf16", 0.03)])
def test_a_block_in_one_node_is_its_layers_one_by_one(
    name: str,
    forms: bool,
    precision: Precision,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Output, gradients and running averages are those of a node for each layer."""
    spec = parse_spec(name)
    results = []
    for is_whole in (True, False):
        model = build(spec, generator=torch.Generator().manual_seed(0))
        table = _forms(model, side=8) if forms else {}
        layers.settle(model, spec.layout(8), kernels="fused", forms=table)
        if not is_whole:
            monkeypatch.setattr(residual, "is_possible", lambda main, projection: False)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = model.bn1.relu(model.conv1(_randn(8, spec.in_channels, 8, 8)))
            for stage in range(1, spec.num_stages + 1):
                out = model.get_submodule(f"layer{stage}")(out)
                assert out.grad_fn is not None
                assert (out.grad_fn.name() == "_BlockBackward") == is_whole
        out.backward(_randn(*out.shape, seed=1).to(out.dtype))
        held = model.state_dict(keep_vars=True).items()
        grads = {key: value.grad for key, value in held if value.grad is not None}
        averages = {key: value for key, value in held if "running" in key}
        results.append({"out": out.detach(), **averages, **grads})
    ours, theirs = results
    assert ours.keys() == theirs.keys() and len(ours) > 30
    for key, value in ours.items():
        assert _relative(value, theirs[key]) < tolerance, key
        assert value.is_contiguous() or key == "out"


@pytest.mark.parametrize("stage", [0, 1])
def test_a_block_overwrites_nothing_that_others_hold(stage: int) -> None:
    """Backward writes over what the block has computed, not over its input, its output
    or the gradient that it is given; with and without a projection."""
    spec = parse_spec("resnext20-4x2d-t8")
    model = build(spec, generator=torch.Generator().manual_seed(0))
    layers.settle(model, spec.layout(8), kernels="fused", forms={})
    block = model.layer1[stage]
    assert isinstance(block, ResidualBlock)
    assert bool(block.block.projection) == (stage == 0)
    size = (4, block.block.in_channels, 8, 8)
    features = _randn(*size).contiguous(memory_format=torch.channels_last)
    features.requires_grad_()
    out = block(features)
    grad = _randn(*out.shape, seed=1).contiguous(memory_format=torch.channels_last)
    held = [features.detach(), out.detach(), grad]
    before = [values.clone() for values in held]
    out.backward(grad)
    assert all(map(torch.equal, held, before))


def test_what_may_be_overwritten_is() -> None:
    """Gradients take the memory of features, and of a skip that has a norm, on demand
    alone; the values are the same."""
    first, second = _norms(2, kernels="fused", channels=8)
    grad, *values = (
        _randn(2, 8, 3, 3, seed=seed).contiguous(memory_format=torch.channels_last)
        for seed in range(3)
    )

    def outs(skip_norm: BatchNorm2d | None, *, overwrites: bool) -> list[Tensor]:
        features, skip = (value.clone() for value in values)
        _, norms = fused.sum_forward(features, first, skip, skip_norm)
        one, other, *_ = fused.sum_backward(
            grad, features, skip, norms, overwrites=overwrites
        )
        assert (one.data_ptr() == features.data_ptr()) == overwrites
        is_free = overwrites and skip_norm is not None
        assert (other.data_ptr() == skip.data_ptr()) == is_free
        features = values[0].clone()
        _, normed = fused.relu_forward(features, first)
        alone, _ = fused.relu_backward(grad, features, normed, overwrites=overwrites)
        assert (alone.data_ptr() == features.data_ptr()) == overwrites
        return [one, other, alone]

    for skip_norm in (None, second):
        new, old = (outs(skip_norm, overwrites=given) for given in (False, True))
        assert all(map(torch.equal, new, old))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_a_tensor_which_they_hold(dtype: torch.dtype) -> None:
    """The same memory, for as long as the rows are there and no longer; what is not
    dense is refused."""
    features = fused.dense(_randn(3, 24, 5, 7).to(dtype).requires_grad_())
    rows = fused._rows(features)
    held = weakref.ref(features)
    bits = torch.from_numpy(rows).view(dtype).flatten()
    assert torch.equal(bits, features.detach().permute(0, 2, 3, 1).flatten())
    assert rows.ctypes.data == features.data_ptr() == fused.flat(features).ctypes.data
    del features, bits
    assert held() is not None
    del rows
    assert held() is None
    with pytest.raises(AssertionError, match="dense"):
        fused._rows(_randn(3, 24, 5, 7).to(dtype).contiguous())


def test_a_block_lets_go_of_what_it_is_done_with() -> None:
    """Behind backward nothing of a block is held but gradients, though its output
    lives on."""
    model = build(parse_spec(NETS[0]), generator=torch.Generator().manual_seed(0))
    layers.settle(model, model.spec.layout(8), kernels="fused", forms={})
    features = _randn(2, 32, 8, 8)
    inner = weakref.ref(features)
    out = model.layer2(features)
    del features
    assert inner() is not None
    out.sum().backward()
    assert inner() is None and out.grad_fn is not None


@pytest.mark.parametrize("name", [*NETS, "resnext50-2x2d-t4"])
def test_folded_norms_change_nothing_but_rounding(name: str) -> None:
    """The copy for evaluation has the net's logits, the net stays as it is, and no
    batch norm is left behind a convolution."""
    spec = parse_spec(name)
    side = max(8, spec.total_stride)
    model = build(spec, generator=torch.Generator().manual_seed(0)).double()
    for seed in range(3):  # so that running averages are not those of the start
        model(1 + _randn(4, spec.in_channels, side, side, seed=seed).double())
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    layers.settle(model, spec.layout(side), kernels="fused", forms={})
    images = _randn(5, spec.in_channels, side, side, seed=9).double()
    with torch.no_grad():
        logits = for_evaluation(model)(images)
        assert all(state[key].equal(held) for key, held in model.state_dict().items())
        torch.testing.assert_close(logits, model.eval()(images), rtol=1e-9, atol=1e-9)
    folded = [type(m).__name__ for m in for_evaluation(model).modules()]
    assert folded.count("FoldedNorm2d") > 3
    if "preact" not in name and "form" not in name:
        assert "BatchNorm2d" not in folded


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("is_narrow", [False, True])
def test_a_folded_net_adds_and_cuts_off_in_one_pass(
    name: str, is_narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit what torch's operations give; images and weights stay as they are, and
    gradients can still be asked for."""
    spec = parse_spec(name)
    side = max(8, spec.total_stride)
    model = build(spec, generator=torch.Generator().manual_seed(0))
    model = model.to(memory_format=torch.channels_last)
    images = _randn(5, spec.in_channels, side, side, seed=9)
    held = [t.clone() for t in (images, *model.state_dict().values())]
    passes: list[str] = []
    for loop in ("relu", "relu_of_sum"):
        original = getattr(loops, loop)
        monkeypatch.setattr(
            loops, loop, lambda *a, f=original, n=loop: passes.append(n) or f(*a)
        )

    layers.settle(model, spec.layout(side), kernels="fused", forms={})

    def logits() -> Tensor:
        folded = for_evaluation(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_narrow):
            with torch.inference_mode():
                answers: Tensor = folded(images)
            count = len(passes)
            folded(images).sum().backward()
            assert len(passes) == count
        return answers

    with monkeypatch.context() as patch:
        patch.setattr(layers.FoldedNorm2d, "_has_loops", lambda *_: False)
        plain = logits()
    assert not passes
    assert torch.equal(logits(), plain)
    assert "relu" in passes
    # Where a sum has no norm that could be folded before it, it is torch's.
    apart = ("preact", "noshortcut", "form_a")
    assert ("relu_of_sum" in passes) != any(kind in name for kind in apart)
    now = (images, *model.state_dict().values())
    assert all(map(torch.equal, held, now))


def test_state_dicts_do_not_know_of_forms() -> None:
    """Names and shapes stay torch's, so that checkpoints and weights load anywhere."""
    spec = parse_spec("resnext11-8x2d-t8")
    model = build(spec, generator=torch.Generator().manual_seed(0))
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    forms = _forms(model, side=8)
    layers.settle(model, spec.layout(8), kernels="fused", forms=forms)
    after = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert before == after
    assert {
        module.form for module in model.modules() if isinstance(module, Conv2d)
    } == {
        "plain",
        "matmul",
        "merge8",
    }
    assert all(isinstance(m, nn.Module) for m in model.modules())


# Which form is fastest.


def _convs(name: str = "resnext11-8x1d-t4") -> tuple[Conv, ...]:
    return parse_spec(name).layout(8).convs


def _fastest(precision: Precision = "fp32") -> dict[str, str]:
    return tuning.fastest_forms(_convs(), batch_size=4, precision=precision, device=CPU)


def test_the_fastest_form_is_taken_where_it_is_clearly_faster() -> None:
    """Within 5 % torch's own form stays; every form asked for is one that exists."""
    grouped = next(conv for conv in _convs() if conv.groups > 1)
    assert tuning.candidate_forms(grouped, precision="fp32", device=CPU) == (
        "plain",
        "merge2",
        "merge4",
        "merge8",
    )
    for times, expected in (
        ({"plain": 1.0, "merge2": 0.96, "merge4": 2.0}, "plain"),
        ({"plain": 1.0, "merge2": 0.9, "merge4": 0.8}, "merge4"),
    ):
        assert tuning._choice(times) == expected


def test_times_are_kept_and_damage_is_mended(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A second call times nothing, another precision does; damage counts as none."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RESNEXT_ABLATE_CACHE", str(cache))
    timed: list[str] = []
    times_ms = tuning._times_ms

    def spied(conv: Conv, **about: object) -> dict[str, float]:
        timed.append(layers.conv_key(conv))
        return times_ms(conv, **about)  # type: ignore[arg-type]

    monkeypatch.setattr(tuning, "_times_ms", spied)
    first = _fastest()
    assert set(timed) == set(first) == {layers.conv_key(conv) for conv in _convs()}
    assert len(timed) == len(set(timed))
    assert _fastest() == first and len(timed) == len(first)
    (path,) = (cache / "tuning").glob("*.json")
    for damage in ("", "{", "[]", '{"values": 3}', '{"values": {"a": {"plain": "x"}}}'):
        path.write_text(damage, encoding="utf-8")
        timed.clear()
        assert set(_fastest()) == set(timed)
    timed.clear()
    _fastest("bf16")
    assert len(timed) == len(first)


def test_a_cache_that_cannot_be_written_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Forms are timed all the same where the cache folder is a file."""
    blocked = tmp_path_factory.mktemp("cache") / "file"
    blocked.write_text("", encoding="utf-8")
    monkeypatch.setenv("RESNEXT_ABLATE_CACHE", str(blocked))
    assert set(_fastest()) == {layers.conv_key(conv) for conv in _convs()}


# What a study settles.


def test_a_study_settles_its_forms_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What earlier results settled stays, new shapes are added, none stays none."""
    monkeypatch.setenv("RESNEXT_ABLATE_CACHE", str(tmp_path_factory.mktemp("cache")))
    asked = TrainConfig(epochs=1, batch_size=4)
    new = tuning.settled(asked, earlier=None, device=CPU)
    assert new.precision in ("fp32", "bf16") and new.kernels == "fused"
    first = tuning.with_forms(new, convs=_convs(), device=CPU)
    assert set(first.conv_forms) == {layers.conv_key(conv) for conv in _convs()}

    pinned = dict.fromkeys(first.conv_forms, "merge2")
    earlier = first.model_copy(update={"precision": "bf16", "conv_forms": pinned})
    resumed = tuning.settled(asked, earlier=earlier, device=CPU)
    assert resumed == earlier
    more = _convs("resnext11-4x3d-t4")
    wider = tuning.with_forms(resumed, convs=[*_convs(), *more], device=CPU).conv_forms
    assert isinstance(wider, dict)
    assert {key: wider[key] for key in pinned} == pinned
    assert set(wider) == {layers.conv_key(conv) for conv in (*_convs(), *more)}

    before_forms = TrainConfig(epochs=1, batch_size=4, precision="bf16")
    older = tuning.settled(asked, earlier=before_forms, device=CPU)
    assert (older.kernels, older.conv_forms) == ("torch", {})
    assert tuning.with_forms(older, convs=_convs(), device=CPU) == older


@pytest.mark.parametrize("form", ["merge3", "matmul"])
def test_a_form_that_a_shape_lacks_is_refused(form: str) -> None:
    """A table written by hand is checked against the shapes of the net."""
    spec = parse_spec("resnext11-8x1d-t4")
    grouped = next(conv for conv in _convs() if conv.groups == 8)
    forms = {layers.conv_key(grouped): form}
    with pytest.raises(InputError, match=f"groups 8 .* has no form '{form}'"):
        layers.settle(build(spec), spec.layout(8), kernels="torch", forms=forms)


def test_fused_kernels_are_refused_where_they_cannot_be() -> None:
    """They need channels-last and kernels for the device; auto takes torch's else."""
    for kind, channels_last in (("mps", True), ("cuda", False), ("cpu", False)):
        place = {"device": torch.device(kind), "channels_last": channels_last}
        assert tuning.resolve_kernels("auto", **place) == "torch"  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"needs train\.channels_last = true"):
            tuning.resolve_kernels("fused", **place)  # type: ignore[arg-type]
    assert tuning.resolve_kernels("auto", device=CPU, channels_last=True) == "fused"
    assert tuning.resolve_kernels("torch", device=CPU, channels_last=True) == "torch"
