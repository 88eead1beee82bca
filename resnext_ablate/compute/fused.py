"""Batch norm, ReLU and the residual addition as one differentiable step.

On a CPU compiled loops read and write activations, and what is per channel is NumPy; on
CUDA Triton's kernels do, and all is tensors. Both have the same functions. Features are
bfloat16 or float32 (N, C, H, W), channels-last, and so are their gradients.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resnext_ablate.compute import loops
from resnext_ablate.compute.lanes import WIDE
from resnext_ablate.compute.loops import Activations

PerChannel = loops.PerChannel | Tensor
"""(4, C), of the device's kind."""
Moments = loops.PerChannel
"""(2, C): mean and biased variance of each channel over a batch."""


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
    theirs: PerChannel | None
    """Changes nothing where the skip has no norm."""
    is_skip_normed: bool


def relu_forward(
    features: Tensor, norm: nn.BatchNorm2d, *, moments: Moments | None = None
) -> tuple[Tensor, PerChannel]:
    """relu(norm(features)) of dense features, and the norm as `loops.normalise`.

    Who knows the moments of the features saves reading them once.
    """
    normed = _normalise(features, norm, moments)
    out = torch.empty_like(features)
    _kernels(features).relu(_rows(features), normed, _rows(out))
    return out, normed


def relu_backward(
    grad: Tensor, features: Tensor, normed: PerChannel, *, overwrites: bool = False
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Gradients of the features, and of the norm's weight and bias.

    It may overwrite the features, dense ones: memory just read is written faster.
    """
    kernels = _kernels(features)
    rows, grad_rows = _rows(features), _rows(dense(grad))
    sums, products = kernels.relu_sums(grad_rows, rows, normed)
    grads = kernels.gradients(normed, sums, products, _count(features))
    out = features if overwrites else torch.empty_like(features)
    kernels.relu_backward(grad_rows, rows, normed, grads, _rows(out))
    return out, _affine(grads)


def sum_forward(
    features: Tensor,
    norm: nn.BatchNorm2d,
    skip: Tensor,
    skip_norm: nn.BatchNorm2d | None,
    *,
    moments: tuple[Moments | None, Moments | None] = (None, None),
) -> tuple[Tensor, SummedNorms]:
    """relu(norm(features) + skip_norm(skip)) of dense features, and the norms.

    Moments are those of features and skip, as `relu_forward` takes.
    """
    kernels = _kernels(features)
    own = _normalise(features, norm, moments[0])
    theirs = kernels.identity(own)
    if skip_norm:
        theirs = _normalise(skip, skip_norm, moments[1])
    out = torch.empty_like(features)
    kernels.relu_of_sum(_rows(features), own, _rows(skip), theirs, _rows(out))
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
    kernels, own, theirs = _kernels(features), norms.own, norms.theirs
    terms = (_rows(dense(grad)), _rows(features), _rows(skip))
    sums, products, skip_products = kernels.relu_of_sum_sums(*terms, own, theirs)
    count = _count(features)
    own_grads = kernels.gradients(own, sums, products, count)
    # An identity passes its gradient on as it is.
    their_grads = (
        kernels.gradients(theirs, sums, skip_products, count)
        if norms.is_skip_normed
        else kernels.no_gradients(own_grads)
    )
    out = features if overwrites else torch.empty_like(features)
    # A skip without a norm is the input of a block, whose convolutions need it yet.
    is_free = overwrites and norms.is_skip_normed
    skip_out = skip if is_free else torch.empty_like(features)
    grads, outs = (own_grads, their_grads), (_rows(out), _rows(skip_out))
    kernels.relu_of_sum_backward(*terms, (own, theirs), grads, *outs)
    skip_affine = _affine(their_grads) if norms.is_skip_normed else ()
    return out, skip_out, _affine(own_grads), skip_affine


def relu_in_place(features: Tensor) -> None:
    """Of dense features on a CPU."""
    rows, nothing = _rows(features), _no_norm(features.shape[1])
    loops.relu(rows, nothing, rows)


def add_and_relu_in_place(features: Tensor, skip: Tensor) -> None:
    """relu(features + skip) into the features, both dense and on a CPU."""
    rows, nothing = _rows(features), _no_norm(features.shape[1])
    loops.relu_of_sum(rows, nothing, _rows(skip), nothing, rows)


def add(grad: Tensor, skip_grad: Tensor, *, stride: int) -> None:
    """Adds to a gradient in place that of its every stride-th pixel; both dense."""
    if not _is_on_cpu(grad):
        grad[:, :, ::stride, ::stride] += skip_grad
    elif stride == 1:  # Whole rows are as good as pixels, and fill vectors.
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


def _is_on_cpu(features: Tensor) -> bool:
    return features.is_cpu


def _kernels(features: Tensor) -> Any:
    """The functions of a device, on what `_rows` makes of its features."""
    if _is_on_cpu(features):
        return loops
    # Imported here because a machine without a GPU may have no Triton.
    from resnext_ablate.compute import triton_norms

    return triton_norms


def _normalise(
    features: Tensor, norm: nn.BatchNorm2d, moments: Moments | None
) -> PerChannel:
    """As `loops.normalise`, by and on the tensors of a module."""
    mean, variance, num_batches = (
        norm.running_mean,
        norm.running_var,
        norm.num_batches_tracked,
    )
    assert mean is not None and variance is not None and num_batches is not None
    assert norm.momentum is not None
    tensors = (norm.weight, norm.bias, mean, variance)
    settings = (norm.momentum, norm.eps)
    normed: PerChannel
    if _is_on_cpu(features):
        num_batches.add_(1)  # In place: assigning to a module takes longer.
        arrays = (_values(tensor, (len(tensor),)) for tensor in tensors)
        known = moments_of(features) if moments is None else moments
        normed = loops.normalise(known, _count(features), *arrays, *settings)
    else:
        rows = _rows(features)
        detached = (tensor.detach() for tensor in tensors)
        normed = _kernels(features).normalise(rows, *detached, num_batches, *settings)
    return normed


def moments_of(features: Tensor) -> Moments:
    """Of dense features on a CPU."""
    moments: Moments = loops.moments(_rows(features), features.shape[1])
    return moments


@lru_cache(maxsize=64)
def _no_norm(channels: int) -> loops.PerChannel:
    """Of so many channels, which it leaves as they are."""
    return loops.identity(np.empty((4, channels), np.float32))


def _count(features: Tensor) -> int:
    """Values of a channel."""
    return features.numel() // features.shape[1]


def dense(features: Tensor) -> Tensor:
    """(N, C, H, W) with one pixel's channels side by side, copied where it must be."""
    return features.contiguous(memory_format=torch.channels_last)


def empty(
    like: Tensor, height: int, width: int, *, channels: int | None = None
) -> Tensor:
    """Dense (N, C, height, width) of another's kind and batch, and of its channels
    where no others are asked for."""
    size = (like.shape[0], height, width, channels or like.shape[1])
    return torch.empty(size, dtype=like.dtype).permute(0, 3, 1, 2)


def pixels(features: Tensor) -> Tensor:
    """Dense (N, C, H, W) as (N H W, C), without a copy."""
    channels = features.shape[1]
    size = features.numel() // channels, channels
    return features.as_strided(size, (channels, 1))


def _affine(grads: PerChannel) -> tuple[Tensor, Tensor]:
    tensor = grads if isinstance(grads, Tensor) else torch.from_numpy(grads)
    return tensor[0], tensor[1]


def flat(features: Tensor) -> Activations:
    """All values of dense (N, C, H, W) on a CPU, without a copy."""
    return _values(features, (features.numel(),))


def _images(features: Tensor) -> Activations:
    """Dense (N, C, H, W) as (N, H, W, C), without a copy."""
    count, channels, height, width = features.shape
    return _values(features, (count, height, width, channels))


def _rows(features: Tensor) -> Activations | Tensor:
    """Dense (N, C, H, W) as rows of whole pixels, without a copy.

    For the loops of a CPU pixels are lined up until a row is as long as some vectors.
    """
    if not _is_on_cpu(features):
        return pixels(features.detach())
    return _values(features, _lines(features.numel(), features.shape[1]))


@lru_cache(maxsize=1024)
def _lines(num_values: int, channels: int) -> tuple[int, int]:
    """How many rows, and how long each is."""
    num_pixels, lined_up = num_values // channels, 1
    while lined_up * channels % WIDE and num_pixels % (2 * lined_up) == 0:
        lined_up *= 2
    return num_pixels // lined_up, lined_up * channels


_KINDS: dict[torch.dtype, Any] = {
    torch.bfloat16: np.dtype(np.uint16),
    torch.float32: np.dtype(np.float32),
}


def _values(dense: Tensor, shape: tuple[int, ...]) -> Activations:
    """Float32 as it is, and the bits of bfloat16, without a copy.

    A fifth of the time that torch's own views take, of which a step has hundreds.
    """
    per_pixel = dense.dim() == 4
    order = torch.channels_last if per_pixel else torch.contiguous_format
    assert dense.is_contiguous(memory_format=order), "these values are not dense"
    kind = _KINDS[dense.dtype]
    memory = _memory(dense.nbytes).from_address(dense.data_ptr())
    memory.tensor = dense  # Whoever holds the array holds this.
    values: Activations = np.ndarray(shape, kind, memory)
    return values


@lru_cache(maxsize=1024)
def _memory(num_bytes: int) -> Any:
    return ctypes.c_char * num_bytes
