"""What an executor does: it trains jobs, writes their run files, and says so.

Its jobs come from standard input, its messages go to standard output (see `execution`).
A run's file is written before anyone hears of it. Asked to stop, an executor saves its
run at the next step and hands the cell back. When its standard input closes, its
scheduler is gone, and it ends at once.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import IO

import torch

from resnext_ablate import data, records, streaming, training
from resnext_ablate.checkpoint import Keeper
from resnext_ablate.config import StudyConfig
from resnext_ablate.endings import NonFiniteLossError, RunStoppedError, die_with_parent
from resnext_ablate.execution import Event, Job
from resnext_ablate.hardware import is_out_of_memory
from resnext_ablate.peaks import known_peaks, roofline_pct
from resnext_ablate.records import EpochRecord, RunRecord
from resnext_ablate.roofline import Peaks
from resnext_ablate.spec import ResNeXtSpec, spec_from_dict

_ALIVE_EVERY_S = 1.0

_logger = logging.getLogger(__name__)


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
        num_micro_batches=job.num_micro_batches,
    )


class _Pruned(Exception):
    """The scheduler's word was to stop; the text says why."""


def execute(
    job: Job,
    *,
    dataset: data.Feed,
    on_epoch: Callable[[EpochRecord], None],
    word: Callable[[Sequence[EpochRecord]], str],
    should_stop: Callable[[], bool],
) -> RunRecord:
    """Trains one job to its end, from its newest checkpoint on.

    Args:
        job, dataset: the run and its images, on its device.
        on_epoch: told each epoch.
        word: asked after each of `job.wait_after`, with the epochs so far, whether to
            stop; the answer is why, or empty.
        should_stop: asked between steps whether to hand the run back.

    Raises:
        RunStoppedError: `should_stop` said so; the run is saved.
        MemoryError, RuntimeError: memory ran out, see `hardware.is_out_of_memory`.
        OSError: the disk is full, see `records.is_disk_full`.
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
        return replace(begun, state=state, reason=reason, epochs=tuple(epochs))

    spec, device = spec_from_dict(job.spec), torch.device(job.device)
    peaks = known_peaks(device, precision=config.train.precision)
    try:
        result = training.train(
            spec,
            config=config.train,
            data_config=config.data,
            dataset=dataset,
            seed=job.seed,
            device=device,
            deterministic=config.run.deterministic,
            on_epoch=keep,
            keeper=_keeper(job, config=config, data_checksum=dataset.info.checksum),
            should_stop=should_stop,
            num_micro_batches=job.num_micro_batches,
        )
    except (_Pruned, NonFiniteLossError) as end:
        return ended("pruned" if isinstance(end, _Pruned) else "diverged", str(end))
    except Exception as error:  # One run's fault must not end the study.
        if _is_for_scheduler(error):
            raise
        _logger.exception("run %s of %s failed", job.cell, job.variant)
        return ended("failed", f"{type(error).__name__}: {error}")
    run = _completed(ended("complete", ""), result)
    return _with_share(run, peaks, spec=spec, config=config, dataset=dataset)


def _with_share(
    run: RunRecord,
    peaks: Peaks,
    *,
    spec: ResNeXtSpec,
    config: StudyConfig,
    dataset: data.Feed,
) -> RunRecord:
    """The run with what it used of its device."""
    assert run.images_per_s is not None
    used_pct = roofline_pct(
        spec,
        images_per_s=run.images_per_s,
        image_size=dataset.info.image_size,
        batch_size=min(config.train.batch_size, dataset.num_images("train")),
        peaks=peaks,
    )
    return replace(run, roofline_pct=used_pct)


def _completed(run: RunRecord, result: training.RunResult) -> RunRecord:
    return replace(
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


def _is_for_scheduler(error: Exception) -> bool:
    is_stopped = isinstance(error, RunStoppedError)
    return is_stopped or is_out_of_memory(error) or records.is_disk_full(error)


def _keeper(job: Job, *, config: StudyConfig, data_checksum: str) -> Keeper:
    """Where a job's checkpoints are. Its identity is all that its numbers depend on."""
    parts = {
        "spec": job.spec,
        "seed": job.seed,
        "train": config.train.model_dump(mode="json"),
        "crop_padding": config.data.crop_padding,
        "flip": config.data.flip,
        "augment": config.data.augment,
        "decode": config.data.decode,
        "data_checksum": data_checksum,
        "device": torch.device(job.device).type,
        "deterministic": config.run.deterministic,
        "num_micro_batches": job.num_micro_batches,
        **records.running_versions(),
    }
    text = json.dumps(parts, sort_keys=True)
    return Keeper(
        records.checkpoint_folder(Path(job.study_folder), job.cell),
        identity=hashlib.sha256(text.encode()).hexdigest(),
        every_s=config.run.checkpoint_every_s,
    )


