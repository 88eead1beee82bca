"""Batch norm, ReLU and the residual addition as one differentiable step on a CPU.

The compiled loops read and write activations; what is per channel is NumPy. Features
are bfloat16 or float32 (N, C, H, W), channels-last, and so are their gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from resnext_ablate import loops
from resnext_ablate.loops import Activations, PerChannel

_Sums = npt.NDArray[np.float64]
_ROW_LENGTH = 256
"""Pixels of narrow layers are lined up to rows of about this many values."""


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


@dataclass(frozen=True)
class _Normed:
    """What a batch norm is on one batch: an affine map of each channel."""

    mean: PerChannel
    inverse_std: PerChannel
    scale: PerChannel
    offset: PerChannel

    def gradients(self, sums: _Sums, products: _Sums, *, count: int) -> _Gradients:
        """From the sums over the batch of g and of g (y - mean), g behind the ReLU."""
        weight = products * self.inverse_std
        slope = -self.scale * self.inverse_std * weight / count
        level = -self.scale * sums / count - slope * self.mean
        return _Gradients(
            weight=torch.from_numpy(weight.astype(np.float32)),
            bias=torch.from_numpy(sums.astype(np.float32)),
            slope=slope.astype(np.float32),
            level=level.astype(np.float32),
        )


@dataclass(frozen=True)
class _Gradients:
    """weight, bias: float32 (C,). That of the input y is scale g + slope y + level."""

    weight: Tensor | None
    bias: Tensor | None
    slope: PerChannel
    level: PerChannel


class _NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d
    ) -> Tensor:
        features = _dense(features)
        normed = _normalise(features, norm)
        out = torch.empty_like(features)
        loops.relu(_rows(features), normed.scale, normed.offset, _rows(out))
        ctx.save_for_backward(features)
        ctx.normed = normed
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (features,), normed = ctx.saved_tensors, ctx.normed
        terms = (_rows(_dense(grad)), _rows(features), normed.scale, normed.offset)
        sums, products = np.zeros((2, len(normed.mean)))
        loops.relu_sums(*terms, normed.mean, sums, products)
        count = features.numel() // len(sums)
        own = normed.gradients(sums, products, count=count)
        out = torch.empty_like(features)
        loops.relu_backward(*terms, own.slope, own.level, _rows(out))
        return out, own.weight, own.bias, None


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
        features, skip = _dense(features), _dense(skip)
        normed = _normalise(features, norm)
        skip_normed = _normalise(skip, skip_norm) if skip_norm else _identity(norm)
        offset = normed.offset + skip_normed.offset
        out = torch.empty_like(features)
        own, theirs = (_rows(features), normed.scale), (_rows(skip), skip_normed.scale)
        loops.relu_of_sum(*own, *theirs, offset, _rows(out))
        ctx.save_for_backward(features, skip)
        ctx.normed, ctx.skip_normed = normed, skip_normed
        ctx.is_normed = skip_norm is not None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (features, skip), normed = ctx.saved_tensors, ctx.normed
        skip_normed: _Normed = ctx.skip_normed
        offset = normed.offset + skip_normed.offset
        affine = (normed.scale, skip_normed.scale, offset)
        terms = (_rows(_dense(grad)), _rows(features), _rows(skip), affine)
        sums, products, skip_products = np.zeros((3, len(offset)))
        means = (normed.mean, skip_normed.mean)
        loops.relu_of_sum_sums(*terms, means, sums, products, skip_products)
        count = features.numel() // len(sums)
        own = normed.gradients(sums, products, count=count)
        zeros = np.zeros_like(offset)
        theirs = (
            skip_normed.gradients(sums, skip_products, count=count)
            if ctx.is_normed
            else _Gradients(None, None, slope=zeros, level=zeros)
        )
        out, skip_out = torch.empty_like(features), torch.empty_like(features)
        slopes, levels = (own.slope, theirs.slope), (own.level, theirs.level)
        outs = (_rows(out), _rows(skip_out))
        loops.relu_of_sum_backward(*terms, slopes, levels, *outs)
        affine_grads = (own.weight, own.bias, None)
        return out, *affine_grads, skip_out, theirs.weight, theirs.bias, None


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        ctx.stride = stride
        main, skip = features.view_as(features), features[:, :, ::stride, ::stride]
        return main, _dense(skip)

    @staticmethod
    def backward(ctx: Any, main_grad: Tensor, skip_grad: Tensor) -> Any:
        main_grad = _dense(main_grad)
        if ctx.stride == 1:
            loops.add(_rows(main_grad), _rows(_dense(skip_grad)))
        else:
            main_grad[:, :, :: ctx.stride, :: ctx.stride] += skip_grad
        return main_grad, None


def _normalise(features: Tensor, norm: nn.BatchNorm2d) -> _Normed:
    """The batch's statistics as an affine map; the running averages move."""
    mean, variance = np.empty((2, norm.num_features), np.float32)
    loops.moments(_rows(features), mean, variance)
    count = features.numel() // norm.num_features
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.momentum is not None and norm.num_batches_tracked is not None
    unbiased = variance * np.float32(count / max(1, count - 1))
    momentum = np.float32(norm.momentum)
    for average, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        held = average.numpy()
        held += momentum * (value - held)
    norm.num_batches_tracked += 1
    inverse_std = 1 / np.sqrt(variance + np.float32(norm.eps))
    scale = norm.weight.detach().numpy() * inverse_std
    offset = norm.bias.detach().numpy() - mean * scale
    return _Normed(mean, inverse_std, scale, offset)


def _identity(norm: nn.BatchNorm2d) -> _Normed:
    zeros = np.zeros(norm.num_features, np.float32)
    ones = np.ones(norm.num_features, np.float32)
    return _Normed(mean=zeros, inverse_std=ones, scale=ones, offset=zeros)


def _dense(features: Tensor) -> Tensor:
    """(N, C, H, W) with one pixel's channels side by side, copied where it must be."""
    return features.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _rows(features: Tensor) -> Activations:
    """Dense (N, C, H, W) as rows of whole pixels, without a copy."""
    channels = features.shape[1]
    num_pixels = features.numel() // channels
    lined_up = 1
    while 2 * lined_up * channels <= _ROW_LENGTH and num_pixels % (2 * lined_up) == 0:
        lined_up *= 2
    rows = features.detach().permute(0, 2, 3, 1).view(-1, lined_up * channels)
    bits = rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows
    array: Activations = bits.numpy()
    return array
