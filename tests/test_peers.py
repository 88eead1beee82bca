"""One run over several processes, on real JPEG files of 224 pixels, by torchrun."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from photographs import write_folder

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.spec import InputError
from resnext_ablate.compute import preparation, sources, training
from resnext_ablate.compute.data import Part
from resnext_ablate.compute.hardware import placed
from resnext_ablate.compute.streaming import Stream
from resnext_ablate.records import records
from resnext_ablate.records.config import StudyConfig, load_study
from studies import WALL_CLOCK, children_of, wait_until

STUDY = """\
name = "two"

[net]
template = "resnet50-t8"
variants = ["1x8d"]

[data]
name = "imagefolder"
root = "photos"
image_size = 224
augment = "imagenet"

[train]
epochs = 2
batch_size = 8
learning_rate = 0.05
precision = "fp32"
conv_forms = {}

[run]
seeds = 1
executors = 1
devices_per_run = 2
device = "cpu"
checkpoint_every_s = 1e-9
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the study and its photographs, of which 17 test."""
    folder = tmp_path_factory.mktemp("peers")
    (folder / "two.toml").write_text(STUDY, encoding="utf-8")
    root = write_folder(folder / "photos", num_train=40, num_test=18, scale=3)
    (root / "test/dog/008.jpg").unlink()
    return folder


def start(place: Path, results: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-c", "from resnext_ablate.face.cli import main; main()"),
            *("run", "two.toml", "--results", results, *arguments),
        ],
        cwd=place,
        env={**os.environ, sources.CACHE_VARIABLE: str(place / "cache")},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    _, talk = process.communicate(timeout=400)
    assert "Traceback" not in talk, talk
    return talk


@pytest.fixture(scope="module")
def unbroken(place: Path) -> Path:
    """The study's folder after a run that nobody disturbed."""
    process = start(place, "unbroken")
    talk = ended(process)
    assert process.returncode == 0, talk
    return place / "unbroken" / "two"


def config_of(place: Path) -> StudyConfig:
    return load_study(place / "two.toml", overrides=[f"data.root={place / 'photos'}"])


