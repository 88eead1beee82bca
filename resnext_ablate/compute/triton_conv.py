"""A grouped convolution as Triton's kernels for CUDA, each group a product of matrices.

cuDNN has fast kernels for some widths of a group, and slow ones for the others. Here a
program computes some pixels of one group, all taps in a row; a group as wide as 14 or
24 channels is padded to 16 or 32 on the chip, never in memory. Features are dense
channels-last, in bfloat16, float16 or float32; sums are taken in float32. Gradients of
the weight are sums of parts, added up in the same order each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from resnext_ablate.compute.fused import dense
from resnext_ablate.compute.triton_parts import on_device_of, summed

_SMALLEST = 16
"""A side of the matrices that tensor cores multiply."""
_PIXELS = 64
"""Pixels of a block."""
_PROGRAMS = 1024
"""About how many take the gradient of a weight, so as to fill a large device."""
_LONGEST = 128
"""Blocks that one of them sums."""
_PARTS, _WEIGHTS = 16, 128
"""Partial sums, and weights, that are added up at once."""


@dataclass(frozen=True, slots=True)
class Grouped:
    """What a grouped convolution is beside its weight."""

    stride: int
    padding: int
    groups: int


def shape(conv: nn.Conv2d, merged: int) -> Grouped:
    """Of a module, so many of whose groups are computed as one."""
    return Grouped(int(conv.stride[0]), int(conv.padding[0]), conv.groups // merged)


def conv2d(features: Tensor, weight: Tensor, shape: Grouped) -> Tensor:
    """A convolution without bias, that autograd knows.

    Args:
        features: (N, in, H, W).
        weight: (out, in / groups, k, k), in any precision; computed in the features'.
        shape: of the convolution.

    Returns:
        (N, out, H / stride, W / stride), dense channels-last.
    """
    out: Tensor = _Conv.apply(features, weight, shape)
    return out


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, shape: Grouped) -> Tensor:
        features = dense(features)
        used = weight.to(features.dtype, memory_format=torch.channels_last)
        ctx.save_for_backward(features, used)
        ctx.shape, ctx.dtype = shape, weight.dtype
        return convolved(features, used, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        features, weight = ctx.saved_tensors
        grad, own, theirs = dense(grad), None, None
        if ctx.needs_input_grad[0]:
            own = features_gradient(grad, weight, ctx.shape, size=features.shape)
        if ctx.needs_input_grad[1]:
            theirs = weight_gradient(
                grad, features, ctx.shape, size=weight.shape, dtype=ctx.dtype
            )
        return own, theirs, None


def convolved(features: Tensor, weight: Tensor, shape: Grouped) -> Tensor:
    """As `conv2d`, of dense features and a weight in their precision."""
    count, _, *sides = features.shape
    kernel = weight.shape[-1]
    high, wide = (
        (side + 2 * shape.padding - kernel) // shape.stride + 1 for side in sides
    )
    out = _empty((count, len(weight), high, wide), like=features)
    _multiply(features, weight, out, shape, is_backward=False)
    return out


def features_gradient(
    grad: Tensor, weight: Tensor, shape: Grouped, *, size: torch.Size
) -> Tensor:
    """Of features (N, in, H, W) of a size, from that of the output; all dense."""
    out = _empty(size, like=grad)
    _multiply(grad, weight, out, shape, is_backward=True)
    return out


def weight_gradient(
    grad: Tensor,
    features: Tensor,
    shape: Grouped,
    *,
    size: torch.Size,
    dtype: torch.dtype,
) -> Tensor:
    """Of a weight (out, in / groups, k, k) of a size and precision, channels-last.

    Args:
        grad: of the output, dense.
        features: that the convolution saw, dense.
        shape: of the convolution.
        size, dtype: of the weight.
    """
    num_out, width, kernel, _ = size
    _, channels, high, wide = features.shape
    num_pixels = grad.numel() // num_out
    blocks = -(-num_pixels // _PIXELS)
    pieces = kernel * kernel * shape.groups
    num_parts = max(_PROGRAMS // pieces, -(-blocks // _LONGEST), 1)
    steps = -(-blocks // num_parts)
    num_parts = -(-blocks // steps)
    parts = grad.new_empty((num_parts, size.numel()), dtype=torch.float32)
    out = torch.empty((num_out, kernel, kernel, width), dtype=dtype, device=grad.device)
    own = num_out // shape.groups
    with on_device_of(grad):
        _weight_parts[(num_parts * pieces,)](
            features,
            grad,
            parts,
            num_pixels,
            *(high, wide, *grad.shape[2:]),
            *(channels, num_out, steps, shape.groups),
            *(own, width, kernel, shape.stride, shape.padding),
            _precision(),
            _PIXELS,
            _padded(own),
            _padded(width),
        )
        _add_parts[(-(-size.numel() // _WEIGHTS),)](
            parts, out, num_parts, size.numel(), _PARTS, _WEIGHTS
        )
    return out.permute(0, 3, 1, 2)


def _multiply(
    read: Tensor, weight: Tensor, written: Tensor, shape: Grouped, *, is_backward: bool
) -> None:
    """The output from the features, or backward their gradient from the output's."""
    num_pixels = written.numel() // written.shape[1]
    # A pixel has a number in int32, a value a place in int64.
    assert max(num_pixels, read.numel() // read.shape[1]) < 2**30
    weight = weight.contiguous(memory_format=torch.channels_last)
    widths = (read.shape[1] // shape.groups, written.shape[1] // shape.groups)
    programs = -(-num_pixels // _PIXELS) * shape.groups
    with on_device_of(read):
        _pixels[(programs,)](
            read,
            weight,
            written,
            num_pixels,
            *(*read.shape[2:], *written.shape[2:]),
            *(read.shape[1], written.shape[1], shape.groups),
            *(*widths, weight.shape[-1], shape.stride, shape.padding),
            is_backward,
            _precision(),
            _PIXELS,
            *map(_padded, widths),
        )


def _empty(size: tuple[int, ...], *, like: Tensor) -> Tensor:
    """(N, C, H, W), dense channels-last."""
    count, channels, high, wide = size
    return like.new_empty((count, high, wide, channels)).permute(0, 3, 1, 2)


def _padded(width: int) -> int:
    return max(_SMALLEST, int(triton.next_power_of_2(width)))


def _precision() -> str:
    """Of products of float32: as torch has them of cuDNN."""
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


@triton.jit
def _taken(
    number: tl.tensor,
    inside: tl.tensor,
    high: tl.tensor,
    wide: tl.tensor,
    tap: tl.tensor,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    read_high: tl.tensor,
    read_wide: tl.tensor,
    BACKWARD: tl.constexpr,
) -> Any:
    """The pixel that a tap reads for a pixel of (high, wide), and whether there is one.

    Backward, the pixel whose value the tap has made from this one.
    """
    row, column = (number // wide) % high, number % wide
    if BACKWARD:
        row = row + PADDING - tap // KERNEL
        column = column + PADDING - tap % KERNEL
        inside = inside & (row >= 0) & (column >= 0)
        inside = inside & (row % STRIDE == 0) & (column % STRIDE == 0)
        row, column = row // STRIDE, column // STRIDE
    else:
        row = row * STRIDE - PADDING + tap // KERNEL
        column = column * STRIDE - PADDING + tap % KERNEL
        inside = inside & (row >= 0) & (column >= 0)
    inside = inside & (row < read_high) & (column < read_wide)
    image = number // (wide * high)
    return ((image * read_high + row) * read_wide + column).to(tl.int64), inside


@triton.jit
def _pixels(
    read: tl.tensor,
    weight: tl.tensor,
    written: tl.tensor,
    num_pixels: tl.tensor,
    read_high: tl.tensor,
    read_wide: tl.tensor,
    high: tl.tensor,
    wide: tl.tensor,
    read_channels: tl.tensor,
    channels: tl.tensor,
    groups: tl.tensor,
    READ_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    READ_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # Groups beside each other share lines of the cache.
    group = tl.program_id(0) % groups
    number = tl.program_id(0) // groups * PIXELS + tl.arange(0, PIXELS)
    k, c = tl.arange(0, READ_BLOCK), tl.arange(0, BLOCK)
    taps: tl.constexpr = KERNEL * KERNEL
    fits = (k < READ_WIDTH)[:, None] & (c < WIDTH)[None, :]
    # The weight lies as (out, k, k, in / groups).
    if BACKWARD:
        rows, columns = (group * READ_WIDTH + k) * (taps * WIDTH), c
    else:
        rows, columns = k, (group * WIDTH + c) * (taps * READ_WIDTH)
    shift: tl.constexpr = WIDTH if BACKWARD else READ_WIDTH
    lines = weight + rows[:, None] + columns[None, :]
    total = tl.zeros([PIXELS, BLOCK], tl.float32)
    for tap in range(taps):
        taken, inside = _taken(
            number,
            number < num_pixels,
            high,
            wide,
            tap,
            KERNEL,
            STRIDE,
            PADDING,
            read_high,
            read_wide,
            BACKWARD,
        )
        place = (taken * read_channels)[:, None] + (group * READ_WIDTH + k)[None, :]
        there = inside[:, None] & (k < READ_WIDTH)[None, :]
        values = tl.load(read + place, mask=there, other=0.0)
        factors = tl.load(lines + tap * shift, mask=fits, other=0.0)
        total = tl.dot(values, factors, total, input_precision=PRECISION)
    place = (number.to(tl.int64) * channels)[:, None] + (group * WIDTH + c)[None, :]
    there = (number < num_pixels)[:, None] & (c < WIDTH)[None, :]
    tl.store(written + place, total.to(written.dtype.element_ty), mask=there)


@triton.jit
def _weight_parts(
    features: tl.tensor,
    grad: tl.tensor,
    parts: tl.tensor,
    num_pixels: tl.tensor,
    read_high: tl.tensor,
    read_wide: tl.tensor,
    high: tl.tensor,
    wide: tl.tensor,
    read_channels: tl.tensor,
    channels: tl.tensor,
    steps: tl.tensor,
    groups: tl.tensor,
    WIDTH: tl.constexpr,
    READ_WIDTH: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
    READ_BLOCK: tl.constexpr,
) -> None:
    taps: tl.constexpr = KERNEL * KERNEL
    tap = tl.program_id(0) % taps
    group = tl.program_id(0) // taps % groups
    part = tl.program_id(0) // (taps * groups)
    c, k = tl.arange(0, BLOCK), tl.arange(0, READ_BLOCK)
    total = tl.zeros([BLOCK, READ_BLOCK], tl.float32)
    for step in range(steps):
        number = (part * steps + step) * PIXELS + tl.arange(0, PIXELS)
        given = number < num_pixels
        taken, inside = _taken(
            number,
            given,
            high,
            wide,
            tap,
            KERNEL,
            STRIDE,
            PADDING,
            read_high,
            read_wide,
            False,
        )
        place = (number.to(tl.int64) * channels)[None, :] + (group * WIDTH + c)[:, None]
        there = given[None, :] & (c < WIDTH)[:, None]
        given_values = tl.load(grad + place, mask=there, other=0.0)
        place = (taken * read_channels)[:, None] + (group * READ_WIDTH + k)[None, :]
        there = inside[:, None] & (k < READ_WIDTH)[None, :]
        values = tl.load(features + place, mask=there, other=0.0)
        total = tl.dot(given_values, values, total, input_precision=PRECISION)
    # Parts lie as (out, k, k, in / groups).
    row = (group * WIDTH + c) * taps + tap
    place = row[:, None] * READ_WIDTH + k[None, :]
    size = channels * (taps * READ_WIDTH)
    there = (c < WIDTH)[:, None] & (k < READ_WIDTH)[None, :]
    tl.store(parts + part.to(tl.int64) * size + place, total, mask=there)


@triton.jit
def _add_parts(
    parts: tl.tensor,
    out: tl.tensor,
    num_parts: tl.tensor,
    num_weights: tl.tensor,
    PARTS: tl.constexpr,
    WEIGHTS: tl.constexpr,
) -> None:
    column = tl.program_id(0) * WEIGHTS + tl.arange(0, WEIGHTS)
    there = column < num_weights
    total = summed(parts, num_parts, num_weights, column, there, PARTS, WEIGHTS)
    tl.store(out + column, total.to(out.dtype.element_ty), mask=there)
