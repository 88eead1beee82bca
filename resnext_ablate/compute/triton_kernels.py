"""The kernels of `triton_norms`, each of which sees one tile or a column of them.

Activations are (R, L), rows of whole pixels, and what is per channel is float32 (4, C);
a tile is ROWS x COLUMNS, and what of it lies beyond R or L is neither read nor written.
All is computed in float32. Places are int64, since activations may have more than 2^31
values.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from resnext_ablate.compute.triton_parts import summed


@triton.jit
def _load(table: tl.tensor, place: tl.tensor, inside: tl.tensor) -> Any:
    """Values as float32."""
    return tl.load(table + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _columns(length: tl.tensor, num_channels: tl.tensor, COLUMNS: tl.constexpr) -> Any:
    """Which columns a program has, which of them there are, and their channels."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    return column, column < length, column % num_channels


@triton.jit
def _tile(
    index: tl.tensor,
    num_rows: tl.tensor,
    length: tl.tensor,
    column: tl.tensor,
    ROWS: tl.constexpr,
) -> Any:
    """Where the values of a tile lie, and which of them there are."""
    row = index.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < num_rows)[:, None] & (column < length)[None, :]
    return row[:, None] * length + column[None, :], inside


@triton.jit
def _behind_relu(value: tl.tensor, passed: tl.tensor) -> Any:
    """Zero where the value is zero or less, else (NaN too) what is passed."""
    return tl.where(value <= 0.0, 0.0, passed)


@triton.jit
def _store_sums(
    sums: tl.tensor,
    kind: tl.constexpr,
    length: tl.tensor,
    column: tl.tensor,
    there: tl.tensor,
    total: tl.tensor,
) -> None:
    """Writes one of the kinds of sums of a program, over its rows."""
    part = kind * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + part * length + column, tl.sum(total, axis=0), mask=there)


