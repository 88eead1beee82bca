"""Rows of images as the lanes of vectors take them, for convolutions in groups.

16 channels lie in the lanes of a vector, those of as many groups as fit. What the lanes
take in turn of a narrow group, each of its channels, is written side by side here. Of a
wide group all lanes take the same channel, so that its channels are copied as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from resnext_ablate.compute.lanes import (
    leaf,
    load,
    part,
    prefetch,
    spread,
    store,
    zeros,
)

Floats = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]
Shape = tuple[int, int, int, int]

SUMS = 16
"""Lanes of a vector."""
WIDEST_MIXED = 8
"""Channels of a group that shares vectors with others."""
_NEAR = 1 << 15
"""Values of the largest image that may lie in a near cache along with the next."""
_ROWS_AHEAD = 2
"""From a row of larger ones to the one that is asked of the memory meanwhile."""


class Vectors(NamedTuple):
    """The channels of each vector."""

    windows: Places
    """The first of the `SUMS` channels that its lanes are."""
    firsts: Places
    """Its first lane that counts: channels before it are those of other vectors. What
    it writes behind its own channels, a later vector writes again."""
    groups: Places
    """The first channel of its group, or of its first one."""
    width: int
    """Channels of a group."""
    is_shared: tuple[int, ...]
    """Two numbers where all lanes take the same channel, one where each takes its own
    group's: the compiler knows how long a tuple is."""


class Layout(NamedTuple):
    """Of rows of x as the lanes of vectors take them, a pixel of zeros at both ends.

    Those of narrow groups are (rows, d, W + 2, SUMS), of wide ones (rows, W + 2, d).
    """

    row: int
    """From row to row, counted in values as the others are."""
    pixel: int
    channel: int


class Vector(NamedTuple):
    """One of `Vectors`."""

    window: int
    first: int
    group: int
    width: int


class _Row(NamedTuple):
    """Pixels to read, and where to write what lanes take of them."""

    place: int
    step: int
    num_pixels: int
    to: int
    ahead: int
    """From a pixel to one that will be read soon."""


@leaf
def ahead_of(rows: int, length: int) -> int:
    """From a value to the one that is asked of the memory meanwhile, so many rows of
    such a length being an image: to the next image's, or some rows on."""
    return rows * length if rows * length <= _NEAR else _ROWS_AHEAD * length


@leaf
def layout_of(width: int, group_width: int, is_shared: Any) -> Layout:
    """Of rows of W pixels."""
    if len(is_shared) > 1:
        return Layout((width + 2) * group_width, group_width, 1)
    line = (width + 2) * SUMS
    return Layout(group_width * line, SUMS, line)


@part
def aligned(count: int) -> Floats:
    """So many zeros, aligned as vectors are: to read across lines takes longer."""
    room = np.zeros(count + 2 * SUMS, np.float32)
    first = -(room.ctypes.data // 4) % SUMS
    return room[first : first + count + SUMS]


@leaf
def _spread_row(
    x: Floats, row: _Row, read: Floats, channel: int, group: Any, before: Any
) -> None:
    """Writes what the lanes of narrow groups take of a row, by tuples as `spread`."""
    place, to = row.place, row.to
    for _ in range(row.num_pixels):
        prefetch(x, (place + row.ahead,))
        spread(read, to, channel, load(x, (place,), zeros(SUMS)), group, before)
        place += row.step
        to += SUMS


@leaf
def _mix_row(
    x: Floats, row: _Row, read: Floats, channel: int, width: int, first: int
) -> None:
    """As `_spread_row`, of groups that the compiler knows the widths of."""
    if first > 0:
        _mix_last_row(x, row, read, channel, width)
    elif width == 1:
        _spread_row(x, row, read, channel, (0,), (0,))
    elif width == 2:
        _spread_row(x, row, read, channel, (0, 0), (0,))
    elif width == 3:
        _spread_row(x, row, read, channel, (0, 0, 0), (0,))
    elif width == 4:
        _spread_row(x, row, read, channel, (0, 0, 0, 0), (0,))
    elif width == 5:
        _spread_row(x, row, read, channel, (0, 0, 0, 0, 0), (0,))
    elif width == 6:
        _spread_row(x, row, read, channel, (0, 0, 0, 0, 0, 0), (0,))
    elif width == 7:
        _spread_row(x, row, read, channel, (0, 0, 0, 0, 0, 0, 0), (0,))
    else:
        _spread_row(x, row, read, channel, (0, 0, 0, 0, 0, 0, 0, 0), (0,))


@leaf
def _mix_last_row(x: Floats, row: _Row, read: Floats, channel: int, width: int) -> None:
    """As `_mix_row`, where groups do not fill a vector and end with the last one."""
    if width == 3:
        _spread_row(x, row, read, channel, (0, 0, 0), (0, 0))
    elif width == 5:
        _spread_row(x, row, read, channel, (0, 0, 0, 0, 0), (0, 0))
    elif width == 6:
        _spread_row(x, row, read, channel, (0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0))
    else:
        _spread_row(x, row, read, channel, (0, 0, 0, 0, 0, 0, 0), (0, 0, 0))


@leaf
def _copy_row(x: Floats, row: _Row, read: Floats, width: int) -> None:
    """Writes a wide group's channels of a row."""
    place, to = row.place, row.to
    for _ in range(row.num_pixels):
        prefetch(x, (place + row.ahead,))
        for j in range(width):
            read[to + j] = x[place + j]
        place += row.step
        to += width


@leaf
def read_rows(
    x: Floats,
    shape: Shape,
    image: int,
    rows: tuple[int, int],
    vector: Vector,
    is_shared: Any,
    read: Floats,
    layout: Layout,
    begin: int,
) -> None:
    """Writes rows of an image as a vector takes them, zeros for those outside of it.

    Args:
        x: flat (N, H, W, C).
        shape: its own.
        image: which of them.
        rows: the first of its rows, and the one behind the last.
        vector: who takes them.
        is_shared: as that of `Vectors`.
        read: where to write, from `begin` on; its first and last pixels are zeros.
        layout: of what is written.
    """
    _, height, width, channels = shape
    ahead = ahead_of(height, width * channels)
    for at in range(rows[0], rows[1]):
        if at < 0 or at >= height:
            for place in range(begin, begin + layout.row - SUMS, SUMS):
                store(read, (place,), zeros(SUMS))
            store(read, (begin + layout.row - SUMS,), zeros(SUMS))
        else:
            place = (image * height + at) * width * channels
            to = begin + layout.pixel
            if len(is_shared) > 1:
                row = _Row(place + vector.group, channels, width, to, ahead)
                _copy_row(x, row, read, vector.width)
            else:
                row = _Row(place + vector.window, channels, width, to, ahead)
                _mix_row(x, row, read, layout.channel, vector.width, vector.first)
        begin += layout.row
