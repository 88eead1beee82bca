"""A post-activation block as one differentiable step.

Small batches spend as much time between operations as in them. Here a block is one
node of autograd, which calls its convolutions and fused kernels in a row, forward and
backward, on weights that it casts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnext_ablate.compute import direct, fused
from resnext_ablate.compute.layers import Conv2d, Layer, merged_weight


def block_relu(
    features: Tensor, *, main: Sequence[Layer], projection: Layer | None
) -> Tensor:
    """relu(main(features) + shortcut(features)).

    Args:
        features: bfloat16 or float32 (N, in, H, W).
        main: convolutions without bias and their norms, with a ReLU between them.
        projection: the shortcut's; None passes the features as they are.

    Returns:
        (N, out, H / stride, W / stride) in the precision of the features.
    """
    layers = (*main, projection) if projection else tuple(main)
    tensors = [
        t for conv, norm in layers for t in (conv.weight, norm.weight, norm.bias)
    ]
    out: Tensor = _Block.apply(features, layers, projection is not None, *tensors)
    return out


def is_possible(main: Sequence[Layer], projection: Layer | None) -> bool:
    """Whether `block_relu` computes these layers as they are settled."""
    layers = (*main, projection) if projection else tuple(main)
    return all(
        norm.is_fused and conv.bias is None and "nchw" not in conv.form
        for conv, norm in layers
    ) and all(conv.stride == (1, 1) or not conv.is_product for conv, _ in main)


def act(conv: Conv2d, features: Tensor) -> None:
    """What a block does for a convolution, forward and backward, and for the norm
    behind it as far as that depends on the form."""
    step = _convolve(conv, features)
    if step.moments is None and features.is_cpu:
        fused.moments_of(step.out)
    _gradients(step, step.out)


@dataclass(frozen=True, slots=True)
class _Convolved:
    """A convolution done. Its weight is in its form and in the features' precision."""

    conv: Conv2d
    features: Tensor
    weight: Tensor
    out: Tensor
    moments: fused.Moments | None = None
    """Of the output, where they are known."""


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        layers: Sequence[Layer],
        has_projection: bool,
        *parameters: Tensor,
    ) -> Tensor:
        """(N, C, H, W) to the block's output; keeps what backward needs."""
        inner = features = fused.dense(features)
        main = layers[:-1] if has_projection else layers
        ctx.inner = []
        for conv, norm in main[:-1]:
            step = _convolve(conv, inner)
            inner, normed = fused.relu_forward(step.out, norm, moments=step.moments)
            ctx.inner.append((step, normed))
        conv, norm = main[-1]
        last, skip, skip_norm = _convolve(conv, inner), None, None
        if has_projection:
            conv, skip_norm = layers[-1]
            skip = _convolve(conv, features)
        skip_out = skip.out if skip else features
        moments = (last.moments, skip.moments if skip else None)
        out, norms = fused.sum_forward(
            last.out, norm, skip_out, skip_norm, moments=moments
        )
        ctx.end = (last, skip, skip_out, norms)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of the input and of each parameter, in the order of forward."""
        # What is done is let go at once: memory in the cache serves again.
        step, skip, skip_out, norms = ctx.end
        ctx.end = None
        grad, skip_grad, affine, skip_affine = fused.sum_backward(
            grad, step.out, skip_out, norms, overwrites=True
        )
        del skip_out
        grads, stride = list[Tensor](), 1
        if skip:
            skip_grad, weight_grad = _gradients(skip, skip_grad)
            grads = [weight_grad, *skip_affine]
            stride = skip.conv.stride[0] if skip.conv.is_product else 1
            del skip
        grad, weight_grad = _gradients(step, grad)
        grads = [weight_grad, *affine, *grads]
        while ctx.inner:
            step, normed = ctx.inner.pop()
            grad, affine = fused.relu_backward(grad, step.out, normed, overwrites=True)
            grad, weight_grad = _gradients(step, grad)
            grads = [weight_grad, *affine, *grads]
        fused.add(grad, skip_grad, stride=stride)
        return grad, None, None, *grads


def _convolve(conv: Conv2d, features: Tensor) -> _Convolved:
    weight = conv.weight.detach().to(features.dtype)
    if conv.is_product:
        rows, columns = conv.stride
        features = fused.dense(features[:, :, ::rows, ::columns])
    if _is_direct(conv, features):
        out, moments = direct.forward(features, weight, stride=_stride(conv))
        return _Convolved(conv, features, weight, out, moments)
    if conv.is_product:
        weight = weight.flatten(1)
        pixels = fused.pixels(features)
        out = torch.mm(pixels, weight.t())
        count, _, height, width = features.shape
        out = out.view(count, height, width, -1).permute(0, 3, 1, 2)
        return _Convolved(conv, features, weight, out)
    merged = _merged(conv)
    if merged > 1:
        weight = merged_weight(weight, groups=conv.groups, merged=merged)
    if "triton" in conv.form:
        from resnext_ablate.compute import triton_conv

        weight = weight.contiguous(memory_format=torch.channels_last)
        out = triton_conv.convolved(features, weight, triton_conv.shape(conv, merged))
        return _Convolved(conv, features, weight, out)
    out = torch.conv2d(
        features,
        weight,
        None,
        stride=conv.stride,
        padding=conv.padding,
        groups=conv.groups // merged,
    )
    return _Convolved(conv, features, weight, fused.dense(out))


def _gradients(step: _Convolved, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of the features that a convolution saw, and of its own weight."""
    conv = step.conv
    if _is_direct(conv, step.features):
        features_grad, weight_grad = direct.gradients(
            grad, step.features, step.weight, stride=_stride(conv)
        )
        return features_grad, weight_grad.to(conv.weight.dtype)
    if conv.is_product:
        pixels, given = fused.pixels(step.features), fused.pixels(grad)
        count, _, height, width = step.features.shape
        out = torch.mm(given, step.weight).view(count, height, width, -1)
        # Products with more columns than rows are faster.
        is_wider = conv.out_channels > conv.in_channels
        product = (
            torch.mm(pixels.t(), given).t() if is_wider else torch.mm(given.t(), pixels)
        )
        weight_grad = product.to(conv.weight.dtype).reshape(conv.weight.shape)
        return out.permute(0, 3, 1, 2), weight_grad
    merged = _merged(conv)
    if "triton" in conv.form:
        return _triton_gradients(step, grad, merged=merged)
    features_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        grad,
        step.features,
        step.weight,
        None,
        conv.stride,
        conv.padding,
        conv.dilation,
        False,  # not transposed
        (0, 0),
        conv.groups // merged,
        (True, True, False),
    )
    if merged > 1:
        weight_grad = _blocks_of(weight_grad, groups=conv.groups, merged=merged)
    return fused.dense(features_grad), weight_grad.to(conv.weight.dtype)


