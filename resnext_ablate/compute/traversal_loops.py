"""Ways over all values of (R, L) for compiled loops: row by row, or down columns.

Each goes in steps as wide as a vector; what is left of a row is taken value by value.
All sums are float32 over 64 rows at most and float64 over those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from resnext_ablate.compute.lanes import (
    WIDE,
    add_to_rows,
    inlined,
    leaf,
    part,
    plus_each,
    zeros,
)

Sums = npt.NDArray[np.float64]
Lines = npt.NDArray[np.float32]

_ROWS = 64
_CACHED, _SHORT = 8 << 20, 192
"""Bytes that are read in all, and for a row. Sums go down columns, in registers; what
no cache holds comes fast in the order of memory alone, which is almost theirs where
rows are short."""


def everywhere(function: Any) -> Any:
    """Makes a function of some columns of a row one of all, given shape and arguments.

    It takes the row, the first column, and zeros, as many as there are columns.
    """
    one = inlined(function)

    @part
    def over(shape: tuple[int, int], arguments: Any) -> None:
        count, length = shape
        wide = length - length % WIDE
        for i in range(count):
            for j in range(0, wide, WIDE):
                one(i, j, zeros(WIDE), *arguments)
            for j in range(wide, length):
                one(i, j, zeros(1), *arguments)

    return over


def summed(*, arrays: int) -> Callable[[Any], Any]:
    """Makes terms of some columns of a row, a tuple, sums over all rows, (K, L).

    They take what `everywhere` does, and read so many arrays, of which the first
    argument is one.
    """

    def made(function: Any) -> Any:
        terms = inlined(function)
        down, along = _down_columns(terms), _along_rows(terms)

        @part
        def over(shape: tuple[int, int], arguments: Any, sums: Sums) -> None:
            count, length = shape
            row = arrays * length * arguments[0].itemsize
            is_far = row > _SHORT and count * row > _CACHED
            lines = np.zeros(sums.shape, np.float32)
            for first in range(0, count, _ROWS):
                rows = (first, min(count, first + _ROWS))
                if is_far:
                    along(rows, length, arguments, lines, sums)
                else:
                    down(rows, length, arguments, sums)

        return over

    return made


def _down_columns(terms: Any) -> Any:
    """Adds the terms of some rows to sums, which stay in registers."""

    @inlined
    def one(
        rows: tuple[int, int], j: int, nothing: Any, arguments: Any, sums: Sums
    ) -> None:
        totals = terms(rows[0], j, nothing, *arguments)
        for i in range(rows[0] + 1, rows[1]):
            totals = plus_each(totals, terms(i, j, nothing, *arguments))
        add_to_rows(sums, j, totals)

    @leaf
    def down(rows: tuple[int, int], length: int, arguments: Any, sums: Sums) -> None:
        wide = length - length % WIDE
        for j in range(0, wide, WIDE):
            one(rows, j, zeros(WIDE), arguments, sums)
        for j in range(wide, length):
            one(rows, j, zeros(1), arguments, sums)

    return down


def _along_rows(terms: Any) -> Any:
    """Adds the terms of some rows to sums by way of lines, which are zeros again."""

    @leaf
    def along(
        rows: tuple[int, int], length: int, arguments: Any, lines: Lines, sums: Sums
    ) -> None:
        wide = length - length % WIDE
        for i in range(rows[0], rows[1]):
            for j in range(0, wide, WIDE):
                add_to_rows(lines, j, terms(i, j, zeros(WIDE), *arguments))
            for j in range(wide, length):
                add_to_rows(lines, j, terms(i, j, zeros(1), *arguments))
        for kind in range(len(lines)):
            for j in range(length):
                sums[kind, j] += lines[kind, j]
                lines[kind, j] = 0

    return along
