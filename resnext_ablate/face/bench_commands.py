"""The commands that measure this device: nets, and whole training loops.

Imports that cost time stand inside the verb that needs them, so that `--help` is quick.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.spec import InputError, spec_from_dict
from resnext_ablate.face import cost_answers, options, terminal
from resnext_ablate.face.options import (
    AsJson,
    BatchSize,
    Device,
    ImageSize,
    Overrides,
    PrecisionOption,
    Profile,
    Results,
    SecondsPerNet,
    StudyFile,
    Threads,
)

if TYPE_CHECKING:
    from resnext_ablate.compute.benchmark import Setup
    from resnext_ablate.records.certificate import DeviceCosts


def bench(
    nets: Annotated[
        list[str],
        typer.Argument(
            metavar="NET... | STUDY.toml [KEY=VALUE]...",
            help="Nets, the reference first; or a study, measured as it trains.",
            show_default=False,
        ),
    ],
    image_size: ImageSize = None,
    device: Device = "auto",
    batch_size: BatchSize = 128,
    precision: PrecisionOption = "auto",
    threads: Threads = 1,
    seconds: SecondsPerNet = 3.0,
    profile: Profile = None,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Measures step time, forward time and peak memory of nets on this device.

    A study keeps what is measured: it joins the certificate in tables and report.
    """
    if nets[0].endswith(".toml"):
        costs = _bench_study(
            Path(nets[0]), nets[1:], profile=profile, results=results, seconds=seconds
        )
    elif profile is not None:
        raise InputError("--profile is for study files; a net has none.")
    else:
        specs = tuple(map(parse_spec, nets))
        size = options.image_size_of(image_size, specs[0])
        for spec in specs:
            spec.layout(size)  # Refuses images that are too small before torch loads.
        from resnext_ablate.compute.benchmark import measure

        setup = measuring(
            device,
            size,
            batch_size=batch_size,
            precision=precision,
            num_threads=threads,
            seconds_per_net=seconds,
        )
        costs = measure(specs, setup=setup)
    terminal.print_answer(cost_answers.of_costs(costs), as_json=as_json)


def _bench_study(
    path: Path,
    overrides: list[str],
    *,
    profile: str | None,
    results: Path,
    seconds: float,
) -> DeviceCosts:
    """Measures a study's nets as its runs train, and keeps that in its folder."""
    from resnext_ablate.records.config import load_study

    config = load_study(path, overrides=overrides, profile=profile)
    from resnext_ablate.compute import benchmark
    from resnext_ablate.records import certificate, records
    from resnext_ablate.study import variants
    from resnext_ablate.study.study_plan import prepare, read_earlier

    folder = results / config.name
    net = config.net.model_copy(update={"measure": False})  # it is done below
    config = config.model_copy(update={"net": net})
    prepared = prepare(config, earlier=read_earlier(folder))
    setup = variants.measuring_setup(
        prepared.config,
        image_size=prepared.data.info.image_size,
        device=prepared.devices[0],
    )
    specs = [spec_from_dict(net.spec) for net in prepared.plan.nets]
    costs = benchmark.measure(specs, setup=replace(setup, seconds_per_net=seconds))
    if (folder / records.PLAN_FILE).exists():
        certificate.write_costs(costs, folder)
    return costs


def bench_training(
    study: StudyFile,
    overrides: Overrides = None,
    profile: Profile = None,
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL",
            help="Which net of the study. Default: its reference.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        int,
        typer.Option(metavar="N", help="Training images of each run.", min=256),
    ] = 4096,
    turns: Annotated[
        int, typer.Option(metavar="N", help="Turns of each loop.", min=1)
    ] = 3,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Trains one net by our loop and by those that people ship, in turns.

    Leaves benchmarks/STUDY-VARIANT.json and .html in the results folder.
    """
    from resnext_ablate.records.config import load_study

    config = load_study(study, overrides=overrides or (), profile=profile)
    from resnext_ablate.evidence.loops_page import write_page
    from resnext_ablate.records.training_costs import write_training_costs
    from resnext_ablate.study import training_bench
    from resnext_ablate.study.study_plan import prepare

    prepared = prepare(config, on_data=terminal.DataProgress())
    net = prepared.plan.nets[0]
    if variant is not None:
        known = {one.variant: one for one in prepared.plan.nets}
        if variant not in known:
            raise InputError(
                f"--variant: study {config.name} has {', '.join(known)}; got {variant}."
            )
        net = known[variant]
    costs = training_bench.compete(
        training_bench.contest(prepared, net=net, num_images=images),
        num_turns=turns,
        on_turn=terminal.talk,
    )
    path = results / "benchmarks" / f"{config.name}-{net.variant}.json"
    write_training_costs(costs, path)
    write_page(costs, path.with_suffix(".html"))
    answer = cost_answers.of_training_costs(costs, path=path)
    terminal.print_answer(answer, as_json=as_json)


def measuring(
    device: str,
    image_size: int,
    *,
    batch_size: int,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    num_threads: int = 1,
    seconds_per_net: float = 3.0,
) -> Setup:
    """Measuring with the paper's CIFAR recipe, on a device that is there."""
    import torch

    from resnext_ablate.compute.benchmark import Setup
    from resnext_ablate.compute.hardware import devices, one_thread
    from resnext_ablate.compute.tuning import resolve_precision
    from resnext_ablate.records.config import TrainConfig

    found = devices(device)[0]
    with one_thread():
        settled = resolve_precision(precision, device=torch.device(found))
    return Setup(
        train=TrainConfig(epochs=1, batch_size=batch_size, precision=settled),
        image_size=image_size,
        device=found,
        num_threads=num_threads,
        seconds_per_net=seconds_per_net,
    )
