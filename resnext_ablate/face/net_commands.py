"""The commands about nets, none of which trains one.

Imports that cost time stand inside the verb that needs them, so that `--help` is quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resnext_ablate.architecture import matching
from resnext_ablate.architecture.names import parse_setting, parse_spec
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec
from resnext_ablate.face import answers, cost_answers, options, terminal
from resnext_ablate.face.bench_commands import measuring
from resnext_ablate.face.options import (
    Also,
    AsJson,
    Axes,
    BatchSize,
    Cardinality,
    Count,
    Device,
    HeldEqual,
    ImageSize,
    Multiple,
    Nearest,
    NetName,
    Reference,
    Sample,
    Seed,
    Tolerance,
    WidthRule,
)

if TYPE_CHECKING:
    from resnext_ablate.architecture.feasible import Feasible


def describe(
    net: NetName, image_size: ImageSize = None, as_json: AsJson = False
) -> None:
    """The stage table of one net: macs, params and activations, checked by fvcore."""
    spec = parse_spec(net)
    size = options.image_size_of(image_size, spec)
    spec.layout(size)  # Refuses images that are too small before torch is loaded.
    from resnext_ablate.compute.model import measure_fvcore

    fvcore = measure_fvcore(spec, image_size=size)
    answer = answers.of_net(spec, image_size=size, fvcore=fvcore)
    terminal.print_answer(answer, as_json=as_json)


def match(
    net: NetName,
    cardinality: Cardinality = "",
    hold: HeldEqual = "macs",
    tolerance: Tolerance = "5%",
    reference: Reference = None,
    widths: WidthRule = "auto",
    nearest: Nearest = False,
    count: Count = False,
    sample: Sample = None,
    seed: Seed = 0,
    axis: Axes = None,
    also: Also = None,
    multiple: Multiple = 1,
    image_size: ImageSize = None,
    device: Device = "auto",
    batch_size: BatchSize = 128,
    as_json: AsJson = False,
) -> None:
    """The widths for each cardinality that meet the reference's complexity.

    With --hold step_time or peak_memory: as measured on the device, in training steps.

    With --count or --sample: all nets of a space around the net that meet it.
    """
    template = parse_spec(net)
    request = _Request(
        template=template,
        cardinalities=options.values(cardinality, option="--cardinality")
        if cardinality
        else (),
        hold=hold,
        tolerance_pct=options.percent(tolerance, option="--tolerance"),
        reference=_setting_of(template, reference),
        widths=widths,
        image_size=options.image_size_of(image_size, template),
    )
    if count or sample is not None:
        answer = _of_space(
            request,
            axes=axis or (),
            also=also or (),
            multiple=multiple,
            num_drawn=sample or 0,
            seed=seed,
        )
    elif axis or also or multiple != 1:
        raise InputError("--axis, --also, --multiple need --count or --sample.")
    elif hold in matching.MEASURED:
        answer = _of_measured(request, device=device, batch_size=batch_size)
    else:
        answer = _of_matches(request, when_none="nearest" if nearest else "refuse")
    terminal.print_answer(answer, as_json=as_json)


@dataclass(frozen=True, kw_only=True)
class _Request:
    """Which nets are to match what."""

    template: ResNeXtSpec
    cardinalities: tuple[int, ...]
    hold: matching.Hold
    tolerance_pct: float
    reference: ResNeXtSpec
    widths: matching.Widths
    image_size: int


def _of_matches(request: _Request, *, when_none: matching.WhenNone) -> answers.Answer:
    found = matching.match(
        request.template,
        cardinalities=request.cardinalities,
        hold=request.hold,
        tolerance_pct=request.tolerance_pct,
        image_size=request.image_size,
        reference=request.reference,
        widths=request.widths,
        when_none=when_none,
    )
    return answers.of_matches(found)


def _of_measured(request: _Request, *, device: str, batch_size: int) -> answers.Answer:
    from resnext_ablate.study.variants import matched_by_measuring

    setup = measuring(device, request.image_size, batch_size=batch_size)
    terminal.talk(
        f"measuring on {setup.device}, a few seconds for each net and each width tried"
    )
    specs, costs = matched_by_measuring(
        request.template,
        cardinalities=request.cardinalities,
        hold=request.hold,
        tolerance_pct=request.tolerance_pct,
        reference=request.reference,
        widths=request.widths,
        setup=setup,
    )
    certified = [
        matching.certify(
            spec, reference=request.reference, image_size=request.image_size
        )
        for spec in specs
    ]
    return cost_answers.of_measured_matches(certified, costs)


def _of_space(
    request: _Request,
    *,
    axes: Sequence[str],
    also: Sequence[str],
    multiple: int,
    num_drawn: int,
    seed: int,
) -> answers.Answer:
    """The nets of a space around the net: how many fit, and some of them."""
    from resnext_ablate.architecture import feasible
    from resnext_ablate.architecture.axes import space_around, windows_around

    if request.hold in matching.MEASURED:
        raise InputError(
            f"--count and --sample need a currency that follows from shapes: macs, "
            f"params or activations; got --hold {request.hold}."
        )
    size = request.image_size
    within = {request.hold: request.tolerance_pct, **dict(map(options.held, also))}
    space = space_around(
        request.template,
        image_size=size,
        cardinalities=request.cardinalities,
        axes=axes,
        inner_multiple=multiple,
    )
    windows = windows_around(request.reference, image_size=size, within_pct=within)
    found = feasible.solve(space, windows)
    drawn = []
    if found.count:
        drawn = _drawn(found, num_drawn, seed=seed, request=request)
    nearest = "" if found.count else feasible.none_fits(space, windows)
    return answers.of_space(
        space, windows, count=found.count, drawn=drawn, nearest=nearest
    )


def _drawn(
    found: Feasible, num_drawn: int, *, seed: int, request: _Request
) -> list[matching.Match]:
    import numpy as np

    from resnext_ablate.architecture import feasible

    nets = feasible.draw(found, num_drawn, np.random.default_rng(seed))
    return [
        matching.certify(
            nets.spec(row),
            reference=request.reference,
            image_size=int(nets.image_sizes[row]),
            reference_image_size=request.image_size,
        )
        for row in range(len(nets))
    ]


def _setting_of(template: ResNeXtSpec, setting: str | None) -> ResNeXtSpec:
    if setting is None:
        return template
    cardinality, widths = parse_setting(setting)
    return template.with_setting(cardinality, *widths)


def export_net(
    net: NetName,
    out: Annotated[
        Path,
        typer.Option(metavar="FILE", help="The file to write.", show_default=False),
    ],
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weights by torchvision's names. Default: freshly drawn, seed 0.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(metavar="FORMAT", help="state_dict, torch_export or onnx."),
    ] = "state_dict",
    image_size: ImageSize = None,
    as_json: AsJson = False,
) -> None:
    """Writes a net with its weights, and checks that the file gives its outputs."""
    spec = parse_spec(net)
    size = options.image_size_of(image_size, spec)
    spec.layout(size)  # Refuses images that are too small before torch is loaded.
    from resnext_ablate.compute import interop

    if weights is None:
        terminal.talk("no weights given: the net is exported as drawn with seed 0")
        model = interop.drawn_net(spec, seed=0)
    else:
        model = interop.load_net(weights, spec=spec)
    try:
        exported = interop.export_net(model, path=out, format=format, image_size=size)
    except interop.ExportError as error:
        terminal.talk(f"error: {error}")
        raise typer.Exit(1) from None
    answer = answers.of_export(spec, format=format, exported=exported)
    terminal.print_answer(answer, as_json=as_json)
