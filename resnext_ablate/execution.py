"""Where runs execute: child processes that train and never touch Optuna.

An executor reads one job per line of JSON from standard input and answers with one
message per line on standard output. It writes a run's file itself, before it says so.
When its standard input closes, its scheduler is gone, and it ends at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal, Self

import torch

from resnext_ablate import data, records, training
from resnext_ablate.config import StudyConfig
from resnext_ablate.hardware import TRAINING_ENVIRONMENT
from resnext_ablate.records import EpochRecord, RunRecord
from resnext_ablate.spec import spec_from_dict

LOCK_FILE = ".executors.lock"

_logger = logging.getLogger(__name__)


class ExecutorError(RuntimeError):
    """Executors cannot be started, or do not end."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that an executor needs to know of one run."""

    cell: str
    variant: str
    seed: int
    spec: dict[str, Any]
    config: str
    """The resolved `StudyConfig` as JSON."""
    data_folder: str
    """Decoded images, as `data.prepare` left them."""
    study_folder: str
    device: str
    environment: dict[str, str]
    wait_after: tuple[int, ...] = ()
    """Epochs after which the executor waits for word whether to go on."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """What an executor says, or what is said of it when it has died."""

    executor: int
    event: Literal["ready", "epoch", "waiting", "finished", "died"]
    cell: str | None = None
    epoch: EpochRecord | None = None
    epochs: tuple[EpochRecord, ...] = ()
    """All epochs of the run so far, where it waits for word."""
    reason: str = ""


class Executors:
    """A fixed number of child processes, each busy with at most one job."""

    def __init__(self, count: int, *, study_folder: Path) -> None:
        self._folder = study_folder
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[str] | None] = [None] * count
        for index in range(count):
            self.start(index)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self, index: int) -> None:
        """Starts an executor, or one in place of a dead one."""
        self._close_process(index)
        log_folder = self._folder / "logs"
        log_folder.mkdir(exist_ok=True)
        with (log_folder / f"executor-{index}.log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(self._folder / LOCK_FILE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **TRAINING_ENVIRONMENT},
                # Ctrl-C reaches the scheduler alone, which then decides.
                start_new_session=True,
            )
        self._processes[index] = process
        listener = threading.Thread(
            target=_listen, args=(index, process, self._messages), daemon=True
        )
        listener.start()

    def submit(self, index: int, job: Job) -> None:
        """Hands a job to an idle executor. One that has just died is told of later."""
        self._write(index, {"job": dataclasses.asdict(job)})

    def give_word(self, index: int, *, stop_reason: str) -> None:
        """Lets a waiting executor go on, or end its run as pruned for a reason."""
        self._write(index, {"stop_reason": stop_reason})

    def next_message(self, *, timeout_s: float) -> Message | None:
        """The next message of any executor; None when none came in time."""
        try:
            return self._messages.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def close(self) -> None:
        """Ends all executors, whatever they are doing."""
        for index in range(len(self._processes)):
            self._close_process(index)

    def _write(self, index: int, values: dict[str, Any]) -> None:
        process = self._processes[index]
        assert process is not None and process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(values) + "\n")
            process.stdin.flush()

    def _close_process(self, index: int) -> None:
        process = self._processes[index]
        if process is None:
            return
        process.kill()
        process.wait()
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        self._processes[index] = None


def wait_for_executors(study_folder: Path, *, timeout_s: float = 30.0) -> bool:
    """Waits until no executor of an earlier scheduler lives; False when one stays."""
    deadline = time.monotonic() + timeout_s
    with (study_folder / LOCK_FILE).open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.05)


def _begun(job: Job, *, config: StudyConfig, data_checksum: str) -> RunRecord:
    """A run's record as it begins; should it never be heard of again, it failed."""
    return RunRecord(
        cell=job.cell,
        variant=job.variant,
        seed=job.seed,
        state="failed",
        reason="",
        device=job.device,
        precision=config.train.precision,
        data_checksum=data_checksum,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=job.environment,
    )


class _Pruned(Exception):
    """The scheduler's word was to stop; the text says why."""


