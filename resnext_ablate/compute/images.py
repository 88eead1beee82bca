"""Images: as arrays, as files, and how one is decoded.

Decoded images are RGB.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Arrays:
    """images: uint8 (N, H, W, C); labels: int64 (N,)."""

    images: Images
    labels: Labels

    def at(self, positions: npt.NDArray[np.int64]) -> Arrays:
        return Arrays(self.images[positions], self.labels[positions])


@dataclass(frozen=True)
class Decoded:
    """A data set as its source splits it; without `val` it is carved from `train`."""

    train: Arrays
    test: Arrays
    val: Arrays | None
    class_names: tuple[str, ...]
    corrupt_files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Files:
    """Images that stay in their files.

    names: bytes (N,), paths relative to the root; sizes: int64 (N,), bytes; labels:
    int64 (N,); sums: int64 (N, 2, 3), of their pixels and of the squares of those.
    """

    names: npt.NDArray[np.bytes_]
    sizes: Labels
    labels: Labels
    sums: npt.NDArray[np.int64]

    def at(self, positions: npt.NDArray[np.int64]) -> Files:
        """The files at these positions, in that order."""
        return Files(
            names=self.names[positions],
            sizes=self.sizes[positions],
            labels=self.labels[positions],
            sums=self.sums[positions],
        )


@dataclass(frozen=True)
class Listed:
    """A folder of images as files; without `val` it is carved from `train`."""

    train: Files
    test: Files
    val: Files | None
    class_names: tuple[str, ...]
    corrupt_files: tuple[str, ...]
    image_size: int
    root: str


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation (C,) of pixel / 255."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def moments_of(sums: npt.NDArray[np.int64], *, num_pixels: int) -> Moments:
    """From sums (2, C) of pixels and of their squares: exact, whatever their order."""
    totals, squares = sums.tolist()
    pairs = list(zip(totals, squares, strict=True))
    return Moments(
        mean=tuple(total / (255 * num_pixels) for total in totals),
        # A channel without variation still needs a scale.
        std=tuple(
            max(math.sqrt(num_pixels * square - total**2) / num_pixels, 1) / 255
            for total, square in pairs
        ),
    )


@dataclass(frozen=True)
class Source:
    """A data set that is found, but not decoded."""

    fingerprint: str
    """Changes when the decoded images may change."""
    decode: Callable[[Progress], Decoded]
    read: Callable[[Progress], Listed] | None = None
    """Of a folder: finds the damaged files and lists the others."""
    decoded_bytes: Callable[[], int] | None = None
    """Of a folder: about what its decoded images take."""


def decode_image(path: str, *, image_size: int | None = None) -> Images:
    """An image file as uint8 (H, W, 3): whole, or its centred square resized."""
    from PIL import Image

    image: Image.Image
    with Image.open(path) as image:
        image.load()
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers")
    if image.mode.startswith("I"):
        # Pillow would clip 16 bits to white.
        high_bytes = np.clip(np.asarray(image) // 256, 0, 255)
        image = Image.fromarray(high_bytes.astype(np.uint8))
    if image.mode != "RGB":
        image = image.convert("RGB")
    if image_size is not None:
        image = to_square(image, image_size)
    return np.asarray(image)


def to_square(image: Any, size: int) -> Any:
    """The centred square of a Pillow image, bilinear with antialiasing."""
    from PIL import Image

    width, height = image.size
    if (width, height) == (size, size):
        return image
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BILINEAR)