def test_two_processes_learn_as_one_does_with_two_micro_batches(
    place: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch norm sees the same parts in both, so that losses agree to rounding."""
    monkeypatch.setenv(sources.CACHE_VARIABLE, str(place / "cache"))
    config = config_of(place)
    prepared = preparation.prepare(config.data)
    cpu = torch.device("cpu")
    alone = training.train(
        parse_spec("resnet50-1x8d-t8-c2"),
        config=config.train,
        data_config=config.data,
        dataset=Stream(prepared.folder, config=config.data, device=cpu, num_sharing=1),
        seed=0,
        device=cpu,
        deterministic=True,
        on_epoch=lambda epoch: None,
        num_micro_batches=2,
    )
    (run,) = records.read_runs(unbroken, records.read_plan(unbroken))
    assert (run.state, run.num_devices) == ("complete", 2)
    for together, one in zip(run.epochs, alone.epochs, strict=True):
        assert together.train_loss == pytest.approx(one.train_loss, rel=1e-4)
        assert together.train_error_pct == one.train_error_pct
        assert together.learning_rate == one.learning_rate
    correct = records.unpack_bits(run.correct_bits, num_images=17)
    assert run.test_error_pct == pytest.approx(100 * (17 - correct.sum()) / 17)


def rank_of(process: int) -> str:
    with_rank = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next((v[5:].decode() for v in with_rank if v.startswith(b"RANK=")), "")


def ranks_of(scheduler: int) -> dict[str, int]:
    """The processes that train, by rank."""
    (torchrun,) = children_of(scheduler)
    return {rank_of(child): child for child in children_of(torchrun)}


def has_step(study: Path, *, epoch: int, step: int) -> Callable[[], bool]:
    """Whether the run was saved in an epoch, from 0, after so many steps or more."""

    def found() -> bool:
        names = [path.stem for path in study.glob("checkpoints/*/*.pt")]
        return any(name >= f"{epoch:06}-{step:08}" for name in names)

    return found


@pytest.mark.full
def test_a_run_outlives_any_of_its_processes(place: Path, unbroken: Path) -> None:
    """A rank killed in mid-epoch, the study interrupted in the next, then resumed by
    other numbers of workers: the numbers are those of an undisturbed run."""
    study = place / "broken" / "two"
    process = start(place, "broken")
    wait_until(has_step(study, epoch=0, step=2))
    first = ranks_of(process.pid)
    os.kill(first["1"], signal.SIGKILL)
    wait_until(has_step(study, epoch=1, step=1))
    second = ranks_of(process.pid)
    assert not {*first.values()} & {*second.values()}
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    talk = ended(process)
    assert process.returncode == 130, talk
    assert time.monotonic() - sent < 20
    wait_until(
        lambda: not any(Path(f"/proc/{one}").exists() for one in second.values())
    )

    resumed = start(place, "broken", "data.num_workers=1")
    talk = ended(resumed)
    assert resumed.returncode == 0, talk
    attempts = pd.read_csv(study / "attempts.csv")
    assert list(attempts.cause) == ["killed", "interrupted"]
    for name in ("runs", "epochs"):
        found, expected = (
            pd.read_csv(folder / f"{name}.csv").drop(
                columns=[*WALL_CLOCK, "time_s", "lost_attempts"], errors="ignore"
            )
            for folder in (study, unbroken)
        )
        pd.testing.assert_frame_equal(found, expected, check_exact=True)


EVALUATION = """\
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from resnext_ablate.compute import training
from resnext_ablate.records.config import load_study
from resnext_ablate.compute.learner import new_learner, update
from resnext_ablate.compute.hardware import placed
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.compute.peers import ALONE, joined
from resnext_ablate.compute.data import Part
from resnext_ablate.compute.streaming import Stream
from resnext_ablate.compute.together import joint_batch
from resnext_ablate.compute.training_state import Run, Seed, fresh_epoch

torch.set_num_threads(1)
config = load_study(Path("two.toml"))
cpu = torch.device("cpu")
with joined(3) as peers:
    dataset = Stream(Path(sys.argv[1]), config=config.data, device=cpu, num_sharing=1)
    learner = new_learner(
        parse_spec("resnet50-1x8d-t8-c2"),
        generators=[torch.Generator().manual_seed(0)],
        config=config.train,
        image_size=224,
        device=cpu,
        peers=peers,
    )
    run = Run(
        learner=learner, step=update, config=config.train, data_config=config.data,
        dataset=dataset, seeds=(Seed(seed=0, on_epoch=print, on_end=print),),
        device=cpu, should_stop=lambda: peers.agree(False),
    )
    batches = dataset.train_batches(
        config.data, seed=0, epoch=1, batch_size=6, num_passed=0, part=run.part
    )
    wrong = torch.zeros(1, dtype=torch.int64)
    for _ in range(3):
        batch = joint_batch([next(batches)])
        update(learner, batch, learning_rate=0.05, wrong=wrong)
    progress = fresh_epoch(run, epochs=[()], live={0})
    together = training._evaluate(run, "test", progress=progress)[0]
    alone = replace(
        run, learner=replace(learner, peers=ALONE), should_stop=lambda: False
    )
    own = training._evaluate(alone, "test", progress=progress)[0]
    assert np.array_equal(together.correct, own.correct), peers
    assert len(own.correct) == 17
    assert abs(together.loss - own.loss) < 1e-6 * own.loss, (together.loss, own.loss)
    said = peers.hear("word" if peers.leads else "")
    assert said == "word" and peers.hear("") == ""
    weights = torch.cat([one.flatten() for one in learner.model.state_dict().values()])
    assert torch.equal(peers.total(weights.double()), 3 * weights.double()), "differ"
    print(f"rank {peers.rank}: {wrong.item()} wrong")
"""


def test_three_processes_hold_the_same_and_share_evaluation(
    place: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and statistics are equal in all; a split evaluated in uneven parts gives
    the answers of one process, in the order of the split."""
    monkeypatch.setenv(sources.CACHE_VARIABLE, str(place / "cache"))
    prepared = preparation.prepare(config_of(place).data)
    (place / "evaluation.py").write_text(EVALUATION, encoding="utf-8")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node=3", "evaluation.py", str(prepared.folder)),
        ],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = re.findall(r"rank \d: \d+ wrong", done.stdout)  # Lines may run together.
    assert len(said) == 3
    assert len({line.partition(": ")[2] for line in said}) == 1


