"""Several seeds of a net as one net with as many times the groups.

A convolution of K nets side by side is one convolution whose groups are those of all,
and every other layer works channel by channel, so that the nets stay apart: outputs,
gradients and steps are those of each alone, up to rounding. Every tensor of the joint
net holds those of the nets one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from resnext_ablate.compute.data import Batch
from resnext_ablate.compute.model import ResNeXt, with_tensors


def fuse(models: Sequence[ResNeXt]) -> ResNeXt:
    """One net of several of the same spec; a single one as it is."""
    first = models[0]
    if len(models) == 1:
        return first
    tensors = joint([model.state_dict() for model in models])
    net = with_tensors(first.spec, tensors, copies=len(models))
    return net.train(first.training)


def joint(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a joint net from those of its nets."""
    return {key: _cat([part[key] for part in parts]) for key in parts[0]}


def apart(tensors: Mapping[str, Tensor], *, count: int) -> list[dict[str, Tensor]]:
    """The tensors of each net of a joint one, as copies that share no memory."""
    pieces = {key: _pieces(tensor, count=count) for key, tensor in tensors.items()}
    return [{key: of[index] for key, of in pieces.items()} for index in range(count)]


def joint_optimizer(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state dict of an optimizer from those of the nets' own."""
    states = [part["state"] for part in parts]
    return {
        **parts[0],
        "state": {key: joint([state[key] for state in states]) for key in states[0]},
    }


def optimizer_apart(state_dict: dict[str, Any], *, count: int) -> list[dict[str, Any]]:
    """The state dict of an optimizer for each net of a joint one."""
    states = {
        key: apart(state, count=count) for key, state in state_dict["state"].items()
    }
    return [
        {**state_dict, "state": {key: of[index] for key, of in states.items()}}
        for index in range(count)
    ]


def joint_batch(batches: Sequence[Batch]) -> Batch:
    """A batch of each seed as one: images (N, K * C, H, W), labels (N, K)."""
    labels = torch.stack([batch.labels for batch in batches], dim=1)
    if len(batches) == 1:
        return Batch(batches[0].images, labels)
    pixels = [batch.images.permute(0, 2, 3, 1) for batch in batches]
    return Batch(torch.cat(pixels, dim=3).permute(0, 3, 1, 2), labels)


def repeated(images: Tensor, *, count: int) -> Tensor:
    """The same images for each of several nets: (N, C, H, W) -> (N, K * C, H, W)."""
    if count == 1:
        return images
    return images.permute(0, 2, 3, 1).repeat(1, 1, 1, count).permute(0, 3, 1, 2)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    # Counts of batches have no dimension; the nets step together.
    return torch.cat(list(parts)) if parts[0].ndim else parts[0].clone()


def _pieces(tensor: Tensor, *, count: int) -> list[Tensor]:
    parts = tensor.chunk(count) if tensor.ndim else [tensor] * count
    return [part.clone() for part in parts]
