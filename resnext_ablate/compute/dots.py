"""Sums of products of bfloat16 pairs in the vector registers of a CPU.

One instruction (AVX512-BF16) multiplies 16 pairs of two vectors and adds the products
of each to 16 float32 sums. Here a compiled loop says it, along with how values are
brought to the lanes that need them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from resnext_ablate.compute.lanes import BFloat, Lanes, narrowed
from resnext_ablate.compute.taps import SIDE

SUMS = 16
"""Lanes of a vector of sums: each takes two bfloat16 at a time."""
WORDS = 2 * SUMS
"""Values of bfloat16 in a vector."""
HAS_DOTS = bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16"))
"""Whether the CPU has the instruction."""

_INT16, _INT32, _INT64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), SUMS)
_WORDS = ir.VectorType(_INT16, WORDS)
_PAIRS = ir.VectorType(_INT32, SUMS)
_BFLOATS = ir.VectorType(BFloat(), WORDS)


@intrinsic
def add_pixels(
    context: Any,
    sums: Any,
    values: Any,
    start: Any,
    step: Any,
    inside: Any,
    nothing: Any,
    held: Any,
    lanes: Any,
    lanes_at: Any,
    pair: Any,
    factors: Any,
    factors_at: Any,
    stride: Any,
    spread: Any,
    shared: Any,
) -> Any:
    """The sums of several pixels, and what one pair of channels of a row of taps adds.

    Args:
        sums: a tuple, `SUMS` for each pixel.
        values: flat uint16, the bits of bfloat16.
        start: where the values of the first pixel's first tap are.
        step: from column to column.
        inside: whether the first and the last column are any.
        nothing: flat uint16, `WORDS` zeros in place of those that are not.
        held: how many values of a column are read, `WORDS` at most.
        lanes: flat uint16, from `lanes_at` and `pair` on which of the values each place
            takes.
        factors: flat uint16, from `factors_at` on the bits of what it is multiplied by,
            `WORDS` for each of three taps.
        stride: a tuple of as many numbers as there are columns from pixel to pixel.
        spread: one of two where there are two pixels to a column, which is then the
            first tap of the pixel before them, and the others of themselves.
        shared: one of two where all lanes take the same two values, from `pair` on.
    """

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        data = data_of(target, builder, signature, given)
        if shared.count > 1:
            start, found = builder.add(given[2], given[9]), everywhere
        else:
            index = load_bits(builder, data(7), builder.add(given[8], given[9]), _WORDS)
            is_held = _first_lanes(builder, given[6], WORDS)
            start, found = given[2], partial(_permuted, index=index, chosen=is_held)
        row = _Row(sums.count, stride.count, spread.count)
        pointers = _columns(builder, data, given, start, row.columns)
        values = [found(builder, pointer) for pointer in pointers]
        places = [plus_times(builder, given[11], WORDS, tap) for tap in range(SIDE)]
        factors = [load_bits(builder, data(10), place, _WORDS) for place in places]
        return _add_row(builder, row, given[0], values, factors)

    int64 = types.int64
    rest = (int64, int64, inside, nothing, int64, lanes, int64, int64, factors, int64)
    return sums(sums, values, *rest, stride, spread, shared), generate


class _Row(NamedTuple):
    """Some pixels, and the columns under a row of their taps."""

    pixels: int
    stride: int
    spread: int

    @property
    def columns(self) -> int:
        if self.spread > 1:
            return self.pixels // self.spread + 1
        return (self.pixels - 1) * self.stride + SIDE

    def pixel(self, column: int, tap: int) -> int | None:
        """Which of them has a column as that tap."""
        if self.spread > 1:
            pixel, rest = self.spread * column + tap - 1, 0
        else:
            pixel, rest = divmod(column - tap, self.stride)
        return pixel if rest == 0 and 0 <= pixel < self.pixels else None


def _add_row(builder: Any, row: _Row, out: Any, values: Any, factors: Any) -> Any:
    """The sums of pixels, where each column serves all taps that it lies under."""
    for column, tap in product(range(row.columns), range(SIDE)):
        pixel = row.pixel(column, tap)
        if pixel is not None:
            total = builder.extract_value(out, pixel)
            total = dot(builder, total, values[column], factors[tap])
            out = builder.insert_value(out, total, pixel)
    return out


@intrinsic(prefer_literal=True)
def repeated(context: Any, value: Any, spread: Any, count: Any) -> Any:
    """A tuple of one value so many times for each number of `spread`."""
    kind = types.containers.UniTuple(value, spread.count * count.literal_value)

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        return target.make_tuple(builder, kind, [given[0]] * kind.count)

    return kind(value, spread, count), generate


@intrinsic
def store_pixels(
    context: Any,
    out: Any,
    start: Any,
    step: Any,
    sums: Any,
    count: Any,
    last_count: Any,
) -> Any:
    """Writes the sums of several pixels as bfloat16: to nearest, ties to even.

    Args:
        out: flat uint16.
        start: of the first pixel's.
        step: from pixel to pixel.
        sums: a tuple, `SUMS` for each pixel.
        count: how many of these are written.
        last_count: of the last pixel.
    """

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        base = data_of(target, builder, signature, given)(0)
        is_written = [_first_lanes(builder, given[4], SUMS)] * sums.count
        is_written[-1] = _first_lanes(builder, given[5], SUMS)
        for pixel in range(sums.count):
            total = builder.extract_value(given[3], pixel)
            bits = narrowed(builder, total, Lanes(SUMS))
            place = plus_times(builder, given[1], given[2], pixel)
            pointer = builder.gep(base, [place])
            pointer = builder.bitcast(pointer, bits.type.as_pointer())
            arguments = [bits, pointer, ir.Constant(_INT32, 2), is_written[pixel]]
            name = f"llvm.masked.store.v{SUMS}i16.p0"
            _call(builder, name, ir.VoidType(), arguments)
        return target.get_dummy_value()

    int64 = types.int64
    return types.void(out, int64, int64, sums, int64, int64), generate


@intrinsic(prefer_literal=True)
def add_taps(
    context: Any,
    sums: Any,
    values: Any,
    values_at: Any,
    grads: Any,
    grads_at: Any,
    stride: Any,
    columns: Any,
    lanes: Any,
    lanes_at: Any,
) -> Any:
    """The sums of a row of taps, and what some columns add to each.

    Args:
        sums: a tuple, `SUMS` for each tap in even columns, and for each in odd ones: a
            dot product waits for the one before that it is added to.
        values: flat uint32, pairs of bfloat16: `SUMS` of one column after the other,
            those of the first column and tap from `values_at` on.
        grads: flat uint32, pairs as well: `SUMS` of each column from `grads_at` on.
        stride: a tuple of as many numbers as there are columns of the values for one of
            the gradients; what they are does not matter.
        columns: how many of the gradients; known to the compiler.
        lanes: flat uint32, from `lanes_at` on which of the pairs each sum takes.
    """

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        data = data_of(target, builder, signature, given)
        out, found = given[0], []
        index = load_bits(builder, data(7), given[8], _PAIRS)
        ahead, count = stride.count, columns.literal_value
        for column in range((count - 1) * ahead + SIDE):
            place = plus_times(builder, given[2], SUMS, column)
            value = load_bits(builder, data(1), place, _PAIRS)
            name = "llvm.x86.avx512.permvar.si.512"
            found.append(_call(builder, name, _PAIRS, [value, index]))
        for column in range(count):
            place = plus_times(builder, given[4], SUMS, column)
            grad = load_bits(builder, data(3), place, _PAIRS)
            for tap in range(SIDE):
                place = column % 2 * SIDE + tap
                total = builder.extract_value(out, place)
                total = dot(builder, total, found[column * ahead + tap], grad)
                out = builder.insert_value(out, total, place)
        return out

    int64 = types.int64
    rest = (int64, grads, int64, stride, columns, lanes, int64)
    return sums(sums, values, *rest), generate


@intrinsic
def no_sums(context: Any, rows: Any, columns: Any) -> Any:
    """`SUMS` zeros for as many rows and columns as the tuples have numbers."""
    kind = types.containers.UniTuple(Lanes(SUMS), rows.count * columns.count)

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        zero = ir.Constant(_FLOATS, [0.0] * SUMS)
        return target.make_tuple(builder, kind, [zero] * kind.count)

    return kind(rows, columns), generate


@intrinsic
def add_shared_taps(
    context: Any,
    sums: Any,
    values: Any,
    values_at: Any,
    grads: Any,
    grads_at: Any,
    stride: Any,
    columns: Any,
) -> Any:
    """The sums of a row of taps for a block of channels, and what some columns add.

    Args:
        sums: a tuple, `SUMS` for each channel of each tap.
        values: flat uint32, pairs of bfloat16: `SUMS` of one column after the other,
            those of the block in the first column and tap from `values_at` on.
        grads: flat uint32, pairs as well: `SUMS` of each column from `grads_at` on.
        stride: a tuple of as many numbers as there are columns of the values for one of
            the gradients.
        columns: a tuple of as many numbers as columns of the gradients.
    """

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        data = data_of(target, builder, signature, given)
        row = _Row(columns.count, stride.count, 1)
        places = [plus_times(builder, given[4], SUMS, n) for n in range(row.pixels)]
        loaded = [load_bits(builder, data(3), place, _PAIRS) for place in places]
        starts = [plus_times(builder, given[2], SUMS, n) for n in range(row.columns)]
        out, block = given[0], sums.count // SIDE
        for channel, column in product(range(block), range(row.columns)):
            place = builder.add(starts[column], _long(channel))
            found = everywhere(builder, builder.gep(data(1), [place]))
            for tap in range(SIDE):
                pixel, index = row.pixel(column, tap), tap * block + channel
                if pixel is not None:
                    total = builder.extract_value(out, index)
                    total = dot(builder, total, found, loaded[pixel])
                    out = builder.insert_value(out, total, index)
        return out

    int64 = types.int64
    rest = (int64, grads, int64, stride, columns)
    return sums(sums, values, *rest), generate


@intrinsic
def store_pairs(
    context: Any, pairs: Any, start: Any, values: Any, first: Any, second: Any
) -> Any:
    """Writes `SUMS` values and as many others, one of each beside the other.

    Args:
        pairs: flat uint32.
        start: where to write.
        values: flat uint16.
        first: where those that come first in a pair are.
        second: where those that come second are.
    """

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        data = data_of(target, builder, signature, given)
        kind = ir.VectorType(_INT16, SUMS)
        low, high = (
            builder.zext(load_bits(builder, data(2), given[n], kind), _PAIRS)
            for n in (3, 4)
        )
        high = builder.shl(high, ir.Constant(_PAIRS, [16] * SUMS))
        _store(builder, data(0), given[1], builder.or_(low, high))
        return target.get_dummy_value()

    int64 = types.int64
    return types.void(pairs, int64, values, int64, int64), generate


def data_of(
    target: Any, builder: Any, signature: Any, given: Any
) -> Callable[[int], Any]:
    """Where the values of an argument are that is an array."""

    def data(position: int) -> Any:
        array = target.make_array(signature.args[position])
        return array(target, builder, given[position]).data

    return data


def _columns(
    builder: Any, data: Callable[[int], Any], given: Any, start: Any, count: int
) -> list[Any]:
    """Pointers to so many columns; to zeros for an end that is none."""
    pointers = [
        builder.gep(data(1), [plus_times(builder, start, given[3], column)])
        for column in range(count)
    ]
    ends = cgutils.unpack_tuple(builder, given[4], 2)
    for end, is_inside in zip((0, -1), ends, strict=True):
        pointers[end] = builder.select(is_inside, pointers[end], data(5))
    return pointers


def plus_times(builder: Any, start: Any, step: Any, times: int) -> Any:
    """A place some steps further, each a number or a value of the compiled code."""
    step = _long(step) if isinstance(step, int) else step
    return builder.add(start, builder.mul(step, _long(times)))


def _long(value: int) -> Any:
    return ir.Constant(_INT64, value)


def load_bits(builder: Any, data: Any, place: Any, kind: ir.Type) -> Any:
    """A vector from a place on that need not be aligned."""
    pointer = builder.bitcast(builder.gep(data, [place]), kind.as_pointer())
    return builder.load(pointer, align=2)


def _permuted(builder: Any, pointer: Any, *, index: Any, chosen: Any) -> Any:
    """Chosen ones of `WORDS` values in another order."""
    values = _load_some(builder, pointer, chosen)
    return _call(builder, "llvm.x86.avx512.permvar.hi.512", _WORDS, [values, index])


def everywhere(builder: Any, pointer: Any) -> Any:
    """A pair in all places of a vector."""
    pair = builder.load(builder.bitcast(pointer, _INT32.as_pointer()), align=2)
    first = ir.Constant(_INT32, 0)
    vector = builder.insert_element(ir.Constant(_PAIRS, ir.Undefined), pair, first)
    return builder.shuffle_vector(vector, vector, ir.Constant(_PAIRS, [0] * SUMS))


def _first_lanes(builder: Any, count: Any, width: int) -> Any:
    """Which lanes of a vector come before a number of them."""
    numbers = ir.VectorType(_INT16, width)
    limit = builder.insert_element(
        ir.Constant(numbers, ir.Undefined),
        builder.trunc(count, _INT16),
        ir.Constant(_INT32, 0),
    )
    nowhere = ir.Constant(ir.VectorType(_INT32, width), [0] * width)
    limit = builder.shuffle_vector(limit, limit, nowhere)
    lanes = ir.Constant(numbers, list(range(width)))
    return builder.icmp_unsigned("<", lanes, limit)


def _load_some(builder: Any, pointer: Any, chosen: Any) -> Any:
    """`WORDS` values, zeros and no look at the memory where a lane is not chosen."""
    pointer = builder.bitcast(pointer, _WORDS.as_pointer())
    nothing = ir.Constant(_WORDS, [0] * WORDS)
    arguments = [pointer, ir.Constant(_INT32, 2), chosen, nothing]
    return _call(builder, "llvm.masked.load.v32i16.p0", _WORDS, arguments)


def _store(builder: Any, data: Any, place: Any, value: Any) -> None:
    pointer = builder.bitcast(builder.gep(data, [place]), value.type.as_pointer())
    builder.store(value, pointer, align=2)


def dot(builder: Any, total: Any, left: Any, right: Any) -> Any:
    """Sums, and to each the products of a pair of two vectors."""
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    pairs = [builder.bitcast(value, _BFLOATS) for value in (left, right)]
    return _call(builder, name, _FLOATS, [total, *pairs])


def _call(builder: Any, name: str, kind: ir.Type, arguments: list[Any]) -> Any:
    signature = ir.FunctionType(kind, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, arguments)
