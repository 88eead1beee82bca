"""Batch norm, ReLU and the residual addition in one pass, as Triton's kernels for CUDA.

The operations of `loops` under the same names, on a device. Activations are (M, C), one
pixel a row, in bfloat16, float16 or float32; what is per channel is float32 (4, C), as
`normalise` and `gradients` return it. Sums are taken in float32 by tiles, in float64
over those, and in the same order each time. Nothing waits for the device, so that a
CUDA graph can hold it all.

The kernels see rows of one or more pixels (R, L), so that L is a multiple of 16 where
the number of pixels allows: only then are 16 bytes read at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from resnext_ablate.compute import triton_kernels as kernels
from resnext_ablate.compute.triton_parts import on_device_of

_ALIGNED = 16
_WIDEST = 128
"""Columns of a tile at most."""
_TILE = 2048
"""Values of a tile."""
_PROGRAMS = 1024
"""Those that take sums, at most: they fill a large device, and are quickly added up."""
_PARTS, _CHANNELS = 256, 16
"""Partial sums, and channels, that are added up at once."""


def normalise(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_variance: Tensor,
    num_batches: Tensor,
    momentum: float,
    epsilon: float,
) -> Tensor:
    """A batch norm on a batch, as the affine map that it is; moves running averages.

    Args:
        y: (M, C).
        weight, bias, running_mean, running_variance: float32 (C,).
        num_batches: int64 (), goes up by one.
        momentum: what this batch weighs in the running averages.
        epsilon: added to the variance.

    Returns:
        (4, C): mean, 1 / standard deviation, scale and offset of each channel.
    """
    count, channels = y.shape
    sums = _partial_sums(kernels.moments, y, kinds=2)
    normed = y.new_empty((4, channels), dtype=torch.float32)
    with on_device_of(y):
        kernels.finish_norm[(-(-channels // _CHANNELS),)](
            y,
            sums,
            weight,
            bias,
            running_mean,
            running_variance,
            num_batches,
            normed,
            sums.shape[1],
            channels,
            count,
            momentum,
            epsilon,
            _PARTS,
            _CHANNELS,
            num_warps=8,
        )
    return normed


def gradients(normed: Tensor, sums: Tensor, products: Tensor, count: int) -> Tensor:
    """Of a batch norm, from partial sums over the batch of g and of g (y - mean).

    Args:
        normed: as `normalise` returns.
        sums: float32 (P, C), of the gradient g behind the ReLU.
        products: (P, C).
        count: values of a channel.

    Returns:
        (4, C): gradients of weight and bias; slope and level of the input's, which is
        scale g + slope y + level.
    """
    num_parts, channels = sums.shape
    out = torch.empty_like(normed)
    with on_device_of(normed):
        kernels.finish_gradients[(-(-channels // _CHANNELS),)](
            sums,
            products,
            normed,
            out,
            num_parts,
            channels,
            count,
            _PARTS,
            _CHANNELS,
            num_warps=8,
        )
    return out


def identity(normed: Tensor) -> None:
    """A map that changes nothing; its absence says so to a kernel."""


def no_gradients(grads: Tensor) -> None:
    """Those of a map that changes nothing."""


def relu(y: Tensor, normed: Tensor, out: Tensor) -> None:
    """out = relu(scale y + offset), by what `normalise` returns."""
    _on_tiles(kernels.relu, y, out, normed)


def relu_of_sum(
    y: Tensor, own: Tensor, z: Tensor, theirs: Tensor | None, out: Tensor
) -> None:
    """out = relu(scale y + offset + z_scale z + z_offset).

    Args:
        theirs: the norm of z; None takes z as it is.
    """
    _on_tiles(
        kernels.relu_of_sum, y, z, out, own, _or(theirs, own), flags=_is_there(theirs)
    )


def relu_sums(grad: Tensor, y: Tensor, normed: Tensor) -> Tensor:
    """(2, P, C): partial sums, behind the ReLU, of grad and of grad (y - mean)."""
    return _partial_sums(kernels.relu_sums, y, grad, normed, kinds=2)


def relu_backward(
    grad: Tensor, y: Tensor, normed: Tensor, grads: Tensor, out: Tensor
) -> None:
    """out = scale grad + slope y + level, with grad behind the ReLU of `relu`.

    Args:
        grads: as `gradients` returns.
    """
    _on_tiles(kernels.relu_backward, y, grad, out, normed, grads)


def relu_of_sum_sums(
    grad: Tensor, y: Tensor, z: Tensor, own: Tensor, theirs: Tensor | None
) -> Tensor:
    """(3, P, C): as `relu_sums`, with the products of both terms.

    Those of z are not written without theirs.
    """
    tables = (own, _or(theirs, own))
    return _partial_sums(
        kernels.relu_of_sum_sums, y, z, grad, *tables, kinds=3, flags=_is_there(theirs)
    )


def relu_of_sum_backward(
    grad: Tensor,
    y: Tensor,
    z: Tensor,
    normed: tuple[Tensor, Tensor | None],
    grads: tuple[Tensor, Tensor | None],
    y_grad: Tensor,
    z_grad: Tensor,
) -> None:
    """As `relu_backward`, for both terms."""
    (own, theirs), (own_grads, their_grads) = normed, grads
    tables = (own, _or(theirs, own), own_grads, _or(their_grads, own_grads))
    flags = _is_there(theirs)
    _on_tiles(
        kernels.relu_of_sum_backward, y, z, grad, y_grad, z_grad, *tables, flags=flags
    )


def _or(table: Tensor | None, other: Tensor) -> Tensor:
    """Something to point at, which is not read."""
    return other if table is None else table


def _is_there(table: Tensor | None) -> tuple[bool]:
    return (table is not None,)


@dataclass(frozen=True, slots=True)
class _Tiles:
    """How (R, L) is cut into tiles of rows x columns."""

    num_rows: int
    length: int
    rows: int
    columns: int

    @property
    def across(self) -> int:
        return -(-self.length // self.columns)

    @property
    def down(self) -> int:
        return -(-self.num_rows // self.rows)


def _tiles(y: Tensor) -> _Tiles:
    num_pixels, channels = y.shape
    lined_up = 1
    while lined_up * channels % _ALIGNED and num_pixels % (2 * lined_up) == 0:
        lined_up *= 2
    length = lined_up * channels
    columns = min(_WIDEST, triton.next_power_of_2(length))
    return _Tiles(num_pixels // lined_up, length, _TILE // columns, columns)


def _on_tiles(
    kernel: Any, y: Tensor, *tensors: Tensor, flags: tuple[bool, ...] = ()
) -> None:
    """A program for each tile of y (M, C)."""
    tiles = _tiles(y)
    size = (tiles.num_rows, tiles.length, y.shape[1])
    with on_device_of(y):
        kernel[(tiles.down, tiles.across)](
            y, *tensors, *size, *flags, tiles.rows, tiles.columns
        )


def _partial_sums(
    kernel: Any, y: Tensor, *tensors: Tensor, kinds: int, flags: tuple[bool, ...] = ()
) -> Tensor:
    """(kinds, P, C) of y (M, C), by programs that each take some tiles of a column."""
    tiles = _tiles(y)
    steps = -(-tiles.down * tiles.across // _PROGRAMS)
    num_parts = -(-tiles.down // steps)
    sums = y.new_empty((kinds, num_parts, tiles.length), dtype=torch.float32)
    size = (tiles.num_rows, tiles.length, y.shape[1], steps)
    with on_device_of(y):
        kernel[(num_parts, tiles.across)](
            y, *tensors, sums, *size, *flags, tiles.rows, tiles.columns
        )
    return sums.view(kinds, -1, y.shape[1])
