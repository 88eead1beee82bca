"""A study as tables, derived from its plan and run files."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from resnext_ablate.architecture.spec import spec_from_dict
from resnext_ablate.records.attempts import AttemptRecord, lost_by_cell, read_attempts
from resnext_ablate.records.certificate import DeviceCosts, NetCost, read_costs
from resnext_ablate.records.config import StudyConfig, load_study
from resnext_ablate.records.importance import Importance, read_importance
from resnext_ablate.records.outcomes import chosen, trial_outcomes
from resnext_ablate.records.records import (
    STUDY_FILE,
    EpochRecord,
    Plan,
    RunRecord,
    read_plan,
    read_runs,
    unpack_bits,
)


@dataclass(frozen=True)
class SearchTables:
    """What a search tried, apart from the runs that confirm its best nets."""

    trials: pd.DataFrame
    """One row per net tried, in their order."""
    runs: pd.DataFrame
    """One row per finished run, pruned ones included."""
    epochs: pd.DataFrame
    importance: pd.DataFrame
    """axis, importance, evaluator, seed, num_nets; empty until every net has ended."""


@dataclass(frozen=True)
class StudyTables:
    """A study as tables; only finished runs appear.

    Those of a search are the runs that confirm: its best nets with fresh seeds, beside
    the nets that they are compared with.
    """

    study: str
    config: StudyConfig
    provenance: dict[str, str]
    nets: pd.DataFrame
    """One row per variant, the reference first."""
    runs: pd.DataFrame
    """One row per finished run, failed and diverged ones included."""
    epochs: pd.DataFrame
    attempts: pd.DataFrame
    """One row per attempt at a run that ended without a result."""
    num_planned: int
    """Runs in the plan."""
    correct: Mapping[str, Mapping[int, npt.NDArray[np.bool_]]]
    """(N,) by variant and seed: which test images a complete run gets right."""
    search: SearchTables | None = None


def read_tables(folder: Path) -> StudyTables:
    """The tables of a study, from its plan and run files.

    Raises:
        InputError: the folder holds no study.
    """
    plan = read_plan(folder)
    config = load_study(folder / STUDY_FILE)
    runs = read_runs(folder, plan)
    lost = read_attempts(folder)
    search = None
    if config.kind == "search":
        search = _search_tables(
            config, plan, runs, attempts=lost, found=read_importance(folder)
        )
        plan = _confirming(plan, seeds=config.confirm_seeds())
        planned = {cell.id for cell in plan.cells}
        runs = tuple(run for run in runs if run.cell in planned)
    return StudyTables(
        study=config.name,
        config=config,
        provenance=plan.provenance,
        nets=_nets_frame(plan, read_costs(folder)),
        runs=_runs_frame(config.name, plan, runs, attempts=lost),
        epochs=_epochs_frame(config.name, runs),
        attempts=_attempts_frame(config.name, lost),
        num_planned=len(plan.cells),
        correct=_correct(runs, counts=plan.provenance.get("data_counts", "")),
        search=search,
    )


def _confirming(plan: Plan, *, seeds: Sequence[int]) -> Plan:
    """The part of a search's plan that runs with fresh seeds."""
    cells = tuple(cell for cell in plan.cells if cell.seed in seeds)
    variants = {cell.variant for cell in cells}
    nets = tuple(
        net for net in plan.nets if net.variant in variants or net.is_reference
    )
    return dataclasses.replace(plan, nets=nets, cells=cells, trials=())


def write_table(frame: pd.DataFrame, stem: Path, *, provenance: dict[str, str]) -> None:
    """Writes `stem`.csv and `stem`.parquet; Parquet carries the provenance in attrs."""
    frame = frame.copy()
    frame.attrs = dict(provenance)
    for suffix in (".csv", ".parquet"):
        temporary = stem.with_name(f".{stem.name}{suffix}")
        if suffix == ".csv":
            frame.to_csv(temporary, index=False)
        else:
            frame.to_parquet(temporary, index=False)
        temporary.replace(stem.with_name(stem.name + suffix))


def write_tables(tables: StudyTables, folder: Path) -> None:
    """Writes the `runs`, `epochs` and `attempts` tables as CSV and Parquet."""
    runs, epochs, search = tables.runs, tables.epochs, tables.search
    if search is not None:
        write_table(search.trials, folder / "search", provenance=tables.provenance)
        runs = pd.concat([search.runs, runs], ignore_index=True)
        epochs = pd.concat([search.epochs, epochs], ignore_index=True)
    write_table(runs, folder / "runs", provenance=tables.provenance)
    write_table(epochs, folder / "epochs", provenance=tables.provenance)
    write_table(tables.attempts, folder / "attempts", provenance=tables.provenance)


