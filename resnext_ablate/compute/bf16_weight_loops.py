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
from resnext_ablate.compute.lanes import add_to, compiled, inlined, leaf, part, zeros
from resnext_ablate.compute.taps import SIDE

Words = npt.NDArray[np.uint16]
Pairs = npt.NDArray[np.uint32]
Places = npt.NDArray[np.int64]
Totals = npt.NDArray[np.float64]
Shape = tuple[int, int, int, int]

_PAIRS = 10 << 10
"""Of a patch."""


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
    """From there, the first channels of blocks of a group."""


class _Patch(NamedTuple):
    """Some rows of an output and those of the input under them, of pairs of images."""

    images: int
    """Pairs of them."""
    rows: int
    columns: int
    ahead: int
    """Rows and columns of the input from one of the output to the next."""
    width: int
    """Pairs of values of a column of the input."""
    row: int
    """Of a row of it, with a column of zeros at both ends."""
    image: int
    """Of all its rows in an image."""


@leaf
def _write_pairs(
    x: Words,
    first: int,
    second: int,
    step: int,
    count: int,
    held: int,
    pairs: Pairs,
    to: int,
    width: int,
) -> None:
    """Writes some channels of a row of pixels beside the same of another image."""
    for begin in range(0, held, SUMS):
        # The last channels once more where they do not fill a vector.
        c = min(begin, held - SUMS)
        for n in range(count):
            at = c + n * step
            store_pairs(pairs, to + c + n * width, x, first + at, second + at)


@leaf
def _write_values(
    x: Words,
    shape: Shape,
    patch: _Patch,
    images: tuple[int, int],
    top: int,
    window: int,
    held: int,
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
            at = (images[0] * height + row) * width * channels + window
            begin += patch.width
            _write_pairs(
                x, at, at + apart, channels, width, held, values, begin, patch.width
            )
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
        _write_pairs(grad, first, second, channels, count, SUMS, grads, to, SUMS)
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
    vector: tuple[int, int, int],
    values: Pairs,
    grads: Pairs,
) -> None:
    """Writes the pairs of a patch that begins with an image and a row of the output."""
    first, top = place
    window, held, begin = vector
    count, channels = shape[0], shape[3]
    num_pixels, line = grad.size // channels // count, patch.rows * patch.columns
    for n in range(patch.images):
        image = first + 2 * n
        other = min(image + 1, count - 1)
        in_x, to = patch.ahead * top - 1, n * patch.image
        _write_values(x, shape, patch, (image, other), in_x, window, held, values, to)
        at = (image * num_pixels + top * patch.columns) * channels + begin
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
    step, whole = len(stride) * patch.width, patch.columns - patch.columns % 4
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


@leaf
def _add_shared_patch(
    values: Pairs,
    grads: Pairs,
    patch: _Patch,
    v: int,
    shift: int,
    firsts: Places,
    totals: Totals,
    stride: Any,
    block: Any,
) -> None:
    size, step = len(block), len(stride) * patch.width
    for tap_row in range(SIDE):
        for first in range(len(firsts)):
            sums, k = no_sums(block), 0
            for n in range(patch.images):
                for r in range(patch.rows):
                    i = n * patch.image + (tap_row + r * len(stride)) * patch.row
                    i += shift + firsts[first]
                    for _ in range(patch.columns):
                        sums = add_shared_taps(sums, values, i, grads, k, patch.width)
                        i, k = i + step, k + SUMS
            for n in range(SIDE * size):
                place = (v, tap_row, n // size, first * size + n % size, 0)
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
    ahead, held = len(stride), takers.held
    column = (held + SUMS - 1) // SUMS * SUMS
    rows, columns = (height - 1) // ahead + 1, (width - 1) // ahead + 1
    row, line = (width + 2) * column, columns * SUMS
    # As many rows as fit, and as many images where all of their rows do.
    most = (_PAIRS - (SIDE - ahead) * row) // (ahead * row + line)
    most = max(1, min(rows, most))
    image = ((most - 1) * ahead + SIDE) * row
    together = max(1, _PAIRS // (image + most * line)) if most == rows else 1
    values, grads = _aligned(together * image), _aligned(together * most * line)
    for first in range(0, count, 2 * together):
        images = min(together, (count - first + 1) // 2)
        for v in range(len(takers.begins)):
            for top in range(0, rows, most):
                here = min(most, rows - top)
                image = ((here - 1) * ahead + SIDE) * row
                patch = _Patch(images, here, columns, ahead, column, row, image)
                vector = (takers.windows[v], held, takers.begins[v])
                place = (first, top)
                _write_patch(x, grad, shape, patch, place, vector, values, grads)
                if len(block) > 1:
                    at, firsts = takers.shifts[v], takers.firsts
                    _add_shared_patch(
                        values, grads, patch, v, at, firsts, totals, stride, block
                    )
                else:
                    lanes = takers.lanes
                    _add_patch(values, grads, patch, v, lanes, totals, stride)


@part
def _aligned(count: int) -> Pairs:
    """So many zeros, aligned as vectors are: to read across lines takes longer."""
    room = np.zeros(count + 2 * SUMS, np.uint32)
    first = -(room.ctypes.data // 4) % SUMS
    return room[first : first + count + SUMS]
