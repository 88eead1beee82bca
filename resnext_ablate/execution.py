"""Where runs execute: executors as child processes, their jobs and their messages.

An executor reads one job per line of JSON from standard input and answers with one
message per line on standard output; `executor` is its side. None touches Optuna.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from resnext_ablate import records
from resnext_ablate.hardware import TRAINING_ENVIRONMENT
from resnext_ablate.records import EpochRecord

LOCK_FILE = ".executors.lock"

_PROGRAM = "resnext_ablate.executor"


class ExecutorError(RuntimeError):
    """Executors cannot be started, or do not end."""


Event = Literal[
    "ready",
    "alive",  # between two steps, about once a second
    "epoch",
    "waiting",  # for word whether to go on
    "finished",  # the run has its file
    "stopped",  # the run was saved where it was
    "out_of_memory",
    "disk_full",
    "died",
]


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
    attempt: int
    """From 1, over all attempts at the cell."""
    num_micro_batches: int
    wait_after: tuple[int, ...] = ()
    """Epochs after which the executor waits for word whether to go on."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """What an executor says, or what is said of it when it has died."""

    executor: int
    event: Event
    cell: str | None = None
    attempt: int | None = None
    epoch: EpochRecord | None = None
    epochs: tuple[EpochRecord, ...] = ()
    """All epochs of the run so far, where it waits for word."""
    reason: str = ""
    by_signal: bool = False
    """Whether a signal killed it."""
    versions: dict[str, str] | None = None
    """What a ready executor runs."""


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
                [sys.executable, "-m", _PROGRAM, str(self._folder / LOCK_FILE)],
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

    def stop(self) -> None:
        """Asks all executors to save their runs and hand them back."""
        for index, process in enumerate(self._processes):
            if process is not None:
                self._write(index, {"stop": True})

    def kill(self, index: int) -> None:
        """Ends an executor that gives no sign of life; its death is told as any."""
        process = self._processes[index]
        if process is not None:
            process.kill()

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


def refuse_other_versions(theirs: Mapping[str, str]) -> None:
    """Checks what a ready executor runs, as the package may change under a study.

    Raises:
        ExecutorError: it does not run what this process runs.
    """
    own = records.running_versions()
    other = ", ".join(
        f"{name} {theirs.get(name)} in place of {version}"
        for name, version in own.items()
        if theirs.get(name) != version
    )
    if other:
        raise ExecutorError(
            f"an executor runs {other}: its runs would not compare with the others. "
            "The same command goes on with what is installed now."
        )


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
    code = process.wait()
    if code < 0:
        reason = f"executor killed by {signal.Signals(-code).name}"
    else:
        reason = f"executor exited with code {code}"
    messages.put(
        Message(executor=index, event="died", reason=reason, by_signal=code < 0)
    )
