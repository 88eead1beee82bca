"""What the loops of float32 take and give, for `direct`.

Features are float32 (N, C, H, W), channels-last, and so are their gradients.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from resnext_ablate.compute import fp32_group_loops as loops
from resnext_ablate.compute.fp32_group_loops import Grids
from resnext_ablate.compute.fused import empty, flat
from resnext_ablate.compute.row_loops import (
    SUMS,
    WIDEST_MIXED,
    Floats,
    Places,
    Vectors,
)
from resnext_ablate.compute.taps import SIDE, TAPS, Taps, corners, givers


def forward(
    features: Tensor, weight: Tensor, *, stride: int, bias: Tensor | None = None
) -> Tensor:
    """As `direct.in_groups`."""
    count, channels, height, width = features.shape
    rows, columns = (height - 1) // stride + 1, (width - 1) // stride + 1
    out = empty(features, rows, columns)
    order = _order(channels, weight.shape[1], (TAPS,), False)
    starts = np.zeros((len(order.channels), SUMS), np.float32)
    if bias is not None:
        given = bias.detach().float().numpy()
        np.put_along_axis(starts, order.lanes, given[order.channels], axis=1)
    length = columns * channels
    grids = Grids(
        starts=np.array([[0, rows, columns, len(TAPS)]]),
        row_step=length,
        pixel_step=channels,
        image_step=rows * length,
        taps=order.taps,
    )
    loops.convolve(
        flat(features),
        (count, height, width, channels),
        stride,
        order.vectors,
        grids,
        _factors(weight, order),
        starts.reshape(-1),
        flat(out),
    )
    return out


def features_gradient(
    grad: Tensor, weight: Tensor, *, features: Tensor, stride: int
) -> Tensor:
    """The gradient of the features, from the dense one of the output."""
    count, channels, height, width = features.shape
    out = empty(features, height, width)
    begun = corners(height, width, stride)
    taps = tuple(givers(*corner, stride) for corner in begun)
    order = _order(channels, weight.shape[1], taps, True)
    length = width * channels
    tops, lefts = np.array(begun).T
    begins = tops * length + lefts * channels
    rows, columns = (height - tops - 1) // stride + 1, (width - lefts - 1) // stride + 1
    ends = np.cumsum([len(each) for each in taps])
    grids = Grids(
        starts=np.stack([begins, rows, columns, ends], axis=1),
        row_step=stride * length,
        pixel_step=stride * channels,
        image_step=height * length,
        taps=order.taps,
    )
    loops.convolve(
        flat(grad),
        (count, *grad.shape[2:], channels),
        1,
        order.vectors,
        grids,
        _factors(weight, order),
        np.zeros(order.channels.shape[0] * SUMS, np.float32),
        flat(out),
    )
    return out


def weight_gradient(
    grad: Tensor, features: Tensor, *, weight: Tensor, stride: int
) -> Tensor:
    """The gradient of a weight in float32, from dense tensors."""
    count, channels, height, width = features.shape
    group_width = weight.shape[1]
    vectors, chosen, lanes = _vectors(channels, group_width)
    totals = np.zeros((len(chosen), SIDE, SIDE, group_width, SUMS))
    shape = (count, height, width, channels)
    loops.weight_gradient(flat(features), flat(grad), shape, stride, vectors, totals)
    out = np.empty(tuple(weight.shape), np.float32)
    vector = np.arange(len(chosen))[:, None]
    out[chosen] = totals.transpose(0, 4, 3, 1, 2)[vector, lanes]
    return torch.from_numpy(out)


class _Order(NamedTuple):
    """What pixels take, of one grid or more."""

    vectors: Vectors
    channels: Places
    """(vectors, channels of each): which those are."""
    lanes: Places
    """Of those channels."""
    taps: Places
    """As those of `Grids`."""
    factors: Places
    """Where each factor lies in a flat weight; one past the last for none."""


@lru_cache(maxsize=128)  # More than a net has; wide groups take megabytes each.
def _order(
    channels: int, group_width: int, grids: tuple[Taps, ...], is_gradient: bool
) -> _Order:
    """What the pixels of each grid take from its taps.

    Args:
        channels: C of a weight (C, d, 3, 3).
        group_width: its d.
        grids: the taps of each.
        is_gradient: whether channels take what they have given.
    """
    vectors, chosen, lanes = _vectors(channels, group_width)
    taps = np.array([tap for grid in grids for tap in grid])
    first, taken = chosen // group_width * group_width, np.arange(group_width)
    if is_gradient:
        places = (first[:, :, None] + taken) * group_width
        places += (chosen - first)[:, :, None]
    else:
        places = chosen[:, :, None] * group_width + taken
    by_tap = places[..., None] * SIDE**2 + taps[:, 2:] @ (SIDE, 1)
    nothing = channels * group_width * SIDE**2
    factors = np.full((len(chosen), len(taps), group_width, SUMS), nothing)
    vector = np.arange(len(chosen))[:, None]
    factors[vector, :, :, lanes] = by_tap.transpose(0, 1, 3, 2)
    return _Order(
        vectors=vectors,
        channels=chosen,
        lanes=lanes,
        taps=taps[:, :2].copy(),
        factors=factors.reshape(-1),
    )


@lru_cache
def _vectors(channels: int, group_width: int) -> tuple[Vectors, Places, Places]:
    """Whole groups side by side, or one, or a part of one; with the channels and lanes
    of each vector, (vectors, channels of each)."""
    is_shared = group_width > WIDEST_MIXED
    if is_shared:
        count = min(group_width, SUMS)
        inside = np.minimum(np.arange(0, group_width, SUMS), group_width - count)
        begins = (np.arange(0, channels, group_width)[:, None] + inside).reshape(-1)
    else:
        count = SUMS // group_width * group_width
        # The last has some channels once more where it would not be full.
        begins = np.minimum(np.arange(0, channels, count), channels - count)
    windows = np.minimum(begins, channels - SUMS)
    firsts = begins - windows
    own = np.arange(count)
    vectors = Vectors(
        windows=windows,
        firsts=firsts,
        groups=begins // group_width * group_width,
        width=group_width,
        is_shared=(0, 0) if is_shared else (0,),
    )
    return vectors, begins[:, None] + own, firsts[:, None] + own


def _factors(weight: Tensor, order: _Order) -> Floats:
    """The factors of an order, of a weight in float32."""
    flat_weight = weight.detach().contiguous().numpy().reshape(-1)
    factors: Floats = np.append(flat_weight, np.float32(0))[order.factors]
    return factors
