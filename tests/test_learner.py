"""One training step, alone."""

from __future__ import annotations

import pytest
import torch

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.compute.data import Batch
from resnext_ablate.compute.learner import new_learner, update
from resnext_ablate.records.config import TrainConfig

CPU = torch.device("cpu")


def step(*, num_micro_batches: int) -> tuple[float, int, list[torch.Tensor]]:
    """Loss, wrong answers and gradients of one step whose batch norm is at rest."""
    draws = torch.Generator().manual_seed(1)
    batch = Batch(
        images=torch.randn(29, 1, 8, 8, generator=draws),
        labels=torch.randint(10, (29, 1), generator=draws),
    )
    learner = new_learner(
        parse_spec("resnext11-2x8d-t8-in1"),
        generators=[torch.Generator().manual_seed(0)],
        config=TrainConfig(epochs=1, precision="fp32", kernels="torch"),
        image_size=8,
        device=CPU,
        num_micro_batches=num_micro_batches,
    )
    learner.model.eval()
    wrong = torch.zeros(1, dtype=torch.int64)
    loss = update(learner, batch, learning_rate=0.1, wrong=wrong)
    gradients = [one.grad for one in learner.model.parameters() if one.grad is not None]
    return loss.item(), int(wrong), gradients


@pytest.mark.parametrize("count", [2, 4, 14])
def test_gradients_of_micro_batches_add_up(count: int) -> None:
    """Parts of a batch, of unequal sizes too, have the gradient of the whole batch.

    Batch normalisation by running statistics, so that no part is normed by itself.
    """
    loss, wrong, whole = step(num_micro_batches=1)
    loss_of_parts, wrong_of_parts, parts = step(num_micro_batches=count)
    assert loss_of_parts == pytest.approx(loss, rel=1e-5)
    assert wrong_of_parts == wrong
    assert len(parts) == len(whole) > 20
    for one, other in zip(parts, whole, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
