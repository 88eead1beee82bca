"""A small real study, run by real processes, and what it left."""

import contextlib
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import optuna
import pandas as pd

STUDY = """\
name = "tiny"
question = "Does it survive?"

[net]
template = "resnet11-t8"
variants = ["1x8d", "2x5d"]

[data]
name = "digits"
crop_padding = 1
flip = false

[train]
epochs = 5
batch_size = 64
learning_rate = 0.05
precision = "fp32"

[run]
seeds = 2
executors = 2
device = "cpu"
"""

# What differs between two runs of the same cell without being a result.
WALL_CLOCK = [
    "train_time_s",
    "images_per_s",
    "roofline_pct",
    "peak_memory_mib",
    "started_at",
]
TRIES = ["lost_attempts"]


def command(folder: Path, *arguments: str) -> list[str]:
    if not (folder / "tiny.toml").exists():
        (folder / "tiny.toml").write_text(STUDY, encoding="utf-8")
    program = [sys.executable, "-c", "from resnext_ablate.face.cli import main; main()"]
    return [*program, "run", "tiny.toml", *arguments]


def run(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *arguments),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def start(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(folder, *arguments),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(reached: Callable[[], bool], *, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, "the study does not get there"
        time.sleep(0.02)


def runs_of(folder: Path) -> pd.DataFrame:
    frame = pd.read_csv(folder / "results" / "tiny" / "runs.csv")
    return frame.sort_values(["variant", "seed"]).reset_index(drop=True)


def trials_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{folder}/results/tiny/study.db"
    return optuna.load_study(study_name="tiny", storage=storage).get_trials()


def count(folder: Path, query: str) -> int:
    """What a query of the storage counts, read beside the scheduler."""
    path = folder / "results" / "tiny" / "study.db"
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        ) as db:
            return int(db.execute(query).fetchone()[0])
    except sqlite3.OperationalError:  # not there yet
        return 0


def in_mid_run(folder: Path) -> bool:
    """Whether a run has one or two epochs behind it, and others before it."""
    young = (
        "SELECT COUNT(*) FROM (SELECT COUNT(*) AS epochs FROM trials "
        "JOIN trial_intermediate_values USING (trial_id) "
        "WHERE state = 'RUNNING' GROUP BY trial_id) WHERE epochs <= 2"
    )
    return count(folder, young) > 0


def num_running(folder: Path) -> int:
    return count(folder, "SELECT COUNT(*) FROM trials WHERE state = 'RUNNING'")


def lost_runs(folder: Path) -> int:
    return count(folder, "SELECT COUNT(*) FROM trials WHERE state = 'FAIL'")


def children_of(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in path.read_text().split()]


def attempts_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "results" / "tiny" / "attempts.csv")


def assert_equal_results(folder: Path, other: Path) -> None:
    """Both studies have the same runs and epochs to the last bit, times aside."""
    for name, keys in (("runs", []), ("epochs", ["epoch"])):
        frames = []
        for one in (folder, other):
            frame = pd.read_csv(one / "results" / "tiny" / f"{name}.csv")
            frame = frame.sort_values(["variant", "seed", *keys], ignore_index=True)
            aside = [*WALL_CLOCK, *TRIES, "time_s"]
            frames.append(frame.drop(columns=aside, errors="ignore"))
        pd.testing.assert_frame_equal(*frames, check_exact=True)


def checkpoints_of(folder: Path) -> list[Path]:
    return sorted((folder / "results" / "tiny" / "checkpoints").glob("*/*.pt"))
