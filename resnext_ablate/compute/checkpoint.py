"""Checkpoints of a run: whole, checked, and always the last two, so that it goes on.

A checkpoint holds tensors and plain values, so that reading one runs no code. It is
written beside its place and renamed once it is on disk. Its SHA-256 stands in a file
of its own beside it, since a flipped bit in a tensor loads without an error; one that
does not match is thrown away and the one before it is taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnext_ablate.compute.hardware import is_out_of_memory
from resnext_ablate.records.records import EpochRecord, write_atomically

_FORMAT = 1
_NUM_KEPT = 2
_LARGEST_SHARE = 0.01
"""Share of a run's time that saving at every epoch's end may take."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run between two steps."""

    epochs: tuple[EpochRecord, ...]
    """Those that are over."""
    step: int
    """Steps done of the epoch under way."""
    losses: Tensor
    """(step,): of those steps."""
    num_wrong: int
    """Training images that those steps got wrong."""
    time_s: float
    """Training time of those steps."""
    model: dict[str, Tensor]
    """Weights and the buffers of batch normalisation."""
    optimizer: dict[str, Any]
    random_states: dict[str, Tensor]
    """Of torch's generators, by device."""


class Keeper:
    """Where the checkpoints of one run are, and when the next one is due.

    Args:
        folder: of this run alone; created with the first checkpoint.
        identity: all that a run's numbers depend on. A checkpoint of another identity
            is never gone on with.
        every_s: seconds after which one is due at the next step. At the end of an
            epoch one is due sooner, unless saving would then take over 1 % of the time.
    """

    def __init__(self, folder: Path, *, identity: str, every_s: float) -> None:
        self._folder = folder
        self._identity = identity
        self._every_s = every_s
        self._saved_at = time.monotonic()
        self._cost_s = 0.0

    def is_due(self, *, at_epoch_end: bool) -> bool:
        since = time.monotonic() - self._saved_at
        worth_it = at_epoch_end and since * _LARGEST_SHARE >= self._cost_s
        return worth_it or since >= self._every_s

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint; the one before it stays, older ones go.

        Raises:
            OSError: it cannot be written; earlier ones are as they were.
        """
        start = time.monotonic()
        values = {
            "format": _FORMAT,
            "identity": self._identity,
            **{
                field.name: getattr(checkpoint, field.name)
                for field in dataclasses.fields(checkpoint)
            },
            "epochs": [dataclasses.asdict(epoch) for epoch in checkpoint.epochs],
        }
        buffer = io.BytesIO()
        torch.save(values, buffer)
        content = buffer.getvalue()
        name = f"{len(checkpoint.epochs):06}-{checkpoint.step:08}.pt"
        path = self._folder / name
        digest = hashlib.sha256(content).hexdigest()
        # The sum first: a kill in between leaves a sum without its file, which is none.
        write_atomically(_sum_path(path), f"{digest}  {name}\n".encode())
        write_atomically(path, content)
        for old in self._newest_first()[_NUM_KEPT:]:
            _remove(old)
        self._saved_at = time.monotonic()
        self._cost_s = self._saved_at - start

    def load(self) -> Checkpoint | None:
        """The newest checkpoint that is whole and of this run; None where none is."""
        (kept,) = load_together([self])
        return kept

    def names(self) -> list[str]:
        """Of the checkpoints that are there, the newest first."""
        for litter in self._folder.glob(".*"):  # Of a process killed while it wrote.
            litter.unlink()
        return [path.name for path in self._newest_first()]

    def read(self, name: str) -> Checkpoint | None:
        """A checkpoint; None, and it goes, where it is not whole and of this run."""
        path = self._folder / name
        try:
            return self._read(path)
        except Exception as error:  # torch.load raises almost anything.
            if is_out_of_memory(error):
                raise
            _logger.warning("%s is passed over: %s", path, error)
            _remove(path)
            return None

    def _read(self, path: Path) -> Checkpoint:
        content = path.read_bytes()
        wanted = _sum_path(path).read_text(encoding="ascii").partition(" ")[0]
        if hashlib.sha256(content).hexdigest() != wanted:
            raise ValueError("its SHA-256 is not the one beside it")
        values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        found = values.pop("format"), values.pop("identity")
        if found != (_FORMAT, self._identity):
            raise ValueError("it is of a run with other settings")
        epochs = tuple(EpochRecord(**epoch) for epoch in values.pop("epochs"))
        return Checkpoint(epochs=epochs, **values)

    def _newest_first(self) -> list[Path]:
        return sorted(self._folder.glob("[0-9]*.pt"), reverse=True)


def load_together(keepers: Sequence[Keeper]) -> tuple[Checkpoint | None, ...]:
    """The newest checkpoints of the same step, one of each keeper; else all None.

    A kill while seeds that train together are saved leaves them a step apart, and the
    step before with all.
    """
    shared = set.intersection(*(set(keeper.names()) for keeper in keepers))
    for name in sorted(shared, reverse=True):
        found = tuple(keeper.read(name) for keeper in keepers)
        if None not in found:
            return found
    return (None,) * len(keepers)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The state of every generator that a run on a device could draw from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Tensor], *, device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def _sum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _remove(path: Path) -> None:
    for one in (path, _sum_path(path)):
        with contextlib.suppress(FileNotFoundError):
            one.unlink()