@given(length=st.integers(0, 300), count=st.integers(1, 9))
def test_parts_are_those_of_tensor_split(length: int, count: int) -> None:
    """Parts follow one another, cover everything and divide as micro-batches do."""
    parts = [list(Part(index, count).of(length)) for index in range(count)]
    expected = torch.arange(length).tensor_split(count)
    assert parts == [part.tolist() for part in expected]


def test_parts_of_a_feed_make_up_the_whole(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process's part of a batch, laid side by side, is the batch of one."""
    monkeypatch.setenv(sources.CACHE_VARIABLE, str(place / "cache"))
    config = config_of(place).data
    prepared = preparation.prepare(config)
    stream = Stream(
        prepared.folder, config=config, device=torch.device("cpu"), num_sharing=1
    )

    def labels_and_pixels(part: Part) -> list[tuple[list[int], np.ndarray]]:
        batches = stream.train_batches(
            config, seed=1, epoch=2, batch_size=8, num_passed=2, part=part
        )
        return [(batch.labels.tolist(), batch.images.numpy()) for batch in batches]

    whole = labels_and_pixels(Part())
    parts = [labels_and_pixels(Part(index, 2)) for index in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert batch[0] == first[0] + second[0]
        assert np.array_equal(batch[1], np.concatenate([first[1], second[1]]))


def test_a_batch_must_divide_by_the_devices(place: Path) -> None:
    """Uneven parts would weigh their images unevenly: refused, with the numbers."""
    process = start(place, "uneven", "train.batch_size=7")
    talk = process.communicate(timeout=200)[1]
    assert process.returncode == 2, talk
    assert "run.devices_per_run = 2 must divide train.batch_size = 7" in talk


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"devices_per_run": 2, "runs_per_device": 2},
            "excludes runs_per_device",
        ),
        ({"devices_per_run": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_of_devices_are_checked(fields: dict[str, int], expected: str) -> None:
    """Runs share devices or take several, never both."""
    values = load_minimal() | {"run": fields}
    with pytest.raises(ValueError, match=expected):
        StudyConfig.model_validate(values)


def load_minimal() -> dict[str, object]:
    return {
        "name": "x",
        "net": {"template": "resnet11-t8", "variants": ["1x8d"]},
        "data": {"name": "digits"},
        "train": {"epochs": 1},
    }


def test_runs_take_their_gpus_in_turn() -> None:
    """Each run has GPUs of its own, and where there are too few the number is named."""
    eight = [f"cuda:{index}" for index in range(8)]

    def firsts(executors: int | Literal["auto"], devices_per_run: int) -> list[str]:
        found = placed(
            eight,
            executors=executors,
            runs_per_device=1,
            devices_per_run=devices_per_run,
        )
        return list(found)

    assert firsts("auto", 4) == ["cuda:0", "cuda:4"]
    assert firsts("auto", 3) == ["cuda:0", "cuda:3"]
    assert firsts(3, 4) == ["cuda:0", "cuda:4", "cuda:0"]
    with pytest.raises(InputError, match=r"devices_per_run = 9: there are 8 GPUs"):
        firsts(1, 9)
