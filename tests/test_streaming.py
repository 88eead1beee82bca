"""Large images read from their files: the same batches, whoever reads them and when."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photographs import write_folder, write_photograph
from PIL import Image

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.compute import data, preparation, sources
from resnext_ablate.compute.preparation import Prepared
from resnext_ablate.compute.reading import Draw, Reader, Shelf, Wish
from resnext_ablate.compute.streaming import Stream
from resnext_ablate.records.config import DataConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sources.CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, 24 images to train with and 6 to test, of several sizes."""
    return write_folder(tmp_path / "photos", num_train=24, num_test=6)


def _config(root: Path, **fields: Any) -> DataConfig:
    values = {"name": "imagefolder", "image_size": 32, "num_workers": 0} | fields
    return DataConfig(root=str(root), **values)


def _opened(prepared: Prepared, config: DataConfig) -> Stream:
    return Stream(prepared.folder, config=config, device=CPU, num_sharing=1)


def _stream(config: DataConfig) -> Stream:
    return _opened(preparation.prepare(config), config)


def _epoch(
    feed: data.Feed, config: DataConfig, *, num_passed: int = 0, **which: int
) -> list[data.Batch]:
    """Batches of 4 of an epoch, by default the first of seed 0."""
    which = {"seed": 0, "epoch": 1} | which
    return list(
        feed.train_batches(config, batch_size=4, num_passed=num_passed, **which)
    )


