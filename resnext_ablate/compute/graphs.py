"""A training step as one CUDA graph: one launch in place of hundreds.

Small nets spend most of a step on launching kernels. The first steps of a run are as
ever, on a stream of their own, and settle what is allocated or chosen by trial; then
the whole step (forward, loss, backward, update) is captured, and replayed on batches
that are copied into their place. The learning rate is a tensor, so that the schedule
goes on; drawing batches and evaluation stay outside.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from resnext_ablate.compute.data import Batch
from resnext_ablate.compute.hardware import is_out_of_memory
from resnext_ablate.compute.learner import Learner, update

_NUM_EAGER = 3
"""Steps before the capture; torch asks for some, on a stream beside the default one."""

_logger = logging.getLogger(__name__)


class Step(Protocol):
    """As `learner.update`, for one learner."""

    def __call__(
        self, batch: Batch, *, learning_rate: float, wrong: Tensor
    ) -> Tensor: ...


class Capture(Protocol):
    """What records work on a device and does it again."""

    def beside(self, act: Callable[[], None]) -> None:
        """Does it now, where it would be captured."""

    def record(self, act: Callable[[], None]) -> None:
        """Captures it, without doing it.

        Raises:
            RuntimeError: something in it cannot be captured.
        """

    def replay(self) -> None:
        """Does what was captured."""


class CudaCapture:
    """A CUDA graph and the stream that it is captured on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graph = torch.cuda.CUDAGraph()

    def beside(self, act: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            act()
        current.wait_stream(self._stream)

    def record(self, act: Callable[[], None]) -> None:
        """See `Capture`, as the other two."""
        # Another thread of an executor reads its input; only this one is captured.
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(
                self._graph, stream=self._stream, capture_error_mode="thread_local"
            ),
        ):
            act()

    def replay(self) -> None:
        self._graph.replay()


class GraphedStep:
    """A learner's training step, captured after a few; batches keep their size."""

    def __init__(self, learner: Learner, *, capture: Capture) -> None:
        self._learner = learner
        self._capture = capture
        count = learner.model.copies
        self._batch: Batch | None = None
        self._rate = torch.zeros((), device=learner.device)
        self._wrong = torch.zeros(count, dtype=torch.int64, device=learner.device)
        self._losses = torch.zeros(count, device=learner.device)
        self._num_eager = 0
        self._is_captured = False
        self._cannot = False

    def __call__(self, batch: Batch, *, learning_rate: float, wrong: Tensor) -> Tensor:
        """As `learner.update`; the losses hold until the next step."""
        self._place(batch)
        self._rate.fill_(learning_rate)
        self._wrong.zero_()
        if not (self._is_captured or self._cannot) and self._num_eager >= _NUM_EAGER:
            self._record()
        if self._is_captured:
            self._capture.replay()
        else:
            self._capture.beside(self._act)
            self._num_eager += 1
        wrong += self._wrong
        return self._losses

    def _place(self, batch: Batch) -> None:
        """Copies a batch to where the captured step reads it."""
        if self._batch is None:
            self._batch = Batch(batch.images.clone(), batch.labels.clone())
        else:
            self._batch.images.copy_(batch.images)
            self._batch.labels.copy_(batch.labels)

    def _act(self) -> None:
        assert self._batch is not None
        losses = update(
            self._learner, self._batch, learning_rate=self._rate, wrong=self._wrong
        )
        self._losses.copy_(losses)

    def _record(self) -> None:
        try:
            self._capture.record(self._act)
            self._is_captured = True
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            _logger.warning("no CUDA graph of this net's step: %s", error)
            self._cannot = True


def step_of(learner: Learner) -> Step:
    """A learner's training step as its device does it best."""
    if learner.device.type == "cuda" and learner.peers.count == 1:
        return GraphedStep(learner, capture=CudaCapture(learner.device))

    def eager(batch: Batch, *, learning_rate: float, wrong: Tensor) -> Tensor:
        return update(learner, batch, learning_rate=learning_rate, wrong=wrong)

    return eager
