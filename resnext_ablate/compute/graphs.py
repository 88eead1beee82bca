"""A training step as one CUDA graph: one launch in place of hundreds.

Small nets spend most of a step on launching kernels. The first steps of a run are as
ever, on a stream of their own, and settle what is allocated or chosen by trial; then
the whole step (forward, loss, backward, update) is captured, and replayed on batches
that are copied into their place. The learning rate is a tensor, so that the schedule
goes on; drawing batches and evaluation stay outside.
"""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor

from resnext_ablate.compute.captures import Capture, CudaCapture
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
