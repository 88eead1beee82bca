"""Convolutions of narrow groups by compiled loops of a CPU, as differentiable steps.

Features are bfloat16 (N, C, H, W), channels-last, and so are their gradients.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from resnext_ablate.compute import group_loops
from resnext_ablate.compute.dots import HAS_DOTS, SUMS, WORDS
from resnext_ablate.compute.fused import dense, pixels
from resnext_ablate.compute.group_loops import SIDE, Grid, Pairs, Places, Steps, Words

_Taps = tuple[tuple[int, int, int, int], ...]
"""By row: rows and columns from a pixel, and those of the kernel."""
_SQUARE = [(row, column) for row in range(SIDE) for column in range(SIDE)]
_TAPS: _Taps = tuple((row - 1, column - 1, row, column) for row, column in _SQUARE)


def is_possible(features: Tensor) -> bool:
    """Whether the loops can read these features on the CPU at hand."""
    return (
        HAS_DOTS
        and features.device.type == "cpu"
        and features.dtype == torch.bfloat16
        and features.numel() > 0
    )


def convolve(features: Tensor, weight: Tensor, *, stride: int) -> Tensor:
    """A 3 x 3 convolution in groups, with a pixel of zeros around the image.

    Args:
        features: (N, C, H, W), C at least 16.
        weight: (C, d, 3, 3) in any precision, d at most 16; taken in bfloat16.
        stride: 1 or 2.

    Returns:
        (N, C, ceil(H / stride), ceil(W / stride)).
    """
    out: Tensor = _Convolution.apply(features, weight, stride)
    return out


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, stride: int) -> Tensor:
        """See `convolve`."""
        features = dense(features)
        ctx.save_for_backward(features, weight)
        ctx.stride = stride
        return forward(features, weight.to(features.dtype), stride=stride)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of the features and of the weight."""
        features, weight = ctx.saved_tensors
        grad = dense(grad)
        narrow = weight.to(features.dtype)
        out = features_gradient(grad, narrow, features=features, stride=ctx.stride)
        weight_grad = weight_gradient(grad, features, weight=weight, stride=ctx.stride)
        return out, weight_grad, None


def forward(features: Tensor, weight: Tensor, *, stride: int) -> Tensor:
    """As `convolve`, of dense features and a weight in bfloat16."""
    count, channels, height, width = features.shape
    rows, columns = (height - 1) // stride + 1, (width - 1) // stride + 1
    out = _empty(features, rows, columns)
    length = columns * channels
    grid = Grid(rows * length, 0, rows, columns, length, channels)
    steps = _steps(_order(*_widths(weight), _TAPS, False), weight)
    shape = (count, height, width, channels)
    group_loops.convolve(_flat(features), shape, stride, ((steps, grid),), _flat(out))
    return out


def features_gradient(
    grad: Tensor, weight: Tensor, *, features: Tensor, stride: int
) -> Tensor:
    """The gradient of the features, from the dense one of the output."""
    count, channels, height, width = features.shape
    out = _empty(features, height, width)
    length = width * channels
    grids = []
    # Pixels in even and in odd rows and columns were seen by different taps.
    for top in range(min(stride, height)):
        for left in range(min(stride, width)):
            grid = Grid(
                image=height * length,
                start=top * length + left * channels,
                rows=(height - top - 1) // stride + 1,
                columns=(width - left - 1) // stride + 1,
                row_step=stride * length,
                column_step=stride * channels,
            )
            order = _order(*_widths(weight), _givers(top, left, stride), True)
            grids.append((_steps(order, weight), grid))
    shape = (count, *grad.shape[2:], channels)
    group_loops.convolve(_flat(grad), shape, 1, tuple(grids), _flat(out))
    return out


def weight_gradient(
    grad: Tensor, features: Tensor, *, weight: Tensor, stride: int
) -> Tensor:
    """The gradient of a weight, (C, d, 3, 3) in its precision, from dense tensors."""
    count, channels, height, width = features.shape
    group_width = weight.shape[1]
    chosen, windows, lanes = _takers(channels, group_width)
    # Where groups end with their vectors, half of a window is enough.
    is_near = SUMS % group_width == 0
    totals = np.zeros((len(chosen), SIDE, SIDE, group_width, SUMS))
    shape = (count, height, width, channels)
    group_loops.weight_gradient(
        _flat(features),
        _flat(grad),
        shape,
        (0,) * stride,
        chosen[:, 0].copy(),
        windows,
        (0,) if is_near else (0, 0),
        lanes,
        totals,
    )
    out = np.empty(tuple(weight.shape), np.float32)
    out[chosen] = totals.transpose(0, 4, 3, 1, 2)
    return torch.from_numpy(out).to(weight.dtype)


