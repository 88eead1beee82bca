"""What a study is to run, settled before anything runs: data, nets, cells, devices.

It goes on with what earlier runs have left, and refuses what would not compare with it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.compute import hardware, preparation, tuning
from resnext_ablate.numbers import looks
from resnext_ablate.records import certificate, paper, records
from resnext_ablate.records.certificate import DeviceCosts
from resnext_ablate.records.config import StudyConfig, differences, load_study
from resnext_ablate.records.records import Cell, NetRecord, Plan
from resnext_ablate.study import seed_plan, variants
from resnext_ablate.study.search_plan import space_of

# What may differ from the study file of earlier results: these add runs, or do not
# touch a run's numbers. Moved images are recognised by their checksum.
_MAY_CHANGE = (
    "question",
    "report",
    "data.root",
    "data.num_workers",
    "net.cardinality",
    "net.variants",
    "net.tolerance_pct",
    "net.measure",
    "run.seeds",
    "run.engine",
    "run.ray_address",
    "run.slurm_cluster",
    "run.slurm_timeout_min",
    "run.slurm_options",
    "run.executors",
    "run.runs_per_device",
    "run.max_attempts",
    "run.checkpoint_every_s",
    "run.lease_s",
    "run.storage",
    "run.sinks",
)
# More trials go on with a search; other seeds or tolerances would be another one.
_MAY_CHANGE_IN_SEARCH = (
    *(key for key in _MAY_CHANGE if key not in ("run.seeds", "net.tolerance_pct")),
    "search.num_trials",
    "search.confirm_top",
    "search.confirm_seeds",
)


@dataclass(frozen=True)
class Earlier:
    """What a study's folder holds of an earlier run: the resolved config and plan."""

    config: StudyConfig
    plan: Plan
    costs: DeviceCosts | None
    """Of its nets, where they were measured."""


@dataclass(frozen=True)
class PreparedStudy:
    """A study ready to run: nothing in it is `auto` any more."""

    config: StudyConfig
    plan: Plan
    data: preparation.Prepared
    devices: tuple[str, ...]
    """One for each executor."""
    costs: DeviceCosts | None
    """Measured step times and memory; None where they were not asked for."""


def prepare(
    config: StudyConfig,
    *,
    command: str = "",
    earlier: Earlier | None = None,
    on_data: Callable[[int, int], None] | None = None,
) -> PreparedStudy:
    """Decodes the data, matches and measures the nets, and lays out the runs.

    Args:
        config: the study as its file has it.
        command: the command line, for the record.
        earlier: what the results hold that this run goes on with.
        on_data: told (done, total) while images are decoded.

    Raises:
        InputError: images, nets, devices or rows of the paper are not as they need to
            be; or the study differs from `earlier` so that runs would not be
            comparable.
    """
    if config.report.paper is not None:
        paper.load_paper(config.report.paper)  # The report would say so after all runs.
    config, devices = _resolve(config, earlier=earlier.config if earlier else None)
    if earlier:
        _check_comparable(earlier.config, config)
    prepared = preparation.prepare(config.data, on_progress=on_data)
    info = prepared.info
    config = config.model_copy(update={"data": prepared.config})
    old_plan = earlier.plan if earlier else None
    if old_plan and old_plan.provenance["data_checksum"] != info.checksum:
        raise InputError(
            f"study {config.name}: the images are not those of the results so far "
            f"(checksum {info.checksum[:12]}, was "
            f"{old_plan.provenance['data_checksum'][:12]}); give the study a new name."
        )
    planned = variants.plan_nets(
        config,
        data=info,
        device=devices[0],
        known=old_plan.nets if old_plan else (),
        known_costs=earlier.costs if earlier else None,
    )
    if planned.costs:
        largest_mib = max(net.peak_memory_mib for net in planned.costs.nets)
        hardware.check_room(devices, run_mib=largest_mib)
    train = tuning.with_forms(
        config.train,
        convs=variants.convolutions(config, planned.nets),
        device=torch.device(devices[0]),
    )
    config = config.model_copy(update={"train": train})
    provenance = {"study_id": secrets.token_hex(8)} | (
        old_plan.provenance
        if old_plan
        else _provenance(config, info=info, command=command)
    )
    cells = _first_cells(config, planned.nets)
    plan = Plan(nets=planned.nets, cells=cells, provenance=provenance)
    return PreparedStudy(config, plan, prepared, devices, planned.costs)


