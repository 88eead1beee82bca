"""Trackers that a study may feed as it runs: TensorBoard, Weights & Biases, MLflow.

The scheduler feeds them from what executors tell it, so executors need none of them.
They are copies for looking at: the run files stay the truth, and a tracker that fails
is left out for the rest of the study, which goes on.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from resnext_ablate.architecture.spec import MissingExtraError
from resnext_ablate.records.progress import Progress
from resnext_ablate.records.records import EpochRecord, RunRecord

SinkName = Literal["tensorboard", "wandb", "mlflow"]

_logger = logging.getLogger(__name__)

_METRICS = {
    "train_loss": "train/loss",
    "train_error_pct": "train/error_pct",
    "val_loss": "val/loss",
    "val_error_pct": "val/error_pct",
    "learning_rate": "train/learning_rate",
    "images_per_s": "train/images_per_s",
}
_TEST_ERROR = "test/error_pct"


class Sink(Protocol):
    """One tracker, with a run of its own for each variant and seed."""

    def epoch(self, variant: str, seed: int, record: EpochRecord) -> None:
        """Takes the numbers of an epoch."""

    def finish(self, run: RunRecord) -> None:
        """Takes the result of a run that has ended, however it did."""

    def close(self) -> None:
        """Ends what is still open."""


class Feed:
    """Hands epochs and results on to sinks, by name; one that fails is left out."""

    def __init__(self, sinks: dict[str, Sink]) -> None:
        self._sinks = dict(sinks)
        self._last_epochs: dict[tuple[str, int], int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for name in list(self._sinks):
            self._try(name, lambda sink: sink.close())

    def __call__(self, progress: Progress) -> None:
        if progress.epoch is not None:
            cell, record = progress.epoch.cell, progress.epoch.record
            key = (cell.variant, cell.seed)
            # A run that goes on from a checkpoint may tell an epoch twice.
            if record.epoch > self._last_epochs.get(key, 0):
                self._last_epochs[key] = record.epoch
                for name in list(self._sinks):
                    self._try(name, lambda sink: sink.epoch(*key, record))
        if (run := progress.finished) is not None:
            for name in list(self._sinks):
                self._try(name, lambda sink: sink.finish(run))

    def beside(
        self, on_progress: Callable[[Progress], None] | None
    ) -> Callable[[Progress], None]:
        """Tells the sinks first, then who else wants to know."""

        def tell(progress: Progress) -> None:
            self(progress)
            if on_progress is not None:
                on_progress(progress)

        return tell

    def _try(self, name: str, act: Callable[[Sink], None]) -> None:
        try:
            act(self._sinks[name])
        except Exception as error:  # Whatever a tracker raises, the study goes on.
            del self._sinks[name]
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            _logger.warning(
                "%s failed and is left out from here on: %s", name, first_line
            )


def open_feed(names: Sequence[SinkName], *, folder: Path, study: str) -> Feed:
    """A feed to the sinks of a study, which write below its folder by default.

    Raises:
        MissingExtraError: one is asked for that is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(
                f"run.sinks: {name} is not installed: pip install "
                f"'resnext-ablate[{name}]'"
            )
    return Feed({name: _SINKS[name](folder, study) for name in names})


def _metrics(record: EpochRecord) -> dict[str, float]:
    return {name: float(getattr(record, key)) for key, name in _METRICS.items()}


class _TensorBoard:
    """Event files in `tensorboard/`, one folder for each run."""

    def __init__(self, folder: Path, study: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = SummaryWriter
        self._folder = folder / "tensorboard"
        self._writers: dict[tuple[str, int], Any] = {}

    def epoch(self, variant: str, seed: int, record: EpochRecord) -> None:
        writer = self._writer(variant, seed)
        for name, value in _metrics(record).items():
            writer.add_scalar(name, value, record.epoch)
        writer.flush()

    def finish(self, run: RunRecord) -> None:
        """Tells the tracker how a run ended, and closes it there."""
        writer = self._writer(run.variant, run.seed)
        if run.test_error_pct is not None:
            writer.add_scalar(_TEST_ERROR, run.test_error_pct, len(run.epochs))
        self._writers.pop((run.variant, run.seed)).close()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _writer(self, variant: str, seed: int) -> Any:
        key = (variant, seed)
        if key not in self._writers:
            path = self._folder / f"{variant}-seed{seed}"
            self._writers[key] = self._open(log_dir=str(path))
        return self._writers[key]


class _WandB:
    """Runs of a project, offline unless WANDB_MODE says otherwise."""

    def __init__(self, folder: Path, study: str) -> None:
        import wandb

        self._wandb: Any = wandb
        self._folder = folder
        self._study = study
        self._runs: dict[tuple[str, int], Any] = {}

    def epoch(self, variant: str, seed: int, record: EpochRecord) -> None:
        self._run(variant, seed).log(_metrics(record), step=record.epoch)

    def finish(self, run: RunRecord) -> None:
        """Tells the tracker how a run ended, and closes it there."""
        tracked = self._run(run.variant, run.seed)
        if run.test_error_pct is not None:
            tracked.summary[_TEST_ERROR] = run.test_error_pct
        self._runs.pop((run.variant, run.seed)).finish(
            exit_code=0 if run.state in ("complete", "pruned") else 1
        )

    def close(self) -> None:
        for tracked in self._runs.values():
            tracked.finish(exit_code=1)

    def _run(self, variant: str, seed: int) -> Any:
        key = (variant, seed)
        if key not in self._runs:
            self._runs[key] = self._wandb.init(
                project=self._study,
                name=f"{variant} seed {seed}",
                group=variant,
                config={"variant": variant, "seed": seed},
                dir=str(self._folder),
                mode=os.environ.get("WANDB_MODE", "offline"),
                reinit="create_new",
            )
        return self._runs[key]


class _MLflow:
    """Runs of an experiment in `mlflow.db`, or where MLFLOW_TRACKING_URI says."""

    def __init__(self, folder: Path, study: str) -> None:
        from mlflow.tracking import MlflowClient

        place = f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        uri = os.environ.get("MLFLOW_TRACKING_URI", place)
        self._client: Any = MlflowClient(tracking_uri=uri)
        known = self._client.get_experiment_by_name(study)
        self._experiment = (
            known.experiment_id if known else self._client.create_experiment(study)
        )
        self._runs: dict[tuple[str, int], str] = {}

    def epoch(self, variant: str, seed: int, record: EpochRecord) -> None:
        run = self._run(variant, seed)
        for name, value in _metrics(record).items():
            self._client.log_metric(run, name, value, step=record.epoch)

    def finish(self, run: RunRecord) -> None:
        """Tells the tracker how a run ended, and closes it there."""
        tracked = self._run(run.variant, run.seed)
        if run.test_error_pct is not None:
            self._client.log_metric(tracked, _TEST_ERROR, run.test_error_pct)
        good = run.state in ("complete", "pruned")
        self._client.set_terminated(tracked, status="FINISHED" if good else "FAILED")
        del self._runs[run.variant, run.seed]

    def close(self) -> None:
        for tracked in self._runs.values():
            self._client.set_terminated(tracked, status="KILLED")

    def _run(self, variant: str, seed: int) -> str:
        key = (variant, seed)
        if key not in self._runs:
            made = self._client.create_run(
                self._experiment,
                run_name=f"{variant} seed {seed}",
                tags={"variant": variant, "seed": str(seed)},
            )
            self._runs[key] = made.info.run_id
        return self._runs[key]


_SINKS: dict[str, Callable[[Path, str], Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}
