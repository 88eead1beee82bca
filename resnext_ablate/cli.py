"""The command line: parse, call, print.

Answers go to standard output, talk and progress to standard error. Exit codes: 0 done,
1 failure, 2 bad input, 3 finished with failed runs, 130 and 143 interrupted.

Imports that cost time stand inside the verb that needs them, so that `--help` is quick.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resnext_ablate import __version__, terminal
from resnext_ablate.matching import Hold
from resnext_ablate.spec import InputError, ResNeXtSpec, parse_setting, parse_spec

if TYPE_CHECKING:
    from resnext_ablate.matching import Match
    from resnext_ablate.records import NetRecord
    from resnext_ablate.study import Outcome

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="FLOPs-matched ResNeXt ablations: wider, deeper or more cardinality?",
)

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
        help="Pixels of a side. Default: 224, or 32 with the CIFAR stem.",
        show_default=False,
    ),
]


def main() -> None:
    """Entry point of `resnext-ablate`."""
    try:
        app()
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


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
    """The stage table of one net: macs, params, activations, checked by fvcore."""
    from resnext_ablate.complexity import complexity, stage_table
    from resnext_ablate.model import measure_fvcore

    spec = parse_spec(net)
    size = image_size or _default_image_size(spec)
    total = complexity(spec, size)
    stages = stage_table(spec, size)
    fvcore = measure_fvcore(spec, image_size=size)
    if as_json:
        terminal.print_json(
            {
                "name": spec.name,
                "image_size": size,
                "depth": spec.depth,
                "cardinality": spec.cardinality,
                "bottleneck_widths": spec.bottleneck_widths,
                "macs": total.macs,
                "params": total.params,
                "params_without_bn": total.params_without_bn,
                "activations": total.activations,
                "fvcore": {"conv_linear": fvcore.conv_linear, "total": fvcore.total},
                "stages": [
                    {
                        "stage": row.stage,
                        "num_blocks": row.num_blocks,
                        "out_side": row.out_side,
                        "out_channels": row.out_channels,
                        "cardinality": row.cardinality,
                        "bottleneck_width": row.bottleneck_width,
                        "macs": row.complexity.macs,
                        "params": row.complexity.params,
                        "activations": row.complexity.activations,
                    }
                    for row in stages
                ],
            }
        )
        return
    typer.echo(f"{spec.name}: {spec.depth} layers, {size} x {size} pixels\n")
    rows = [
        (
            row.stage,
            f"{row.out_side}x{row.out_side}",
            str(row.out_channels),
            str(row.num_blocks or ""),
            f"{row.cardinality}x{row.bottleneck_width}d" if row.cardinality else "",
            f"{row.complexity.macs:,}",
            f"{row.complexity.params:,}",
            f"{row.complexity.activations:,}",
        )
        for row in stages
    ]
    sums = (f"{total.macs:,}", f"{total.params:,}", f"{total.activations:,}")
    header = ("", "output", "channels", "blocks", "C x d", "macs", "params")
    terminal.print_table(
        (*header, "activations"), [*rows, ("total", "", "", "", "", *sums)], left=1
    )
    agrees = "equal" if fvcore.conv_linear == total.macs else "DIFFERENT"
    typer.echo(
        f"\nparams without batch norm: {total.params_without_bn:,}\n"
        f"fvcore: conv + linear {fvcore.conv_linear:,} ({agrees}), "
        f"total with batch norm and pooling {fvcore.total:,}"
    )


@app.command()
def match(
    net: NetName,
    cardinality: Annotated[
        str, typer.Option(help="Cardinalities, as in 1,2,4,8,32.", show_default=False)
    ],
    hold: Annotated[Hold, typer.Option(help="What is held equal.")] = "macs",
    tolerance: Annotated[
        str, typer.Option(help="Largest difference from the reference.")
    ] = "5%",
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="CxDd",
            help="Setting to match, as in 1x64d. Default: the net's own.",
            show_default=False,
        ),
    ] = None,
    image_size: ImageSize = None,
    as_json: AsJson = False,
) -> None:
    """The width for each cardinality that meets the reference's complexity."""
    from resnext_ablate import matching

    template = parse_spec(net)
    found = matching.match(
        template,
        cardinalities=_whole_numbers(cardinality, option="--cardinality"),
        hold=hold,
        tolerance_pct=_percent(tolerance, option="--tolerance"),
        image_size=image_size or _default_image_size(template),
        reference=_with_setting(template, reference) if reference else None,
    )
    if as_json:
        terminal.print_json([_match_dict(one) for one in found])
    else:
        _print_matches(found)


