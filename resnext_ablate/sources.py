"""Where images come from: the data sets, found and decoded to uint8 arrays.

To add a data set, write a function that finds it and enter it in `DATASETS`.
Libraries that read images are imported by the function that needs them, so that
executors, which train on decoded arrays, start without them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import platformdirs

from resnext_ablate.config import DataConfig
from resnext_ablate.spec import InputError

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]

CACHE_VARIABLE = "RESNEXT_ABLATE_CACHE"
"""Environment variable that places the cache of decoded images and downloads."""

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
)

_DIGITS_TEST_FRACTION = 0.2
_FILES_PER_TASK = 64
_DOWNLOAD_TIMEOUT_S = 30.0

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


@dataclass(frozen=True)
class DatasetEntry:
    """How a data set is found, and what is known of it before; None: not fixed."""

    find: Callable[[DataConfig], Source]
    num_classes: int | None
    in_channels: int
    image_size: int | None


def cache_folder() -> Path:
    """Where decoded images and downloads are kept."""
    if placed := os.environ.get(CACHE_VARIABLE):
        return Path(placed).expanduser().absolute()
    return platformdirs.user_cache_path("resnext_ablate")


def stratified_split(
    labels: Labels, *, fraction: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Positions (rest, held out), each ascending.

    Each class gives the same fraction of its images, rounded: at least one image where
    it has two, and never all.
    """
    rng = np.random.default_rng(seed)
    is_held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        positions = rng.permutation(np.flatnonzero(labels == label))
        count = int(len(positions) * fraction + 0.5)
        is_held[positions[: min(max(count, 1), len(positions) - 1)]] = True
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


# Handwritten digits of scikit-learn: 8 x 8 pixels, embedded in the library.


def _find_digits(config: DataConfig) -> Source:
    fingerprint = f"digits, scikit-learn {version('scikit-learn')}"
    return _resizing(Source(fingerprint, _decode_digits), config.image_size)


def _decode_digits(on_progress: Progress) -> Decoded:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 0 .. 16 becomes 0 .. 255.
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    every = Arrays(images, digits.target.astype(np.int64))
    rest, held = stratified_split(every.labels, fraction=_DIGITS_TEST_FRACTION, seed=0)
    names = tuple(map(str, digits.target_names))
    return Decoded(every.at(rest), every.at(held), None, names)


# Data sets that torchvision downloads.


@dataclass(frozen=True)
class Download:
    """A data set of `torchvision.datasets` and the files that hold it."""

    class_name: str
    files: tuple[str, ...]
    subfolder: str
    """Where torchvision looks for the files, relative to the root."""
    address: str
    decode: Callable[[Any, str], tuple[Arrays, Arrays, tuple[str, ...]]]


def _find_download(config: DataConfig, *, download: Download) -> Source:
    root = Path(config.root) if config.root else cache_folder() / "downloads"
    # torchvision checks the files' MD5 sums, so that the name pins the images.
    source = Source(
        f"torchvision {download.class_name}",
        partial(_decode_download, name=config.name, root=root, download=download),
    )
    return _resizing(source, config.image_size)


def _decode_download(
    on_progress: Progress, *, name: str, root: Path, download: Download
) -> Decoded:
    import torchvision.datasets

    dataset = getattr(torchvision.datasets, download.class_name)
    try:
        # It may print; standard output is for answers.
        with _download_timeout(), contextlib.redirect_stdout(sys.stderr):
            train, test, class_names = download.decode(dataset, str(root))
    except (OSError, RuntimeError) as error:
        folder = (root / download.subfolder).absolute()
        raise InputError(
            f"{name}: could not be downloaded ({error}). Put "
            f"{', '.join(download.files)} from {download.address} into {folder} and "
            'run again, or use a folder of images: data.name = "imagefolder" with '
            "data.root = a folder of train/CLASS/ and test/CLASS/."
        ) from None
    return Decoded(train, test, None, class_names)


@contextlib.contextmanager
def _download_timeout() -> Iterator[None]:
    # torchvision sets none, and a silent firewall would hold it for ever.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _decode_cifar(dataset: Any, root: str) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    train, test = (dataset(root, train=part, download=True) for part in (True, False))
    train_arrays, test_arrays = (
        Arrays(np.ascontiguousarray(part.data), np.asarray(part.targets, np.int64))
        for part in (train, test)
    )
    return train_arrays, test_arrays, tuple(train.classes)


def _decode_mnist(dataset: Any, root: str) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    train, test = (dataset(root, train=part, download=True) for part in (True, False))
    train_arrays, test_arrays = (
        Arrays(part.data.numpy()[..., None], part.targets.numpy().astype(np.int64))
        for part in (train, test)
    )
    return train_arrays, test_arrays, tuple(dataset.classes)


