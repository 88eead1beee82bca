"""Trackers are fed each epoch, and one that fails costs the study nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import studies
from resnext_ablate.architecture.spec import MissingExtraError
from resnext_ablate.records import sinks
from resnext_ablate.records.progress import EpochEnd, Progress
from resnext_ablate.records.records import Cell, EpochRecord, RunRecord

CELL = Cell("abc", "2x5d", 1)


def epoch(number: int) -> EpochRecord:
    return EpochRecord(
        epoch=number,
        train_loss=1.0 / number,
        train_error_pct=20.0 / number,
        val_loss=1.1 / number,
        val_error_pct=22.0 / number,
        learning_rate=0.1,
        time_s=1.0,
        images_per_s=500.0,
        peak_memory_mib=100.0,
    )


def finished(state: str = "complete") -> RunRecord:
    return RunRecord(
        cell="abc",
        variant="2x5d",
        seed=1,
        state=state,  # type: ignore[arg-type]
        reason="",
        device="cpu",
        precision="fp32",
        data_checksum="",
        started_at="2026-01-02T03:04:05+00:00",
        environment={},
        epochs=(epoch(1), epoch(2)),
        test_error_pct=9.5,
    )


def said(*, end: EpochEnd | None = None, run: RunRecord | None = None) -> Progress:
    return Progress(
        num_planned=1,
        num_complete=0,
        num_failed=0,
        running=(),
        eta_s=None,
        epoch=end,
        finished=run,
    )


def play(feed: sinks.Feed) -> None:
    """One run of two epochs, the first told twice."""
    with feed:
        for number in (1, 1, 2):
            feed(said(end=EpochEnd(CELL, epoch(number))))
        feed(said(run=finished()))


class Failing:
    """A tracker that breaks at the first epoch."""

    def __init__(self) -> None:
        self.calls = 0

    def epoch(self, variant: str, seed: int, record: EpochRecord) -> None:
        self.calls += 1
        raise OSError("the tracker's disk is full\nsecond line")

    def finish(self, run: RunRecord) -> None:
        self.calls += 1

    def close(self) -> None:
        self.calls += 1


class Noting:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def epoch(self, variant: str, seed: int, record: EpochRecord) -> None:
        self.told.append((variant, seed, record.epoch))

    def finish(self, run: RunRecord) -> None:
        self.told.append(run.state)

    def close(self) -> None:
        self.told.append("closed")


def test_failing_sink_is_left_out_once(caplog: pytest.LogCaptureFixture) -> None:
    """What a tracker raises is said once; it is asked no more, the others go on."""
    failing, noting = Failing(), Noting()
    play(sinks.Feed({"failing": failing, "noting": noting}))
    assert failing.calls == 1
    assert noting.told == [("2x5d", 1, 1), ("2x5d", 1, 2), "complete", "closed"]
    assert [record.getMessage() for record in caplog.records] == [
        "failing failed and is left out from here on: the tracker's disk is full"
    ]


def test_missing_sink_is_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tracker that is not installed stops the study at once, with the remedy."""
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"resnext-ablate\[mlflow\]"):
        sinks.open_feed(("mlflow",), folder=tmp_path, study="tiny")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All numbers of one folder of event files, by tag."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(one.step, one.value) for one in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


@pytest.mark.slow
def test_tensorboard_reads_what_was_fed(tmp_path: Path) -> None:
    """Every metric of every epoch comes back from the event files, each once."""
    pytest.importorskip("tensorboard")
    play(sinks.open_feed(("tensorboard",), folder=tmp_path, study="tiny"))
    found = scalars(tmp_path / "tensorboard" / "2x5d-seed1")
    assert found["val/error_pct"] == [(1, 22.0), (2, 11.0)]
    assert found["train/loss"] == [(1, 1.0), (2, 0.5)]
    assert found["test/error_pct"] == [(2, 9.5)]
    assert len(found) == 7


@pytest.mark.slow
# They warn of what others deprecate.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_other_trackers_take_a_run(tmp_path: Path, name: str) -> None:
    """Offline, without an account, a run is kept in the study's folder."""
    pytest.importorskip(name)
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); import test_sinks as t; "
        "from pathlib import Path; s = t.sinks; f = Path(sys.argv[1]); "
        f"t.play(s.open_feed(({name!r},), folder=f, study='tiny'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stderr
    if name == "wandb":
        assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
        return
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "val/error_pct")
    assert [(one.step, one.value) for one in history] == [(1, 22.0), (2, 11.0)]


@pytest.mark.slow
def test_real_study_feeds_tensorboard(tmp_path: Path) -> None:
    """The scheduler's own epochs arrive, with the numbers of the run files."""
    pytest.importorskip("tensorboard")
    done = studies.run(
        tmp_path,
        "run.sinks=['tensorboard']",
        "run.seeds=1",
        "train.epochs=2",
        "net.variants=['1x8d']",
    )
    assert done.returncode == 0, done.stderr
    from resnext_ablate.records.tables import read_tables

    folder = tmp_path / "results" / "tiny"
    epochs = read_tables(folder).epochs
    found = scalars(folder / "tensorboard" / "1x8d-seed0")
    told = [value for _, value in found["val/error_pct"]]
    assert told == pytest.approx(epochs["val_error_pct"].tolist(), rel=1e-6)
