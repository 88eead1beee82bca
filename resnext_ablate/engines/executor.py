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
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO

import torch

from resnext_ablate.architecture.roofline import Peaks
from resnext_ablate.architecture.spec import spec_from_dict
from resnext_ablate.compute import data, streaming, training
from resnext_ablate.compute.checkpoint import Keeper
from resnext_ablate.compute.endings import (
    NonFiniteLossError,
    RunStoppedError,
    die_with_parent,
)
from resnext_ablate.compute.hardware import is_out_of_memory
from resnext_ablate.compute.peaks import known_peaks, roofline_pct
from resnext_ablate.compute.peers import Peers, joined
from resnext_ablate.compute.training_state import RunResult, Seed
from resnext_ablate.engines.execution import Event, Job, job_from
from resnext_ablate.records import records
from resnext_ablate.records.config import StudyConfig
from resnext_ablate.records.records import EpochRecord, RunRecord, RunState

_ALIVE_EVERY_S = 1.0

_logger = logging.getLogger(__name__)


class _Pruned(Exception):
    """The scheduler's word was to stop; the text says why."""


def execute(
    job: Job,
    *,
    dataset: data.Feed,
    on_epoch: Callable[[Job, EpochRecord], None],
    on_end: Callable[[Job, RunRecord], None],
    word: Callable[[Sequence[EpochRecord]], str],
    should_stop: Callable[[], bool],
    peers: Peers,
) -> None:
    """Trains the seeds of a job to their ends, from their newest checkpoint on.

    Args:
        job, dataset: the runs and their images, on the device.
        on_epoch: told each epoch, and by its own job which seed's.
        on_end: told each run as it is over, likewise.
        word: asked after each of `job.wait_after`, with the epochs so far, whether to
            stop; the answer is why, or empty.
        should_stop: asked between steps whether to hand the runs back.
        peers: who train them together, and all call this.

    Raises:
        RunStoppedError: `should_stop` said so; the runs are saved.
        MemoryError, RuntimeError: memory ran out, see `hardware.is_out_of_memory`.
        OSError: the disk is full, see `records.is_disk_full`.
    """
    config = StudyConfig.model_validate_json(job.config)
    spec, device = spec_from_dict(job.spec), torch.device(job.device)
    peaks = known_peaks(device, precision=config.train.precision)
    own = partial(_Own, config=config, dataset=dataset, peaks=peaks, word=word)
    runs = [
        own(one, num_fused=len(job.each), say_epoch=on_epoch, say_end=on_end)
        for one in job.each
    ]
    try:
        training.train_together(
            spec,
            config=config.train,
            data_config=config.data,
            dataset=dataset,
            seeds=[one.seed() for one in runs],
            device=device,
            deterministic=config.run.deterministic,
            should_stop=should_stop,
            num_micro_batches=job.num_micro_batches,
            peers=peers,
        )
    except _Pruned as pruned:
        runs[0].end("pruned", str(pruned))
    except Exception as error:  # One run's fault must not end the study.
        if _is_for_scheduler(error) or peers.count > 1:
            raise
        _logger.exception("run %s of %s failed", job.cell, job.variant)
        for one in runs:
            one.end("failed", f"{type(error).__name__}: {error}")


