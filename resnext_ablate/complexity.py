"""Complexity of a spec in closed form, summed over the shapes the model is built of.

FLOPs are multiply-adds of convolutions and the linear head, as in the paper (Sec. 5).
Activations are the outputs of all convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass

from resnext_ablate.spec import Conv, Head, ResNeXtSpec


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
    return convs_complexity(layout.convs) + head_complexity(layout.head)


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
            convs_complexity((layout.stem,)),
        )
    ]
    for stage in range(1, spec.num_stages + 1):
        blocks = [block for block in layout.blocks if block.stage == stage]
        rows.append(
            StageComplexity(
                f"stage {stage}",
                len(blocks),
                blocks[-1].conv3.out_side,
                blocks[-1].conv3.out_channels,
                spec.cardinalities[stage - 1],
                spec.bottleneck_widths[stage - 1],
                convs_complexity(
                    tuple(conv for block in blocks for conv in block.convs)
                ),
            )
        )
    head = StageComplexity(
        "head", 0, 1, layout.head.out_features, None, None, head_complexity(layout.head)
    )
    return (*rows, head)


def block_params(cardinality: int, bottleneck_width: int, block_channels: int) -> int:
    """Parameters of one block, batch normalisation left out: Eq. 4 of the paper.

    C (256 d + 3 3 d d + d 256), for `block_channels` in place of 256.
    """
    width = bottleneck_width
    return cardinality * (2 * block_channels * width + 9 * width * width)


def convs_complexity(convs: tuple[Conv, ...]) -> Complexity:
    """Sum over convolutions, each with its batch normalisation."""
    total = Complexity(0, 0, 0, 0)
    for conv in convs:
        weights = (
            conv.kernel_size**2 * conv.in_channels * conv.out_channels // conv.groups
        )
        positions = conv.out_side**2
        total += Complexity(
            macs=weights * positions,
            params=weights + 2 * conv.out_channels,
            params_without_bn=weights,
            activations=conv.out_channels * positions,
        )
    return total


def head_complexity(head: Head) -> Complexity:
    """Of the classifier; its outputs are no activations of convolutions."""
    weights = head.in_features * head.out_features
    params = weights + head.out_features
    return Complexity(weights, params, params, 0)
