"""The commands that read results; none of them trains or needs torch.

Imports that cost time stand inside the verb that needs them, so that `--help` is quick.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resnext_ablate.architecture.spec import InputError, MissingExtraError
from resnext_ablate.face import answers, terminal
from resnext_ablate.face.options import AsJson, Results, StudyName

if TYPE_CHECKING:
    from resnext_ablate.evidence.report import ReportFiles
    from resnext_ablate.records.progress import Progress, RunningRun
    from resnext_ablate.records.tables import StudyTables

_WATCH_EVERY_S = 1.0


def status(
    study: StudyName,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it live until the study ends.")
    ] = False,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """How far a study is: runs done, under way and failed."""
    from resnext_ablate.records import records

    folder = study_folder(study, results)
    if watch:
        if as_json:
            raise InputError("--watch shows a study to people; --json goes without it.")
        _watch(folder)
    plan = records.read_plan(folder)
    process = records.scheduler_process(folder)
    answer = answers.of_status(
        folder.name,
        plan=plan,
        runs=records.read_runs(folder, plan),
        process=process,
        running=_running(folder) if process else (),
    )
    terminal.print_answer(answer, as_json=as_json)


def _watch(folder: Path) -> None:
    """Shows a study until no process runs it any more."""
    from resnext_ablate.records import records
    from resnext_ablate.records.config import load_study

    records.read_plan(folder)  # Refuses a folder that holds no study.
    num_epochs = load_study(folder / records.STUDY_FILE).train.epochs
    with terminal.StudyWatch(folder.name) as show:
        while True:
            is_last = records.scheduler_process(folder) is None
            running = () if is_last else _running(folder)
            progress = _progress(folder, running=running, num_epochs=num_epochs)
            show(progress, num_epochs=num_epochs)
            if is_last:
                return
            time.sleep(_WATCH_EVERY_S)


def _progress(
    folder: Path, *, running: tuple[RunningRun, ...], num_epochs: int
) -> Progress:
    """How far a study is by its files, whoever runs it."""
    from resnext_ablate.records import records
    from resnext_ablate.records.progress import Pace, Progress

    plan = records.read_plan(folder)
    runs = records.read_runs(folder, plan)
    pace = Pace(num_epochs=num_epochs)
    for run in runs:
        for epoch in run.epochs:
            pace.add(run.variant, seconds=epoch.time_s)
    begun = {(one.variant, one.seed) for one in running}
    done = {run.cell for run in runs}
    todo = [
        cell.variant
        for cell in plan.cells
        if cell.id not in done and (cell.variant, cell.seed) not in begun
    ]
    states = [run.state for run in runs]
    return Progress(
        num_planned=len(plan.cells),
        num_complete=states.count("complete"),
        num_failed=sum(state in records.FAILURES for state in states),
        num_pruned=states.count("pruned"),
        running=running,
        eta_s=pace.eta_s(
            todo=todo,
            num_to_come=0,
            running=running,
            num_executors=max(1, len(running)),
        )
        if running
        else None,
    )


def _running(folder: Path) -> tuple[RunningRun, ...]:
    from resnext_ablate.records import records
    from resnext_ablate.records.config import load_study
    from resnext_ablate.study import trials

    config = load_study(folder / records.STUDY_FILE)
    try:
        return trials.running(config.run.storage, folder=folder, name=config.name)
    except InputError as error:
        terminal.talk(f"what is under way cannot be told: {error}")
        return ()


def list_studies(results: Results = Path("results"), as_json: AsJson = False) -> None:
    """The studies of a results folder."""
    from resnext_ablate.records import records

    folders = [path.parent for path in sorted(results.glob(f"*/{records.PLAN_FILE}"))]
    plans = [records.read_plan(folder) for folder in folders]
    studies = [
        (folder, plan, records.read_runs(folder, plan))
        for folder, plan in zip(folders, plans, strict=True)
    ]
    if not studies:
        terminal.talk(f"no studies in {results}")
    terminal.print_answer(answers.of_studies(studies), as_json=as_json)


def report(
    study: StudyName, results: Results = Path("results"), as_json: AsJson = False
) -> None:
    """Writes a study's tables and report anew from its run files."""
    report_on(study_folder(study, results), as_json=as_json)


