"""Data sets: found, decoded, split, cached, put on a device and augmented."""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.compute import data, folders, images, preparation, sources
from resnext_ablate.records.config import DataConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(sources.CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train/ with 10 cats and 20 dogs, test/ with 3 of each: 6 x 6 pixels."""
    folder = tmp_path / "pets"
    for split, name, count in (
        ("train", "cat", 10),
        ("train", "dog", 20),
        ("test", "cat", 3),
        ("test", "dog", 3),
    ):
        (folder / split / name).mkdir(parents=True)
        for index in range(count):
            path = folder / split / name / f"{index:02}.png"
            _write_image(path, value=8 * index + (name == "dog"))
    return folder


def _write_image(
    path: Path, *, value: int = 100, size: tuple[int, int] = (6, 6)
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 50, 200)).save(path)


def _folder_config(root: Path, **fields: Any) -> DataConfig:
    return DataConfig(name="imagefolder", root=str(root), **fields)


def _prepare_error(config: DataConfig) -> str:
    with pytest.raises(InputError) as caught:
        preparation.prepare(config)
    return str(caught.value)


# Digits.


def test_digits_are_the_1797_images_of_scikit_learn() -> None:
    """Digits hold every image once, in whole steps of 255 / 16, with 20 % for test."""
    prepared = preparation.prepare(DataConfig(name="digits"))
    info = prepared.info
    assert (info.num_train, info.num_val, info.num_test) == (1293, 145, 359)
    assert (info.num_classes, info.in_channels, info.image_size) == (10, 1, 8)
    loaded = data.load(prepared.folder, device=CPU)
    assert loaded.info == info
    splits = (loaded.train, loaded.val, loaded.test)
    every = torch.cat([split.images for split in splits])
    assert every.shape == (1797, 8, 8, 1) and every.dtype == torch.uint8
    levels = [round(value * 255 / 16) for value in range(17)]
    assert every.unique().tolist() == levels
    assert sum(len(split.labels.unique()) for split in splits) == 30
    from sklearn.datasets import load_digits

    assert every.double().sum().item() == pytest.approx(
        load_digits().images.sum() * 255 / 16, rel=1e-3
    )


def test_mean_and_std_are_of_the_training_split() -> None:
    """Mean and standard deviation are those of the training pixels / 255."""
    loaded = data.load(
        preparation.prepare(DataConfig(name="digits")).folder, device=CPU
    )
    pixels = loaded.train.images.double() / 255
    assert loaded.mean.tolist() == pytest.approx([pixels.mean().item()], rel=1e-6)
    std = pixels.std(correction=0).item()
    assert loaded.std.tolist() == pytest.approx([std], rel=1e-6)


def test_a_constant_channel_keeps_a_finite_scale(root: Path) -> None:
    """Channels whose pixels are all equal normalise to 0, not to infinity."""
    loaded = data.load(preparation.prepare(_folder_config(root)).folder, device=CPU)
    normalised = data.normalise(loaded.train.images, mean=loaded.mean, std=loaded.std)
    assert normalised.isfinite().all()
    assert normalised[..., 1].abs().max() < 1e-4


def test_digits_resize() -> None:
    """image_size resizes sets that are arrays, and keeps their one channel."""
    info = preparation.prepare(DataConfig(name="digits", image_size=16)).info
    assert (info.image_size, info.in_channels) == (16, 1)


# Splits.


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31 - 1),
)
def test_splits_are_stratified(counts: list[int], fraction: float, seed: int) -> None:
    """Each class gives its rounded share, keeps an image, and no image is lost."""
    labels = np.repeat(np.arange(len(counts)), counts)
    rest, held = sources.stratified_split(labels, fraction=fraction, seed=seed)
    assert sorted([*rest, *held]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        given_up = int((labels[held] == label).sum())
        assert given_up <= count - 1
        wanted = min(max(count * fraction, 1), count - 1)
        assert abs(given_up - wanted) <= 0.5


def test_the_split_seed_decides_the_validation_split(root: Path) -> None:
    """Equal split seeds hold out the same images, others hold out other ones."""

    def held(seed: int) -> list[int]:
        prepared = preparation.prepare(
            _folder_config(root, val_fraction=0.3, split_seed=seed)
        )
        val = data.load(prepared.folder, device=CPU).val
        assert val.labels.bincount().tolist() == [3, 6]
        return sorted(val.images[:, 0, 0, 0].tolist())

    assert held(1) == held(1)
    assert held(1) != held(2)


def test_a_share_of_the_training_images_is_a_sample_by_class(root: Path) -> None:
    """It leaves validation and test alone, keeps shares of classes and its seed."""

    def splits(**settings: Any) -> data.Dataset:
        prepared = preparation.prepare(_folder_config(root, **settings))
        return data.load(prepared.folder, device=CPU)

    def identities(split: data.Split) -> set[int]:
        return set(split.images[:, 0, 0, 0].tolist())

    whole, third = splits(), splits(train_fraction=1 / 3)
    assert whole.train.labels.bincount().tolist() == [9, 18]
    assert third.train.labels.bincount().tolist() == [3, 6]
    assert third.info.num_train == 9
    assert identities(third.train) < identities(whole.train)
    assert torch.equal(third.val.images, whole.val.images)
    assert torch.equal(third.test.images, whole.test.images)
    other = splits(train_fraction=1 / 3, split_seed=1)
    assert identities(other.train) != identities(third.train)


def test_a_validation_split_needs_images(tmp_path: Path) -> None:
    """Classes of one image each leave nothing to validate on, which is said."""
    for path in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png"):
        _write_image(tmp_path / "one" / path)
    message = _prepare_error(_folder_config(tmp_path / "one"))
    assert message.startswith("the validation split is empty")


# Folders of images.


def test_a_folder_gives_its_images_in_rgb_with_sorted_classes(root: Path) -> None:
    """Pixels, labels and class names are those of the files; progress is told."""
    told: list[tuple[int, int]] = []
    prepared = preparation.prepare(
        _folder_config(root), on_progress=lambda done, total: told.append((done, total))
    )
    info = prepared.info
    assert told == [(36, 36)]
    assert info.class_names == ("cat", "dog")
    assert (info.num_train, info.num_val, info.num_test) == (27, 3, 6)
    test = data.load(prepared.folder, device=CPU).test
    assert test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.images[:, 3, 3].tolist() == [
        [value, 50, 200] for value in (0, 8, 16, 1, 9, 17)
    ]


def test_val_beside_test_is_the_validation_split(root: Path) -> None:
    """With all three folders nothing is carved from train/."""
    for name in ("cat", "dog"):
        _write_image(root / "val" / name / "a.png", value=77)
    prepared = preparation.prepare(_folder_config(root))
    info = prepared.info
    assert (info.num_train, info.num_val, info.num_test) == (30, 2, 6)
    assert (data.load(prepared.folder, device=CPU).val.images[..., 0] == 77).all()


def test_val_without_test_is_the_final_test(root: Path) -> None:
    """With train/ and val/ alone, val/ is scored last and train/ gives validation."""
    (root / "test").rename(root / "val")
    info = preparation.prepare(_folder_config(root)).info
    assert (info.num_train, info.num_val, info.num_test) == (27, 3, 6)


def test_images_lie_at_any_depth_and_other_files_are_ignored(root: Path) -> None:
    """Images in folders of a class count; hidden files and other suffixes do not."""
    _write_image(root / "train/cat/more/deep.PNG")
    _write_image(root / "train/cat/.hidden.png")
    (root / "train/cat/notes.txt").write_text("no image")
    (root / "train/.cache").mkdir()
    info = preparation.prepare(_folder_config(root)).info
    assert info.num_train + info.num_val == 31


def test_relative_roots_work(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root may be relative, even the working folder itself."""
    (root / "train/cat/00.png").write_bytes(b"no image")
    monkeypatch.chdir(root)
    info = preparation.prepare(_folder_config(Path())).info
    assert info.corrupt_files == ("train/cat/00.png",)


def test_grey_16_bit_and_palette_images_become_rgb(root: Path) -> None:
    """16-bit images keep their high byte, grey ones get three equal channels."""
    deep = np.full((6, 6), 40_000, dtype=np.uint16)
    Image.fromarray(deep).save(root / "test/cat/00.png")
    Image.new("L", (6, 6), 9).save(root / "test/cat/01.png")
    palette = Image.new("P", (6, 6), 1)
    palette.putpalette([0, 0, 0, 1, 2, 3])
    palette.save(root / "test/cat/02.png")
    prepared = preparation.prepare(_folder_config(root))
    test = data.load(prepared.folder, device=CPU).test
    assert test.images[:3, 0, 0].tolist() == [[156] * 3, [9] * 3, [1, 2, 3]]


def test_resizing_takes_the_centred_square(tmp_path: Path) -> None:
    """image_size crops to the centred square and averages over what it shrinks."""
    pixels = np.zeros((4, 12, 3), dtype=np.uint8)
    pixels[:, 4:6], pixels[:, 6:8] = 100, 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    square = images.decode_image(str(tmp_path / "wide.png"), image_size=2)
    assert square.shape == (2, 2, 3)
    # Bilinear with antialiasing: weights 3/8, 3/8 of the near, 1/8 of the far half.
    assert square[0, :, 0].tolist() == pytest.approx([114, 186], abs=2)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda root: root.rename(root.with_name("gone")), "no such folder; write "),
        (
            lambda root: (root / "train").rename(root / "training"),
            r"has no folder train/ \(its folders: test, training\)",
        ),
        (
            lambda root: (root / "test").rename(root / "other"),
            "has train/ but neither test/ nor val/",
        ),
        (
            lambda root: (root / "train/dog").rename(root / "dog"),
            "at least two classes, found cat",
        ),
        (
            lambda root: (root / "train/dog").rename(root / "train/fox"),
            "train/ and test/ differ; only in train/: fox; only in test/: dog",
        ),
        (
            lambda root: [path.unlink() for path in (root / "test/cat").iterdir()],
            "test/cat: holds no images .*jpg.*fill the class folder",
        ),
        (
            lambda root: _write_image(root / "train/cat/zz.png", size=(9, 4)),
            r"train/cat/00.png has 6x6 pixels, train/cat/zz.png has 9x4; set "
            r"data.image_size, for instance 4\.",
        ),
        (
            lambda root: [
                path.write_bytes(b"") for path in (root / "train/dog").iterdir()
            ],
            "train/dog: no image of this class can be read; first: train/dog/00.png: "
            "cannot identify",
        ),
    ],
)
def test_a_bad_folder_is_named(
    root: Path, damage: Callable[[Path], object], expected: str
) -> None:
    """Each fault of a folder gives one message with place and remedy."""
    damage(root)
    with pytest.raises(InputError, match=expected):
        preparation.prepare(_folder_config(root))


