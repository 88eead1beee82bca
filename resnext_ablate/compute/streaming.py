"""Large images from their files to batches, read again in each epoch.

Worker processes read, and the device normalises, all images of a batch at once. How
many workers there are, and where a run was interrupted, change nothing in a batch.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from multiprocessing import connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.compute.data import (
    WHOLE,
    Batch,
    Part,
    SplitName,
    augment,
    batch_slices,
    draw_epoch,
    epoch_generator,
    normalise,
)
from resnext_ablate.compute.hardware import usable_cores
from resnext_ablate.compute.preparation import META_FILE, info_from
from resnext_ablate.compute.reading import (
    Draw,
    Gathered,
    Reader,
    Shelf,
    Wish,
    decode,
    decode_on_gpu,
)
from resnext_ablate.records.data_config import DataConfig

_SPLITS = ("train", "val", "test")
_MAX_WORKERS = 16
"""Of one process that trains, where their number is not given."""


class _Order:
    """The batches that a loader goes through when it is asked next."""

    def __init__(self) -> None:
        self.batches: Iterable[list[Wish]] = ()

    def __iter__(self) -> Iterator[list[Wish]]:
        return iter(self.batches)


class Stream:
    """A data set read from its files, as one process that trains sees it."""

    def __init__(
        self,
        folder: Path,
        *,
        config: DataConfig,
        device: torch.device,
        num_sharing: int,
    ) -> None:
        """Opens a data set that `preparation` has listed; no worker starts yet.

        Args:
            folder: of the cache.
            config: how images are read, and by how many workers.
            device: where batches go.
            num_sharing: processes that train on this machine and share its cores.

        Raises:
            InputError: the folder lists no data set.
        """
        try:
            meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
            self._shelves = {name: Shelf(folder, name) for name in _SPLITS}
            for shelf in self._shelves.values():
                assert len(shelf.names) == len(shelf.labels)
        except FileNotFoundError as error:
            raise InputError(
                f"{folder} lists no images ({error.filename} is missing); prepare the "
                "data again."
            ) from None
        self.info = info_from(meta["info"])
        self._mean = torch.tensor(meta["mean"], device=device)
        self._std = torch.tensor(meta["std"], device=device)
        self._device = device
        self._reader = Reader(
            root=meta["root"],
            shelves=self._shelves,
            image_size=self.info.image_size,
            is_plain=config.augment == "crop_flip",
            flip=config.flip,
            leaves_encoded=config.decode == "cuda",
        )
        self._order = _Order()
        self._loader = _loader(
            self._reader,
            order=self._order,
            num_workers=_num_workers(config, device=device, num_sharing=num_sharing),
            pins=device.type == "cuda",
        )

    def num_images(self, split: SplitName) -> int:
        return len(self._shelves[split].labels)

    def train_batches(
        self,
        config: DataConfig,
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        num_passed: int,
        part: Part = WHOLE,
    ) -> Iterator[Batch]:
        """A part of each augmented batch of an epoch but the first `num_passed`."""
        count = self.num_images("train")
        draws = draw_epoch(
            count,
            crop_padding=config.crop_padding,
            flip=config.flip,
            generator=epoch_generator(seed, epoch=epoch),
        )
        slices = list(
            batch_slices(count, batch_size=batch_size, num_passed=num_passed, part=part)
        )
        draw = Draw(seed, epoch)
        wishes = (
            [Wish("train", index, draw) for index in draws.order[taken].tolist()]
            for taken in slices
        )
        for taken, found in zip(slices, self._read(wishes), strict=True):
            pixels, labels = self._on_device(found)
            if config.augment == "imagenet":
                light = found.light.to(self._device, non_blocking=True) / self._std
                images = self._normalised(pixels) + light[:, :, None, None]
            else:
                images = augment(
                    pixels,
                    positions=torch.arange(len(pixels), device=self._device),
                    shift=draws.shift[taken].to(self._device),
                    mirrored=draws.mirrored[taken].to(self._device),
                    mean=self._mean,
                    std=self._std,
                )
            yield Batch(images, labels)

    def eval_batches(
        self, split: SplitName, *, batch_size: int, part: Part = WHOLE
    ) -> Iterator[Batch]:
        """The images of a part of a split in their order, normalised."""
        places = part.of(self.num_images(split))
        wishes = (
            [Wish(split, place, None) for place in places[start : start + batch_size]]
            for start in range(0, len(places), batch_size)
        )
        for found in self._read(wishes):
            pixels, labels = self._on_device(found)
            yield Batch(self._normalised(pixels), labels)

    def _read(self, wishes: Iterable[list[Wish]]) -> Iterator[Gathered]:
        self._order.batches = wishes
        found: Gathered
        for found in self._loader:
            if found.errors:
                raise InputError(f"an image can no longer be read: {found.errors[0]}")
            yield found

    def _on_device(self, found: Gathered) -> tuple[Tensor, Tensor]:
        """Pixels (N, H, W, 3) and labels (N,)."""
        labels = found.labels.to(self._device, non_blocking=True)
        pixels = found.pixels.to(self._device, non_blocking=True)
        if not found.encoded:
            return pixels, labels
        every = pixels.new_empty((len(labels), *pixels.shape[1:]))
        every[list(found.decoded)] = pixels
        for place, image in zip(found.encoded, self._decoded(found), strict=True):
            every[place] = self._reader.seen(image, found.wishes[place])
        return every, labels

    def _decoded(self, found: Gathered) -> list[Tensor]:
        """The files of a batch decoded by the GPU, each (3, H, W)."""
        files = list(found.encoded.values())
        try:
            return decode_on_gpu(files, device=self._device)
        except RuntimeError:
            wishes = [found.wishes[place] for place in found.encoded]
            return [decode(self._reader.path(wish)).to(self._device) for wish in wishes]

    def _normalised(self, pixels: Tensor) -> Tensor:
        images = normalise(pixels, mean=self._mean, std=self._std)
        return images.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)


def _loader(
    reader: Reader, *, order: _Order, num_workers: int, pins: bool
) -> DataLoader[Any]:
    """Workers start at the first batch, stay, and end with this process."""
    source: Any = reader
    batches: Any = order
    return DataLoader(
        source,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=reader.gather,
        pin_memory=pins,
        persistent_workers=num_workers > 0,
        worker_init_fn=_begin_worker,
        multiprocessing_context=_worker_context() if num_workers else None,
        generator=torch.Generator(),  # Its draws say nothing and must not be torch's.
    )


def _worker_context() -> BaseContext:
    """Workers come from a process without threads: a fork of this one, which has some,
    can hang on a lock that none of its threads is left to give back."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resnext_ablate.compute.reading", "torchvision"])
    return context


def _begin_worker(number: int) -> None:
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    # The process that forks workers lives as long as one of them does, so that its end
    # tells them nothing of the run's.
    run = multiprocessing.parent_process()
    if run is not None:
        connection.wait([run.sentinel])
        os._exit(1)


def _num_workers(config: DataConfig, *, device: torch.device, num_sharing: int) -> int:
    if config.num_workers != "auto":
        return config.num_workers
    if device.type == "cpu":
        return 0  # Runs take all cores already.
    return max(1, min(_MAX_WORKERS, usable_cores() // num_sharing))