def _assert_equal(found: list[data.Batch], expected: list[data.Batch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)


# The same as in memory.


def test_a_stream_gives_the_batches_of_memory_to_the_bit(root: Path) -> None:
    """crop_flip: what is kept in memory by choice or for its size is no other study."""
    here = _config(root, loading="memory", val_fraction=0.2, crop_padding=3)
    there = here.model_copy(update={"loading": "stream"})
    resident = data.load(preparation.prepare(here).folder, device=CPU)
    stream = _stream(there)
    for epoch in (1, 2):
        _assert_equal(
            _epoch(stream, there, epoch=epoch, seed=3),
            _epoch(resident, here, epoch=epoch, seed=3),
        )
    for split in ("val", "test"):
        assert stream.num_images(split) == resident.num_images(split)
        _assert_equal(
            list(stream.eval_batches(split, batch_size=4)),
            list(resident.eval_batches(split, batch_size=4)),
        )
    assert stream.info.checksum != resident.info.checksum


def test_a_share_of_the_training_images_streams_as_it_stays_in_memory(
    root: Path,
) -> None:
    """train_fraction leaves the same images in both."""
    here = _config(root, loading="memory", train_fraction=0.5)
    there = here.model_copy(update={"loading": "stream"})
    resident = data.load(preparation.prepare(here).folder, device=CPU)
    assert resident.info.num_train < 20
    _assert_equal(_epoch(_stream(there), there), _epoch(resident, here))


def test_size_against_memory_decides_what_streams(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto: 30 images of 32 x 32 x 3 bytes stream where they fill half of memory."""
    config = _config(root)
    needed = 30 * 32 * 32 * 3
    for memory, loading in ((2 * needed, "memory"), (2 * needed - 2, "stream")):
        monkeypatch.setattr(preparation, "memory_bytes", lambda held=memory: held)
        assert preparation.prepare(config).config.loading == loading


# Whoever reads.


@pytest.mark.parametrize("augment", ["imagenet", "crop_flip"])
def test_workers_change_nothing(root: Path, augment: str) -> None:
    """No worker, one or two: batches of training and evaluation are equal."""
    config = _config(root, augment=augment, loading="stream")
    prepared = preparation.prepare(config)
    seen = []
    for count in (0, 1, 2):
        stream = _opened(prepared, config.model_copy(update={"num_workers": count}))
        before = torch.get_rng_state()
        seen.append(
            [
                *_epoch(stream, config, epoch=1),
                *stream.eval_batches("val", batch_size=3),
                *_epoch(stream, config, epoch=2),
                *stream.eval_batches("test", batch_size=4),
            ]
        )
        assert torch.equal(torch.get_rng_state(), before)
    _assert_equal(seen[1], seen[0])
    _assert_equal(seen[2], seen[0])


_READ_AND_WAIT = """
import multiprocessing, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_streaming as ours
config = ours._config(Path(sys.argv[1]), loading="stream", num_workers=2)
batches = ours._stream(config).train_batches(
    config, batch_size=4, num_passed=0, seed=0, epoch=1
)
next(iter(batches))
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(600)
"""


def test_workers_end_with_a_run_that_is_killed(root: Path) -> None:
    """None of them is left to hold memory and files, though others forked them."""
    command = [
        sys.executable,
        "-c",
        _READ_AND_WAIT,
        str(root),
        str(Path(__file__).parent),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as run:
        assert run.stdout is not None
        workers = run.stdout.readline().split()
        run.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while alive := [pid for pid in workers if Path("/proc", pid, "exe").exists()]:
        assert time.monotonic() < deadline, f"{alive} are still there"
        time.sleep(0.05)


def test_an_epoch_goes_on_where_it_was_left(root: Path) -> None:
    """Batches after the first three are those of a whole epoch; so is the next one."""
    config = _config(root, augment="imagenet", num_workers=2)
    stream = _stream(config)
    whole = _epoch(stream, config)
    begun = stream.train_batches(config, seed=0, epoch=1, batch_size=4, num_passed=0)
    for _ in range(2):
        next(begun)
    begun.close()
    _assert_equal(_epoch(stream, config, num_passed=3), whole[3:])


def test_seed_epoch_and_image_each_bring_other_draws(root: Path) -> None:
    """One image, seen under two seeds and in two epochs, is cropped differently."""
    config = _config(root, augment="imagenet")
    reader = _stream(config)._reader
    seen = {
        draw: reader[Wish("train", 0, draw)][1]
        for draw in (Draw(0, 1), Draw(0, 2), Draw(1, 1))
    }
    again = reader[Wish("train", 0, Draw(0, 1))][1]
    assert isinstance(again, torch.Tensor)
    assert torch.equal(again, seen[Draw(0, 1)])
    first, *others = seen.values()
    assert not any(torch.equal(first, other) for other in others)


# What is seen of an image.


def _reader(folder: Path, *names: str, size: int = 64, flip: bool = True) -> Reader:
    np.save(folder / "train_images.npy", np.array([name.encode() for name in names]))
    np.save(folder / "train_labels.npy", np.zeros(len(names), dtype=np.int64))
    return Reader(
        root=str(folder),
        shelves={"train": Shelf(folder, "train")},
        image_size=size,
        is_plain=False,
        flip=flip,
        leaves_encoded=False,
    )


def test_evaluation_sees_the_centre_of_the_image_at_256_of_224(tmp_path: Path) -> None:
    """A frame of 1/16 around the centred square is cut away, whatever the format."""
    pixels = np.zeros((256, 320, 3), dtype=np.uint8)
    pixels[:, 32:288] = 90
    pixels[20:236, 52:268] = 200
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=98, subsampling=0)
    Image.fromarray(pixels).save(tmp_path / "b.png")
    Image.fromarray(pixels).save(tmp_path / "c.JPEG", "PNG")  # ImageNet has one.
    reader = _reader(tmp_path, "a.jpg", "b.png", "c.JPEG", size=224)
    for place in range(3):
        seen = reader[Wish("train", place, None)][1]
        assert isinstance(seen, torch.Tensor)
        assert seen.shape == (224, 224, 3)
        assert seen.dtype == torch.uint8
        inside, frame = seen[6:-6, 6:-6].int(), seen[:2].int()
        assert (inside - 200).abs().max() <= 3
        assert (frame - 90).abs().max() <= 3


def test_training_crops_have_the_areas_of_the_recipe(tmp_path: Path) -> None:
    """Areas from 8 to 100 %, 54 % on average; colours vary, half are mirrored."""
    ramp = np.linspace(0, 255, 256).astype(np.uint8)
    pixels = np.stack([*np.meshgrid(ramp, ramp), np.full((256, 256), 128)], axis=2)
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "ramp.png")
    reader = _reader(tmp_path, "ramp.png")
    areas, mirrored, blues = [], [], []
    for epoch in range(400):
        seen = reader[Wish("train", 0, Draw(0, epoch))][1]
        assert isinstance(seen, torch.Tensor)
        view = seen.double()
        across = (view[32, -1, 0] - view[32, 0, 0]).item()
        down = (view[-1, 32, 1] - view[0, 32, 1]).item()
        mirrored.append(across < 0)
        # Brightness and contrast scale both ramps alike, and blue tells how bright.
        areas.append(abs(across * down))
        blues.append(view[..., 2].mean().item())
    assert 0.42 < np.mean(mirrored) < 0.58
    assert np.min(areas) < 0.2 * np.max(areas)
    assert np.std(blues) > 15
    assert {
        reader._light(Wish("train", 0, Draw(0, e)))[0].item() > 0 for e in range(20)
    }


def test_lighting_varies_as_the_components_say(tmp_path: Path) -> None:
    """Its covariance over many draws is 0.01 * E diag(0.2175, 0.0188, 0.0045)^2 E^T."""
    reader = _reader(tmp_path, "none.jpg")
    light = torch.stack(
        [reader._light(Wish("train", 0, Draw(0, e))) for e in range(4000)]
    )
    # Nearly grey: the first component is (-0.57, -0.58, -0.58).
    expected = 0.01 * 0.2175**2 * torch.tensor([0.5675, 0.5808, 0.5836]) ** 2
    assert light.var(dim=0).tolist() == pytest.approx(expected.tolist(), rel=0.1)
    assert light.mean(dim=0).abs().max() < 0.002
    assert reader._light(Wish("train", 0, None)).tolist() == [0, 0, 0]


def test_lighting_reaches_the_batch(root: Path) -> None:
    """A batch is the augmented pixels, lit and then normalised."""
    config = _config(root, augment="imagenet")
    stream = _stream(config)
    order = data.draw_epoch(
        stream.num_images("train"),
        crop_padding=4,
        flip=True,
        generator=data.epoch_generator(0, epoch=1),
    ).order
    wish = Wish("train", int(order[0]), Draw(0, 1))
    pixels = stream._reader[wish][1]
    assert isinstance(pixels, torch.Tensor)
    lit = pixels / 255 + stream._reader._light(wish)
    expected = (lit - stream._mean) / stream._std
    found = _epoch(stream, config)[0].images[0].permute(1, 2, 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# Files.


def test_damaged_files_are_found_once_left_out_and_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truncated and foreign files count as for sets in memory; then the list serves."""
    whole = (root / "train/cat/000.jpg").read_bytes()
    (root / "train/cat/x.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "test/dog/y.jpg").write_text("no image")
    config = _config(root, loading="stream")
    prepared = preparation.prepare(config)
    assert prepared.info.corrupt_files == ("train/cat/x.jpg", "test/dog/y.jpg")
    assert prepared.info.num_test == 6
    monkeypatch.setattr("resnext_ablate.compute.folders._each", None)
    assert preparation.prepare(config) == prepared


def test_names_sizes_and_labels_tell_sets_apart(root: Path, tmp_path: Path) -> None:
    """A copy elsewhere has the same checksum; a set with a longer file has not."""
    config = _config(root, loading="stream")
    first = preparation.prepare(config).info.checksum
    copy = write_folder(tmp_path / "copy", num_train=24, num_test=6)
    elsewhere = config.model_copy(update={"root": str(copy)})
    assert preparation.prepare(elsewhere).info.checksum == first
    with (copy / "train/cat/000.jpg").open("ab") as file:
        file.write(b"\0")
    assert preparation.prepare(elsewhere).info.checksum != first


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_that_goes_away_is_named(root: Path, num_workers: int) -> None:
    """The run ends with one message that names the file."""
    config = _config(root, augment="imagenet", num_workers=num_workers)
    stream = _stream(config)
    (root / "test/cat/000.jpg").unlink()
    with pytest.raises(InputError, match=r"can no longer be read: .*test/cat/000\.jpg"):
        list(stream.eval_batches("test", batch_size=4))


def test_streams_need_a_size(root: Path) -> None:
    """Without image_size there is nothing to resize to, which is said."""
    with pytest.raises(InputError, match=r"stream need data\.image_size, such as 224"):
        preparation.prepare(_config(root, image_size=None, loading="stream"))


def test_memory_is_asked_for_by_those_who_need_it(root: Path) -> None:
    """What works on images in memory refuses a stream, and says what to set."""
    prepared = preparation.prepare(_config(root, loading="stream"))
    with pytest.raises(InputError, match=r'streams .* data\.loading = "memory"'):
        data.load(prepared.folder, device=CPU)


# ImageNet.


def test_imagenet_is_read_as_torchvision_lays_it_out(tmp_path: Path) -> None:
    """train/WNID and val/WNID: val is the test split, a tenth of train validates."""
    root = write_folder(
        tmp_path / "ILSVRC2012",
        num_train=40,
        num_test=6,
        classes=("n01440764", "n01443537"),
        test="val",
        suffix="JPEG",
    )
    config = DataConfig(name="imagenet", root=str(root), augment="imagenet")
    prepared = preparation.prepare(config)
    info = prepared.info
    assert (info.num_train, info.num_val, info.num_test) == (36, 4, 6)
    assert (info.image_size, info.class_names) == (224, ("n01440764", "n01443537"))
    assert prepared.config.loading == "stream"
    stream = _opened(prepared, config)
    assert stream._mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    (batch,) = stream.eval_batches("test", batch_size=8)
    assert batch.images.shape == (6, 3, 224, 224)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_a_missing_imagenet_says_what_it_looks_like(tmp_path: Path) -> None:
    """It cannot be downloaded: the message has the layout and the address."""
    (tmp_path / "train").mkdir()
    config = DataConfig(name="imagenet", root=str(tmp_path))
    with pytest.raises(InputError) as caught:
        preparation.prepare(config)
    message = str(caught.value)
    assert "has no val/; ImageNet cannot be downloaded" in message
    assert "val/WNID/*.JPEG" in message and "https://www.image-net.org" in message


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"name": "imagenet"}, 'name = "imagenet" needs root'),
        ({"name": "cifar10", "loading": "stream"}, "cifar10 is small and stays"),
        ({"name": "digits", "augment": "imagenet"}, "digits is small and stays"),
        (
            {
                "name": "imagenet",
                "root": "x",
                "augment": "imagenet",
                "loading": "memory",
            },
            'augment = "imagenet" needs loading = "stream"',
        ),
        (
            {"name": "imagenet", "root": "x", "decode": "cuda"},
            'decode = "cuda" needs augment = "imagenet"',
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    fields: dict[str, str], expected: str
) -> None:
    """Keys of streams stand where images stream."""
    with pytest.raises(ValueError, match=expected):
        DataConfig.model_validate(fields)


def test_executors_import_torchvision_only_to_stream() -> None:
    """Who trains on images in memory starts without it."""
    code = (
        "import sys, resnext_ablate.engines.executor\n"
        "print('torchvision' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.strip() == b"False"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_decodes_nearly_what_a_cpu_does(root: Path) -> None:
    """decode = "cuda": the same crops and colours, within the rounding of a decoder."""
    config = _config(root, augment="imagenet", image_size=64)
    prepared = preparation.prepare(config)
    on_cpu = _opened(prepared, config)
    there = config.model_copy(update={"decode": "cuda", "num_workers": 2})
    on_gpu = Stream(
        prepared.folder, config=there, device=torch.device("cuda"), num_sharing=1
    )
    for one, other in zip(_epoch(on_gpu, there), _epoch(on_cpu, config), strict=True):
        assert torch.equal(one.labels.cpu(), other.labels)
        difference = (one.images.cpu() - other.images).abs()
        assert difference.mean() < 0.05
        assert difference.mean() < 0.1 * other.images.std()


def test_photographs_are_files_of_several_sizes(tmp_path: Path) -> None:
    """What these tests read is like photographs: JPEG, in colour, not square."""
    sizes = set()
    for index in range(4):
        path = tmp_path / f"{index}.jpg"
        write_photograph(path, index=index, label=0)
        with Image.open(path) as image:
            sizes.add(image.size)
            assert (image.format, image.mode) == ("JPEG", "RGB")
    assert len(sizes) > 1
