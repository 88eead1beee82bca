"""Gradients of the weights of 3 x 3 convolutions in groups, as loops for a CPU.

What two images give a weight is one sum of pairs. Of each vector's channels a patch of
some rows is written as pairs first, one column after the other, small enough that all
taps find it in the nearest cache.

Activations are flat uint16 that hold the bits of bfloat16, (N, H, W, C) with C at least
`SUMS`; sums are float32 over a patch, and float64 over patches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from resnext_ablate.compute.dots import (
    SUMS,
    add_shared_taps,
    add_taps,
    no_sums,
    store_pairs,
)
from resnext_ablate.compute.lanes import add_to, compiled, inlined, leaf, zeros
from resnext_ablate.compute.taps import SIDE
from resnext_ablate.compute.tiles import aligned

Words = npt.NDArray[np.uint16]
Pairs = npt.NDArray[np.uint32]
Places = npt.NDArray[np.int64]
Totals = npt.NDArray[np.float64]
Shape = tuple[int, int, int, int]

_PAIRS = 10 << 10
"""Of a patch."""
_TAPS = (0,) * SIDE
"""As many numbers as a row has."""


class Takers(NamedTuple):
    """The vectors of channels of an output, and what their lanes take."""

    begins: Places
    """The first channel of each vector."""
    windows: Places
    """The first of those channels of the input among which its groups are."""
    held: int
    """How many these are, `SUMS` or more."""
    lanes: Pairs
    """Flat (vectors, d, SUMS): which of them each lane takes."""
    shifts: Places
    """Where all lanes take the same: from the first of them to the first of these."""
    firsts: Places
    """From there, the first channels of blocks of a group, `SUMS` / 2 or fewer each."""


class _Patch(NamedTuple):
    """Some rows of an output and those of the input under them, of pairs of images.

    Of the input lie `SUMS` channels of all columns one behind the other, and then the
    next `SUMS` or, at the end of a window, some of these once more: with two blocks of
    a group in each piece, all that is added up at a time is in the nearest cache.
    """

    images: int
    """Pairs of them."""
    rows: int
    columns: int
    ahead: int
    """Rows and columns of the input from one of the output to the next."""
    row: int
    """Values of a row of the input, with a column of zeros at both ends."""
    image: int
    """Of all its rows in an image."""
    piece: int
    """Of all its images."""


@leaf
def _piece_at(takers: Takers, v: int, piece: int) -> int:
    """The first channel, within a window, of one of its pieces."""
    first: int = takers.shifts[v] + takers.firsts[2 * piece]
    return min(first, takers.held - SUMS)


@leaf
def _write_pairs(
    x: Words, first: int, second: int, step: int, count: int, pairs: Pairs, to: int
) -> None:
    """Writes `SUMS` channels of a row of pixels beside the same of another image."""
    for n in range(count):
        at = n * step
        store_pairs(pairs, to + n * SUMS, x, first + at, second + at)


@leaf
def _write_values(
    x: Words,
    shape: Shape,
    patch: _Patch,
    images: tuple[int, int],
    top: int,
    channel: int,
    values: Pairs,
    to: int,
) -> None:
    """Writes what the convolution saw of two images, from row `top` on."""
    _, height, width, channels = shape
    apart = (images[1] - images[0]) * height * width * channels
    for r in range(patch.image // patch.row):
        row, begin = top + r, to + r * patch.row
        if 0 <= row < height:
            # Nobody writes the zeros at both ends.
            at = (images[0] * height + row) * width * channels + channel
            _write_pairs(x, at, at + apart, channels, width, values, begin + SUMS)
        else:
            for i in range(begin, begin + patch.row):
                values[i] = 0


@leaf
def _write_grads(
    grad: Words,
    place: tuple[int, int],
    channels: int,
    count: int,
    grads: Pairs,
    to: int,
) -> None:
    """Writes a vector of some pixels of two images, one pixel behind the other.

    An image without another is paired with 0: both places are the same.
    """
    first, second = place
    if first != second:
        _write_pairs(grad, first, second, channels, count, grads, to)
        return
    for n in range(count):
        for lane in range(SUMS):
            grads[to + n * SUMS + lane] = grad[first + n * channels + lane]


@leaf
def _write_patch(
    x: Words,
    grad: Words,
    shape: Shape,
    patch: _Patch,
    place: tuple[int, int],
    takers: Takers,
    v: int,
    values: Pairs,
    grads: Pairs,
) -> None:
    """Writes the pairs of a patch that begins with an image and a row of the output;
    those of the input where the vector before had none of them."""
    first, top = place
    count, channels, window = shape[0], shape[3], takers.windows[v]
    num_pixels, line = grad.size // channels // count, patch.rows * patch.columns
    is_new = v == 0 or window != takers.windows[v - 1]
    for n in range(patch.images):
        image = first + 2 * n
        other = min(image + 1, count - 1)
        in_x, both = patch.ahead * top - 1, (image, other)
        for piece in range((len(takers.firsts) + 1) // 2 if is_new else 0):
            channel = window + _piece_at(takers, v, piece)
            to = piece * patch.piece + n * patch.image
            _write_values(x, shape, patch, both, in_x, channel, values, to)
        at = (image * num_pixels + top * patch.columns) * channels + takers.begins[v]
        also = at + (other - image) * num_pixels * channels
        _write_grads(grad, (at, also), channels, line, grads, n * line * SUMS)


@inlined
def _row_of_taps(
    values: Pairs,
    grads: Pairs,
    patch: _Patch,
    tap_row: int,
    lanes: Pairs,
    lanes_at: int,
    stride: Any,
) -> Any:
    """The sums of a row of taps, by tuples as `add_taps` takes."""
    z, k = zeros(SUMS), 0
    sums = (z, z, z, z, z, z)
    step, whole = len(stride) * SUMS, patch.columns - patch.columns % 4
    for n in range(patch.images):
        for r in range(patch.rows):
            i = n * patch.image + (tap_row + r * len(stride)) * patch.row
            for _ in range(0, whole, 4):
                sums = add_taps(sums, values, i, grads, k, stride, 4, lanes, lanes_at)
                i, k = i + 4 * step, k + 4 * SUMS
            for _ in range(whole, patch.columns):
                sums = add_taps(sums, values, i, grads, k, stride, 1, lanes, lanes_at)
                i, k = i + step, k + SUMS
    return sums[0] + sums[3], sums[1] + sums[4], sums[2] + sums[5]


@leaf
def _add_patch(
    values: Pairs,
    grads: Pairs,
    patch: _Patch,
    v: int,
    lanes: Pairs,
    totals: Totals,
    stride: Any,
) -> None:
    group_width = totals.shape[3]
    for tap_row in range(SIDE):
        for j in range(group_width):
            index = (v * group_width + j) * SUMS
            sums = _row_of_taps(values, grads, patch, tap_row, lanes, index, stride)
            add_to(totals, (v, tap_row, 0, j, 0), sums[0])
            add_to(totals, (v, tap_row, 1, j, 0), sums[1])
            add_to(totals, (v, tap_row, 2, j, 0), sums[2])


@inlined
def _shared_row_of_taps(
    values: Pairs,
    grads: Pairs,
    patch: _Patch,
    first: int,
    stride: Any,
    block: Any,
    together: Any,
) -> Any:
    """The sums of a row of taps for a block of channels, from a value on."""
    sums, k, at_once = no_sums(_TAPS, block), 0, len(together)
    step, whole = len(stride) * SUMS, patch.columns - patch.columns % at_once
    for n in range(patch.images):
        for r in range(patch.rows):
            i = first + n * patch.image + r * len(stride) * patch.row
            for _ in range(0, whole, at_once):
                sums = add_shared_taps(sums, values, i, grads, k, stride, together)
                i, k = i + at_once * step, k + at_once * SUMS
            for _ in range(whole, patch.columns):
                sums = add_shared_taps(sums, values, i, grads, k, stride, (0,))
                i, k = i + step, k + SUMS
    return sums


@leaf
def _add_shared_patch(
    values: Pairs,
    grads: Pairs,
    patch: _Patch,
    v: int,
    takers: Takers,
    totals: Totals,
    stride: Any,
    block: Any,
) -> None:
    size, firsts = len(block), takers.firsts
    for piece in range((len(firsts) + 1) // 2):
        begin = piece * patch.piece + takers.shifts[v] - _piece_at(takers, v, piece)
        for tap_row in range(SIDE):
            for b in range(2 * piece, min(2 * piece + 2, len(firsts))):
                i = begin + firsts[b] + tap_row * patch.row
                if len(stride) == 1:
                    sums = _shared_row_of_taps(
                        values, grads, patch, i, stride, block, (0, 0, 0, 0)
                    )
                else:
                    sums = _shared_row_of_taps(
                        values, grads, patch, i, stride, block, (0, 0)
                    )
                for n in range(SIDE * size):
                    place = (v, tap_row, n // size, b * size + n % size, 0)
                    add_to(totals, place, sums[n])


@compiled
def weight_gradient(
    x: Words,
    grad: Words,
    shape: Shape,
    stride: tuple[int, ...],
    takers: Takers,
    block: tuple[int, ...],
    totals: Totals,
) -> None:
    """Adds what a batch gives each weight.

    The compiler knows how long a tuple is: that of some arguments tells it a number.

    Args:
        x: what the convolution saw.
        grad: of its output.
        shape: of x, (N, H, W, C).
        stride: as many numbers as it is.
        takers: of the output's channels.
        block: as many as those have channels; one where lanes differ.
        totals: (vectors, 3, 3, d, SUMS), or the channels of each block for d.
    """
    count, height, width, _ = shape
    ahead = len(stride)
    rows, columns = (height - 1) // ahead + 1, (width - 1) // ahead + 1
    row, line = (width + 2) * SUMS, columns * SUMS
    # As many rows as fit, and as many images where all of their rows do.
    most = (_PAIRS - (SIDE - ahead) * row) // (ahead * row + line)
    most = max(1, min(rows, most))
    image = ((most - 1) * ahead + SIDE) * row
    together = max(1, _PAIRS // (image + most * line)) if most == rows else 1
    piece = together * image
    values = aligned((len(takers.firsts) + 1) // 2 * piece)
    grads = aligned(together * most * line)
    for first in range(0, count, 2 * together):
        images = min(together, (count - first + 1) // 2)
        for top in range(0, rows, most):
            here = min(most, rows - top)
            image = ((here - 1) * ahead + SIDE) * row
            patch = _Patch(images, here, columns, ahead, row, image, piece)
            place = (first, top)
            for v in range(len(takers.begins)):
                _write_patch(x, grad, shape, patch, place, takers, v, values, grads)
                if len(block) > 1:
                    _add_shared_patch(
                        values, grads, patch, v, takers, totals, stride, block
                    )
                else:
                    lanes = takers.lanes
                    _add_patch(values, grads, patch, v, lanes, totals, stride)
