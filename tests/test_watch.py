"""The live view of a study, on a terminal and off it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from resnext_ablate.face import results_commands, terminal
from resnext_ablate.records.progress import Progress, RunningRun

REAL = Path(__file__).parents[1] / "results" / "cifar10_jpeg"
RUNNING = RunningRun(variant="4x6d", seed=1, epoch=3, val_error_pct=7.5)


def test_finished_study_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """What no process runs is told once, and the command ends."""
    results_commands.status(str(REAL), watch=True)
    assert capsys.readouterr().out == (
        "cifar10_jpeg: 4 of 4 runs complete, 0 failed; not running\n"
    )


def test_time_left_follows_from_the_run_files() -> None:
    """Runs that are done tell how long the epochs of those under way still take."""
    epochs = 3
    one = RunningRun(variant="1x16d", seed=5, epoch=1, val_error_pct=None)
    progress = results_commands._progress(REAL, running=(one,), num_epochs=epochs)
    assert progress.num_complete == progress.num_planned == 4
    # Two epochs are left, and those of 1x16d took 570.7 s for three.
    assert progress.eta_s == pytest.approx(2 * 570.74 / 3, rel=0.01)


def test_terminal_gets_a_bar_for_each_run() -> None:
    """Study and runs under way stand with a bar, epochs and validation error."""
    progress = Progress(
        num_planned=12, num_complete=5, num_failed=1, running=(RUNNING,), eta_s=95
    )
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=110, color_system=None)
    console.print(terminal._watched("tiny", progress, num_epochs=20))
    first, second = out.getvalue().splitlines()
    assert "6 of 12 runs, 1 failed" in first
    assert "about 1 min 35 s left" in first
    assert second.startswith("  4x6d seed 1")
    assert "epoch 3 of 20" in second
    assert "7.50 % wrong" in second
    assert "\u2501" in first


def test_plain_lines_are_half_a_minute_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log gets a line every 30 s."""
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    progress = Progress(
        num_planned=2, num_complete=0, num_failed=0, running=(RUNNING,), eta_s=None
    )
    with terminal.StudyWatch("tiny") as show:
        for clock[0] in (0.0, 5.0, 29.0, 30.0, 59.0, 60.0):
            show(progress, num_epochs=20)
    assert (
        capsys.readouterr().out.splitlines()
        == ["tiny: 0 of 2 runs | 4x6d seed 1 epoch 3 (7.5 %)"] * 3
    )
