"""Complexity of a spec in closed form, summed over the shapes the model is built of.

FLOPs are multiply-adds of convolutions and the linear head, as in the paper (Sec. 5).
Activations are the outputs of all convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from resnext_ablate.shapes import Conv, Layout, Norm
from resnext_ablate.spec import ResNeXtSpec


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
    return _of_convs(layout.convs) + _of_norms(layout.norms) + _of_head(layout)


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
            _of_convs((layout.stem,)) + _of_norms((layout.stem_norm,)),
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
                _of_convs(conv for block in blocks for conv in block.convs)
                + _of_norms(norm for block in blocks for norm in block.norms),
            )
        )
    before_head = () if layout.last_norm is None else (layout.last_norm,)
    head_cost = _of_norms(before_head) + _of_head(layout)
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


def _of_convs(convs: Iterable[Conv]) -> Complexity:
    total = Complexity(0, 0, 0, 0)
    for conv in convs:
        weights = conv.num_weights * conv.branches
        biases = conv.out_channels * conv.branches if conv.has_bias else 0
        positions = conv.out_side**2
        total += Complexity(
            macs=weights * positions,
            params=weights + biases,
            params_without_bn=weights + biases,
            activations=conv.out_channels * conv.branches * positions,
        )
    return total


def _of_norms(norms: Iterable[Norm]) -> Complexity:
    scales_and_shifts = sum(2 * norm.channels * norm.branches for norm in norms)
    return Complexity(0, scales_and_shifts, 0, 0)


def _of_head(layout: Layout) -> Complexity:
    head = layout.head
    weights = head.in_features * head.out_features
    params = weights + head.out_features
    return Complexity(weights, params, params, 0)
