"""Several float32 values at once, in the vector registers of a CPU, for compiled loops.

Left to itself, LLVM keeps no running sums of several columns in registers: it reads and
writes them at every row. Here a loop says what it holds. The vectors are LLVM's own,
which it maps to whatever registers the CPU has.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, overload, register_model

WIDE = 32
"""Lanes of a vector: a line of the cache in bfloat16."""

_INT16, _INT32 = ir.IntType(16), ir.IntType(32)
_FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()
_FEATURES = llvmlite.binding.get_host_cpu_features()
_ROUNDS = bool(_FEATURES.get("avx512bf16"))
"""Whether the CPU rounds to bfloat16 itself."""
HAS_32_REGISTERS = bool(_FEATURES.get("avx512f") or _FEATURES.get("neon"))
"""Whether the CPU holds 32 vectors; else 16."""

_INSIDE = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""Options of what Python never calls: entries for it take long to compile."""
_UNCOUNTED = {**_INSIDE, "_nrt": False}
"""Of what makes no arrays, and does not count who holds those it is given."""


def compiled(function: Any) -> Any:
    """Compiled at its first call, and kept on disk where a folder can be written.

    Loops write arrays value by value: with an assignment of one array to a slice of
    another comes NumPy's message for shapes that differ, seconds to compile.
    """
    # Numba keeps it by this name, and compiles anew when the function's own file
    # changes; it does not know of the other files that loops are made from.
    function.__qualname__ += f".{_made_from()}"
    # Only a multiplication and an addition may become one: NaN must come out as NaN.
    options: dict[str, Any] = {"fastmath": {"contract"}, "error_model": "numpy"}
    options["no_cfunc_wrapper"] = True
    try:
        return numba.njit(function, nogil=True, cache=True, **options)
    except RuntimeError:
        return numba.njit(function, nogil=True, **options)


@lru_cache(maxsize=1)
def _made_from() -> str:
    """A digest of all code that compiled loops consist of."""
    folder, digest = Path(__file__).parent, hashlib.blake2b(digest_size=6)
    for pattern in ("lanes.py", "dots.py", "taps.py", "tiles.py", "*loops.py"):
        for file in sorted(folder.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def part(function: Any) -> Any:
    """Compiled along with what calls it: Python itself must not."""
    return numba.njit(function, nogil=True, fastmath={"contract"}, **_INSIDE)


def leaf(function: Any) -> Any:
    """As a part that makes no arrays: it does not count who holds those it is given."""
    return numba.njit(function, nogil=True, fastmath={"contract"}, **_UNCOUNTED)


def inlined(function: Any) -> Any:
    """As a leaf that becomes part of what calls it: its vectors stay in registers."""
    options = {**_UNCOUNTED, "forceinline": True}
    return numba.njit(function, nogil=True, fastmath={"contract"}, **options)


class Lanes(types.Type):
    """Numba's type of so many float32 side by side."""

    def __init__(self, width: int) -> None:
        super().__init__(name=f"Lanes({width})")
        self.width = width


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, ir.VectorType(_FLOAT, lanes.width))


