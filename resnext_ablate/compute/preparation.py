"""Data sets found, checked, split and kept: what runs start from.

`prepare` is the scheduler's. A set that is small is decoded once into arrays in a
cache; one that is large stays in its files, and the cache holds their list. Such a
list is told from others by names and sizes, since its images are too many to be read
at each start; they are read once, to find the damaged ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.compute.hardware import memory_bytes
from resnext_ablate.compute.images import (
    Arrays,
    Decoded,
    Files,
    Images,
    Listed,
    Moments,
    Progress,
    Source,
    moments_of,
)
from resnext_ablate.compute.sources import (
    CACHE_VARIABLE,
    DATASETS,
    cache_folder,
    stratified_split,
)
from resnext_ablate.records.data_config import DataConfig, Loading

META_FILE = "meta.json"

_FORMAT = 1  # Of the cache; a new one leaves older folders alone.
_MEMORY_SHARE = 0.5
"""A folder streams by itself where its decoded images would take more of memory."""

_Held = TypeVar("_Held", Arrays, Files)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataInfo:
    """What there is to know of a data set."""

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    in_channels: int
    image_size: int
    """Pixels of a side."""
    num_train: int
    num_val: int
    num_test: int
    checksum: str
    """SHA-256 of the decoded images and labels of each split; where they stream, of
    the names, sizes and labels of their files."""
    corrupt_files: tuple[str, ...]
    """Images that could not be decoded and were left out, relative to the root."""


@dataclass(frozen=True)
class Prepared:
    """A data set in the cache."""

    info: DataInfo
    folder: Path
    config: DataConfig
    """With its loading settled."""


def prepare(config: DataConfig, *, on_progress: Progress | None = None) -> Prepared:
    """Decodes or lists a data set into the cache, or finds it there whole.

    Safe against kills and against other processes that prepare the same set: a set is
    built beside its folder, under a lock, and renamed into place.

    Args:
        config: which data set, its size and its splits.
        on_progress: told the number of image files read and of all.

    Raises:
        InputError: the data set is not there, is not sound or cannot be cached.
    """
    if config.name not in DATASETS:
        known = ", ".join(DATASETS)
        raise InputError(f"data.name = {config.name!r}: no such data set; use {known}.")
    source = DATASETS[config.name].find(config)
    loading = _loading(config, source)
    key = _key(config, source, loading=loading)
    folder = cache_folder() / "datasets" / f"{config.name}-{key}"
    info = _read_cached(folder)
    if info is None:
        with _cache_errors(folder), _locked(folder):
            info = _read_cached(folder)
            if info is None:
                told = on_progress or (lambda done, total: None)
                if loading == "stream":
                    assert source.read is not None
                    kept = _kept_files(config, source.read(told))
                else:
                    kept = _kept_pixels(config, source.decode(told))
                info = _write_cached(folder, kept)
    settled = config.model_copy(update={"loading": loading})
    return Prepared(info, folder, settled)


def _loading(config: DataConfig, source: Source) -> Loading:
    if config.loading != "auto":
        return config.loading
    if config.augment == "imagenet":
        return "stream"
    if source.decoded_bytes is None:
        return "memory"
    is_large = source.decoded_bytes() > _MEMORY_SHARE * memory_bytes()
    return "stream" if is_large else "memory"


@dataclass(frozen=True)
class _Kept:
    """A data set as a folder of the cache will hold it."""

    info: DataInfo
    """Without its checksum."""
    arrays: dict[str, npt.NDArray[Any]]
    moments: Moments
    root: str
    """Of the files, where they stream; empty otherwise."""


def _kept_pixels(config: DataConfig, decoded: Decoded) -> _Kept:
    splits = _splits(config, train=decoded.train, val=decoded.val, test=decoded.test)
    arrays = {
        f"{split}_{kind}": array
        for split, held in splits.items()
        for kind, array in (("images", held.images), ("labels", held.labels))
    }
    pixels = splits["train"].images
    _, _, size, channels = pixels.shape
    info = _info(config, decoded, splits, image_size=size, in_channels=channels)
    moments = DATASETS[config.name].moments or _moments(pixels)
    return _Kept(info, arrays, moments, root="")


def _kept_files(config: DataConfig, listed: Listed) -> _Kept:
    splits = _splits(config, train=listed.train, val=listed.val, test=listed.test)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for split, held in splits.items():
        arrays[f"{split}_images"] = held.names
        arrays[f"{split}_labels"] = held.labels
        arrays[f"{split}_sizes"] = held.sizes
    info = _info(config, listed, splits, image_size=listed.image_size, in_channels=3)
    train = splits["train"]
    moments = DATASETS[config.name].moments or moments_of(
        train.sums.sum(axis=0), num_pixels=len(train.labels) * listed.image_size**2
    )
    return _Kept(info, arrays, moments, root=listed.root)


def _info(
    config: DataConfig,
    found: Decoded | Listed,
    splits: dict[str, Arrays] | dict[str, Files],
    *,
    image_size: int,
    in_channels: int,
) -> DataInfo:
    return DataInfo(
        name=config.name,
        num_classes=len(found.class_names),
        class_names=found.class_names,
        in_channels=in_channels,
        image_size=image_size,
        num_train=len(splits["train"].labels),
        num_val=len(splits["val"].labels),
        num_test=len(splits["test"].labels),
        checksum="",
        corrupt_files=found.corrupt_files,
    )


def _splits(
    config: DataConfig, *, train: _Held, val: _Held | None, test: _Held
) -> dict[str, _Held]:
    if val is None:
        rest, held = stratified_split(
            train.labels, fraction=config.val_fraction, seed=config.split_seed
        )
        train, val = train.at(rest), train.at(held)
    if not len(val.labels):
        raise InputError(
            "the validation split is empty: at least one class needs two training "
            "images."
        )
    if config.train_fraction < 1:
        used, _ = stratified_split(
            train.labels, fraction=1 - config.train_fraction, seed=config.split_seed
        )
        train = train.at(used)
    return {"train": train, "val": val, "test": test}


def _moments(images: Images) -> Moments:
    """Of uint8 (N, H, W, C)."""
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images), 64):  # Small enough for a processor's cache.
        for channel in range(channels):
            pixels = images[start : start + 64, :, :, channel].ravel()
            counts[channel] += np.bincount(pixels, minlength=256)
    values = np.arange(256)
    sums = np.stack([counts @ values, counts @ values**2])
    return moments_of(sums, num_pixels=images[..., 0].size)


# The cache: a folder of arrays and a meta.json for each data set as configured.


def _key(config: DataConfig, source: Source, *, loading: Loading) -> str:
    parts = {
        "format": _FORMAT,
        "source": source.fingerprint,
        "image_size": config.image_size,
        "val_fraction": config.val_fraction,
        "split_seed": config.split_seed,
    }
    # Named only where they are new: older caches stay good.
    if config.train_fraction < 1:
        parts["train_fraction"] = config.train_fraction
    if loading == "stream":
        parts["loading"] = loading
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _read_cached(folder: Path) -> DataInfo | None:
    """What a folder of the cache holds; None when there is none or it is damaged."""
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        for name, digest in meta["arrays"].items():
            if _digest(np.load(folder / f"{name}.npy", mmap_mode="r")) != digest:
                raise ValueError(f"{name}.npy has changed")
        return info_from(meta["info"])
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        _logger.warning("%s is damaged (%s): reading all again", folder, error)
        return None


def _write_cached(folder: Path, kept: _Kept) -> DataInfo:
    """Stores a data set. The caller holds its lock."""
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    for name, array in kept.arrays.items():
        np.save(building / f"{name}.npy", array)
    digests = {name: _digest(array) for name, array in kept.arrays.items()}
    checksum = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    info = dataclasses.replace(kept.info, checksum=checksum)
    meta = {
        "info": dataclasses.asdict(info),
        "arrays": digests,
        "mean": kept.moments.mean,
        "std": kept.moments.std,
        "root": kept.root,
    }
    (building / META_FILE).write_text(json.dumps(meta), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
    return info


def _digest(array: npt.NDArray[Any]) -> str:
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def info_from(values: dict[str, Any]) -> DataInfo:
    """What a meta.json says of a data set."""
    tuples = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
    fields: dict[str, Any] = {**values, **tuples}
    return DataInfo(**fields)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from building the same folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _logger.info("waiting for another process that decodes %s", folder.name)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{folder.parent}: decoded images cannot be kept there: {error.strerror}; "
            f"name a folder with room that you may write to in {CACHE_VARIABLE}."
        ) from None