def _decode_svhn(dataset: Any, root: str) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    train, test = (dataset(root, part, download=True) for part in ("train", "test"))
    train_arrays, test_arrays = (
        Arrays(np.ascontiguousarray(part.data.transpose(0, 2, 3, 1)), part.labels)
        for part in (train, test)  # (N, C, H, W) -> (N, H, W, C)
    )
    return train_arrays, test_arrays, tuple(map(str, range(10)))


# Folders of images: train/CLASS/ and val/CLASS/, test/CLASS/ or both.


@dataclass(frozen=True, slots=True)
class _ImageFile:
    split: str
    label: int
    path: str
    """Relative to the root."""
    size: int
    modified_ns: int


def _find_folder(config: DataConfig) -> Source:
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
    for entry in _entries(str(folder)):
        if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
            path = Path(entry.path).relative_to(root).as_posix()
            stat = entry.stat()
            files.append(_ImageFile(split, label, path, stat.st_size, stat.st_mtime_ns))
    if not files:
        known = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
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
    pool = ThreadPoolExecutor()
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
            results.append(_decode_image(root / file.path, image_size=image_size))
        except MemoryError:
            raise
        except Exception as error:  # Decoders raise anything on damaged files.
            results.append(str(error) or type(error).__name__)
    return results


def _decode_image(path: Path, *, image_size: int | None) -> Images:
    from PIL import Image

    with Image.open(path) as opened:
        if opened.mode == "F":
            raise ValueError("pixels are floating-point numbers")
        if opened.mode.startswith("I"):
            # Pillow would clip 16 bits to white.
            high_bytes = np.clip(np.asarray(opened) // 256, 0, 255)
            image = Image.fromarray(high_bytes.astype(np.uint8)).convert("RGB")
        else:
            image = opened.convert("RGB")
    if image_size is not None:
        image = _resized(image, image_size)
    return np.asarray(image)


def _resized(image: Any, size: int) -> Any:
    """The centred square of a Pillow image, bilinear with antialiasing."""
    from PIL import Image

    width, height = image.size
    if (width, height) == (size, size):
        return image
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _resizing(source: Source, size: int | None) -> Source:
    """A source whose arrays are resized behind it."""
    if size is None:
        return source
    fingerprint = f"{source.fingerprint}, pillow {version('pillow')}"
    return Source(fingerprint, partial(_decode_resized, source=source, size=size))


def _decode_resized(on_progress: Progress, *, source: Source, size: int) -> Decoded:
    decoded = source.decode(on_progress)
    train, test = (
        Arrays(_resized_array(part.images, size), part.labels)
        for part in (decoded.train, decoded.test)
    )
    return Decoded(train, test, None, decoded.class_names)


def _resized_array(images: Images, size: int) -> Images:
    from PIL import Image

    channels = images.shape[-1]
    resized = np.empty((len(images), size, size, channels), dtype=np.uint8)
    for position, pixels in enumerate(images):
        image = Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)
        resized[position] = np.asarray(_resized(image, size)).reshape(
            size, size, channels
        )
    return resized


def _cifar(num_classes: int, file: str) -> DatasetEntry:
    download = Download(
        class_name=f"CIFAR{num_classes}",
        files=(file,),
        subfolder="",
        address="https://www.cs.toronto.edu/~kriz/cifar.html",
        decode=_decode_cifar,
    )
    return DatasetEntry(partial(_find_download, download=download), num_classes, 3, 32)


_FASHION_MNIST = Download(
    class_name="FashionMNIST",
    files=tuple(
        f"{split}-{kind}-ubyte.gz"
        for split in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ),
    subfolder="FashionMNIST/raw",
    address="https://github.com/zalandoresearch/fashion-mnist",
    decode=_decode_mnist,
)
_SVHN = Download(
    class_name="SVHN",
    files=("train_32x32.mat", "test_32x32.mat"),
    subfolder="",
    address="http://ufldl.stanford.edu/housenumbers",
    decode=_decode_svhn,
)

DATASETS: dict[str, DatasetEntry] = {
    "digits": DatasetEntry(_find_digits, 10, 1, 8),
    "cifar10": _cifar(10, "cifar-10-python.tar.gz"),
    "cifar100": _cifar(100, "cifar-100-python.tar.gz"),
    "fashion_mnist": DatasetEntry(
        partial(_find_download, download=_FASHION_MNIST), 10, 1, 28
    ),
    "svhn": DatasetEntry(partial(_find_download, download=_SVHN), 10, 3, 32),
    "imagefolder": DatasetEntry(_find_folder, None, 3, None),
}
"""The known data sets, by the name that a study file gives."""
