"""Layers in the fastest exact form for their shape, as drop-ins for torch's own.

Parameters keep torch's names and shapes, so that weights load either way. Each layer
starts in torch's form; `settle` gives a net's layers the forms that a study has chosen,
once for all its runs, because forms differ in rounding.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from resnext_ablate.architecture.shapes import Conv, Layout, Norm
from resnext_ablate.architecture.spec import InputError

Kernels = Literal["torch", "fused"]
"""fused: batch norm, ReLU and the residual addition in one pass, on one CPU thread or
on CUDA by Triton."""

_FEWEST_DIRECT = 16
"""Channels of a vector."""


class Conv2d(nn.Conv2d):
    """A convolution as torch's, computed in one of several exact forms.

    Attributes:
        form: `plain` is torch's; `matmul` multiplies matrices, where the kernel is 1x1;
            `merge4` computes every 4 groups as one dense block, whose weights are zero
            where the groups do not meet; `nchw` and `nchw+merge4` leave channels-last
            for the convolution; `direct` computes groups, 1x1 convolutions and what
            trains 3x3 ones by compiled loops of a CPU, and is torch's where those
            cannot run; `triton` and `triton+merge4` are our own kernels for narrow
            groups on CUDA.
    """

    form: str = "plain"

    @property
    def is_product(self) -> bool:
        """Whether it multiplies matrices, of every stride-th pixel."""
        return self.form == "matmul" or (
            self.form == "direct" and self.kernel_size == (1, 1)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Float (N, in, H, W) -> (N, out, H / stride, W / stride)."""
        if self.form == "plain":
            return super().forward(features)
        if self.is_product:
            rows, columns = self.stride
            return self.pointwise(features[:, :, ::rows, ::columns])
        if self.form == "direct":
            return self._directly(features)
        layout, _, merge = self.form.rpartition("+")
        weight, groups = self.weight, self.groups
        if merge.startswith("merge"):
            merged = int(merge.removeprefix("merge"))
            weight = merged_weight(weight, groups=groups, merged=merged)
            groups //= merged
        if "triton" in (layout, merge):
            return self._by_triton(features, weight, merged=self.groups // groups)
        is_nchw = "nchw" in (layout, merge)
        if is_nchw:
            features, weight = features.contiguous(), weight.contiguous()
        out = functional.conv2d(
            features,
            weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            groups=groups,
        )
        return out.contiguous(memory_format=torch.channels_last) if is_nchw else out

    def _by_triton(self, features: Tensor, weight: Tensor, *, merged: int) -> Tensor:
        """With a weight whose groups are merged so."""
        # Imported here because a machine without a GPU may have no Triton.
        from resnext_ablate.compute import triton_conv

        shape = triton_conv.shape(self, merged)
        return self._with_bias(triton_conv.conv2d(_autocast(features), weight, shape))

    def pointwise(self, features: Tensor) -> Tensor:
        """A 1x1 convolution as a product of matrices, at stride 1."""
        if self.form == "direct":
            return self._directly(features)
        count, channels, height, width = features.shape
        pixels = features.permute(0, 2, 3, 1).reshape(-1, channels)
        out = functional.linear(pixels, self.weight.flatten(1), self.bias)
        return out.view(count, height, width, -1).permute(0, 3, 1, 2)

    def _directly(self, features: Tensor) -> Tensor:
        """By the loops, where they can be run."""
        # Imported here because few who build a net train it this way.
        from resnext_ablate.compute import direct, fused

        features = _autocast(features)
        is_training = torch.is_grad_enabled()
        # In one group it is the gradients that cost torch more.
        is_better = is_training or self.groups > 1
        if not (is_better and direct.is_possible(features, groups=self.groups)):
            if self.is_product:  # Its stride has left out pixels already.
                return functional.conv2d(features, self.weight, self.bias)
            return super().forward(features)
        stride = 1 if self.is_product else self.stride[0]
        if is_training:
            out = direct.convolve(features, self.weight, stride=stride)
            return self._with_bias(out)
        weight, bias = self.weight.to(features.dtype), self.bias
        features = fused.dense(features)
        return direct.in_groups(features, weight, stride=stride, bias=bias)

    def _with_bias(self, out: Tensor) -> Tensor:
        """With the bias that some nets have."""
        return out if self.bias is None else out + self.bias.view(-1, 1, 1).to(out)


def _autocast(features: Tensor) -> Tensor:
    """As torch would cast them for a convolution of its own."""
    kind = features.device.type
    if not torch.is_autocast_enabled(kind):
        return features
    return features.to(torch.get_autocast_dtype(kind))


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation as torch's, along with what follows it.

    Attributes:
        kernels: `fused` takes them in one pass while it trains.
    """

    kernels: Kernels = "torch"

    @property
    def is_fused(self) -> bool:
        return self.kernels == "fused" and self.training

    def relu(self, features: Tensor) -> Tensor:
        """relu(norm(features)), float (N, C, H, W)."""
        if not self.is_fused:
            return functional.relu(self(features), inplace=True)
        # Imported here because few who build a net train it this way.
        from resnext_ablate.compute import fused

        return fused.norm_relu(features, self)

    def relu_of_sum(
        self, features: Tensor, skip: Tensor, skip_norm: nn.BatchNorm2d | None
    ) -> Tensor:
        """relu(norm(features) + skip), the skip normalised where it has a norm."""
        if not self.is_fused:
            out: Tensor = self(features)
            out += skip if skip_norm is None else skip_norm(skip)
            return functional.relu(out, inplace=True)
        from resnext_ablate.compute import fused

        return fused.norm_sum_relu(features, self, skip, skip_norm)


class GlobalAvgPool2d(nn.AdaptiveAvgPool2d):
    """The mean over all pixels, as torch's.

    Attributes:
        kernels: `fused` takes a sum, whose gradient costs a CPU next to nothing. On
            CUDA torch's own is a mean already, which autocast leaves in bfloat16.
    """

    kernels: Kernels = "torch"

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, features: Tensor) -> Tensor:
        """Float (N, C, H, W) -> (N, C, 1, 1)."""
        if self.kernels == "torch" or features.is_cuda:
            return super().forward(features)
        num_pixels = features.shape[2] * features.shape[3]
        return features.sum((2, 3), keepdim=True) / num_pixels


class Head(nn.Linear):
    """A linear layer as torch's, or one for each of several nets side by side.

    Args:
        in_features, out_features: of one net.
        copies: how many nets; its weight and bias hold one after the other.
    """

    def __init__(self, in_features: int, out_features: int, *, copies: int = 1) -> None:
        super().__init__(in_features, copies * out_features)
        self.copies = copies

    def forward(self, features: Tensor) -> Tensor:
        """Float (N, copies * in_features) -> (N, copies * out_features)."""
        if self.copies == 1:
            return super().forward(features)
        parts = (one.chunk(self.copies) for one in (self.weight, self.bias))
        own = features.chunk(self.copies, dim=1)
        return torch.cat([*map(functional.linear, own, *parts)], dim=1)


Layer = tuple[Conv2d, BatchNorm2d]
"""A convolution and the norm behind it."""


class FoldedNorm2d(BatchNorm2d):
    """What stays of a batch norm that is folded into the convolution before it.

    With fused kernels a CPU takes what follows it in one pass, in place.
    """

    def forward(self, features: Tensor) -> Tensor:
        """The features as they are."""
        return features

    def relu(self, features: Tensor) -> Tensor:
        """relu(features)."""
        if not self._has_loops(features):
            return super().relu(features)
        from resnext_ablate.compute import fused

        features = fused.dense(features)
        fused.relu_in_place(features)
        return features

    def relu_of_sum(
        self, features: Tensor, skip: Tensor, skip_norm: nn.BatchNorm2d | None
    ) -> Tensor:
        """relu(features + skip), the skip normalised where its norm is not folded."""
        if not self._has_loops(features) or features.dtype != skip.dtype:
            return super().relu_of_sum(features, skip, skip_norm)
        from resnext_ablate.compute import fused

        if skip_norm is not None:
            skip = skip_norm(skip)
        features = fused.dense(features)
        fused.add_and_relu_in_place(features, fused.dense(skip))
        return features

    def _has_loops(self, features: Tensor) -> bool:
        return (
            self.kernels == "fused"
            and features.is_cpu
            and features.dtype in (torch.bfloat16, torch.float32)
            and not torch.is_grad_enabled()
        )


def fork(features: Tensor, *, stride: int, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """The features twice, the second time every stride-th pixel of a row and column."""
    if kernels == "torch":
        return features, features[:, :, ::stride, ::stride]
    from resnext_ablate.compute import fused

    return fused.fork(features, stride=stride)


def apart(features: Tensor, copies: int) -> Tensor:
    """(N, copies * C, ...) -> (N, copies, C, ...): each net of several side by side."""
    own: Tensor = torch.unflatten(features, 1, (copies, -1))
    return own


def merged_weight(weight: Tensor, *, groups: int, merged: int) -> Tensor:
    """The weight of the same convolution with fewer groups.

    Args:
        weight: float (out, in / groups, k, k).
        groups: of that weight.
        merged: how many groups become one; divides `groups`.

    Returns:
        Float (out, in / groups * merged, k, k): blocks of `weight`, else zeros.
    """
    num_out, num_in, *kernel = weight.shape
    blocks = weight.reshape(groups // merged, merged, -1, 1, num_in, *kernel)
    diagonal = torch.eye(merged, dtype=weight.dtype, device=weight.device)
    dense = blocks * diagonal.view(1, merged, 1, merged, 1, 1, 1)
    return dense.reshape(num_out, num_in * merged, *kernel)


def conv_key(conv: Conv) -> str:
    """Names a convolution's shape in a table of forms."""
    size = conv.kernel_size
    # Groups of several seeds must not be merged across them, unlike those of one net.
    seeds = f" seeds {conv.copies}" if conv.copies > 1 else ""
    return (
        f"{size}x{size} {conv.in_channels}-{conv.out_channels} groups {conv.groups} "
        f"stride {conv.stride} side {conv.in_side}{seeds}"
    )


def settle(
    model: nn.Module, layout: Layout, *, kernels: Kernels, forms: Mapping[str, str]
) -> None:
    """Gives a net's layers their forms.

    Args:
        model: a net of `model.build`.
        layout: of its spec at the size of the images.
        kernels: of every batch norm and of the pooling.
        forms: by `conv_key`; convolutions without one stay plain.

    Raises:
        InputError: a form is none of that shape.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm2d | GlobalAvgPool2d):
            module.kernels = kernels
    for conv in layout.convs:
        place = None if conv.in_branches else model.get_submodule(conv.path)
        if isinstance(place, Conv2d):
            place.form = forms.get(conv_key(conv), "plain")
            _check_form(conv, place.form)
            _check_device(conv, place)


def _check_form(conv: Conv, form: str) -> None:
    _, merges, merged = form.rpartition("merge")
    # Zeros times what is not finite would carry one seed's divergence to another.
    groups = conv.groups // conv.copies
    fits = groups % int(merged) == 0 if merges else True
    if form == "matmul":
        fits = conv.kernel_size == 1 and conv.groups == 1
    if form == "direct":
        fits = has_direct(conv)
    if not fits:
        raise InputError(
            f"train.conv_forms: {conv_key(conv)!r} has no form {form!r}; merge2 needs "
            "groups in pairs, matmul a 1x1 convolution in one group, and direct that "
            f"or a 3x3 one, of {_FEWEST_DIRECT} channels or more."
        )


def has_direct(conv: Conv) -> bool:
    """Whether the form `direct` knows a shape."""
    if min(conv.in_channels, conv.out_channels) < _FEWEST_DIRECT:
        return False
    if conv.kernel_size == 1:
        return conv.groups == 1
    is_square = conv.in_channels == conv.out_channels
    return conv.kernel_size == 3 and is_square and conv.stride <= 2


def _check_device(conv: Conv, module: Conv2d) -> None:
    if "triton" not in module.form:
        return
    device = module.weight.device.type
    if conv.groups == 1 or device != "cuda":
        raise InputError(
            f"train.conv_forms: {conv_key(conv)!r} has no form {module.form!r} on "
            f"{device}; triton needs groups and CUDA."
        )


def folded(model: nn.Module, layout: Layout) -> nn.Module:
    """A copy for evaluation, whose convolutions do the work of the norms behind them.

    The same function by the running averages, up to rounding.
    """
    model = _twin(model).eval()
    for conv_shape, norm_shape in _pairs(layout):
        conv = model.get_submodule(conv_shape.path)
        norm = model.get_submodule(norm_shape.path)
        assert isinstance(conv, Conv2d) and isinstance(norm, BatchNorm2d)
        assert norm.running_mean is not None and norm.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        rest = FoldedNorm2d(norm.num_features).eval()
        rest.kernels = norm.kernels
        model.set_submodule(norm_shape.path, rest)
    return model


def _twin(module: nn.Module) -> nn.Module:
    """The module and those within it anew, around the same tensors.

    A tenth of the time of a deep copy, which is taken at each evaluation.
    """
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    twin._buffers = dict(module._buffers)
    twin._modules = {
        name: child and _twin(child) for name, child in module._modules.items()
    }
    return twin


def _pairs(layout: Layout) -> Iterator[tuple[Conv, Norm]]:
    """Each convolution and the batch norm right behind it, both outside of branches."""
    paths: list[Sequence[Conv | Norm]] = [(layout.stem, layout.stem_norm)]
    for block in layout.blocks:
        paths += [block.steps, block.projection]
    for one, other in itertools.chain.from_iterable(map(itertools.pairwise, paths)):
        in_branches = one.in_branches or other.in_branches
        if isinstance(one, Conv) and isinstance(other, Norm) and not in_branches:
            yield one, other
