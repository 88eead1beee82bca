"""How a run may end before its last epoch."""


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
