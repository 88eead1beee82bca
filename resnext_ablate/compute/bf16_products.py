"""What the loops of bfloat16 products take and give, for `direct`.

Features are bfloat16 (N, C, H, W), channels-last, and so are their gradients; weights
are (out, in, 1, 1), and both have `SUMS` channels or more.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from resnext_ablate.compute import bf16_product_loops as loops
from resnext_ablate.compute.bf16_product_loops import Vectors
from resnext_ablate.compute.dots import SUMS
from resnext_ablate.compute.fused import Moments, empty, flat

_SLOWER = 1.35
"""Tiles of one vector, beside those of two, for as many products."""


def forward(features: Tensor, weight: Tensor) -> tuple[Tensor, Moments]:
    """The convolution, and the moments of its output."""
    given, taken = weight.shape[:2]
    _, _, height, width = features.shape
    out = empty(features, height, width, channels=given)
    moments = np.empty((2, given), np.float32)
    turned = _bits(weight.flatten(1).t())
    loops.multiply(flat(features), turned, taken, _vectors(given), flat(out), moments)
    return out, moments


def gradients(grad: Tensor, features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of features and weight, the latter float32, from the dense one of the output."""
    given, taken = weight.shape[:2]
    by_grad, vectors = _lanes(taken, given)
    out = empty(features, *features.shape[2:])
    weight_grad = np.empty(tuple(weight.shape), np.float32)
    loops.gradients(
        flat(grad),
        flat(features),
        _bits(weight),
        taken,
        (_vectors(taken), vectors),
        by_grad,
        flat(out),
        weight_grad.reshape(-1),
    )
    return out, torch.from_numpy(weight_grad)


def _vectors(channels: int) -> Vectors:
    """Two to a tile, where channels fill them."""
    return (0, 0) if channels >= 2 * SUMS else (0,)


@lru_cache(maxsize=1024)
def _lanes(taken: int, given: int) -> tuple[bool, Vectors]:
    """Whether the channels given lie in the lanes, and how many vectors in a tile.

    Some channels are computed twice where tiles do not divide their number.
    """
    costs = {}
    for by_grad, lanes, rows in ((False, taken, given), (True, given, taken)):
        vectors = _vectors(lanes)
        width = len(vectors) * SUMS
        height = len(loops.ROWS)
        products = -(-lanes // width) * width * -(-rows // height) * height
        cost = products * (_SLOWER if len(vectors) == 1 else 1)
        costs[by_grad, vectors] = cost
    return min(costs, key=lambda each: costs[each])


def _bits(weight: Tensor) -> loops.Words:
    """A weight's bits of bfloat16, row by row."""
    bits: loops.Words = weight.contiguous().view(torch.uint16).numpy()
    return bits.reshape(-1)