def _first_cells(config: StudyConfig, nets: tuple[NetRecord, ...]) -> tuple[Cell, ...]:
    """The cells known from the start: none of a search, of adaptive seeds the first."""
    if config.kind == "search":
        space_of(config, reference=nets[0])  # Refuses what cannot run.
        return ()
    is_adaptive = config.run.seeds == "adaptive"
    seeds = range(looks.FIRST_SEEDS) if is_adaptive else config.run.seed_list()
    return seed_plan.cells_of(nets, seeds=seeds)


def with_all_cells(prepared: PreparedStudy) -> PreparedStudy:
    """An ablation with every cell that it can come to, those of later looks too."""
    seeds = prepared.config.run.seed_list()
    cells = seed_plan.cells_of(prepared.plan.nets, seeds=seeds)
    return replace(prepared, plan=replace(prepared.plan, cells=cells))


def read_earlier(folder: Path) -> Earlier | None:
    """What a study's folder holds of an earlier run; None where there was none.

    Raises:
        InputError: what it holds is damaged.
    """
    if not (folder / records.PLAN_FILE).exists():
        return None
    return Earlier(
        config=load_study(folder / records.STUDY_FILE),
        plan=records.read_plan(folder),
        costs=certificate.read_costs(folder),
    )


def with_kept_runs(plan: Plan, earlier: Earlier | None, *, folder: Path) -> Plan:
    """The plan with the finished cells of an earlier, wider one: none is dropped."""
    if earlier is None:
        return plan
    old = earlier.plan
    planned = {cell.id for cell in plan.cells}
    kept = tuple(
        cell
        for cell in old.cells
        if cell.id not in planned and (old.trials or records.read_run(folder, cell.id))
    )
    names = {net.variant for net in plan.nets}
    owners: tuple[Cell | records.Trial, ...] = (*old.trials, *kept)
    nets = {one.variant: old.net(one.variant) for one in owners}
    extra = tuple(net for variant, net in nets.items() if variant not in names)
    return replace(
        plan, nets=plan.nets + extra, cells=plan.cells + kept, trials=old.trials
    )


def _resolve(
    config: StudyConfig, *, earlier: StudyConfig | None
) -> tuple[StudyConfig, tuple[str, ...]]:
    """The config with every `auto` settled, and a device for each executor.

    What earlier results settled stays settled.
    """
    run, train = config.run, config.train
    if earlier and run.device == "auto":
        run = run.model_copy(update={"device": earlier.run.device})
    found = hardware.devices(run.device)
    run = run.model_copy(update={"device": found[0].partition(":")[0]})
    devices = hardware.placed(
        found,
        executors=run.executors,
        runs_per_device=run.runs_per_device,
        devices_per_run=run.devices_per_run,
    )
    run = run.model_copy(update={"executors": len(devices)})
    images = config.data
    if earlier and images.loading == "auto":
        images = images.model_copy(update={"loading": earlier.data.loading})
    train = tuning.settled(
        train,
        earlier=earlier.train if earlier else None,
        device=torch.device(found[0]),
    )
    search = config.search and config.search.resolved(epochs=train.epochs)
    parts = {"data": images, "run": run, "train": train, "search": search}
    return config.model_copy(update=parts), devices


def _check_comparable(old: StudyConfig, new: StudyConfig) -> None:
    free = _MAY_CHANGE if new.kind == "ablation" else _MAY_CHANGE_IN_SEARCH
    if "adaptive" in (old.run.seeds, new.run.seeds):
        free = (*(key for key in free if key not in seed_plan.FIXED), "report.paper")
    changed = "\n  ".join(differences(old, new, may_change=free))
    if changed:
        raise InputError(
            f"study {new.name} has results of other settings; its runs would not be "
            f"comparable:\n  {changed}\n"
            "Give the changed study a new name (name=...), or move its folder away."
        )


def _provenance(
    config: StudyConfig, *, info: preparation.DataInfo, command: str
) -> dict[str, str]:
    gpus = [
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    ]
    return {
        "study": config.name,
        "question": config.question,
        "command": command,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **records.environment(),
        "cpu": hardware.device_name(torch.device("cpu")),
        "gpu": ", ".join(gpus),
        "data_name": info.name,
        "data_checksum": info.checksum,
        "data_counts": (
            f"{info.num_train} train, {info.num_val} val, {info.num_test} test"
        ),
        "corrupt_files": ", ".join(info.corrupt_files),
    }
