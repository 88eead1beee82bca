"""3 x 3 convolutions in groups as compiled loops for a CPU.

torch computes each group as a convolution of its own, and one of 2 or 4 channels leaves
most of a vector empty; groups merged into denser ones spend most of the work on zeros.
Here 16 channels of the output lie in the lanes of a vector whatever their groups, and
each takes the channels of its own group, two at a time, from the pixels around. Wider
groups have vectors of their own, whose lanes all take the same two.

Activations are flat uint16 that hold the bits of bfloat16, (N, H, W, C) with C at least
`SUMS`; sums are float32, and float64 over bands of rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from resnext_ablate.compute.dots import (
    SUMS,
    WORDS,
    add_pixels,
    add_shared_pixels,
    add_shared_taps,
    add_taps,
    no_sums,
    store_pairs,
    store_pixels,
)
from resnext_ablate.compute.lanes import (
    add_to,
    compiled,
    load,
    part,
    prefetch,
    zeros,
)
from resnext_ablate.compute.taps import SIDE

Words = npt.NDArray[np.uint16]
Pairs = npt.NDArray[np.uint32]
Places = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Totals = npt.NDArray[np.float64]
Shape = tuple[int, int, int, int]

_BAND_PAIRS = 1 << 14
"""Of a band of rows: it is read for each tap, from the nearer cache."""


class Steps(NamedTuple):
    """What the sums of a pixel take: a pair of channels of a tap, by row of the tap."""

    rows: Places
    """From the pixel's own row to the tap's, for each step."""
    columns: Places
    pairs: Places
    """Where the lanes of a step begin among those of a vector of channels; or the first
    channel of its pair, within the group."""
    begins: Places
    """The first channel of each vector of channels."""
    counts: Places
    """How many each of them has."""
    windows: Places
    """For each of them: the first of `WORDS` channels among which its groups are, or
    the first of its group."""
    lanes: Words
    """Flat (vectors, pairs, WORDS): which of those each place takes."""
    shared: tuple[int, ...]
    """Two numbers where all lanes take the same pair, one where each takes its own."""
    factors: Words
    """Flat (vectors, steps, WORDS): the bits of the weight of each."""
    starts: Floats
    """Flat (vectors, SUMS): what the sums of a pixel start from."""


class Grid(NamedTuple):
    """Where the pixels of an output lie, all or every second, counted in values."""

    image: int
    """From image to image."""
    start: int
    rows: int
    columns: int
    row_step: int
    column_step: int


@part
def _pixels(
    sums: Any,
    x: Words,
    at: tuple[int, int],
    ends: tuple[int, int, int],
    steps: Steps,
    span: tuple[int, int],
    vector: tuple[int, int],
    offsets: Places,
    nothing: Words,
    held: int,
) -> Any:
    """The sums of some pixels of a row, over those steps whose row is in the image."""
    place, step = at
    column, last_column, width = ends
    lanes_at, factors_at = vector
    for i in range(span[0], span[1]):
        shift = steps.columns[i]
        inside = (column + shift >= 0, last_column + shift < width)
        at_tap, f = place + offsets[i], factors_at + WORDS * i
        if len(steps.shared) > 1:
            at_pair = at_tap + steps.pairs[i]
            sums = add_shared_pixels(
                sums, x, at_pair, step, inside, nothing, steps.factors, f
            )
        else:
            sums = add_pixels(
                sums,
                x,
                at_tap,
                step,
                inside,
                nothing,
                held,
                steps.lanes,
                lanes_at + steps.pairs[i],
                steps.factors,
                f,
            )
    return sums


@part
def _span(steps: Steps, row: int, height: int) -> tuple[int, int]:
    """The first step whose row is in the image, and the first that is below it."""
    first, last = 0, len(steps.rows)
    while first < last and row + steps.rows[first] < 0:
        first += 1
    while first < last and row + steps.rows[last - 1] >= height:
        last -= 1
    return first, last


@part
def _convolve_row(
    x: Words,
    size: tuple[int, int, int],
    stride: int,
    image: int,
    row: int,
    steps: Steps,
    offsets: Places,
    out: Words,
    grid: Grid,
    blank: Words,
) -> None:
    """One row of a grid, in one image."""
    height, width, channels = size
    step, num_vectors = stride * channels, len(steps.windows)
    num_lanes = len(steps.lanes) // num_vectors
    num_factors = len(steps.factors) // num_vectors
    held = min(channels, WORDS)
    at_once = 8 if grid.columns >= 8 else 4 if grid.columns >= 4 else 1
    span = _span(steps, stride * row, height)
    x_row = (image * height + stride * row) * width * channels
    out_row = image * grid.image + grid.start + row * grid.row_step
    share = stride * width * channels // num_vectors
    for v in range(num_vectors):
        soon = x_row + (stride + 1) * width * channels + v * share
        for place in range(soon, soon + share, WORDS):
            prefetch(x, (place,))
        line = grid.columns * grid.column_step // num_vectors
        soon = out_row + grid.row_step + v * line
        for place in range(soon, soon + line, WORDS):
            prefetch(out, (place,))
        vector = (v * num_lanes, v * num_factors)
        z = load(steps.starts, (SUMS * v,), zeros(SUMS))
        eight = (z, z, z, z, z, z, z, z)
        for begin in range(0, grid.columns, at_once):
            # The last columns once more where they are too few.
            column = min(begin, grid.columns - at_once)
            to = out_row + steps.begins[v] + column * grid.column_step
            ends = (stride * column, stride * (column + at_once - 1), width)
            at = (x_row + steps.windows[v] + column * step, step)
            rest = (x, at, ends, steps, span, vector, offsets, blank, held)
            across, count = grid.column_step, steps.counts[v]
            if at_once == 8:
                store_pixels(out, to, across, _pixels(eight, *rest), count)
            elif at_once == 4:
                store_pixels(out, to, across, _pixels(eight[:4], *rest), count)
            else:
                store_pixels(out, to, across, _pixels(eight[:1], *rest), count)


@compiled
def convolve(
    x: Words,
    shape: Shape,
    stride: int,
    grids: tuple[tuple[Steps, Grid], ...],
    out: Words,
) -> None:
    """Writes pixels of an output, each a sum over the steps around a pixel of x.

    Args:
        x: images.
        shape: theirs, (N, H, W, C).
        stride: rows and columns of x from pixel to pixel of a grid.
        grids: pixels to write and the steps of each; none of these reaches farther than
            one column outside of the image.
        out: flat.
    """
    count, size = shape[0], shape[1:]
    blank = np.zeros(WORDS, np.uint16)
    for image in range(count):
        for steps, grid in grids:
            offsets = (steps.rows * size[1] + steps.columns) * size[2]
            for row in range(grid.rows):
                _convolve_row(
                    x, size, stride, image, row, steps, offsets, out, grid, blank
                )


@part
def _pair(
    x: Words, first: int, second: int, length: int, pairs: Pairs, start: int
) -> None:
    """Writes a row of one image and that of another as pairs."""
    if length < WORDS:
        for i in range(length):
            pairs[start + i] = x[first + i] | (np.uint32(x[second + i]) << 16)
        return
    for place in range(0, length, WORDS):
        # The last values once more where they do not fill a vector.
        at = min(place, length - WORDS)
        store_pairs(pairs, start + at, x, first + at, second + at)


@part
def _pair_values(
    x: Words, shape: Shape, images: tuple[int, int], top: int, values: Pairs
) -> None:
    """Writes rows of two images from `top` on, a pixel of zeros around the image."""
    _, height, width, channels = shape
    length = width * channels
    padded = length + 2 * channels
    first, second = images[0] * height, images[1] * height
    for r in range(len(values) // padded):
        row, to = top + r, r * padded + channels
        if 0 <= row < height:
            at, other = (first + row) * length, (second + row) * length
            _pair(x, at, other, length, values, to)
        else:
            values[to : to + length] = 0


@part
def _pair_grads(
    grad: Words, first: int, second: int, length: int, grads: Pairs
) -> None:
    """Writes gradients of two images, or of one: the second's place is negative."""
    if second >= 0:
        _pair(grad, first, second, length, grads, 0)
    else:
        for i in range(length):
            grads[i] = grad[first + i]


