"""Convolutions by compiled loops of a CPU, as differentiable steps.

Those in groups and those of single pixels are ours. Of a 3 x 3 convolution in one group
torch's output is as fast, and so is its gradient of the features at stride 1.

Features are bfloat16 or, in groups, float32 too: (N, C, H, W), channels-last; so are
their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from resnext_ablate.compute import bf16_groups, bf16_products, fp32_groups
from resnext_ablate.compute.dots import HAS_DOTS
from resnext_ablate.compute.fused import Moments, dense


def is_possible(features: Tensor, *, groups: int) -> bool:
    """Whether the loops can read these features on the CPU at hand."""
    return (
        is_precision_possible(features.dtype, groups=groups)
        and features.device.type == "cpu"
        and features.numel() > 0
    )


def is_precision_possible(precision: torch.dtype, *, groups: int) -> bool:
    """Whether there are loops for it that the CPU at hand can run."""
    if precision == torch.bfloat16:
        return HAS_DOTS
    return precision == torch.float32 and groups > 1


def convolve(features: Tensor, weight: Tensor, *, stride: int) -> Tensor:
    """A convolution, around a 3 x 3 one a pixel of zeros.

    Args:
        features: (N, C, H, W), C at least 16.
        weight: (C, d, 3, 3) of C / d groups, or (C', C, 1, 1), C' at least 16 too; in
            any precision, taken in that of the features.
        stride: 1 or 2; 1 of single pixels.

    Returns:
        (N, C or C', ceil(H / stride), ceil(W / stride)).
    """
    out: Tensor = _Convolution.apply(features, weight, stride)
    return out


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, stride: int) -> Tensor:
        """See `convolve`."""
        features = dense(features)
        narrow = weight.to(features.dtype)
        ctx.save_for_backward(features, narrow)
        ctx.stride, ctx.precision = stride, weight.dtype
        out, _ = forward(features, narrow, stride=stride)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of the features and of the weight."""
        features, weight = ctx.saved_tensors
        out, weight_grad = gradients(dense(grad), features, weight, stride=ctx.stride)
        return out, weight_grad.to(ctx.precision), None


def forward(
    features: Tensor, weight: Tensor, *, stride: int
) -> tuple[Tensor, Moments | None]:
    """As `convolve`, of dense features and a weight of their precision.

    Returns:
        The output, and its moments where they come with it.
    """
    if weight.shape[2] == 1:
        return bf16_products.forward(features, weight)
    if _is_dense(features, weight):
        out = functional.conv2d(features, weight, None, stride, padding=1)
        return dense(out), None
    return in_groups(features, weight, stride=stride), None


def in_groups(
    features: Tensor, weight: Tensor, *, stride: int, bias: Tensor | None = None
) -> Tensor:
    """A convolution in groups, as `convolve`, and a bias (C,)."""
    groups = _groups(features)
    out: Tensor = groups.forward(features, weight, stride=stride, bias=bias)
    return out


def gradients(
    grad: Tensor, features: Tensor, weight: Tensor, *, stride: int
) -> tuple[Tensor, Tensor]:
    """Of the features, and of the weight in float32, from that of the output.

    All are dense, and the weight is in the precision of the features.
    """
    if weight.shape[2] == 1:
        return bf16_products.gradients(grad, features, weight)
    groups = _groups(features)
    weight_grad = groups.weight_gradient(grad, features, weight=weight, stride=stride)
    if stride == 1 and _is_dense(features, weight):
        one, alone = (1, 1), (True, False, False)
        out, _, _ = torch.ops.aten.convolution_backward(
            grad, features, weight, None, one, one, one, False, (0, 0), 1, alone
        )
        return dense(out), weight_grad
    out = groups.features_gradient(grad, weight, features=features, stride=stride)
    return out, weight_grad


def _is_dense(features: Tensor, weight: Tensor) -> bool:
    """Whether a convolution has one group."""
    return features.shape[1] == weight.shape[1]


def _groups(features: Tensor) -> Any:
    """Who computes groups in the precision of these features."""
    return bf16_groups if features.dtype == torch.bfloat16 else fp32_groups
