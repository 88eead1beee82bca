"""What the loops of bfloat16 pairs take and give, for `direct`.

Features are bfloat16 (N, C, H, W), channels-last, and so are their gradients.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from resnext_ablate.compute import bf16_group_loops, bf16_weight_loops
from resnext_ablate.compute.bf16_group_loops import Grid, Places, Steps, Words
from resnext_ablate.compute.bf16_weight_loops import Takers
from resnext_ablate.compute.dots import SUMS, WORDS
from resnext_ablate.compute.fused import empty, flat
from resnext_ablate.compute.taps import SIDE, TAPS, givers, rows_of

_WIDEST_MIXED = 8
"""Channels of a group that shares vectors with others."""
_BLOCK = 8
"""Channels of a group at most whose sums of a row of taps are held in registers."""


def forward(
    features: Tensor, weight: Tensor, *, stride: int, bias: Tensor | None = None
) -> Tensor:
    """As `direct.in_groups`."""
    count, channels, height, width = features.shape
    rows, columns = (height - 1) // stride + 1, (width - 1) // stride + 1
    out = empty(features, rows, columns)
    length = columns * channels
    grid = Grid(rows * length, 0, rows, columns, columns, length, channels)
    order = _order(*_widths(weight), rows_of(TAPS), (0, 1, 2), False)
    grids = ((_steps(order, weight, bias), grid),)
    shape = (count, height, width, channels)
    bf16_group_loops.convolve(
        flat(features), shape, (0,) * stride, (0,), grids, flat(out)
    )
    return out


def features_gradient(
    grad: Tensor, weight: Tensor, *, features: Tensor, stride: int
) -> Tensor:
    """The gradient of the features, from the dense one of the output."""
    count, channels, height, width = features.shape
    out = empty(features, height, width)
    length = width * channels
    # Two pixels of a row lie on one of the output's where the stride is 2.
    kernel = (2, 1, 0) if stride == 1 else (0, 1, 2)
    grids = []
    for top in range(min(stride, height)):
        rows = rows_of(givers(top, 0, stride))
        order = _order(*_widths(weight), rows, kernel, True)
        grid = Grid(
            image=height * length,
            start=top * length,
            rows=(height - top - 1) // stride + 1,
            columns=grad.shape[3],
            width=width,
            row_step=stride * length,
            column_step=channels,
        )
        grids.append((_steps(order, weight), grid))
    shape = (count, *grad.shape[2:], channels)
    bf16_group_loops.convolve(
        flat(grad), shape, (0,), (0,) * stride, tuple(grids), flat(out)
    )
    return out


def weight_gradient(
    grad: Tensor, features: Tensor, *, weight: Tensor, stride: int
) -> Tensor:
    """The gradient of a weight in float32, from dense tensors."""
    count, channels, height, width = features.shape
    group_width = weight.shape[1]
    plan = _plan(channels, group_width)
    totals = np.zeros((len(plan.chosen), SIDE, SIDE, len(plan.slots), SUMS))
    bf16_weight_loops.weight_gradient(
        flat(features),
        flat(grad),
        (count, height, width, channels),
        (0,) * stride,
        plan.takers,
        plan.block,
        totals,
    )
    out = np.empty(tuple(weight.shape), np.float32)
    lanes = plan.chosen - plan.takers.begins[:, None]
    found = totals.transpose(0, 4, 3, 1, 2)[np.arange(len(lanes))[:, None], lanes]
    out[plan.chosen[:, :, None], plan.slots] = found
    return torch.from_numpy(out)


class _Order(NamedTuple):
    """`Steps` without weights, and where each factor lies in a flat weight."""

    rows: Places
    pairs: Places
    begins: Places
    counts: Places
    windows: Places
    lanes: Words
    shared: tuple[int, ...]
    factors: Places
    """One past the last where there is none."""


def _steps(order: _Order, weight: Tensor, bias: Tensor | None = None) -> Steps:
    """What a pixel takes, by the bits of a weight in bfloat16, and starts from."""
    starts = np.zeros((len(order.begins), SUMS), np.float32)
    if bias is not None:
        own = np.arange(order.counts[0])
        starts[:, own] = bias.float().numpy()[order.begins[:, None] + own]
    bits = np.append(weight.contiguous().view(torch.uint16).numpy(), np.uint16(0))
    return Steps(*order[:-1], factors=bits[order.factors], starts=starts.reshape(-1))


@lru_cache(maxsize=128)  # More than a net has; wide groups take megabytes each.
def _order(
    channels: int,
    group_width: int,
    rows: tuple[tuple[int, int], ...],
    kernel_columns: tuple[int, int, int],
    is_gradient: bool,
) -> _Order:
    """What a pixel takes from its taps.

    Args:
        channels: C of a weight (C, d, 3, 3).
        group_width: its d.
        rows: of its taps, from the pixel and of the kernel.
        kernel_columns: of the three taps of a row.
        is_gradient: whether channels take what they have given.
    """
    chosen, windows, first = _vectors(channels, group_width)
    num_pairs, count = (group_width + 1) // 2, chosen.shape[1]
    is_shared = group_width > _WIDEST_MIXED
    inside = np.arange(2 * num_pairs)
    # An odd width's last pair takes one channel for nothing: its own, or the one before
    # where the two must be neighbours.
    taken, is_idle = np.minimum(inside, group_width - 1), inside >= group_width
    if is_shared and group_width % 2:
        taken[-2:], is_idle[-2:] = inside[-3:-1], (True, False)
    pairs = taken[::2] if is_shared else np.arange(num_pairs) * WORDS
    lanes = (first - windows[:, None])[:, :, None] + taken
    own = chosen - first
    if is_gradient:
        places = (first[:, :, None] + taken) * group_width + own[:, :, None]
    else:
        places = chosen[:, :, None] * group_width + taken
    shifts, kernel_rows = np.array(rows).T
    kernel = SIDE * kernel_rows[:, None] + np.array(kernel_columns)
    by_tap = places[..., None] * SIDE**2 + kernel.reshape(-1)
    nothing = channels * group_width * SIDE**2
    by_tap[:, :, is_idle] = nothing
    # Lanes without a channel take nothing.
    beyond = ((0, 0), (0, SUMS - count), (0, 0), (0, 0))
    by_tap = np.pad(by_tap, beyond, constant_values=nothing)
    split = (len(chosen), SUMS, num_pairs, 2)
    lanes = lanes.reshape(split).transpose(0, 2, 1, 3) if not is_shared else lanes[:0]
    by_row = by_tap.reshape(*split, len(rows), SIDE)
    return _Order(
        rows=np.repeat(shifts, num_pairs),
        pairs=np.tile(pairs, len(rows)),
        begins=chosen[:, 0].copy(),
        counts=np.full(len(chosen), count),
        windows=windows,
        lanes=lanes.astype(np.uint16).reshape(-1),
        shared=(0, 0) if is_shared else (0,),
        factors=by_row.transpose(0, 4, 2, 5, 1, 3).reshape(-1),
    )


class _WeightPlan(NamedTuple):
    """What `weight_gradient` takes, and what its totals are of."""

    takers: Takers
    block: tuple[int, ...]
    chosen: Places
    """(vectors, channels of each): which those are."""
    slots: Places
    """By place in the totals, the channel within a group."""


@lru_cache(maxsize=1024)
def _plan(channels: int, group_width: int) -> _WeightPlan:
    slots, held = np.arange(group_width), SUMS
    firsts = np.zeros(1, np.int64)
    block: tuple[int, ...] = (0,)
    if group_width > _WIDEST_MIXED:
        chosen, _, _ = _vectors(channels, group_width)
        held = max(SUMS, group_width)
        num_blocks = -(-group_width // _BLOCK)
        block = (0,) * -(-group_width // num_blocks)
        # The last block has some channels once more where it is not full.
        firsts = np.arange(num_blocks) * len(block)
        firsts = np.minimum(firsts, group_width - len(block))
        slots = (firsts[:, None] + np.arange(len(block))).reshape(-1)
    else:
        count = SUMS // group_width * group_width  # Of whole groups.
        chosen = np.minimum(np.arange(0, channels, count), channels - count)
        chosen = chosen[:, None] + np.arange(count)
    # Whole vectors are read, also where groups fill none.
    begins = np.minimum(chosen[:, 0], channels - SUMS)
    groups = chosen[:, 0] // group_width * group_width
    windows = np.minimum(groups, channels - held)
    # Those of other vectors take anything.
    near = begins[:, None] + np.arange(SUMS)
    lanes = (near // group_width * group_width - begins[:, None])[:, None, :]
    lanes = np.clip(lanes + slots[:, None], 0, SUMS - 1)
    takers = Takers(
        begins=begins,
        windows=windows,
        held=held,
        lanes=lanes.astype(np.uint32).reshape(-1),
        shifts=groups - windows,
        firsts=firsts,
    )
    return _WeightPlan(takers, block, chosen, slots)


@lru_cache
def _vectors(channels: int, group_width: int) -> tuple[Places, Places, Places]:
    """The channels (vectors, ...) of each vector, its window, its groups' firsts."""
    if group_width > _WIDEST_MIXED:
        count = min(group_width, SUMS)
        inside = np.minimum(np.arange(0, group_width, SUMS), group_width - count)
        groups = np.arange(0, channels, group_width)
        chosen = (groups[:, None] + inside).reshape(-1, 1) + np.arange(count)
        windows = np.repeat(groups, len(inside))
        return chosen, windows, np.broadcast_to(windows[:, None], chosen.shape)
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
