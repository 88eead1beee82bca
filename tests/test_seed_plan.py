"""A study of adaptive seeds grows look by look, and decides the same after any kill."""

from __future__ import annotations

import math
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from search_parts import net

import studies
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.spec import InputError
from resnext_ablate.evidence import report, verify
from resnext_ablate.records import records
from resnext_ablate.records.config import StudyConfig
from resnext_ablate.records.records import Cell, Plan, RunRecord
from resnext_ablate.records.sleeping import run_of
from resnext_ablate.records.tables import read_tables
from resnext_ablate.study import study_plan
from resnext_ablate.study.seed_plan import SeedPlan, cells_of

NETS = tuple(
    replace(net(label), spec=parse_spec(f"resnext11-{c}x8d-t8").to_dict())
    for label, c in (("a", 1), ("b", 2), ("c", 4))
)
MEANS = {"a": 5.0, "b": 2.0, "c": 4.7}
CONFIG = StudyConfig.model_validate(
    {
        "name": "grows",
        "net": {"template": "resnet11-t8", "cardinality": [1, 2, 4]},
        "data": {"name": "digits"},
        "train": {"epochs": 1, "precision": "fp32", "kernels": "torch"},
        "run": {"seeds": "adaptive", "max_seeds": 6, "device": "cpu", "executors": 1},
    }
)


def error_of(cell: Cell) -> float:
    """A made-up test error; the same cell always has the same."""
    return MEANS[cell.variant] + random.Random(cell.id).gauss(0, 0.3)


def train(cell: Cell) -> RunRecord:
    return replace(run_of(cell, num_epochs=1), test_error_pct=error_of(cell))


def grow(folder: Path) -> list[Cell]:
    """All cells that a study trains in one go, in their order."""
    (folder / "runs").mkdir(parents=True)
    first = Plan(nets=NETS, cells=cells_of(NETS, seeds=range(3)), provenance={})
    records.write_plan(first, folder)
    grower = SeedPlan(first, config=CONFIG, folder=folder)
    assert grower.num_to_come == 3 * (6 - 3)
    assert grower.next_cells() == ()
    todo, trained = list(first.cells), []
    while todo:
        cell = todo.pop(0)
        assert cell in records.read_plan(folder).cells, "a cell is written down first"
        run = train(cell)
        records.write_run(run, folder)
        grower.settle(run)
        trained.append(cell)
        cells = grower.next_cells()
        assert not (cells and todo), "a look waits for all runs of the one before"
        todo += cells
    assert grower.num_to_come == 0
    assert records.read_plan(folder).cells == grower.plan.cells == tuple(trained)
    return trained


def test_seeds_go_where_a_comparison_is_open(tmp_path: Path) -> None:
    """The far variant has three seeds, the near one and the reference more."""
    trained = grow(tmp_path / "whole")
    counts = {v: sum(cell.variant == v for cell in trained) for v in "abc"}
    assert counts["b"] == 3
    assert counts["a"] == counts["c"] > 3
    assert sorted({cell.seed for cell in trained}) == list(range(counts["a"]))


@pytest.mark.parametrize("num_done", [0, 2, 8, 9, 10, 11])
def test_a_killed_study_decides_the_same(tmp_path: Path, num_done: int) -> None:
    """Whichever runs a kill leaves, going on trains the rest of the same cells."""
    whole = grow(tmp_path / "whole")
    folder = tmp_path / "killed"
    (folder / "runs").mkdir(parents=True)
    for cell in whole[:num_done]:
        records.write_run(train(cell), folder)
    kept = [*cells_of(NETS, seeds=range(3)), *whole[9:num_done]]
    plan = Plan(nets=NETS, cells=tuple(kept), provenance={})
    records.write_plan(plan, folder)
    grower = SeedPlan(plan, config=CONFIG, folder=folder)
    todo = [cell for cell in plan.cells if not records.read_run(folder, cell.id)]
    trained = []
    while todo or (todo := list(grower.next_cells())):
        cell = todo.pop(0)
        run = train(cell)
        records.write_run(run, folder)
        grower.settle(run)
        trained.append(cell)
    assert trained == whole[num_done:]


def test_a_failed_run_is_an_end_too(tmp_path: Path) -> None:
    """The look takes place without the run's error."""
    (tmp_path / "runs").mkdir()
    plan = Plan(nets=NETS, cells=cells_of(NETS, seeds=range(3)), provenance={})
    grower = SeedPlan(plan, config=CONFIG, folder=tmp_path)
    for cell in plan.cells:
        run = train(cell)
        if cell.variant == "c" and cell.seed < 2:
            run = replace(run, state="failed", test_error_pct=None, epochs=())
        grower.settle(run)
    assert {cell.variant for cell in grower.next_cells()} == {"a", "c"}


OVERRIDES = (
    "run.seeds=adaptive",
    "run.max_seeds=4",
    "train.epochs=2",
    "report.equivalence_margin_pct=0.01",
)


@pytest.mark.slow
def test_a_real_study_of_adaptive_seeds_survives_a_kill(tmp_path: Path) -> None:
    """Killed in its second look, it goes on to the cells and verdict it would have."""
    process = studies.start(tmp_path, *OVERRIDES, "run.executors=1")
    folder = tmp_path / "results" / "tiny"

    def in_second_look() -> bool:
        return len(list((folder / "runs").glob("*.json"))) == 7

    studies.wait_until(in_second_look)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = studies.run(tmp_path, *OVERRIDES, "run.executors=1")
    assert done.returncode == 0, done.stderr
    assert "[8/8]" in done.stderr
    assert "with looks at the runs after 3, 4 seeds" in done.stdout
    assert len(records.read_plan(folder).cells) == 8
    tables = read_tables(folder)
    row = report.evidence_of(tables).comparisons.iloc[0]
    assert row["looks"] == 2 and math.isfinite(row["p_corrected"])
    assert "open after look 2 of 2, 4 seeds" in row["explanation"]
    checked = verify.verify(folder / "report.html")
    assert (checked.findings, checked.run_files) == ((), "agree")


@pytest.mark.parametrize(
    "change",
    [
        {"run": {"seeds": "adaptive", "max_seeds": 7}},
        {"run": {"seeds": 3}},
        {"net": {"template": "resnet11-t8", "cardinality": [1, 2]}},
        {"report": {"equivalence_margin_pct": 1.0}},
    ],
)
def test_what_looks_rest_on_cannot_change(change: dict[str, object]) -> None:
    """Looks, family and margin are fixed before the first run."""
    other = StudyConfig.model_validate(CONFIG.model_dump(mode="json") | change)
    plan = Plan(nets=NETS, cells=(), provenance={"data_checksum": ""})
    with pytest.raises(InputError, match="would not be comparable"):
        study_plan.prepare(other, earlier=study_plan.Earlier(CONFIG, plan, None))
