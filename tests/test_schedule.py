"""The scheduler's loop against executors that do as they are told here."""

from __future__ import annotations

import dataclasses
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from resnext_ablate.engines.execution import Ending, ExecutorError
from resnext_ablate.records import records, run_files
from resnext_ablate.records.attempts import read_attempts
from resnext_ablate.records.config import StudyConfig
from resnext_ablate.records.progress import Progress
from resnext_ablate.records.records import Cell
from resnext_ablate.records.sleeping import plan_of
from resnext_ablate.records.sleeping import run_of as sleeping_run_of
from resnext_ablate.study import storage, trials
from resnext_ablate.study.schedule import Schedule


def run_of(cell: Cell) -> records.RunRecord:
    return sleeping_run_of(cell, num_epochs=3)


Script = Callable[[dict[str, Any]], Iterator[dict[str, Any]]]


class Scripted:
    """An executor that answers each job as a script says, until it dies."""

    def __init__(self, script: Script, *, versions: dict[str, str]) -> None:
        self._script = script
        self._versions = versions
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._killed = False

    def write(self, line: str) -> None:
        values = json.loads(line)
        if "job" in values:
            self._lines.put(values["job"])

    def lines(self) -> Iterator[str]:
        yield json.dumps({"event": "ready", "versions": self._versions})
        while (job := self._lines.get()) is not None:
            about = {"cell": job["cell"], "attempt": job["attempt"]}
            for values in self._script(job):
                if values["event"] == "dies":
                    return
                yield json.dumps({**about, **values})

    def ending(self) -> Ending:
        return Ending("executor killed by SIGKILL", by_signal=True)

    def kill(self) -> None:
        self._lines.put(None)

    def close(self) -> None:
        self.kill()