def _is_direct(conv: Conv2d, features: Tensor) -> bool:
    return conv.form == "direct" and direct.is_possible(features, groups=conv.groups)


def _stride(conv: Conv2d) -> int:
    """Of the pixels that a product has left, or of those that it has not."""
    return 1 if conv.is_product else conv.stride[0]


def _triton_gradients(
    step: _Convolved, grad: Tensor, *, merged: int
) -> tuple[Tensor, Tensor]:
    """As `_gradients`, of a dense gradient."""
    from resnext_ablate.compute import triton_conv

    conv, weight = step.conv, step.weight
    shape, dtype = triton_conv.shape(conv, merged), conv.weight.dtype
    weight_grad = triton_conv.weight_gradient(
        grad, step.features, shape, size=weight.shape, dtype=dtype
    )
    if merged > 1:
        weight_grad = _blocks_of(weight_grad, groups=conv.groups, merged=merged)
    size = step.features.shape
    return triton_conv.features_gradient(grad, weight, shape, size=size), weight_grad


def _merged(conv: Conv2d) -> int:
    """How many groups are computed as one."""
    _, is_merged, merged = conv.form.rpartition("merge")
    return int(merged) if is_merged else 1


def _blocks_of(dense: Tensor, *, groups: int, merged: int) -> Tensor:
    """What `layers.merged_weight` made of a weight, undone for its gradient."""
    num_out, num_in, *kernel = dense.shape
    size = (groups // merged, merged, num_out // groups, merged, num_in // merged)
    blocks = dense.reshape(*size, *kernel).diagonal(dim1=1, dim2=3).movedim(-1, 1)
    return blocks.reshape(num_out, num_in // merged, *kernel)
