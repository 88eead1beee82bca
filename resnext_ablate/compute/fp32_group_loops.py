"""3 x 3 convolutions in groups as compiled loops for any CPU, in float32.

16 channels of the output lie in the lanes of a vector. A band of rows is read as the
lanes take it, once for all nine taps, and is still in a near cache when they come.

Activations are flat float32, (N, H, W, C) with C at least `SUMS`; sums are float32, and
float64 over blocks of images or rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from resnext_ablate.compute.lanes import (
    HAS_32_REGISTERS,
    add_products,
    add_to,
    compiled,
    leaf,
    load,
    part,
    prefetch,
    store_each,
    zeros,
)
from resnext_ablate.compute.row_loops import (
    SUMS,
    Floats,
    Layout,
    Places,
    Shape,
    Vector,
    Vectors,
    ahead_of,
    aligned,
    layout_of,
    read_rows,
)
from resnext_ablate.compute.taps import SIDE

Totals = npt.NDArray[np.float64]

_AT_ONCE = 8 if HAS_32_REGISTERS else 4
"""Pixels whose sums are held in registers."""
_BAND = 1 << 14
"""Values of a band of rows or a block of images: they are read from a near cache."""


class Grids(NamedTuple):
    """Pixels of an output, in one grid or more, counted in values."""

    starts: Places
    """(grids, 4): where each begins, its rows and columns, and the first tap that is
    the next grid's."""
    row_step: int
    pixel_step: int
    image_step: int
    taps: Places
    """(taps, 2), of all grids: rows and columns from the pixel, each -1, 0 or 1."""


# Loops take arrays as arguments of their own: taking one out of a tuple would count who
# holds it, which is slow.


@leaf
def _pixels(
    sums: Any,
    read: Floats,
    place: int,
    step: int,
    offsets: Places,
    span: tuple[int, int],
    factors: Floats,
    begin: int,
    is_shared: Any,
) -> Any:
    """The sums of some pixels of a row, and what all taps add to them."""
    for i in range(span[0], span[1]):
        factor = load(factors, (begin + i * SUMS,), zeros(SUMS))
        sums = add_products(sums, read, place + offsets[i], step, factor, is_shared)
    return sums


class _Line(NamedTuple):
    """Pixels to write, and how to come from one to the next."""

    num_pixels: int
    place: int
    step: int
    across: int
    """From what one of them reads to what the next does."""
    first: int
    """The first lane that is written."""
    ahead: int
    """From a pixel to one that will be written soon."""


@leaf
def _convolve_row(
    read: Floats,
    begin: int,
    line: _Line,
    offsets: Places,
    span: tuple[int, int],
    factors: Floats,
    factors_at: int,
    start: Any,
    is_shared: Any,
    out: Floats,
) -> None:
    """A row of a grid, for one vector of channels."""
    count, across = line.num_pixels, line.across
    at_once = _AT_ONCE if count >= _AT_ONCE else 4 if count >= 4 else 1
    four = (start, start, start, start)
    for first in range(0, count, at_once):
        # The last pixels once more where they are too few.
        pixel = min(first, count - at_once)
        at = begin + pixel * across
        rest = (across, offsets, span, factors, factors_at, is_shared)
        to = line.place + pixel * line.step
        for soon in range(to, to + at_once * line.step, line.step):
            prefetch(out, (soon + line.ahead,))
        if at_once == 8:
            sums = _pixels((*four, *four), read, at, *rest)
            store_each(out, to, line.step, sums, line.first)
        elif at_once == 4:
            sums = _pixels(four, read, at, *rest)
            store_each(out, to, line.step, sums, line.first)
        else:
            sums = _pixels(four[:1], read, at, *rest)
            store_each(out, to, line.step, sums, line.first)


