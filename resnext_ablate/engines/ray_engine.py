"""Executors on a Ray cluster: an actor for each, with the executor as its child.

Actors stay for the whole study, so that images are read once. What the child says comes
back through its actor, and so does a finished run's file: the scheduler writes it. No
folder needs to be shared. Where a node sees the study's folder, it keeps checkpoints
there, so that a run goes on from its last one on any such node.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import secrets
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnext_ablate.architecture.spec import InputError, MissingExtraError
from resnext_ablate.compute.hardware import TRAINING_ENVIRONMENT
from resnext_ablate.engines import execution, nodes
from resnext_ablate.engines.execution import Ending
from resnext_ablate.records import records
from resnext_ablate.records.config import StudyConfig

if TYPE_CHECKING:
    from types import ModuleType

_READ_S = 2.0
_LOG_TAIL = 2_000


class Relay:
    """On a node: an executor's process, what it is told and what it says."""

    def __init__(
        self, config: str, data_checksum: str, *, study_folder: str, study_id: str
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="resnext-ablate-"))
        (self._folder / records.RUNS_FOLDER).mkdir()
        self._log = self._folder / "executor.log"
        self._said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._process: subprocess.Popen[str] | None = None
        self._is_shared = _is_of_study(Path(study_folder), study_id)
        self._data_folder, self._refusal = nodes.images(config, data_checksum)
        if self._refusal:
            self._said.put(None)
            return
        with self._log.open("a", encoding="utf-8") as log:
            run = StudyConfig.model_validate_json(config).run
            self._process = execution.start_process(
                self._folder, log=log, num_processes=run.devices_per_run
            )
        threading.Thread(target=self._listen, daemon=True).start()

    def write(self, line: str) -> None:
        """Tells the executor something; a job is made to fit this node."""
        assert self._process is not None and self._process.stdin is not None
        values = nodes.fitted(json.loads(line), data_folder=self._data_folder)
        if job := values.get("job"):
            job["study_folder"] = str(self._folder)
            if not self._is_shared:
                job["checkpoint_root"] = str(self._folder)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(values) + "\n")
            self._process.stdin.flush()

    def read(self) -> list[str] | None:
        """What the executor has said since, within seconds; None once it has ended."""
        lines = []
        with contextlib.suppress(queue.Empty):
            line = self._said.get(timeout=_READ_S)
            while line is not None:
                lines.append(self._with_run(line))
                line = self._said.get_nowait()
            if not lines:
                return None
            self._said.put(None)
        return lines

    def ending(self) -> tuple[str, bool, str]:
        """Why the executor ended, whether by a signal, and the end of its log."""
        if self._process is None:
            return self._refusal, False, ""
        ending = execution.ending_of(self._process)
        log = self._log.read_text(encoding="utf-8")[-_LOG_TAIL:]
        return ending.reason, ending.by_signal, log

    def close(self) -> None:
        """Ends the executor and takes away what it left on this node."""
        if self._process is not None:
            execution.end_process(self._process)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _listen(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        with self._process.stdout:
            for line in self._process.stdout:
                self._said.put(line)
        self._said.put(None)

    def _with_run(self, line: str) -> str:
        """A message, with its run file where it tells of a finished run."""
        values = json.loads(line)
        if values["event"] != "finished":
            return line
        path = records.run_path(self._folder, values["cell"])
        values["run"] = path.read_text(encoding="utf-8")
        path.unlink()
        return json.dumps(values)


def _is_of_study(folder: Path, study_id: str) -> bool:
    """Whether this node sees the study's own folder, and may write there."""
    try:
        found = records.read_plan(folder).provenance.get("study_id")
    except InputError:
        return False
    return found == study_id and os.access(folder, os.W_OK)


class RayChannel:
    """The scheduler's end of an executor on the cluster."""

    def __init__(self, actor: Any, *, index: int, study_folder: Path) -> None:
        self._actor = actor
        self._folder = study_folder
        self._log = study_folder / execution.LOGS_FOLDER / f"executor-{index}.log"
        self._ending = Ending("", by_signal=False)
        self._has_spoken = False

    def write(self, line: str) -> None:
        self._actor.write.remote(line)

    def lines(self) -> Iterator[str]:
        """What the executor says until it ends; signs of life while it has no room."""
        import ray

        try:
            while True:
                answer = self._actor.read.remote()
                while not ray.wait([answer], timeout=2 * _READ_S)[0]:
                    yield json.dumps({"event": "alive"})
                lines = ray.get(answer)
                if lines is None:
                    break
                for line in lines:
                    self._has_spoken = True
                    yield self._without_run(line)
            reason, by_signal, log = ray.get(self._actor.ending.remote())
            self._ending = Ending(reason, by_signal=by_signal)
            with self._log.open("a", encoding="utf-8") as file:
                file.write(log)
        except ray.exceptions.RayError as error:
            self._ending = Ending(_first_line(error), by_signal=True)

    def ending(self) -> Ending:
        return self._ending

    def kill(self) -> None:
        """Ends the actor, and removes what it has put on its node."""
        import ray

        if self._has_spoken:  # Else it has no place yet, and leaves nothing there.
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._actor.close.remote(), timeout=_READ_S)
        ray.kill(self._actor)

    close = kill

    def _without_run(self, line: str) -> str:
        """A message; the run file that came with it is written first."""
        values = json.loads(line)
        run = values.pop("run", None)
        if run is not None:
            cell = str(json.loads(run)["cell"])
            assert re.fullmatch("[0-9a-f]{16}", cell), "a cell's name is a hash"
            records.write_atomically(records.run_path(self._folder, cell), run)
        return json.dumps(values)


class RayEngine:
    """A connection to a cluster, which opens executors there."""

    def __init__(
        self, config: StudyConfig, *, data_checksum: str, folder: Path
    ) -> None:
        self._ray = _connected(config.run.ray_address)
        self._config = config
        self._checksum = data_checksum
        self._folder = folder
        self._study_id = records.read_plan(folder).provenance["study_id"]

    def open_channel(self, index: int) -> RayChannel:
        """An executor of its own, as soon as a node has room for it."""
        run = self._config.run
        share = 0.0
        if run.device.startswith("cuda"):
            share = run.devices_per_run / run.runs_per_device
        actor = (
            self._ray.remote(Relay)
            .options(
                num_cpus=run.devices_per_run,
                num_gpus=share,
                max_concurrency=4,
                max_restarts=0,
                runtime_env={"env_vars": dict(TRAINING_ENVIRONMENT)},
            )
            .remote(
                self._config.model_dump_json(),
                self._checksum,
                study_folder=str(self._folder.resolve()),
                study_id=self._study_id,
            )
        )
        return RayChannel(actor, index=index, study_folder=self._folder)

    def close(self) -> None:
        self._ray.shutdown()


def _connected(address: str | None) -> ModuleType:
    """Ray, connected to a cluster or with one of its own on this machine.

    It never listens nor connects without a token: where the user has given none, a
    cluster of our own has one that is drawn anew and kept in memory.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    if address is None and not named:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        import ray
    except ImportError:
        raise MissingExtraError(
            'run.engine = "ray" needs the extra: pip install "resnext-ablate[ray]".'
        ) from None
    try:
        ray.init(
            address=address or "local",
            include_dashboard=False if address is None else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"run.ray_address = {address!r}: no Ray cluster answers there with this "
            f"token: {_first_line(error)}. Its token stands in ~/.ray/auth_token, "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
        ) from None
    found: ModuleType = ray  # Untyped where the extra is not installed.
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