class BFloat(ir.Type):
    """bfloat16, which llvmlite does not name."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


@intrinsic(prefer_literal=True)
def zeros(context: Any, width: Any) -> Any:
    """So many zeros; the width must be known to the compiler."""
    lanes = Lanes(width.literal_value)

    def generate(_: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _constant(_FLOAT, 0.0, lanes)

    return lanes(width), generate


@intrinsic
def load(context: Any, array: Any, place: Any, lanes: Any) -> Any:
    """The values from a place on, as float32.

    Args:
        array: float32, or uint16 that holds the bits of bfloat16.
        place: of the first of them, as a tuple.
        lanes: of as many values.
    """
    is_bfloat = array.dtype == types.uint16

    def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        stored = _INT16 if is_bfloat else _FLOAT
        pointer = _pointer(target, builder, signature, values, stored, lanes)
        value = builder.load(pointer, align=2 if is_bfloat else 4)
        if not is_bfloat:
            return value
        bits = builder.zext(value, ir.VectorType(_INT32, lanes.width))
        bits = builder.shl(bits, _constant(_INT32, 16, lanes))
        return builder.bitcast(bits, ir.VectorType(_FLOAT, lanes.width))

    return lanes(array, place, lanes), generate


@intrinsic
def store(context: Any, array: Any, place: Any, value: Any) -> Any:
    """Writes values from a place on: to nearest, ties to even."""
    is_bfloat = array.dtype == types.uint16

    def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        stored = _INT16 if is_bfloat else _FLOAT
        pointer = _pointer(target, builder, signature, values, stored, value)
        given = narrowed(builder, values[2], value) if is_bfloat else values[2]
        builder.store(given, pointer, align=2 if is_bfloat else 4)
        return target.get_dummy_value()

    return types.void(array, place, value), generate


@intrinsic
def add_products(
    context: Any,
    sums: Any,
    values: Any,
    place: Any,
    step: Any,
    factor: Any,
    is_shared: Any,
) -> Any:
    """The sums, and to each what a factor makes of values: lanes times lanes.

    Args:
        sums: a tuple of lanes.
        values: flat float32.
        place: where the values for the first of the sums are.
        step: from those of one to the next.
        factor: lanes.
        is_shared: a tuple of two numbers where all lanes take the same value, of one
            where each takes its own.
    """
    lanes = sums.dtype

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        array = signature.args[1]
        data = target.make_array(array)(target, builder, given[1]).data
        out = given[0]
        for index in range(sums.count):
            ahead = builder.mul(given[3], ir.Constant(given[3].type, index))
            pointer = builder.gep(data, [builder.add(given[2], ahead)])
            if is_shared.count > 1:
                pointer = builder.bitcast(
                    pointer, ir.VectorType(_FLOAT, 1).as_pointer()
                )
                one = builder.load(pointer, align=4)
                found = builder.shuffle_vector(one, one, _constant(_INT32, 0, lanes))
            else:
                pointer = builder.bitcast(pointer, vector.as_pointer())
                found = builder.load(pointer, align=4)
            product = builder.fmul(given[4], found, flags=("contract",))
            total = builder.extract_value(out, index)
            total = builder.fadd(total, product, flags=("contract",))
            out = builder.insert_value(out, total, index)
        return out

    vector = ir.VectorType(_FLOAT, lanes.width)
    int64 = types.int64
    return sums(sums, values, int64, int64, factor, is_shared), generate


@intrinsic
def store_each(
    context: Any, out: Any, place: Any, step: Any, sums: Any, first: Any
) -> Any:
    """Writes a tuple of lanes to flat float32: one from a place on, the next a step
    further, and so on. What lies under those before the first lane stays."""

    width = sums.dtype.width

    def is_kept(builder: Any, first: Any) -> Any:
        """Which lanes are."""
        kind = ir.VectorType(_INT32, width)
        limit = builder.bitcast(builder.trunc(first, _INT32), ir.VectorType(_INT32, 1))
        limit = builder.shuffle_vector(limit, limit, ir.Constant(kind, [0] * width))
        lanes = ir.Constant(kind, list(range(width)))
        return builder.icmp_unsigned("<", lanes, limit)

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        data = target.make_array(signature.args[0])(target, builder, given[0]).data
        places = []
        for index in range(sums.count):
            ahead = builder.mul(given[2], ir.Constant(given[2].type, index))
            pointer = builder.gep(data, [builder.add(given[1], ahead)])
            total = builder.extract_value(given[3], index)
            places.append((total, builder.bitcast(pointer, total.type.as_pointer())))
        is_whole = builder.icmp_signed("==", given[4], ir.Constant(given[4].type, 0))
        # To write some lanes alone is slow: this is not for all vectors.
        with builder.if_else(is_whole) as (whole, in_part):
            with whole:
                for total, pointer in places:
                    builder.store(total, pointer, align=4)
            with in_part:
                kept = is_kept(builder, given[4])
                for total, pointer in places:
                    there = builder.load(pointer, align=4)
                    both = builder.select(kept, there, total)
                    builder.store(both, pointer, align=4)
        return target.get_dummy_value()

    int64 = types.int64
    return types.void(out, int64, int64, sums, int64), generate


@intrinsic
def spread(
    context: Any,
    out: Any,
    place: Any,
    step: Any,
    value: Any,
    group: Any,
    before: Any,
) -> Any:
    """Writes vectors in which each lane has a value of its own group: the first of it
    from a place on, the second a step further, and so on.

    Args:
        out: flat float32.
        place: where to write.
        step: from vector to vector.
        value: lanes of groups side by side.
        group: a tuple of as many numbers as a group has lanes.
        before: a tuple of one number more than there are lanes before the first whole
            group. These, and those behind the last one, are written as zeros.
    """
    begin, count, nowhere = before.count - 1, group.count, value.width

    def source(lane: int, channel: int) -> int:
        first = begin + (lane - begin) // count * count
        is_whole = lane >= begin and first + count <= value.width
        return int(first + channel if is_whole else nowhere)

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        data = target.make_array(signature.args[0])(target, builder, given[0]).data
        zero = _constant(_FLOAT, 0.0, value)
        for channel in range(count):
            order = [source(lane, channel) for lane in range(value.width)]
            mask = ir.Constant(ir.VectorType(_INT32, value.width), order)
            mixed = builder.shuffle_vector(given[3], zero, mask)
            ahead = builder.mul(given[2], ir.Constant(given[2].type, channel))
            pointer = builder.gep(data, [builder.add(given[1], ahead)])
            pointer = builder.bitcast(pointer, zero.type.as_pointer())
            builder.store(mixed, pointer, align=4)
        return target.get_dummy_value()

    int64 = types.int64
    return types.void(out, int64, int64, value, group, before), generate


@intrinsic
def first_of(context: Any, value: Any) -> Any:
    """The first value."""

    def generate(_: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.extract_element(values[0], ir.Constant(_INT32, 0))

    return types.float32(value), generate


@intrinsic
def add_to(context: Any, array: Any, place: Any, value: Any) -> Any:
    """Adds values to those of a float64 array from a place on."""

    def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = _pointer(target, builder, signature, values, _DOUBLE, value)
        _add_in_place(builder, pointer, values[2])
        return target.get_dummy_value()

    return types.void(array, place, value), generate


@intrinsic
def add_to_rows(context: Any, array: Any, column: Any, values: Any) -> Any:
    """Adds each of a tuple of lanes to its own row of (K, L), from a column on."""

    def generate(target: Any, builder: Any, signature: Any, given: Any) -> Any:
        held = target.make_array(array)(target, builder, given[0])
        kind = _DOUBLE if array.dtype == types.float64 else _FLOAT
        vector = ir.VectorType(kind, values.dtype.width)
        for row in range(values.count):
            place = [ir.Constant(given[1].type, row), given[1]]
            first = cgutils.get_item_pointer(target, builder, array, held, place)
            pointer = builder.bitcast(first, vector.as_pointer())
            _add_in_place(builder, pointer, builder.extract_value(given[2], row))
        return target.get_dummy_value()

    return types.void(array, types.int64, values), generate


@intrinsic
def plus_each(context: Any, left: Any, right: Any) -> Any:
    """The sums of two tuples of lanes, one by one."""

    def generate(_: Any, builder: Any, signature: Any, given: Any) -> Any:
        out = given[0]
        for index in range(left.count):
            one, other = (builder.extract_value(values, index) for values in given)
            total = builder.fadd(one, other, flags=("contract",))
            out = builder.insert_value(out, total, index)
        return out

    return left(left, right), generate


@intrinsic
def where_positive(context: Any, condition: Any, value: Any) -> Any:
    """Zero where the condition is zero or less, else (NaN too) the value."""

    def generate(_: Any, builder: Any, signature: Any, values: Any) -> Any:
        nothing = _constant(_FLOAT, 0.0, value)
        is_off = builder.fcmp_ordered("<=", values[0], nothing)
        return builder.select(is_off, nothing, values[1])

    return value(condition, value), generate


@intrinsic
def prefetch(context: Any, array: Any, place: Any) -> Any:
    """Asks for a value that will be read soon; one past the end does no harm."""

    def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = _pointer(target, builder, signature, values, ir.IntType(8), Lanes(1))
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _INT32, _INT32, _INT32])
        function = cgutils.get_or_insert_function(
            builder.module, kind, "llvm.prefetch.p0"
        )
        # For reading, into the nearest cache, as data.
        reading, nearest, data = (ir.Constant(_INT32, n) for n in (0, 3, 1))
        builder.call(function, [pointer, reading, nearest, data])
        return target.get_dummy_value()

    return types.void(array, place), generate


def _arithmetic(operation: Callable[..., object], instruction: str) -> None:
    """Makes an operator work on lanes."""

    @intrinsic
    def apply(context: Any, left: Any, right: Any) -> Any:
        def generate(_: Any, builder: Any, signature: Any, values: Any) -> Any:
            # Only a multiplication and an addition may become one.
            return getattr(builder, instruction)(*values, flags=("contract",))

        return left(left, right), generate

    @overload(operation)
    def choose(left: Any, right: Any) -> Any:
        def implementation(left: Any, right: Any) -> Any:
            return apply(left, right)

        return implementation if isinstance(left, Lanes) and left == right else None


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")


def _pointer(
    target: Any,
    builder: Any,
    signature: Any,
    values: Any,
    stored: ir.Type,
    lanes: Lanes,
) -> Any:
    """To so many stored values, from arguments that begin with array and place."""
    array, place = signature.args[:2]
    held = target.make_array(array)(target, builder, values[0])
    indices = cgutils.unpack_tuple(builder, values[1], len(place))
    first = cgutils.get_item_pointer(target, builder, array, held, indices)
    return builder.bitcast(first, ir.VectorType(stored, lanes.width).as_pointer())


def _add_in_place(builder: Any, pointer: Any, value: Any) -> None:
    """Adds float32 lanes to a vector of as many float32 or float64."""
    held = builder.load(pointer, align=4)
    if held.type.element is _DOUBLE:
        value = builder.fpext(value, held.type)
    builder.store(builder.fadd(held, value), pointer, align=4)


def _constant(kind: ir.Type, value: float, lanes: Lanes) -> Any:
    return ir.Constant(ir.VectorType(kind, lanes.width), [value] * lanes.width)


def narrowed(builder: Any, value: Any, lanes: Lanes) -> Any:
    """The bits of bfloat16 nearest to float32."""
    narrow = ir.VectorType(_INT16, lanes.width)
    if _ROUNDS:
        rounded = builder.fptrunc(value, ir.VectorType(BFloat(), lanes.width))
        return builder.bitcast(rounded, narrow)
    bits = builder.bitcast(value, ir.VectorType(_INT32, lanes.width))
    sixteen, one = (_constant(_INT32, n, lanes) for n in (16, 1))
    is_odd = builder.and_(builder.lshr(bits, sixteen), one)
    half = builder.add(is_odd, _constant(_INT32, 0x7FFF, lanes))
    rounded = builder.trunc(builder.lshr(builder.add(bits, half), sixteen), narrow)
    # A carry would make another number of what is none.
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(is_nan, _constant(_INT16, 0x7FC0, lanes), rounded)