class _Order(NamedTuple):
    """`Steps` without weights, and where each factor lies in a flat weight."""

    rows: Places
    columns: Places
    pairs: Places
    begins: Places
    windows: Places
    lanes: Words
    factors: Places
    """One past the last where there is none."""


def _steps(order: _Order, weight: Tensor) -> Steps:
    """What a pixel takes, by the bits of a weight in bfloat16."""
    bits = np.append(weight.contiguous().view(torch.uint16).numpy(), np.uint16(0))
    return Steps(*order[:-1], factors=bits[order.factors])


@lru_cache(maxsize=1024)
def _order(
    channels: int,
    group_width: int,
    taps: _Taps,
    is_gradient: bool,
) -> _Order:
    """What a pixel takes from its taps.

    Args:
        channels: C of a weight (C, d, 3, 3).
        group_width: its d.
        taps: of the pixel.
        is_gradient: whether channels take what they have given.
    """
    chosen, windows, first = _vectors(channels, group_width)
    num_pairs = (group_width + 1) // 2
    # An odd width's last pair takes its one channel twice, the second time for nothing.
    inside = np.arange(2 * num_pairs)
    taken = np.minimum(inside, group_width - 1)
    lanes = (first - windows[:, None])[:, :, None] + taken
    own = chosen - first
    if is_gradient:
        places = (first[:, :, None] + taken) * group_width + own[:, :, None]
    else:
        places = chosen[:, :, None] * group_width + taken
    rows, columns, *kernel = (np.array(each) for each in zip(*taps, strict=True))
    by_tap = places[..., None] * SIDE**2 + SIDE * kernel[0] + kernel[1]
    by_tap[:, :, inside >= group_width] = channels * group_width * SIDE**2
    split = (*chosen.shape, num_pairs, 2)
    return _Order(
        rows=np.repeat(rows, num_pairs),
        columns=np.repeat(columns, num_pairs),
        pairs=np.tile(np.arange(num_pairs) * WORDS, len(taps)),
        begins=chosen[:, 0].copy(),
        windows=windows,
        lanes=lanes.reshape(split).transpose(0, 2, 1, 3).astype(np.uint16).reshape(-1),
        factors=by_tap.reshape(*split, -1).transpose(0, 4, 2, 1, 3).reshape(-1),
    )


@lru_cache
def _givers(top: int, left: int, stride: int) -> _Taps:
    """The taps that have seen a pixel, by its row and column modulo the stride."""
    taps = (
        ((top + 1 - row) // stride, (left + 1 - column) // stride, row, column)
        for row, column in _SQUARE
        if (top + 1 - row) % stride == 0 == (left + 1 - column) % stride
    )
    return tuple(sorted(taps))


@lru_cache(maxsize=1024)
def _takers(channels: int, group_width: int) -> tuple[Places, Places, Pairs]:
    """Channels, windows and lanes as `group_loops.weight_gradient` takes them."""
    chosen, windows, first = _vectors(channels, group_width)
    if SUMS % group_width == 0:  # No group reaches out of its vector.
        windows = chosen[:, 0].copy()
    inside = np.arange(group_width)[:, None]
    lanes = (first - windows[:, None])[:, None, :] + inside
    return chosen, windows, lanes.astype(np.uint32).reshape(-1)


@lru_cache
def _vectors(channels: int, group_width: int) -> tuple[Places, Places, Places]:
    """The channels (vectors, SUMS) of each vector, its window, its groups' firsts."""
    begins = [0]
    while begins[-1] + SUMS < channels:
        begin = min(begins[-1] + SUMS, channels - SUMS)
        # Some channels twice where the groups of a whole vector would fill no window.
        while _reach(begin, group_width) > WORDS:
            begin -= 1
        begins.append(begin)
    chosen = np.array(begins)[:, None] + np.arange(SUMS)
    first = chosen // group_width * group_width
    return chosen, np.minimum(first[:, 0], max(channels - WORDS, 0)), first


def _reach(begin: int, group_width: int) -> int:
    """Channels of all groups that have one in the vector from `begin` on."""
    end = -(-(begin + SUMS) // group_width) * group_width
    return end - begin // group_width * group_width


def _widths(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _empty(like: Tensor, height: int, width: int) -> Tensor:
    count, channels = like.shape[:2]
    size = (count, height, width, channels)
    return torch.empty(size, dtype=like.dtype).permute(0, 3, 1, 2)


def _flat(features: Tensor) -> Words:
    words: Words = pixels(features.detach()).view(-1).view(torch.uint16).numpy()
    return words
