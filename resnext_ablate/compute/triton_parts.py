"""What Triton's kernels have in common: where they run, and how parts are added up.

Each program of a kernel writes the sum of its part; a second kernel adds these up, in
the same order each time. Atomic additions would take one launch less, and give other
last digits in each run.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, whatever it is given."""
    device: AbstractContextManager[None]
    device = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return device


@triton.jit
def summed(
    parts: tl.tensor,
    num_parts: tl.tensor,
    num_columns: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """(num_parts, num_columns) -> (COLUMNS,) in float64.

    Args:
        parts: where float32 parts lie.
        num_parts, num_columns: how many.
        column: int (COLUMNS,), those to be summed.
        inside: bool (COLUMNS,), which of them there are.
        PARTS: how many are read at once.
        COLUMNS: as many as in `column`.
    """
    total = tl.zeros([PARTS, COLUMNS], tl.float64)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        place = part.to(tl.int64)[:, None] * num_columns + column[None, :]
        there = (part < num_parts)[:, None] & inside[None, :]
        total += tl.load(parts + place, mask=there, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)
