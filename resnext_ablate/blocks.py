"""Residual blocks and their layers as modules, built from the shapes of a spec."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from resnext_ablate.shapes import Block, Conv, Norm


class ResidualBlock(nn.Module):
    """A block of any kind and form: its steps in order, then the addition."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        own = [step for step in block.steps if not step.in_branches]
        for step in own:
            self.add_module(_name(step), layer(step))
        inside = [step for step in block.steps if step.in_branches]
        if inside:
            count = inside[0].branches
            self.branches = nn.ModuleList(_branch(inside) for _ in range(count))
        if block.projection:
            projection = nn.Sequential(*map(layer, block.projection))
            self.add_module(_projection_name(block), projection)

        # Pre-activation blocks open with a batch norm, all but the first of a net.
        self._opens_with_norm = isinstance(block.steps[0], Norm)
        self._is_post = isinstance(block.steps[-1], Norm)
        names = tuple(_name(step) for step in own)
        self._steps = names[self._opens_with_norm :]
        self._silent_step = names[-1] if self._is_post else ""

    def forward(self, features: Tensor) -> Tensor:
        """Float (N, in, H, W) -> (N, out, H / stride, W / stride)."""
        out = features
        if self._opens_with_norm:
            out = functional.relu(self.get_submodule("bn1")(out), inplace=True)
        entry = out if self.block.projects_activated else features
        if self.block.form != "c":
            out = self._through_branches(out)
        out = self._run(self._steps, out)
        if self.block.has_shortcut:
            out += self._shortcut(entry)
        return functional.relu(out, inplace=True) if self._is_post else out

    def _run(self, names: Sequence[str], features: Tensor) -> Tensor:
        """The named steps, with ReLU behind each batch norm but the block's last."""
        for name in names:
            features = self.get_submodule(name)(features)
            if name.startswith("bn") and name != self._silent_step:
                features = functional.relu(features, inplace=True)
        return features

    def _through_branches(self, features: Tensor) -> Tensor:
        """(a) sums what the branches put out, (b) concatenates it."""
        outs: list[Tensor] = [branch(features) for branch in self.branches]
        if self.block.form == "b":
            return torch.cat(outs, dim=1)
        total = outs[0]
        for out in outs[1:]:
            total = total + out
        return total

    def _shortcut(self, features: Tensor) -> Tensor:
        block = self.block
        if block.projection:
            projected: Tensor = self.get_submodule(_projection_name(block))(features)
            return projected
        if block.stride > 1:
            features = features[:, :, :: block.stride, :: block.stride]
        added = block.out_channels - block.in_channels
        # From the last dimension on, (before, after) each: W, H, then the channels.
        return functional.pad(features, (0, 0, 0, 0, 0, added)) if added else features


def layer(step: Conv | Norm) -> nn.Conv2d | nn.BatchNorm2d:
    """The module of a shape; one branch's, where the shape is of several."""
    if isinstance(step, Norm):
        return nn.BatchNorm2d(step.channels)
    return nn.Conv2d(
        step.in_channels,
        step.out_channels,
        step.kernel_size,
        stride=step.stride,
        padding=(step.kernel_size - 1) // 2,
        groups=step.groups,
        bias=step.has_bias,
    )


def _branch(steps: Iterable[Conv | Norm]) -> nn.Sequential:
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for step in steps:
        modules[_name(step)] = layer(step)
        if isinstance(step, Norm):
            modules[_name(step).replace("bn", "relu")] = nn.ReLU(inplace=True)
    return nn.Sequential(modules)


def _name(step: Conv | Norm) -> str:
    return step.path.rpartition(".")[2]


def _projection_name(block: Block) -> str:
    return block.projection[0].path.removeprefix(f"{block.path}.").partition(".")[0]
