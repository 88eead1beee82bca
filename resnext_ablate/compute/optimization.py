"""The optimizer of a run, and its learning rate at each step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resnext_ablate.records.config import TrainConfig


def learning_rate(config: TrainConfig, *, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step, counted from 0 over all epochs.

    Each schedule first rises in a straight line over the warm-up; its last step has the
    full rate. Then `step` multiplies by `step_factor` at each milestone, a fraction of
    all epochs; `cosine` falls along half a cosine and `one_cycle` in a straight line,
    both over what the warm-up left and to zero just after the last step.
    """
    total = config.epochs * steps_per_epoch
    warmup = config.warmup_fraction * total
    if step < warmup:
        return config.learning_rate * min(1.0, (step + 1) / warmup)
    left = (total - step) / (total - warmup)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (1 - left)))
    if config.schedule == "one_cycle":
        return config.learning_rate * left
    drops = sum(step >= round(mark * total) for mark in config.step_milestones)
    return config.learning_rate * config.step_factor**drops


class Sgd:
    """`torch.optim.SGD` to the bit, with its groups and its state dict.

    torch's own constructor imports `torch._dynamo`, 1.6 s of every process that trains.

    Attributes:
        param_groups: in each the parameters, `lr`, `momentum`, `nesterov` and
            `weight_decay`.
        state: with momentum the velocity of each parameter, as `momentum_buffer`.
    """

    def __init__(self, param_groups: Sequence[dict[str, Any]]) -> None:
        self.param_groups = list(param_groups)
        # The first step's velocity is the gradient, as it is from zero.
        self.state = {
            parameter: {"momentum_buffer": torch.zeros_like(parameter.detach())}
            for group in self.param_groups
            if group["momentum"]
            for parameter in group["params"]
        }

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def zero_grad(self) -> None:
        """Lets go of all gradients."""
        for parameter in self._parameters():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One update of each parameter that has a gradient."""
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if moved:
                torch._fused_sgd_(
                    moved,
                    [parameter.grad for parameter in moved],
                    [
                        self.state[p]["momentum_buffer"]
                        for p in moved
                        if p in self.state
                    ],
                    weight_decay=group["weight_decay"],
                    momentum=group["momentum"],
                    lr=group["lr"],
                    dampening=0.0,
                    nesterov=group["nesterov"],
                    maximize=False,
                    is_first_step=False,
                )

    def state_dict(self) -> dict[str, Any]:
        """As torch's: tensors by the place of their parameter."""
        places = {p: place for place, p in enumerate(self._parameters())}
        return {
            "state": {places[p]: dict(state) for p, state in self.state.items()},
            "param_groups": [
                {**group, "params": [places[p] for p in group["params"]]}
                for group in self.param_groups
            ],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copies velocities, of a state dict of torch's too; groups stay as they are.

        There a parameter has none before its first step.
        """
        for place, parameter in enumerate(self._parameters()):
            if parameter in self.state:
                held = self.state[parameter]["momentum_buffer"]
                velocity = state_dict["state"].get(place, {}).get("momentum_buffer")
                held.zero_() if velocity is None else held.copy_(velocity)


def make_optimizer(model: nn.Module, *, config: TrainConfig) -> Sgd:
    """SGD whose weight decay may spare batch normalisation and biases."""
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.ndim > 1 or config.decay_norm_and_bias]
    spared = [p for p in parameters if p.ndim <= 1 and not config.decay_norm_and_bias]
    groups = ((decayed, config.weight_decay), (spared, 0.0))
    return Sgd(
        [
            {
                "params": params,
                "weight_decay": weight_decay,
                "lr": config.learning_rate,
                "momentum": config.momentum,
                "nesterov": config.nesterov,
            }
            for params, weight_decay in groups
            if params
        ]
    )
