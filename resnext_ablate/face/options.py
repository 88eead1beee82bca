"""The options of the commands, and how their texts parse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from resnext_ablate.architecture.matching import Hold, Widths
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec

StudyFile = Annotated[
    Path,
    typer.Argument(metavar="STUDY.toml", help="The study file.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Overrides, as in train.epochs=2 or data.root=DIR.",
        show_default=False,
    ),
]
Profile = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Profile of the study file, as in laptop, gpu or paper.",
        show_default=False,
    ),
]
StudyName = Annotated[
    str,
    typer.Argument(
        metavar="STUDY", help="A study's name, file or folder.", show_default=False
    ),
]
Results = Annotated[
    Path, typer.Option("--results", metavar="DIR", help="Folder of all results.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
NetName = Annotated[
    str,
    typer.Argument(
        metavar="SPEC", help="A net, as in resnext50-32x4d.", show_default=False
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        metavar="PIXELS",
        help="Side of the images. Default: 224, or 32 with the CIFAR stem.",
        show_default=False,
    ),
]
Cardinality = Annotated[
    str,
    typer.Option(
        metavar="VALUES", help="As in 1,2,4,8,32 or 1..64*2.", show_default=False
    ),
]
HeldEqual = Annotated[Hold, typer.Option(help="What is held equal.")]
Tolerance = Annotated[
    str, typer.Option(metavar="PERCENT", help="Largest difference from the reference.")
]
Reference = Annotated[
    str | None,
    typer.Option(
        metavar="CxDd",
        help="Setting to match, as in 1x64d. Default: the net's own.",
        show_default=False,
    ),
]
WidthRule = Annotated[
    Widths,
    typer.Option(help="Double by stage, or free in each; auto: free where needed."),
]
Nearest = Annotated[
    bool, typer.Option("--nearest", help="Take the nearest net where none fits.")
]
Count = Annotated[
    bool, typer.Option("--count", help="Count the nets of a space that fit.")
]
Sample = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Draw N of them, uniformly.", min=0, show_default=False
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of the draw.", min=0)]
Axes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUES",
        help="An axis of the space, as in depth=2..6 or stage-width=8..256/8; also "
        "width, stage-depth, stage-cardinality, template-width, image-size. "
        "Repeatable. Default: stage-width, up to the stage's output channels.",
        show_default=False,
    ),
]
Also = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CURRENCY=PERCENT",
        help="Hold this as well, as in params=2%. Repeatable.",
        show_default=False,
    ),
]
Multiple = Annotated[
    int, typer.Option(metavar="N", help="Divides C x d in every stage of the space.")
]

Device = Annotated[
    str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
]
BatchSize = Annotated[
    int, typer.Option(metavar="N", help="Images of a training step.", min=2)
]
PrecisionOption = Annotated[
    Literal["auto", "fp32", "bf16"], typer.Option(help="Of a training step.")
]
Threads = Annotated[
    int, typer.Option(metavar="N", help="Threads of a CPU; a run has one.", min=1)
]
SecondsPerNet = Annotated[
    float, typer.Option(metavar="S", help="Seconds of repeats for each net.", min=0)
]


def values(text: str, *, option: str) -> tuple[int, ...]:
    """Whole numbers of an option such as `1,2,4` or `1..64*2`."""
    from resnext_ablate.architecture.space import parse_values

    try:
        return parse_values(text)
    except InputError:
        raise InputError(
            f"{option} must be whole numbers with commas between, as in 1,2,4,8,32, or "
            f"ranges, as in 1..64 or 1..64*2 (powers of two); got {text!r}."
        ) from None


def held(text: str) -> tuple[str, float]:
    """Currency and tolerance of `params=1%`."""
    currency, _, tolerance = text.partition("=")
    return currency.strip(), percent(tolerance, option="--also CURRENCY=PERCENT")


def percent(text: str, *, option: str) -> float:
    """The number of `1%` or `1`."""
    try:
        return float(text.strip().removesuffix("%"))
    except ValueError:
        raise InputError(
            f"{option} must be a percentage, as in 1%; got {text!r}."
        ) from None


def image_size_of(image_size: int | None, spec: ResNeXtSpec) -> int:
    """The side that was asked for, or that of the nets of this stem in the paper."""
    if image_size is not None:
        return image_size
    return 224 if spec.stem == "imagenet" else 32