class Band(NamedTuple):
    """Rows of an output and of the input under them, of two images side by side."""

    values: Pairs
    """Flat (rows, W + 2, C) of the input, zeros outside of the image."""
    grads: Pairs
    """Flat (rows, columns, C) of the output."""
    rows: int
    columns: int
    channels: int
    row_step: int
    """From row to row of the input."""


@part
def _row_of_taps(
    band: Band,
    values_at: int,
    grads_at: int,
    lanes: Pairs,
    lanes_at: int,
    stride: Any,
    window: Any,
) -> Any:
    """The sums of a row of taps, by tuples as `add_taps` takes."""
    z, c = zeros(SUMS), band.channels
    sums = (z, z, z)
    x, g = band.values, band.grads
    step, whole = len(stride) * c, band.columns - band.columns % 4
    for r in range(band.rows):
        i = values_at + r * len(stride) * band.row_step
        k = grads_at + r * band.columns * c
        for _ in range(0, whole, 4):
            sums = add_taps(sums, x, i, g, k, c, stride, 4, lanes, lanes_at, window)
            i, k = i + 4 * step, k + 4 * c
        for _ in range(whole, band.columns):
            sums = add_taps(sums, x, i, g, k, c, stride, 1, lanes, lanes_at, window)
            i, k = i + step, k + c
    return sums