class _Own:
    """One run of a job, from its first epoch to its record."""

    def __init__(
        self,
        job: Job,
        *,
        config: StudyConfig,
        dataset: data.Feed,
        peaks: Peaks,
        num_fused: int,
        say_epoch: Callable[[Job, EpochRecord], None],
        say_end: Callable[[Job, RunRecord], None],
        word: Callable[[Sequence[EpochRecord]], str],
    ) -> None:
        self._job = job
        self._config = config
        self._dataset = dataset
        self._peaks = peaks
        self._say_epoch = say_epoch
        self._say_end = say_end
        self._word = word
        self._num_fused = num_fused
        self._epochs: list[EpochRecord] = []
        self._is_over = False
        self._begun_at = datetime.now(UTC).isoformat(timespec="seconds")

    def seed(self) -> Seed:
        """The run as training knows it."""
        checksum = self._dataset.info.checksum
        return Seed(
            seed=self._job.seed,
            on_epoch=self._keep,
            on_end=self._take,
            keeper=_keeper(self._job, config=self._config, data_checksum=checksum),
        )

    def end(self, state: RunState, reason: str) -> None:
        """Ends the run without a result, unless it has ended before."""
        self._end(self._record(state, reason))

    def _keep(self, epoch: EpochRecord) -> None:
        self._epochs.append(epoch)
        self._say_epoch(self._job, epoch)
        if epoch.epoch in self._job.wait_after and (reason := self._word(self._epochs)):
            raise _Pruned(reason)

    def _take(self, end: RunResult | NonFiniteLossError) -> None:
        if isinstance(end, NonFiniteLossError):
            return self.end("diverged", str(end))
        config = self._config
        batch_size = min(config.train.batch_size, self._dataset.num_images("train"))
        num_devices = config.run.devices_per_run
        used_pct = roofline_pct(
            spec_from_dict(self._job.spec),
            images_per_s=end.images_per_s / num_devices,
            image_size=self._dataset.info.image_size,
            batch_size=batch_size // num_devices,
            peaks=self._peaks,
        )
        self._end(
            replace(
                self._record("complete", ""),
                test_loss=end.test_loss,
                test_error_pct=end.test_error_pct,
                correct_bits=records.pack_bits(end.correct),
                train_time_s=end.train_time_s,
                images_per_s=end.images_per_s,
                roofline_pct=used_pct,
                peak_memory_mib=end.peak_memory_mib,
                device=end.device,
                precision=end.precision,
            )
        )

    def _end(self, record: RunRecord) -> None:
        if not self._is_over:
            self._say_end(self._job, record)
            self._is_over = True

    def _record(self, state: RunState, reason: str) -> RunRecord:
        return RunRecord(
            cell=self._job.cell,
            variant=self._job.variant,
            seed=self._job.seed,
            state=state,
            reason=reason,
            device=self._job.device,
            precision=self._config.train.precision,
            data_checksum=self._dataset.info.checksum,
            started_at=self._begun_at,
            environment=self._job.environment,
            epochs=tuple(self._epochs),
            num_micro_batches=self._job.num_micro_batches,
            num_fused=self._num_fused,
            num_devices=self._config.run.devices_per_run,
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
        "num_devices": config.run.devices_per_run,
        **records.running_versions(),
    }
    text = json.dumps(parts, sort_keys=True)
    return Keeper(
        records.checkpoint_folder(Path(job.checkpoint_root), job.cell),
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
                self._jobs.put(job_from(job))
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
        self._is_muted = False

    def mute(self) -> None:
        """Leaves all but a lack of memory to the leader of its peers."""
        self._is_muted = True

    def begin(self, job: Job) -> None:
        self._job = job

    def say(self, event: Event, job: Job | None = None, **values: object) -> None:
        """Says what is of one run of the job, or of its first."""
        if self._is_muted and event != "out_of_memory":
            return
        job = job or self._job
        if job is not None:
            values |= {"cell": job.cell, "attempt": job.attempt}
        self._said_at = time.monotonic()
        try:
            self._answers.write(json.dumps({"event": event, **values}) + "\n")
            self._answers.flush()
        except BrokenPipeError:
            os._exit(0)  # The scheduler is gone; nothing here is to be recorded.

    def say_epoch(self, job: Job, epoch: EpochRecord) -> None:
        self.say("epoch", job, epoch=dataclasses.asdict(epoch))

    def say_alive(self) -> None:
        if time.monotonic() - self._said_at >= _ALIVE_EVERY_S:
            self.say("alive")


def _serve(lock_path: Path, *, num_processes: int) -> None:
    """An executor's life: jobs until its input closes or a signal comes."""
    die_with_parent()
    voice = _Voice()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    torch.set_num_threads(1)
    with lock_path.open("a") as lock, joined(num_processes) as peers:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if peers.leads:
            _lead(peers, voice=voice)
        else:
            _follow(peers, voice=voice)


def _lead(peers: Peers, *, voice: _Voice) -> None:
    """Does the scheduler's jobs, and has its peers do them too."""
    inbox = _Inbox(sys.stdin)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, inbox.catch)
    voice.say("ready", versions=records.running_versions())
    held: dict[tuple[str, str], data.Feed] = {}
    for job in inbox.jobs():
        peers.hear(json.dumps(dataclasses.asdict(job)))
        _do(job, held=held, voice=voice, inbox=inbox, peers=peers)
    peers.hear("")


def _follow(peers: Peers, *, voice: _Voice) -> None:
    """Does the leader's jobs with it. What signals ask of all, it is told by it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    voice.mute()
    held: dict[tuple[str, str], data.Feed] = {}
    while line := peers.hear(""):
        _do(job_from(json.loads(line)), held=held, voice=voice, inbox=None, peers=peers)


def _do(
    job: Job,
    *,
    held: dict[tuple[str, str], data.Feed],
    voice: _Voice,
    inbox: _Inbox | None,
    peers: Peers,
) -> None:
    """Brings the runs of a job to their files, or says why they have none."""
    voice.begin(job)
    job = _placed(job, peers)
    folder = Path(job.study_folder)
    open_jobs = {one.cell: one for one in job.each}

    def should_stop() -> bool:
        voice.say_alive()
        return peers.agree(inbox is not None and inbox.stopping.is_set())

    def word(epochs: Sequence[EpochRecord]) -> str:
        voice.say("waiting", epochs=[dataclasses.asdict(epoch) for epoch in epochs])
        return peers.hear(inbox.word() if inbox else "")

    def end(one: Job, record: RunRecord) -> None:
        if not peers.leads:
            return
        records.write_run(record, folder)
        records.remove_checkpoints(folder, one.cell)
        del open_jobs[one.cell]
        voice.say("finished", one)

    event: Event
    try:
        return execute(
            job,
            dataset=_dataset(job, held),
            on_epoch=voice.say_epoch,
            on_end=end,
            word=word,
            should_stop=should_stop,
            peers=peers,
        )
    except RunStoppedError as error:
        event, reason = "stopped", str(error)
    except Exception as error:
        if not _is_for_scheduler(error):
            raise
        _logger.exception("run %s of %s is handed back", job.cell, job.variant)
        event = "disk_full" if records.is_disk_full(error) else "out_of_memory"
        reason = str(error).partition("\n")[0]
    for one in open_jobs.values():
        voice.say(event, one, reason=reason)
    if peers.count > 1 and event != "stopped":
        os._exit(1)  # Its peers wait for it in mid-step, and end with it.


def _placed(job: Job, peers: Peers) -> Job:
    """The job on the device of this process: they follow one another."""
    if job.device == "cpu":
        return job
    first = torch.device(job.device).index or 0
    return replace(job, device=f"cuda:{first + peers.rank}")


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
        folder,
        config=config.data,
        device=device,
        num_sharing=config.run.executors * config.run.devices_per_run,
    )


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), num_processes=int(sys.argv[2]))
