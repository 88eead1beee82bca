"""What a study leaves on disk, and the tables read from it.

A study's folder holds `study.toml` (the resolved study file), `plan.json` (nets and
cells), `study.db` (Optuna's storage), `runs/CELL.json` (one file per finished run, the
truth about results) and the tables derived from those.
"""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from resnext_ablate import __version__
from resnext_ablate.config import StudyConfig, load_study
from resnext_ablate.spec import InputError, ResNeXtSpec, spec_from_dict

SCHEMA_VERSION = 1
STUDY_FILE = "study.toml"
PLAN_FILE = "plan.json"
RUNS_FOLDER = "runs"
LOCK_FILE = ".scheduler.lock"

RunState = Literal["complete", "diverged", "failed"]


@dataclass(frozen=True, kw_only=True)
class NetRecord:
    """One variant of a study with its complexity and match certificate."""

    variant: str
    """Label within the study, such as `32x4d`."""
    name: str
    spec: dict[str, Any]
    image_size: int
    macs: int
    params: int
    params_without_bn: int
    activations: int
    fvcore_macs: int
    """Conv + linear as fvcore counts them; equals `macs`."""
    fvcore_total: int
    """fvcore's total in eval mode, batch normalisation and pooling included."""
    macs_error_pct: float
    params_error_pct: float
    activations_error_pct: float
    is_reference: bool


