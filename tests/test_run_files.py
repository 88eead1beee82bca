"""Run files told apart, and watched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resnext_ablate.records import records, run_files
from resnext_ablate.records.records import Cell
from resnext_ablate.records.sleeping import plan_of, run_of

(CELL,) = plan_of(1).cells


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path


def write(folder: Path, values: dict[str, object]) -> None:
    records.run_path(folder, CELL.id).write_text(json.dumps(values))


def test_the_short_look_agrees_with_reading_the_whole_file(folder: Path) -> None:
    """Whatever field is missing or strange, both take the file or neither does."""
    run = run_of(CELL, num_epochs=2)
    assert run_files.read_state(folder, CELL.id) is None
    records.write_run(run, folder)
    whole = json.loads(records.run_path(folder, CELL.id).read_text())
    variants = [
        {key: value for key, value in whole.items() if key != left_out}
        for left_out in whole
    ]
    variants += [whole, {**whole, "strange": 1}, {**whole, "schema_version": 0}]
    variants += [{**whole, "epochs": [{}]}, {**whole, "epochs": [3]}]
    taken = 0
    for values in variants:
        write(folder, values)
        state = run_files.read_state(folder, CELL.id)
        read = records.read_run(folder, CELL.id)
        assert state == (read.state if read else None)
        taken += state is not None
    assert 1 < taken < len(variants) - 4, "some fields have defaults, most have none"


def test_a_watch_tells_of_changes_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a change it lists twice, as times of folders are coarse; then no more."""
    now = [0.0]
    monkeypatch.setattr(run_files.time, "monotonic", lambda: now[0])
    watch = run_files.Watch(folder)

    def later() -> frozenset[str] | None:
        now[0] += 1.1
        return watch.changed_cells()

    assert [later(), later(), later()] == [frozenset(), frozenset(), None]
    records.write_run(run_of(CELL, num_epochs=1), folder)
    (folder / "runs" / ".half.json").write_text("")
    assert watch.changed_cells() is None, "it was asked just now"
    assert [later(), later(), later()] == [{CELL.id}, {CELL.id}, None]
    records.run_path(folder, CELL.id).unlink()
    assert later() == frozenset()


def test_states_of_a_plan_are_those_of_its_whole_files(folder: Path) -> None:
    """A cut file is none, and stays where it is until the study is tidied."""
    first, second, _ = plan_of(3).cells
    records.write_run(run_of(first, num_epochs=1), folder)
    records.run_path(folder, second.id).write_text("{")
    stranger = Cell("0" * 16, "1x8d", 9)
    records.write_run(run_of(stranger, num_epochs=1), folder)
    assert run_files.states_of(folder, plan_of(3)) == {first.id: "complete"}
    assert run_files.tidy(folder, plan_of(3)) == {first.id: "complete"}
    assert not records.run_path(folder, second.id).exists()
    assert records.run_path(folder, stranger.id).exists()