class _Band(NamedTuple):
    """Rows of an output, whose taps have been read."""

    top: int
    end: int
    row: int
    """From what a row of theirs reads to what the next does, counted in values."""
    across: int
    place: int
    """Of the image and the vector, in the output."""
    row_step: int
    step: int
    ahead: int
    """From a pixel to one that will be written soon."""


@leaf
def _convolve_band(
    read: Floats,
    band: _Band,
    grids: Places,
    offsets: Places,
    vector: Vector,
    factors: Floats,
    factors_at: int,
    start: Any,
    is_shared: Any,
    out: Floats,
) -> None:
    """Some rows of each grid, for one vector of channels."""
    span = (0, 0)
    for grid in range(len(grids)):
        begin, rows, columns = grids[grid, 0], grids[grid, 1], grids[grid, 2]
        span = (span[1], grids[grid, 3] * vector.width)
        for row in range(band.top, min(band.end, rows)):
            to = band.place + begin + row * band.row_step
            line = _Line(columns, to, band.step, band.across, vector.first, band.ahead)
            _convolve_row(
                read,
                (row - band.top) * band.row,
                line,
                offsets,
                span,
                factors,
                factors_at,
                start,
                is_shared,
                out,
            )


@part
def _offsets(taps: Places, group_width: int, layout: Layout) -> Places:
    """Where what a pixel takes is, from the row above and the column before it on."""
    out = np.empty(len(taps) * group_width, np.int64)
    for tap in range(len(taps)):
        at = (taps[tap, 0] + 1) * layout.row + (taps[tap, 1] + 1) * layout.pixel
        for j in range(group_width):
            out[tap * group_width + j] = at + j * layout.channel
    return out


