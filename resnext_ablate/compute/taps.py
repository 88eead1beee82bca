"""The taps of a 3 x 3 kernel, with a pixel of zeros around the image."""

from __future__ import annotations

from functools import lru_cache

SIDE = 3
"""Of a kernel."""
Taps = tuple[tuple[int, int, int, int], ...]
"""By row: rows and columns from a pixel, and those of the kernel."""

_SQUARE = [(row, column) for row in range(SIDE) for column in range(SIDE)]
TAPS: Taps = tuple((row - 1, column - 1, row, column) for row, column in _SQUARE)
"""What a pixel of the output takes, from the pixel of the input that it lies on."""


def corners(height: int, width: int, stride: int) -> list[tuple[int, int]]:
    """The first pixel of each grid of an image whose pixels the same taps have seen:
    those in even and in odd rows and columns where the stride is 2."""
    return [
        (top, left)
        for top in range(min(stride, height))
        for left in range(min(stride, width))
    ]


@lru_cache
def givers(top: int, left: int, stride: int) -> Taps:
    """The taps that have seen a pixel, by its row and column modulo the stride: from
    the pixel of the output that lies on it, or on the one before."""
    taps = (
        ((top + 1 - row) // stride, (left + 1 - column) // stride, row, column)
        for row, column in _SQUARE
        if (top + 1 - row) % stride == 0 == (left + 1 - column) % stride
    )
    return tuple(sorted(taps))


@lru_cache
def rows_of(taps: Taps) -> tuple[tuple[int, int], ...]:
    """Rows from a pixel and of the kernel that its taps are in."""
    return tuple(sorted({(row, kernel_row) for row, _, kernel_row, _ in taps}))
