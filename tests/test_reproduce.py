"""`reproduce` as a person runs it: real processes, real runs, real interruptions."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from studies import wait_until

STUDIES = Path(__file__).parents[1] / "studies"
PROGRAM = [sys.executable, "-c", "from resnext_ablate.face.cli import main; main()"]
FOLDER = "table4_double_complexity-laptop"

TINY = """\
name = "table4_double_complexity"
question = "Does it reproduce?"

[net]
template = "resnet11-t8"
reference = "1x14d"
variants = ["1x14d", "resnext2.2.2-1x9d-t8", "4x5d", "1x8d", "2x5d"]
tolerance_pct = 60.0

[data]
name = "digits"
crop_padding = 1
flip = false

[train]
epochs = 2
batch_size = 64
precision = "fp32"
conv_forms = {}

[run]
seeds = 9
executors = 2
device = "cpu"

[profiles.laptop.run]
seeds = 2
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    studies = tmp_path / "studies"
    studies.mkdir()
    (studies / "table4_double_complexity.toml").write_text(TINY, encoding="utf-8")
    name = "table1_table2_complexity.toml"
    (studies / name).write_text((STUDIES / name).read_text("utf-8"), encoding="utf-8")
    return tmp_path


def reproduce(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, "reproduce", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
def test_interrupted_reproduction_goes_on_and_ends_in_verdicts(folder: Path) -> None:
    """Claims that share a study run it once; a stop loses nothing finished.

    Afterwards the same command trains nothing and says the same.
    """
    started = subprocess.Popen(
        [*PROGRAM, "reproduce", "S2", "S7"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    runs = folder / "results" / FOLDER / "runs"
    wait_until(lambda: any(runs.glob("*.json")))
    started.send_signal(signal.SIGINT)
    _, talk = started.communicate(timeout=60)
    assert started.returncode == 130, talk
    assert "the same command goes on" in talk
    kept = {path.name: path.read_bytes() for path in runs.glob("*.json")}
    assert 1 <= len(kept) < 10

    done = reproduce(folder, "S2", "S7", "C1", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"study {FOLDER}: Does it reproduce?") == 1
    assert {name: (runs / name).read_bytes() for name in kept} == kept
    assert len(list(runs.glob("*.json"))) == 10
    answer = json.loads(done.stdout)
    assert [row["claim"] for row in answer["claims"]] == ["S2", "S2", "S7", "S7", "C1"]
    assert answer["verdicts"]["C1"] == "consistent"
    assert {*answer["verdicts"].values()} <= {"consistent", "contradicted", "undecided"}
    written = folder / "results" / "claims-laptop"
    assert {path.suffix for path in written.iterdir()} == {
        ".csv",
        ".html",
        ".md",
        ".parquet",
        ".tex",
    }
    assert (folder / "results" / FOLDER / "report.html").exists()

    again = reproduce(folder, "S2", "S7", "C1", "--json")
    assert again.stdout == done.stdout
    assert "all runs are there" in again.stderr


@pytest.mark.slow
def test_failed_runs_end_with_3_and_are_counted(folder: Path) -> None:
    """Runs that diverge leave a claim without results, not without an answer."""
    done = reproduce(folder, "S2", "run.seeds=1", "train.learning_rate=1e30")
    assert done.returncode == 3, done.stderr
    assert "5 of 5 runs failed" in done.stderr
    assert "not run" in done.stdout


def test_list_tells_claims_and_their_results(folder: Path) -> None:
    """Without arguments nothing runs: every claim with what there is of it."""
    done = reproduce(folder, "--json")
    listed = {row["claim"]: row for row in json.loads(done.stdout)}
    assert listed["S1"]["studies"] == ["table3_cardinality_vs_width"]
    assert listed["S1"]["results"] == {}
    assert listed["S6"]["studies"] == []
    assert not (folder / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["S9"], "there is no claim 'S9'; there are S1,"),
        (["S6"], "claim S6 is not tested here"),
        (["S2", "name=x"], "override name: a claim finds its study's results"),
        (["train.epochs=1"], "name the claims"),
        (["S1"], "study file studies/table3_cardinality_vs_width.toml: is not there"),
        (["S2", "--profile", "lap"], "no profile 'lap' (did you mean 'laptop'?)"),
        (["S2", "train.epocs=1"], "override train.epocs: unknown key 'epocs'"),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing(
    folder: Path, arguments: list[str], message: str
) -> None:
    """Bad input ends with 2 before anything runs."""
    done = reproduce(folder, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "results").exists()
