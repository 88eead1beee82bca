"""Where runs execute: executors, their jobs and their messages, and channels to them.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol, Self

from resnext_ablate.compute.hardware import TRAINING_ENVIRONMENT
from resnext_ablate.records import records
from resnext_ablate.records.records import EpochRecord

LOCK_FILE = ".executors.lock"
LOGS_FOLDER = "logs"

_PROGRAM = "resnext_ablate.engines.executor"
_TORCHRUN = "torch.distributed.run"
_HERE = ("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1")
"""All on this machine."""


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
class Seat:
    """A further seed of a job's net, to be trained as one net with it."""

    cell: str
    seed: int
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that an executor needs to know of one run, or of several seeds as one net."""

    cell: str
    variant: str
    seed: int
    spec: dict[str, Any]
    config: str
    """The resolved `StudyConfig` as JSON."""
    data_folder: str
    """Decoded images, as `data.prepare` left them."""
    study_folder: str
    """Where the executor puts the run's file: on another machine a folder there."""
    checkpoint_root: str
    """Holds the folder of checkpoints: the study's folder, where it can be seen."""
    device: str
    environment: dict[str, str]
    attempt: int
    """From 1, over all attempts at the cell."""
    num_micro_batches: int
    wait_after: tuple[int, ...] = ()
    """Epochs after which the executor waits for word whether to go on."""
    beside: tuple[Seat, ...] = ()

    @property
    def each(self) -> tuple[Job, ...]:
        """A job for each seed: each has messages, a run file and checkpoints."""
        own = dataclasses.replace(self, beside=())
        others = (dataclasses.asdict(seat) for seat in self.beside)
        return (own, *(dataclasses.replace(own, **values) for values in others))


def job_from(values: dict[str, Any]) -> Job:
    """A job as it came in a line."""
    beside = tuple(Seat(**seat) for seat in values.pop("beside"))
    return Job(**values, beside=beside)


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


@dataclass(frozen=True)
class Ending:
    """Why an executor has ended."""

    reason: str
    by_signal: bool
    """Rather than of itself; that says nothing about the next start."""


class Channel(Protocol):
    """A line to one executor, wherever it is."""

    def write(self, line: str) -> None:
        """Sends a line; one to an executor that has ended is lost."""

    def lines(self) -> Iterator[str]:
        """What the executor says, until it has ended."""

    def ending(self) -> Ending:
        """Why it ended, once its lines have."""

    def kill(self) -> None:
        """Ends the executor whatever it does."""

    def close(self) -> None:
        """Ends it, and waits until it has ended."""


class Executors:
    """A fixed number of executors, each busy with at most one job."""

    def __init__(self, count: int, *, open_channel: Callable[[int], Channel]) -> None:
        """Starts executors.

        Args:
            count: how many.
            open_channel: starts an executor by its number.
        """
        self._open_channel = open_channel
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._channels: list[Channel | None] = [None] * count
        for index in range(count):
            self.start(index)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self, index: int) -> None:
        """Starts an executor, or one in place of a dead one."""
        self._close_channel(index)
        channel = self._open_channel(index)
        self._channels[index] = channel
        listener = threading.Thread(
            target=_listen, args=(index, channel, self._messages), daemon=True
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
        for index, channel in enumerate(self._channels):
            if channel is not None:
                self._write(index, {"stop": True})

    def kill(self, index: int) -> None:
        """Ends an executor that gives no sign of life; its death is told as any."""
        channel = self._channels[index]
        if channel is not None:
            channel.kill()

    def next_message(self, *, timeout_s: float) -> Message | None:
        """The next message of any executor; None when none came in time."""
        try:
            return self._messages.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def close(self) -> None:
        """Ends all executors, whatever they are doing."""
        for index in range(len(self._channels)):
            self._close_channel(index)

    def _write(self, index: int, values: dict[str, Any]) -> None:
        channel = self._channels[index]
        assert channel is not None
        channel.write(json.dumps(values) + "\n")

    def _close_channel(self, index: int) -> None:
        channel = self._channels[index]
        if channel is not None:
            channel.close()
        self._channels[index] = None


class LocalChannel:
    """An executor as a child process of this one."""

    def __init__(
        self, index: int, *, folder: Path, core: int | None, num_processes: int
    ) -> None:
        """Starts it.

        Args:
            index: its number.
            folder: the study's.
            core: the one that it keeps to; None: any.
            num_processes: that train each of its runs together.
        """
        log_folder = folder / LOGS_FOLDER
        log_folder.mkdir(exist_ok=True)
        with (log_folder / f"executor-{index}.log").open("a", encoding="utf-8") as log:
            self._process = start_process(folder, log=log, num_processes=num_processes)
        if core is not None:
            # Its threads, of which it has none yet, will keep to the core as well.
            os.sched_setaffinity(self._process.pid, {core})

    def write(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def lines(self) -> Iterator[str]:
        assert self._process.stdout is not None
        with self._process.stdout:
            yield from self._process.stdout

    def ending(self) -> Ending:
        return ending_of(self._process)

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        end_process(self._process)


def open_locally(
    folder: Path, *, devices: Sequence[str], devices_per_run: int = 1
) -> Callable[[int], Channel]:
    """Executors on this machine; each keeps to a core where they fill it.

    Where they are fewer than cores, the system finds free ones better than we do.

    Args:
        folder: the study's.
        devices: one for each executor.
        devices_per_run: processes of each executor, a device each.
    """
    cores = sorted(os.sched_getaffinity(0))
    fills = set(devices) == {"cpu"} and len(devices) == len(cores)
    assert not fills or devices_per_run == 1, "no core is left for them"

    def open_channel(index: int) -> LocalChannel:
        core = cores[index] if fills else None
        return LocalChannel(
            index, folder=folder, core=core, num_processes=devices_per_run
        )

    return open_channel


def start_process(
    folder: Path, *, log: IO[str], num_processes: int = 1
) -> subprocess.Popen[str]:
    """Starts the process of an executor that holds a folder's lock.

    Where several processes are to train each run together, torchrun starts them; it
    ends all of them when one ends, and they all end with it.
    """
    launcher = [] if num_processes == 1 else ["-m", _TORCHRUN, *_HERE]
    count = [] if num_processes == 1 else [f"--nproc-per-node={num_processes}"]
    program = ["-m", _PROGRAM, str(folder / LOCK_FILE), str(num_processes)]
    return subprocess.Popen(
        [sys.executable, *launcher, *count, *program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, **TRAINING_ENVIRONMENT},
        # Ctrl-C reaches the scheduler alone, which then decides.
        start_new_session=True,
    )


def end_process(process: subprocess.Popen[str]) -> None:
    """Kills an executor's process and waits until it has ended."""
    process.kill()
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def ending_of(process: subprocess.Popen[str]) -> Ending:
    """Waits for a process to end, and says why it did."""
    code = process.wait()
    if code < 0:
        name = signal.Signals(-code).name
        return Ending(f"executor killed by {name}", by_signal=True)
    return Ending(f"executor exited with code {code}", by_signal=False)


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


def _listen(index: int, channel: Channel, messages: queue.SimpleQueue[Message]) -> None:
    for line in channel.lines():
        values = json.loads(line)
        if epoch := values.pop("epoch", None):
            values["epoch"] = EpochRecord(**epoch)
        epochs = values.pop("epochs", ())
        values["epochs"] = tuple(EpochRecord(**epoch) for epoch in epochs)
        messages.put(Message(executor=index, **values))
    end = channel.ending()
    messages.put(
        Message(
            executor=index, event="died", reason=end.reason, by_signal=end.by_signal
        )
    )
