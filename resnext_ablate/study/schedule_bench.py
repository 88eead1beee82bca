"""What scheduling costs.

Run as `python -m resnext_ablate.study.schedule_bench [POSTGRESQL-URL]`.

The scheduler, its storage and the files of runs are the real ones; executors are
threads that sleep in place of training and speak the real protocol. A study of many
runs is made of run files first, so that its storage is as full as it would be.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy

from resnext_ablate.engines.execution import Ending
from resnext_ablate.records import records, run_files
from resnext_ablate.records.config import StudyConfig
from resnext_ablate.records.records import Cell, Plan, RunState
from resnext_ablate.records.sleeping import plan_of, run_of
from resnext_ablate.study import storage, trials
from resnext_ablate.study.schedule import Schedule

SIZES = (100, 1_000, 5_000, 10_000)
"""Runs that a study already has."""
NUM_EPOCHS = 20
NUM_TIMED = 30
"""Runs that are scheduled beyond those, for the time of one."""
EXECUTORS = (1, 4, 16, 64)
RUN_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a storage of a size costs."""

    storage: str
    num_runs: int
    opening_s: float
    """Open it, read the run files, bring both in line."""
    opening_cpu_s: float
    run_ms: float
    """From one run of 20 epochs that takes no time to the next."""
    run_cpu_ms: float
    """Of that, this process's."""


@dataclass(frozen=True)
class Throughput:
    """Sleeping runs of ten seconds on executors side by side."""

    num_executors: int
    num_runs: int
    ideal_s: float
    took_s: float

    @property
    def share_pct(self) -> float:
        return 100 * self.ideal_s / self.took_s


class SleepingChannel:
    """An executor that sleeps in place of training."""

    def __init__(self, run_s: float, num_epochs: int) -> None:
        self._run_s = run_s
        self._num_epochs = num_epochs
        self._jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def write(self, line: str) -> None:
        self._jobs.put(json.loads(line).get("job"))

    def lines(self) -> Iterator[str]:
        """What an executor would say: ready, each epoch of each job, finished."""
        yield json.dumps({"event": "ready", "versions": records.running_versions()})
        while (job := self._jobs.get()) is not None:
            cell = Cell(job["cell"], job["variant"], job["seed"])
            run = run_of(cell, num_epochs=self._num_epochs)
            about = {"cell": job["cell"], "attempt": job["attempt"]}
            for epoch in run.epochs:
                if self._run_s:
                    time.sleep(self._run_s / self._num_epochs)
                values = dataclasses.asdict(epoch)
                yield json.dumps({"event": "epoch", "epoch": values, **about})
            records.write_run(run, Path(job["study_folder"]))
            yield json.dumps({"event": "finished", **about})

    def ending(self) -> Ending:
        return Ending("asked to", by_signal=False)

    def kill(self) -> None:
        self._jobs.put(None)

    def close(self) -> None:
        self.kill()


def cost(url: str, *, num_runs: int) -> Cost:
    """Times a study that has so many runs: to open it, and to do some more."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / f"bench-{random.randrange(1 << 32):08x}"
        (folder / records.RUNS_FOLDER).mkdir(parents=True)
        full, more = plan_of(num_runs), plan_of(num_runs + NUM_TIMED)
        _fill(url, folder=folder, plan=full)
        start, cpu_start = time.perf_counter(), time.process_time()
        opened, states = _open(url, folder=folder, plan=more)
        opening_s = time.perf_counter() - start
        opening_cpu_s = time.process_time() - cpu_start
        start, cpu_start = time.perf_counter(), time.process_time()
        _run(
            opened, folder=folder, plan=more, states=states, num_executors=1, run_s=0.0
        )
        took_s = time.perf_counter() - start
        cpu_s = time.process_time() - cpu_start
        _remove(opened, url, name=folder.name)
    kind = url.partition(":")[0]
    each = 1000 / NUM_TIMED
    return Cost(
        storage=kind,
        num_runs=num_runs,
        opening_s=opening_s,
        opening_cpu_s=opening_cpu_s,
        run_ms=each * took_s,
        run_cpu_ms=each * cpu_s,
    )


def _fill(url: str, *, folder: Path, plan: Plan) -> None:
    """Makes the run files of a plan, and their trials as copies of the first one's."""
    first, *rest = plan.cells
    for cell in plan.cells:
        path = records.run_path(folder, cell.id)
        path.write_text(
            records.run_text(run_of(cell, num_epochs=NUM_EPOCHS)), encoding="utf-8"
        )
    opened, _ = _open(url, folder=folder, plan=replace(plan, cells=(first,)))
    trial = opened.study.get_trials(deepcopy=False)[0]._trial_id
    engine = opened.backend.engine
    tables = sqlalchemy.MetaData()
    tables.reflect(engine)
    with engine.begin() as connection:
        for name in _TABLES_OF_TRIALS:
            table = tables.tables[name]
            found = connection.execute(table.select().where(table.c.trial_id == trial))
            rows = [dict(row) for row in found.mappings()]
            copies = [
                _copy(row, table, cell=cell, trial=trial + index, number=index)
                for index, cell in enumerate(rest, start=1)
                for row in rows
            ]
            connection.execute(table.insert(), copies)
        if engine.dialect.name == "postgresql":
            connection.execute(sqlalchemy.text(_CATCH_UP))
    storage.close(opened)