def test_oblong_images_need_a_size(tmp_path: Path) -> None:
    """Images that are equal but not square are refused with the size to set."""
    for path in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png"):
        _write_image(tmp_path / "wide" / path, size=(8, 5))
    message = _prepare_error(_folder_config(tmp_path / "wide"))
    assert message.startswith("train/a/1.png has 8x5 pixels")
    assert message.endswith("set data.image_size, for instance 5.")


def test_corrupt_images_are_left_out_and_named(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A truncated JPEG and a text named .png are recorded, logged and not fatal."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "train/dog/x.jpg")
    whole = (root / "train/dog/x.jpg").read_bytes()
    (root / "train/dog/x.jpg").write_bytes(whole[: len(whole) - 40])
    (root / "test/cat/00.png").write_text("no image")
    info = preparation.prepare(_folder_config(root)).info
    assert set(info.corrupt_files) == {"train/dog/x.jpg", "test/cat/00.png"}
    assert info.num_test == 5 and info.num_train + info.num_val == 30
    assert "2 corrupt image(s) left out" in caplog.text
    assert "train/dog/x.jpg: " in caplog.text
    # Named again where the images come from the cache.
    assert preparation.prepare(_folder_config(root)).info == info


def test_an_unknown_data_set_lists_the_known() -> None:
    """A name that is not in the table is refused with the table's names."""
    config = DataConfig(name="digits").model_copy(update={"name": "mnist"})
    message = _prepare_error(config)
    assert "'mnist': no such data set; use digits, cifar10, cifar100" in message


# Data sets that torchvision downloads, as its downloads leave them.


def _write_pickle(path: Path, value: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))
    return hashlib.md5(path.read_bytes()).hexdigest()


