"""One training step, alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.compute.data import Batch
from resnext_ablate.compute.learner import compile_loops, new_learner, update
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


SIGNATURES = """
import json, sys, torch
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.compute import bf16_group_loops, bf16_product_loops
from resnext_ablate.compute import bf16_weight_loops
from resnext_ablate.compute import fp32_group_loops, image_loops, loops
from resnext_ablate.compute.data import Batch, augment, draw_epoch
from resnext_ablate.compute.layers import conv_key, has_direct
from resnext_ablate.compute.learner import compile_loops, new_learner, update
from resnext_ablate.records.config import TrainConfig

def count():
    modules = (
        loops,
        bf16_group_loops,
        bf16_product_loops,
        bf16_weight_loops,
        fp32_group_loops,
        image_loops,
    )
    values = [value for module in modules for value in vars(module).values()]
    return sum(len(getattr(value, "signatures", ())) for value in values)

spec, precision = parse_spec(sys.argv[1]), sys.argv[2]
convs = [conv for conv in spec.layout(16).convs if has_direct(conv)]
learner = new_learner(
    spec,
    generators=[torch.Generator().manual_seed(0)],
    config=TrainConfig(
        epochs=1,
        precision=precision,
        kernels="fused",
        conv_forms={conv_key(conv): "direct" for conv in convs},
    ),
    image_size=16,
    device=torch.device("cpu"),
)
before = count()
compile_loops(learner)
compiled = count()
channels = spec.in_channels
draws = draw_epoch(9, crop_padding=2, flip=True, generator=torch.Generator())
images = augment(
    torch.zeros(9, 16, 16, channels, dtype=torch.uint8),
    positions=draws.order[2:7],
    shift=draws.shift[2:7],
    mirrored=draws.mirrored[2:7],
    mean=torch.ones(channels),
    std=torch.ones(channels),
)
batch = Batch(images, torch.zeros(5, 1).long())
update(learner, batch, learning_rate=0.1, wrong=torch.zeros(1, dtype=torch.int64))
print(json.dumps([len(convs), before, compiled, count()]))
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["resnext20-32x1.2.3d-t16", "resnext20-2x10.15.40d-t16"]
)
def test_a_step_compiles_nothing_that_was_not_compiled(
    name: str, precision: str
) -> None:
    """In a new process: blocks with and without a projection, groups of widths that
    divide a vector, that do not, and that fill some, at both strides."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNATURES, name, precision],
        capture_output=True,
        check=True,
        text=True,
    )
    num_direct, before, compiled, after = json.loads(done.stdout)
    assert num_direct == 21  # All but the stem.
    assert before < compiled == after


def test_compiling_leaves_a_net_as_it_was() -> None:
    """Weights, running averages, gradients and the random state of torch."""
    learner = new_learner(
        parse_spec("resnext11-4x2d-t8-in1"),
        generators=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        config=TrainConfig(epochs=1, precision="fp32", kernels="fused"),
        image_size=8,
        device=CPU,
    )
    state = {key: value.clone() for key, value in learner.model.state_dict().items()}
    drawn = torch.get_rng_state()
    compile_loops(learner)
    for key, value in learner.model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(weight.grad is None for weight in learner.model.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)
