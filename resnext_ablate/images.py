"""Images on disk: what a data set decodes to, and how folders of images are read.

A folder of images holds train/CLASS/ and val/CLASS/, test/CLASS/ or both. With one
split beside train/, that one is the final test and validation is carved from train/.
Decoded images are RGB.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resnext_ablate.config import DataConfig
from resnext_ablate.hardware import usable_cores
from resnext_ablate.spec import InputError

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]

IMAGE_SUFFIXES = frozenset(
    ("jpg", "jpeg", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm")
)

_FILES_PER_TASK = 64

_logger = logging.getLogger(__name__)


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
class Source:
    """A data set that is found, but not decoded."""

    fingerprint: str
    """Changes when the decoded images may change."""
    decode: Callable[[Progress], Decoded]


@dataclass(frozen=True, slots=True)
class _ImageFile:
    split: str
    label: int
    path: str
    """Relative to the root."""
    size: int
    modified_ns: int


def find_folder(config: DataConfig) -> Source:
    """The images below `config.root`, listed but not read.

    Raises:
        InputError: no such folder, or its splits and classes are not sound.
    """
    assert config.root is not None
    root = Path(config.root).expanduser()
    splits = _folder_splits(root)
    class_names = _folder_classes(root, splits)
    files = [
        file
        for split in splits
        for label, name in enumerate(class_names)
        for file in _image_files(root, split=split, label=label, name=name)
    ]
    parts = [(f.path, f.size, f.modified_ns) for f in files]
    text = json.dumps([str(root.resolve()), version("pillow"), parts])
    return Source(
        hashlib.sha256(text.encode()).hexdigest(),
        partial(
            _decode_folder,
            root=root,
            files=files,
            class_names=class_names,
            image_size=config.image_size,
        ),
    )


def _folder_splits(root: Path) -> tuple[str, ...]:
    """The splits of an image folder: train, then val, test or both."""
    rule = "write train/CLASS/*.jpg and test/CLASS/*.jpg (or val/) below it"
    if not root.is_dir():
        raise InputError(f"data.root = {str(root)!r}: no such folder; {rule}.")
    found = tuple(name for name in ("train", "val", "test") if (root / name).is_dir())
    if "train" not in found:
        inside = ", ".join(sorted(_subfolders(root))[:5]) or "none"
        raise InputError(
            f"data.root = {str(root)!r}: has no folder train/ (its folders: {inside}); "
            f"{rule}."
        )
    if len(found) < 2:
        raise InputError(
            f"data.root = {str(root)!r}: has train/ but neither test/ nor val/ to "
            f"score the nets on; {rule}."
        )
    return found


def _folder_classes(root: Path, splits: Sequence[str]) -> tuple[str, ...]:
    train = _subfolders(root / "train")
    if len(train) < 2:
        found = ", ".join(train) or "none"
        raise InputError(
            f"{root / 'train'}: needs a folder for each of at least two classes, "
            f"found {found}."
        )
    for split in splits[1:]:
        other = _subfolders(root / split)
        only = [
            f"only in {name}/: {', '.join(sorted(more))}"
            for name, more in (("train", train - other), (split, other - train))
            if more
        ]
        if only:
            raise InputError(
                f"data.root = {str(root)!r}: the classes of train/ and {split}/ "
                f"differ; {'; '.join(only)}."
            )
    return tuple(sorted(train))


def _subfolders(folder: Path) -> set[str]:
    return {
        path.name
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(".")
    }


def _image_files(
    root: Path, *, split: str, label: int, name: str
) -> tuple[_ImageFile, ...]:
    """The images of one class, at any depth, by path."""
    folder = root / split / name
    files = []
    # Plain strings: paths as objects take longer than all else here.
    above = len(str(folder))
    for entry in _entries(str(folder)):
        if entry.name.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
            path = f"{split}/{name}{entry.path[above:].replace(os.sep, '/')}"
            stat = entry.stat()
            files.append(_ImageFile(split, label, path, stat.st_size, stat.st_mtime_ns))
    if not files:
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(
            f"{folder}: holds no images ({known}); fill the class folder, or remove "
            "it from every split."
        )
    return tuple(sorted(files, key=lambda file: file.path))


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _entries(entry.path)
            else:
                yield entry


def _decode_folder(
    on_progress: Progress,
    *,
    root: Path,
    files: Sequence[_ImageFile],
    class_names: tuple[str, ...],
    image_size: int | None,
) -> Decoded:
    images, errors = _decode_files(
        root, files, image_size=image_size, on_progress=on_progress
    )
    good = np.array([file.path not in errors for file in files])
    labels = np.array([file.label for file in files], dtype=np.int64)
    split_of = np.array([file.split for file in files])
    splits = {}
    for split in dict.fromkeys(split_of.tolist()):
        for label, name in enumerate(class_names):
            if not good[(split_of == split) & (labels == label)].any():
                first = next(f for f in files if (f.split, f.label) == (split, label))
                raise InputError(
                    f"{root / split / name}: no image of this class can be read; "
                    f"first: {first.path}: {errors[first.path]}."
                )
        at = good & (split_of == split)
        splits[split] = Arrays(images[at], labels[at])
    _log_corrupt(errors)
    # With one split beside train/, that one is the final test.
    test = splits.get("test", splits.get("val"))
    val = splits.get("val") if "test" in splits else None
    assert test is not None
    return Decoded(splits["train"], test, val, class_names, tuple(errors))


def _log_corrupt(errors: dict[str, str]) -> None:
    if errors:
        shown = "; ".join(f"{path}: {why}" for path, why in list(errors.items())[:5])
        more = f"; and {len(errors) - 5} more" if len(errors) > 5 else ""
        _logger.warning("%d corrupt image(s) left out: %s%s", len(errors), shown, more)


def _decode_files(
    root: Path,
    files: Sequence[_ImageFile],
    *,
    image_size: int | None,
    on_progress: Progress,
) -> tuple[Images, dict[str, str]]:
    """Images (N, H, W, 3), not set where the dict has the file's path and reason."""
    images: Images | None = None
    first = ""
    errors: dict[str, str] = {}
    tasks = [
        files[start : start + _FILES_PER_TASK]
        for start in range(0, len(files), _FILES_PER_TASK)
    ]
    # More threads than cores only fight for the interpreter lock (measured: 2x slower).
    pool = ThreadPoolExecutor(usable_cores())
    try:
        done = 0
        decode = partial(_decode_task, root=root, image_size=image_size)
        for task, results in zip(tasks, pool.map(decode, tasks), strict=True):
            for position, (file, result) in enumerate(
                zip(task, results, strict=True), start=done
            ):
                if isinstance(result, str):
                    errors[file.path] = result
                    continue
                if images is None:
                    images, first = _room(len(files), result, file.path), file.path
                _check_shape(images, result, first=first, path=file.path)
                images[position] = result
            done += len(task)
            on_progress(done, len(files))
    finally:
        pool.shutdown(cancel_futures=True)
    if images is None:
        images = np.empty((len(files), 1, 1, 3), dtype=np.uint8)
    return images, errors


