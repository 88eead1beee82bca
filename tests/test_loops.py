"""Compiled loops over activations, against NumPy, whatever the length of a row."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resnext_ablate.compute import lanes, loops, traversal_loops

CHANNELS = (1, 3, 22, 31, 32, 70)
"""Rows shorter than a vector, of whole vectors, and with something left."""


def _stored(values: npt.NDArray[np.float32], kind: str) -> loops.Activations:
    """As float32, or as the bits of the nearest bfloat16."""
    if kind == "fp32":
        return values
    bits: loops.Activations = (
        torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    )
    return bits


def _values(stored: loops.Activations) -> npt.NDArray[np.float64]:
    if stored.dtype == np.float32:
        return stored.astype(np.float64)
    exact: npt.NDArray[np.float64] = (
        torch.from_numpy(stored).view(torch.bfloat16).double().numpy()
    )
    return exact


def _close(ours: loops.Activations, theirs: npt.NDArray[np.float64]) -> None:
    tolerance = 1e-5 if ours.dtype == np.float32 else 2**-8
    np.testing.assert_allclose(_values(ours), theirs, rtol=tolerance, atol=tolerance)


def _drawn(kind: str, *, rows: int, channels: int) -> list[loops.Activations]:
    draw = np.random.default_rng(rows * channels)
    size = (3, rows, channels)
    return [_stored(one, kind) for one in draw.normal(size=size).astype(np.float32)]


def _normed(y: loops.Activations) -> loops.PerChannel:
    channels = y.shape[1]
    weight = np.linspace(0.5, 1.5, channels, dtype=np.float32)
    bias = np.linspace(-0.3, 0.3, channels, dtype=np.float32)
    averages = np.zeros((2, channels), np.float32)
    moments = loops.moments(y, channels)
    normed: loops.PerChannel = loops.normalise(
        moments, len(y), weight, bias, *averages, 0.1, 1e-5
    )
    np.testing.assert_allclose(averages[0], 0.1 * normed[0], rtol=1e-6)
    return normed


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_every_column_counts_once(channels: int, kind: str) -> None:
    """Statistics, outputs and gradients of 150 rows: twice 64 and a rest."""
    y, z, grad = _drawn(kind, rows=150, channels=channels)
    own, theirs = _normed(y), _normed(z)
    y_values, z_values, g = _values(y), _values(z), _values(grad)
    np.testing.assert_allclose(own[0], y_values.mean(axis=0), atol=1e-6)
    std = np.sqrt(y_values.var(axis=0) + 1e-5)
    np.testing.assert_allclose(own[1], 1 / std, rtol=1e-5)

    out = np.empty_like(y)
    loops.relu(y, own, out)
    before = own[2] * y_values + own[3]
    _close(out, before.clip(0))
    passed = np.where(before > 0, g, 0)
    sums = loops.relu_sums(grad, y, own)
    expected = [passed.sum(axis=0), (passed * (y_values - own[0])).sum(axis=0)]
    np.testing.assert_allclose(sums, expected, atol=1e-4)
    lines = np.array([own[0], own[1], own[2], own[3] + 1], np.float32)
    loops.relu_backward(grad, y, own, lines, out)
    _close(out, own[2] * passed + lines[2] * y_values + lines[3])

    loops.relu_of_sum(y, own, z, theirs, out)
    before = before + theirs[2] * z_values + theirs[3]
    _close(out, before.clip(0))
    passed = np.where(before > 0, g, 0)
    sums = loops.relu_of_sum_sums(grad, y, z, own, theirs)
    expected = [passed.sum(axis=0)] + [
        (passed * (values - normed[0])).sum(axis=0)
        for values, normed in ((y_values, own), (z_values, theirs))
    ]
    np.testing.assert_allclose(sums, expected, atol=1e-4)
    outs = (np.empty_like(y), np.empty_like(y))
    loops.relu_of_sum_backward(grad, y, z, (own, theirs), (lines, theirs), *outs)
    _close(outs[0], own[2] * passed + lines[2] * y_values + lines[3])
    _close(outs[1], theirs[2] * passed + theirs[2] * z_values + theirs[3])

    held = _values(out)
    loops.add(out[None, :, None], z[None, :, None], 1)
    _close(out, held + z_values)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("stride", "channels"), [(1, 24), (2, 64), (2, 33), (3, 7)])
def test_addition_to_every_second_pixel(
    precision: str, stride: int, channels: int
) -> None:
    """Pixels between them stay; odd sides, and channels that fill no vector."""
    draws = np.random.default_rng(0)
    total, part = (
        _stored(draws.normal(size=size).astype(np.float32), precision).copy()
        for size in (
            (2, 7, 8, channels),
            (2, -(-7 // stride), -(-8 // stride), channels),
        )
    )
    expected = _values(total).copy()
    expected[:, ::stride, ::stride] += _values(part)
    loops.add(total, part, stride)
    _close(total, expected)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_what_no_cache_holds_is_the_same(kind: str) -> None:
    """Sums go along rows: outputs are to the bit those of its parts, sums near theirs;
    columns that fill a vector, and a rest."""
    channels = 120
    rows = traversal_loops._CACHED // (2 * channels) + 1001
    y, z, grad = _drawn(kind, rows=rows, channels=channels)
    own, theirs = norms = (_normed(y), _normed(z))
    np.testing.assert_allclose(own[0], _values(y).mean(axis=0), atol=1e-6)

    def passed(some: slice) -> tuple[list[loops.Activations], loops.Sums]:
        g, values, others = grad[some], y[some], z[some]
        outs = [np.empty_like(values) for _ in range(5)]
        loops.relu(values, own, outs[0])
        loops.relu_of_sum(values, own, others, theirs, outs[1])
        loops.relu_backward(g, values, own, theirs, outs[2])
        loops.relu_of_sum_backward(g, values, others, norms, norms, *outs[3:])
        sums = loops.relu_sums(g, values, own)
        return outs, np.concatenate(
            [sums, loops.relu_of_sum_sums(g, values, others, own, theirs)]
        )

    outs, sums = passed(slice(0, rows))
    total = np.zeros_like(sums)
    for first in range(0, rows, 1000):
        some = slice(first, first + 1000)
        own_outs, own_sums = passed(some)
        total += own_sums
        for whole, one in zip(outs, own_outs, strict=True):
            assert np.array_equal(whole[some], one)
    np.testing.assert_allclose(sums, total, rtol=1e-5, atol=1e-3)


def _rounding() -> Callable[..., None]:
    """A loop that stores float32 values as they are given, compiled anew."""

    def stored(i: int, j: int, nothing: Any, exact: Any, out: Any) -> None:
        lanes.store(out, (i, j), lanes.load(exact, (i, j), nothing))

    over = traversal_loops.everywhere(stored)

    @numba.njit
    def rounding(shape: tuple[int, int], arguments: Any) -> None:
        over(shape, arguments)

    return rounding


ROUND = _rounding()


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_subnormal=False), min_size=1, max_size=70))
def test_bfloat16_is_rounded_as_torch_rounds_it(values: list[float]) -> None:
    """To nearest, ties to even; infinities stay, and what is no number stays none."""
    exact = np.array([values], np.float32)
    ours = np.zeros(exact.shape, np.uint16)
    ROUND(exact.shape, (exact, ours))
    np.testing.assert_array_equal(_values(ours), _values(_stored(exact, "bf16")))


@given(st.lists(st.floats(width=32, allow_subnormal=False), min_size=1, max_size=70))
def test_relu_lets_pass_what_is_no_number(values: list[float]) -> None:
    """Zero for zero and less; NaN is not hidden."""
    exact = np.array([values], np.float32)
    identity = np.array([[0], [1], [1], [0]], np.float32).repeat(len(values), axis=1)
    loops.relu(exact, identity, positive := np.empty_like(exact))
    np.testing.assert_array_equal(positive, np.where(exact <= 0, 0, exact))


def test_ties_go_to_even() -> None:
    """1 + 2^-8 lies between two neighbours of bfloat16; so does 1 + 3 2^-8."""
    total = _stored(np.array([[1.0, 1.0 + 2**-7]], np.float32), "bf16").copy()
    part = _stored(np.array([[2**-8, 2**-8]], np.float32), "bf16")
    loops.add(total[None, :, None], part[None, :, None], 1)
    assert _values(total).tolist() == [[1.0, 1.0 + 2**-6]]


@pytest.mark.parametrize("has_instruction", [True, False])
def test_rounding_without_the_cpus_help_is_the_same(
    monkeypatch: pytest.MonkeyPatch, has_instruction: bool
) -> None:
    """A CPU without an instruction for it computes the same bits."""
    if has_instruction and not lanes._ROUNDS:
        pytest.skip("this CPU has none")
    monkeypatch.setattr(lanes, "_ROUNDS", has_instruction)
    draw = np.random.default_rng(0)
    exact = draw.normal(size=(64, 40)).astype(np.float32)
    exact[:, ::2] += np.float32(2**-8)
    exact[0, :4] = [1 + 2**-8, 1 + 3 * 2**-8, np.inf, -np.inf]
    # Neither number: the bits below a bfloat16's would carry.
    exact.view(np.uint32)[1, :2] = [0x7F800001, 0xFFFFFFFF]
    out = np.zeros(exact.shape, np.uint16)
    _rounding()(exact.shape, (exact, out))
    np.testing.assert_array_equal(_values(out), _values(_stored(exact, "bf16")))


_ONE_LOOP = """
import json, numpy as np
from resnext_ablate.compute import loops
values = np.ones((1, 32), np.float32)
loops.relu(values, loops.identity(np.ones((4, 32), np.float32)), values)
hits = sum(loops.relu.stats.cache_hits.values())
print(json.dumps([float(values.max()), hits]))
"""


def test_loops_kept_on_disk_end_with_the_code_they_are_made_from(
    tmp_path: Path,
) -> None:
    """A second process compiles nothing; one in whose release another file of the
    loops has changed runs nothing of the old one."""
    package = Path(lanes.__file__).parents[1]
    shutil.copytree(
        package,
        tmp_path / package.name,
        ignore=shutil.ignore_patterns("__pycache__", "assets"),
    )

    def result() -> list[float]:
        done = subprocess.run(
            [sys.executable, "-c", _ONE_LOOP],
            cwd=tmp_path,
            env={
                "PYTHONPATH": str(tmp_path),
                "NUMBA_CACHE_DIR": str(tmp_path / "kept"),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        answer: list[float] = json.loads(done.stdout)
        return answer

    assert [result(), result()] == [[1, 0], [1, 1]]
    lanes_file = tmp_path / package.name / "compute" / "lanes.py"
    code = lanes_file.read_text(encoding="utf-8")
    changed = code.replace('fcmp_ordered("<=", ', 'fcmp_ordered(">=", ')
    assert changed != code
    lanes_file.write_text(changed, encoding="utf-8")
    assert result() == [0, 0]
