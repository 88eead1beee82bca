"""Folders of images: listed, and read into arrays or checked file by file.

A folder of images holds train/CLASS/ and val/CLASS/, test/CLASS/ or both. With one
split beside train/, that one is the final test and validation is carved from train/.
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
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.compute.hardware import usable_cores
from resnext_ablate.compute.images import (
    Arrays,
    Decoded,
    Files,
    Images,
    Listed,
    Progress,
    Source,
    decode_image,
)
from resnext_ablate.records.data_config import DataConfig

IMAGE_SUFFIXES = frozenset(
    ("jpg", "jpeg", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm")
)

_FILES_PER_TASK = 64

_Result = TypeVar("_Result")
_Held = TypeVar("_Held")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _ImageFile:
    split: str
    label: int
    path: str
    """Relative to the root."""
    size: int
    modified_ns: int


@dataclass(frozen=True)
class _Folder:
    """A folder of images as it was found."""

    root: Path
    files: Sequence[_ImageFile]
    class_names: tuple[str, ...]
    image_size: int | None


def find_folder(config: DataConfig, *, needs_sums: bool = True) -> Source:
    """The images below `config.root`, listed but not read.

    Args:
        config: names the folder.
        needs_sums: of the pixels of files that are only listed; without them the check
            of the files is quicker.

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
    folder = _Folder(root, files, class_names, config.image_size)
    return Source(
        hashlib.sha256(text.encode()).hexdigest(),
        partial(_decode_folder, folder=folder),
        partial(_read_folder, folder=folder, needs_sums=needs_sums),
        partial(_decoded_bytes, folder),
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


def _decoded_bytes(folder: _Folder) -> int:
    size = folder.image_size
    if size is None:
        try:
            size = len(decode_image(str(folder.root / folder.files[0].path)))
        except Exception:  # Decoders raise anything on damaged files.
            return 0  # Decoding will say more of it.
    return len(folder.files) * size**2 * 3


def _decode_folder(on_progress: Progress, *, folder: _Folder) -> Decoded:
    files = folder.files
    images, errors = _decode_files(folder, on_progress=on_progress)
    labels = np.array([file.label for file in files], dtype=np.int64)
    train, val, test = _good_splits(folder, Arrays(images, labels).at, errors=errors)
    return Decoded(train, test, val, folder.class_names, tuple(errors))


def _read_folder(on_progress: Progress, *, folder: _Folder, needs_sums: bool) -> Listed:
    """Reads every file once; those that cannot be decoded are left out."""
    if folder.image_size is None:
        raise InputError(
            f"{folder.root}: images that stream need data.image_size, such as 224."
        )
    files, errors = folder.files, {}
    measure = partial(_measure_image, image_size=folder.image_size)
    sums = np.zeros((len(files), 2, 3), dtype=np.int64)
    work = measure if needs_sums else _check_image
    for position, result in _each(folder, work, on_progress=on_progress):
        if isinstance(result, str):
            errors[files[position].path] = result
        elif result is not None:
            sums[position] = result
    every = Files(
        names=np.array([os.fsencode(file.path) for file in files]),
        sizes=np.array([file.size for file in files], dtype=np.int64),
        labels=np.array([file.label for file in files], dtype=np.int64),
        sums=sums,
    )
    train, val, test = _good_splits(folder, every.at, errors=errors)
    return Listed(
        train,
        test,
        val,
        folder.class_names,
        tuple(errors),
        folder.image_size,
        str(folder.root.absolute()),
    )


def _good_splits(
    folder: _Folder,
    at: Callable[[npt.NDArray[np.int64]], _Held],
    *,
    errors: dict[str, str],
) -> tuple[_Held, _Held | None, _Held]:
    """Train, validation if it has a folder, and test, without damaged files."""
    files = folder.files
    good = np.array([file.path not in errors for file in files])
    labels = np.array([file.label for file in files])
    split_of = np.array([file.split for file in files])
    splits = {}
    for split in dict.fromkeys(split_of.tolist()):
        for label, name in enumerate(folder.class_names):
            if not good[(split_of == split) & (labels == label)].any():
                first = next(f for f in files if (f.split, f.label) == (split, label))
                raise InputError(
                    f"{folder.root / split / name}: no image of this class can be "
                    f"read; first: {first.path}: {errors[first.path]}."
                )
        splits[split] = at(np.flatnonzero(good & (split_of == split)))
    _log_corrupt(errors)
    # With one split beside train/, that one is the final test.
    val = splits["val"] if len(splits) == 3 else None
    return splits["train"], val, splits.get("test") or splits["val"]


def _log_corrupt(errors: dict[str, str]) -> None:
    if errors:
        shown = "; ".join(f"{path}: {why}" for path, why in list(errors.items())[:5])
        more = f"; and {len(errors) - 5} more" if len(errors) > 5 else ""
        _logger.warning("%d corrupt image(s) left out: %s%s", len(errors), shown, more)


def _decode_files(
    folder: _Folder, *, on_progress: Progress
) -> tuple[Images, dict[str, str]]:
    """Images (N, H, W, 3), not set where the dict has the file's path and reason."""
    files = folder.files
    images: Images | None = None
    first = ""
    errors: dict[str, str] = {}
    decode = partial(decode_image, image_size=folder.image_size)
    for position, result in _each(folder, decode, on_progress=on_progress):
        path = files[position].path
        if isinstance(result, str):
            errors[path] = result
            continue
        if images is None:
            images, first = _room(len(files), result, path), path
        _check_shape(images, result, first=first, path=path)
        images[position] = result
    if images is None:
        images = np.empty((len(files), 1, 1, 3), dtype=np.uint8)
    return images, errors


def _each(
    folder: _Folder, work: Callable[[str], _Result], *, on_progress: Progress
) -> Iterator[tuple[int, _Result | str]]:
    """What work on each file's path gives, in their order, or why it cannot be done."""
    files = folder.files
    tasks = [
        files[start : start + _FILES_PER_TASK]
        for start in range(0, len(files), _FILES_PER_TASK)
    ]
    # More threads than cores only fight for the interpreter lock (measured: 2x slower).
    pool = ThreadPoolExecutor(usable_cores())
    try:
        done = 0
        do = partial(_do_task, work=work, root=folder.root)
        for results in pool.map(do, tasks):
            yield from enumerate(results, start=done)
            done += len(results)
            on_progress(done, len(files))
    finally:
        pool.shutdown(cancel_futures=True)


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


def _do_task(
    files: Sequence[_ImageFile], *, work: Callable[[str], _Result], root: Path
) -> list[_Result | str]:
    results: list[_Result | str] = []
    for file in files:
        try:
            results.append(work(f"{root}/{file.path}"))
        except MemoryError:
            raise
        except Exception as error:  # Decoders raise anything on damaged files.
            results.append(str(error) or type(error).__name__)
    return results


def _check_image(path: str) -> None:
    """Decodes an image at an eighth of its size, where it is a JPEG."""
    from PIL import Image

    with Image.open(path) as image:
        image.draft("RGB", (image.width // 8, image.height // 8))
        image.load()


def _measure_image(path: str, *, image_size: int) -> npt.NDArray[np.int64]:
    """The sums (2, 3) of an image's pixels and of their squares."""
    pixels = decode_image(path, image_size=image_size).reshape(-1, 3)
    exact = pixels.astype(np.float64)  # Whole numbers far below 2**53.
    squares = np.einsum("ij,ij->j", exact, exact)
    return np.stack([exact.sum(axis=0), squares]).astype(np.int64)