def _copy(
    row: dict[str, Any],
    table: sqlalchemy.Table,
    *,
    cell: Cell,
    trial: int,
    number: int,
) -> dict[str, Any]:
    """A row of the first trial as one of another trial."""
    own_key = {column.name for column in table.primary_key}
    copy = {key: value for key, value in row.items() if key not in own_key}
    copy["trial_id"] = trial
    if "number" in row:
        copy["number"] = number
    if row.get("key") == "cell":
        copy["value_json"] = json.dumps(cell.id)
    return copy


_TABLES_OF_TRIALS = (
    "trials",
    "trial_params",
    "trial_user_attributes",
    "trial_intermediate_values",
    "trial_values",
)
_CATCH_UP = (
    "SELECT setval(pg_get_serial_sequence('trials', 'trial_id'), "
    "(SELECT MAX(trial_id) FROM trials))"
)


def throughput(num_executors: int, *, rounds: int = 5) -> Throughput:
    """Times sleeping runs, `rounds` for each executor, on an SQLite file."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "bench"
        (folder / records.RUNS_FOLDER).mkdir(parents=True)
        plan = plan_of(rounds * num_executors)
        opened, states = _open(storage.SQLITE, folder=folder, plan=plan)
        start = time.perf_counter()
        _run(
            opened,
            folder=folder,
            plan=plan,
            states=states,
            num_executors=num_executors,
            run_s=RUN_S,
        )
        took_s = time.perf_counter() - start
        storage.close(opened)
    return Throughput(num_executors, len(plan.cells), rounds * RUN_S, took_s)


def _open(
    url: str, *, folder: Path, plan: Plan
) -> tuple[storage.Storage, dict[str, RunState]]:
    """All that a scheduler does with storage and run files before it begins."""
    opened = storage.open_storage(url, folder=folder, name=folder.name, study_id="")
    states = run_files.tidy(folder, plan)
    trials.reconcile(opened, plan=plan, states=states, folder=folder)
    return opened, states


def _run(
    opened: storage.Storage,
    *,
    folder: Path,
    plan: Plan,
    states: dict[str, RunState],
    num_executors: int,
    run_s: float,
) -> None:
    config = {
        "name": folder.name,
        "net": {"template": "resnet11-t8", "variants": ["1x8d"]},
        "data": {"name": "digits"},
        "train": {"epochs": NUM_EPOCHS},
    }
    Schedule(
        trials.Ledger(opened, lock=None),
        config=StudyConfig.model_validate(config),
        plan=plan,
        states=states,
        folder=folder,
        data_folder=folder,
        devices=["cpu"] * num_executors,
        open_channel=lambda index: SleepingChannel(run_s, NUM_EPOCHS),
        on_progress=lambda progress: None,
    ).run(should_stop=lambda: False)


def _remove(opened: storage.Storage, url: str, *, name: str) -> None:
    if url != storage.SQLITE:
        opened.backend.delete_study(opened.backend.get_study_id_from_name(name))
    storage.close(opened)


def table(costs: list[Cost], throughputs: list[Throughput]) -> str:
    """The figures as people read them."""
    lines = ["storage       runs  opening      CPU  a run of 20 epochs       CPU"]
    lines += [
        f"{one.storage:<10}{one.num_runs:>8,}{one.opening_s:>7.2f} s"
        f"{one.opening_cpu_s:>7.2f} s{one.run_ms:>17.0f} ms{one.run_cpu_ms:>7.0f} ms"
        for one in costs
    ]
    lines += ["", "executors  runs of 10 s     took  of the ideal"]
    lines += [
        f"{one.num_executors:>9}{one.num_runs:>14}{one.took_s:>7.1f} s"
        f"{one.share_pct:>12.1f} %"
        for one in throughputs
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    urls = [storage.SQLITE, *sys.argv[1:]]
    measured = [cost(url, num_runs=size) for url in urls for size in SIZES]
    print(table(measured, [throughput(count) for count in EXECUTORS]))
