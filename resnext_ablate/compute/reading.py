"""One image of a stream, from its file to the pixels that a net sees.

What a worker process does, and a GPU where that decodes. All random draws of an image
are a function of seed, epoch and its place in the training split. torchvision and
Pillow are imported by whoever reads an image.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from resnext_ablate.compute.images import decode_image

_SEEN_SHARE = 224 / 256
"""Of an image's short side, what evaluation sees of it."""
_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_JITTER = 0.4
_LIGHTING_SD = 0.1
# Of the colours of ImageNet: (colour, principal component), and the spread along each.
_COMPONENTS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)
_SPREADS = (0.2175, 0.0188, 0.0045)
_JPEG = b"\xff\xd8"


class Draw(NamedTuple):
    """What all random draws of an image depend on, beside its place."""

    seed: int
    epoch: int


class Wish(NamedTuple):
    """An image that is wanted: of which split, its place there, how augmented."""

    split: str
    place: int
    draw: Draw | None
    """None: not at random, as evaluation sees it."""


@dataclass(frozen=True)
class Shelf:
    """The files of a split, listed in a folder of the cache.

    Each process maps the lists for itself: they can be long, and are not sent to it.
    """

    folder: Path
    split: str

    @property
    def names(self) -> npt.NDArray[np.bytes_]:
        """(N,): paths below the root."""
        return _mapped(self.folder / f"{self.split}_images.npy")

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """(N,)."""
        return _mapped(self.folder / f"{self.split}_labels.npy")


@dataclass(frozen=True)
class Gathered:
    """A batch as it comes from a worker.

    labels: int64 (N,); light: float32 (N, 3), to be added to pixel / 255; pixels: uint8
    (K, H, W, 3), of the images at `decoded`; the others are still JPEG files, uint8
    (bytes,) each.
    """

    wishes: tuple[Wish, ...]
    labels: Tensor
    light: Tensor
    pixels: Tensor
    decoded: tuple[int, ...]
    encoded: dict[int, Tensor]
    errors: tuple[str, ...]
    """Of files that can no longer be read."""

    def pin_memory(self) -> Gathered:
        """The same where a GPU can fetch it without waiting; the loader calls this."""
        return Gathered(
            self.wishes,
            self.labels.pin_memory(),
            self.light.pin_memory(),
            self.pixels.pin_memory(),
            self.decoded,
            self.encoded,
            self.errors,
        )


@dataclass(frozen=True)
class Reader:
    """Reads wished images, as `torch.utils.data` has it: by index, and gathered."""

    root: str
    shelves: Mapping[str, Shelf]
    image_size: int
    is_plain: bool
    """Only the centred square, resized; whoever asks crops and mirrors batches."""
    flip: bool
    leaves_encoded: bool
    """Whether JPEG files are left to a GPU to decode."""

    def __getitem__(self, wish: Wish) -> tuple[Wish, Tensor | str]:
        """Pixels (H, W, 3), a file (bytes,), or why there are none."""
        path = self.path(wish)
        try:
            if self.is_plain:
                pixels = decode_image(path, image_size=self.image_size)
                return wish, torch.from_numpy(pixels.copy())
            if self.leaves_encoded and (encoded := _jpeg_file(path)) is not None:
                return wish, encoded
            return wish, self.seen(decode(path), wish)
        except MemoryError:
            raise
        except Exception as error:  # Decoders raise anything on damaged files.
            return wish, f"{path}: {error or type(error).__name__}"

    def path(self, wish: Wish) -> str:
        name = self.shelves[wish.split].names[wish.place]
        return f"{self.root}/{os.fsdecode(bytes(name))}"

    def gather(self, found: Sequence[tuple[Wish, Tensor | str]]) -> Gathered:
        """Images of a batch, one after the other."""
        wishes = tuple(wish for wish, _ in found)
        labels = [self.shelves[w.split].labels[w.place] for w in wishes]
        tensors = {
            i: one for i, (_, one) in enumerate(found) if not isinstance(one, str)
        }
        decoded = tuple(i for i, one in tensors.items() if one.ndim == 3)
        pixels = [tensors.pop(i) for i in decoded]
        size = (0, self.image_size, self.image_size, 3)
        return Gathered(
            wishes=wishes,
            labels=torch.tensor(np.array(labels, dtype=np.int64)),
            light=torch.stack([self._light(wish) for wish in wishes]),
            pixels=torch.stack(pixels)
            if pixels
            else torch.empty(size, dtype=torch.uint8),
            decoded=decoded,
            encoded=tensors,
            errors=tuple(one for _, one in found if isinstance(one, str)),
        )

    def seen(self, image: Tensor, wish: Wish) -> Tensor:
        """What of a decoded image (3, H, W) is seen: uint8 (size, size, 3)."""
        from torchvision.transforms.v2 import functional

        if wish.draw is None:
            side = round(self.image_size / _SEEN_SHARE)
            image = functional.resize(image, [side], _bicubic(), antialias=True)
            image = functional.center_crop(image, [self.image_size])
        else:
            with _drawing(_draws_seed(wish, 0)):
                image = _augmentation(self.image_size, flip=self.flip)(image)
        return image.permute(1, 2, 0).contiguous()

    def _light(self, wish: Wish) -> Tensor:
        """Lighting by random shares of the principal components of colour."""
        if self.is_plain or wish.draw is None:
            return torch.zeros(3)
        generator = torch.Generator().manual_seed(_draws_seed(wish, 1))
        shares = _LIGHTING_SD * torch.randn(3, generator=generator)
        return torch.tensor(_COMPONENTS) @ (shares * torch.tensor(_SPREADS))


@cache
def _mapped(path: Path) -> npt.NDArray[Any]:
    mapped: npt.NDArray[Any] = np.load(path, mmap_mode="r")
    return mapped


def decode(path: str) -> Tensor:
    """An image file as uint8 (3, H, W)."""
    return torch.from_numpy(decode_image(path).copy()).permute(2, 0, 1)


def decode_on_gpu(files: Sequence[Tensor], *, device: torch.device) -> list[Tensor]:
    """JPEG files, uint8 (bytes,), as uint8 (3, H, W) on a GPU.

    Raises:
        RuntimeError: one of them is of a kind that only a CPU decodes.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():
        # It is to go to TorchCodec one day.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", "The image decoding", UserWarning)
        images: list[Tensor] = decode_jpeg(
            list(files), mode=ImageReadMode.RGB, device=device
        )
    return images


def _jpeg_file(path: str) -> Tensor | None:
    content = Path(path).read_bytes()
    if content[:2] != _JPEG:
        return None
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _draws_seed(wish: Wish, purpose: int) -> int:
    assert wish.draw is not None
    parts = (wish.draw.seed, wish.draw.epoch, wish.place, purpose)
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """torchvision draws from torch's own generator; it is as before at the end."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


@cache
def _augmentation(size: int, *, flip: bool) -> Any:
    """That of the paper's code, but that it draws aspects evenly rather than their
    logarithms, and shrinks without antialiasing."""
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(
                size, _AREA, _ASPECT, interpolation=_bicubic(), antialias=True
            ),
            v2.RandomHorizontalFlip(0.5 if flip else 0.0),
            v2.ColorJitter(brightness=_JITTER, contrast=_JITTER, saturation=_JITTER),
        ]
    )


def _bicubic() -> Any:
    from torchvision.transforms import InterpolationMode

    return InterpolationMode.BICUBIC
