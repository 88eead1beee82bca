"""Batch norm, ReLU and the residual addition as one differentiable step on a CPU.

The compiled loops read and write activations; what is per channel is NumPy. Features
are bfloat16 or float32 (N, C, H, W), channels-last, and so are their gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resnext_ablate.compute import loops
from resnext_ablate.compute.lanes import WIDE
from resnext_ablate.compute.loops import Activations, PerChannel


def norm_relu(features: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """relu(norm(features)), by the statistics of the batch."""
    out: Tensor = _NormRelu.apply(features, norm.weight, norm.bias, norm)
    return out


def norm_sum_relu(
    features: Tensor,
    norm: nn.BatchNorm2d,
    skip: Tensor,
    skip_norm: nn.BatchNorm2d | None,
) -> Tensor:
    """relu(norm(features) + skip_norm(skip)); without skip_norm the skip as it is."""
    affine = (None, None) if skip_norm is None else (skip_norm.weight, skip_norm.bias)
    out: Tensor = _NormSumRelu.apply(
        features, norm.weight, norm.bias, norm, skip, *affine, skip_norm
    )
    return out


def fork(features: Tensor, *, stride: int) -> tuple[Tensor, Tensor]:
    """The features twice, the second time every stride-th pixel of a row and column.

    The gradients of the two are added in one pass and in place, so that whatever takes
    the first must put out a gradient of its own, as a convolution does.
    """
    main, skip = _Fork.apply(features, stride)
    return main, skip


class _NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d
    ) -> Tensor:
        """(N, C, H, W) normalised over the batch, then ReLU."""
        features = dense(features)
        out, ctx.normed = relu_forward(features, norm)
        ctx.save_for_backward(features)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (features,) = ctx.saved_tensors
        out, affine = relu_backward(grad, features, ctx.normed)
        return out, *affine, None


class _NormSumRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm: nn.BatchNorm2d,
        skip: Tensor,
        skip_weight: Tensor | None,
        skip_bias: Tensor | None,
        skip_norm: nn.BatchNorm2d | None,
    ) -> Tensor:
        """Normalised features plus the shortcut, normalised or as it is, then ReLU."""
        features, skip = dense(features), dense(skip)
        out, ctx.norms = sum_forward(features, norm, skip, skip_norm)
        ctx.save_for_backward(features, skip)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        features, skip = ctx.saved_tensors
        out, skip_out, affine, skip_affine = sum_backward(
            grad, features, skip, ctx.norms
        )
        return out, *affine, None, skip_out, *(skip_affine or (None, None)), None


@dataclass(frozen=True, slots=True)
class SummedNorms:
    """The norms of the two terms of a sum, as `loops.normalise` returns them."""

    own: PerChannel
    theirs: PerChannel
    """Changes nothing where the skip has no norm."""
    is_skip_normed: bool


def relu_forward(features: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, PerChannel]:
    """relu(norm(features)) of dense features, and the norm as `loops.normalise`."""
    rows = _rows(features)
    normed = _normalise(rows, norm)
    out = torch.empty_like(features)
    loops.relu(rows, normed, _rows(out))
    return out, normed


def relu_backward(
    grad: Tensor, features: Tensor, normed: PerChannel, *, overwrites: bool = False
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Gradients of the features, and of the norm's weight and bias.

    It may overwrite the features, dense ones: memory just read is written faster.
    """
    rows, grad_rows = _rows(features), _rows(dense(grad))
    sums, products = loops.relu_sums(grad_rows, rows, normed)
    count = features.numel() // len(sums)
    grads = loops.gradients(normed, sums, products, count)
    out = features if overwrites else torch.empty_like(features)
    loops.relu_backward(grad_rows, rows, normed, grads, _rows(out))
    return out, _affine(grads)


def sum_forward(
    features: Tensor,
    norm: nn.BatchNorm2d,
    skip: Tensor,
    skip_norm: nn.BatchNorm2d | None,
) -> tuple[Tensor, SummedNorms]:
    """relu(norm(features) + skip_norm(skip)) of dense features, and the norms."""
    rows, skip_rows = _rows(features), _rows(skip)
    own = _normalise(rows, norm)
    theirs = (
        _normalise(skip_rows, skip_norm) if skip_norm else _identity(norm.num_features)
    )
    out = torch.empty_like(features)
    loops.relu_of_sum(rows, own, skip_rows, theirs, _rows(out))
    return out, SummedNorms(own, theirs, skip_norm is not None)


