"""What surrounds a running study: one scheduler, signals, and faults that halt it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.records import records
from resnext_ablate.study import storage

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StudyHaltedError(RuntimeError):
    """The study cannot go on for now. Nothing finished is lost."""


@contextlib.contextmanager
def only_scheduler(folder: Path, *, name: str) -> Iterator[None]:
    """Holds the study's lock; the kernel drops it with the process."""
    with (folder / records.LOCK_FILE).open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"study {name} is being run by process {file.read().strip() or '?'}; "
                "resnext-ablate status shows how far it is."
            ) from None
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextlib.contextmanager
def halted_by_faults(folder: Path) -> Iterator[None]:
    """Tells of a full disk, or of a storage that no longer answers, in one message.

    Raises:
        StudyHaltedError: one of these.
    """
    try:
        yield
    except storage.NO_ANSWER as error:
        cause = error.__cause__ or error
        raise StudyHaltedError(
            f"{folder}: the storage does not answer ({type(cause).__name__}). Runs are "
            "saved up to their last checkpoint; the same command goes on."
        ) from None
    except OSError as error:
        if not records.is_disk_full(error):
            raise
        raise StudyHaltedError(
            f"{folder}: nothing more can be written ({error.strerror}). Runs are saved "
            "up to their last checkpoint; make room, and the same command goes on."
        ) from None


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM; a second one acts as it always does."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    usual = {number: signal.getsignal(number) for number in _SIGNALS}

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        for other, handler in usual.items():
            signal.signal(other, handler)

    for number in _SIGNALS:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
