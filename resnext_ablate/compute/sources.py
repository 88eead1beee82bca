"""Where images come from: the known data sets, found and decoded to uint8 arrays.

To add a data set, write a function that finds it and enter it in `DATASETS`.
Libraries that read images are imported by the function that needs them, so that
executors, which train on decoded arrays, start without them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import platformdirs

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.compute.folders import find_folder
from resnext_ablate.compute.images import (
    Arrays,
    Decoded,
    Images,
    Labels,
    Moments,
    Progress,
    Source,
    to_square,
)
from resnext_ablate.records.data_config import DataConfig

CACHE_VARIABLE = "RESNEXT_ABLATE_CACHE"
"""Environment variable that places the cache of decoded images and downloads."""

_DIGITS_TEST_FRACTION = 0.2
_DOWNLOAD_TIMEOUT_S = 30.0
_IMAGENET_SIZE = 224
_IMAGENET_MOMENTS = Moments((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Those of the paper's code."""


@dataclass(frozen=True)
class DatasetEntry:
    """How a data set is found, and what is known of it before; None: not fixed."""

    find: Callable[[DataConfig], Source]
    num_classes: int | None
    in_channels: int
    image_size: int | None
    moments: Moments | None = None
    """To normalise with; None: those of the training images."""


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


# ImageNet: too large for a cache, and nobody may hand it on.


def _find_imagenet(config: DataConfig) -> Source:
    assert config.root is not None
    root = Path(config.root).expanduser()
    missing = [f"{split}/" for split in ("train", "val") if not (root / split).is_dir()]
    if missing:
        raise InputError(
            f"data.root = {config.root!r}: has no {' and no '.join(missing)}; ImageNet "
            "cannot be downloaded without an account. Get ILSVRC2012 from "
            "https://www.image-net.org and lay it out as torchvision does: "
            "train/WNID/*.JPEG and val/WNID/*.JPEG, such as train/n01440764/*.JPEG."
        )
    size = config.image_size or _IMAGENET_SIZE
    sized = config.model_copy(update={"image_size": size})
    return find_folder(sized, needs_sums=False)


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
        square = np.asarray(to_square(image, size))
        resized[position] = square.reshape(size, size, channels)
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
    "imagefolder": DatasetEntry(find_folder, None, 3, None),
    # Some of its classes do as well.
    "imagenet": DatasetEntry(
        _find_imagenet, None, 3, _IMAGENET_SIZE, _IMAGENET_MOMENTS
    ),
}
"""The known data sets, by the name that a study file gives."""
