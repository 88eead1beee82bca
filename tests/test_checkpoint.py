"""Checkpoints: a run that is cut off anywhere goes on to the very same numbers."""

from __future__ import annotations

import contextlib
import io
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.compute import checkpoint, learner, training
from resnext_ablate.compute.checkpoint import Checkpoint, Keeper
from resnext_ablate.compute.data import DataInfo, Dataset, Split
from resnext_ablate.compute.training import RunResult, RunStoppedError
from resnext_ablate.records.config import DataConfig, TrainConfig
from resnext_ablate.records.records import EpochRecord

CPU = torch.device("cpu")
EVERY_STEP, NEVER = 1e-9, 1e9
NUM_EPOCHS = 3


class Killed(BaseException):
    """Stands for the end of a process: nothing is saved on the way out."""


def dataset(device: torch.device) -> Dataset:
    """Four easy classes of 8 x 8 pixels: four batches of ten."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        labels = torch.arange(count) % 4
        noise = torch.randint(0, 60, (count, 8, 8, 1), generator=generator)
        pixels = noise + 50 * labels.view(-1, 1, 1, 1)
        return Split(pixels.to(torch.uint8).to(device), labels.to(device))

    info = DataInfo(
        name="made",
        num_classes=4,
        class_names=("a", "b", "c", "d"),
        in_channels=1,
        image_size=8,
        num_train=40,
        num_val=12,
        num_test=12,
        checksum="",
        corrupt_files=(),
    )
    mean, std = (torch.tensor([value], device=device) for value in (0.4, 0.2))
    return Dataset(split(40), split(12), split(12), mean, std, info)


def train(
    folder: Path | None,
    *,
    every_s: float = EVERY_STEP,
    identity: str = "",
    precision: str = "fp32",
    should_stop: Callable[[], bool] = training.never,
    on_epoch: Callable[[EpochRecord], None] = lambda epoch: None,
    device: torch.device = CPU,
) -> RunResult:
    config = {"epochs": NUM_EPOCHS, "batch_size": 10, "precision": precision}
    keeper = folder and Keeper(folder, identity=identity, every_s=every_s)
    return training.train(
        parse_spec("resnext11-2x4d-t4-in1-c4"),
        config=TrainConfig.model_validate(config),
        data_config=DataConfig(name="digits", crop_padding=1),
        dataset=dataset(device),
        seed=3,
        device=device,
        deterministic=True,
        on_epoch=on_epoch,
        keeper=keeper,
        should_stop=should_stop,
    )


def numbers(result: RunResult) -> list[float]:
    """All of a run that is not a time or a size, in order and unrounded."""
    return [
        result.test_loss,
        result.test_error_pct,
        *result.correct.tolist(),
        *(
            value
            for epoch in result.epochs
            for value in (
                epoch.epoch,
                epoch.train_loss,
                epoch.train_error_pct,
                epoch.val_loss,
                epoch.val_error_pct,
                epoch.learning_rate,
            )
        ),
    ]


def after(count: int, *, killed: bool) -> Callable[[], bool]:
    """Asks a run to stop at the question of that number, or kills it there."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        if asked > count and killed:
            raise Killed
        return asked > count

    return should_stop


@pytest.fixture(scope="module")
def unbroken() -> dict[str, list[float]]:
    return {kind: numbers(train(None, precision=kind)) for kind in ("fp32", "bf16")}


@settings(max_examples=15, deadline=None)
@given(
    precision=st.sampled_from(["fp32", "bf16"]),
    every_s=st.sampled_from([EVERY_STEP, NEVER]),
    # Batches, of evaluation too, until the run is asked to stop or is killed.
    ends=st.lists(st.tuples(st.integers(0, 18), st.booleans()), min_size=1, max_size=4),
)
def test_run_cut_off_anywhere_ends_with_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory,
    unbroken: dict[str, list[float]],
    precision: str,
    every_s: float,
    ends: list[tuple[int, bool]],
) -> None:
    """Stopped or killed at any steps, in training or evaluation: bit for bit equal."""
    folder = tmp_path_factory.mktemp("run") / "cell"
    for count, killed in ends:
        with contextlib.suppress(Killed, RunStoppedError):
            train(
                folder,
                every_s=every_s,
                precision=precision,
                should_stop=after(count, killed=killed),
            )
    result = train(folder, every_s=every_s, precision=precision)
    assert numbers(result) == unbroken[precision]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("count", range(1, 16, 3))
