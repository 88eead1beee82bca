"""Kernels of CUDA: what they compute, that they compile, and when they are taken."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from replays import Again
from torch import Tensor

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.shapes import Conv
from resnext_ablate.architecture.spec import InputError
from resnext_ablate.compute import captures, graphs, layers, learner, tuning
from resnext_ablate.compute.blocks import convolution
from resnext_ablate.compute.data import Batch
from resnext_ablate.compute.layers import BatchNorm2d, Conv2d, Kernels
from resnext_ablate.compute.model import build
from resnext_ablate.records.config import TrainConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
INTERPRETED = Path(__file__).with_name("interpreted_triton.py")
SHARED_BYTES = 99 * 1024
"""What a block may have of the smaller cards of Ampere and Ada."""
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"
)


def _randn(*size: int, seed: int = 0) -> Tensor:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    if len(size) != 4:
        return values
    return values.to(memory_format=torch.channels_last)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


# What they compute, by Triton's interpreter, and that they compile.


def test_kernels_compute_what_torch_does() -> None:
    """Every test of the file beside this one passes in a process that interprets."""
    pytest.importorskip("triton")
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", str(INTERPRETED)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout[-5000:]
    assert "passed" in answer.stdout and "skipped" not in answer.stdout


class _Compiled:
    """In place of a kernel: what would be launched is compiled for a card."""

    def __init__(self, kernel: Any, *, arch: int, held: list[tuple[str, Any]]) -> None:
        self._kernel, self._arch, self._held = kernel, arch, held

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert 0 < grid[0] < 2**31 and all(0 < size < 2**16 for size in grid[1:])
        return self._compile

    def _compile(self, *arguments: Any, num_warps: int = 4) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        signature, constants, attributes = {}, {}, {}
        for index, (parameter, value) in enumerate(
            zip(self._kernel.params, arguments, strict=True)
        ):
            is_tensor = isinstance(value, Tensor)
            # As at a launch: a 1 is known to the compiler.
            is_constant = parameter.is_constexpr or (not is_tensor and value == 1)
            signature[parameter.name] = "constexpr" if is_constant else _type(value)
            if is_constant:
                constants[(index,)] = value
            elif is_tensor or value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        found = compile(
            ASTSource(self._kernel, signature, constants, attributes),
            target=GPUTarget("cuda", self._arch, 32),
            options={"num_warps": num_warps},
        )
        self._held.append((self._kernel.fn.__name__, found))


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        names = {"float32": "fp32", "bfloat16": "bf16", "int64": "i64"}
        return f"*{names[str(value.dtype).removeprefix('torch.')]}"
    return "i32" if value < 2**31 else "i64"


@pytest.fixture
def compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Any, int], list[tuple[str, Any]]]:
    """Makes the kernels of a module compile instead of launch, and names them."""
    triton = pytest.importorskip("triton")
    from triton.backends.nvidia import compiler

    try:
        compiler.get_ptxas(90)
    except Exception as error:
        pytest.skip(f"no ptxas: {error}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    held: list[tuple[str, Any]] = []

    def placed(module: Any, arch: int) -> list[tuple[str, Any]]:
        for name, value in vars(module).items():
            if isinstance(value, triton.JITFunction) and name != "summed":
                kernel = _Compiled(value, arch=arch, held=held)
                if not _is_part(name):
                    monkeypatch.setattr(module, name, kernel)
        return held

    return placed


def _is_part(name: str) -> bool:
    """Whether it is called by kernels, not launched."""
    parts = "load columns tile behind_relu store_sums affine sum_of_both taken"
    return name.removeprefix("_") in parts.split()


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [(90, torch.bfloat16), (90, torch.float32), (80, torch.bfloat16)],
)
def test_norms_compile(compiled: Any, arch: int, dtype: torch.dtype) -> None:
    """For each card and precision, and they move 16 bytes at once where pixels lined up
    allow it, also of 24 channels and of more than 2^31 values."""
    from resnext_ablate.compute import triton_kernels

    held = compiled(triton_kernels, arch)
    _launch_norms(torch.empty(2**27, 24, dtype=dtype, device="meta"))
    assert len(held) == 12
    for name, kernel in held:
        assert kernel.asm["cubin"] and kernel.metadata.shared <= SHARED_BYTES
        assert "finish" in name or "ld.global.v4.b32" in kernel.asm["ptx"], name
        assert "xi64>" in kernel.asm["ttir"], name


def _launch_norms(y: Tensor) -> None:
    """Every kernel once, with and without a norm of the skip."""
    from resnext_ablate.compute import triton_norms

    count, channels = y.shape
    line = torch.empty(channels, device="meta")
    counter = torch.empty((), dtype=torch.int64, device="meta")
    normed = triton_norms.normalise(y, line, line, line, line, counter, 0.1, 1e-5)
    triton_norms.relu(y, normed, y)
    sums, products = triton_norms.relu_sums(y, y, normed)
    grads = triton_norms.gradients(normed, sums, products, count)
    triton_norms.relu_backward(y, y, normed, grads, y)
    for theirs, their_grads in ((normed, grads), (None, None)):
        triton_norms.relu_of_sum(y, normed, y, theirs, y)
        triton_norms.relu_of_sum_sums(y, y, y, normed, theirs)
        both = (normed, theirs), (grads, their_grads)
        triton_norms.relu_of_sum_backward(y, y, y, *both, y, y)


def test_the_smallest_shapes_compile(compiled: Any) -> None:
    """Sizes of 1 are known to the compiler, which must make do with numbers."""
    from resnext_ablate.compute import triton_conv, triton_kernels

    held = compiled(triton_kernels, 90)
    _launch_norms(torch.empty(1, 1, dtype=torch.bfloat16, device="meta"))
    compiled(triton_conv, 90)
    _launch_convolution((1, 2, 1, 1), width=1, groups=2, dtype=torch.bfloat16)
    assert len(held) == 12 + 4 and all(kernel.asm["cubin"] for _, kernel in held)


@pytest.mark.parametrize(
    ("arch", "dtype", "width", "has_exact"),
    [
        (90, torch.bfloat16, 64, False),
        (90, torch.bfloat16, 14, False),
        (90, torch.float32, 64, False),
        (80, torch.bfloat16, 64, False),
        (80, torch.float32, 24, True),
    ],
)
def test_convolutions_compile(
    compiled: Any,
    arch: int,
    dtype: torch.dtype,
    width: int,
    has_exact: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For each card and precision, on tensor cores unless products must be exact; as
    wide as forms become their blocks fit in shared memory, and places are int64."""
    from resnext_ablate.compute import triton_conv

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not has_exact)
    held = compiled(triton_conv, arch)
    size = (256, 8 * width, 56, 56)
    _launch_convolution(size, width=width, groups=8, dtype=dtype)
    assert [name for name, _ in held] == [
        "_pixels",
        "_pixels",
        "_weight_parts",
        "_add_parts",
    ]
    for name, kernel in held:
        assert kernel.asm["cubin"] and kernel.metadata.shared <= SHARED_BYTES, name
        products = re.findall(r"arith\.muli .*xi64>", kernel.asm["ttir"])
        assert len(products) == (1 if name == "_add_parts" else 2), name
        assert name == "_add_parts" or has_exact or "mma" in kernel.asm["ptx"]