def _cifar_batch(count: int, *, key: str) -> dict[str, Any]:
    pixels = np.arange(count * 3 * 32 * 32).reshape(count, -1) % 251
    return {"data": pixels.astype(np.uint8), key: [i % 10 for i in range(count)]}


def _lay_out_cifar(
    name: str, *, root: Path, monkeypatch: pytest.MonkeyPatch
) -> np.ndarray:
    """Files as CIFAR's archive has them; returns the first test image (H, W, C)."""
    import torchvision.datasets

    dataset = getattr(torchvision.datasets, name)
    folder = root / dataset.base_folder
    key = "labels" if name == "CIFAR10" else "fine_labels"
    for attribute, count in (("train_list", 20), ("test_list", 10)):
        files = [
            [file, _write_pickle(folder / file, _cifar_batch(count, key=key))]
            for file, _ in getattr(dataset, attribute)
        ]
        monkeypatch.setattr(dataset, attribute, files)
    names = {dataset.meta["key"]: [f"class {i}" for i in range(10)]}
    digest = _write_pickle(folder / dataset.meta["filename"], names)
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": digest})
    return _cifar_batch(1, key=key)["data"].reshape(3, 32, 32).transpose(1, 2, 0)


@pytest.mark.parametrize(
    ("name", "class_name", "num_train"),
    [("cifar10", "CIFAR10", 100), ("cifar100", "CIFAR100", 20)],
)
def test_cifar_reads_downloaded_files(
    name: Any,
    class_name: str,
    num_train: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CIFAR's batches become images of height, width, channel, with class names."""
    first = _lay_out_cifar(class_name, root=tmp_path, monkeypatch=monkeypatch)
    prepared = preparation.prepare(DataConfig(name=name, root=str(tmp_path)))
    info = prepared.info
    assert (info.num_train + info.num_val, info.num_test) == (num_train, 10)
    assert (info.in_channels, info.image_size) == (3, 32)
    assert info.class_names[3] == "class 3"
    test = data.load(prepared.folder, device=CPU).test
    assert (test.images[0].numpy() == first).all()
    assert test.labels.tolist() == list(range(10))


def test_fashion_mnist_reads_downloaded_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fashion-MNIST's compressed files become images of one channel."""
    from torchvision.datasets import FashionMNIST

    folder = tmp_path / "FashionMNIST/raw"
    folder.mkdir(parents=True)
    resources = []
    for file, _ in FashionMNIST.resources:
        count = 20 if file.startswith("train") else 10
        if "images" in file:
            pixels = np.arange(count * 28 * 28, dtype=np.int64) % 253
            content = struct.pack(">4i", 2051, count, 28, 28)
            content += pixels.astype(np.uint8).tobytes()
        else:
            content = struct.pack(">2i", 2049, count)
            content += bytes(index % 10 for index in range(count))
        (folder / file).write_bytes(gzip.compress(content))
        digest = hashlib.md5((folder / file).read_bytes()).hexdigest()
        resources.append((file, digest))
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    prepared = preparation.prepare(DataConfig(name="fashion_mnist", root=str(tmp_path)))
    info = prepared.info
    assert (info.num_train, info.num_val, info.num_test) == (10, 10, 10)
    assert (info.in_channels, info.image_size) == (1, 28)
    assert info.class_names[9] == "Ankle boot"
    test = data.load(prepared.folder, device=CPU).test
    assert test.images[0].flatten().tolist() == [i % 253 for i in range(784)]
    assert test.labels.tolist() == list(range(10))


def test_svhn_reads_downloaded_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SVHN's matrices become images of height, width, channel; label 10 is digit 0."""
    import scipy.io
    from torchvision.datasets import SVHN

    files = {}
    for split, count in (("train", 20), ("test", 10)):
        file = f"{split}_32x32.mat"
        pixels = np.arange(32 * 32 * 3 * count).reshape(32, 32, 3, count) % 251
        labels = np.arange(count).reshape(-1, 1) % 10 + 1
        content = {"X": pixels.astype(np.uint8), "y": labels.astype(np.uint8)}
        scipy.io.savemat(tmp_path / file, content)
        digest = hashlib.md5((tmp_path / file).read_bytes()).hexdigest()
        files[split] = ["http://nowhere.invalid", file, digest]
    monkeypatch.setattr(SVHN, "split_list", files)
    prepared = preparation.prepare(DataConfig(name="svhn", root=str(tmp_path)))
    assert prepared.info.num_classes == 10
    test = data.load(prepared.folder, device=CPU).test
    assert test.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert (test.images[4].numpy() == pixels[..., 4]).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar10", "cifar-10-python.tar.gz from https"),
        ("svhn", "train_32x32.mat, test_32x32.mat from http"),
        ("fashion_mnist", "train-images-idx3-ubyte.gz, .*FashionMNIST/raw and run"),
    ],
)
def test_offline_names_the_files_to_put(
    name: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network the message names files, folder and the way by imagefolder."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(InputError, match=expected) as caught:
        preparation.prepare(DataConfig(name=name))
    assert "no route to host" in str(caught.value)
    assert 'data.name = "imagefolder"' in str(caught.value)


# The cache.


def _count_decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    decodes: list[int] = []
    decode = folders._decode_files

    def counted(*args: Any, **kwargs: Any) -> Any:
        decodes.append(1)
        return decode(*args, **kwargs)

    monkeypatch.setattr(folders, "_decode_files", counted)
    return decodes


def test_a_data_set_is_decoded_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache serves the same images; augmentation does not ask for new ones."""
    decodes = _count_decodes(monkeypatch)
    first = preparation.prepare(_folder_config(root))
    other = preparation.prepare(_folder_config(root, crop_padding=0, flip=False))
    assert (other.info, other.folder) == (first.info, first.folder)
    assert len(decodes) == 1


def test_changed_files_and_settings_decode_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file touched, a file more and another image size each make a new set."""
    decodes = _count_decodes(monkeypatch)
    prepared = [preparation.prepare(_folder_config(root))]
    os.utime(root / "train/cat/00.png", ns=(1, 1))
    prepared.append(preparation.prepare(_folder_config(root)))
    _write_image(root / "train/cat/new.png")
    prepared.append(preparation.prepare(_folder_config(root)))
    prepared.append(preparation.prepare(_folder_config(root, image_size=3)))
    assert len(decodes) == 4
    assert len({one.folder for one in prepared}) == 4
    checksums = [one.info.checksum for one in prepared]
    # Touching a file changes no pixel; the rest does.
    assert checksums[0] == checksums[1] and len(set(checksums)) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "val_images.npy").unlink(),
        lambda folder: (folder / "meta.json").write_text("{"),
        lambda folder: (folder / "meta.json").write_text(
            json.dumps({"arrays": {}, "info": {"name": "digits"}})
        ),
        lambda folder: _flip_last_byte(folder / "train_images.npy"),
        lambda folder: (folder / "test_labels.npy").write_bytes(b""),
    ],
)
def test_a_damaged_cache_is_rebuilt(
    root: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    """Lost, torn or changed files of the cache are noticed and decoded again."""
    first = preparation.prepare(_folder_config(root))
    damage(first.folder)
    assert preparation.prepare(_folder_config(root)) == first
    assert "is damaged" in caplog.text
    caplog.clear()
    assert preparation.prepare(_folder_config(root)) == first
    assert not caplog.text


def _flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_leftovers_of_a_killed_build_do_no_harm(root: Path) -> None:
    """What a killed process left half built is removed by the next one."""
    first = preparation.prepare(_folder_config(root))
    building = first.folder.with_name(f".{first.folder.name}.building")
    first.folder.rename(building)
    (building / "meta.json").unlink()
    assert preparation.prepare(_folder_config(root)) == first
    assert not building.exists()


def _prepare_elsewhere(root: Path, start: Any, results: Any) -> None:
    start.wait()
    told: list[int] = []
    info = preparation.prepare(
        _folder_config(root), on_progress=lambda done, total: told.append(done)
    ).info
    results.put((info.checksum, len(told)))


def test_concurrent_builders_build_once(root: Path) -> None:
    """Of processes that prepare the same set at once, one decodes and the rest wait."""
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    builders = [
        context.Process(target=_prepare_elsewhere, args=(root, start, results))
        for _ in range(4)
    ]
    for builder in builders:
        builder.start()
    start.set()
    answers = [results.get(timeout=60) for _ in builders]
    for builder in builders:
        builder.join()
    assert len({checksum for checksum, _ in answers}) == 1
    assert sorted(told for _, told in answers) == [0, 0, 0, 1]


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says where, why and which variable places the cache."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(sources.CACHE_VARIABLE, str(tmp_path / "file"))
    message = _prepare_error(DataConfig(name="digits"))
    assert str(tmp_path / "file") in message and "Not a directory" in message
    assert sources.CACHE_VARIABLE in message


def test_loading_what_was_never_prepared_is_an_input_error(tmp_path: Path) -> None:
    """A folder without decoded images is named."""
    with pytest.raises(InputError, match="holds no decoded data set"):
        data.load(tmp_path, device=CPU)


def test_loading_needs_no_image_libraries() -> None:
    """Executors import the data room without torchvision, scikit-learn or Pillow."""
    code = (
        "import sys, resnext_ablate.compute.data; "
        "print({'torchvision', 'sklearn', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


# Batches and augmentation.


def _slow_augment(
    image: torch.Tensor,
    *,
    padding: int,
    shift: list[int],
    mirrored: bool,
    mean: torch.Tensor,
    std: torch.Tensor,
) -> torch.Tensor:
    """One image (H, W, C) the long way: normalise, pad, crop, mirror."""
    height, width, _ = image.shape
    normal = (image.permute(2, 0, 1).double() / 255 - mean[:, None, None]) / std[
        :, None, None
    ]
    padded = F.pad(normal, (padding,) * 4)
    top, left = padding + shift[0], padding + shift[1]
    crop = padded[:, top : top + height, left : left + width]
    return crop.flip(2) if mirrored else crop


@pytest.mark.parametrize("how", ["_augment_by_loops", "_augment_at_once"])
@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    padding=st.integers(0, 5),
    flip=st.booleans(),
)
def test_augmentation_equals_padding_cropping_and_flipping_each_image(
    how: str,
    seed: int,
    channels: int,
    height: int,
    width: int,
    padding: int,
    flip: bool,
) -> None:
    """A batch equals its images normalised, padded, cropped and mirrored one by one,
    by what a CPU does and by what a GPU does."""
    generator = torch.Generator().manual_seed(seed)
    size = (7, height, width, channels)
    stored = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    mean = torch.linspace(0.4, 0.6, channels)
    std = torch.linspace(0.2, 0.3, channels)
    draws = data.draw_epoch(7, crop_padding=padding, flip=flip, generator=generator)
    batch = getattr(data, how)(stored, draws, mean, std)
    assert batch.dtype == torch.float32 and batch.shape == (7, channels, height, width)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for index, position in enumerate(draws.order.tolist()):
        expected = _slow_augment(
            stored[position],
            padding=padding,
            shift=draws.shift[index].tolist(),
            mirrored=bool(draws.mirrored[index]),
            mean=mean.double(),
            std=std.double(),
        )
        torch.testing.assert_close(batch[index].double(), expected, atol=2e-6, rtol=0)
        assert ((expected != 0) | (batch[index] == 0)).all()


def test_a_cpu_augments_as_a_gpu_does() -> None:
    """To the bit, from a part of an order and images that are not contiguous."""
    generator = torch.Generator().manual_seed(0)
    size = (40, 3, 12, 10)
    stored = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    stored = stored.permute(0, 2, 3, 1)
    draws = data.draw_epoch(40, crop_padding=3, flip=True, generator=generator)
    taken = data.EpochDraws(draws.order[7:23], draws.shift[7:23], draws.mirrored[7:23])
    moments = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
    whole = data._augment_at_once(stored, taken, *moments)
    looped = data._augment_by_loops(stored, taken, *moments)
    assert torch.equal(whole, looped) and whole.stride() == looped.stride()


def test_draws_cover_all_shifts_and_both_mirrorings() -> None:
    """Shifts reach from -padding to padding evenly; half of the images are mirrored."""
    draws = data.draw_epoch(
        18_000, crop_padding=4, flip=True, generator=data.epoch_generator(0, epoch=1)
    )
    assert draws.order.sort().values.equal(torch.arange(18_000))
    for axis in range(2):
        counts = (draws.shift[:, axis] + 4).bincount()
        assert len(counts) == 9 and (counts - 2000).abs().max() < 250
    assert not draws.shift[:, 0].equal(draws.shift[:, 1])
    assert 8500 < draws.mirrored.sum() < 9500


def test_draws_depend_on_seed_and_epoch_alone() -> None:
    """Equal seeds and epochs draw equally, whatever else has been drawn before."""

    def draw(seed: int, epoch: int) -> torch.Tensor:
        generator = data.epoch_generator(seed, epoch=epoch)
        draws = data.draw_epoch(50, crop_padding=2, flip=True, generator=generator)
        parts = (draws.order, draws.shift.flatten(), draws.mirrored)
        return torch.cat([part.long() for part in parts])

    first = draw(3, 1)
    torch.rand(5)
    assert draw(3, 1).equal(first)
    others = [draw(3, 2), draw(4, 1), draw(1, 3)]
    assert all(not other.equal(first) for other in others)


def test_padding_and_flips_do_not_change_the_order() -> None:
    """Without crops and flips an epoch has the same order, and nothing moves."""
    plain, moved = (
        data.draw_epoch(
            50, crop_padding=p, flip=p > 0, generator=data.epoch_generator(0, epoch=1)
        )
        for p in (0, 4)
    )
    assert plain.order.equal(moved.order)
    assert not plain.shift.any() and not plain.mirrored.any()


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(10, [10, 10]), (27, [27]), (20, [20]), (100, [27])]
)
def test_the_last_partial_batch_is_dropped_unless_alone(
    root: Path, batch_size: int, sizes: list[int]
) -> None:
    """An epoch has whole batches in drawn order; a set below a batch goes whole."""
    loaded = data.load(preparation.prepare(_folder_config(root)).folder, device=CPU)
    draws = data.draw_epoch(
        27, crop_padding=1, flip=True, generator=data.epoch_generator(0, epoch=1)
    )
    batches = list(data.train_batches(loaded, draws=draws, batch_size=batch_size))
    assert [len(batch.labels) for batch in batches] == sizes
    assert data.num_batches(27, batch_size=batch_size) == len(sizes)
    labels = torch.cat([batch.labels for batch in batches])
    assert labels.equal(loaded.train.labels[draws.order[: len(labels)]])
    pixels = torch.cat([batch.images for batch in batches])[:, 0, 3, 3]
    normal = data.normalise(loaded.train.images, mean=loaded.mean, std=loaded.std)
    assert pixels.equal(normal[draws.order[: len(labels)], 3, 3, 0])


