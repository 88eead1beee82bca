"""Executors as jobs: preempted, lost and given back, with submitit's local jobs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import studies
from resnext_ablate.engines.slurm_engine import Mailbox

SLURM = ["run.engine=slurm", "run.slurm_cluster=local"]


def test_lines_come_whole_and_in_order(tmp_path: Path) -> None:
    """A mailbox gives each line once, in order, those of a second life last."""
    first = Mailbox(tmp_path)
    for number in range(12):
        first.put("to", {"number": number})
    second = Mailbox(tmp_path)
    second.put("to", {"number": 12})
    assert [line["number"] for line in first.take("to")] == list(range(13))
    assert first.take("to") == []


def test_half_written_lines_are_not_seen(tmp_path: Path) -> None:
    """What another process is still writing is no line yet."""
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / ".1-1.half").write_text('{"numb')
    assert Mailbox(tmp_path).take("to") == []


def test_missing_submitit_is_named(tmp_path: Path) -> None:
    """Without the extra the study says what to install, with code 4."""
    (tmp_path / "submitit.py").write_text("raise ImportError('no submitit')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = studies.run(tmp_path, *SLURM, environment=environment)
    assert done.returncode == 4, done.stderr
    assert 'pip install "resnext-ablate[slurm]"' in done.stderr


def test_machine_without_slurm_is_told(tmp_path: Path) -> None:
    """A study for Slurm needs a login node, and says how to try it without."""
    pytest.importorskip("submitit")
    done = studies.run(tmp_path, "run.engine=slurm")
    assert done.returncode == 2, done.stderr
    assert "no sbatch" in done.stderr
    assert 'run.slurm_cluster = "local"' in done.stderr


def jobs_of(folder: Path) -> list[int]:
    """The processes of a study's jobs, which submitit signals when they are to go."""
    place = str(folder / "results" / "tiny" / "jobs")
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if "submitit.core._submit" in words and place in words:
            found.append(int(path.parent.name))
    return found


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_preempted_and_killed_jobs_change_no_result(tmp_path: Path) -> None:
    """One job is preempted and queued again, one is killed: all equals a local study.

    The preempted run goes on from its checkpoint, wherever it goes on.
    """
    pytest.importorskip("submitit")
    local, jobs = tmp_path / "local", tmp_path / "jobs"
    local.mkdir()
    jobs.mkdir()
    overrides = ["train.epochs=8", "run.checkpoint_every_s=0.1"]
    done = studies.run(local, *overrides)
    assert done.returncode == 0, done.stderr
    process = studies.start(jobs, *overrides, *SLURM)
    studies.wait_until(lambda: studies.in_mid_run(jobs), timeout_s=200)
    os.kill(jobs_of(jobs)[0], signal.SIGUSR2)
    studies.wait_until(lambda: studies.lost_runs(jobs) > 0, timeout_s=100)
    studies.wait_until(lambda: len(jobs_of(jobs)) == 2, timeout_s=100)
    studies.wait_until(lambda: studies.in_mid_run(jobs), timeout_s=200)
    os.kill(jobs_of(jobs)[-1], signal.SIGKILL)
    _, talk = process.communicate(timeout=300)
    assert process.returncode == 0, talk
    studies.assert_equal_results(jobs, local)
    assert "RUNNING" not in [trial.state.name for trial in studies.trials_of(jobs)]
    causes = set(studies.attempts_of(jobs).cause)
    assert "terminated" in causes
    assert jobs_of(jobs) == []


@pytest.mark.full
def test_a_job_may_hold_two_processes(tmp_path: Path) -> None:
    """Two train each run as they do without Slurm, and the end prints no traceback."""
    pytest.importorskip("submitit")
    tables = []
    for engine in ([], SLURM):
        folder = tmp_path / ("slurm" if engine else "local")
        folder.mkdir()
        two = ["run.devices_per_run=2", "run.executors=1", *engine]
        done = studies.run(folder, *two)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        tables.append(studies.runs_of(folder))
    own, theirs = tables
    assert set(theirs["num_devices"]) == {2}
    assert theirs["test_loss"].tolist() == own["test_loss"].tolist()
