"""Convolutions in groups by compiled loops of a CPU, as differentiable steps.

Features are bfloat16 or float32 (N, C, H, W), channels-last; so are their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnext_ablate.compute import bf16_groups, fp32_groups
from resnext_ablate.compute.dots import HAS_DOTS
from resnext_ablate.compute.fused import dense


def is_possible(features: Tensor) -> bool:
    """Whether the loops can read these features on the CPU at hand."""
    return (
        is_precision_possible(features.dtype)
        and features.device.type == "cpu"
        and features.numel() > 0
    )


def is_precision_possible(precision: torch.dtype) -> bool:
    """Whether the CPU at hand has what the loops need: any has it for float32."""
    return precision == torch.float32 or (precision == torch.bfloat16 and HAS_DOTS)


def convolve(features: Tensor, weight: Tensor, *, stride: int) -> Tensor:
    """A 3 x 3 convolution in groups, with a pixel of zeros around the image.

    Args:
        features: (N, C, H, W), C at least 16.
        weight: (C, d, 3, 3) in any precision; taken in that of the features.
        stride: 1 or 2.

    Returns:
        (N, C, ceil(H / stride), ceil(W / stride)).
    """
    out: Tensor = _Convolution.apply(features, weight, stride)
    return out


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, stride: int) -> Tensor:
        """See `convolve`."""
        features = dense(features)
        ctx.save_for_backward(features, weight)
        ctx.stride = stride
        return forward(features, weight.to(features.dtype), stride=stride)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of the features and of the weight."""
        features, weight = ctx.saved_tensors
        grad = dense(grad)
        narrow = weight.to(features.dtype)
        out = features_gradient(grad, narrow, features=features, stride=ctx.stride)
        weight_grad = weight_gradient(grad, features, weight=weight, stride=ctx.stride)
        return out, weight_grad, None


def forward(
    features: Tensor, weight: Tensor, *, stride: int, bias: Tensor | None = None
) -> Tensor:
    """As `convolve`, of dense features and a weight of their precision, plus a bias
    (C,)."""
    groups = _groups(features)
    out: Tensor = groups.forward(features, weight, stride=stride, bias=bias)
    return out


def features_gradient(
    grad: Tensor, weight: Tensor, *, features: Tensor, stride: int
) -> Tensor:
    """The gradient of the features, from the dense one of the output."""
    groups = _groups(features)
    out: Tensor = groups.features_gradient(
        grad, weight, features=features, stride=stride
    )
    return out


def weight_gradient(
    grad: Tensor, features: Tensor, *, weight: Tensor, stride: int
) -> Tensor:
    """The gradient of a weight, (C, d, 3, 3) in its precision, from dense tensors."""
    groups = _groups(features)
    out: Tensor = groups.weight_gradient(grad, features, weight=weight, stride=stride)
    return out


def _groups(features: Tensor) -> Any:
    """Who computes groups in the precision of these features."""
    return bf16_groups if features.dtype == torch.bfloat16 else fp32_groups
