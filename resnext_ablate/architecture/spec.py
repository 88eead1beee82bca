"""One ResNeXt as plain numbers: its shapes, its name, and the rules it must keep.

A `ResNeXtSpec` knows every layer of its net as a shape. Complexity sums those shapes
and the model is built from them, so the two cannot drift apart.

The block is by default the bottleneck of arXiv:1611.05431, Fig. 3 (c): 1x1, grouped 3x3
that carries the stride, 1x1. A stage whose template width is W gives 4 W channels (W
with basic blocks); the template width and the bottleneck width both double from stage
to stage (Sec. 3.1).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from resnext_ablate.architecture.shapes import (
    Activation,
    Block,
    BlockForm,
    BlockKind,
    BlockPlan,
    Conv,
    Family,
    Head,
    Layout,
    Norm,
    Shortcut,
    strided,
)

Stem = Literal["imagenet", "cifar"]

EXPANSION: dict[BlockKind, int] = {"bottleneck": 4, "basic": 1}
"""Channels a block puts out, per channel of its stage's template width."""

FROM_SCRATCH_STAGE_DEPTHS = (3, 4, 6, 3)
"""Of the tutorial net, where its name gives none."""

IMAGENET_STAGE_DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
"""Blocks per stage of the ImageNet nets (Table 1; ResNet-200 of Table 4)."""

_DEPTHS_OF_BASIC = (18, 34)
_DEFAULT_NUM_CLASSES = {"imagenet": 1000, "cifar": 10}
_STEM_OF_NUM_STAGES: dict[int, Stem] = {3: "cifar", 4: "imagenet"}
_STYLE = ("block", "block_form", "activation", "family")
"""Fields that `to_dict` leaves out at their defaults: the ids of runs are made of it,
and stay what they are as such fields are added."""


class InputError(ValueError):
    """Bad input from a user: says what, where, the rule and the nearest valid value.

    The command line prints it as one message and exits with code 2.
    """


class MissingExtraError(RuntimeError):
    """An optional package is not installed: says which, and how to install it.

    The command line prints it as one message and exits with code 4.
    """


class MeasuringError(RuntimeError):
    """Nets could not be measured: the last words of the process that tried.

    The command line prints it as one message and exits with code 1.
    """


