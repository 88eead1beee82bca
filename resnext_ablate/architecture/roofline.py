"""The least time that a device needs for a net, layer by layer, from its shapes.

Each convolution must do its multiply-adds and move its tensors once, so it takes at
least the longer of the two. Batch norm, ReLU and addition are taken as fused into their
neighbours: they cost nothing here. No kernel library does all of that, which makes this
a floor rather than a forecast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from resnext_ablate.architecture.shapes import Conv
from resnext_ablate.architecture.spec import ResNeXtSpec


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """What a device can do, as measured on it."""

    macs_per_s: float
    """Multiply-adds of a large matrix product."""
    bytes_per_s: float
    """Bytes read and written by a large copy."""
    bytes_per_value: int
    """Of weights and activations in the precision of training: 4 or 2."""


def training_floor_s(
    spec: ResNeXtSpec, *, image_size: int, batch_size: int, peaks: Peaks
) -> float:
    """Least seconds of a training step: forward, and both halves of backward."""
    layers = _layers(spec, image_size=image_size, batch_size=batch_size)
    return sum(
        passes * _pass_floor_s(layer, peaks)
        # Outputs, gradient of the inputs and gradient of the weights read two of the
        # three tensors and write the third; nothing asks for the images' gradient.
        for position, layer in enumerate(layers)
        for passes in (2 if position == 0 else 3,)
    )


def forward_floor_s(
    spec: ResNeXtSpec, *, image_size: int, batch_size: int, peaks: Peaks
) -> float:
    """Least seconds of a forward pass."""
    layers = _layers(spec, image_size=image_size, batch_size=batch_size)
    return sum(_pass_floor_s(layer, peaks) for layer in layers)


@dataclass(frozen=True, slots=True)
class _Layer:
    macs: int
    values: int
    """Of inputs, outputs and weights."""


def _layers(spec: ResNeXtSpec, *, image_size: int, batch_size: int) -> Iterator[_Layer]:
    layout = spec.layout(image_size)
    for conv in layout.convs:
        weights = conv.num_weights * conv.branches
        yield _Layer(
            macs=batch_size * weights * conv.out_side**2,
            values=weights + batch_size * _moved(conv),
        )
    head = layout.head
    weights = head.in_features * head.out_features
    yield _Layer(
        macs=batch_size * weights,
        values=weights + batch_size * (head.in_features + head.out_features),
    )


def _moved(conv: Conv) -> int:
    """Values of one image that a convolution reads and writes."""
    # The branches of a block share what its first layer reads.
    readers = 1 if conv.path.endswith("conv1") else conv.branches
    inputs = conv.in_channels * readers
    outputs = conv.out_channels * conv.branches
    # A strided 1x1 convolution reads only the pixels that it uses.
    read_side = conv.out_side if conv.kernel_size == 1 else conv.in_side
    return inputs * read_side**2 + outputs * conv.out_side**2


def _pass_floor_s(layer: _Layer, peaks: Peaks) -> float:
    compute = layer.macs / peaks.macs_per_s
    traffic = layer.values * peaks.bytes_per_value / peaks.bytes_per_s
    return max(compute, traffic)
