"""Tiles of a product of matrices of bfloat16 in the vector registers of a CPU.

A tile is some vectors of lanes for each of some rows. All lanes of a row take the same
two values at a time, and each multiplies them by two of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from resnext_ablate.compute.dots import (
    SUMS,
    data_of,
    dot,
    everywhere,
    load_bits,
    plus_times,
)
from resnext_ablate.compute.lanes import Lanes, narrowed, part

_FLOATS = ir.VectorType(ir.FloatType(), SUMS)
_PAIRS = ir.VectorType(ir.IntType(32), SUMS)


@intrinsic
def add_tile(
    context: Any,
    sums: Any,
    values: Any,
    start: Any,
    step: Any,
    lanes: Any,
    lanes_at: Any,
    vectors: Any,
) -> Any:
    """The sums of a tile, and what one pair of values of each row adds.

    Args:
        sums: a tuple, the vectors of one row behind those of the other.
        values: flat uint16, the bits of bfloat16, or flat uint32, pairs of them.
        start: where the pair of the first row is.
        step: from row to row.
        lanes: flat uint32, pairs of bfloat16: from `lanes_at` on those of all vectors.
        vectors: a tuple of as many numbers as a row has vectors.
    """

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        data, count = data_of(target, builder, signature, given), vectors.count
        places = [plus_times(builder, given[5], SUMS, v) for v in range(count)]
        own = [load_bits(builder, data(4), place, _PAIRS) for place in places]
        out = given[0]
        for index in range(sums.count):
            row, v = divmod(index, count)
            if v == 0:
                place = plus_times(builder, given[2], given[3], row)
                found = everywhere(builder, builder.gep(data(1), [place]))
            total = dot(builder, builder.extract_value(out, index), found, own[v])
            out = builder.insert_value(out, total, index)
        return out

    int64 = types.int64
    return sums(sums, values, int64, int64, lanes, int64, vectors), generate


@intrinsic
def store_tile(
    context: Any, out: Any, start: Any, step: Any, sums: Any, vectors: Any
) -> Any:
    """Writes a tile as bfloat16: to nearest, ties to even.

    Args:
        out: flat uint16.
        start: of the first row.
        step: from row to row.
        sums: as `add_tile` returns.
        vectors: as it takes.
    """

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        data = data_of(target, builder, signature, given)(0)
        for index in range(sums.count):
            row, v = divmod(index, vectors.count)
            total = builder.extract_value(given[3], index)
            bits = narrowed(builder, total, Lanes(SUMS))
            place = plus_times(builder, given[1], given[2], row)
            place = plus_times(builder, place, SUMS, v)
            pointer = builder.gep(data, [place])
            pointer = builder.bitcast(pointer, bits.type.as_pointer())
            builder.store(bits, pointer, align=2)
        return target.get_dummy_value()

    int64 = types.int64
    return types.void(out, int64, int64, sums, vectors), generate


@intrinsic
def keep_origin(context: Any, lines: Any, start: Any, sums: Any, vectors: Any) -> Any:
    """Writes the first row of a tile as `add_moments` takes origins."""

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        data = data_of(target, builder, signature, given)(0)
        for v in range(vectors.count):
            pointer = _line(builder, data, given[1], 3 * v)
            builder.store(builder.extract_value(given[2], v), pointer, align=4)
        return target.get_dummy_value()

    return types.void(lines, types.int64, sums, vectors), generate


@intrinsic
def add_moments(context: Any, lines: Any, start: Any, sums: Any, vectors: Any) -> Any:
    """Adds up the rows of a tile, and their squares, from an origin on.

    Args:
        lines: flat float32; from `start` on those of each vector: the origin of each
            lane, the sums, and the sums of squares.
        start: where these are.
        sums: as `add_tile` returns.
        vectors: as it takes.
    """

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        data, count = data_of(target, builder, signature, given)(0), vectors.count
        contract = {"flags": ("contract",)}
        for v in range(count):
            origin, *places = (
                _line(builder, data, given[1], 3 * v + kind) for kind in range(3)
            )
            origin = builder.load(origin, align=4)
            total, squares = (builder.load(place, align=4) for place in places)
            for index in range(v, sums.count, count):
                value = builder.fsub(builder.extract_value(given[2], index), origin)
                total = builder.fadd(total, value)
                square = builder.fmul(value, value, **contract)
                squares = builder.fadd(squares, square, **contract)
            for value, place in zip((total, squares), places, strict=True):
                builder.store(value, place, align=4)
        return target.get_dummy_value()

    return types.void(lines, types.int64, sums, vectors), generate


def _line(builder: Any, data: Any, start: Any, number: int) -> Any:
    """A pointer to one of the vectors from a place on."""
    place = plus_times(builder, start, SUMS, number)
    return builder.bitcast(builder.gep(data, [place]), _FLOATS.as_pointer())


@part
def aligned(count: int) -> npt.NDArray[np.uint32]:
    """So many zeros, aligned as vectors are: to read across lines takes longer."""
    room = np.zeros(count + 2 * SUMS, np.uint32)
    first = -(room.ctypes.data // 4) % SUMS
    return room[first : first + count + SUMS]