@triton.jit
def moments(
    y: tl.tensor,
    sums: tl.tensor,
    num_rows: tl.tensor,
    length: tl.tensor,
    num_channels: tl.tensor,
    steps: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    column, there, channel = _columns(length, num_channels, COLUMNS)
    # Around a pixel's values, so that a large mean costs no digits of the variance.
    origin = _load(y, channel, there)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(steps):
        index = tl.program_id(0) * steps + step
        place, inside = _tile(index, num_rows, length, column, ROWS)
        value = tl.where(inside, _load(y, place, inside) - origin, 0.0)
        total += value
        squares += value * value
    _store_sums(sums, 0, length, column, there, total)
    _store_sums(sums, 1, length, column, there, squares)


@triton.jit
def finish_norm(
    y: tl.tensor,
    sums: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    running_mean: tl.tensor,
    running_variance: tl.tensor,
    num_batches: tl.tensor,
    normed: tl.tensor,
    num_parts: tl.tensor,
    num_channels: tl.tensor,
    count: tl.tensor,
    momentum: tl.constexpr,
    epsilon: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = c < num_channels
    size = num_parts * num_channels
    total = summed(sums, num_parts, num_channels, c, there, PARTS, CHANNELS)
    squares = summed(sums + size, num_parts, num_channels, c, there, PARTS, CHANNELS)
    shift = total / count
    variance = squares / count - shift * shift
    mean = (_load(y, c, there) + shift).to(tl.float32)
    inverse_std = (1.0 / tl.sqrt(variance + epsilon)).to(tl.float32)
    scale = _load(weight, c, there) * inverse_std
    tl.store(normed + c, mean, mask=there)
    tl.store(normed + num_channels + c, inverse_std, mask=there)
    tl.store(normed + 2 * num_channels + c, scale, mask=there)
    offset = _load(bias, c, there) - mean * scale
    tl.store(normed + 3 * num_channels + c, offset, mask=there)

    unbiased = variance * count / tl.maximum(count - 1, 1)
    old_mean = _load(running_mean, c, there).to(tl.float64)
    old_variance = _load(running_variance, c, there).to(tl.float64)
    new_mean = old_mean + momentum * (mean - old_mean)
    new_variance = old_variance + momentum * (unbiased - old_variance)
    tl.store(running_mean + c, new_mean.to(tl.float32), mask=there)
    tl.store(running_variance + c, new_variance.to(tl.float32), mask=there)
    if tl.program_id(0) == 0:
        tl.store(num_batches, tl.load(num_batches) + 1)


@triton.jit
def finish_gradients(
    sums: tl.tensor,
    products: tl.tensor,
    normed: tl.tensor,
    out: tl.tensor,
    num_parts: tl.tensor,
    num_channels: tl.tensor,
    count: tl.tensor,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = c < num_channels
    total = summed(sums, num_parts, num_channels, c, there, PARTS, CHANNELS)
    product = summed(products, num_parts, num_channels, c, there, PARTS, CHANNELS)
    mean = _load(normed, c, there).to(tl.float64)
    inverse_std = _load(normed + num_channels, c, there).to(tl.float64)
    scale = _load(normed + 2 * num_channels, c, there).to(tl.float64)
    weight = product * inverse_std
    slope = -scale * inverse_std * weight / count
    level = -scale * total / count - slope * mean
    tl.store(out + c, weight.to(tl.float32), mask=there)
    tl.store(out + num_channels + c, total.to(tl.float32), mask=there)
    tl.store(out + 2 * num_channels + c, slope.to(tl.float32), mask=there)
    tl.store(out + 3 * num_channels + c, level.to(tl.float32), mask=there)


@triton.jit
def _affine(
    table: tl.tensor,
    first: tl.constexpr,
    num_channels: tl.tensor,
    c: tl.tensor,
    there: tl.tensor,
) -> Any:
    """Two lines of (4, C) from a first one on, as (1, COLUMNS)."""
    lines = table + first * num_channels + c
    one = tl.load(lines, mask=there, other=0.0)
    other = tl.load(lines + num_channels, mask=there, other=0.0)
    return one[None, :], other[None, :]


@triton.jit
def relu(
    y: tl.tensor,
    out: tl.tensor,
    normed: tl.tensor,
    num_rows: tl.tensor,
    length: tl.tensor,
    num_channels: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    column, there, c = _columns(length, num_channels, COLUMNS)
    scale, offset = _affine(normed, 2, num_channels, c, there)
    place, inside = _tile(tl.program_id(0), num_rows, length, column, ROWS)
    value = tl.fma(scale, _load(y, place, inside), offset)
    tl.store(out + place, _behind_relu(value, value), mask=inside)


@triton.jit
def _sum_of_both(
    value: tl.tensor,
    z: tl.tensor,
    own: tl.tensor,
    theirs: tl.tensor,
    num_channels: tl.tensor,
    c: tl.tensor,
    there: tl.tensor,
    NORMED: tl.constexpr,
) -> Any:
    """What the ReLU of a sum sees, and the scales of its terms."""
    scale, offset = _affine(own, 2, num_channels, c, there)
    z_scale = scale
    if NORMED:
        z_scale, z_offset = _affine(theirs, 2, num_channels, c, there)
        both = tl.fma(z_scale, z, tl.fma(scale, value, offset + z_offset))
    else:
        both = z + tl.fma(scale, value, offset)
    return both, scale, z_scale


@triton.jit
def relu_of_sum(
    y: tl.tensor,
    z: tl.tensor,
    out: tl.tensor,
    own: tl.tensor,
    theirs: tl.tensor,
    num_rows: tl.tensor,
    length: tl.tensor,
    num_channels: tl.tensor,
    NORMED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    column, there, c = _columns(length, num_channels, COLUMNS)
    place, inside = _tile(tl.program_id(0), num_rows, length, column, ROWS)
    value, z_value = _load(y, place, inside), _load(z, place, inside)
    both, _, _ = _sum_of_both(
        value, z_value, own, theirs, num_channels, c, there, NORMED
    )
    tl.store(out + place, _behind_relu(both, both), mask=inside)


@triton.jit
def relu_sums(
    y: tl.tensor,
    grad: tl.tensor,
    normed: tl.tensor,
    sums: tl.tensor,
    num_rows: tl.tensor,
    length: tl.tensor,
    num_channels: tl.tensor,
    steps: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    column, there, c = _columns(length, num_channels, COLUMNS)
    mean, _ = _affine(normed, 0, num_channels, c, there)
    scale, offset = _affine(normed, 2, num_channels, c, there)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(steps):
        index = tl.program_id(0) * steps + step
        place, inside = _tile(index, num_rows, length, column, ROWS)
        value = _load(y, place, inside)
        before = tl.fma(scale, value, offset)
        passed = _behind_relu(before, _load(grad, place, inside))
        total += passed
        products += passed * (value - mean)
    _store_sums(sums, 0, length, column, there, total)
    _store_sums(sums, 1, length, column, there, products)


@triton.jit
def relu_backward(
    y: tl.tensor,
    grad: tl.tensor,
    out: tl.tensor,
    normed: tl.tensor,
    grads: tl.tensor,
    num_rows: tl.tensor,
    length: tl.tensor,
    num_channels: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    column, there, c = _columns(length, num_channels, COLUMNS)
    scale, offset = _affine(normed, 2, num_channels, c, there)
    slope, level = _affine(grads, 2, num_channels, c, there)
    place, inside = _tile(tl.program_id(0), num_rows, length, column, ROWS)
    value = _load(y, place, inside)
    before = tl.fma(scale, value, offset)
    passed = _behind_relu(before, _load(grad, place, inside))
    tl.store(out + place, scale * passed + (slope * value + level), mask=inside)


@triton.jit
def relu_of_sum_sums(
    y: tl.tensor,
    z: tl.tensor,
    grad: tl.tensor,
    own: tl.tensor,
    theirs: tl.tensor,
    sums: tl.tensor,
    num_rows: tl.tensor,
    length: tl.tensor,
    num_channels: tl.tensor,
    steps: tl.tensor,
    NORMED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    column, there, c = _columns(length, num_channels, COLUMNS)
    mean, _ = _affine(own, 0, num_channels, c, there)
    z_mean, _ = _affine(theirs, 0, num_channels, c, there)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    z_products = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(steps):
        index = tl.program_id(0) * steps + step
        place, inside = _tile(index, num_rows, length, column, ROWS)
        value, z_value = _load(y, place, inside), _load(z, place, inside)
        both, _, _ = _sum_of_both(
            value, z_value, own, theirs, num_channels, c, there, NORMED
        )
        passed = _behind_relu(both, _load(grad, place, inside))
        total += passed
        products += passed * (value - mean)
        if NORMED:
            z_products += passed * (z_value - z_mean)
    _store_sums(sums, 0, length, column, there, total)
    _store_sums(sums, 1, length, column, there, products)
    if NORMED:
        _store_sums(sums, 2, length, column, there, z_products)


@triton.jit
def relu_of_sum_backward(
    y: tl.tensor,
    z: tl.tensor,
    grad: tl.tensor,
    y_grad: tl.tensor,
    z_grad: tl.tensor,
    own: tl.tensor,
    theirs: tl.tensor,
    own_grads: tl.tensor,
    their_grads: tl.tensor,
    num_rows: tl.tensor,
    length: tl.tensor,
    num_channels: tl.tensor,
    NORMED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    column, there, c = _columns(length, num_channels, COLUMNS)
    place, inside = _tile(tl.program_id(0), num_rows, length, column, ROWS)
    value, z_value = _load(y, place, inside), _load(z, place, inside)
    both, scale, z_scale = _sum_of_both(
        value, z_value, own, theirs, num_channels, c, there, NORMED
    )
    passed = _behind_relu(both, _load(grad, place, inside))
    slope, level = _affine(own_grads, 2, num_channels, c, there)
    out = scale * passed + (slope * value + level)
    tl.store(y_grad + place, out, mask=inside)
    if NORMED:
        z_slope, z_level = _affine(their_grads, 2, num_channels, c, there)
        z_out = z_scale * passed + (z_slope * z_value + z_level)
        tl.store(z_grad + place, z_out, mask=inside)
    else:
        tl.store(z_grad + place, passed, mask=inside)
