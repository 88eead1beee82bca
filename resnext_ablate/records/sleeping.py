"""A plan of runs that sleep in place of training, and what they come to.

It tells what scheduling costs and stands, by the real scheduler, without any training.
"""

from __future__ import annotations

import random

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.records import records
from resnext_ablate.records.records import Cell, EpochRecord, NetRecord, Plan, RunRecord

_SPEC = parse_spec("resnet11-t8")


def plan_of(num_runs: int) -> Plan:
    """One net with so many seeds."""
    net = NetRecord(
        variant="1x8d",
        name=_SPEC.name,
        spec=_SPEC.to_dict(),
        image_size=8,
        macs=1,
        params=1,
        params_without_bn=1,
        activations=1,
        fvcore_macs=1,
        fvcore_total=1,
        macs_error_pct=0.0,
        params_error_pct=0.0,
        activations_error_pct=0.0,
        is_reference=True,
    )
    cells = tuple(
        Cell(records.cell_id(_SPEC, seed), "1x8d", seed) for seed in range(num_runs)
    )
    return Plan(nets=(net,), cells=cells, provenance={"data_checksum": ""})


def run_of(cell: Cell, *, num_epochs: int) -> RunRecord:
    """The run of a cell, the same in every process."""
    draw = random.Random(cell.id)
    epochs = tuple(
        EpochRecord(
            epoch=epoch,
            train_loss=draw.random(),
            train_error_pct=draw.random(),
            val_loss=draw.random(),
            val_error_pct=draw.random(),
            learning_rate=0.1,
            time_s=1.0,
            images_per_s=1.0,
            peak_memory_mib=1.0,
        )
        for epoch in range(1, num_epochs + 1)
    )
    return RunRecord(
        cell=cell.id,
        variant=cell.variant,
        seed=cell.seed,
        state="complete",
        reason="",
        device="cpu",
        precision="fp32",
        data_checksum="",
        started_at="",
        environment={},
        epochs=epochs,
        test_error_pct=draw.random(),
    )
