"""Sums of products of bfloat16 pairs in the vector registers of a CPU.

One instruction (AVX512-BF16) multiplies 16 pairs of two vectors and adds the products
of each to 16 float32 sums. Here a compiled loop says it, along with how values are
brought to the lanes that need them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from resnext_ablate.compute.lanes import BFloat, Lanes, narrowed

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
    factors: Any,
    factors_at: Any,
) -> Any:
    """The sums of several pixels, and what one pair of channels adds to each.

    Args:
        sums: a tuple, `SUMS` for each pixel.
        values: flat uint16, the bits of bfloat16.
        start: where the values of the first pixel are.
        step: from pixel to pixel.
        inside: whether the first and the last pixel are any.
        nothing: flat uint16, `WORDS` zeros in place of those that are not.
        held: how many values of a pixel are read, `WORDS` at most.
        lanes: flat uint16, from `lanes_at` on which of the values each place takes.
        factors: flat uint16, from `factors_at` on the bits of what it is multiplied by.
    """

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        data = _data(target, builder, signature, given)
        out = given[0]
        index = _load(builder, data(7), given[8], _WORDS)
        factor = _load(builder, data(9), given[10], _WORDS)
        is_held = _first_lanes(builder, given[6], WORDS)
        for pixel, pointer in enumerate(_pixels(builder, data, given, sums.count)):
            found = _load_some(builder, pointer, is_held)
            name = "llvm.x86.avx512.permvar.hi.512"
            found = _call(builder, name, _WORDS, [found, index])
            total = _dot(builder, builder.extract_value(out, pixel), found, factor)
            out = builder.insert_value(out, total, pixel)
        return out

    int64 = types.int64
    rest = (int64, int64, inside, nothing, int64, lanes, int64, factors, int64)
    return sums(sums, values, *rest), generate


@intrinsic
def add_shared_pixels(
    context: Any,
    sums: Any,
    values: Any,
    start: Any,
    step: Any,
    inside: Any,
    nothing: Any,
    factors: Any,
    factors_at: Any,
) -> Any:
    """As `add_pixels`, where all sums of a pixel take the same pair: its first two."""

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        data = _data(target, builder, signature, given)
        out = given[0]
        factor = _load(builder, data(6), given[7], _WORDS)
        for pixel, pointer in enumerate(_pixels(builder, data, given, sums.count)):
            found = _everywhere(builder, pointer)
            total = _dot(builder, builder.extract_value(out, pixel), found, factor)
            out = builder.insert_value(out, total, pixel)
        return out

    int64 = types.int64
    rest = (int64, int64, inside, nothing, factors, int64)
    return sums(sums, values, *rest), generate


@intrinsic
def store_pixels(
    context: Any, out: Any, start: Any, step: Any, sums: Any, count: Any
) -> Any:
    """Writes the sums of several pixels as bfloat16: to nearest, ties to even.

    Args:
        out: flat uint16.
        start: of the first pixel's.
        step: from pixel to pixel.
        sums: a tuple, `SUMS` for each pixel.
        count: how many of these are written.
    """

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        base = _data(target, builder, signature, given)(0)
        is_written = _first_lanes(builder, given[4], SUMS)
        for pixel in range(sums.count):
            total = builder.extract_value(given[3], pixel)
            bits = narrowed(builder, total, Lanes(SUMS))
            place = _plus(builder, given[1], given[2], pixel)
            pointer = builder.gep(base, [place])
            pointer = builder.bitcast(pointer, bits.type.as_pointer())
            arguments = [bits, pointer, ir.Constant(_INT32, 2), is_written]
            name = f"llvm.masked.store.v{SUMS}i16.p0"
            _call(builder, name, ir.VoidType(), arguments)
        return target.get_dummy_value()

    int64 = types.int64
    return types.void(out, int64, int64, sums, int64), generate


@intrinsic(prefer_literal=True)
def add_taps(
    context: Any,
    sums: Any,
    values: Any,
    values_at: Any,
    grads: Any,
    grads_at: Any,
    step: Any,
    stride: Any,
    columns: Any,
    lanes: Any,
    lanes_at: Any,
    window: Any,
) -> Any:
    """The sums of a row of taps, and what some columns add to each.

    Args:
        sums: a tuple, `SUMS` for each tap.
        values: flat uint32, pairs of bfloat16: `WORDS` pairs for each column and tap,
            the first from `values_at` on.
        grads: flat uint32, pairs as well: `SUMS` of each column, the first from
            `grads_at` on.
        step: from column to column, of both.
        stride: a tuple of as many numbers as there are columns of the values for one of
            the gradients; what they are does not matter.
        columns: how many of the gradients; known to the compiler.
        lanes: flat uint32, from `lanes_at` on which of the pairs each sum takes.
        window: a tuple of one number where all of these are among the first `SUMS`, of
            two where not.
    """

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        data = _data(target, builder, signature, given)
        out, found = given[0], []
        index = _load(builder, data(8), given[9], _PAIRS)
        ahead, count = stride.count, columns.literal_value
        for column in range((count - 1) * ahead + sums.count):
            place = _plus(builder, given[2], given[5], column)
            near = _load(builder, data(1), place, _PAIRS)
            name, terms = "llvm.x86.avx512.permvar.si.512", [near, index]
            if window.count > 1:
                place = builder.add(place, ir.Constant(_INT64, SUMS))
                far = _load(builder, data(1), place, _PAIRS)
                name, terms = "llvm.x86.avx512.vpermi2var.d.512", [*terms, far]
            found.append(_call(builder, name, _PAIRS, terms))
        for column in range(count):
            place = _plus(builder, given[4], given[5], column)
            grad = _load(builder, data(3), place, _PAIRS)
            for tap in range(sums.count):
                total = builder.extract_value(out, tap)
                total = _dot(builder, total, found[column * ahead + tap], grad)
                out = builder.insert_value(out, total, tap)
        return out

    int64 = types.int64
    rest = (int64, grads, int64, int64, stride, columns, lanes, int64, window)
    return sums(sums, values, *rest), generate


@intrinsic
def no_sums(context: Any, block: Any) -> Any:
    """Zeros as `add_shared_taps` takes them, for a block of channels: three of each."""
    lanes = Lanes(SUMS)
    kind = types.containers.UniTuple(lanes, 3 * block.count)

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        zero = ir.Constant(_FLOATS, [0.0] * SUMS)
        return target.make_tuple(builder, kind, [zero] * kind.count)

    return kind(block), generate


@intrinsic
def add_shared_taps(
    context: Any,
    sums: Any,
    values: Any,
    values_at: Any,
    grads: Any,
    grads_at: Any,
    step: Any,
) -> Any:
    """The sums of a row of taps for a block of channels, and what a column adds.

    Args:
        sums: a tuple, `SUMS` for each channel of each tap.
        values: flat uint32, pairs of bfloat16: those of the block from `values_at` on.
        grads: flat uint32, pairs as well: `SUMS` from `grads_at` on.
        step: from tap to tap.
    """

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        data = _data(target, builder, signature, given)
        out, grad = given[0], _load(builder, data(3), given[4], _PAIRS)
        block = sums.count // 3
        for tap in range(3):
            first = _plus(builder, given[2], given[5], tap)
            for channel in range(block):
                place = builder.add(first, ir.Constant(_INT64, channel))
                found = _everywhere(builder, builder.gep(data(1), [place]))
                index = tap * block + channel
                total = builder.extract_value(out, index)
                total = _dot(builder, total, found, grad)
                out = builder.insert_value(out, total, index)
        return out

    int64 = types.int64
    return sums(sums, values, int64, grads, int64, int64), generate


@intrinsic
def store_pairs(
    context: Any, pairs: Any, start: Any, values: Any, first: Any, second: Any
) -> Any:
    """Writes `WORDS` values and as many others, one of each beside the other.

    Args:
        pairs: flat uint32.
        start: where to write.
        values: flat uint16.
        first: where those that come first in a pair are.
        second: where those that come second are.
    """

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        data = _data(target, builder, signature, given)
        both = [_load(builder, data(2), given[n], _WORDS) for n in (3, 4)]
        for half in range(2):
            lanes = range(half * SUMS, half * SUMS + SUMS)
            order = [place for lane in lanes for place in (lane, lane + WORDS)]
            mask = ir.Constant(ir.VectorType(_INT32, WORDS), order)
            mixed = builder.shuffle_vector(*both, mask)
            place = builder.add(given[1], ir.Constant(_INT64, half * SUMS))
            _store(builder, data(0), place, mixed)
        return target.get_dummy_value()

    int64 = types.int64
    return types.void(pairs, int64, values, int64, int64), generate


def _data(
    target: Any, builder: Any, signature: Any, given: Any
) -> Callable[[int], Any]:
    """Where the values of an argument are that is an array."""

    def data(position: int) -> Any:
        array = target.make_array(signature.args[position])
        return array(target, builder, given[position]).data

    return data


def _pixels(
    builder: Any, data: Callable[[int], Any], given: Any, count: int
) -> list[Any]:
    """Pointers to so many pixels; to zeros for an end that is none."""
    pointers = [
        builder.gep(data(1), [_plus(builder, given[2], given[3], pixel)])
        for pixel in range(count)
    ]
    ends = cgutils.unpack_tuple(builder, given[4], 2)
    for end, is_inside in zip((0, -1), ends, strict=True):
        pointers[end] = builder.select(is_inside, pointers[end], data(5))
    return pointers


def _plus(builder: Any, start: Any, step: Any, times: int) -> Any:
    return builder.add(start, builder.mul(step, ir.Constant(_INT64, times)))


def _load(builder: Any, data: Any, place: Any, kind: ir.Type) -> Any:
    pointer = builder.bitcast(builder.gep(data, [place]), kind.as_pointer())
    return builder.load(pointer, align=2)


def _everywhere(builder: Any, pointer: Any) -> Any:
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


def _dot(builder: Any, total: Any, left: Any, right: Any) -> Any:
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    pairs = [builder.bitcast(value, _BFLOATS) for value in (left, right)]
    return _call(builder, name, _FLOATS, [total, *pairs])


def _call(builder: Any, name: str, kind: ir.Type, arguments: list[Any]) -> Any:
    signature = ir.FunctionType(kind, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, arguments)