@app.command()
def plan(
    study: StudyFile,
    overrides: Overrides = None,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """What a study would run: its nets with their match, its runs, its compute."""
    from resnext_ablate import records
    from resnext_ablate.config import load_study
    from resnext_ablate.study import prepare

    config = load_study(study, overrides=overrides or ())
    prepared = prepare(config, on_data=terminal.DataProgress())
    nets, cells = prepared.plan.nets, prepared.plan.cells
    done = len(records.read_runs(results / config.name, prepared.plan))
    train, info = prepared.config.train, prepared.data.info
    # A training step costs about three forward passes: one forward, two backward.
    passes = 3 * train.epochs * info.num_train
    macs = {net.variant: net.macs for net in nets}
    total_macs = sum(passes * macs[cell.variant] for cell in cells)
    if as_json:
        terminal.print_json(
            {
                "study": config.name,
                "nets": [_net_dict(net) for net in nets],
                "num_runs": len(cells),
                "num_done": done,
                "executors": len(prepared.devices),
                "device": prepared.config.run.device,
                "precision": train.precision,
                "training_macs": total_macs,
            }
        )
        return
    typer.echo(f"{config.name}: {config.question}\n")
    terminal.print_table(
        ("variant", "net", "macs", "params", "activations", "macs +-", "params +-"),
        [
            (
                net.variant,
                net.name,
                f"{net.macs:,}",
                f"{net.params:,}",
                f"{net.activations:,}",
                f"{net.macs_error_pct:+.2f} %",
                f"{net.params_error_pct:+.2f} %",
            )
            for net in nets
        ],
        left=2,
    )
    typer.echo(
        f"\n{len(nets)} variants x {len(config.run.seed_list())} seeds = {len(cells)} "
        f"runs of {train.epochs} epochs, {done} of them done\n"
        f"{info.num_train} images to train on, {info.num_val} to validate, "
        f"{info.num_test} to test; {info.image_size} x {info.image_size} pixels\n"
        f"{len(prepared.devices)} executors on {prepared.config.run.device}, "
        f"{train.precision}\n"
        f"training compute: {total_macs:.3g} multiply-adds"
    )


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
    from resnext_ablate.study import run_study

    with terminal.RunProgress() as progress:
        outcome = run_study(
            config,
            results=results,
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            retry_failed=retry_failed,
            on_data=terminal.DataProgress(),
            on_progress=progress,
        )
    _write_report(outcome.folder, as_json=as_json)
    _close_study(outcome)


@app.command()
def status(
    study: Annotated[str, typer.Argument(help="A study's name, file or folder.")],
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """How far a study is: runs done, under way and failed."""
    from resnext_ablate import records, trials

    folder = _study_folder(study, results)
    plan_ = records.read_plan(folder)
    runs = records.read_runs(folder, plan_)
    process = records.scheduler_process(folder)
    running = trials.running(folder, name=folder.name) if process else ()
    failed = [run for run in runs if run.state != "complete"]
    if as_json:
        terminal.print_json(
            {
                "study": folder.name,
                "num_planned": len(plan_.cells),
                "num_complete": len(runs) - len(failed),
                "num_failed": len(failed),
                "scheduler_process": process,
                "running": [
                    {
                        "variant": one.variant,
                        "seed": one.seed,
                        "epoch": one.epoch,
                        "val_error_pct": one.val_error_pct,
                    }
                    for one in running
                ],
                "failed": [
                    {"variant": one.variant, "seed": one.seed, "reason": one.reason}
                    for one in failed
                ],
            }
        )
        return
    state = f"run by process {process}" if process else "not running"
    typer.echo(
        f"{folder.name}: {len(runs) - len(failed)} of {len(plan_.cells)} runs "
        f"complete, {len(failed)} failed; {state}"
    )
    for one in running:
        error = one.val_error_pct
        so_far = "" if error is None else f", validation error {error:.2f} %"
        typer.echo(
            f"  running: {one.variant} seed {one.seed}, epoch {one.epoch}{so_far}"
        )
    for run_ in failed:
        typer.echo(f"  {run_.state}: {run_.variant} seed {run_.seed}: {run_.reason}")


@app.command("ls")
def list_studies(results: Results = Path("results"), as_json: AsJson = False) -> None:
    """The studies of a results folder."""
    from resnext_ablate import records

    rows = []
    for path in sorted(results.glob(f"*/{records.PLAN_FILE}")):
        plan_ = records.read_plan(path.parent)
        runs = records.read_runs(path.parent, plan_)
        complete = sum(run.state == "complete" for run in runs)
        rows.append(
            {
                "study": path.parent.name,
                "num_variants": len(plan_.nets),
                "num_planned": len(plan_.cells),
                "num_complete": complete,
                "num_failed": len(runs) - complete,
                "data": plan_.provenance.get("data_name", ""),
                "started_at": plan_.provenance.get("started_at", ""),
            }
        )
    if as_json:
        terminal.print_json(rows)
    elif not rows:
        terminal.talk(f"no studies in {results}")
    else:
        terminal.print_table(
            ("study", "data", "variants", "runs", "complete", "failed", "started"),
            [
                (
                    str(row["study"]),
                    str(row["data"]),
                    str(row["num_variants"]),
                    str(row["num_planned"]),
                    str(row["num_complete"]),
                    str(row["num_failed"]),
                    str(row["started_at"]),
                )
                for row in rows
            ],
            left=2,
        )


@app.command()
def report(
    study: Annotated[str, typer.Argument(help="A study's name, file or folder.")],
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Writes a study's tables and report anew from its run files."""
    _write_report(_study_folder(study, results), as_json=as_json)


def _write_report(folder: Path, *, as_json: bool) -> None:
    """Tables and report of a study's folder; prints the answer."""
    from resnext_ablate import records
    from resnext_ablate import report as report_

    tables = records.read_tables(folder)
    records.write_tables(tables, folder)
    files = report_.write_report(tables, folder=folder)
    if as_json:
        terminal.print_json(
            {
                "study": tables.study,
                "verdict": files.verdict,
                "report": str(files.html),
                "variants": terminal.rows_of(files.variants),
                "comparisons": terminal.rows_of(files.comparisons),
            }
        )
        return
    against = {str(row["variant"]): row for row in terminal.rows_of(files.comparisons)}
    terminal.print_table(
        (
            "variant",
            "macs",
            "params",
            "n",
            "test error",
            "against reference",
            "verdict",
        ),
        [
            _verdict_row(row, against.get(str(row["variant"])))
            for row in terminal.rows_of(files.variants)
        ],
        left=1,
    )
    typer.echo(f"\n{files.verdict}\nreport: {files.html}")


def _verdict_row(
    variant: dict[str, Any], comparison: dict[str, Any] | None
) -> tuple[str, ...]:
    error, low, high = (
        variant[f"test_error_pct_{part}"] for part in ("mean", "ci_low", "ci_high")
    )
    interval = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    difference = verdict = ""
    if comparison and comparison["difference_pct"] is not None:
        difference = f"{comparison['difference_pct']:+.2f}"
        if comparison["ci_low"] is not None:
            difference += (
                f" [{comparison['ci_low']:+.2f}, {comparison['ci_high']:+.2f}]"
            )
    if comparison:
        verdict = str(comparison["verdict"])
    return (
        str(variant["variant"]),
        f"{variant['macs']:,}",
        f"{variant['params']:,}",
        str(variant["n"]),
        "" if error is None else f"{error:.2f} %{interval}",
        "reference" if variant["is_reference"] else difference,
        verdict,
    )


def _close_study(outcome: Outcome) -> None:
    """The closing line of a study that was cut off or has failures; the exit code."""
    name = outcome.folder.name
    if outcome.signal_number is not None:
        terminal.talk(
            f"interrupted: {outcome.num_complete} of {outcome.num_planned} runs are "
            "done; the same command goes on from there"
        )
        raise typer.Exit(128 + outcome.signal_number)
    if outcome.num_failed:
        terminal.talk(
            f"{outcome.num_failed} of {outcome.num_planned} runs failed: "
            f"resnext-ablate status {name} says why; --retry-failed runs them again"
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


def _default_image_size(spec: ResNeXtSpec) -> int:
    return 224 if spec.stem == "imagenet" else 32


def _with_setting(template: ResNeXtSpec, setting: str) -> ResNeXtSpec:
    cardinality, widths = parse_setting(setting)
    return template.with_setting(cardinality, *widths)


def _whole_numbers(text: str, *, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"{option} must be whole numbers with commas between, as in 1,2,4,8,32; "
            f"got {text!r}."
        ) from None


def _percent(text: str, *, option: str) -> float:
    try:
        return float(text.strip().removesuffix("%"))
    except ValueError:
        raise InputError(
            f"{option} must be a percentage, as in 1%; got {text!r}."
        ) from None


def _match_dict(one: Match) -> dict[str, Any]:
    return {
        "name": one.spec.name,
        "setting": one.spec.setting,
        "cardinality": one.spec.cardinality,
        "base_width": one.spec.base_width,
        "bottleneck_widths": one.spec.bottleneck_widths,
        "macs": one.complexity.macs,
        "params": one.complexity.params,
        "activations": one.complexity.activations,
        "macs_error_pct": one.macs_error_pct,
        "params_error_pct": one.params_error_pct,
        "activations_error_pct": one.activations_error_pct,
        "block_params_error_pct": one.block_params_error_pct,
    }


def _net_dict(net: NetRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(net).items() if key != "spec"}


def _print_matches(found: Sequence[Match]) -> None:
    terminal.print_table(
        ("net", "C x d", "macs", "params", "activations", "macs +-", "params +-"),
        [
            (
                one.spec.name,
                one.spec.setting,
                f"{one.complexity.macs:,}",
                f"{one.complexity.params:,}",
                f"{one.complexity.activations:,}",
                f"{one.macs_error_pct:+.2f} %",
                f"{one.params_error_pct:+.2f} %",
            )
            for one in found
        ],
        left=2,
    )
