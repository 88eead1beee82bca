"""The `[data]` part of a study file: which images, how they are read and augmented."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

DataName = Literal[
    "digits",
    "cifar10",
    "cifar100",
    "fashion_mnist",
    "svhn",
    "imagefolder",
    "imagenet",
]
Loading = Literal["memory", "stream"]


class DataConfig(BaseModel):
    """Which images, how they are split and how the training split is augmented."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: DataName
    root: str | None = None
    """Folder of an imagefolder or of imagenet, with train/CLASS/ and val/CLASS/ in it;
    for other sets where downloads go (None: a cache)."""
    image_size: int | None = Field(default=None, ge=1)
    """Pixels of a side after resizing; None keeps the images as they are, and is 224
    for imagenet."""
    val_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training images held out for validation, class by class."""
    train_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the other training images that is used, class by class: short runs."""
    split_seed: int = Field(default=0, ge=0)
    crop_padding: int = Field(default=4, ge=0)
    """Zeros around an image, after normalising, before a random crop; 0: no crop."""
    flip: bool = True
    """Mirror each image left to right with probability 1/2."""
    augment: Literal["crop_flip", "imagenet"] = "crop_flip"
    """imagenet: random areas and aspects, colour jitter and lighting for training, and
    the centre of a larger image for evaluation, as the paper's code; it streams."""
    loading: Literal["auto"] | Loading = "auto"
    """memory: decoded once, resident on the device. stream: read from the files again
    and again, for sets that are too large; auto: by size, where it is a folder."""
    num_workers: Literal["auto"] | Annotated[int, Field(ge=0, le=256)] = "auto"
    """Processes of each run that read a stream; 0: the run itself. auto: 0 on a CPU,
    where runs take all cores, else the cores shared by all runs. Changes no number."""
    decode: Literal["cpu", "cuda"] = "cpu"
    """Where a stream's JPEG files are decoded; on CUDA pixels differ a little."""

    @property
    def is_folder(self) -> bool:
        """Whether the images are files below `root`."""
        return self.name in ("imagefolder", "imagenet")

    @model_validator(mode="after")
    def _folder_has_root(self) -> Self:
        if self.is_folder and not self.root:
            raise ValueError(f'name = "{self.name}" needs root = "FOLDER"')
        return self

    @model_validator(mode="after")
    def _stream_is_sound(self) -> Self:
        if self.augment == "imagenet" and self.loading == "memory":
            raise ValueError('augment = "imagenet" needs loading = "stream" or "auto"')
        streams = self.loading == "stream" or self.augment == "imagenet"
        if streams and not self.is_folder:
            raise ValueError(
                f'{self.name} is small and stays in memory: loading = "stream" and '
                'augment = "imagenet" are for imagefolder and imagenet'
            )
        if self.decode == "cuda" and self.augment != "imagenet":
            raise ValueError('decode = "cuda" needs augment = "imagenet"')
        return self
