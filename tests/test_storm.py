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

from resnext_ablate.attempts import read_attempts
from studies import (
    assert_equal_results,
    checkpoints_of,
    children_of,
    run,
    start,
    trials_of,
)

__all__ = ["server"]  # a fixture


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
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_thousands_of_runs_survive_a_thousand_kills(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """2,000 cells on 4 executors under 1,000 kills; on PostgreSQL 600 under 300."""
    url, scale = "sqlite", 1.0
    if kind == "postgresql":
        url, scale = request.getfixturevalue("server").url, 0.3
    folder = tmp_path / "storm"
    num_cells = round(2000 * scale)
    aftermath = storm.rage(
        folder,
        url=url,
        num_cells=num_cells,
        num_executors=4,
        num_kills=round(1000 * scale),
        seconds_between=0.35,
        seed=2,
    )
    print(aftermath, len(read_attempts(folder)), "attempts lost")
    check(folder, url=url, num_cells=num_cells, aftermath=aftermath)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_a_real_study_survives_a_storm(tmp_path: Path, seed: int) -> None:
    """Training runs under 12 kills: the tables are those of an undisturbed study."""
    quiet, wild = tmp_path / "quiet", tmp_path / "wild"
    arguments = ["run.max_attempts=100", "run.executors=2", "train.epochs=20"]
    arguments += ["run.checkpoint_every_s=0.05"]
    for folder in (quiet, wild):
        folder.mkdir()
    assert run(quiet, *arguments).returncode == 0
    draw = random.Random(seed)
    process = start(wild, *arguments)
    for _ in range(12):
        time.sleep(draw.uniform(1, 6))
        if process.poll() is not None:
            process.communicate()
            process = start(wild, *arguments)
            time.sleep(8)
        number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        with contextlib.suppress(OSError):
            targets = [process.pid] if draw.random() < 0.3 else children_of(process.pid)
            os.kill(draw.choice(targets or [process.pid]), number)
    process.communicate(timeout=400)
    done = run(wild, *arguments)
    assert done.returncode == 0, done.stderr
    assert_equal_results(wild, quiet)
    states = [trial.state for trial in trials_of(wild)]
    assert states.count(TrialState.COMPLETE) == 4
    assert TrialState.RUNNING not in states
    assert checkpoints_of(wild) == []
