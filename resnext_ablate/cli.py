"""The command line: parse, call, print.

Answers go to standard output, talk and progress to standard error. Exit codes: 0 done,
1 failure, 2 bad input, 3 finished with failed runs, 4 an optional package is missing,
130 and 143 interrupted.

Imports that cost time stand inside the verb that needs them, so that `--help` is quick.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resnext_ablate import __version__, answers, matching, options, terminal
from resnext_ablate.names import parse_setting, parse_spec
from resnext_ablate.options import (
    Also,
    AsJson,
    Axes,
    Cardinality,
    Count,
    HeldEqual,
    ImageSize,
    Multiple,
    Nearest,
    NetName,
    Overrides,
    Reference,
    Results,
    Sample,
    Seed,
    StudyFile,
    StudyName,
    Tolerance,
    WidthRule,
)
from resnext_ablate.spec import InputError, MissingExtraError, ResNeXtSpec

if TYPE_CHECKING:
    from resnext_ablate.space import Space, Window
    from resnext_ablate.study import Outcome

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="FLOPs-matched ResNeXt ablations: wider, deeper or more cardinality?",
)


def main() -> None:
    """Entry point of `resnext-ablate`."""
    try:
        app()
    except InputError as error:
        terminal.talk(f"error: {error}")
        sys.exit(2)
    except MissingExtraError as error:
        terminal.talk(f"error: {error}")
        sys.exit(4)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.")
    ] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def describe(
    net: NetName, image_size: ImageSize = None, as_json: AsJson = False
) -> None:
    """The stage table of one net: macs, params and activations, checked by fvcore."""
    spec = parse_spec(net)
    size = _image_size(image_size, spec)
    spec.layout(size)  # Refuses images that are too small before torch is loaded.
    from resnext_ablate.model import measure_fvcore

    fvcore = measure_fvcore(spec, image_size=size)
    answer = answers.of_net(spec, image_size=size, fvcore=fvcore)
    terminal.print_answer(answer, as_json=as_json)


@app.command()
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
    as_json: AsJson = False,
) -> None:
    """The widths for each cardinality that meet the reference's complexity.

    With --count or --sample: all nets of a space around the net that meet it.
    """
    template = parse_spec(net)
    size = _image_size(image_size, template)
    values = options.values(cardinality, option="--cardinality") if cardinality else ()
    budget = _setting_of(template, reference)
    within: dict[str, float] = {hold: options.percent(tolerance, option="--tolerance")}
    if not count and sample is None:
        if axis or also or multiple != 1:
            raise InputError("--axis, --also, --multiple need --count or --sample.")
        found = matching.match(
            template,
            cardinalities=values,
            hold=hold,
            tolerance_pct=within[hold],
            image_size=size,
            reference=budget,
            widths=widths,
            when_none="nearest" if nearest else "refuse",
        )
        return terminal.print_answer(answers.of_matches(found), as_json=as_json)
    from resnext_ablate import axes

    within |= dict(options.held(text) for text in also or ())
    space = axes.space_around(
        template,
        image_size=size,
        cardinalities=values,
        axes=axis or (),
        inner_multiple=multiple,
    )
    windows = axes.windows_around(budget, image_size=size, within_pct=within)
    answer = _of_space(
        space,
        windows,
        num_drawn=sample or 0,
        seed=seed,
        budget=budget,
        image_size=size,
    )
    terminal.print_answer(answer, as_json=as_json)


def _setting_of(template: ResNeXtSpec, setting: str | None) -> ResNeXtSpec:
    if setting is None:
        return template
    cardinality, widths = parse_setting(setting)
    return template.with_setting(cardinality, *widths)


def _of_space(
    space: Space,
    windows: tuple[Window, ...],
    *,
    num_drawn: int,
    seed: int,
    budget: ResNeXtSpec,
    image_size: int,
) -> answers.Answer:
    import numpy as np

    from resnext_ablate import feasible

    found = feasible.solve(space, windows)
    drawn = []
    if found.count and num_drawn:
        nets = feasible.draw(found, num_drawn, np.random.default_rng(seed))
        drawn = [
            matching.certify(
                nets.spec(row),
                reference=budget,
                image_size=int(nets.image_sizes[row]),
                reference_image_size=image_size,
            )
            for row in range(len(nets))
        ]
    nearest = "" if found.count else feasible.none_fits(space, windows)
    return answers.of_space(
        space, windows, count=found.count, drawn=drawn, nearest=nearest
    )


@app.command("export-net")
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
    size = _image_size(image_size, spec)
    spec.layout(size)  # Refuses images that are too small before torch is loaded.
    from resnext_ablate import interop

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


@app.command()
def plan(
    study: StudyFile,
    overrides: Overrides = None,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """What a study would run: its nets with their match, its runs, its compute."""
    from resnext_ablate.config import load_study

    config = load_study(study, overrides=overrides or ())
    from resnext_ablate import records
    from resnext_ablate.study import prepare

    prepared = prepare(config, on_data=terminal.DataProgress())
    runs = records.read_runs(results / config.name, prepared.plan)
    answer = answers.of_plan(prepared, num_done=len(runs))
    terminal.print_answer(answer, as_json=as_json)


@app.command()
def run(
    study: StudyFile,
    overrides: Overrides = None,
    results: Results = Path("results"),
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run failed runs again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Runs a study, or what is left of it, and writes its tables and report."""
    from resnext_ablate.config import load_study

    config = load_study(study, overrides=overrides or ())
    terminal.talk(f"study {config.name}: {config.question}")
    from resnext_ablate.execution import ExecutorError
    from resnext_ablate.study import run_study

    try:
        with terminal.RunProgress() as progress:
            outcome = run_study(
                config,
                results=results,
                command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                retry_failed=retry_failed,
                on_data=terminal.DataProgress(),
                on_progress=progress,
            )
    except ExecutorError as error:
        terminal.talk(f"error: {error}")
        raise typer.Exit(1) from None
    _report(outcome.folder, as_json=as_json)
    _close(outcome)


