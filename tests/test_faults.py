"""Faults that a study survives, each with real processes.

What does not need a process of its own is in `test_schedule` and `test_checkpoint`.
"""

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState

from studies import (
    assert_equal_results,
    attempts_of,
    checkpoints_of,
    children_of,
    in_mid_run,
    num_running,
    run,
    runs_of,
    start,
    trials_of,
    wait_until,
)

# One executor, and a save after each step: what is cut off has a checkpoint.
ONE = ["run.executors=1", "run.seeds=1", "run.checkpoint_every_s=1e-9"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nobody disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = run(folder, *ONE)
    assert done.returncode == 0, done.stderr
    return folder


def executor_of(process: "subprocess.Popen[str]") -> int:
    (executor,) = children_of(process.pid)
    return executor


def ended(process: "subprocess.Popen[str]", *, timeout_s: float = 240) -> str:
    """Waits for the end of a study; what it said."""
    _, talk = process.communicate(timeout=timeout_s)
    assert "Traceback" not in talk, talk
    return talk


def log_of(folder: Path) -> str:
    return (folder / "results" / "tiny" / "logs" / "executor-0.log").read_text()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.full)],
)
def test_a_signal_saves_the_run_at_its_step(
    unbroken: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Interrupted: saved, handed back and told how to go on, in 10 s; then the same."""
    process = start(tmp_path, *ONE, "run.checkpoint_every_s=1000")
    wait_until(lambda: in_mid_run(tmp_path))
    sent = time.monotonic()
    process.send_signal(number)
    talk = ended(process, timeout_s=30)
    assert time.monotonic() - sent < 10
    assert process.returncode == code, talk
    assert "the same command goes on from there: " in talk
    assert "run tiny.toml run.executors=1" in talk
    (trial,) = trials_of(tmp_path)
    assert trial.state == TrialState.FAIL
    assert "stopped in epoch" in trial.user_attrs["reason"]
    assert checkpoints_of(tmp_path)

    done = run(tmp_path, *ONE)
    assert done.returncode == 0, done.stderr
    assert_equal_results(tmp_path, unbroken)
    (attempt,) = attempts_of(tmp_path).to_dict("records")
    assert (attempt["cause"], attempt["number"]) == ("interrupted", 1)
    assert 1 <= attempt["epoch"] < 5
    assert runs_of(tmp_path).lost_attempts[0] == "interrupted"
    assert checkpoints_of(tmp_path) == []


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    """Who asks twice does not wait for an executor that does not answer."""
    process = start(tmp_path, *ONE)
    wait_until(lambda: in_mid_run(tmp_path))
    os.kill(executor_of(process), signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None, "it waits for its executor"
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    process.communicate(timeout=10)
    assert time.monotonic() - sent < 2
    assert process.returncode == -signal.SIGTERM


@pytest.mark.full
def test_a_terminated_executor_hands_its_run_back(
    unbroken: Path, tmp_path: Path
) -> None:
    """SIGTERM to an executor alone saves its run, and another one goes on with it."""
    process = start(tmp_path, *ONE)
    wait_until(lambda: in_mid_run(tmp_path))
    os.kill(executor_of(process), signal.SIGTERM)
    talk = ended(process)
    assert process.returncode == 0, talk
    assert "stopped in epoch" in talk
    assert_equal_results(tmp_path, unbroken)
    assert list(attempts_of(tmp_path).cause) == ["terminated"]


@pytest.mark.full
def test_a_stopped_executor_is_replaced_after_its_lease(
    unbroken: Path, tmp_path: Path
) -> None:
    """No step within the lease: the executor is killed and its run goes on."""
    process = start(tmp_path, *ONE, "run.lease_s=20")
    wait_until(lambda: in_mid_run(tmp_path))
    frozen = executor_of(process)
    os.kill(frozen, signal.SIGSTOP)
    talk = ended(process)
    assert process.returncode == 0, talk
    assert "executor hung: no step in 20 s" in talk
    assert not Path(f"/proc/{frozen}").exists()
    assert_equal_results(tmp_path, unbroken)
    assert runs_of(tmp_path).lost_attempts[0] == "hung"


@pytest.mark.parametrize(
    "damage",
    [
        "flip",
        pytest.param("truncate", marks=pytest.mark.full),
        pytest.param("empty", marks=pytest.mark.full),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_previous_one(
    unbroken: Path, tmp_path: Path, damage: str
) -> None:
    """The newest is bad: the one before it is taken, and the numbers are the same."""
    process = start(tmp_path, *ONE)
    wait_until(lambda: in_mid_run(tmp_path) and len(checkpoints_of(tmp_path)) == 2)
    executor = executor_of(process)
    process.kill()
    process.communicate()
    wait_until(lambda: not Path(f"/proc/{executor}").exists())
    *_, newest = checkpoints_of(tmp_path)
    content = bytearray(newest.read_bytes())
    if damage == "flip":
        content[random.Random(0).randrange(len(content))] ^= 4
    newest.write_bytes(
        {"flip": content, "truncate": content[:-100], "empty": b""}[damage]
    )
    done = run(tmp_path, *ONE)
    assert done.returncode == 0, done.stderr
    assert f"{newest.name} is passed over" in log_of(tmp_path)
    assert_equal_results(tmp_path, unbroken)


def limit(process: int, kind: int, value: int) -> None:
    _, hard = resource.prlimit(process, kind)
    resource.prlimit(process, kind, (value, hard))


@pytest.mark.parametrize(
    "whose", ["executor", pytest.param("scheduler", marks=pytest.mark.full)]
)
def test_a_full_disk_halts_the_study_and_loses_nothing(
    unbroken: Path, tmp_path: Path, whose: str
) -> None:
    """No room for a process's files: one message, code 1, and it goes on later."""
    process = start(tmp_path, *ONE)
    wait_until(lambda: in_mid_run(tmp_path))
    full = executor_of(process) if whose == "executor" else process.pid
    limit(full, resource.RLIMIT_FSIZE, 2000)
    talk = ended(process)
    assert process.returncode == 1, talk
    assert "nothing more can be written" in talk
    assert "make room, and the same command goes on" in talk

    done = run(tmp_path, *ONE)
    assert done.returncode == 0, done.stderr
    assert_equal_results(tmp_path, unbroken)
    states = [trial.state for trial in trials_of(tmp_path)]
    assert states.count(TrialState.COMPLETE) == 2
    assert TrialState.RUNNING not in states


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of some megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.full
def test_a_file_system_that_fills_up_halts_the_study(
    unbroken: Path, small_disk: Path
) -> None:
    """Something else takes all the room: one message, code 1, and all goes on later."""
    process = start(small_disk, *ONE)
    wait_until(lambda: in_mid_run(small_disk))
    other = small_disk / "other"
    with other.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    talk = ended(process)
    assert process.returncode == 1, talk
    assert talk.count("nothing more can be written") == 1
    other.unlink()
    done = run(small_disk, *ONE)
    assert done.returncode == 0, done.stderr
    assert_equal_results(small_disk, unbroken)
    assert TrialState.RUNNING not in [trial.state for trial in trials_of(small_disk)]


def memory_kib(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmSize:\s+(\d+)", status)
    assert found
    return int(found[1])


@pytest.mark.full
def test_memory_that_runs_out_is_met_with_micro_batches(tmp_path: Path) -> None:
    """A run that does not fit runs in halves of its batches, and the tables say so."""
    large = ["train.batch_size=1024", "train.epochs=1", "net.template=resnet11-t64"]
    large += ['net.variants=["1x64d"]', *ONE]
    process = start(tmp_path, *large)
    wait_until(lambda: num_running(tmp_path) > 0)
    executor = executor_of(process)
    limit(executor, resource.RLIMIT_AS, (memory_kib(executor) + 1_200_000) * 1024)
    talk = ended(process)
    assert process.returncode == 0, talk
    assert "each batch in 2 micro-batches" in talk
    runs = runs_of(tmp_path)
    assert (runs.num_micro_batches >= 2).all()
    assert "out_of_memory" in runs.lost_attempts[0]


@pytest.mark.full
def test_executors_of_another_version_are_refused(tmp_path: Path) -> None:
    """The package is upgraded under a running study: its runs are not mixed."""
    package = tmp_path / "installed" / "resnext_ablate"
    shutil.copytree(Path(__file__).parents[1] / "resnext_ablate", package)
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    process = start(tmp_path, *ONE, environment=environment)
    wait_until(lambda: in_mid_run(tmp_path))
    source = package / "__init__.py"
    text = source.read_text()
    source.write_text(re.sub(r'__version__ = "(.*?)"', r'__version__ = "9.9"', text))
    os.kill(executor_of(process), signal.SIGKILL)
    talk = ended(process)
    assert process.returncode == 1, talk
    assert "an executor runs package_version 9.9 in place of" in talk
    assert all(trial.state == TrialState.FAIL for trial in trials_of(tmp_path))


@pytest.mark.full
def test_time_zones_do_not_matter(unbroken: Path, tmp_path: Path) -> None:
    """A study begun in one time zone and ended in another is as any; times are UTC."""
    tokyo = {**os.environ, "TZ": "Asia/Tokyo"}
    process = start(tmp_path, *ONE, environment=tokyo)
    wait_until(lambda: in_mid_run(tmp_path))
    process.kill()
    process.communicate()
    honolulu = {**os.environ, "TZ": "Pacific/Honolulu"}
    done = run(tmp_path, *ONE, environment=honolulu)
    assert done.returncode == 0, done.stderr
    assert_equal_results(tmp_path, unbroken)
    times = [*runs_of(tmp_path).started_at, *attempts_of(tmp_path).ended_at]
    assert all(text.endswith("+00:00") for text in times)
    trials = trials_of(tmp_path)
    assert all(one.datetime_start <= one.datetime_complete for one in trials)


@pytest.mark.full
def test_clocks_that_jump_do_not_matter(unbroken: Path, tmp_path: Path) -> None:
    """Ten days on, then a year back, in mid-run: nothing hangs, ends or is lost by it.

    No lease of 30 s runs out, no time of training is wrong, the numbers are the same.
    """
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if library is None:
        pytest.skip("needs libfaketime")
    shift = tmp_path / "shift"
    shift.write_text("+0")
    faked = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(shift),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    process = start(tmp_path, *ONE, "run.lease_s=30", environment=faked)
    wait_until(lambda: in_mid_run(tmp_path))
    shift.write_text("+10d")
    wait_until(lambda: len(list(tmp_path.glob("results/tiny/runs/*.json"))) == 1)
    shift.write_text("-400d")
    talk = ended(process)
    assert process.returncode == 0, talk
    assert_equal_results(tmp_path, unbroken)
    runs = runs_of(tmp_path)
    assert runs.lost_attempts.isna().all()
    assert (runs.train_time_s < 240).all()
    trials = trials_of(tmp_path)
    assert any(one.datetime_start > one.datetime_complete for one in trials)