_TRIAL_COLUMNS = ["trial", "variant", "state", "rank", "val_error_pct"]


def _search_tables(
    config: StudyConfig,
    plan: Plan,
    runs: Sequence[RunRecord],
    *,
    attempts: Sequence[AttemptRecord],
    found: Importance | None,
) -> SearchTables:
    assert config.search is not None
    seeds = config.run.seed_list()
    outcomes = trial_outcomes(plan, runs, seeds=seeds)
    count = config.search.confirm_top
    best = chosen(outcomes, count=count, also_minimize=config.search.also_minimize)
    ranks = {one.trial.number: rank for rank, one in enumerate(best, start=1)}
    rows = [
        {
            "trial": one.trial.number,
            "variant": one.net.variant,
            "state": one.state,
            "rank": ranks.get(one.trial.number),
            "val_error_pct": one.val_error_pct,
            "seeds": len(one.runs),
            "epochs": sum(len(run.epochs) for run in one.runs),
            "pruned_at": one.trial.pruned_at,
            "is_audited": one.trial.is_audited,
            "step_time_ms": one.step_time_ms,
            "macs": one.net.macs,
            "params": one.net.params,
            "activations": one.net.activations,
            "macs_error_pct": one.net.macs_error_pct,
            **{f"param_{name}": value for name, value in one.trial.params.items()},
        }
        for one in outcomes
    ]
    own = [run for run in runs if run.seed in seeds]
    return SearchTables(
        trials=pd.DataFrame(rows) if rows else pd.DataFrame(columns=_TRIAL_COLUMNS),
        runs=_runs_frame(config.name, plan, own, attempts=attempts),
        epochs=_epochs_frame(config.name, own),
        importance=_importance_frame(found),
    )


def _importance_frame(found: Importance | None) -> pd.DataFrame:
    """One row per axis, in the order of their importance."""
    columns = {"axis": str, "importance": float}
    how = {"evaluator": str, "seed": int, "num_nets": int}
    rows = list(found.shares.items()) if found else []
    frame = pd.DataFrame(rows, columns=list(columns)).assign(
        **{key: getattr(found, key) if found else None for key in how}
    )
    return frame.astype(columns | how)


def _correct(
    runs: Sequence[RunRecord], *, counts: str
) -> dict[str, dict[int, npt.NDArray[np.bool_]]]:
    # Bits fill whole bytes, so that their number alone does not tell the images'.
    found = re.search(r"(\d+) test", counts)
    correct: dict[str, dict[int, npt.NDArray[np.bool_]]] = defaultdict(dict)
    for run in runs if found else ():
        if run.state == "complete" and run.correct_bits:
            assert found is not None
            bits = unpack_bits(run.correct_bits, num_images=int(found[1]))
            correct[run.variant][run.seed] = bits
    return dict(correct)


_EPOCH_COLUMNS = [field.name for field in dataclasses.fields(EpochRecord)]


def _nets_frame(plan: Plan, costs: DeviceCosts | None) -> pd.DataFrame:
    measured = {cost.name: cost for cost in costs.nets} if costs else {}
    rows = []
    for net in plan.nets:
        spec = spec_from_dict(net.spec)
        values = dataclasses.asdict(net)
        del values["spec"]
        rows.append(
            {
                "variant": net.variant,
                "name": net.name,
                "cardinality": spec.cardinalities[0],  # of stage 1, as the base width
                "base_width": spec.base_width,
                "bottleneck_widths": ",".join(map(str, spec.bottleneck_widths)),
                "depth": spec.depth,
                "template_width": spec.template_width,
                **values,
                **(_cost_columns(measured.get(net.name)) if measured else {}),
            }
        )
    return pd.DataFrame(rows)


def _cost_columns(cost: NetCost | None) -> dict[str, float | None]:
    """What was measured of a net; a variant that came later has nothing yet."""
    if cost is None:
        return dict.fromkeys(COST_COLUMNS)
    step, error = cost.step_s, cost.step_time_error_pct
    values = (
        1000 * step.median,
        1000 * step.low,
        1000 * step.high,
        error.median,
        error.low,
        error.high,
        1000 * cost.forward_s.median,
        100 * cost.step_floor_s / step.median,
        cost.peak_memory_mib,
        cost.peak_memory_error_pct,
    )
    return dict(zip(COST_COLUMNS, values, strict=True))