@part
def _add_band(
    band: Band,
    begins: Places,
    windows: Places,
    lanes: Pairs,
    totals: Totals,
    stride: Any,
    window: Any,
) -> None:
    group_width = totals.shape[3]
    for v in range(len(windows)):
        for tap_row in range(SIDE):
            x = tap_row * band.row_step + windows[v]
            for j in range(group_width):
                index = (v * group_width + j) * SUMS
                sums = _row_of_taps(band, x, begins[v], lanes, index, stride, window)
                add_to(totals, (v, tap_row, 0, j, 0), sums[0])
                add_to(totals, (v, tap_row, 1, j, 0), sums[1])
                add_to(totals, (v, tap_row, 2, j, 0), sums[2])


@part
def _add_shared_band(
    band: Band,
    begins: Places,
    windows: Places,
    firsts: Places,
    block: Any,
    totals: Totals,
    stride: int,
) -> None:
    c, size = band.channels, len(block)
    for v in range(len(begins)):
        for tap_row in range(SIDE):
            for first in range(len(firsts)):
                sums = no_sums(block)
                x = tap_row * band.row_step + windows[v] + firsts[first]
                for r in range(band.rows):
                    i = x + r * stride * band.row_step
                    k = begins[v] + r * band.columns * c
                    for _ in range(band.columns):
                        sums = add_shared_taps(sums, band.values, i, band.grads, k, c)
                        i, k = i + stride * c, k + c
                for n in range(SIDE * size):
                    place = (v, tap_row, n // size, first * size + n % size, 0)
                    add_to(totals, place, sums[n])


@compiled
def weight_gradient(
    x: Words,
    grad: Words,
    shape: Shape,
    stride: tuple[int, ...],
    begins: Places,
    windows: Places,
    window: tuple[int, ...],
    lanes: Pairs,
    firsts: Places,
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
        begins, windows: as those of `Steps`.
        window: one number where groups end where vectors do, two where not.
        lanes: flat (vectors, d, SUMS): which of a window each lane takes.
        firsts: where all lanes take the same, the first channels of blocks of a group.
        block: as many numbers as those have channels; one where lanes differ.
        totals: (vectors, 3, 3, d, SUMS), or the channels of each block for d.
    """
    count, height, width, channels = shape
    ahead = len(stride)
    rows, columns = (height - 1) // ahead + 1, (width - 1) // ahead + 1
    padded, length = (width + 2) * channels, columns * channels
    most = max(1, min(rows, _BAND_PAIRS // (ahead * padded)))
    values = _aligned(((most - 1) * ahead + SIDE) * padded)
    grads = _aligned(most * length)
    for first in range(0, count, 2):
        # An image without another is paired with itself, and its gradient with 0.
        has_second = first + 1 < count
        images = (first, first + 1 if has_second else first)
        for top in range(0, rows, most):
            here = min(most, rows - top)
            read = values[: ((here - 1) * ahead + SIDE) * padded]
            _pair_values(x, shape, images, top * ahead - 1, read)
            at = (first * rows + top) * length
            other = at + rows * length if has_second else -1
            _pair_grads(grad, at, other, here * length, grads)
            band = Band(read, grads, here, columns, channels, padded)
            if len(block) > 1:
                _add_shared_band(band, begins, windows, firsts, block, totals, ahead)
            else:
                _add_band(band, begins, windows, lanes, totals, stride, window)


@part
def _aligned(count: int) -> Pairs:
    """So many zeros, aligned as vectors are: to read across lines takes longer.

    There are more behind them, as a window of few channels reaches out of them.
    """
    room = np.zeros(count + SUMS + WORDS, np.uint32)
    first = -(room.ctypes.data // 4) % SUMS
    return room[first : first + count]
