"""Crops, mirrors and normalises images as a compiled loop for a CPU."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from resnext_ablate.compute.lanes import compiled

Integers = npt.NDArray[np.int64]


@compiled
def augment(
    images: npt.NDArray[np.uint8],
    positions: Integers,
    shift: Integers,
    mirrored: npt.NDArray[np.bool_],
    table: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32],
) -> None:
    """Writes chosen images; what comes from outside of one is zero.

    Args:
        images: (N, H, W, C).
        positions: (B,), which of the images.
        shift: (B, 2), pixels up and left.
        mirrored: (B,), swaps left and right.
        table: (C, 256), what a byte becomes.
        out: (B, H, W, C).
    """
    count, height, width, channels = out.shape
    for b in range(count):
        image, is_mirrored = images[positions[b]], mirrored[b]
        for i in range(height):
            row = i + shift[b, 0]
            if not 0 <= row < height:
                out[b, i] = 0
                continue
            for j in range(width):
                column = (width - 1 - j if is_mirrored else j) + shift[b, 1]
                is_inside = 0 <= column < width
                for c in range(channels):
                    value = table[c, image[row, column, c]] if is_inside else 0
                    out[b, i, j, c] = value