def write_report(folder: Path) -> tuple[StudyTables, ReportFiles]:
    """Writes the tables and the report of a study's folder."""
    from resnext_ablate.evidence.report import write_report
    from resnext_ablate.records.tables import read_tables, write_tables

    tables = read_tables(folder)
    write_tables(tables, folder)
    return tables, write_report(tables, folder=folder)


def report_on(folder: Path, *, as_json: bool) -> ReportFiles:
    """Writes the tables and the report of a study's folder and prints its verdicts."""
    tables, files = write_report(folder)
    answer = answers.of_report(tables.study, files)
    if tables.search is None:
        terminal.print_answer(answer, as_json=as_json)
        return files
    from resnext_ablate.face import search_answers

    found = search_answers.of_search(tables.search)
    terminal.print_answers(found, answer, key="search", as_json=as_json)
    return files


def pin_charts(folder: Path, files: ReportFiles) -> None:
    """Puts a report's charts into Optuna's storage for optuna-dashboard."""
    from resnext_ablate.records import records
    from resnext_ablate.records.config import load_study
    from resnext_ablate.study import trials

    config = load_study(folder / records.STUDY_FILE)
    try:
        trials.pin_charts(
            config.run.storage,
            folder=folder,
            name=config.name,
            study_id=records.read_plan(folder).provenance["study_id"],
            figures={one.key: one.figure for one in files.evidence.figures},
        )
    except InputError as error:
        terminal.talk(f"charts are not shown in optuna-dashboard: {error}")


def verify(
    html: Annotated[
        Path,
        typer.Argument(
            metavar="REPORT.html", help="The report's file.", show_default=False
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Recomputes every number of a report from the data inside it.

    Where the report lies in its study's folder, its data are held to the run files.
    """
    from resnext_ablate.evidence.verify import verify as check
    from resnext_ablate.face import results_answers

    found = check(html)
    answer = results_answers.of_verification(html, found)
    terminal.print_answer(answer, as_json=as_json)
    if found.findings:
        made, here = found.made_with, found.checked_with
        if made != here:
            versions = [
                ", ".join(f"{k} {v}" for k, v in one.items()) for one in (made, here)
            ]
            terminal.talk(
                f"the report was made with {versions[0]}, and this is {versions[1]}; "
                "other versions draw and word some things otherwise"
            )
        raise typer.Exit(1)


def export(
    study: StudyName,
    paper: Annotated[
        bool, typer.Option("--paper", help="All figures too, as PNG, SVG and PDF.")
    ] = False,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Writes a study's tables as LaTeX, Markdown, CSV and Parquet.

    Figures need a browser and the extra `figures`; tables need neither.
    """
    from resnext_ablate.evidence import export as files
    from resnext_ablate.evidence import report_page
    from resnext_ablate.evidence.report import evidence_of
    from resnext_ablate.face import results_answers
    from resnext_ablate.records.tables import read_tables

    folder = study_folder(study, results)
    tables = read_tables(folder)
    evidence = evidence_of(tables)
    shown = report_page.page_tables(tables, evidence)
    written = files.write_tables(
        shown, folder=folder / "tables", provenance=tables.provenance
    )
    drawn: tuple[Path, ...] = ()
    missing: MissingExtraError | None = None
    if paper:
        try:
            drawn = files.write_figures(evidence.figures, folder=folder / "figures")
        except MissingExtraError as error:
            missing = error
    answer = results_answers.of_export(tables.study, tables=written, figures=drawn)
    terminal.print_answer(answer, as_json=as_json)
    if missing:
        raise missing


def compare(
    first: StudyName,
    second: StudyName,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The page. Default: FIRST-and-SECOND.html among the results.",
            show_default=False,
        ),
    ] = None,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Two studies side by side: nets of both, differences, settings that differ."""
    from resnext_ablate.evidence import compare as pairs
    from resnext_ablate.face import results_answers
    from resnext_ablate.records.tables import read_tables

    tables = [read_tables(study_folder(study, results)) for study in (first, second)]
    pair = pairs.compare(tables[0], tables[1])
    html = out or results / f"{pair.names[0]}-and-{pair.names[1]}.html"
    pairs.write_page(pair, html)
    answer = results_answers.of_pair(pair, html=html)
    terminal.print_answer(answer, as_json=as_json)


def study_folder(study: str, results: Path) -> Path:
    """The folder of a study that is given by name, study file or folder."""
    path = Path(study)
    if path.is_dir():
        return path
    if path.suffix == ".toml":
        from resnext_ablate.records.config import load_study

        return results / load_study(path).name
    return results / study