COST_COLUMNS = (
    "step_time_ms",
    "step_time_ms_low",
    "step_time_ms_high",
    "step_time_error_pct",
    "step_time_error_pct_low",
    "step_time_error_pct_high",
    "forward_time_ms",
    "roofline_pct",
    "step_peak_memory_mib",
    "step_peak_memory_error_pct",
)
"""Of a study whose nets were measured: medians, with 95 % intervals; `roofline_pct` is
the least time of a training step as a share of the measured one."""


def _runs_frame(
    study: str,
    plan: Plan,
    runs: Sequence[RunRecord],
    *,
    attempts: Sequence[AttemptRecord],
) -> pd.DataFrame:
    rows = []
    lost = lost_by_cell(attempts)
    for run in runs:
        net = plan.net(run.variant)
        spec = spec_from_dict(net.spec)
        last = run.epochs[-1] if run.state == "complete" else None
        rows.append(
            {
                "study": study,
                "variant": run.variant,
                "name": net.name,
                "cardinality": spec.cardinalities[0],  # of stage 1, as the base width
                "base_width": spec.base_width,
                "depth": spec.depth,
                "template_width": spec.template_width,
                "seed": run.seed,
                "state": run.state,
                "reason": run.reason,
                "macs": net.macs,
                "fvcore_macs": net.fvcore_macs,
                "params": net.params,
                "activations": net.activations,
                "epochs": len(run.epochs),
                "train_loss": last.train_loss if last else None,
                "train_error_pct": last.train_error_pct if last else None,
                "val_loss": last.val_loss if last else None,
                "val_error_pct": last.val_error_pct if last else None,
                "test_loss": run.test_loss,
                "test_error_pct": run.test_error_pct,
                "train_time_s": run.train_time_s,
                "images_per_s": run.images_per_s,
                "roofline_pct": run.roofline_pct,
                "peak_memory_mib": run.peak_memory_mib,
                "device": run.device,
                "precision": run.precision,
                "num_micro_batches": run.num_micro_batches,
                "num_fused": run.num_fused,
                "num_devices": run.num_devices,
                "lost_attempts": lost.get(run.cell, ""),
                "torch_version": run.environment.get("torch_version", ""),
                "package_version": run.environment.get("package_version", ""),
                "git_commit": run.environment.get("git_commit", ""),
                "data_checksum": run.data_checksum,
                "started_at": run.started_at,
            }
        )
    frame = pd.DataFrame(rows, columns=[*_RUN_COLUMNS])
    return frame.astype(dict.fromkeys(_MEASURED, float))


_RUN_COLUMNS = (
    "study",
    "variant",
    "name",
    "cardinality",
    "base_width",
    "depth",
    "template_width",
    "seed",
    "state",
    "reason",
    "macs",
    "fvcore_macs",
    "params",
    "activations",
    "epochs",
    "train_loss",
    "train_error_pct",
    "val_loss",
    "val_error_pct",
    "test_loss",
    "test_error_pct",
    "train_time_s",
    "images_per_s",
    "roofline_pct",
    "peak_memory_mib",
    "device",
    "precision",
    "num_micro_batches",
    "num_fused",
    "num_devices",
    "lost_attempts",
    "torch_version",
    "package_version",
    "git_commit",
    "data_checksum",
    "started_at",
)
_MEASURED = (
    "train_loss",
    "train_error_pct",
    "val_loss",
    "val_error_pct",
    "test_loss",
    "test_error_pct",
    "train_time_s",
    "images_per_s",
    "roofline_pct",
    "peak_memory_mib",
)


def _epochs_frame(study: str, runs: Sequence[RunRecord]) -> pd.DataFrame:
    rows = [
        {
            "study": study,
            "variant": run.variant,
            "seed": run.seed,
            **dataclasses.asdict(epoch),
        }
        for run in runs
        for epoch in run.epochs
    ]
    return pd.DataFrame(rows, columns=["study", "variant", "seed", *_EPOCH_COLUMNS])


def _attempts_frame(study: str, attempts: Sequence[AttemptRecord]) -> pd.DataFrame:
    columns = [field.name for field in dataclasses.fields(AttemptRecord)]
    rows = [{"study": study, **dataclasses.asdict(attempt)} for attempt in attempts]
    return pd.DataFrame(rows, columns=["study", *columns])
