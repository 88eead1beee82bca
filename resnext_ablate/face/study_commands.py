"""The commands that plan and run a study.

Imports that cost time stand inside the verb that needs them, so that `--help` is quick.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.face import answers, results_commands, terminal
from resnext_ablate.face.options import AsJson, Overrides, Profile, Results, StudyFile

if TYPE_CHECKING:
    from resnext_ablate.records.checks import Check, CheckConfig
    from resnext_ablate.records.config import StudyConfig
    from resnext_ablate.study.planner import Spread
    from resnext_ablate.study.study import Outcome
    from resnext_ablate.study.study_plan import PreparedStudy


def plan(
    study: StudyFile,
    overrides: Overrides = None,
    profile: Profile = None,
    results: Results = Path("results"),
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Time short runs of every variant, for at most a minute.",
        ),
    ] = False,
    spread: Annotated[
        str | None,
        typer.Option(
            metavar="POINTS|STUDY",
            help="Spread between seeds, or a study that measured it.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a study would run, take and show: nets, runs, power, time, memory, disk."""
    from resnext_ablate.records.config import load_study

    config = load_study(study, overrides=overrides or (), profile=profile)
    if config.kind == "search" and (calibrate or spread):
        raise InputError(
            "--calibrate and --spread are for ablations: the nets "
            "of a search are not known beforehand."
        )
    from resnext_ablate.face import search_answers
    from resnext_ablate.records import records
    from resnext_ablate.study import planner
    from resnext_ablate.study.study_plan import prepare, read_earlier, with_all_cells

    folder = results / config.name
    earlier = read_earlier(folder)  # Nets matched by measuring stay what they are.
    prepared = prepare(config, earlier=earlier, on_data=terminal.DataProgress())
    if config.kind == "search":
        from resnext_ablate.study import search_plan

        space = search_plan.space_of(prepared.config, reference=prepared.plan.nets[0])
        num_fitting = space.feasible.count
        answer = search_answers.of_plan(prepared, num_fitting=num_fitting)
    else:
        prepared = with_all_cells(prepared)
        runs = records.read_runs(folder, prepared.plan)
        answer = _plan_of(
            prepared,
            done={run.cell for run in runs},
            spread=planner.chosen_spread(spread, study=config.name, results=results),
            is_timed=calibrate,
        )
    terminal.print_answer(answer, as_json=as_json)


def _plan_of(
    prepared: PreparedStudy, *, done: set[str], spread: Spread, is_timed: bool
) -> answers.Answer:
    from resnext_ablate.engines.execution import ExecutorError
    from resnext_ablate.face import plan_answers
    from resnext_ablate.study import calibration, planner

    timed = None
    if is_timed:
        try:
            timed = calibration.calibrate(
                prepared.config,
                nets=prepared.plan.nets,
                prepared=prepared.data,
                devices=prepared.devices,
                prepared_s=time.process_time(),
            )
        except ExecutorError as error:
            terminal.talk(f"error: {error}")
            raise typer.Exit(1) from None
    forecast = planner.forecast(
        prepared.config,
        cells=[cell for cell in prepared.plan.cells if cell.id not in done],
        num_variants=len(prepared.plan.nets),
        work=calibration.workload(prepared.config, prepared.data.info),
        spread=spread,
        calibration=timed,
        num_executors=len(prepared.devices),
    )
    return plan_answers.of_plan(prepared, num_done=len(done), forecast=forecast)


def run(
    study: StudyFile,
    overrides: Overrides = None,
    profile: Profile = None,
    results: Results = Path("results"),
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run failed runs again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Runs a study, or what is left of it, and writes its tables and report."""
    from resnext_ablate.records.checks import load_check
    from resnext_ablate.records.config import load_study

    check = load_check(study, overrides=overrides or (), profile=profile)
    if check is not None:
        run_check(check, results=results, as_json=as_json)
        return
    config = load_study(study, overrides=overrides or (), profile=profile)
    outcome = run_config(config, results=results, retry_failed=retry_failed)
    files = results_commands.report_on(outcome.folder, as_json=as_json)
    results_commands.pin_charts(outcome.folder, files)
    if outcome.num_failed:
        raise typer.Exit(3)


def run_check(config: CheckConfig, *, results: Path, as_json: bool) -> None:
    """Computes what a study that trains nothing checks, and prints it."""
    from resnext_ablate.face import claims_answers
    from resnext_ablate.records import checks

    found = compute_checks(config, results=results)
    answer = claims_answers.of_checks(config.name, found)
    terminal.print_answer(answer, as_json=as_json)
    if not all(one.holds for one in found):
        terminal.talk(f"not all hold: {checks.summary(found)}")


def compute_checks(config: CheckConfig, *, results: Path) -> tuple[Check, ...]:
    """Computes what a study that trains nothing checks, and keeps it in its folder."""
    from resnext_ablate.records import checks

    if config.check.counts:
        found = checks.count_checks(config.check.counts)
    else:
        from resnext_ablate.compute.form_check import form_checks

        found = form_checks(config.check.forms)
    checks.write_checks(config, found, results=results)
    return found


def run_config(
    config: StudyConfig, *, results: Path, retry_failed: bool = False
) -> Outcome:
    """Runs a study, or what is left of it, and says what is left to do.

    Raises:
        typer.Exit: it cannot go on (1), or was interrupted (130, 143).
    """
    terminal.talk(f"study {config.name}: {config.question}")
    from resnext_ablate.engines.execution import ExecutorError
    from resnext_ablate.study.guards import StudyHaltedError
    from resnext_ablate.study.study import run_study

    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    try:
        with terminal.RunProgress() as progress:
            outcome = run_study(
                config,
                results=results,
                command=command,
                retry_failed=retry_failed,
                on_data=terminal.DataProgress(),
                on_progress=progress,
            )
    except (ExecutorError, StudyHaltedError) as error:
        terminal.talk(f"error: {error}")
        raise typer.Exit(1) from None
    if outcome.signal_number is not None:
        terminal.talk(
            f"interrupted: {outcome.num_complete} of {outcome.num_planned} runs are "
            f"done; the same command goes on from there: {command}"
        )
        raise typer.Exit(128 + outcome.signal_number)
    if outcome.num_failed:
        terminal.talk(
            f"{outcome.num_failed} of {outcome.num_planned} runs failed: "
            f"resnext-ablate status {outcome.folder} says why; "
            "--retry-failed runs them again"
        )
    return outcome
