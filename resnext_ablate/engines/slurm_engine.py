"""Executors as Slurm jobs, reached through a folder that all nodes share.

Each job is one executor. Lines to and from it are small files in its mailbox below the
study's folder, whole or absent, taken away once read. A job that is preempted or out of
time has its executor save the run and hand it back; queued again, it goes on with what
there is to do. A job whose scheduler is gone ends within a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resnext_ablate.architecture.spec import InputError, MissingExtraError
from resnext_ablate.engines import execution, nodes
from resnext_ablate.engines.execution import Ending
from resnext_ablate.records.config import StudyConfig
from resnext_ablate.records.records import write_atomically

JOBS_FOLDER = "jobs"

_POLL_S = 0.2
_BEAT_EVERY_S = 5.0
_ORPHAN_S = 60.0
"""Without a beat of the scheduler for so long, a job ends."""
_SAVE_S = 20.0
"""For an executor to save its run in when its job is to go."""
_ENDED = "ended"
_HANDED_BACK = ("finished", "stopped", "out_of_memory", "disk_full")


class Mailbox:
    """Lines to and from a job, as files that are whole or absent."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._life = _next_life(folder)

    def put(self, box: str, values: dict[str, Any]) -> None:
        self._count += 1
        name = f"{self._life:04d}-{self._count:08d}"
        write_atomically(self._folder / box / name, json.dumps(values))

    def take(self, box: str) -> list[dict[str, Any]]:
        """All lines that have come, in order; they are gone then."""
        found = []
        for path in sorted((self._folder / box).glob("[0-9]*-[0-9]*")):
            found.append(json.loads(path.read_text(encoding="utf-8")))
            path.unlink()
        return found

    def beat(self) -> None:
        """Gives a sign that the scheduler lives."""
        write_atomically(self._folder / "beat", str(time.monotonic_ns()))

    def last_beat(self) -> str:
        path = self._folder / "beat"
        return path.read_text(encoding="utf-8") if path.exists() else ""


def _next_life(folder: Path) -> int:
    """One more than those before, so that lines of a job's second life come last.

    Clocks of machines do not agree, and may be set back.
    """
    folder.mkdir(parents=True, exist_ok=True)
    life = 1
    while True:
        try:
            (folder / f"life-{life}").touch(exist_ok=False)
            return life
        except FileExistsError:
            life += 1


class Post:
    """What a job does: it runs an executor and carries its lines."""

    def __init__(
        self, mailbox: Path, *, study_folder: Path, config: str, data_checksum: str
    ) -> None:
        self.place = mailbox
        self.study_folder = study_folder
        self.config = config
        self.data_checksum = data_checksum
        self.num_processes = StudyConfig.model_validate_json(config).run.devices_per_run
        self.carrier: _Carrier | None = None

    def __call__(self) -> None:
        """A job's life, until its executor ends or its scheduler is gone."""
        mailbox = Mailbox(self.place)
        data_folder, refusal = nodes.images(self.config, self.data_checksum)
        if refusal:
            mailbox.put("from", {_ENDED: refusal, "by_signal": False})
            return
        with (self.place / "executor.log").open("a", encoding="utf-8") as log:
            process = execution.start_process(
                self.study_folder, log=log, num_processes=self.num_processes
            )
        self.carrier = _Carrier(process, mailbox=mailbox, data_folder=data_folder)
        beat, beaten_at = "", time.monotonic()
        while process.poll() is None:
            self.carrier.carry()
            if (last := mailbox.last_beat()) != beat:
                beat, beaten_at = last, time.monotonic()
            if time.monotonic() - beaten_at > _ORPHAN_S:
                return execution.end_process(process)
            time.sleep(_POLL_S)
        self.carrier.carry()
        end = execution.ending_of(process)
        mailbox.put("from", {_ENDED: end.reason, "by_signal": end.by_signal})

    def checkpoint(self, *arguments: Any) -> Any:
        """Before the job goes, its run is saved and handed back; it comes again."""
        from submitit.helpers import DelayedSubmission

        if self.carrier is not None:
            self.carrier.hand_back()
        again = Post(
            self.place,
            study_folder=self.study_folder,
            config=self.config,
            data_checksum=self.data_checksum,
        )
        return DelayedSubmission(again)