class _Inbox:
    """What arrives from the scheduler. The process ends with it, even in mid-run."""

    def __init__(self, lines: IO[str]) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._words: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.stopping = threading.Event()
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            values = json.loads(line)
            if job := values.get("job"):
                self._jobs.put(Job(**job))
            elif "stop_reason" in values:
                self._words.put(values["stop_reason"])
            else:
                self._stop()
        os._exit(0)

    def _stop(self) -> None:
        self.stopping.set()
        self._words.put("")  # Who waits for word goes on, to stop at the next step.

    def catch(self, number: int, frame: FrameType | None) -> None:
        """Of SIGINT and SIGTERM: stops in order; a second one ends at once."""
        signal.signal(number, signal.SIG_DFL)
        self._stop()
        self._jobs.put(None)

    def jobs(self) -> Iterator[Job]:
        """Jobs as they arrive, until a signal asks this process to end."""
        while (job := self._jobs.get()) is not None:
            yield job

    def word(self) -> str:
        """The scheduler's word for a run that waits for it."""
        return self._words.get()


class _Voice:
    """Tells the scheduler about a job, and between its steps that it lives."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # Whatever prints must not garble the answers.
        self._job: Job | None = None
        self._said_at = 0.0

    def begin(self, job: Job) -> None:
        self._job = job

    def say(self, event: Event, **values: object) -> None:
        if self._job is not None:
            values |= {"cell": self._job.cell, "attempt": self._job.attempt}
        self._said_at = time.monotonic()
        try:
            self._answers.write(json.dumps({"event": event, **values}) + "\n")
            self._answers.flush()
        except BrokenPipeError:
            os._exit(0)  # The scheduler is gone; nothing here is to be recorded.

    def say_epoch(self, epoch: EpochRecord) -> None:
        self.say("epoch", epoch=dataclasses.asdict(epoch))

    def say_alive(self) -> None:
        if time.monotonic() - self._said_at >= _ALIVE_EVERY_S:
            self.say("alive")


def _serve(lock_path: Path) -> None:
    """An executor's life: jobs until its input closes or a signal comes."""
    die_with_parent()
    voice = _Voice()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    torch.set_num_threads(1)
    with lock_path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        inbox = _Inbox(sys.stdin)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, inbox.catch)
        voice.say("ready", versions=records.running_versions())
        held: dict[tuple[str, str], data.Feed] = {}
        for job in inbox.jobs():
            voice.begin(job)
            _do(job, held=held, voice=voice, inbox=inbox)


def _do(
    job: Job,
    *,
    held: dict[tuple[str, str], data.Feed],
    voice: _Voice,
    inbox: _Inbox,
) -> None:
    """Brings a job to its run file, or says why it has none."""

    def should_stop() -> bool:
        voice.say_alive()
        return inbox.stopping.is_set()

    def word(epochs: Sequence[EpochRecord]) -> str:
        voice.say("waiting", epochs=[dataclasses.asdict(epoch) for epoch in epochs])
        return inbox.word()

    try:
        record = execute(
            job,
            dataset=_dataset(job, held),
            on_epoch=voice.say_epoch,
            word=word,
            should_stop=should_stop,
        )
        records.write_run(record, Path(job.study_folder))
    except RunStoppedError as error:
        return voice.say("stopped", reason=str(error))
    except Exception as error:
        if not _is_for_scheduler(error):
            raise
        _logger.exception("run %s of %s is handed back", job.cell, job.variant)
        event: Event = "disk_full" if records.is_disk_full(error) else "out_of_memory"
        return voice.say(event, reason=str(error).partition("\n")[0])
    records.remove_checkpoints(Path(job.study_folder), job.cell)
    voice.say("finished")


def _dataset(job: Job, held: dict[tuple[str, str], data.Feed]) -> data.Feed:
    """A job's images; the last ones are held for the next job."""
    key = (job.data_folder, job.device)
    if key not in held:
        held.clear()
        config = StudyConfig.model_validate_json(job.config)
        held[key] = _opened(job, config=config)
    return held[key]


def _opened(job: Job, *, config: StudyConfig) -> data.Feed:
    folder, device = Path(job.data_folder), torch.device(job.device)
    if config.data.loading != "stream":
        return data.load(folder, device=device)
    assert isinstance(config.run.executors, int), "resolved before jobs are made"
    return streaming.Stream(
        folder, config=config.data, device=device, num_sharing=config.run.executors
    )


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
