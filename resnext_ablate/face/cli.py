"""The command line: parse, call, print.

Answers go to standard output, talk and progress to standard error. Exit codes: 0 done,
1 failure, 2 bad input, 3 finished with failed runs, 4 an optional package is missing,
130 and 143 interrupted.

Imports that cost time stand inside the verb that needs them, so that `--help` is quick.
"""

from __future__ import annotations

import gc
import sys
from typing import Annotated

import typer

from resnext_ablate import __version__
from resnext_ablate.architecture.spec import (
    InputError,
    MeasuringError,
    MissingExtraError,
)
from resnext_ablate.face import (
    bench_commands,
    claims_commands,
    net_commands,
    results_commands,
    study_commands,
    terminal,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="FLOPs-matched ResNeXt ablations: wider, deeper or more cardinality?",
)

_NEW_OBJECTS = 50_000
"""After so many Python looks for garbage. Imports make many more, and no garbage."""


def main() -> None:
    """Entry point of `resnext-ablate`."""
    gc.set_threshold(_NEW_OBJECTS)
    try:
        app()
    except InputError as error:
        terminal.talk(f"error: {error}")
        sys.exit(2)
    except MissingExtraError as error:
        terminal.talk(f"error: {error}")
        sys.exit(4)
    except MeasuringError as error:
        terminal.talk(f"error: {error}")
        sys.exit(1)
    finally:
        # Else Python searches all of torch for garbage before it ends: a second.
        gc.freeze()


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.")
    ] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


app.command()(net_commands.describe)
app.command()(net_commands.match)
app.command()(bench_commands.bench)
app.command("bench-training")(bench_commands.bench_training)
app.command("export-net")(net_commands.export_net)


app.command()(study_commands.plan)
app.command()(study_commands.run)
app.command()(results_commands.status)
app.command("ls")(results_commands.list_studies)
app.command()(results_commands.report)
app.command()(results_commands.verify)
app.command()(results_commands.export)
app.command()(results_commands.compare)
app.command()(claims_commands.reproduce)