class _Carrier:
    """Carries lines between an executor's process and a mailbox."""

    def __init__(
        self, process: subprocess.Popen[str], *, mailbox: Mailbox, data_folder: Path
    ) -> None:
        self._process = process
        self._mailbox = mailbox
        self._data_folder = data_folder
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._is_busy = False
        threading.Thread(target=self._listen, daemon=True).start()

    def carry(self) -> None:
        """Passes messages on between the job's executor and the study, both ways."""
        for values in self._mailbox.take("to"):
            self._is_busy |= "job" in values
            self._tell(nodes.fitted(values, data_folder=self._data_folder))
        with contextlib.suppress(queue.Empty):
            while True:
                values = json.loads(self._said.get_nowait())
                if values["event"] in _HANDED_BACK:
                    self._is_busy = False
                self._mailbox.put("from", values)

    def hand_back(self) -> None:
        """Has the executor save its run, within seconds, and ends it."""
        self._tell({"stop": True})
        deadline = time.monotonic() + _SAVE_S
        while self._is_busy and time.monotonic() < deadline:
            self.carry()
            time.sleep(_POLL_S)
        execution.end_process(self._process)

    def _tell(self, values: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(values) + "\n")
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout:
            for line in self._process.stdout:
                self._said.put(line)


class SlurmChannel:
    """The scheduler's end of an executor in a job."""

    def __init__(self, job: Any, *, mailbox: Mailbox) -> None:
        self._job = job
        self._mailbox = mailbox
        self._ending = Ending("its job was taken away", by_signal=True)
        self._is_closed = threading.Event()

    def write(self, line: str) -> None:
        self._mailbox.put("to", json.loads(line))

    def lines(self) -> Iterator[str]:
        """What the executor says until it ends; signs of life while its job waits."""
        due = 0.0
        while not self._is_closed.is_set():
            is_over = self._job.done()  # Asked first: then nothing more can come.
            for values in self._mailbox.take("from"):
                if _ENDED in values:
                    self._ending = Ending(values[_ENDED], by_signal=values["by_signal"])
                    return
                yield json.dumps(values)
            if is_over:
                return
            if time.monotonic() >= due:
                due = time.monotonic() + _BEAT_EVERY_S
                self._mailbox.beat()
                yield json.dumps({"event": "alive"})
            time.sleep(_POLL_S)

    def ending(self) -> Ending:
        return self._ending

    def kill(self) -> None:
        self._job.cancel(check=False)

    def close(self) -> None:
        self._is_closed.set()
        self.kill()
        deadline = time.monotonic() + _SAVE_S
        while not self._job.done() and time.monotonic() < deadline:
            time.sleep(_POLL_S)


class SlurmEngine:
    """Submits a job for each executor."""

    def __init__(
        self, config: StudyConfig, *, data_checksum: str, folder: Path
    ) -> None:
        try:
            import submitit
        except ImportError:
            raise MissingExtraError(
                'run.engine = "slurm" needs the extra: pip install '
                '"resnext-ablate[slurm]".'
            ) from None
        run = config.run
        if run.slurm_cluster == "slurm" and not shutil.which("sbatch"):
            raise InputError(
                'run.engine = "slurm": this machine has no sbatch; start the study on '
                'a login node, or try it out with run.slurm_cluster = "local".'
            )
        self._config = config
        self._checksum = data_checksum
        self._folder = folder.resolve()
        self._submitter = submitit.AutoExecutor(
            folder=self._folder / JOBS_FOLDER, cluster=run.slurm_cluster
        )
        self._submitter.update_parameters(
            name=config.name,
            timeout_min=run.slurm_timeout_min,
            cpus_per_task=run.devices_per_run,
            gpus_per_node=run.devices_per_run if run.device.startswith("cuda") else 0,
            slurm_additional_parameters=dict(run.slurm_options),
        )

    def open_channel(self, index: int) -> SlurmChannel:
        """A job of its own; it starts when Slurm has a place for it."""
        place = self._folder / JOBS_FOLDER / f"executor-{index}-{uuid.uuid4().hex[:8]}"
        for box in ("to", "from"):
            (place / box).mkdir(parents=True)
        post = Post(
            place,
            study_folder=self._folder,
            config=self._config.model_dump_json(),
            data_checksum=self._checksum,
        )
        with _errors_to(place / "job.log"):
            job = self._submitter.submit(post)
        return SlurmChannel(job, mailbox=Mailbox(place))

    def close(self) -> None:
        """Nothing stays open: jobs end with their channels."""


@contextlib.contextmanager
def _errors_to(path: Path) -> Iterator[None]:
    """What is started meanwhile writes there: a local job dies with a traceback."""
    sys.stderr.flush()
    own = os.dup(2)
    try:
        with path.open("ab") as log:
            os.dup2(log.fileno(), 2)
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)
