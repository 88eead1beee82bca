"""Parts of searches for tests: learning curves, nets, runs and trials."""

from __future__ import annotations

from pathlib import Path

import optuna

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.records.records import (
    Cell,
    EpochRecord,
    NetRecord,
    Plan,
    RunRecord,
    RunState,
    Trial,
)
from resnext_ablate.study import storage


def curve(*errors: float, time_s: float = 1.0) -> list[EpochRecord]:
    return [
        EpochRecord(
            epoch=epoch,
            train_loss=1.0,
            train_error_pct=50.0,
            val_loss=1.0,
            val_error_pct=error,
            learning_rate=0.1,
            time_s=time_s,
            images_per_s=1.0,
            peak_memory_mib=1.0,
        )
        for epoch, error in enumerate(errors, start=1)
    ]


def net(variant: str, *, activations: int = 10) -> NetRecord:
    return NetRecord(
        variant=variant,
        name=variant,
        spec=parse_spec("resnet11-t8").to_dict(),
        image_size=8,
        macs=100,
        params=10,
        params_without_bn=9,
        activations=activations,
        fvcore_macs=100,
        fvcore_total=120,
        macs_error_pct=0.0,
        params_error_pct=0.0,
        activations_error_pct=0.0,
        is_reference=variant == "a",
    )


def ran(
    variant: str, error: float, *, seed: int = 0, state: RunState = "complete"
) -> RunRecord:
    return RunRecord(
        cell=f"{variant}{seed}",
        variant=variant,
        seed=seed,
        state=state,
        reason="" if state == "complete" else "why",
        device="cpu",
        precision="fp32",
        data_checksum="",
        started_at="",
        environment={},
        epochs=tuple(curve(90.0, error)),
        test_error_pct=100 - error,  # The test split would choose the other way round.
        images_per_s=1000.0 * (1 + error),
    )


def plan(*trials: Trial, seeds: tuple[int, ...] = (0,)) -> Plan:
    return Plan(
        nets=tuple(net(t.variant, activations=100 - t.number) for t in trials),
        cells=tuple(
            Cell(f"{trial.variant}{seed}", trial.variant, seed)
            for seed in seeds
            for trial in trials
        ),
        provenance={},
        trials=trials,
    )


def trial(number: int, variant: str) -> Trial:
    return Trial(number=number, variant=variant, params={})


def open_runs(folder: Path, *, name: str) -> optuna.Study:
    """Optuna's study of the runs, in the folder's own storage."""
    opened = storage.open_storage(
        storage.SQLITE, folder=folder, name=name, study_id="a study of the tests"
    )
    return opened.study