@pytest.mark.parametrize("part", [data.WHOLE, data.Part(1, 3)])
def test_batches_augmented_at_once_are_those_one_by_one(
    root: Path, part: data.Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU does it: the same images and labels, also from within an epoch, where
    batches do not come out even, and none where all are done."""
    loaded = data.load(preparation.prepare(_folder_config(root)).folder, device=CPU)
    draws = data.draw_epoch(
        27, crop_padding=1, flip=True, generator=data.epoch_generator(0, epoch=1)
    )

    def batches(num_at_once: int, num_passed: int) -> list[data.Batch]:
        monkeypatch.setattr(data, "_batches_at_once", lambda *_: num_at_once)
        rest = {"batch_size": 5, "num_passed": num_passed, "part": part}
        return list(data.train_batches(loaded, draws=draws, **rest))

    for num_passed in (0, 1):
        found, expected = (batches(count, num_passed) for count in (2, 1))
        assert len(found) == len(expected) == 5 - num_passed
        for one, other in zip(found, expected, strict=True):
            assert len(one.labels) == len(part.of(5))
            assert one.images.equal(other.images) and one.labels.equal(other.labels)
            assert one.images.is_contiguous(memory_format=torch.channels_last)
    assert batches(2, 5) == []


@pytest.mark.parametrize(
    ("side", "size", "expected"),
    [(32, 128, 8), (64, 256, 8), (112, 256, 3), (512, 64, 1)],
)
def test_a_gpu_augments_as_many_batches_as_are_small(
    side: int, size: int, expected: int
) -> None:
    """Eight at most, fewer where they would take much memory; a CPU one by one."""
    images = torch.empty(1000, side, side, 3, dtype=torch.uint8, device="meta")
    assert data._batches_at_once(images, size) == expected
    assert data._batches_at_once(torch.empty(2, 8, 8, 3), size) == 1


def test_evaluation_sees_every_image_once_unchanged(root: Path) -> None:
    """Evaluation batches cover a split in order, the last one smaller."""
    loaded = data.load(preparation.prepare(_folder_config(root)).folder, device=CPU)
    batches = list(
        data.eval_batches(loaded.test, mean=loaded.mean, std=loaded.std, batch_size=4)
    )
    assert [len(batch.labels) for batch in batches] == [4, 2]
    seen = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1)
    expected = (loaded.test.images.float() / 255 - loaded.mean) / loaded.std
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=0)