def execute(
    job: Job,
    *,
    dataset: data.Dataset,
    on_epoch: Callable[[EpochRecord], None],
    word: Callable[[Sequence[EpochRecord]], str],
) -> RunRecord:
    """Trains one job to its end, whatever the end is.

    Args:
        job: the run.
        dataset: on the job's device.
        on_epoch: told each epoch.
        word: asked after each of `job.wait_after`, with the epochs so far, whether to
            stop; the answer is why, or empty.
    """
    config = StudyConfig.model_validate_json(job.config)
    begun = _begun(job, config=config, data_checksum=dataset.info.checksum)
    epochs: list[EpochRecord] = []

    def keep(epoch: EpochRecord) -> None:
        epochs.append(epoch)
        on_epoch(epoch)
        if epoch.epoch in job.wait_after and (reason := word(epochs)):
            raise _Pruned(reason)

    def ended(state: records.RunState, reason: str) -> RunRecord:
        """The run as far as it came."""
        return dataclasses.replace(
            begun, state=state, reason=reason, epochs=tuple(epochs)
        )

    try:
        result = training.train(
            spec_from_dict(job.spec),
            config=config.train,
            data_config=config.data,
            dataset=dataset,
            seed=job.seed,
            device=torch.device(job.device),
            deterministic=config.run.deterministic,
            on_epoch=keep,
        )
    except _Pruned as pruned:
        return ended("pruned", str(pruned))
    except training.NonFiniteLossError as error:
        return ended("diverged", str(error))
    except Exception as error:
        # One run's fault must not end the study; the log has the traceback.
        _logger.exception("run %s of %s failed", job.cell, job.variant)
        return ended("failed", f"{type(error).__name__}: {error}")
    return _completed(ended("complete", ""), result)


def _completed(run: RunRecord, result: training.RunResult) -> RunRecord:
    return dataclasses.replace(
        run,
        test_loss=result.test_loss,
        test_error_pct=result.test_error_pct,
        correct_bits=records.pack_bits(result.correct),
        train_time_s=result.train_time_s,
        images_per_s=result.images_per_s,
        peak_memory_mib=result.peak_memory_mib,
        device=result.device,
        precision=result.precision,
    )


def _listen(
    index: int,
    process: subprocess.Popen[str],
    messages: queue.SimpleQueue[Message],
) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            values = json.loads(line)
            if epoch := values.pop("epoch", None):
                values["epoch"] = EpochRecord(**epoch)
            epochs = values.pop("epochs", ())
            values["epochs"] = tuple(EpochRecord(**epoch) for epoch in epochs)
            messages.put(Message(executor=index, **values))
    messages.put(Message(executor=index, event="died", reason=_exit_reason(process)))


def _exit_reason(process: subprocess.Popen[str]) -> str:
    code = process.wait()
    if code < 0:
        return f"executor killed by {signal.Signals(-code).name}"
    return f"executor exited with code {code}"


class _Inbox:
    """What arrives from the scheduler. The process ends with it, even in mid-run."""

    def __init__(self, lines: IO[str]) -> None:
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._words: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            values = json.loads(line)
            if job := values.get("job"):
                self._jobs.put(Job(**job))
            else:
                self._words.put(values["stop_reason"])
        os._exit(0)

    def jobs(self) -> Iterator[Job]:
        while True:
            yield self._jobs.get()

    def word(self) -> str:
        return self._words.get()


def _serve(lock_path: Path) -> None:
    """An executor's life: jobs from standard input until it closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # Whatever prints must not garble the answers.
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    torch.set_num_threads(1)

    def say(event: str, **values: object) -> None:
        answers.write(json.dumps({"event": event, **values}) + "\n")
        answers.flush()

    with lock_path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        say("ready")
        held: tuple[tuple[str, str], data.Dataset] | None = None
        inbox = _Inbox(sys.stdin)
        for job in inbox.jobs():
            key = (job.data_folder, job.device)
            if held is None or held[0] != key:
                folder, device = Path(job.data_folder), torch.device(job.device)
                held = key, data.load(folder, device=device)

            def on_epoch(epoch: EpochRecord, cell: str = job.cell) -> None:
                say("epoch", cell=cell, epoch=dataclasses.asdict(epoch))

            def word(epochs: Sequence[EpochRecord], cell: str = job.cell) -> str:
                values = [dataclasses.asdict(epoch) for epoch in epochs]
                say("waiting", cell=cell, epochs=values)
                return inbox.word()

            record = execute(job, dataset=held[1], on_epoch=on_epoch, word=word)
            records.write_run(record, Path(job.study_folder))
            say("finished", cell=job.cell)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
