"""Complexity of a spec in closed form, summed over the shapes the model is built of.

FLOPs are multiply-adds of convolutions and the linear head, as in the paper (Sec. 5).
Activations are the outputs of all convolutions; in block form (a) of Fig. 3 each branch
puts out all channels of the block, so it has more of them at equal macs and params.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from resnext_ablate.architecture.shapes import Conv, Head, Norm
from resnext_ablate.architecture.spec import ResNeXtSpec


@dataclass(frozen=True, slots=True)
class Complexity:
    """What one net costs per image."""

    macs: int
    """Multiply-adds of convolutions and head."""
    params: int
    """Trainable parameters, scale and shift of batch normalisation included."""
    params_without_bn: int
    """The paper's convention: batch normalisation left out."""
    activations: int
    """Outputs of all convolutions."""

    def __add__(self, other: Complexity) -> Complexity:
        return Complexity(
            self.macs + other.macs,
            self.params + other.params,
            self.params_without_bn + other.params_without_bn,
            self.activations + other.activations,
        )


@dataclass(frozen=True, slots=True)
class StageComplexity:
    """A row of the stage table (Table 1): stem, one of the stages, or head."""

    stage: str
    num_blocks: int
    out_side: int
    out_channels: int
    cardinality: int | None
    bottleneck_width: int | None
    complexity: Complexity


def complexity(spec: ResNeXtSpec, image_size: int) -> Complexity:
    """Macs, params and activations of the whole net on square images.

    Raises:
        InputError: the image is smaller than the net's total stride.
    """
    layout = spec.layout(image_size)
    layers = (*layout.ends, *(one for block in layout.blocks for one in block.layers))
    return layers_complexity(layers) + head_complexity(layout.head)


def stage_table(spec: ResNeXtSpec, image_size: int) -> tuple[StageComplexity, ...]:
    """The net stage by stage; the rows' complexities sum to `complexity`."""
    layout = spec.layout(image_size)
    rows = [
        StageComplexity(
            "stem",
            0,
            layout.stem.out_side,
            layout.stem.out_channels,
            None,
            None,
            layers_complexity((layout.stem, layout.stem_norm)),
        )
    ]
    for stage in range(1, spec.num_stages + 1):
        blocks = [block for block in layout.blocks if block.stage == stage]
        rows.append(
            StageComplexity(
                f"stage {stage}",
                len(blocks),
                blocks[-1].out_side,
                blocks[-1].out_channels,
                spec.cardinalities[stage - 1],
                spec.bottleneck_widths[stage - 1],
                layers_complexity(one for block in blocks for one in block.layers),
            )
        )
    before_head = () if layout.last_norm is None else (layout.last_norm,)
    head_cost = layers_complexity(before_head) + head_complexity(layout.head)
    head = StageComplexity(
        "head", 0, 1, layout.head.out_features, None, None, head_cost
    )
    return (*rows, head)


def block_params(cardinality: int, bottleneck_width: int, block_channels: int) -> int:
    """Parameters of one block, batch normalisation left out: Eq. 4 of the paper.

    C (256 d + 3 3 d d + d 256), for `block_channels` in place of 256.
    """
    width = bottleneck_width
    return cardinality * (2 * block_channels * width + 9 * width * width)


def layers_complexity(layers: Iterable[Conv | Norm]) -> Complexity:
    """Sum over convolutions and batch norms."""
    macs = params = params_of_norms = activations = 0
    for layer in layers:
        if isinstance(layer, Norm):
            params_of_norms += 2 * layer.channels * layer.branches
            continue
        outputs = layer.out_channels * layer.branches
        weights = layer.num_weights * layer.branches
        macs += weights * layer.out_side**2
        params += weights + (outputs if layer.has_bias else 0)
        activations += outputs * layer.out_side**2
    return Complexity(macs, params + params_of_norms, params, activations)


def head_complexity(head: Head) -> Complexity:
    """Of the classifier; its outputs are no activations of convolutions."""
    weights = head.in_features * head.out_features
    params = weights + head.out_features
    return Complexity(weights, params, params, 0)