@leaf
def _rows_at_once(rows: int, stride: int, layout: Layout) -> int:
    """How many of an output make a band."""
    most: int = (_BAND // layout.row - SIDE) // stride + 1
    return max(1, min(rows, most))


@compiled
def convolve(
    x: Floats,
    shape: Shape,
    stride: int,
    vectors: Vectors,
    grids: Grids,
    factors: Floats,
    starts: Floats,
    out: Floats,
) -> None:
    """Writes pixels of an output, each a sum over the taps around a pixel of x.

    Args:
        x: images.
        shape: theirs, (N, H, W, C).
        stride: rows and columns of x from pixel to pixel of a grid.
        vectors: of the channels.
        grids: pixels to write and the taps of each.
        factors: flat (vectors, taps, d, SUMS), zeros in lanes that do not count.
        starts: flat (vectors, SUMS): what the sums of a pixel start from.
        out: flat.
    """
    windows, firsts, groups, group_width, is_shared = vectors
    begins, row_step, step, image_step, taps = grids
    rows, layout = 0, layout_of(shape[2], group_width, is_shared)
    for grid in range(len(begins)):
        rows = max(rows, begins[grid, 1])
    most = _rows_at_once(rows, stride, layout)
    read = aligned(((most - 1) * stride + SIDE) * layout.row)
    offsets, own = _offsets(taps, group_width, layout), aligned(len(factors))
    for i in range(len(factors)):
        own[i] = factors[i]
    row, across = stride * layout.row, stride * layout.pixel
    ahead = ahead_of(rows, row_step)
    for image in range(shape[0]):
        for v in range(len(windows)):
            vector = Vector(windows[v], firsts[v], groups[v], group_width)
            start = load(starts, (v * SUMS,), zeros(SUMS))
            place, at = image * image_step + windows[v], v * len(offsets) * SUMS
            for top in range(0, rows, most):
                end = min(rows, top + most)
                seen = (top * stride - 1, (end - 1) * stride + SIDE - 1)
                read_rows(x, shape, image, seen, vector, is_shared, read, layout, 0)
                band = _Band(top, end, row, across, place, row_step, step, ahead)
                _convolve_band(
                    read, band, begins, offsets, vector, own, at, start, is_shared, out
                )


class _Block(NamedTuple):
    """Images, or rows of one, whose sums are float32."""

    images: int
    image_step: int
    """From image to image, of what is read; the other steps alike."""
    rows: int
    row_step: int
    columns: int
    step: int


@leaf
def _add_taps(
    read: Floats,
    begin: int,
    pixel: int,
    both: int,
    grad: Floats,
    place: int,
    channels: int,
    block: _Block,
    is_shared: Any,
) -> Any:
    """The sums of a row of taps for two channels of a group.

    Args:
        read: rows of x, from `begin` on for these taps.
        pixel: from tap to tap.
        both: from the first of the channels to the second.
        grad: of the output, from `place` on.
        channels: of the gradient.
        block: what to take.
    """
    z, ahead = (
        zeros(SUMS),
        ahead_of(block.images * block.rows, block.columns * channels),
    )
    one = other = (z, z, z)
    for image in range(block.images):
        for row in range(block.rows):
            i = begin + image * block.image_step + row * block.row_step
            for _ in range(block.columns):
                prefetch(grad, (place + ahead,))
                g = load(grad, (place,), z)
                one = add_products(one, read, i, pixel, g, is_shared)
                other = add_products(other, read, i + both, pixel, g, is_shared)
                i += block.step
                place += channels
    return one, other


@leaf
def _add_block(
    read: Floats,
    layout: Layout,
    grad: Floats,
    place: int,
    channels: int,
    block: _Block,
    is_shared: Any,
    totals: Totals,
    v: int,
) -> None:
    """Adds what a block gives each weight of a vector."""
    group_width = totals.shape[3]
    num_rows = SIDE * group_width  # Of taps, one for each channel of a group.
    for first in range(0, num_rows, 2):
        second = min(first + 1, num_rows - 1)
        row, j = first // group_width, first % group_width
        at = row * layout.row + j * layout.channel
        other_row, other_j = second // group_width, second % group_width
        both = other_row * layout.row + other_j * layout.channel - at
        one, other = _add_taps(
            read, at, layout.pixel, both, grad, place, channels, block, is_shared
        )
        for tap in range(SIDE):
            add_to(totals, (v, row, tap, j, 0), one[tap])
            if second > first:
                add_to(totals, (v, other_row, tap, other_j, 0), other[tap])


@compiled
def weight_gradient(
    x: Floats,
    grad: Floats,
    shape: Shape,
    stride: int,
    vectors: Vectors,
    totals: Totals,
) -> None:
    """Adds what a batch gives each weight.

    Args:
        x: what the convolution saw.
        grad: of its output.
        shape: of x, (N, H, W, C).
        stride: 1 or 2.
        vectors: of the channels.
        totals: (vectors, 3, 3, d, SUMS).
    """
    count, height, width, channels = shape
    windows, firsts, groups, group_width, is_shared = vectors
    rows, columns = (height - 1) // stride + 1, (width - 1) // stride + 1
    layout = layout_of(width, group_width, is_shared)
    most = _rows_at_once(rows, stride, layout)
    size = ((most - 1) * stride + SIDE) * layout.row
    together = max(1, min(count, _BAND // size)) if most == rows else 1
    read = aligned(together * size)
    for image in range(0, count, together):
        images = min(together, count - image)
        for v in range(len(windows)):
            vector = Vector(windows[v], firsts[v], groups[v], group_width)
            for top in range(0, rows, most):
                end = min(rows, top + most)
                seen = (top * stride - 1, (end - 1) * stride + SIDE - 1)
                for n in range(images):
                    read_rows(
                        x,
                        shape,
                        image + n,
                        seen,
                        vector,
                        is_shared,
                        read,
                        layout,
                        n * size,
                    )
                row, column = stride * layout.row, stride * layout.pixel
                block = _Block(images, size, end - top, row, columns, column)
                place = (image * rows + top) * columns * channels + windows[v]
                _add_block(
                    read,
                    layout,
                    grad,
                    place,
                    channels,
                    block,
                    is_shared,
                    totals,
                    v,
                )