def test_run_on_cuda_goes_on_to_the_same_bits(tmp_path: Path, count: int) -> None:
    """Deterministic CUDA runs too are the same whether cut off or not."""
    unbroken = numbers(train(None, device=torch.device("cuda")))
    with pytest.raises(RunStoppedError):
        train(
            tmp_path,
            device=torch.device("cuda"),
            should_stop=after(count, killed=False),
        )
    assert numbers(train(tmp_path, device=torch.device("cuda"))) == unbroken


def test_a_stop_loses_no_step(tmp_path: Path) -> None:
    """A run that is asked to stop is saved at that very step, whatever is due."""
    with pytest.raises(RunStoppedError, match="epoch 2 after step 2"):
        # Four batches of training and one of evaluation to an epoch.
        train(tmp_path, every_s=NEVER, should_stop=after(7, killed=False))
    kept = Keeper(tmp_path, identity="", every_s=NEVER).load()
    assert kept is not None
    assert (len(kept.epochs), kept.step, len(kept.losses)) == (1, 2, 2)


def test_epochs_of_a_checkpoint_are_told_again(tmp_path: Path) -> None:
    """Who listens to a resumed run hears of every epoch, restored ones first."""
    with pytest.raises(RunStoppedError):
        train(tmp_path, should_stop=after(12, killed=False))
    told: list[int] = []
    train(tmp_path, on_epoch=lambda epoch: told.append(epoch.epoch))
    assert told == [1, 2, 3]


def test_random_states_go_on_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A net that draws from torch's own generator resumes its draws."""
    build = learner.build

    def with_dropout(*arguments: Any, **options: Any) -> nn.Module:
        torch.manual_seed(5)
        net = build(*arguments, **options)
        net.avgpool = nn.Sequential(net.avgpool, nn.Dropout(0.3))
        return net

    monkeypatch.setattr(learner, "build", with_dropout)
    unbroken = numbers(train(None))
    with pytest.raises(RunStoppedError):
        train(tmp_path, should_stop=after(6, killed=False))
    assert numbers(train(tmp_path)) == unbroken


def test_another_identity_starts_anew(tmp_path: Path) -> None:
    """A checkpoint of other settings is never mixed into a run."""
    with pytest.raises(RunStoppedError):
        train(tmp_path, identity="a", should_stop=after(6, killed=False))
    assert Keeper(tmp_path, identity="b", every_s=1).load() is None
    assert list(tmp_path.iterdir()) == []


def written(folder: Path, *, steps: int) -> list[Path]:
    """Checkpoints of a small run after each of its steps; those that are kept."""
    keeper = Keeper(folder, identity="", every_s=1)
    for step in range(1, steps + 1):
        keeper.save(sample(step))
    return sorted(folder.glob("*.pt"))


def sample(step: int) -> Checkpoint:
    return Checkpoint(
        epochs=(),
        step=step,
        losses=torch.full((step,), 0.5),
        num_wrong=step,
        time_s=1.0,
        model={"weight": torch.full((2000,), float(step))},
        optimizer={},
        random_states={},
    )


def loaded_step(folder: Path) -> int | None:
    kept = Keeper(folder, identity="", every_s=1).load()
    if kept is None:
        return None
    assert torch.equal(kept.model["weight"], torch.full((2000,), float(kept.step)))
    return kept.step


def test_the_last_two_are_kept_with_their_sums(tmp_path: Path) -> None:
    """Older checkpoints go; beside each of the last two stands its SHA-256."""
    kept = written(tmp_path, steps=5)
    assert [path.name for path in kept] == [
        "000000-00000004.pt",
        "000000-00000005.pt",
    ]
    assert len(list(tmp_path.iterdir())) == 4
    check = ["sha256sum", "--check", *(f"{path.name}.sha256" for path in kept)]
    assert subprocess.run(check, cwd=tmp_path, check=False).returncode == 0
    assert loaded_step(tmp_path) == 5


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_is_found_and_the_previous_one_taken(
    tmp_path: Path, seed: int
) -> None:
    """One bit at a random place, which torch.load may well not see."""
    *_, newest = written(tmp_path, steps=3)
    content = bytearray(newest.read_bytes())
    draw = random.Random(seed)
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    newest.write_bytes(content)
    assert loaded_step(tmp_path) == 2
    assert not newest.exists()