def sum_backward(
    grad: Tensor,
    features: Tensor,
    skip: Tensor,
    norms: SummedNorms,
    *,
    overwrites: bool = False,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Gradients of features and skip, of weight and bias of the norm of each.

    It may overwrite the features, and the skip that has a norm, as `relu_backward` may.
    """
    own, theirs = norms.own, norms.theirs
    terms = (_rows(dense(grad)), _rows(features), _rows(skip))
    sums, products, skip_products = loops.relu_of_sum_sums(*terms, own, theirs)
    count = features.numel() // len(sums)
    own_grads = loops.gradients(own, sums, products, count)
    # An identity passes its gradient on as it is.
    their_grads = (
        loops.gradients(theirs, sums, skip_products, count)
        if norms.is_skip_normed
        else np.zeros_like(own_grads)
    )
    out = features if overwrites else torch.empty_like(features)
    # A skip without a norm is the input of a block, whose convolutions need it yet.
    is_free = overwrites and norms.is_skip_normed
    skip_out = skip if is_free else torch.empty_like(features)
    grads, outs = (own_grads, their_grads), (_rows(out), _rows(skip_out))
    loops.relu_of_sum_backward(*terms, (own, theirs), grads, *outs)
    skip_affine = _affine(their_grads) if norms.is_skip_normed else ()
    return out, skip_out, _affine(own_grads), skip_affine


def add(grad: Tensor, skip_grad: Tensor, *, stride: int) -> None:
    """Adds to a gradient in place that of its every stride-th pixel; both dense."""
    if stride == 1:  # Whole rows are as good as pixels, and fill vectors.
        loops.add(_rows(grad)[None, :, None], _rows(skip_grad)[None, :, None], 1)
    else:
        loops.add(_images(grad), _images(skip_grad), stride)


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        ctx.stride = stride
        main, skip = features.view_as(features), features[:, :, ::stride, ::stride]
        return main, dense(skip)

    @staticmethod
    def backward(ctx: Any, main_grad: Tensor, skip_grad: Tensor) -> Any:
        main_grad, skip_grad = dense(main_grad), dense(skip_grad)
        add(main_grad, skip_grad, stride=ctx.stride)
        return main_grad, None


def _normalise(rows: Activations, norm: nn.BatchNorm2d) -> PerChannel:
    """As `loops.normalise`, by and on the tensors of a module."""
    running_mean, running_var = norm.running_mean, norm.running_var
    assert running_mean is not None and running_var is not None
    assert norm.momentum is not None and norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)  # In place: assigning to a module takes longer.
    tensors = (norm.weight.detach(), norm.bias.detach(), running_mean, running_var)
    arrays = (tensor.numpy() for tensor in tensors)
    normed: PerChannel = loops.normalise(rows, *arrays, norm.momentum, norm.eps)
    return normed


def _identity(num_channels: int) -> PerChannel:
    """A map that changes nothing, as `loops.normalise` would return it."""
    normed = np.zeros((4, num_channels), np.float32)
    normed[1:3] = 1
    return normed


def dense(features: Tensor) -> Tensor:
    """(N, C, H, W) with one pixel's channels side by side, copied where it must be."""
    return features.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def pixels(features: Tensor) -> Tensor:
    """Dense (N, C, H, W) as (N H W, C), without a copy."""
    return features.permute(0, 2, 3, 1).view(-1, features.shape[1])


def _affine(grads: PerChannel) -> tuple[Tensor, Tensor]:
    weight_and_bias = torch.from_numpy(grads)
    return weight_and_bias[0], weight_and_bias[1]


def _images(features: Tensor) -> Activations:
    """Dense (N, C, H, W) as (N, H, W, C), without a copy."""
    return _values(features.detach().permute(0, 2, 3, 1))


def _rows(features: Tensor) -> Activations:
    """Dense (N, C, H, W) as rows of whole pixels, without a copy.

    Pixels are lined up until a row is as long as some vectors.
    """
    channels = features.shape[1]
    num_pixels = features.numel() // channels
    lined_up = 1
    while lined_up * channels % WIDE and num_pixels % (2 * lined_up) == 0:
        lined_up *= 2
    rows = features.detach().permute(0, 2, 3, 1).view(-1, lined_up * channels)
    return _values(rows)


def _values(features: Tensor) -> Activations:
    """Float32 as it is, and the bits of bfloat16."""
    is_narrow = features.dtype == torch.bfloat16
    values: Activations = (
        features.view(torch.uint16) if is_narrow else features
    ).numpy()
    return values