def completes(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    run = run_of(Cell(job["cell"], job["variant"], job["seed"]))
    run = dataclasses.replace(run, num_micro_batches=job["num_micro_batches"])
    for epoch in run.epochs:
        yield {"event": "epoch", "epoch": dataclasses.asdict(epoch)}
    records.write_run(run, Path(job["study_folder"]))
    yield {"event": "finished"}


@dataclasses.dataclass
class Outcome:
    folder: Path
    notes: list[str]
    runs: dict[str, records.RunRecord]
    states: list[TrialState]


def carry_out(
    folder: Path,
    script: Script,
    *,
    num_cells: int = 1,
    versions: dict[str, str] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    **settings: object,
) -> Outcome:
    """A study of some cells on one scripted executor."""
    (folder / "runs").mkdir(exist_ok=True)
    config = {
        "name": "scripted",
        "net": {"template": "resnet11-t8", "variants": ["1x8d"]},
        "data": {"name": "digits"},
        "train": {"epochs": 3},
        "run": settings,
    }
    plan, notes = plan_of(num_cells), []

    def hear(progress: Progress) -> None:
        if progress.note:
            notes.append(progress.note)

    opened = storage.open_storage("sqlite", folder=folder, name="scripted", study_id="")
    states = run_files.tidy(folder, plan)
    trials.reconcile(opened, plan=plan, states=states, folder=folder)
    Schedule(
        trials.Ledger(opened, lock=None),
        config=StudyConfig.model_validate(config),
        plan=plan,
        states=states,
        folder=folder,
        data_folder=folder,
        devices=["cpu"],
        open_channel=lambda index: Scripted(
            script, versions=versions or records.running_versions()
        ),
        on_progress=hear,
    ).run(should_stop=should_stop)
    ends = [trial.state for trial in opened.study.get_trials()]
    storage.close(opened)
    run_files.tidy(folder, plan)
    runs = {run.cell: run for run in records.read_runs(folder, plan)}
    return Outcome(folder, notes, runs, ends)


def test_memory_that_runs_out_halves_the_batches(tmp_path: Path) -> None:
    """Twice no memory: the third attempt has four micro-batches, and says so."""

    def script(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if job["num_micro_batches"] < 4:
            yield {"event": "out_of_memory", "reason": "no memory"}
        else:
            yield from completes(job)

    outcome = carry_out(tmp_path, script)
    (run,) = outcome.runs.values()
    assert (run.state, run.num_micro_batches) == ("complete", 4)
    assert [note.rpartition(", ")[2] for note in outcome.notes] == [
        "each batch in 2 micro-batches",
        "each batch in 4 micro-batches",
    ]
    assert [one.cause for one in read_attempts(tmp_path)] == ["out_of_memory"] * 2


def test_memory_that_never_suffices_fails_the_run_alone(tmp_path: Path) -> None:
    """After its bound a run has failed, and the other one completes."""

    def script(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if job["seed"] == 0:
            yield {"event": "out_of_memory", "reason": "no memory"}
        else:
            yield from completes(job)

    outcome = carry_out(tmp_path, script, num_cells=2)
    runs = sorted(outcome.runs.values(), key=lambda run: run.seed)
    assert [run.state for run in runs] == ["failed", "complete"]
    assert runs[0].reason == "no memory (attempt 3 of 3)"
    lost = read_attempts(tmp_path)
    assert [(one.number, one.gave_up) for one in lost] == [
        (1, False),
        (2, False),
        (3, True),
    ]
    assert TrialState.RUNNING not in outcome.states


def test_attempts_are_counted_by_cause(tmp_path: Path) -> None:
    """Two deaths and two stops stay within three of each, and the run completes."""
    told = ["dies", "stopped", "dies", "stopped"]

    def script(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if told:
            yield {"event": told.pop(0), "reason": "stopped in epoch 1 after step 2"}
        else:
            yield from completes(job)
        if job["attempt"] in (2, 4):
            yield {"event": "dies"}  # as an executor does that a signal stopped

    outcome = carry_out(tmp_path, script)
    (run,) = outcome.runs.values()
    assert run.state == "complete"
    causes = [one.cause for one in read_attempts(tmp_path)]
    assert causes == ["killed", "terminated", "killed", "terminated"]
    assert outcome.states.count(TrialState.FAIL) == 4


def test_a_silent_executor_is_killed_after_its_lease(tmp_path: Path) -> None:
    """No word within the lease: killed, counted as hung, and tried again."""

    def script(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if job["attempt"] == 1:
            time.sleep(1.0)
        else:
            yield from completes(job)
        yield {"event": "dies"}

    outcome = carry_out(tmp_path, script, lease_s=0.3)
    (lost,) = read_attempts(tmp_path)
    assert lost.cause == "hung"
    assert "no step in 0.3 s" in lost.reason
    assert [run.state for run in outcome.runs.values()] == ["complete"]


def test_late_word_of_an_attempt_that_is_over_counts_for_nothing(
    tmp_path: Path,
) -> None:
    """Messages carry their attempt: those of an earlier one are dropped."""

    def script(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if job["attempt"] == 1:
            yield {"event": "out_of_memory", "reason": "no memory"}
            return
        epoch = dataclasses.asdict(run_of(Cell(job["cell"], "1x8d", 0)).epochs[0])
        yield {"event": "epoch", "epoch": {**epoch, "epoch": 7}, "attempt": 1}
        yield {"event": "finished", "attempt": 1}
        yield from completes(job)

    outcome = carry_out(tmp_path, script)
    opened = storage.open_storage(
        "sqlite", folder=tmp_path, name="scripted", study_id=""
    )
    *_, last = opened.study.get_trials()
    assert sorted(last.intermediate_values) == [1, 2, 3]
    assert len(outcome.states) == 2
    storage.close(opened)


def test_a_second_result_of_a_cell_is_dropped(tmp_path: Path) -> None:
    """The first file of a cell stays, whoever comes later."""
    (cell,) = plan_of(1).cells
    first = run_of(cell)
    assert records.write_run(first, tmp_path)
    assert not records.write_run(dataclasses.replace(first, variant="2x5d"), tmp_path)
    assert records.read_run(tmp_path, cell.id) == first


def test_a_full_disk_of_an_executor_halts_the_study(tmp_path: Path) -> None:
    """It is not the run's fault: the study stops, and the cell stays to do."""

    def script(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield {"event": "disk_full", "reason": "No space left on device"}

    with pytest.raises(OSError, match="No space left on device"):
        carry_out(tmp_path, script)
    outcome = carry_out(tmp_path, completes)
    assert [run.state for run in outcome.runs.values()] == ["complete"]
    assert TrialState.RUNNING not in outcome.states


def test_other_versions_are_refused(tmp_path: Path) -> None:
    """An executor that runs another release gets no job."""
    own = records.running_versions()
    with pytest.raises(ExecutorError, match=r"package_version 9\.9 in place of"):
        carry_out(tmp_path, completes, versions={**own, "package_version": "9.9"})
    assert not list((tmp_path / "runs").iterdir())


def test_a_given_up_run_gets_all_its_attempts_again(tmp_path: Path) -> None:
    """Who asks for another try after a failure starts to count anew."""

    def dies(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield {"event": "dies"}

    carry_out(tmp_path, dies, max_attempts=2)
    (path,) = (tmp_path / "runs").iterdir()
    path.unlink()
    outcome = carry_out(tmp_path, dies, max_attempts=2)
    assert [run.reason for run in outcome.runs.values()] == [
        "executor killed by SIGKILL (attempt 2 of 2)"
    ]
    assert [one.number for one in read_attempts(tmp_path)] == [1, 2, 3, 4]


def test_run_files_that_come_or_go_are_taken_note_of(tmp_path: Path) -> None:
    """While a study runs, one cell's file is brought and another one's is lost.

    The first is not run again and has its trial, the second is run again.
    """
    cells = plan_of(3).cells
    trained: list[int] = []

    def script(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        trained.append(job["seed"])
        if trained == [0, 1]:
            records.run_path(tmp_path, cells[0].id).unlink()
            records.write_run(run_of(cells[2]), tmp_path)
            time.sleep(2.5)
        yield from completes(job)

    outcome = carry_out(tmp_path, script, num_cells=3)
    assert trained == [0, 1, 0]
    assert {run.seed for run in outcome.runs.values()} == {0, 1, 2}
    assert "1 run files came from elsewhere; 1 run files are gone" in outcome.notes[0]
    assert outcome.states == [TrialState.COMPLETE] * 4


def test_a_run_file_that_is_not_whole_is_none(tmp_path: Path) -> None:
    """An executor says that it has finished, and its file is cut: the cell runs again.

    What was there is kept aside.
    """

    def script(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for message in completes(job):
            path = records.run_path(Path(job["study_folder"]), job["cell"])
            if job["attempt"] == 1 and path.exists():
                path.write_text(path.read_text()[:50])
            yield message

    outcome = carry_out(tmp_path, script)
    assert [run.state for run in outcome.runs.values()] == ["complete"]
    (lost,) = read_attempts(tmp_path)
    assert (lost.cause, lost.reason) == (
        "killed",
        "the executor left no whole run file",
    )
    assert len(list((tmp_path / "runs").glob("*.json.damaged"))) == 1


def test_trials_hold_every_epoch_of_their_runs(tmp_path: Path) -> None:
    """Reports are written many at a time, and none is lost or changed."""
    outcome = carry_out(tmp_path, completes, num_cells=5)
    opened = storage.open_storage(
        "sqlite", folder=tmp_path, name="scripted", study_id=""
    )
    for trial in opened.study.get_trials():
        run = outcome.runs[trial.user_attrs["cell"]]
        assert trial.intermediate_values == {
            epoch.epoch: epoch.val_error_pct for epoch in run.epochs
        }
    storage.close(opened)


def each_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The jobs of seeds that are trained as one net."""
    return [job, *({**job, **seat} for seat in job["beside"])]


def ends(job: dict[str, Any], event: str, **values: Any) -> dict[str, Any]:
    about = {"cell": job["cell"], "attempt": job["attempt"]}
    return {"event": event, **about, **values}


def complete(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for one in each_of(job):
        for values in completes(one):
            yield {**ends(one, ""), **values}


def test_fused_seeds_are_so_many_cells(tmp_path: Path) -> None:
    """Five seeds in twos are three jobs, five trials and five run files; a second
    launch has nothing to do."""
    jobs: list[list[int]] = []

    def script(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        jobs.append([one["seed"] for one in each_of(job)])
        yield from complete(job)

    for _ in range(2):
        outcome = carry_out(tmp_path, script, num_cells=5, seeds=5, fuse_seeds=2)
        assert jobs == [[0, 1], [2, 3], [4]]
        assert len(outcome.runs) == 5
        assert outcome.states == [TrialState.COMPLETE] * 5


def test_a_fault_of_fused_seeds_has_each_go_on_alone(tmp_path: Path) -> None:
    """An executor that dies after one seed's end loses the others only, and they are
    tried again one by one, within their bounds."""
    jobs: list[list[int]] = []

    def script(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        jobs.append([one["seed"] for one in each_of(job)])
        if len(jobs) == 1:
            yield from ({**ends(job, ""), **values} for values in completes(job))
            yield {"event": "dies"}
        else:
            yield from complete(job)

    outcome = carry_out(tmp_path, script, num_cells=3, seeds=3, fuse_seeds=3)
    assert jobs[0] == [0, 1, 2] and sorted(jobs[1:]) == [[1], [2]]
    assert {run.state for run in outcome.runs.values()} == {"complete"}
    assert sorted(state.name for state in outcome.states) == [
        *["COMPLETE"] * 3,
        *["FAIL"] * 2,
    ]
    lost = read_attempts(tmp_path)
    assert [(one.seed, one.cause) for one in sorted(lost, key=lambda o: o.seed)] == [
        (1, "killed"),
        (2, "killed"),
    ]


def test_seeds_that_are_too_many_for_memory_go_on_alone(tmp_path: Path) -> None:
    """They keep their whole batches, even where one attempt is all that they have."""
    jobs: list[tuple[int, int]] = []

    def script(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        jobs.append((len(each_of(job)), job["num_micro_batches"]))
        if job["beside"]:
            for one in each_of(job):
                yield ends(one, "out_of_memory", reason="no memory")
        else:
            yield from complete(job)

    outcome = carry_out(
        tmp_path, script, num_cells=2, seeds=2, fuse_seeds=2, max_attempts=1
    )
    assert jobs == [(2, 1), (1, 1), (1, 1)]
    assert {run.num_micro_batches for run in outcome.runs.values()} == {1}
    assert {one.cause for one in read_attempts(tmp_path)} == {"crowded"}
    assert any(note.endswith("no memory; it goes on alone") for note in outcome.notes)


def test_interrupted_seeds_go_on_together(tmp_path: Path) -> None:
    """A study that is stopped and begun again has the same jobs, hence the same
    numbers."""
    jobs: list[list[int]] = []
    asked = threading.Event()

    def stopped(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        jobs.append([one["seed"] for one in each_of(job)])
        assert asked.wait(30)
        for one in each_of(job):
            yield ends(one, "stopped", reason="asked to")

    def should_stop() -> bool:
        if jobs:
            asked.set()
        return asked.is_set()

    def script(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        jobs.append([one["seed"] for one in each_of(job)])
        yield from complete(job)

    fused = {"num_cells": 2, "seeds": 2, "fuse_seeds": 2}
    carry_out(tmp_path, stopped, should_stop=should_stop, **fused)
    outcome = carry_out(tmp_path, script, **fused)
    assert jobs == [[0, 1], [0, 1]]
    assert len(outcome.runs) == 2
    assert {one.cause for one in read_attempts(tmp_path)} == {"interrupted"}
