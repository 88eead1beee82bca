"""Batch norm, ReLU and the residual addition in one pass, as compiled loops for a CPU.

Convolutions leave little to gain on a CPU with matrix units; what is left is reading
and writing activations. torch makes seven passes over them between two convolutions,
these loops three forward and four backward, and Numba compiles them without a compiler
on the machine.

Activations are (R, L): uint16 that holds the bits of bfloat16, or float32. A row is one
or more pixels with all their channels, so that L is a multiple of the C channels. All
sums are taken in float32 over 64 rows and in float64 over those.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

Activations = npt.NDArray[np.uint16] | npt.NDArray[np.float32]
PerChannel = npt.NDArray[np.float32]

_ROWS = 64
_ROWS_AHEAD = 16
_LINE = 32
"""Values of bfloat16 in a line of the cache."""
_ZERO = np.float32(0)
_INT16, _INT32, _FLOAT = ir.IntType(16), ir.IntType(32), ir.FloatType()


def _compiled(function: Any) -> Any:
    """Compiled at its first call, and kept on disk where a folder can be written."""
    # Only a multiplication and an addition may become one: NaN must come out as NaN.
    options: dict[str, Any] = {"fastmath": {"contract"}, "error_model": "numpy"}
    try:
        return numba.njit(function, nogil=True, cache=True, **options)
    except RuntimeError:
        return numba.njit(function, nogil=True, **options)


@intrinsic
def _widen(context: Any, stored: Any) -> Any:
    """A stored activation as float32."""

    def generate(_: Any, builder: Any, signature: Any, values: Any) -> Any:
        if stored == numba.float32:
            return values[0]
        bits = builder.zext(values[0], _INT32)
        return builder.bitcast(builder.shl(bits, ir.Constant(_INT32, 16)), _FLOAT)

    return numba.float32(stored), generate


@intrinsic
def _narrow(context: Any, value: Any, stored: Any) -> Any:
    """A float32 in the type of a stored one: to nearest, ties to even."""

    def generate(_: Any, builder: Any, signature: Any, values: Any) -> Any:
        if stored == numba.float32:
            return values[0]
        bits = builder.bitcast(values[0], _INT32)
        sixteen, one = ir.Constant(_INT32, 16), ir.Constant(_INT32, 1)
        is_odd = builder.and_(builder.lshr(bits, sixteen), one)
        half = builder.add(is_odd, ir.Constant(_INT32, 0x7FFF))
        return builder.trunc(builder.lshr(builder.add(bits, half), sixteen), _INT16)

    return stored(value, stored), generate


@intrinsic
def _prefetch_value(context: Any, array: Any, i: Any, j: Any) -> Any:
    """Asks for a value that will be read soon; one past the end does no harm."""

    def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        held = target.make_array(array)(target, builder, values[0])
        place = cgutils.get_item_pointer(target, builder, array, held, values[1:])
        place = builder.bitcast(place, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, _INT32, _INT32, _INT32])
        name = "llvm.prefetch.p0"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        # For reading, into the nearest cache, as data.
        reading, nearest, data = (ir.Constant(_INT32, n) for n in (0, 3, 1))
        builder.call(function, [place, reading, nearest, data])
        return target.get_dummy_value()

    return numba.void(array, numba.intp, numba.intp), generate


@_compiled
def _prefetch(array: Activations, row: int) -> None:
    """Some processors fetch nothing ahead on their own: half the time of a reading."""
    for j in range(0, array.shape[1], _LINE):
        _prefetch_value(array, row + _ROWS_AHEAD, j)


@_compiled
def _tiled(per_channel: PerChannel, length: int) -> PerChannel:
    out = np.empty(length, np.float32)
    for j in range(length):
        out[j] = per_channel[j % len(per_channel)]
    return out


@_compiled
def _add_by_channel(sums: npt.NDArray[np.float64], part: PerChannel) -> None:
    for j in range(len(part)):
        sums[j % len(sums)] += part[j]


@_compiled
def _moments(y: Activations, mean: PerChannel, variance: PerChannel) -> None:
    """Writes mean and biased variance of each channel."""
    rows, length = y.shape
    num_channels = len(mean)
    # Around a pixel's values, so that a large mean costs no digits of the variance.
    origin = np.empty(length, np.float32)
    for j in range(length):
        origin[j] = _widen(y[0, j % num_channels])
    sums, squares = np.zeros(num_channels), np.zeros(num_channels)
    part, part_squares = np.empty(length, np.float32), np.empty(length, np.float32)
    for first in range(0, rows, _ROWS):
        part[:] = 0
        part_squares[:] = 0
        for i in range(first, min(rows, first + _ROWS)):
            _prefetch(y, i)
            for j in range(length):
                value = _widen(y[i, j]) - origin[j]
                part[j] += value
                part_squares[j] += value * value
        _add_by_channel(sums, part)
        _add_by_channel(squares, part_squares)
    count = y.size // num_channels
    for c in range(num_channels):
        shift = sums[c] / count
        mean[c] = origin[c] + shift
        variance[c] = squares[c] / count - shift * shift


@_compiled
def normalise(
    y: Activations,
    weight: PerChannel,
    bias: PerChannel,
    running_mean: PerChannel,
    running_variance: PerChannel,
    momentum: float,
    epsilon: float,
) -> PerChannel:
    """A batch norm on a batch, as the affine map that it is; moves running averages.

    Returns:
        (4, C): mean, 1 / standard deviation, scale and offset of each channel.
    """
    num_channels = len(weight)
    normed = np.empty((4, num_channels), np.float32)
    mean, inverse_std, scale, offset = normed[0], normed[1], normed[2], normed[3]
    _moments(y, mean, inverse_std)
    count = y.size // num_channels
    for c in range(num_channels):
        variance = np.float64(inverse_std[c])
        unbiased = variance * count / max(1, count - 1)
        running_mean[c] += momentum * (mean[c] - running_mean[c])
        running_variance[c] += momentum * (unbiased - running_variance[c])
        inverse_std[c] = 1 / np.sqrt(variance + epsilon)
        scale[c] = weight[c] * inverse_std[c]
        offset[c] = bias[c] - mean[c] * scale[c]
    return normed


@_compiled
def gradients(
    normed: PerChannel,
    sums: npt.NDArray[np.float64],
    products: npt.NDArray[np.float64],
    count: int,
) -> PerChannel:
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


@_compiled
def relu(
    y: Activations, scale: PerChannel, offset: PerChannel, out: Activations
) -> None:
    """out = relu(scale y + offset)."""
    rows, length = y.shape
    scale, offset = _tiled(scale, length), _tiled(offset, length)
    for i in range(rows):
        for j in range(length):
            value = scale[j] * _widen(y[i, j]) + offset[j]
            out[i, j] = _narrow(_ZERO if value < _ZERO else value, y[i, j])


@_compiled
def relu_of_sum(
    y: Activations,
    scale: PerChannel,
    z: Activations,
    z_scale: PerChannel,
    offset: PerChannel,
    out: Activations,
) -> None:
    """out = relu(scale y + z_scale z + offset)."""
    rows, length = y.shape
    scale, offset = _tiled(scale, length), _tiled(offset, length)
    z_scale = _tiled(z_scale, length)
    for i in range(rows):
        for j in range(length):
            value = scale[j] * _widen(y[i, j]) + offset[j]
            value = z_scale[j] * _widen(z[i, j]) + value
            out[i, j] = _narrow(_ZERO if value < _ZERO else value, y[i, j])


@_compiled
def relu_sums(
    grad: Activations,
    y: Activations,
    scale: PerChannel,
    offset: PerChannel,
    mean: PerChannel,
    sums: npt.NDArray[np.float64],
    products: npt.NDArray[np.float64],
) -> None:
    """Adds up, behind the ReLU of `relu`, grad and grad (y - mean) by channel."""
    rows, length = y.shape
    scale, offset = _tiled(scale, length), _tiled(offset, length)
    mean = _tiled(mean, length)
    part, part_products = np.empty(length, np.float32), np.empty(length, np.float32)
    for first in range(0, rows, _ROWS):
        part[:] = 0
        part_products[:] = 0
        for i in range(first, min(rows, first + _ROWS)):
            _prefetch(y, i)
            _prefetch(grad, i)
            for j in range(length):
                value = _widen(y[i, j])
                passed = _widen(grad[i, j])
                passed = _ZERO if scale[j] * value + offset[j] <= _ZERO else passed
                part[j] += passed
                part_products[j] += passed * (value - mean[j])
        _add_by_channel(sums, part)
        _add_by_channel(products, part_products)


@_compiled
def relu_backward(
    grad: Activations,
    y: Activations,
    scale: PerChannel,
    offset: PerChannel,
    slope: PerChannel,
    level: PerChannel,
    out: Activations,
) -> None:
    """out = scale grad + slope y + level, with grad behind the ReLU of `relu`."""
    rows, length = y.shape
    scale, offset = _tiled(scale, length), _tiled(offset, length)
    slope, level = _tiled(slope, length), _tiled(level, length)
    for i in range(rows):
        for j in range(length):
            value = _widen(y[i, j])
            passed = _widen(grad[i, j])
            passed = _ZERO if scale[j] * value + offset[j] <= _ZERO else passed
            value = scale[j] * passed + (slope[j] * value + level[j])
            out[i, j] = _narrow(value, y[i, j])


@_compiled
def relu_of_sum_sums(
    grad: Activations,
    y: Activations,
    z: Activations,
    affine: tuple[PerChannel, PerChannel, PerChannel],
    means: tuple[PerChannel, PerChannel],
    sums: npt.NDArray[np.float64],
    products: npt.NDArray[np.float64],
    z_products: npt.NDArray[np.float64],
) -> None:
    """As `relu_sums`, for both terms; affine is (scale, z_scale, offset)."""
    rows, length = y.shape
    scale, z_scale = _tiled(affine[0], length), _tiled(affine[1], length)
    offset = _tiled(affine[2], length)
    mean, z_mean = _tiled(means[0], length), _tiled(means[1], length)
    part, part_products = np.empty(length, np.float32), np.empty(length, np.float32)
    part_z = np.empty(length, np.float32)
    for first in range(0, rows, _ROWS):
        part[:] = 0
        part_products[:] = 0
        part_z[:] = 0
        for i in range(first, min(rows, first + _ROWS)):
            _prefetch(grad, i)
            _prefetch(y, i)
            _prefetch(z, i)
            for j in range(length):
                y_value, z_value = _widen(y[i, j]), _widen(z[i, j])
                passed = _widen(grad[i, j])
                value = z_scale[j] * z_value + (scale[j] * y_value + offset[j])
                passed = _ZERO if value <= _ZERO else passed
                part[j] += passed
                part_products[j] += passed * (y_value - mean[j])
                part_z[j] += passed * (z_value - z_mean[j])
        _add_by_channel(sums, part)
        _add_by_channel(products, part_products)
        _add_by_channel(z_products, part_z)


@_compiled
def relu_of_sum_backward(
    grad: Activations,
    y: Activations,
    z: Activations,
    affine: tuple[PerChannel, PerChannel, PerChannel],
    slopes: tuple[PerChannel, PerChannel],
    levels: tuple[PerChannel, PerChannel],
    y_grad: Activations,
    z_grad: Activations,
) -> None:
    """As `relu_backward`, for both terms; affine is (scale, z_scale, offset)."""
    rows, length = y.shape
    scale, z_scale = _tiled(affine[0], length), _tiled(affine[1], length)
    offset = _tiled(affine[2], length)
    slope, z_slope = _tiled(slopes[0], length), _tiled(slopes[1], length)
    level, z_level = _tiled(levels[0], length), _tiled(levels[1], length)
    for i in range(rows):
        for j in range(length):
            y_value, z_value = _widen(y[i, j]), _widen(z[i, j])
            passed = _widen(grad[i, j])
            value = z_scale[j] * z_value + (scale[j] * y_value + offset[j])
            passed = _ZERO if value <= _ZERO else passed
            value = scale[j] * passed + (slope[j] * y_value + level[j])
            y_grad[i, j] = _narrow(value, y[i, j])
            value = z_scale[j] * passed + (z_slope[j] * z_value + z_level[j])
            z_grad[i, j] = _narrow(value, y[i, j])


@_compiled
def add(total: Activations, part: Activations) -> None:
    """total += part."""
    rows, length = total.shape
    for i in range(rows):
        for j in range(length):
            value = _widen(total[i, j]) + _widen(part[i, j])
            total[i, j] = _narrow(value, total[i, j])
