"""How a run may end before its last epoch."""

import contextlib
import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


class NonFiniteLossError(RuntimeError):
    """A loss became infinite or not a number.

    Attributes:
        epoch: from 1.
        step: from 1, within the epoch.
    """

    def __init__(self, *, split: str, loss: float, epoch: int, step: int) -> None:
        super().__init__(
            f"{split} loss is {loss} at epoch {epoch}, step {step}; a lower "
            "train.learning_rate or some train.warmup_fraction may help."
        )
        self.epoch = epoch
        self.step = step


class RunStoppedError(Exception):
    """A run ended at a step because it was asked to; its keeper has a checkpoint."""


def die_with_parent() -> None:
    """Ends this process, even a stopped one, with the one that started it, where the
    system can do that."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