def _launch_convolution(
    size: tuple[int, ...], *, width: int, groups: int, dtype: torch.dtype
) -> None:
    """Forward and both gradients, of features (N, C, H, W) of a size."""
    from resnext_ablate.compute import triton_conv

    features = torch.empty(size, dtype=dtype, device="meta")
    features = features.to(memory_format=torch.channels_last)
    weight = torch.empty(groups * width, width, 3, 3, dtype=dtype, device="meta")
    shape = triton_conv.Grouped(2, 1, groups)
    out = triton_conv.convolved(features, weight, shape)
    triton_conv.features_gradient(out, weight, shape, size=features.shape)
    triton_conv.weight_gradient(
        out, features, shape, size=weight.shape, dtype=torch.float32
    )


# When they are taken.


def _grouped(net: str) -> Conv:
    return next(conv for conv in parse_spec(net).layout(8).convs if conv.groups > 1)


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        ("resnext11-32x4d-t8", "triton+merge4 triton+merge8 triton+merge16"),
        ("resnext11-8x14d-t8", "triton triton+merge2 triton+merge4"),
        ("resnext11-4x40d-t8", "triton"),
        ("resnext11-5x1d-t8", "triton+merge5"),
    ],
)
def test_narrow_groups_may_be_tritons_on_cuda(
    net: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it can be imported, in blocks between half of 16 and 64 channels; torch's
    own form comes first, and a CPU has none of them."""
    conv = _grouped(net)
    for has_triton in (True, False):
        monkeypatch.setattr(tuning, "has_triton", lambda held=has_triton: held)
        forms = tuning.candidate_forms(conv, precision="bf16", device=CUDA)
        found = [form for form in forms if "triton" in form]
        assert found == (expected.split() if has_triton else [])
        assert forms[0] == "plain" and "nchw" in forms
        assert all(
            "triton" not in form
            for form in tuning.candidate_forms(conv, precision="bf16", device=CPU)
        )
        layers._check_form(conv, forms[-1])
    pointwise = next(c for c in parse_spec(net).layout(8).convs if c.groups == 1)
    assert "triton" not in tuning.candidate_forms(
        pointwise, precision="bf16", device=CUDA
    )


def test_a_study_of_tritons_forms_is_refused_on_a_cpu() -> None:
    """And so is such a form of a convolution in one group."""
    spec = parse_spec("resnext11-8x2d-t4")
    convs = spec.layout(8).convs
    model = build(spec, generator=torch.Generator().manual_seed(0))
    for conv in (next(c for c in convs if c.groups > 1), convs[0]):
        forms = {layers.conv_key(conv): "triton"}
        with pytest.raises(InputError, match="triton needs groups and CUDA"):
            layers.settle(model, spec.layout(8), kernels="torch", forms=forms)


def _timed(
    acts: Mapping[str, Callable[[], None]],
    *,
    reference: str = "plain",
    cannot: bool = False,
) -> tuple[dict[str, float], dict[str, int]]:
    """Times by a clock that only acts move, by a second; and how often each ran."""
    refusal = RuntimeError("operation not permitted when stream is capturing")
    counts = dict.fromkeys(acts, 0)

    def counted(name: str) -> None:
        counts[name] += 1
        acts[name]()

    found = captures.replayed_ms(
        {name: lambda name=name: counted(name) for name in acts},
        reference=reference,
        capture=lambda: Again(error=refusal if cannot else None),
        clock_s=lambda: float(sum(counts.values())),
    )
    return found, counts


def _raise(error: Exception | None) -> None:
    if error:
        raise error


def _fail(error: Exception) -> Callable[[], None]:
    return lambda: _raise(error)


@pytest.mark.parametrize("cannot", [False, True])
def test_acts_are_timed_in_turns(cannot: bool) -> None:
    """Each is warmed up before it is captured, and one that cannot be captured is timed
    all the same."""
    found, counts = _timed({"plain": lambda: None, "b": lambda: None}, cannot=cannot)
    assert found == {"plain": 1000.0, "b": 1000.0}
    assert counts == {"plain": 3 + 1 + 7 * 8, "b": 3 + 1 + 7 * 8}


def test_what_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """With a line in the log; torch's own must not fail, nor memory run out."""
    broken = ValueError("out of resource: shared memory")
    with caplog.at_level(logging.INFO, logger="resnext_ablate"):
        found, counts = _timed({"plain": lambda: None, "triton": _fail(broken)})
    assert set(found) == {"plain"} and counts["triton"] == 1
    assert "triton is left out, it fails here: out of resource" in caplog.text
    late = iter([None, None, None, broken])  # when it is replayed
    found, _ = _timed({"plain": lambda: None, "late": lambda: _raise(next(late))})
    assert set(found) == {"plain"}
    with pytest.raises(ValueError, match="out of resource"):
        _timed({"triton": lambda: None, "plain": _fail(broken)})
    with pytest.raises(torch.OutOfMemoryError):
        _timed({"plain": lambda: None, "b": _fail(torch.OutOfMemoryError("full"))})


def _by_fakes(
    acts: Mapping[str, Callable[[], None]], *, reference: str, device: torch.device
) -> dict[str, float]:
    return _timed(acts, reference=reference)[0]


def test_a_form_that_does_not_run_here_has_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton launches nothing on a CPU; the others are timed, forward and backward."""
    monkeypatch.setattr(captures, "device_ms", _by_fakes)
    conv = _grouped("resnext11-8x1d-t4")
    module = convolution(conv)
    features = _randn(2, conv.in_channels, 8, 8).requires_grad_()
    forms = ("plain", "merge2", "nchw", "triton+merge8")
    found = tuning._device_times_ms(module, features, forms=forms, device=CPU)
    assert set(found) == {"plain", "merge2", "nchw"}
    assert features.grad is None and tuning._is_sound(found)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A CUDA device that only has a name, with Triton and an empty cache."""
    monkeypatch.setenv("RESNEXT_ABLATE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "machine", lambda device: {"device": "a GPU"})
    monkeypatch.setattr(tuning, "has_triton", lambda: True)


def _resolved(
    times: list[dict[str, float] | Exception], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """What `auto` is, once for each of the times and once more."""
    left = iter(times)

    def timed(device: torch.device) -> dict[str, float]:
        found = next(left)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(tuning, "_kernel_times_ms", timed)
    return [
        tuning.resolve_kernels("auto", device=CUDA, channels_last=True)
        for _ in range(len(times) + 1)
    ]


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(
    ("fused_ms", "expected"), [(0.9, "fused"), (0.96, "torch"), (1.2, "torch")]
)
def test_fused_kernels_are_taken_where_they_are_clearly_faster(
    fused_ms: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA they are timed, once per machine."""
    times: list[Any] = [{"torch": 1.0, "fused": fused_ms}]
    assert _resolved(times, monkeypatch) == [expected] * 2


@pytest.mark.usefixtures("on_cuda")
def test_a_failure_means_torchs_own_kernels_and_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether the fused ones fail alone or the probe does, it is made anew."""
    times = [
        RuntimeError("no compiler"),
        torch.OutOfMemoryError("full"),
        {"torch": 1.0},
        {"torch": 1.0, "fused": 0.5},
    ]
    with caplog.at_level(logging.INFO, logger="resnext_ablate"):
        found = _resolved(times, monkeypatch)
    assert found == ["torch", "torch", "torch", "fused", "fused"]
    assert "the fused ones fail here: no compiler" in caplog.text


@pytest.mark.usefixtures("on_cuda")
def test_fused_kernels_of_cuda_need_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for is taken untimed where it can be, else refused."""
    monkeypatch.setattr(tuning, "_kernel_times_ms", _fail(AssertionError()))
    place: Any = {"device": CUDA, "channels_last": True}
    assert tuning.resolve_kernels("fused", **place) == "fused"
    assert tuning.resolve_kernels("torch", **place) == "torch"
    monkeypatch.setattr(tuning, "has_triton", lambda: False)
    assert tuning.resolve_kernels("auto", **place) == "torch"
    with pytest.raises(InputError, match="CUDA with the package triton"):
        tuning.resolve_kernels("fused", **place)


def test_a_cpu_trains_without_triton() -> None:
    """Nothing imports it where there is no GPU: it takes a second, or is not there."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from resnext_ablate.compute import fused, layers, residual, tuning
cpu = torch.device("cpu")
assert tuning.resolve_kernels("auto", device=cpu, channels_last=True) == "fused"
assert not tuning.has_triton()
norm = layers.BatchNorm2d(4)
norm.kernels = "fused"
norm.relu(torch.randn(2, 4, 3, 3)).sum().backward()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


# On a device.


def _layer_on_cuda(kernels: Kernels, *, kind: str, dtype: torch.dtype) -> list[Tensor]:
    """Output, gradients and running averages of a layer."""
    size = (16, 24, 17, 15)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    first, second = (BatchNorm2d(24).to(CUDA, exact) for _ in range(2))
    first.kernels = second.kernels = kernels
    drawn = [_randn(*size, seed=seed).bfloat16().to(CUDA, dtype) for seed in range(3)]
    features, skip = drawn[0].requires_grad_(), drawn[1].requires_grad_()
    if kind == "alone":
        out, seen = first.relu(features), [features, *first.parameters()]
    else:
        skip_norm = second if kind == "both" else None
        out = first.relu_of_sum(features, skip, skip_norm)
        seen = [features, skip, *first.parameters()]
    grads = torch.autograd.grad(out, seen, drawn[2])
    return [out.detach(), *grads, *first.buffers()]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", ["alone", "identity", "both"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_cuda_one_pass_equals_torchs_layers(
    kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Outputs, gradients and averages are those of float64; twice the same bits."""
    ours = _layer_on_cuda("fused", kind=kind, dtype=dtype)
    theirs = _layer_on_cuda("torch", kind=kind, dtype=torch.float64)
    again = _layer_on_cuda("fused", kind=kind, dtype=dtype)
    for one, other, same in zip(ours, theirs, again, strict=True):
        assert one.equal(same)
        assert _relative(one, other) < tolerance


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("width", "form"), [(4, "triton+merge4"), (14, "triton"), (40, "triton")]
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.bfloat16, 1e-2)]
)
def test_cuda_convolution_equals_torchs(
    width: int,
    form: str,
    stride: int,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Outputs and gradients; twice the same to the last bit."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    channels = 8 * width
    conv = Conv2d(channels, channels, 3, stride=stride, padding=1, groups=8, bias=False)
    conv = conv.to(CUDA).to(memory_format=torch.channels_last)
    results = []
    for one in ("plain", form, form):
        conv.form = one
        features = _randn(32, channels, 19, 17).to(CUDA, dtype).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = conv(features)
        grad = _randn(*out.shape, seed=1).to(CUDA, dtype)
        results.append((out, *torch.autograd.grad(out, [features, conv.weight], grad)))
    for plain, ours, again in zip(*results, strict=True):
        assert ours.equal(again) and ours.dtype == plain.dtype
        assert _relative(ours.detach(), plain.detach()) < tolerance


def _losses_on_cuda(*, kernels: Kernels, is_graph: bool) -> tuple[Tensor, Tensor]:
    """Losses of some steps of two seeds as one net, and its weights behind them."""
    spec = parse_spec("resnext11-8x4d-t8-in1-c4")
    convs = spec.layout(16).times(2).convs
    has_form = kernels == "fused"
    forms = {
        layers.conv_key(conv): "triton+merge4"
        for conv in convs
        if has_form and conv.groups == 16 and conv.kernel_size == 3
    }
    assert bool(forms) == has_form
    config = TrainConfig(
        epochs=1, precision="fp32", kernels=kernels, conv_forms=forms, batch_size=16
    )
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    one = learner.new_learner(
        spec, generators=generators, config=config, image_size=16, device=CUDA
    )
    capture = captures.CudaCapture(CUDA)
    step = graphs.GraphedStep(one, capture=capture) if is_graph else None
    wrong = torch.zeros(2, dtype=torch.int64, device=CUDA)
    losses = []
    for number in range(7):
        images = _randn(16, 2, 16, 16, seed=number).to(CUDA)
        batch = Batch(images, torch.arange(32, device=CUDA).view(16, 2) % 4)
        if step:
            found = step(batch, learning_rate=0.01, wrong=wrong)
        else:
            found = learner.update(one, batch, learning_rate=0.01, wrong=wrong)
        losses.append(found.clone())
    weights = torch.cat([p.detach().flatten() for p in one.model.parameters()])
    return torch.stack(losses), weights


@pytest.mark.gpu
@needs_cuda
def test_cuda_net_learns_as_with_torchs_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses of some steps agree; captured in a graph they are those of eager steps,
    and two runs end in the same weights to the last bit."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    theirs, their_weights = _losses_on_cuda(kernels="torch", is_graph=False)
    eager, weights = _losses_on_cuda(kernels="fused", is_graph=False)
    torch.testing.assert_close(eager, theirs, rtol=1e-3, atol=1e-4)
    assert _relative(weights, their_weights) < 1e-3
    again = _losses_on_cuda(kernels="fused", is_graph=False)
    assert again[0].equal(eager) and again[1].equal(weights)
    captured = _losses_on_cuda(kernels="fused", is_graph=True)
    torch.testing.assert_close(captured[0], eager, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@needs_cuda
def test_cuda_probes_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both kernels and every candidate of a convolution run and are timed."""
    monkeypatch.setenv("RESNEXT_ABLATE_CACHE", str(tmp_path))
    assert set(tuning._kernel_times_ms(CUDA)) == {"torch", "fused"}
    conv = _grouped("resnext11-8x14d-t8")
    found = tuning._times_ms(conv, batch_size=8, precision="bf16", device=CUDA)
    assert set(found) == set(
        tuning.candidate_forms(conv, precision="bf16", device=CUDA)
    )