@app.command()
def status(
    study: StudyName, results: Results = Path("results"), as_json: AsJson = False
) -> None:
    """How far a study is: runs done, under way and failed."""
    from resnext_ablate import records, trials

    folder = _study_folder(study, results)
    plan = records.read_plan(folder)
    process = records.scheduler_process(folder)
    answer = answers.of_status(
        folder.name,
        plan=plan,
        runs=records.read_runs(folder, plan),
        process=process,
        running=trials.running(folder, name=folder.name) if process else (),
    )
    terminal.print_answer(answer, as_json=as_json)


@app.command("ls")
def list_studies(results: Results = Path("results"), as_json: AsJson = False) -> None:
    """The studies of a results folder."""
    from resnext_ablate import records

    folders = [path.parent for path in sorted(results.glob(f"*/{records.PLAN_FILE}"))]
    plans = [records.read_plan(folder) for folder in folders]
    studies = [
        (folder, plan, records.read_runs(folder, plan))
        for folder, plan in zip(folders, plans, strict=True)
    ]
    if not studies:
        terminal.talk(f"no studies in {results}")
    terminal.print_answer(answers.of_studies(studies), as_json=as_json)


@app.command()
def report(
    study: StudyName, results: Results = Path("results"), as_json: AsJson = False
) -> None:
    """Writes a study's tables and report anew from its run files."""
    _report(_study_folder(study, results), as_json=as_json)


def _report(folder: Path, *, as_json: bool) -> None:
    from resnext_ablate.report import write_report
    from resnext_ablate.tables import read_tables, write_tables

    tables = read_tables(folder)
    write_tables(tables, folder)
    files = write_report(tables, folder=folder)
    terminal.print_answer(answers.of_report(tables.study, files), as_json=as_json)


def _close(outcome: Outcome) -> None:
    """What is left to do after a study that was cut off or has failures."""
    if outcome.signal_number is not None:
        terminal.talk(
            f"interrupted: {outcome.num_complete} of {outcome.num_planned} runs are "
            "done; the same command goes on from there"
        )
        raise typer.Exit(128 + outcome.signal_number)
    if outcome.num_failed:
        terminal.talk(
            f"{outcome.num_failed} of {outcome.num_planned} runs failed: "
            f"resnext-ablate status {outcome.folder} says why; "
            "--retry-failed runs them again"
        )
        raise typer.Exit(3)


def _study_folder(study: str, results: Path) -> Path:
    """The folder of a study that is given by name, study file or folder."""
    path = Path(study)
    if path.is_dir():
        return path
    if path.suffix == ".toml":
        from resnext_ablate.config import load_study

        return results / load_study(path).name
    return results / study


def _image_size(image_size: int | None, spec: ResNeXtSpec) -> int:
    if image_size is not None:
        return image_size
    return 224 if spec.stem == "imagenet" else 32
