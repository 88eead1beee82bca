"""What a study leaves on disk: its plan and a file per run.

A study's folder holds `study.toml` (the resolved study file), `plan.json` (nets and
cells), `study.db` (Optuna's storage), `runs/CELL.json` (one file per finished run, the
truth about results) and the tables and report derived from those.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from resnext_ablate import __version__
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec

SCHEMA_VERSION = 1
STUDY_FILE = "study.toml"
PLAN_FILE = "plan.json"
RUNS_FOLDER = "runs"
CHECKPOINTS_FOLDER = "checkpoints"
LOCK_FILE = ".scheduler.lock"

_CELL_ID = re.compile(r"[0-9a-f]{16}")
RunState = Literal["complete", "pruned", "diverged", "failed"]
FAILURES: tuple[RunState, ...] = ("diverged", "failed")


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
class Trial:
    """One net of a search; its runs are the cells of its variant and `run.seeds`."""

    number: int
    """Its place in the search, from 0."""
    variant: str
    params: dict[str, float]
    """What the sampler said, each from 0 to 1."""
    pruned_at: int | None = None
    """Rung, or seed of several, from 1, where the pruner stopped it."""
    is_audited: bool = False
    """Pruned, but drawn to be trained to the end all the same."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything a study will run; that of a search grows before each run."""

    nets: tuple[NetRecord, ...]
    """The reference first."""
    cells: tuple[Cell, ...]
    provenance: dict[str, str]
    trials: tuple[Trial, ...] = ()
    """Of a search."""

    def net(self, variant: str) -> NetRecord:
        return next(net for net in self.nets if net.variant == variant)


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch of one run. Errors are percent wrong, times of its training part."""

    epoch: int
    """From 1."""
    train_loss: float
    """As minimised, label smoothing included, on augmented batches as they passed."""
    train_error_pct: float
    """On the same augmented batches."""
    val_loss: float
    val_error_pct: float
    learning_rate: float
    """At the last step."""
    time_s: float
    images_per_s: float
    peak_memory_mib: float
    """Largest since the run began: of tensors on CUDA, of the process on a CPU."""


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
    num_micro_batches: int = 1
    """Parts of each batch whose gradients add up, where memory was short. Batch
    normalisation then sees parts, so that such runs do not compare with whole ones."""
    num_devices: int = 1
    """That trained it together; batch normalisation saw each one's part of a batch."""
    num_fused: int = 1
    """Seeds of the variant that were trained as one net, this one among them. Times are
    this one's share; the peak memory is that of all."""
    test_loss: float | None = None
    test_error_pct: float | None = None
    correct_bits: str = ""
    """Base64 of one bit per test image, set where the last weights were right."""
    train_time_s: float | None = None
    images_per_s: float | None = None
    roofline_pct: float | None = None
    """Of the images per second that the net's layers allow on this device, by its
    measured peaks; None in runs of earlier releases."""
    peak_memory_mib: float | None = None


def is_cell_id(text: object) -> bool:
    """Whether this may name a file: plans and storages may come from strangers."""
    return isinstance(text, str) and _CELL_ID.fullmatch(text) is not None


def cell_id(spec: ResNeXtSpec, seed: int) -> str:
    """Names the run of a net with a seed; also its file's name."""
    text = json.dumps([spec.to_dict(), seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def pack_bits(correct: npt.NDArray[np.bool_]) -> str:
    """One bit per test image, as text for a run file."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode()


def unpack_bits(text: str, *, num_images: int) -> npt.NDArray[np.bool_]:
    """(num_images,): which test images a run got right, as `pack_bits` wrote them."""
    packed = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    return np.unpackbits(packed, count=num_images).astype(bool)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file that is whole or absent, whatever is killed or loses power.

    Raises:
        OSError: it cannot be written; what stood there before still does.
    """
    with _written_beside(path, content) as temporary:
        temporary.replace(path)


def create_atomically(path: Path, content: str | bytes) -> bool:
    """Like `write_atomically`, but what stands there already stays: then False."""
    with _written_beside(path, content) as temporary:
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP) or path.exists():
                raise
            temporary.replace(path)  # A file system without hard links.
        return True


@contextlib.contextmanager
def _written_beside(path: Path, content: str | bytes) -> Iterator[Path]:
    """A file on disk in the same folder, which is brought to its place or goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
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
        values = read_versioned(path)
        return Plan(
            nets=tuple(NetRecord(**net) for net in values["nets"]),
            cells=tuple(_cell(cell) for cell in values["cells"]),
            provenance=values["provenance"],
            trials=tuple(Trial(**trial) for trial in values.get("trials", ())),
        )
    except FileNotFoundError:
        raise InputError(
            f"{folder} holds no study ({PLAN_FILE} is missing); "
            "resnext-ablate ls shows the studies of a results folder."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged: {error}.") from None


def _cell(values: dict[str, Any]) -> Cell:
    cell = Cell(**values)
    if not is_cell_id(cell.id):
        raise ValueError(f"{cell.id!r} is no cell")
    return cell


def run_path(folder: Path, cell: str) -> Path:
    return folder / RUNS_FOLDER / f"{cell}.json"


def write_run(record: RunRecord, folder: Path) -> bool:
    """Writes a run's file. A cell's first result stays: a later one gives False."""
    return create_atomically(run_path(folder, record.cell), run_text(record))


def run_text(record: RunRecord) -> str:
    """A run as its file holds it."""
    values = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(record)}
    # NaN is no JSON; a loss that is not finite ends the run before it gets here.
    return json.dumps(values, allow_nan=False)


def read_run(folder: Path, cell: str) -> RunRecord | None:
    """The finished run of a cell; None where it has none, or a damaged one."""
    try:
        values = read_versioned(run_path(folder, cell))
        epochs = tuple(EpochRecord(**epoch) for epoch in values.pop("epochs"))
        return RunRecord(epochs=epochs, **values)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def read_runs(folder: Path, plan: Plan) -> tuple[RunRecord, ...]:
    """The finished runs of a plan, in its order."""
    records = (read_run(folder, cell.id) for cell in plan.cells)
    return tuple(record for record in records if record is not None)


def checkpoint_folder(folder: Path, cell: str) -> Path:
    return folder / CHECKPOINTS_FOLDER / cell


def remove_checkpoints(folder: Path, cell: str) -> None:
    """Removes the checkpoints of a run that is over."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(checkpoint_folder(folder, cell))


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that nothing more can be written where it was to be."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    return isinstance(error, OSError) and error.errno in full


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


def running_versions() -> dict[str, str]:
    """Versions that must be equal in all processes of a study."""
    return {
        "package_version": __version__,
        "torch_version": importlib.metadata.version("torch"),
        "python_version": platform.python_version(),
    }


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


def read_versioned(path: Path) -> dict[str, Any]:
    """The values of a file of ours.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is none of this version.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"holds a {type(values).__name__}, not an object")
    version = values.pop("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(f"has schema version {version}, not {SCHEMA_VERSION}")
    return values


def _git_state() -> tuple[str, str]:
    """Commit of the package's checkout and whether it differs; empty when installed."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        tracked = git("ls-files", "--error-unmatch", "records.py")
        if not tracked:
            return "", ""
        return git("rev-parse", "HEAD"), "yes" if git("status", "-s", "..") else "no"
    except OSError:
        return "", ""
