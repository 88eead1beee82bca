"""Data sets: decoded once into a cache, resident on the device, augmented in batches.

`prepare` finds, decodes, splits and caches a data set; the scheduler calls it. `load`
puts the cached arrays on a device; executors call it, and it imports neither
torchvision nor Pillow nor scikit-learn. The rest are pure functions that turn stored
images into batches; all their random draws come from a generator seeded by seed and
epoch alone.

Stored images are uint8 (N, H, W, C), batches float (N, C, H, W).
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
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from resnext_ablate.config import DataConfig
from resnext_ablate.images import Arrays, Decoded, Images, Progress, Source
from resnext_ablate.sources import (
    CACHE_VARIABLE,
    DATASETS,
    cache_folder,
    stratified_split,
)
from resnext_ablate.spec import InputError

_FORMAT = 1  # Of the cache; a new one leaves older folders alone.

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataInfo:
    """What there is to know of a decoded data set."""

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
    """SHA-256 of the decoded images and labels of each split."""
    corrupt_files: tuple[str, ...]
    """Images that could not be decoded and were left out, relative to the root."""


@dataclass(frozen=True)
class Prepared:
    """A decoded data set in the cache."""

    info: DataInfo
    folder: Path


@dataclass(frozen=True)
class Split:
    """images: uint8 (N, H, W, C) on the device; labels: int64 (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """A data set on a device.

    mean, std: float32 (C,), of the training split, in units of pixel / 255.
    """

    train: Split
    val: Split
    test: Split
    mean: Tensor
    std: Tensor
    info: DataInfo


def prepare(config: DataConfig, *, on_progress: Progress | None = None) -> Prepared:
    """Decodes a data set into the cache, or finds it there whole.

    Safe against kills and against other processes that prepare the same set: a set is
    built beside its folder, under a lock, and renamed into place.

    Args:
        config: which data set, its size and its splits.
        on_progress: told the number of image files decoded and of all.

    Raises:
        InputError: the data set is not there, is not sound or cannot be cached.
    """
    if config.name not in DATASETS:
        known = ", ".join(DATASETS)
        raise InputError(f"data.name = {config.name!r}: no such data set; use {known}.")
    source = DATASETS[config.name].find(config)
    folder = cache_folder() / "datasets" / f"{config.name}-{_key(config, source)}"
    info = _read_cached(folder)
    if info is None:
        with _cache_errors(folder), _locked(folder):
            info = _read_cached(folder)
            if info is None:
                decoded = source.decode(on_progress or (lambda done, total: None))
                info = _write_cached(folder, config=config, decoded=decoded)
    return Prepared(info, folder)


def load(folder: Path, *, device: torch.device) -> Dataset:
    """Puts a prepared data set on a device.

    On a CPU the images stay mapped, so that processes share one copy of them.

    Raises:
        InputError: the folder holds no decoded data set.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        train, val, test = (
            _load_split(folder, split, device=device)
            for split in ("train", "val", "test")
        )
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} holds no decoded data set ({error.filename} is missing); "
            "prepare the data again."
        ) from None
    return Dataset(
        train=train,
        val=val,
        test=test,
        mean=torch.tensor(meta["mean"], device=device),
        std=torch.tensor(meta["std"], device=device),
        info=_info_from(meta["info"]),
    )


# Batches and augmentation.


@dataclass(frozen=True)
class Batch:
    """images: float32 (N, C, H, W), strided channels-last; labels: int64 (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class EpochDraws:
    """All random draws of an epoch over N images.

    order: int64 (N,), a permutation; shift: int64 (N, 2), how far the image at each
    position of the epoch moves up and left, in pixels from -padding to padding;
    mirrored: bool (N,).
    """

    order: Tensor
    shift: Tensor
    mirrored: Tensor


def epoch_generator(seed: int, *, epoch: int) -> torch.Generator:
    """The generator of one epoch, on the CPU so that devices agree."""
    state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def draw_epoch(
    num_images: int, *, crop_padding: int, flip: bool, generator: torch.Generator
) -> EpochDraws:
    """Draws order, crops and mirrorings of an epoch."""
    order = torch.randperm(num_images, generator=generator)
    size = (num_images, 2)
    shift = torch.randint(-crop_padding, crop_padding + 1, size, generator=generator)
    mirrored = torch.randint(0, 2, (num_images,), generator=generator).bool()
    return EpochDraws(order, shift, mirrored & flip)


def num_batches(num_images: int, *, batch_size: int) -> int:
    """Batches of an epoch: the last partial one is dropped unless it is the only."""
    return max(1, num_images // batch_size)


def train_batches(
    dataset: Dataset, *, draws: EpochDraws, batch_size: int, num_passed: int = 0
) -> Iterator[Batch]:
    """The augmented training batches of an epoch, in the order of `draws`.

    The first `num_passed` are left out: those are done.
    """
    images, labels = dataset.train.images, dataset.train.labels
    order, shift, mirrored = (
        tensor.to(images.device)
        for tensor in (draws.order, draws.shift, draws.mirrored)
    )
    for batch in range(num_passed, num_batches(len(order), batch_size=batch_size)):
        part = slice(batch * batch_size, (batch + 1) * batch_size)
        augmented = augment(
            images,
            positions=order[part],
            shift=shift[part],
            mirrored=mirrored[part],
            mean=dataset.mean,
            std=dataset.std,
        )
        yield Batch(augmented, labels[order[part]])


def parts_of(batch: Batch, *, count: int) -> tuple[Batch, ...]:
    """A batch in parts of nearly equal size, in order."""
    if count == 1:
        return (batch,)
    images, labels = (t.tensor_split(count) for t in (batch.images, batch.labels))
    return tuple(map(Batch, images, labels))


def eval_batches(
    split: Split, *, mean: Tensor, std: Tensor, batch_size: int
) -> Iterator[Batch]:
    """All images of a split in their order, normalised."""
    for start in range(0, len(split.labels), batch_size):
        part = slice(start, start + batch_size)
        images = normalise(split.images[part], mean=mean, std=std)  # (N, H, W, C)
        yield Batch(images.permute(0, 3, 1, 2), split.labels[part])


def normalise(images: Tensor, *, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (..., C) to float32: (pixel / 255 - mean) / std."""
    return torch.addcmul(-mean / std, images.float(), 1 / (255 * std))


def augment(
    images: Tensor,
    *,
    positions: Tensor,
    shift: Tensor,
    mirrored: Tensor,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """Pads, crops, mirrors and normalises chosen images, all at once.

    Equals normalising, padding with zeros, cropping each image at its own place and
    then mirroring it: what comes from outside the image is 0 in normalised units.

    Args:
        images: uint8 (N, H, W, C).
        positions: int64 (B,), which of the images.
        shift: int64 (B, 2), pixels up and left.
        mirrored: bool (B,), swaps left and right.
        mean, std: float32 (C,), in units of pixel / 255.

    Returns:
        float32 (B, C, H, W), strided channels-last.
    """
    _, height, width, channels = images.shape
    rows = torch.arange(height, device=images.device) + shift[:, :1]  # (B, H)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    columns = columns + shift[:, 1:]  # (B, W)
    inside_rows = (rows >= 0) & (rows < height)
    inside_columns = (columns >= 0) & (columns < width)
    inside = inside_rows[:, :, None] & inside_columns[:, None, :]  # (B, H, W)
    # Whole rows and then bytes of rows: ten times faster on a CPU than pixel by pixel.
    rows = positions[:, None] * height + rows.clamp(0, height - 1)
    strips = images.reshape(-1, width * channels).index_select(0, rows.flatten())
    strips = strips.view(-1, height, width * channels)
    first = columns.clamp(0, width - 1)[:, :, None] * channels  # (B, W, 1)
    taken = (first + torch.arange(channels, device=images.device)).flatten(1)
    gathered = strips.gather(2, taken[:, None].expand_as(strips))
    gathered = gathered.view(-1, height, width, channels)
    padded = normalise(gathered, mean=mean, std=std) * inside[..., None]
    return padded.permute(0, 3, 1, 2)


# The cache: a folder of arrays and a meta.json for each data set as configured.


def _key(config: DataConfig, source: Source) -> str:
    parts = {
        "format": _FORMAT,
        "source": source.fingerprint,
        "image_size": config.image_size,
        "val_fraction": config.val_fraction,
        "split_seed": config.split_seed,
    }
    if config.train_fraction < 1:  # Named only then: older caches stay good.
        parts["train_fraction"] = config.train_fraction
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _read_cached(folder: Path) -> DataInfo | None:
    """What a folder of the cache holds; None when there is none or it is damaged."""
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        for name, digest in meta["arrays"].items():
            if _digest(np.load(folder / f"{name}.npy", mmap_mode="r")) != digest:
                raise ValueError(f"{name}.npy has changed")
        return _info_from(meta["info"])
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        _logger.warning("%s is damaged (%s): decoding again", folder, error)
        return None


def _write_cached(folder: Path, *, config: DataConfig, decoded: Decoded) -> DataInfo:
    """Splits, measures and stores a data set. The caller holds its lock."""
    splits = _splits(config, decoded)
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    arrays = {
        f"{split}_{kind}": array
        for split, held in splits.items()
        for kind, array in (("images", held.images), ("labels", held.labels))
    }
    for name, array in arrays.items():
        np.save(building / f"{name}.npy", array)
    digests = {name: _digest(array) for name, array in arrays.items()}
    mean, std = _moments(splits["train"].images)
    _, _, size, channels = splits["train"].images.shape
    info = DataInfo(
        name=config.name,
        num_classes=len(decoded.class_names),
        class_names=decoded.class_names,
        in_channels=channels,
        image_size=size,
        num_train=len(splits["train"].labels),
        num_val=len(splits["val"].labels),
        num_test=len(splits["test"].labels),
        checksum=hashlib.sha256(json.dumps(digests).encode()).hexdigest(),
        corrupt_files=decoded.corrupt_files,
    )
    meta = {
        "info": dataclasses.asdict(info),
        "arrays": digests,
        "mean": mean.tolist(),
        "std": std.tolist(),
    }
    (building / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
    return info


def _splits(config: DataConfig, decoded: Decoded) -> dict[str, Arrays]:
    train, val = decoded.train, decoded.val
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
    return {"train": train, "val": val, "test": decoded.test}


def _moments(images: Images) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and standard deviation (C,) of uint8 (N, H, W, C), in pixel / 255."""
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images), 64):  # Small enough for a processor's cache.
        for channel in range(channels):
            pixels = images[start : start + 64, :, :, channel].ravel()
            counts[channel] += np.bincount(pixels, minlength=256)
    values = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(axis=1)
    # A channel without variation still needs a scale.
    return mean, np.maximum(np.sqrt(variance), 1 / 255)


def _digest(array: npt.NDArray[Any]) -> str:
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _info_from(values: dict[str, Any]) -> DataInfo:
    tuples = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
    fields: dict[str, Any] = {**values, **tuples}
    return DataInfo(**fields)


def _load_split(folder: Path, split: str, *, device: torch.device) -> Split:
    # Copy-on-write: torch wants memory that it may write to, though nobody does.
    images, labels = (
        torch.from_numpy(np.load(folder / f"{split}_{kind}.npy", mmap_mode="c"))
        for kind in ("images", "labels")
    )
    return Split(images.to(device), labels.to(device))


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
