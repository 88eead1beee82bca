"""The optimizer of a run, and its learning rate at each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from resnext_ablate.config import TrainConfig


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


def make_optimizer(model: nn.Module, *, config: TrainConfig) -> torch.optim.SGD:
    """SGD whose weight decay may spare batch normalisation and biases."""
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.ndim > 1 or config.decay_norm_and_bias]
    spared = [p for p in parameters if p.ndim <= 1 and not config.decay_norm_and_bias]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=True,
    )
