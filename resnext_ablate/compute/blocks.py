"""Residual blocks and their layers as modules, built from the shapes of a spec."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from resnext_ablate.architecture.shapes import Block, Conv, Norm
from resnext_ablate.compute.layers import (
    BatchNorm2d,
    Conv2d,
    Kernels,
    Layer,
    apart,
    fork,
)


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
        names = [_name(step) for step in own]
        self._last_norm = names.pop() if self._is_post else ""
        self._steps = tuple(names[self._opens_with_norm :])
        adds_channels = not block.projection and block.in_channels < block.out_channels
        self._may_be_whole = (
            self._is_post
            and block.form == "c"
            and block.has_shortcut
            and not adds_channels
            and len(block.projection) in (0, 2)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Float (N, in, H, W) -> (N, out, H / stride, W / stride)."""
        if self._may_be_whole and self._norm(self._last_norm).is_fused:
            # Imported here because few who build a net train it this way.
            from resnext_ablate.compute import residual

            layers, projection = self._layers()
            if residual.is_possible(layers, projection):
                return residual.block_relu(features, main=layers, projection=projection)
        if self._opens_with_norm and self.block.projects_activated:
            main, skip = self._fork(self._norm("bn1").relu(features))
        else:
            main, skip = self._fork(features)
            if self._opens_with_norm:
                main = self._norm("bn1").relu(main)
        if self.block.form != "c":
            main = self._through_branches(main)
        for name in self._steps:
            step = self.get_submodule(name)
            main = step.relu(main) if isinstance(step, BatchNorm2d) else step(main)
        return self._end(main, skip)

    def _layers(self) -> tuple[list[Layer], Layer | None]:
        """The convolutions, each with its norm, and those of the shortcut."""
        modules: list[Any] = [
            getattr(self, name) for name in (*self._steps, self._last_norm)
        ]
        main = list(zip(modules[::2], modules[1::2], strict=True))
        if not self.block.projection:
            return main, None
        conv, norm = self._projection()
        assert isinstance(conv, Conv2d) and isinstance(norm, BatchNorm2d)
        return main, (conv, norm)

    def _end(self, main: Tensor, skip: Tensor) -> Tensor:
        """The shortcut added, behind the last batch norm and before its ReLU."""
        if not self.block.has_shortcut:
            return self._norm(self._last_norm).relu(main) if self._is_post else main
        skip, skip_norm = self._shortcut(skip)
        if self._is_post:
            return self._norm(self._last_norm).relu_of_sum(main, skip, skip_norm)
        main += skip
        return main

    def _norm(self, name: str) -> BatchNorm2d:
        norm = self.get_submodule(name)
        assert isinstance(norm, BatchNorm2d)
        return norm

    def _fork(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What the steps and the shortcut start from."""
        if not self.block.has_shortcut:
            return features, features
        in_steps = (m for m in self.children() if isinstance(m, BatchNorm2d))
        is_fused = self.block.form == "c" and any(norm.is_fused for norm in in_steps)
        kernels: Kernels = "fused" if is_fused else "torch"
        return fork(features, stride=self._skip_stride(), kernels=kernels)

    def _skip_stride(self) -> int:
        """How pixels are skipped before a shortcut that does not stride itself."""
        conv = self._projection()[0] if self.block.projection else None
        strides = isinstance(conv, Conv2d) and not conv.is_product
        return 1 if strides else self.block.stride

    def _projection(self) -> nn.Sequential:
        projection = self.get_submodule(_projection_name(self.block))
        assert isinstance(projection, nn.Sequential)
        return projection

    def _through_branches(self, features: Tensor) -> Tensor:
        """(a) sums what the branches put out, (b) concatenates it."""
        outs: list[Tensor] = [branch(features) for branch in self.branches]
        if self.block.form == "b":
            return self._of_each(outs).flatten(1, 2)
        total = outs[0]
        for out in outs[1:]:
            total = total + out
        return total

    def _of_each(self, outs: list[Tensor]) -> Tensor:
        """What branches put out, concatenated for each seed: (N, copies, C, H, W)."""
        return torch.cat([apart(out, self.block.copies) for out in outs], dim=2)

    def _shortcut(self, features: Tensor) -> tuple[Tensor, nn.BatchNorm2d | None]:
        """What is to be added, and the batch norm that it still needs."""
        if not self.block.projection:
            # From the last dimension on, (before, after) each: W, H, then the channels.
            added = self.block.out_channels - self.block.in_channels
            if not added:
                return features, None
            padding = (0, 0, 0, 0, 0, added // self.block.copies)
            own = apart(features, self.block.copies)
            return functional.pad(own, padding).flatten(1, 2), None
        conv, *norms = self._projection()
        assert isinstance(conv, Conv2d)
        projected: Tensor = (
            conv.pointwise(features) if conv.is_product else conv(features)
        )
        return projected, self._norm(
            f"{_projection_name(self.block)}.1"
        ) if norms else None


def layer(step: Conv | Norm) -> Conv2d | BatchNorm2d:
    """The module of a shape; one branch's, where the shape is of several."""
    return norm(step) if isinstance(step, Norm) else convolution(step)


def norm(step: Norm) -> BatchNorm2d:
    return BatchNorm2d(step.channels)


def convolution(step: Conv) -> Conv2d:
    """The module of a convolution, padded so that its side is kept up to the stride."""
    return Conv2d(
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