@dataclass(frozen=True, kw_only=True)
class ResNeXtSpec:
    """A ResNeXt, checked on construction.

    Raises:
        InputError: a field breaks its rule; the message names field, rule and value.
    """

    stage_depths: tuple[int, ...]
    """Blocks per stage."""
    cardinality: int | tuple[int, ...]
    """C: groups of the 3x3 convolution; one for each stage where stages differ."""
    bottleneck_widths: tuple[int, ...]
    """d of each stage: channels per group of its 3x3 convolution."""
    template_width: int = 64
    """Width of the stem and of stage 1 before expansion; 64 in the paper."""
    stem: Stem = "imagenet"
    in_channels: int = 3
    num_classes: int = 0
    """Default: 1000 with the ImageNet stem, 10 with the CIFAR stem."""
    shortcut: Shortcut = "B"
    """Options of the paper's code: `A` the identity, zero channels added; `B` a
    projection where the shape changes; `C` one in every block; `none` no shortcut."""
    block: BlockKind = "bottleneck"
    """`basic` blocks have two layers, where grouping is dense: C d counts alone."""
    block_form: BlockForm = "c"
    """Of Fig. 3; the three are one function of the same macs and params."""
    activation: Activation = "post"
    """`pre`: batch norm and ReLU before the convolutions, as in the paper's ResNet-200.
    """
    family: Family = "paper"
    """`from_scratch` is the tutorial net, whose channels follow C d."""

    def __post_init__(self) -> None:
        _check_style(self)
        if self.num_classes == 0:
            classes = _DEFAULT_NUM_CLASSES[self.stem]
            object.__setattr__(self, "num_classes", classes)
        for name in ("stage_depths", "bottleneck_widths"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            for position, value in enumerate(values, start=1):
                _check_positive(f"{name}, stage {position}", value)
        for name in ("template_width", "in_channels", "num_classes"):
            _check_positive(name, getattr(self, name))
        if not self.stage_depths:
            raise InputError("stage_depths must name at least one stage, got none.")
        cardinality = _one_if_equal(self.cardinality, self.num_stages)
        object.__setattr__(self, "cardinality", cardinality)
        if len(self.bottleneck_widths) != len(self.stage_depths):
            raise InputError(
                "bottleneck_widths must give one width per stage: "
                f"{len(self.stage_depths)} stages in {self.stage_depths}, "
                f"got {len(self.bottleneck_widths)} widths {self.bottleneck_widths}."
            )

    @property
    def num_stages(self) -> int:
        return len(self.stage_depths)

    @property
    def depth(self) -> int:
        """Weighted layers, projections not counted: 3 or 2 per block, stem and head."""
        per_block = 3 if self.block == "bottleneck" else 2
        return per_block * sum(self.stage_depths) + 2

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """C of each stage."""
        if isinstance(self.cardinality, tuple):
            return self.cardinality
        return (self.cardinality,) * self.num_stages

    @property
    def base_width(self) -> int:
        """d of stage 1: the 4 of 32x4d."""
        return self.bottleneck_widths[0]

    @property
    def doubles(self) -> bool:
        """Whether the bottleneck width doubles from stage to stage (Sec. 3.1)."""
        return self.bottleneck_widths == doubled(self.base_width, self.num_stages)

    @property
    def inner_channels(self) -> tuple[int, ...]:
        """C d of each stage: channels of its 3x3 convolution."""
        both = zip(self.cardinalities, self.bottleneck_widths, strict=True)
        return tuple(cardinality * width for cardinality, width in both)

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels that each stage puts out."""
        if self.family == "from_scratch":
            return tuple(2 * inner for inner in self.inner_channels)
        return doubled(EXPANSION[self.block] * self.template_width, self.num_stages)

    @property
    def total_stride(self) -> int:
        """Pixels of the image per pixel of the last stage."""
        return (4 if self.stem == "imagenet" else 1) << (self.num_stages - 1)

    @property
    def setting(self) -> str:
        """Cardinality and width as the paper's tables write them, such as `32x4d`."""
        same = isinstance(self.cardinality, int)
        cardinalities = self.cardinalities[:1] if same else self.cardinalities
        widths = (self.base_width,) if self.doubles else self.bottleneck_widths
        return f"{'.'.join(map(str, cardinalities))}x{'.'.join(map(str, widths))}d"

    @property
    def name(self) -> str:
        """The shortest name that `names.parse_spec` turns back into this spec."""
        parts = [_opening_of_name(self)]
        if self.template_width != 64:
            parts.append(f"t{self.template_width}")
        if self.stem != default_stem(self.family, self.num_stages):
            parts.append(self.stem)
        if self.in_channels != 3:
            parts.append(f"in{self.in_channels}")
        if self.num_classes != _DEFAULT_NUM_CLASSES[self.stem]:
            parts.append(f"c{self.num_classes}")
        if self.block == "basic" and not _depth_name(self).isdigit():
            parts.append("basic")
        if self.block_form != "c":
            parts.append(f"form_{self.block_form}")
        if self.activation == "pre":
            parts.append("preact")
        if self.shortcut == "none":
            parts.append("noshortcut")
        elif self.shortcut != "B":
            parts.append(f"shortcut_{self.shortcut.lower()}")
        return "-".join(parts)

    def layout(self, image_size: int) -> Layout:
        """The net's layers for square images of `image_size` pixels.

        Raises:
            InputError: the image is smaller than the net's total stride.
        """
        if image_size < self.total_stride:
            raise InputError(
                f"image_size must be at least {self.total_stride}, the total stride of "
                f"{self.name}; got {image_size}."
            )
        kernel_size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        stem = Conv(
            path="conv1",
            stage=0,
            in_channels=self.in_channels,
            out_channels=self.template_width,
            kernel_size=kernel_size,
            stride=stride,
            groups=1,
            in_side=image_size,
            has_bias=self.family == "from_scratch",
        )
        pools = self.stem == "imagenet"
        side = strided(stem.out_side, 2) if pools else stem.out_side
        channels = self.out_channels[-1]
        pre = self.activation == "pre"
        return Layout(
            stem=stem,
            stem_norm=Norm("bn1", 0, stem.out_channels),
            has_max_pool=pools,
            blocks=_blocks(self, side),
            last_norm=Norm("norm", self.num_stages, channels) if pre else None,
            head=Head("fc", in_features=channels, out_features=self.num_classes),
        )

    def with_setting(
        self, cardinality: int | tuple[int, ...], *widths: int
    ) -> ResNeXtSpec:
        """The same template at another cardinality and width.

        One cardinality holds in every stage; else one for each. One width is the base
        width and doubles by stage; else one for each stage.
        """
        if len(widths) == 1:
            widths = doubled(widths[0], self.num_stages)
        return replace(self, cardinality=cardinality, bottleneck_widths=widths)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `spec_from_dict` reads them back."""
        defaults = {field.name: field.default for field in fields(self)}
        return {
            key: value
            for key, value in asdict(self).items()
            if key not in _STYLE or value != defaults[key]
        }


def spec_from_dict(values: dict[str, Any]) -> ResNeXtSpec:
    """The spec that `ResNeXtSpec.to_dict` wrote, lists in place of tuples allowed."""
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
    }
    if given.get("shortcut") == "projection":  # the earlier word for B
        given["shortcut"] = "B"
    return ResNeXtSpec(**given)


def default_stem(family: Family, num_stages: int) -> Stem:
    """The stem that a name leaves out."""
    if family == "from_scratch":
        return "imagenet"
    return _STEM_OF_NUM_STAGES.get(num_stages, "cifar")


def block_of_depth(depth: int) -> BlockKind:
    """The blocks of a net that is named by its depth: basic at 18 and 34 layers."""
    return "basic" if depth in _DEPTHS_OF_BASIC else "bottleneck"


def doubled(base_width: int, num_stages: int) -> tuple[int, ...]:
    """The paper's rule: the width per group doubles from stage to stage."""
    return tuple(base_width * 2**stage for stage in range(num_stages))


def stage_depths_of(depth: int) -> tuple[int, ...]:
    """Blocks per stage of a net of `depth` weighted layers.

    18, 34 (basic blocks), 50, 101, 152 and 200 are the ImageNet nets; every other depth
    must be 9n + 2, the CIFAR nets of Sec. 5.3.

    Raises:
        InputError: no such net; the message names the nearest depths.
    """
    if depth in IMAGENET_STAGE_DEPTHS:
        return IMAGENET_STAGE_DEPTHS[depth]
    blocks, rest = divmod(depth - 2, 9)
    if rest or blocks < 1:
        known = ", ".join(map(str, IMAGENET_STAGE_DEPTHS))
        raise InputError(
            f"depth must be {known} or 9n + 2 (11, 20, 29, ...), got {depth}; "
            f"nearest: {' or '.join(map(str, _depths_around(depth)))}."
        )
    return (blocks,) * 3


def _depths_around(depth: int) -> tuple[int, ...]:
    """The nearest depths that a net can have, below and above an impossible one."""
    blocks = (depth - 2) // 9
    cifar = {9 * count + 2 for count in (blocks, blocks + 1) if count >= 1}
    depths = cifar | IMAGENET_STAGE_DEPTHS.keys() | {11}
    below = [known for known in depths if known < depth]
    above = [known for known in depths if known > depth]
    return (max(below), min(above)) if below else (min(above),)


def _opening_of_name(spec: ResNeXtSpec) -> str:
    """A name's part before the suffixes: family, depth and setting."""
    if spec.family == "from_scratch":
        depths = spec.stage_depths
        stages = "" if depths == FROM_SCRATCH_STAGE_DEPTHS else _depth_name(spec)
        return f"from_scratch{stages}-{spec.setting}"
    plain = (1, doubled(spec.template_width, spec.num_stages))
    if (spec.cardinality, spec.bottleneck_widths) == plain:
        return f"resnet{_depth_name(spec)}"
    return f"resnext{_depth_name(spec)}-{spec.setting}"


def _depth_name(spec: ResNeXtSpec) -> str:
    try:
        named = stage_depths_of(spec.depth)
    except InputError:
        named = ()
    if (named, block_of_depth(spec.depth)) == (spec.stage_depths, spec.block):
        return str(spec.depth)
    stages = ".".join(map(str, spec.stage_depths))
    return stages if spec.num_stages > 1 else f"{stages}."  # no dot would be a depth


def _blocks(spec: ResNeXtSpec, side: int) -> tuple[Block, ...]:
    channels = spec.template_width
    blocks: list[Block] = []
    for stage, depth in enumerate(spec.stage_depths):
        for index in range(depth):
            block = BlockPlan(
                kind=spec.block,
                form=spec.block_form,
                activation=spec.activation,
                shortcut=spec.shortcut,
                family=spec.family,
                stage=stage + 1,
                index=index,
                cardinality=spec.cardinalities[stage],
                bottleneck_width=spec.bottleneck_widths[stage],
                in_channels=channels,
                out_channels=spec.out_channels[stage],
                in_side=side,
            ).block()
            blocks.append(block)
            channels, side = block.out_channels, block.out_side
    return tuple(blocks)


def _check_style(spec: ResNeXtSpec) -> None:
    known: dict[str, tuple[str, ...]] = {
        "stem": get_args(Stem),
        "shortcut": get_args(Shortcut),
        "block": get_args(BlockKind),
        "block_form": get_args(BlockForm),
        "activation": get_args(Activation),
        "family": get_args(Family),
    }
    for name, values in known.items():
        value = getattr(spec, name)
        if value not in values:
            raise InputError(
                f"{name} must be {' or '.join(map(repr, values))}, got {value!r}."
            )
    if spec.family == "from_scratch":
        for name in ("shortcut", "block", "block_form", "activation"):
            value, only = getattr(spec, name), ResNeXtSpec.__dataclass_fields__[name]
            if value != only.default:
                raise InputError(
                    f"{name} must be {only.default!r} in the family from_scratch, "
                    f"which is one copied net; got {value!r}."
                )


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {value!r}.")


def _one_if_equal(
    cardinality: int | tuple[int, ...], num_stages: int
) -> int | tuple[int, ...]:
    """C checked, and as one number where all stages agree: one net, one spelling."""
    if not isinstance(cardinality, list | tuple):
        _check_positive("cardinality", cardinality)
        return cardinality
    values = tuple(cardinality)
    if len(values) != num_stages:
        raise InputError(
            "cardinality must be one number, or one for each stage: "
            f"{num_stages} stages, got {len(values)} cardinalities {values}."
        )
    for position, value in enumerate(values, start=1):
        _check_positive(f"cardinality, stage {position}", value)
    return values[0] if len(set(values)) == 1 else values
