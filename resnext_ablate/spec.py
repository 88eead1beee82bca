"""One ResNeXt as plain numbers: its shapes, its name, and the rules it must keep.

A `ResNeXtSpec` knows every convolution of its net as a shape. Complexity sums those
shapes and the model is built from them, so the two cannot drift apart.

The block is the bottleneck of arXiv:1611.05431, Fig. 3 (c): 1x1, grouped 3x3 that
carries the stride, 1x1. A stage whose template width is W gives 4 W channels; the
template width and the bottleneck width both double from stage to stage (Sec. 3.1).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Stem = Literal["imagenet", "cifar"]
Shortcut = Literal["projection", "none"]

EXPANSION = 4
"""Channels a block puts out, per channel of its stage's template width."""

IMAGENET_STAGE_DEPTHS = {
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
"""Blocks per stage of the ImageNet nets (Table 1; ResNet-200 of Table 4)."""

_DEFAULT_NUM_CLASSES = {"imagenet": 1000, "cifar": 10}
STEM_OF_NUM_STAGES: dict[int, Stem] = {3: "cifar", 4: "imagenet"}
"""The stem that a name leaves out; every other number of stages has the CIFAR stem."""


class InputError(ValueError):
    """Bad input from a user: says what, where, the rule and the nearest valid value.

    The command line prints it as one message and exits with code 2.
    """


@dataclass(frozen=True, slots=True)
class Conv:
    """One convolution without bias, followed by batch normalisation.

    Sides are in pixels of a square feature map. Padding is `(kernel_size - 1) // 2`.
    """

    path: str
    """Where torchvision's state dict keeps the weight, such as `layer1.0.conv2`."""
    norm_path: str
    """The same for its batch normalisation."""
    stage: int
    """0 for the stem, then 1, 2, ... (conv2, conv3, ... in the paper's Table 1)."""
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    groups: int
    in_side: int

    @property
    def out_side(self) -> int:
        return _strided(self.in_side, self.stride)


@dataclass(frozen=True, slots=True)
class Block:
    """One bottleneck block: `conv1` 1x1, `conv2` grouped 3x3, `conv3` 1x1."""

    path: str
    stage: int
    conv1: Conv
    conv2: Conv
    conv3: Conv
    projection: Conv | None
    """1x1 convolution of the shortcut where the shape changes, else None."""
    has_shortcut: bool

    @property
    def convs(self) -> tuple[Conv, ...]:
        main = (self.conv1, self.conv2, self.conv3)
        return main if self.projection is None else (*main, self.projection)


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
    has_max_pool: bool
    """3x3 max-pool of stride 2 behind the stem (ImageNet nets)."""
    blocks: tuple[Block, ...]
    head: Head

    @property
    def convs(self) -> tuple[Conv, ...]:
        """All convolutions in forward order, projections behind their block."""
        return (self.stem, *(conv for block in self.blocks for conv in block.convs))


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
    shortcut: Shortcut = "projection"
    """`projection` is option B of the paper's code; `none` drops every shortcut."""

    def __post_init__(self) -> None:
        if self.stem not in _DEFAULT_NUM_CLASSES:
            raise InputError(f"stem must be 'imagenet' or 'cifar', got {self.stem!r}.")
        if self.shortcut not in ("projection", "none"):
            raise InputError(
                f"shortcut must be 'projection' or 'none', got {self.shortcut!r}."
            )
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
        """Weighted layers, projections not counted: 3 per block, stem and head."""
        return 3 * sum(self.stage_depths) + 2

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
        return tuple(
            EXPANSION * self.template_width * 2**stage
            for stage in range(self.num_stages)
        )

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
        stages = _depth_name(self)
        plain = self.doubles and (self.cardinality, self.base_width) == (
            1,
            self.template_width,
        )
        parts = [f"resnet{stages}" if plain else f"resnext{stages}-{self.setting}"]
        if self.template_width != 64:
            parts.append(f"t{self.template_width}")
        if self.stem != STEM_OF_NUM_STAGES.get(self.num_stages, "cifar"):
            parts.append(self.stem)
        if self.in_channels != 3:
            parts.append(f"in{self.in_channels}")
        if self.num_classes != _DEFAULT_NUM_CLASSES[self.stem]:
            parts.append(f"c{self.num_classes}")
        if self.shortcut == "none":
            parts.append("noshortcut")
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
            norm_path="bn1",
            stage=0,
            in_channels=self.in_channels,
            out_channels=self.template_width,
            kernel_size=kernel_size,
            stride=stride,
            groups=1,
            in_side=image_size,
        )
        has_max_pool = self.stem == "imagenet"
        side = _strided(stem.out_side, 2) if has_max_pool else stem.out_side
        channels = stem.out_channels
        blocks: list[Block] = []
        for stage, depth in enumerate(self.stage_depths):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                block = _block(self, stage, index, channels, side, stride)
                blocks.append(block)
                channels, side = block.conv3.out_channels, block.conv3.out_side
        head = Head("fc", in_features=channels, out_features=self.num_classes)
        return Layout(stem, has_max_pool, tuple(blocks), head)

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
        return asdict(self)


def spec_from_dict(values: dict[str, Any]) -> ResNeXtSpec:
    """The spec that `ResNeXtSpec.to_dict` wrote, lists in place of tuples allowed."""
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
    }
    return ResNeXtSpec(**fields)


def doubled(base_width: int, num_stages: int) -> tuple[int, ...]:
    """The paper's rule: the width per group doubles from stage to stage."""
    return tuple(base_width * 2**stage for stage in range(num_stages))


def stage_depths_of(depth: int) -> tuple[int, ...]:
    """Blocks per stage of a net of `depth` weighted layers.

    50, 101, 152 and 200 are the ImageNet nets; every other depth must be 9n + 2, the
    CIFAR nets of Sec. 5.3.

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


def _depth_name(spec: ResNeXtSpec) -> str:
    try:
        named = stage_depths_of(spec.depth)
    except InputError:
        named = ()
    if named == spec.stage_depths:
        return str(spec.depth)
    stages = ".".join(map(str, spec.stage_depths))
    return stages if spec.num_stages > 1 else f"{stages}."  # no dot would be a depth


def _block(
    spec: ResNeXtSpec, stage: int, index: int, channels: int, side: int, stride: int
) -> Block:
    path = f"layer{stage + 1}.{index}"
    inner, out = spec.inner_channels[stage], spec.out_channels[stage]

    def conv(
        number: int, ins: int, outs: int, kernel: int, stride: int, groups: int, at: int
    ) -> Conv:
        paths = f"{path}.conv{number}", f"{path}.bn{number}"
        return Conv(*paths, stage + 1, ins, outs, kernel, stride, groups, at)

    conv1 = conv(1, channels, inner, 1, 1, 1, side)
    conv2 = conv(2, inner, inner, 3, stride, spec.cardinalities[stage], side)
    conv3 = conv(3, inner, out, 1, 1, 1, conv2.out_side)
    has_shortcut = spec.shortcut == "projection"
    projection = None
    if has_shortcut and (stride > 1 or channels != out):
        paths = f"{path}.downsample.0", f"{path}.downsample.1"
        projection = Conv(*paths, stage + 1, channels, out, 1, stride, 1, side)
    return Block(path, stage + 1, conv1, conv2, conv3, projection, has_shortcut)


def _strided(side: int, stride: int) -> int:
    # Padding (k - 1) / 2 with odd k: floor((side - 1) / stride) + 1.
    return (side - 1) // stride + 1


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
