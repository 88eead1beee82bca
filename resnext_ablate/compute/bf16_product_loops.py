"""1 x 1 convolutions as loops for a CPU: pixels times weights, and the gradients.

Tiles of eight pixels by two vectors of channels stay in registers. Whoever reads what
has just been written finds it in the nearest cache: a batch norm the moments of its
input, and the two gradients of a convolution the gradient of its output.

Activations are flat uint16 that hold the bits of bfloat16, (P, C) with C at least
`SUMS`; sums are float32 over a block of pixels, and float64 over blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from resnext_ablate.compute.dots import SUMS, no_sums, store_pairs
from resnext_ablate.compute.lanes import add_to, compiled, inlined, leaf, part, prefetch
from resnext_ablate.compute.tiles import (
    add_moments,
    add_tile,
    aligned,
    keep_origin,
    store_tile,
)

Words = npt.NDArray[np.uint16]
Pairs = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]
Totals = npt.NDArray[np.float64]
Vectors = tuple[int, ...]
"""As many numbers as a tile has vectors, which tells the compiler."""

ROWS = (0,) * 8
"""Of a tile; its first numbers serve as well as any."""
_BLOCK = 256
"""Pixels."""


class Product(NamedTuple):
    """A matrix (taken, given) as tiles take it."""

    taken: int
    """Channels of a pixel that is multiplied."""
    given: int
    """Channels of the result."""
    whole: int
    """Tiles of a row; behind them may be one vector more."""
    factors: Pairs
    """Flat (tiles and vector, pairs of those taken, lanes)."""


@leaf
def _begin(tile: int, width: int, count: int) -> int:
    """The first of the channels of a tile: the last has some once more."""
    return min(tile * width, count - width)


@part
def _product(weight: Words, taken: int, vectors: Vectors) -> Product:
    """Of a flat matrix (taken, given)."""
    given, width, half = len(weight) // taken, len(vectors) * SUMS, (taken + 1) // 2
    whole = (given + width - SUMS - 1) // width
    has_more = whole * width < given
    factors = aligned((whole * width + has_more * SUMS) * half)
    to = 0
    for tile in range(whole + has_more):
        size = width if tile < whole else SUMS
        begin = _begin(tile, width, given) if tile < whole else given - SUMS
        for pair in range(half):
            at = min(2 * pair, taken - 2) * given + begin
            for lane in range(0, size, SUMS):
                store_pairs(factors, to + lane, weight, at + lane, at + given + lane)
                if 2 * pair > taken - 2:  # The first of these two has been taken.
                    for n in range(to + lane, to + lane + SUMS):
                        factors[n] &= np.uint32(0xFFFF0000)
            to += size
    return Product(taken, given, whole, factors)


@inlined
def _tile(
    pixels: Words, first: int, product: Product, at: int, vectors: Vectors, rows: Any
) -> Any:
    """Some pixels times the factors of a tile."""
    taken = product.taken
    sums, step = no_sums(rows, vectors), len(vectors) * SUMS
    for n in range(0, taken - 1, 2):
        place = first + n
        sums = add_tile(sums, pixels, place, taken, product.factors, at, vectors)
        at += step
    if taken % 2:
        place = first + taken - 2
        sums = add_tile(sums, pixels, place, taken, product.factors, at, vectors)
    return sums


@inlined
def _put(
    out: Words,
    pixel: int,
    given: int,
    channel: int,
    lines: Floats,
    line: int,
    sums: Any,
    vectors: Vectors,
) -> None:
    """Writes a tile from a pixel and a channel on, and adds up its moments."""
    store_tile(out, pixel * given + channel, given, sums, vectors)
    if len(lines):
        if pixel == 0:
            keep_origin(lines, line, sums, vectors)
        add_moments(lines, line, sums, vectors)


@inlined
def _row_of_tiles(
    pixels: Words,
    pixel: int,
    product: Product,
    out: Words,
    lines: Floats,
    vectors: Vectors,
    rows: Any,
) -> None:
    """All channels of as many pixels as the tuple has numbers."""
    taken, given, width = product.taken, product.given, len(vectors) * SUMS
    first, size, one = pixel * taken, (taken + 1) // 2 * width, (0,)
    for tile in range(product.whole):
        sums = _tile(pixels, first, product, tile * size, vectors, rows)
        channel, line = _begin(tile, width, given), 3 * width * tile
        _put(out, pixel, given, channel, lines, line, sums, vectors)
    if product.whole * width < given:
        rest = _tile(pixels, first, product, product.whole * size, one, rows)
        channel, line = given - SUMS, 3 * width * product.whole
        _put(out, pixel, given, channel, lines, line, rest, one)


@leaf
def _multiply(
    pixels: Words,
    span: tuple[int, int],
    product: Product,
    out: Words,
    lines: Floats,
    vectors: Vectors,
) -> None:
    """Writes some pixels of the result, and adds up their moments.

    Args:
        lines: as `add_moments` takes, of each vector; empty where nobody asks.
    """
    first, end = span
    whole = end - (end - first) % len(ROWS)
    for pixel in range(first, whole, len(ROWS)):
        _row_of_tiles(pixels, pixel, product, out, lines, vectors, ROWS)
    for pixel in range(whole, end):
        _row_of_tiles(pixels, pixel, product, out, lines, vectors, (0,))


@leaf
def _gather(lines: Floats, totals: Totals) -> None:
    """Moves the sums of lines to totals, (vectors, 2, `SUMS`)."""
    for v in range(len(totals)):
        for n in range(2 * SUMS):
            at = (3 * v + 1) * SUMS + n
            totals[v, n // SUMS, n % SUMS] += lines[at]
            lines[at] = 0


@compiled
def multiply(
    pixels: Words,
    weight: Words,
    taken: int,
    vectors: Vectors,
    out: Words,
    moments: Floats,
) -> None:
    """Writes pixels times a weight.

    Args:
        pixels: flat (P, taken).
        weight: flat (taken, given).
        taken: channels of a pixel.
        vectors: of a tile; given must fill them.
        out: flat (P, given).
        moments: (2, given), mean and biased variance of each channel before it is
            rounded.
    """
    product, count = _product(weight, taken, vectors), len(pixels) // taken
    given, in_tiles = product.given, product.whole * len(vectors)
    num_vectors = in_tiles + (in_tiles * SUMS < given)
    lines = np.zeros(3 * num_vectors * SUMS, np.float32)
    totals = np.zeros((num_vectors, 2, SUMS))
    for first in range(0, count, _BLOCK):
        span = (first, min(first + _BLOCK, count))
        _multiply(pixels, span, product, out, lines, vectors)
        _gather(lines, totals)
    for v in range(num_vectors):
        tile, inside = v // len(vectors), v % len(vectors) * SUMS
        begin = _begin(tile, len(vectors) * SUMS, given) + inside
        begin = given - SUMS if v == in_tiles else begin
        for n in range(SUMS):
            shift, square = totals[v, 0, n] / count, totals[v, 1, n] / count
            moments[0, begin + n] = lines[3 * v * SUMS + n] + shift
            moments[1, begin + n] = square - shift * shift


@leaf
def _write_pairs(
    values: Words, first: int, count: int, channels: int, pairs: Pairs
) -> None:
    """Writes each of so many pixels beside the one behind it, from a value on."""
    for n in range(count):
        at = first + 2 * n * channels
        for c in range(0, channels, SUMS):
            lane = min(c, channels - SUMS)
            store_pairs(
                pairs, n * channels + lane, values, at + lane, at + channels + lane
            )


@leaf
def _write_last(values: Words, first: int, channels: int, pairs: Pairs) -> None:
    """Writes a pixel that has none behind it, paired with zero."""
    for c in range(channels):
        pairs[c] = values[first + c]


class _Side(NamedTuple):
    """What a convolution saw, or the gradient of its output."""

    values: Words
    channels: int
    pairs: Pairs
    """Of a block of pixels."""


@leaf
def _write_block(side: _Side, span: tuple[int, int]) -> None:
    """Writes the pairs of some pixels."""
    values, channels, pairs = side.values, side.channels, side.pairs
    count, first = (span[1] - span[0]) // 2, span[0] * channels
    _write_pairs(values, first, count, channels, pairs)
    if (span[1] - span[0]) % 2:
        at = first + 2 * count * channels
        _write_last(values, at, channels, pairs[count * channels :])


@leaf
def _add_block(
    lanes: _Side,
    rows: _Side,
    span: tuple[int, int],
    totals: Totals,
    vectors: Vectors,
) -> None:
    """Adds what some pixels give each weight, and asks for those behind them."""
    count, width = (span[1] - span[0] + 1) // 2, len(vectors) * SUMS
    num_tiles = totals.shape[0] * totals.shape[1]
    ahead, also = span[1] * lanes.channels, span[1] * rows.channels
    step = -(-2 * lanes.channels // num_tiles)
    also_step = -(-2 * rows.channels // num_tiles)
    for tile in range(totals.shape[0]):
        lane = _begin(tile, width, lanes.channels)
        for block in range(totals.shape[1]):
            row = _begin(block, len(ROWS), rows.channels)
            sums = no_sums(ROWS, vectors)
            for n in range(count):
                at, lanes_at = n * rows.channels + row, n * lanes.channels + lane
                sums = add_tile(sums, rows.pairs, at, 1, lanes.pairs, lanes_at, vectors)
                prefetch(lanes.values, (ahead,))
                prefetch(rows.values, (also,))
                ahead, also = ahead + step, also + also_step
            for n in range(len(sums)):
                v = n % len(vectors)
                add_to(totals, (tile, block, n // len(vectors), v * SUMS), sums[n])


@part
def _write_gradient(
    totals: Totals, weight: Floats, lanes: int, rows: int, is_turned: bool
) -> None:
    """Writes totals of tiles as a flat weight, (rows, lanes) or turned."""
    width, height = totals.shape[3], totals.shape[2]
    for tile, block in np.ndindex(totals.shape[:2]):
        lane, row = _begin(tile, width, lanes), _begin(block, height, rows)
        for r in range(height):
            for n in range(width):
                to = (row + r) * lanes + lane + n
                if is_turned:
                    to = (lane + n) * rows + row + r
                weight[to] = totals[tile, block, r, n]


@compiled
def gradients(
    grad: Words,
    pixels: Words,
    weight: Words,
    taken: int,
    vectors: tuple[Vectors, Vectors],
    by_grad: bool,
    out: Words,
    weight_grad: Floats,
) -> None:
    """Writes the gradients of pixels and of a weight from that of their product.

    Args:
        grad: flat (P, given).
        pixels: flat (P, taken).
        weight: flat (given, taken).
        taken: channels of a pixel.
        vectors: of a tile of pixels, which those taken must fill, and of one of the
            weight.
        by_grad: whether those given lie in the lanes of the latter, and must fill
            them; else those taken.
        out: flat (P, taken).
        weight_grad: flat (given, taken).
    """
    given = len(weight) // taken
    product = _product(weight, given, vectors[0])
    seen = _Side(pixels, taken, aligned(_BLOCK // 2 * taken))
    come = _Side(grad, given, aligned(_BLOCK // 2 * given))
    lanes, rows = (come, seen) if by_grad else (seen, come)
    width = len(vectors[1]) * SUMS
    tiles = (-(-lanes.channels // width), -(-rows.channels // len(ROWS)))
    totals = np.zeros((tiles[0], tiles[1], len(ROWS), width))
    nothing, count = np.zeros(0, np.float32), len(pixels) // taken
    for first in range(0, count, _BLOCK):
        span = (first, min(first + _BLOCK, count))
        _write_block(seen, span)
        _write_block(come, span)
        _multiply(grad, span, product, out, nothing, vectors[0])
        _add_block(lanes, rows, span, totals, vectors[1])
    _write_gradient(totals, weight_grad, lanes.channels, rows.channels, by_grad)
