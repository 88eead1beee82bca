"""A study from its config to its run files: plan, scheduler, resume.

One scheduler process per study. It alone speaks to Optuna (through `trials`); the
executors train. What is to do is derived afresh from plan and run files, so the same
command goes on after any end of an earlier one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import optuna

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.engines import engines, execution
from resnext_ablate.records import certificate, records, run_files, sinks
from resnext_ablate.records.config import StudyConfig
from resnext_ablate.records.progress import Progress
from resnext_ablate.records.records import Plan
from resnext_ablate.study import guards, storage, trials
from resnext_ablate.study.schedule import Schedule
from resnext_ablate.study.search_plan import SearchPlan
from resnext_ablate.study.seed_plan import SeedPlan
from resnext_ablate.study.study_plan import (
    PreparedStudy,
    prepare,
    read_earlier,
    with_kept_runs,
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How `run_study` ended."""

    folder: Path
    num_planned: int
    num_complete: int
    num_failed: int
    """Runs that failed or diverged."""
    signal_number: int | None
    """The signal that interrupted the study; None where it ran to its end."""


def run_study(
    config: StudyConfig,
    *,
    results: Path,
    command: str = "",
    retry_failed: bool = False,
    on_data: Callable[[int, int], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Outcome:
    """Runs a study, or what is left of it, and leaves its run files in its folder.

    Args:
        config: the study as its file has it.
        results: folder that holds the study's folder.
        command: the command line, for the record.
        retry_failed: run failed and diverged cells again.
        on_data: told (done, total) while images are decoded.
        on_progress: told after each event of a run, and about once a second.

    Raises:
        InputError: see `prepare`; or the folder cannot be written, holds a storage
            that is none, or another process runs this study.
        ExecutorError: executors do not start, do not end, or are of other versions.
        StudyHaltedError: the disk is full.
    """
    folder = _make_folder(results / config.name)
    with guards.only_scheduler(folder, name=config.name):
        earlier = read_earlier(folder)
        prepared = prepare(config, command=command, earlier=earlier, on_data=on_data)
        if not execution.wait_for_executors(folder):
            raise execution.ExecutorError(
                f"{folder}: an executor of an earlier run does not end."
            )
        plan = with_kept_runs(prepared.plan, earlier, folder=folder)
        if retry_failed:
            _forget_failures(plan, folder)
        url = prepared.config.run.storage
        with (
            sinks.open_feed(config.run.sinks, folder=folder, study=config.name) as feed,
            guards.halted_by_faults(folder),
            storage.only_writer(url, name=config.name) as lock,
            guards.caught_signals() as caught,
        ):
            _carry_out(
                prepared,
                plan=plan,
                folder=folder,
                lock=lock,
                on_progress=feed.beside(on_progress),
                should_stop=lambda: bool(caught),
            )
        return _outcome(folder, signal_number=caught[0] if caught else None)


def _outcome(folder: Path, *, signal_number: int | None) -> Outcome:
    plan = records.read_plan(folder)  # As far as it has grown.
    states = Counter(run_files.states_of(folder, plan).values())
    return Outcome(
        folder=folder,
        num_planned=len(plan.cells),
        num_complete=states["complete"],
        num_failed=sum(states[state] for state in records.FAILURES),
        signal_number=signal_number,
    )


def _grower(
    prepared: PreparedStudy, plan: Plan, *, folder: Path, runs: optuna.Study
) -> SearchPlan | SeedPlan | None:
    """What makes the plan of a search or of adaptive seeds grow; others are whole."""
    if prepared.config.run.seeds == "adaptive":
        return SeedPlan(plan, config=prepared.config, folder=folder)
    if prepared.config.kind != "search":
        return None
    return SearchPlan(
        plan,
        named=[net.variant for net in prepared.plan.nets],
        config=prepared.config,
        folder=folder,
        runs=runs,
    )


def _carry_out(
    prepared: PreparedStudy,
    *,
    plan: Plan,
    folder: Path,
    lock: storage.WriterLock | None,
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> None:
    config = prepared.config
    opened = storage.open_storage(
        config.run.storage,
        folder=folder,
        name=config.name,
        study_id=plan.provenance["study_id"],
    )
    records.write_atomically(folder / records.STUDY_FILE, config.to_toml())
    records.write_plan(plan, folder)
    if prepared.costs:
        certificate.write_costs(prepared.costs, folder)
    states = run_files.tidy(folder, plan)
    trials.reconcile(opened, plan=plan, states=states, folder=folder)
    grower = _grower(prepared, plan, folder=folder, runs=opened.study)
    plan = grower.plan if grower else plan
    ledger = trials.Ledger(opened, lock=lock)
    with engines.opened(
        config,
        devices=prepared.devices,
        folder=folder,
        data_checksum=prepared.data.info.checksum,
    ) as open_channel:
        schedule = Schedule(
            ledger,
            config=config,
            plan=plan,
            states=states,
            folder=folder,
            data_folder=prepared.data.folder,
            devices=prepared.devices,
            open_channel=open_channel,
            on_progress=on_progress,
            grower=grower,
        )
        schedule.run(should_stop=should_stop)
    if ledger.was_silent:
        # Whatever was written without an answer, the run files know better.
        plan = grower.plan if grower else plan
        states = run_files.tidy(folder, plan)
        trials.reconcile(opened, plan=plan, states=states, folder=folder)
    if isinstance(grower, SearchPlan):
        grower.write_importance()
    storage.close(opened)


def _make_folder(folder: Path) -> Path:
    try:
        (folder / records.RUNS_FOLDER).mkdir(parents=True, exist_ok=True)
        (folder / records.LOCK_FILE).touch()
    except OSError as error:
        raise InputError(
            f"results folder {folder}: cannot be written ({error.strerror}); choose "
            "another with --results."
        ) from None
    return folder


def _forget_failures(plan: Plan, folder: Path) -> None:
    for run in records.read_runs(folder, plan):
        if run.state in records.FAILURES:
            records.run_path(folder, run.cell).unlink()