@dataclass(frozen=True, slots=True)
class Cell:
    """A run's place in the plan: one variant with one seed."""

    id: str
    variant: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything a study will run."""

    nets: tuple[NetRecord, ...]
    """The reference first."""
    cells: tuple[Cell, ...]
    provenance: dict[str, str]

    def net(self, variant: str) -> NetRecord:
        return next(net for net in self.nets if net.variant == variant)


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch of one run. Errors are percent wrong, time in seconds."""

    epoch: int
    train_loss: float
    train_error_pct: float
    val_loss: float
    val_error_pct: float
    learning_rate: float
    time_s: float
    images_per_s: float
    peak_memory_mib: float


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One finished run, as its run file holds it."""

    cell: str
    variant: str
    seed: int
    state: RunState
    reason: str
    """Why the run did not complete; empty where it did."""
    device: str
    precision: str
    data_checksum: str
    started_at: str
    """UTC, ISO 8601."""
    environment: dict[str, str]
    epochs: tuple[EpochRecord, ...] = ()
    test_loss: float | None = None
    test_error_pct: float | None = None
    correct_bits: str = ""
    """Base64 of one bit per test image, set where the last weights were right."""
    train_time_s: float | None = None
    images_per_s: float | None = None
    peak_memory_mib: float | None = None


@dataclass(frozen=True)
class StudyTables:
    """A study as tables; only finished runs appear."""

    study: str
    config: StudyConfig
    provenance: dict[str, str]
    nets: pd.DataFrame
    """One row per variant, the reference first."""
    runs: pd.DataFrame
    """One row per finished run, failed and diverged ones included."""
    epochs: pd.DataFrame
    num_planned: int
    """Runs in the plan."""


def cell_id(spec: ResNeXtSpec, seed: int) -> str:
    """Names the run of a net with a seed; also its file's name."""
    text = json.dumps([spec.to_dict(), seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def pack_bits(correct: npt.NDArray[np.bool_]) -> str:
    """One bit per test image, as text for a run file."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode()


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is whole or absent, whatever is killed or loses power."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_plan(plan: Plan, folder: Path) -> None:
    values = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(plan)}
    write_atomically(folder / PLAN_FILE, json.dumps(values, indent=1))


def read_plan(folder: Path) -> Plan:
    """The plan of a study's folder.

    Raises:
        InputError: there is none, or another version of the package wrote it.
    """
    path = folder / PLAN_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("schema_version") != SCHEMA_VERSION:
            raise InputError(f"{path}: written by another version of this package.")
        return Plan(
            nets=tuple(NetRecord(**net) for net in values["nets"]),
            cells=tuple(Cell(**cell) for cell in values["cells"]),
            provenance=values["provenance"],
        )
    except FileNotFoundError:
        raise InputError(
            f"{folder} holds no study ({PLAN_FILE} is missing); "
            "resnext-ablate ls shows the studies of a results folder."
        ) from None
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged: {error}.") from None


def run_path(folder: Path, cell: str) -> Path:
    return folder / RUNS_FOLDER / f"{cell}.json"


def write_run(record: RunRecord, folder: Path) -> None:
    values = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(record)}
    # NaN is no JSON; a loss that is not finite ends the run before it gets here.
    text = json.dumps(values, allow_nan=False)
    write_atomically(run_path(folder, record.cell), text)


def read_run(folder: Path, cell: str) -> RunRecord | None:
    """The finished run of a cell; None where it has none, or a damaged one."""
    try:
        values = json.loads(run_path(folder, cell).read_text(encoding="utf-8"))
        if values.pop("schema_version") != SCHEMA_VERSION:
            return None
        epochs = tuple(EpochRecord(**epoch) for epoch in values.pop("epochs"))
        return RunRecord(epochs=epochs, **values)
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None


def read_runs(folder: Path, plan: Plan) -> tuple[RunRecord, ...]:
    """The finished runs of a plan, in its order."""
    records = (read_run(folder, cell.id) for cell in plan.cells)
    return tuple(record for record in records if record is not None)


def environment() -> dict[str, str]:
    """Versions and git commit of what is about to run."""
    packages = ("torch", "torchvision", "optuna", "fvcore", "pandas", "plotly", "numpy")
    versions = {
        f"{name}_version": importlib.metadata.version(name) for name in packages
    }
    commit, dirty = _git_state()
    return {
        "package_version": __version__,
        **versions,
        "python_version": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "git_commit": commit,
        "git_dirty": dirty,
    }


def read_tables(folder: Path) -> StudyTables:
    """The tables of a study, from its plan and run files.

    Raises:
        InputError: the folder holds no study.
    """
    plan = read_plan(folder)
    config = load_study(folder / STUDY_FILE)
    runs = read_runs(folder, plan)
    return StudyTables(
        study=config.name,
        config=config,
        provenance=plan.provenance,
        nets=_nets_frame(plan),
        runs=_runs_frame(config.name, plan, runs),
        epochs=_epochs_frame(config.name, runs),
        num_planned=len(plan.cells),
    )


def write_table(frame: pd.DataFrame, stem: Path, *, provenance: dict[str, str]) -> None:
    """Writes `stem`.csv and `stem`.parquet; Parquet carries the provenance in attrs."""
    frame = frame.copy()
    frame.attrs = dict(provenance)
    for suffix, write in (
        (".csv", lambda path: frame.to_csv(path, index=False)),
        (".parquet", lambda path: frame.to_parquet(path, index=False)),
    ):
        temporary = stem.with_name(f".{stem.name}{suffix}")
        write(temporary)
        temporary.replace(stem.with_name(stem.name + suffix))


def write_tables(tables: StudyTables, folder: Path) -> None:
    """Writes the `runs` and `epochs` tables as CSV and Parquet."""
    write_table(tables.runs, folder / "runs", provenance=tables.provenance)
    write_table(tables.epochs, folder / "epochs", provenance=tables.provenance)


def scheduler_process(folder: Path) -> int | None:
    """Process number of the scheduler that runs a study now; None where none does."""
    path = folder / LOCK_FILE
    if not path.exists():
        return None
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(file.read() or 0)
    return None


_EPOCH_COLUMNS = [field.name for field in dataclasses.fields(EpochRecord)]


def _nets_frame(plan: Plan) -> pd.DataFrame:
    rows = []
    for net in plan.nets:
        spec = spec_from_dict(net.spec)
        values = dataclasses.asdict(net)
        del values["spec"]
        rows.append(
            {
                "variant": net.variant,
                "name": net.name,
                "cardinality": spec.cardinality,
                "base_width": spec.base_width,
                "bottleneck_widths": ",".join(map(str, spec.bottleneck_widths)),
                "depth": spec.depth,
                "template_width": spec.template_width,
                **values,
            }
        )
    return pd.DataFrame(rows)


def _runs_frame(study: str, plan: Plan, runs: Sequence[RunRecord]) -> pd.DataFrame:
    rows = []
    for run in runs:
        net = plan.net(run.variant)
        spec = spec_from_dict(net.spec)
        last = run.epochs[-1] if run.state == "complete" else None
        rows.append(
            {
                "study": study,
                "variant": run.variant,
                "name": net.name,
                "cardinality": spec.cardinality,
                "base_width": spec.base_width,
                "depth": spec.depth,
                "template_width": spec.template_width,
                "seed": run.seed,
                "state": run.state,
                "reason": run.reason,
                "macs": net.macs,
                "fvcore_macs": net.fvcore_macs,
                "params": net.params,
                "activations": net.activations,
                "epochs": len(run.epochs),
                "train_loss": last.train_loss if last else None,
                "train_error_pct": last.train_error_pct if last else None,
                "val_loss": last.val_loss if last else None,
                "val_error_pct": last.val_error_pct if last else None,
                "test_loss": run.test_loss,
                "test_error_pct": run.test_error_pct,
                "train_time_s": run.train_time_s,
                "images_per_s": run.images_per_s,
                "peak_memory_mib": run.peak_memory_mib,
                "device": run.device,
                "precision": run.precision,
                "torch_version": run.environment.get("torch_version", ""),
                "package_version": run.environment.get("package_version", ""),
                "git_commit": run.environment.get("git_commit", ""),
                "data_checksum": run.data_checksum,
                "started_at": run.started_at,
            }
        )
    frame = pd.DataFrame(rows, columns=[*_RUN_COLUMNS])
    return frame.astype(dict.fromkeys(_MEASURED, float))


_RUN_COLUMNS = (
    "study",
    "variant",
    "name",
    "cardinality",
    "base_width",
    "depth",
    "template_width",
    "seed",
    "state",
    "reason",
    "macs",
    "fvcore_macs",
    "params",
    "activations",
    "epochs",
    "train_loss",
    "train_error_pct",
    "val_loss",
    "val_error_pct",
    "test_loss",
    "test_error_pct",
    "train_time_s",
    "images_per_s",
    "peak_memory_mib",
    "device",
    "precision",
    "torch_version",
    "package_version",
    "git_commit",
    "data_checksum",
    "started_at",
)
_MEASURED = (
    "train_loss",
    "train_error_pct",
    "val_loss",
    "val_error_pct",
    "test_loss",
    "test_error_pct",
    "train_time_s",
    "images_per_s",
    "peak_memory_mib",
)


def _epochs_frame(study: str, runs: Sequence[RunRecord]) -> pd.DataFrame:
    rows = [
        {
            "study": study,
            "variant": run.variant,
            "seed": run.seed,
            **dataclasses.asdict(epoch),
        }
        for run in runs
        for epoch in run.epochs
    ]
    return pd.DataFrame(rows, columns=["study", "variant", "seed", *_EPOCH_COLUMNS])


def _git_state() -> tuple[str, str]:
    """Commit of the package's checkout and whether it differs; empty when installed."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        tracked = git("ls-files", "--error-unmatch", "spec.py")
        if not tracked:
            return "", ""
        return git("rev-parse", "HEAD"), "yes" if git("status", "-s", ".") else "no"
    except OSError:
        return "", ""


def cpu_name() -> str:
    """The CPU's model name as its vendor writes it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()
