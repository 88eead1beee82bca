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
    repeated,
    store_pixels,
)
from resnext_ablate.compute.lanes import (
    compiled,
    inlined,
    leaf,
    load,
    prefetch,
    zeros,
)
from resnext_ablate.compute.taps import SIDE

Words = npt.NDArray[np.uint16]
Places = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Shape = tuple[int, int, int, int]


class Steps(NamedTuple):
    """What the sums of a pixel take: a pair of channels of a row of taps."""

    rows: Places
    """From the pixel's own row to the taps', for each step."""
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
    """Flat (vectors, steps, 3, WORDS): the bits of the weight of each tap."""
    starts: Floats
    """Flat (vectors, SUMS): what the sums of a pixel start from."""


class Grid(NamedTuple):
    """Where the pixels of an output lie, in all rows or every second."""

    image: int
    """From image to image, counted in values as the other steps are."""
    start: int
    rows: int
    columns: int
    """Of x: one for each pixel of a row, or for every two."""
    width: int
    """Pixels of a row."""
    row_step: int
    column_step: int


@inlined
def _pixels(
    sums: Any,
    x: Words,
    at: tuple[int, int],
    inside: tuple[bool, bool],
    steps: Steps,
    span: tuple[int, int],
    vector: tuple[int, int],
    offsets: Places,
    nothing: Words,
    held: int,
    stride: Any,
    spread: Any,
) -> Any:
    """The sums of some pixels of a row, over those steps whose row is in the image."""
    place, step = at
    lanes_at, factors_at = vector
    for i in range(span[0], span[1]):
        at_taps, f = place + offsets[i], factors_at + SIDE * WORDS * i
        sums = add_pixels(
            sums,
            x,
            at_taps,
            step,
            inside,
            nothing,
            held,
            steps.lanes,
            lanes_at,
            steps.pairs[i],
            steps.factors,
            f,
            stride,
            spread,
            steps.shared,
        )
    return sums


@leaf
def _span(steps: Steps, row: int, height: int) -> tuple[int, int]:
    """The first step whose row is in the image, and the first that is below it."""
    first, last = 0, len(steps.rows)
    while first < last and row + steps.rows[first] < 0:
        first += 1
    while first < last and row + steps.rows[last - 1] >= height:
        last -= 1
    return first, last


@leaf
def _convolve_row(
    x: Words,
    size: tuple[int, int, int],
    stride: tuple[int, ...],
    spread: tuple[int, ...],
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
    ahead, each, num_vectors = len(stride), len(spread), len(steps.windows)
    num_lanes = len(steps.lanes) // num_vectors
    num_factors = len(steps.factors) // num_vectors
    held = min(channels, WORDS)
    at_once = 8 if grid.columns >= 8 else 4 if grid.columns >= 4 else 1
    span = _span(steps, ahead * row, height)
    x_row = (image * height + ahead * row) * width * channels
    out_row = image * grid.image + grid.start + row * grid.row_step
    share = ahead * width * channels // num_vectors
    for v in range(num_vectors):
        soon = x_row + (ahead + 1) * width * channels + v * share
        for place in range(soon, soon + share, WORDS):
            prefetch(x, (place,))
        line = grid.width * grid.column_step // num_vectors
        soon = out_row + grid.row_step + v * line
        for place in range(soon, soon + line, WORDS):
            prefetch(out, (place,))
        vector = (v * num_lanes, v * num_factors)
        start = load(steps.starts, (SUMS * v,), zeros(SUMS))
        for begin in range(0, grid.columns, at_once):
            # The last columns once more where they are too few.
            column = min(begin, grid.columns - at_once)
            to = out_row + steps.begins[v] + each * column * grid.column_step
            # Taps are around a pixel, or of two pixels under one column and the next.
            first = ahead * column - (1 if each == 1 else 0)
            end = ahead * (column + at_once - 1) + 2
            inside = (first >= 0, end <= width)
            at = (x_row + steps.windows[v] + first * channels, channels)
            rest = (x, at, inside, steps, span, vector, offsets, blank, held)
            across, count = grid.column_step, steps.counts[v]
            last = count if each * (column + at_once) <= grid.width else 0
            if at_once == 8:
                sums = repeated(start, spread, 8)
                sums = _pixels(sums, *rest, stride, spread)
                store_pixels(out, to, across, sums, count, last)
            elif at_once == 4:
                four = repeated(start, spread, 4)
                four = _pixels(four, *rest, stride, spread)
                store_pixels(out, to, across, four, count, last)
            else:
                one = repeated(start, spread, 1)
                one = _pixels(one, *rest, stride, spread)
                store_pixels(out, to, across, one, count, last)


@compiled
def convolve(
    x: Words,
    shape: Shape,
    stride: tuple[int, ...],
    spread: tuple[int, ...],
    grids: tuple[tuple[Steps, Grid], ...],
    out: Words,
) -> None:
    """Writes pixels of an output, each a sum over the steps around a pixel of x.

    The compiler knows how long a tuple is: that of two arguments tells it a number.

    Args:
        x: images.
        shape: theirs, (N, H, W, C).
        stride: as many numbers as there are rows and columns of x from pixel to pixel
            of a grid.
        spread: as many as there are pixels to a column of x; those of a row of taps are
            three columns around a pixel, or of two pixels one column and the next.
        grids: pixels to write and the steps of each; none of these reaches farther than
            one column outside of the image.
        out: flat.
    """
    count, size = shape[0], shape[1:]
    blank = np.zeros(WORDS, np.uint16)
    for image in range(count):
        for steps, grid in grids:
            offsets = steps.rows * size[1] * size[2]
            for row in range(grid.rows):
                _convolve_row(
                    x,
                    size,
                    stride,
                    spread,
                    image,
                    row,
                    steps,
                    offsets,
                    out,
                    grid,
                    blank,
                )
