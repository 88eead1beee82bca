"""The layers of a net as plain shapes: what complexity sums and the model builds.

A block is a list of steps in forward order. `*` in a step's path stands for the number
of a branch: forms (a) and (b) of Fig. 3 of arXiv:1611.05431 repeat such a step once for
each of their C branches, and form (c) has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

BlockKind = Literal["bottleneck", "basic"]
"""1x1, grouped 3x3, 1x1; or two 3x3, where grouping is dense (Fig. 4)."""
BlockForm = Literal["a", "b", "c"]
"""Fig. 3: C branches, summed; concatenated before the last layer; grouped conv."""
Activation = Literal["post", "pre"]
"""Batch norm and ReLU behind each convolution, or before it (arXiv:1603.05027)."""
Shortcut = Literal["A", "B", "C", "none"]
"""Zero channels added; projections where the shape changes; everywhere; no shortcut."""
Family = Literal["paper", "from_scratch"]
"""`from_scratch` is the tutorial net: convolutions have biases, and a block puts out
twice its inner channels, whatever the template width."""


@dataclass(frozen=True, slots=True)
class Conv:
    """A convolution, or C equal ones. Padding is `(kernel_size - 1) // 2`.

    Sides are in pixels of a square feature map.
    """

    path: str
    """Where torchvision's state dict keeps it, such as `layer1.0.conv2`."""
    stage: int
    """0 for the stem, then 1, 2, ... (conv2, conv3, ... in the paper's Table 1)."""
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    groups: int
    in_side: int
    has_bias: bool = False
    branches: int = 1
    """How many there are of it; channels and groups are those of one."""
    copies: int = 1
    """Seeds side by side: so many times the channels and groups of one net's."""

    @property
    def out_side(self) -> int:
        return strided(self.in_side, self.stride)

    @property
    def num_weights(self) -> int:
        """Weights of one, bias left out."""
        return self.kernel_size**2 * self.in_channels * self.out_channels // self.groups

    @property
    def in_branches(self) -> bool:
        return "*" in self.path

    @property
    def paths(self) -> tuple[str, ...]:
        return _paths(self.path, self.branches)

    def times(self, copies: int) -> Conv:
        """So many of it side by side, as groups."""
        return replace(
            self,
            in_channels=copies * self.in_channels,
            out_channels=copies * self.out_channels,
            groups=copies * self.groups,
            copies=copies,
        )


@dataclass(frozen=True, slots=True)
class Norm:
    """A batch normalisation, or C equal ones."""

    path: str
    stage: int
    channels: int
    branches: int = 1

    @property
    def in_branches(self) -> bool:
        return "*" in self.path

    @property
    def paths(self) -> tuple[str, ...]:
        return _paths(self.path, self.branches)

    def times(self, copies: int) -> Norm:
        """So many of it side by side."""
        return replace(self, channels=copies * self.channels)


@dataclass(frozen=True, slots=True)
class Block:
    """A residual block.

    ReLU follows each batch norm of `steps`; where the last step is one, it follows the
    addition instead.
    """

    path: str
    stage: int
    form: BlockForm
    in_channels: int
    out_channels: int
    in_side: int
    stride: int
    steps: tuple[Conv | Norm, ...]
    """The main path in forward order."""
    projection: tuple[Conv | Norm, ...]
    """1x1 convolution of the shortcut, and its batch norm in post-activation blocks."""
    has_shortcut: bool
    """Without projection it is the identity, with zero channels added where the block
    puts out more, and every `stride`-th pixel."""
    projects_activated: bool
    """The shortcut starts behind the first batch norm and its ReLU: the first block of
    a pre-activation stage."""
    copies: int = 1
    """Seeds side by side, whose channels lie one seed after the other."""

    @property
    def layers(self) -> tuple[Conv | Norm, ...]:
        """Main path first, then the projection."""
        return (*self.steps, *self.projection)

    @property
    def convs(self) -> tuple[Conv, ...]:
        return tuple(layer for layer in self.layers if isinstance(layer, Conv))

    @property
    def out_side(self) -> int:
        return strided(self.in_side, self.stride)

    def times(self, copies: int) -> Block:
        """So many of it side by side."""
        return replace(
            self,
            in_channels=copies * self.in_channels,
            out_channels=copies * self.out_channels,
            steps=tuple(step.times(copies) for step in self.steps),
            projection=tuple(step.times(copies) for step in self.projection),
            copies=copies,
        )


