"""Folders of JPEG files like photographs, drawn anew and the same each time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

_SIZES = ((96, 72), (80, 100), (128, 90))


def write_folder(
    root: Path,
    *,
    num_train: int,
    num_test: int,
    classes: Sequence[str] = ("cat", "dog"),
    test: str = "test",
    suffix: str = "jpg",
    scale: int = 1,
) -> Path:
    """train/ and a test split; each class has the same number of images."""
    for split, count in (("train", num_train), (test, num_test)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(count // len(classes)):
                path = root / split / name / f"{index:03}.{suffix}"
                number = index if split == "train" else 1000 + index
                write_photograph(path, index=number, label=label, scale=scale)
    return root


def write_photograph(path: Path, *, index: int, label: int, scale: int = 1) -> None:
    """A smooth picture with some grain, whose colours lean to its class."""
    rng = np.random.default_rng((index, label))
    width, height = _SIZES[index % len(_SIZES)]
    coarse = rng.uniform(0, 255, (6, 8, 3))
    coarse[..., label % 3] = 0.5 * coarse[..., label % 3] + 120
    small = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
    size = (width * scale, height * scale)
    smooth = np.asarray(small.resize(size, Image.Resampling.BICUBIC), dtype=float)
    grain = rng.normal(0, 6, (size[1], size[0], 1))
    pixels = (smooth + grain).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, "JPEG", quality=90)