def _room(count: int, image: Images, path: str) -> Images:
    height, width, channels = image.shape
    if height != width:
        raise InputError(
            f"{path} has {width}x{height} pixels, but the nets take square images; set "
            f"data.image_size, for instance {min(height, width)}."
        )
    try:
        return np.empty((count, height, width, channels), dtype=np.uint8)
    except MemoryError:
        raise InputError(
            f"{count} images of {width}x{height} pixels need "
            f"{count * image.nbytes / 2**30:.0f} GiB of memory; set a smaller "
            "data.image_size."
        ) from None


def _check_shape(images: Images, image: Images, *, first: str, path: str) -> None:
    if image.shape != images.shape[1:]:
        size = images.shape[1]
        height, width, _ = image.shape
        raise InputError(
            f"images differ in size: {first} has {size}x{size} pixels, {path} has "
            f"{width}x{height}; set data.image_size, for instance "
            f"{min(size, height, width)}."
        )


def _decode_task(
    files: Sequence[_ImageFile], *, root: Path, image_size: int | None
) -> list[Images | str]:
    """Pixels of each file, or the reason why there are none."""
    results: list[Images | str] = []
    for file in files:
        try:
            path = f"{root}/{file.path}"
            results.append(_decode_image(path, image_size=image_size))
        except MemoryError:
            raise
        except Exception as error:  # Decoders raise anything on damaged files.
            results.append(str(error) or type(error).__name__)
    return results


def _decode_image(path: str, *, image_size: int | None) -> Images:
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