@dataclass(frozen=True, slots=True)
class Head:
    """The classifier after global average pooling: a linear layer with bias."""

    path: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Every weighted layer of a net as a shape, at one image size."""

    stem: Conv
    stem_norm: Norm
    has_max_pool: bool
    """3x3 max-pool of stride 2 behind the stem (ImageNet nets)."""
    blocks: tuple[Block, ...]
    last_norm: Norm | None
    """Before the pooling, where the blocks are pre-activation."""
    head: Head

    @property
    def convs(self) -> tuple[Conv, ...]:
        """All convolutions in forward order, projections behind their block."""
        return (self.stem, *(conv for block in self.blocks for conv in block.convs))

    @property
    def norms(self) -> tuple[Norm, ...]:
        """All batch norms, those of the ends first."""
        layers = (*self.ends, *(one for block in self.blocks for one in block.layers))
        return tuple(layer for layer in layers if isinstance(layer, Norm))

    @property
    def ends(self) -> tuple[Conv | Norm, ...]:
        """The layers outside of blocks, but for the head."""
        last = () if self.last_norm is None else (self.last_norm,)
        return (self.stem, self.stem_norm, *last)

    def times(self, copies: int) -> Layout:
        """So many nets side by side in one, each in groups of its own.

        The head's features are those of one net: it has a product for each.
        """
        if copies == 1:
            return self
        return replace(
            self,
            stem=self.stem.times(copies),
            stem_norm=self.stem_norm.times(copies),
            blocks=tuple(block.times(copies) for block in self.blocks),
            last_norm=self.last_norm and self.last_norm.times(copies),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPlan:
    """What decides a block: the style of its net, and its own place and widths."""

    kind: BlockKind
    form: BlockForm
    activation: Activation
    shortcut: Shortcut
    family: Family
    stage: int
    """1, 2, ..."""
    index: int
    """Place within its stage, from 0."""
    cardinality: int
    bottleneck_width: int
    in_channels: int
    out_channels: int
    in_side: int

    @property
    def path(self) -> str:
        return f"layer{self.stage}.{self.index}"

    @property
    def stride(self) -> int:
        return 2 if self.stage > 1 and self.index == 0 else 1

    def block(self) -> Block:
        """The shapes of the block."""
        changes = self.stride > 1 or self.in_channels != self.out_channels
        projects = self.shortcut == "C" or (self.shortcut == "B" and changes)
        opens_net = self.stage == 1 and self.index == 0
        return Block(
            path=self.path,
            stage=self.stage,
            form=self.form,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            in_side=self.in_side,
            stride=self.stride,
            steps=tuple(_steps(self, opens_net=opens_net)),
            projection=_projection(self) if projects else (),
            has_shortcut=self.shortcut != "none",
            projects_activated=self.activation == "pre"
            and self.index == 0
            and not opens_net,
        )


_KERNEL_SIZES = {"bottleneck": (1, 3, 1), "basic": (3, 3)}
_STRIDED_CONV = {"bottleneck": 1, "basic": 0}
"""The convolution that carries the stride: the first 3x3."""


def strided(side: int, stride: int) -> int:
    """Side of what a convolution or pooling of odd kernel puts out."""
    # Padding (k - 1) / 2 with odd k: floor((side - 1) / stride) + 1.
    return (side - 1) // stride + 1


def _steps(plan: BlockPlan, *, opens_net: bool) -> Iterator[Conv | Norm]:
    """Convolutions, each with its batch norm behind it or before it."""
    side = plan.in_side
    last = len(_KERNEL_SIZES[plan.kind])
    for number in range(1, last + 1):
        conv = _conv(plan, number, side)
        side = conv.out_side
        if plan.activation == "pre":
            # The stem's batch norm and ReLU stand before the first block of the net.
            if not (opens_net and number == 1):
                yield _norm(plan, number, conv.in_channels, conv, shared=number == 1)
            yield conv
        else:
            yield conv
            yield _norm(plan, number, conv.out_channels, conv, shared=number == last)


def _conv(plan: BlockPlan, number: int, side: int) -> Conv:
    kernel_sizes = _KERNEL_SIZES[plan.kind]
    is_first, is_last = number == 1, number == len(kernel_sizes)
    branched = plan.form == "a" or (plan.form == "b" and not is_last)
    copies = plan.cardinality if branched else 1
    inner = plan.cardinality * plan.bottleneck_width // copies
    is_grouped = not (branched or is_first or is_last)
    strides = number - 1 == _STRIDED_CONV[plan.kind]
    return Conv(
        path=f"{plan.path}.{'branches.*.' if branched else ''}conv{number}",
        stage=plan.stage,
        in_channels=plan.in_channels if is_first else inner,
        out_channels=plan.out_channels if is_last else inner,
        kernel_size=kernel_sizes[number - 1],
        stride=plan.stride if strides else 1,
        groups=plan.cardinality if is_grouped else 1,
        in_side=side,
        has_bias=plan.family == "from_scratch",
        branches=copies,
    )


def _norm(
    plan: BlockPlan, number: int, channels: int, conv: Conv, *, shared: bool
) -> Norm:
    """The batch norm of a convolution; shared: before the branches or behind their sum.

    The branches agree only so: one norm in each branch's last layer would not be linear
    in the sum.
    """
    branched = conv.in_branches and not shared
    place = "branches.*." if branched else ""
    copies = conv.branches if branched else 1
    return Norm(f"{plan.path}.{place}bn{number}", plan.stage, channels, copies)


def _projection(plan: BlockPlan) -> tuple[Conv | Norm, ...]:
    from_scratch = plan.family == "from_scratch"
    name = "identity_downsample" if from_scratch else "downsample"
    conv = Conv(
        path=f"{plan.path}.{name}.0",
        stage=plan.stage,
        in_channels=plan.in_channels,
        out_channels=plan.out_channels,
        kernel_size=1,
        stride=plan.stride,
        groups=1,
        in_side=plan.in_side,
        has_bias=from_scratch,
    )
    if plan.activation == "pre":
        return (conv,)
    return conv, Norm(f"{plan.path}.{name}.1", plan.stage, plan.out_channels)


def _paths(path: str, branches: int) -> tuple[str, ...]:
    return tuple(path.replace("*", str(branch)) for branch in range(branches))
