"""Batch norm, ReLU and the residual addition in one pass, as compiled loops for a CPU.

Convolutions leave little to gain on a CPU with matrix units; what is left is reading
and writing activations. torch makes seven passes over them between two convolutions,
these loops three forward and four backward, and Numba compiles them without a compiler
on the machine.

Activations are (R, L): uint16 that holds the bits of bfloat16, or float32. A row is one
or more pixels with all their channels, so that L is a multiple of the C channels. What
is per channel is (K, C), as `normalise` and `gradients` return it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from resnext_ablate.compute.lanes import (
    WIDE,
    compiled,
    first_of,
    inlined,
    load,
    part,
    prefetch,
    store,
    where_positive,
    zeros,
)
from resnext_ablate.compute.traversal_loops import Sums, everywhere, summed

Activations = npt.NDArray[np.uint16] | npt.NDArray[np.float32]
PerChannel = npt.NDArray[np.float32]

_AHEAD = 1 << 10
"""Values from one that is read to the one that memory is asked for meanwhile."""


@part
def _tiled(per_channel: PerChannel, length: int) -> PerChannel:
    """(K, C) -> (K, L)."""
    num_channels = per_channel.shape[1]
    out = np.empty((len(per_channel), length), np.float32)
    for kind in range(len(out)):
        for pixel in range(0, length, num_channels):
            for c in range(num_channels):
                out[kind, pixel + c] = per_channel[kind, c]
    return out


@part
def _by_channel(by_column: Sums, num_channels: int) -> Sums:
    """(K, L) -> (K, C)."""
    sums = np.zeros((len(by_column), num_channels))
    for kind in range(len(by_column)):
        for pixel in range(0, by_column.shape[1], num_channels):
            for c in range(num_channels):
                sums[kind, c] += by_column[kind, pixel + c]
    return sums


@summed(arrays=1)
def _add_moments(i: int, j: int, nothing: Any, y: Activations, around: Any) -> Any:
    prefetch(y, (i, j + _AHEAD))
    value = load(y, (i, j), nothing) - load(around, (0, j), nothing)
    return value, value * value


@compiled
def moments(y: Activations, num_channels: int) -> PerChannel:
    """(2, C): mean and biased variance of each channel."""
    length = y.shape[1]
    # Around a pixel's values, so that a large mean costs no digits of the variance.
    origin = np.empty((1, num_channels), np.float32)
    for c in range(num_channels):
        origin[0, c] = first_of(load(y, (0, c), zeros(1)))
    by_column = np.zeros((2, length))
    _add_moments(y.shape, (y, _tiled(origin, length)), by_column)
    sums = _by_channel(by_column, num_channels)
    count = y.size // num_channels
    out = np.empty((2, num_channels), np.float32)
    for c in range(num_channels):
        shift = sums[0, c] / count
        out[0, c] = origin[0, c] + shift
        out[1, c] = sums[1, c] / count - shift * shift
    return out


@compiled
def normalise(
    moments: PerChannel,
    count: int,
    weight: PerChannel,
    bias: PerChannel,
    running_mean: PerChannel,
    running_variance: PerChannel,
    momentum: float,
    epsilon: float,
) -> PerChannel:
    """A batch norm on a batch, as the affine map that it is; moves running averages.

    Args:
        moments: of what it normalises, as `moments` returns.
        count: values of a channel.
        weight, bias, running_mean, running_variance, momentum, epsilon: its own.

    Returns:
        (4, C): mean, 1 / standard deviation, scale and offset of each channel.
    """
    num_channels = len(weight)
    normed = np.empty((4, num_channels), np.float32)
    mean, inverse_std, scale, offset = normed[0], normed[1], normed[2], normed[3]
    for c in range(num_channels):
        mean[c], variance = moments[0, c], np.float64(moments[1, c])
        unbiased = variance * count / max(1, count - 1)
        running_mean[c] += momentum * (mean[c] - running_mean[c])
        running_variance[c] += momentum * (unbiased - running_variance[c])
        inverse_std[c] = 1 / np.sqrt(variance + epsilon)
        scale[c] = weight[c] * inverse_std[c]
        offset[c] = bias[c] - mean[c] * scale[c]
    return normed


@compiled
def gradients(normed: PerChannel, sums: Sums, products: Sums, count: int) -> PerChannel:
    """Of a batch norm, from sums over the batch of g and of g (y - mean).

    Args:
        normed: as `normalise` returns.
        sums: (C,), of the gradient g behind the ReLU.
        products: (C,).
        count: values of a channel.

    Returns:
        (4, C): gradients of weight and bias; slope and level of the input's, which is
        scale g + slope y + level.
    """
    out = np.empty_like(normed)
    for c in range(normed.shape[1]):
        mean, inverse_std, scale = normed[0, c], normed[1, c], normed[2, c]
        weight = products[c] * inverse_std
        slope = -scale * inverse_std * weight / count
        out[0, c], out[1, c], out[2, c] = weight, sums[c], slope
        out[3, c] = -scale * sums[c] / count - slope * mean
    return out


def identity(normed: PerChannel) -> PerChannel:
    """A map that changes nothing, as `normalise` would return it."""
    nothing = np.zeros_like(normed)
    nothing[1:3] = 1
    return nothing


def no_gradients(grads: PerChannel) -> PerChannel:
    """Those of a map that changes nothing, as `gradients` would return them."""
    return np.zeros_like(grads)


@inlined
def _norm_of(i: int, j: int, nothing: Any, y: Activations, normed: PerChannel) -> Any:
    """Values as they are, and normalised."""
    prefetch(y, (i, j + _AHEAD))
    scale, offset = load(normed, (2, j), nothing), load(normed, (3, j), nothing)
    value = load(y, (i, j), nothing)
    return value, scale * value + offset


@everywhere
def _relu(
    i: int,
    j: int,
    nothing: Any,
    y: Activations,
    normed: PerChannel,
    out: Activations,
) -> None:
    _, value = _norm_of(i, j, nothing, y, normed)
    store(out, (i, j), where_positive(value, value))


@compiled
def relu(y: Activations, normed: PerChannel, out: Activations) -> None:
    """out = relu(scale y + offset), by what `normalise` returns."""
    _relu(y.shape, (y, _tiled(normed, y.shape[1]), out))


@inlined
def _sum_of_both(
    i: int,
    j: int,
    nothing: Any,
    y: Activations,
    own: PerChannel,
    z: Activations,
    theirs: PerChannel,
) -> Any:
    """Both terms as they are, and the sum of their norms."""
    prefetch(y, (i, j + _AHEAD))
    prefetch(z, (i, j + _AHEAD))
    scale, z_scale = load(own, (2, j), nothing), load(theirs, (2, j), nothing)
    offset = load(own, (3, j), nothing) + load(theirs, (3, j), nothing)
    value, z_value = load(y, (i, j), nothing), load(z, (i, j), nothing)
    return value, z_value, z_scale * z_value + (scale * value + offset)


@everywhere
def _relu_of_sum(
    i: int,
    j: int,
    nothing: Any,
    y: Activations,
    own: PerChannel,
    z: Activations,
    theirs: PerChannel,
    out: Activations,
) -> None:
    _, _, value = _sum_of_both(i, j, nothing, y, own, z, theirs)
    store(out, (i, j), where_positive(value, value))


@compiled
def relu_of_sum(
    y: Activations,
    own: PerChannel,
    z: Activations,
    theirs: PerChannel,
    out: Activations,
) -> None:
    """out = relu(scale y + offset + z_scale z + z_offset)."""
    length = y.shape[1]
    _relu_of_sum(y.shape, (y, _tiled(own, length), z, _tiled(theirs, length), out))


@summed(arrays=2)
def _add_relu_sums(
    i: int,
    j: int,
    nothing: Any,
    grad: Activations,
    y: Activations,
    normed: PerChannel,
) -> Any:
    prefetch(grad, (i, j + _AHEAD))
    value, before = _norm_of(i, j, nothing, y, normed)
    passed = where_positive(before, load(grad, (i, j), nothing))
    return passed, passed * (value - load(normed, (0, j), nothing))


@compiled
def relu_sums(grad: Activations, y: Activations, normed: PerChannel) -> Sums:
    """(2, C): sums by channel, behind the ReLU, of grad and of grad (y - mean)."""
    length = y.shape[1]
    sums = np.zeros((2, length))
    _add_relu_sums(y.shape, (grad, y, _tiled(normed, length)), sums)
    by_channel: Sums = _by_channel(sums, normed.shape[1])
    return by_channel


@everywhere
def _relu_backward(
    i: int,
    j: int,
    nothing: Any,
    grad: Activations,
    y: Activations,
    normed: PerChannel,
    grads: PerChannel,
    out: Activations,
) -> None:
    prefetch(grad, (i, j + _AHEAD))
    value, before = _norm_of(i, j, nothing, y, normed)
    passed = where_positive(before, load(grad, (i, j), nothing))
    slope, level = load(grads, (2, j), nothing), load(grads, (3, j), nothing)
    scale = load(normed, (2, j), nothing)
    store(out, (i, j), scale * passed + (slope * value + level))


@compiled
def relu_backward(
    grad: Activations,
    y: Activations,
    normed: PerChannel,
    grads: PerChannel,
    out: Activations,
) -> None:
    """out = scale grad + slope y + level, with grad behind the ReLU of `relu`.

    Args:
        grads: as `gradients` returns.
    """
    length = y.shape[1]
    lines = (_tiled(normed, length), _tiled(grads, length))
    _relu_backward(y.shape, (grad, y, *lines, out))


@summed(arrays=3)
def _add_relu_of_sum_sums(
    i: int,
    j: int,
    nothing: Any,
    grad: Activations,
    y: Activations,
    z: Activations,
    own: PerChannel,
    theirs: PerChannel,
) -> Any:
    prefetch(grad, (i, j + _AHEAD))
    value, z_value, before = _sum_of_both(i, j, nothing, y, own, z, theirs)
    passed = where_positive(before, load(grad, (i, j), nothing))
    mean, z_mean = load(own, (0, j), nothing), load(theirs, (0, j), nothing)
    return passed, passed * (value - mean), passed * (z_value - z_mean)


@compiled
def relu_of_sum_sums(
    grad: Activations,
    y: Activations,
    z: Activations,
    own: PerChannel,
    theirs: PerChannel,
) -> Sums:
    """(3, C): as `relu_sums`, with the products of both terms."""
    length = y.shape[1]
    sums = np.zeros((3, length))
    lines = (_tiled(own, length), _tiled(theirs, length))
    _add_relu_of_sum_sums(y.shape, (grad, y, z, *lines), sums)
    by_channel: Sums = _by_channel(sums, own.shape[1])
    return by_channel


@everywhere
def _relu_of_sum_backward(
    i: int,
    j: int,
    nothing: Any,
    grad: Activations,
    y: Activations,
    z: Activations,
    normed: tuple[PerChannel, PerChannel],
    grads: tuple[PerChannel, PerChannel],
    y_grad: Activations,
    z_grad: Activations,
) -> None:
    prefetch(grad, (i, j + _AHEAD))
    own, theirs = normed
    value, z_value, before = _sum_of_both(i, j, nothing, y, own, z, theirs)
    passed = where_positive(before, load(grad, (i, j), nothing))
    scale, z_scale = load(own, (2, j), nothing), load(theirs, (2, j), nothing)
    slope, z_slope = load(grads[0], (2, j), nothing), load(grads[1], (2, j), nothing)
    level, z_level = load(grads[0], (3, j), nothing), load(grads[1], (3, j), nothing)
    store(y_grad, (i, j), scale * passed + (slope * value + level))
    store(z_grad, (i, j), z_scale * passed + (z_slope * z_value + z_level))


@compiled
def relu_of_sum_backward(
    grad: Activations,
    y: Activations,
    z: Activations,
    normed: tuple[PerChannel, PerChannel],
    grads: tuple[PerChannel, PerChannel],
    y_grad: Activations,
    z_grad: Activations,
) -> None:
    """As `relu_backward`, for both terms."""
    length = y.shape[1]
    normed = (_tiled(normed[0], length), _tiled(normed[1], length))
    grads = (_tiled(grads[0], length), _tiled(grads[1], length))
    _relu_of_sum_backward(y.shape, (grad, y, z, normed, grads, y_grad, z_grad))


@compiled
def add(total: Activations, added: Activations, stride: int) -> None:
    """Adds values to every stride-th pixel of a total (N, H, W, C)."""
    count, rows, columns, length = added.shape
    wide = length - length % WIDE
    for n, i in np.ndindex(count, rows):
        for j in range(columns):
            row, column = i * stride, j * stride
            for c in range(0, wide, WIDE):
                value = load(total, (n, row, column, c), zeros(WIDE))
                value = value + load(added, (n, i, j, c), zeros(WIDE))
                store(total, (n, row, column, c), value)
            for c in range(wide, length):
                value = load(total, (n, row, column, c), zeros(1))
                value = value + load(added, (n, i, j, c), zeros(1))
                store(total, (n, row, column, c), value)
