"""Kill storms: SIGINT, SIGTERM and SIGKILL at random, and nothing is lost or twice."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import optuna
import pytest
import storm
from optuna.trial import TrialState
from postgres import Server, server
from ray_cluster import cluster

from resnext_ablate.records.attempts import read_attempts
from studies import (
    assert_equal_results,
    checkpoints_of,
    children_of,
    run,
    start,
)

__all__ = ["cluster", "server"]  # fixtures


def check(
    folder: Path, *, url: str, num_cells: int, aftermath: storm.Aftermath
) -> None:
    """Every cell has its one result, in files and in the storage."""
    assert aftermath.lost == set()
    assert aftermath.twice == set()
    assert aftermath.unequal == set()
    place = f"sqlite:///{folder}/study.db" if url == "sqlite" else Server.driven(url)
    backend = optuna.storages.RDBStorage(place)
    trials = optuna.load_study(study_name=folder.name, storage=backend).get_trials()
    backend.engine.dispose()
    complete = [one for one in trials if one.state == TrialState.COMPLETE]
    assert len({one.user_attrs["cell"] for one in complete}) == len(complete)
    assert len(complete) == num_cells
    assert {one.state for one in trials} <= {TrialState.COMPLETE, TrialState.FAIL}
    lost = read_attempts(folder)
    assert len(lost) == len(trials) - len(complete)
    assert len({(one.cell, one.number) for one in lost}) == len(lost)


def test_sleeping_runs_survive_a_storm(tmp_path: Path) -> None:
    """60 cells on 4 executors under 12 kills, on SQLite."""
    folder = tmp_path / "storm"
    aftermath = storm.rage(
        folder,
        url="sqlite",
        num_cells=60,
        num_executors=4,
        num_kills=12,
        seconds_between=0.4,
        seed=1,
    )
    assert aftermath.num_kills >= 8
    check(folder, url="sqlite", num_cells=60, aftermath=aftermath)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2, 7))
def test_thousands_of_runs_survive_a_thousand_kills(tmp_path: Path, seed: int) -> None:
    """Five storms, each of 500 cells on 4 executors under about 230 kills."""
    folder = tmp_path / "storm"
    aftermath = storm.rage(
        folder,
        url="sqlite",
        num_cells=500,
        num_executors=4,
        num_kills=250,
        seconds_between=0.35,
        seed=seed,
    )
    print(aftermath, len(read_attempts(folder)), "attempts lost")
    check(folder, url="sqlite", num_cells=500, aftermath=aftermath)


@pytest.mark.full
def test_hundreds_of_runs_survive_on_postgresql(tmp_path: Path, server: Server) -> None:
    """600 cells on 4 executors under 300 kills."""
    folder = tmp_path / "storm"
    aftermath = storm.rage(
        folder,
        url=server.url,
        num_cells=600,
        num_executors=4,
        num_kills=300,
        seconds_between=0.35,
        seed=2,
    )
    print(aftermath, len(read_attempts(folder)), "attempts lost")
    check(folder, url=server.url, num_cells=600, aftermath=aftermath)


def executors_on_ray(place: Path) -> list[int]:
    """Executors that Ray's actors have started below a folder, and those actors."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode().split("\0")
            if "resnext_ablate.engines.executor" in words and str(place) in words[-2]:
                status = (path.parent / "status").read_text()
                parent = int(status.partition("PPid:")[2].split()[0])
                found += [int(path.parent.name), parent]
    return found


def disturb(
    folder: Path,
    *arguments: str,
    seed: int,
    num_kills: int,
    longest_s: float,
    on_ray: bool,
) -> None:
    """Kills executors and the scheduler of a real study at random, then ends it."""
    draw = random.Random(seed)
    process = start(folder, *arguments)
    for _ in range(num_kills):
        time.sleep(draw.uniform(1, longest_s))
        if process.poll() is not None:
            process.communicate()
            process = start(folder, *arguments)
            time.sleep(8)
        number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        with contextlib.suppress(OSError):
            of_scheduler = draw.random() < 0.3
            found = executors_on_ray(folder) if on_ray else children_of(process.pid)
            os.kill(
                draw.choice([process.pid] if of_scheduler or not found else found),
                number,
            )
    process.communicate(timeout=400)
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr


REAL = ["run.max_attempts=100", "run.executors=2", "run.checkpoint_every_s=0.05"]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nobody disturbed, on SQLite and this machine."""
    folder = tmp_path_factory.mktemp("quiet")
    done = run(folder, *REAL, "train.epochs=20")
    assert done.returncode == 0, done.stderr
    return folder


def states_at(place: str) -> list[TrialState]:
    backend = optuna.storages.RDBStorage(place)
    found = optuna.load_study(study_name="tiny", storage=backend).get_trials()
    backend.engine.dispose()
    return [trial.state for trial in found]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["sqlite", "sqlite again", "postgresql", "ray"])
def test_a_real_study_survives_a_storm(
    tmp_path: Path, quiet: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """Training runs under 12 kills: the tables are those of an undisturbed study.

    On Ray under 8, of executors, their actors and the scheduler.
    """
    arguments = [*REAL, "train.epochs=20"]
    place = f"sqlite:///{tmp_path}/results/tiny/study.db"
    if kind == "postgresql":
        url = request.getfixturevalue("server").url
        arguments.append(f"run.storage={url}")
        place = Server.driven(url)
    if kind == "ray":
        cluster = request.getfixturevalue("cluster")
        arguments += ["run.engine=ray", f"run.ray_address={cluster.address}"]
    disturb(
        tmp_path,
        *arguments,
        seed=len(kind),
        num_kills=8 if kind == "ray" else 12,
        longest_s=15 if kind == "ray" else 6,
        on_ray=kind == "ray",
    )
    assert_equal_results(tmp_path, quiet)
    states = states_at(place)
    assert states.count(TrialState.COMPLETE) == 4
    assert TrialState.RUNNING not in states
    assert checkpoints_of(tmp_path) == []
    print(kind, len(states) - 4, "attempts lost")