@pytest.mark.parametrize("size", [0, 1, 500, -1])
def test_a_truncated_one_is_found(tmp_path: Path, size: int) -> None:
    """A file that lost its end, or all of it, is passed over."""
    *_, newest = written(tmp_path, steps=3)
    newest.write_bytes(newest.read_bytes()[:size])
    assert loaded_step(tmp_path) == 2


def test_without_a_whole_one_a_run_starts_again(tmp_path: Path) -> None:
    """Both damaged, or a sum lost: nothing is read, and nothing raises."""
    first, second = written(tmp_path, steps=3)
    first.write_bytes(b"")
    second.with_name(f"{second.name}.sha256").unlink()
    assert loaded_step(tmp_path) is None


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    """A pickled call with a sum that fits is refused, not run."""
    trace = tmp_path / "trace"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(trace),))

    folder = tmp_path / "cell"
    (newest,) = written(folder, steps=1)
    buffer = io.BytesIO()
    torch.save({"format": 1, "identity": "", "epochs": [Evil()]}, buffer)
    newest.write_bytes(buffer.getvalue())
    digest = checkpoint.hashlib.sha256(buffer.getvalue()).hexdigest()
    newest.with_name(f"{newest.name}.sha256").write_text(f"{digest}  {newest.name}\n")
    assert loaded_step(folder) is None
    assert not trace.exists()


WRITER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import sample
from resnext_ablate.compute.checkpoint import Keeper
keeper = Keeper(Path(sys.argv[1]), identity="", every_s=1)
print("ready", flush=True)
for step in range(1, 100_000):
    keeper.save(sample(step))
    print(step, flush=True)
"""


def test_a_process_killed_while_it_saves_leaves_a_whole_one(tmp_path: Path) -> None:
    """SIGKILL at random moments: at most the save under way is lost, no litter."""
    draw = random.Random(0)
    arguments = [
        sys.executable,
        "-c",
        WRITER,
        str(tmp_path),
        str(Path(__file__).parent),
    ]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "20":
                break
        time.sleep(draw.random() / 50)
        process.send_signal(signal.SIGKILL)
        said = [20, *(int(text) for text in process.stdout.read().split())]
    step = loaded_step(tmp_path)
    assert step is not None and step >= said[-1]
    assert not list(tmp_path.glob(".*"))


def test_saving_takes_a_small_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At epoch ends a save waits until the last one's cost is 1 % of the time since."""
    now = 100.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    keeper = Keeper(tmp_path, identity="", every_s=60)
    keeper._cost_s = 0.1
    dues = {}
    for elapsed in (9.9, 10.1, 59.9, 60.1):
        now = 100.0 + elapsed
        dues[elapsed] = [keeper.is_due(at_epoch_end=end) for end in (False, True)]
    assert dues == {
        9.9: [False, False],
        10.1: [False, True],
        59.9: [False, True],
        60.1: [True, True],
    }


def test_a_full_disk_leaves_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that fails raises, and what was saved before is as it was."""
    written(tmp_path, steps=3)

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("resnext_ablate.records.records.os.fsync", disk_full)
        with pytest.raises(OSError, match="No space left"):
            Keeper(tmp_path, identity="", every_s=1).save(sample(4))
    assert loaded_step(tmp_path) == 3


def test_times_of_a_resumed_run_add_up(tmp_path: Path) -> None:
    """The training time before a stop counts; that of loading and saving does not."""
    with pytest.raises(RunStoppedError):
        train(tmp_path, should_stop=after(3, killed=False))
    kept = Keeper(tmp_path, identity="", every_s=1).load()
    assert kept is not None and kept.time_s > 0
    result = train(tmp_path)
    assert result.epochs[0].time_s > kept.time_s
    assert math.isclose(result.train_time_s, sum(e.time_s for e in result.epochs))
