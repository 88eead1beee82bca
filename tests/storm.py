"""A study whose runs only sleep, so that thousands can be killed in minutes.

`python storm.py FOLDER STORAGE CELLS EXECUTORS` is its scheduler: plan, storage, lock,
signals and the scheduler's loop are the real ones. `python -m storm LOCK` is one of its
executors: it speaks the real protocol, and writes real run files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from resnext_ablate.records import records
from resnext_ablate.records.records import Cell
from resnext_ablate.records.sleeping import plan_of, run_of

NUM_EPOCHS = 3
RUN_S = 0.24


class Executor:
    """Sleeps in place of training, and stops when asked to."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Any] = SimpleQueue()
        self._stopping = threading.Event()

    def serve(self, lock: Path) -> None:
        with lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._catch)
            threading.Thread(target=self._read, daemon=True).start()
            self._say("ready", versions=records.running_versions())
            while (job := self._jobs.get()) is not None:
                self._run(job)

    def _run(self, job: dict[str, Any]) -> None:
        cell = Cell(job["cell"], job["variant"], job["seed"])
        run = run_of(cell, num_epochs=NUM_EPOCHS)
        about = {"cell": job["cell"], "attempt": job["attempt"]}
        for epoch in run.epochs:
            if self._stopping.wait(RUN_S / NUM_EPOCHS):
                return self._say("stopped", reason="stopped", **about)
            self._say("epoch", epoch=dataclasses.asdict(epoch), **about)
        folder = Path(job["study_folder"])
        if records.write_run(run, folder):
            with (folder / "done.log").open("a") as log:
                log.write(f"{run.cell}\n")
        self._say("finished", **about)

    def _say(self, event: str, **values: object) -> None:
        try:
            print(json.dumps({"event": event, **values}), flush=True)
        except BrokenPipeError:
            os._exit(0)

    def _read(self) -> None:
        for line in sys.stdin:
            values = json.loads(line)
            if "job" in values:
                self._jobs.put(values["job"])
            else:
                self._stopping.set()
        os._exit(0)

    def _catch(self, number: int, frame: object) -> None:
        self._stopping.set()
        self._jobs.put(None)


def schedule(folder: Path, *, url: str, num_cells: int, num_executors: int) -> int:
    """The scheduler of the study, whole but for decoding and matching."""
    from resnext_ablate.engines import execution
    from resnext_ablate.records import run_files
    from resnext_ablate.records.config import StudyConfig
    from resnext_ablate.study import guards, storage, trials
    from resnext_ablate.study.schedule import Schedule

    execution._PROGRAM = "storm"
    config = StudyConfig.model_validate(
        {
            "name": folder.name,
            "net": {"template": "resnet11-t8", "variants": ["1x8d"]},
            "data": {"name": "digits"},
            "train": {"epochs": NUM_EPOCHS},
            "run": {"max_attempts": 1000, "lease_s": 60.0, "storage": url},
        }
    )
    plan = plan_of(num_cells)
    with (
        guards.only_scheduler(folder, name=folder.name),
        storage.only_writer(url, name=folder.name) as lock,
        guards.caught_signals() as caught,
    ):
        assert execution.wait_for_executors(folder)
        opened = storage.open_storage(
            url, folder=folder, name=folder.name, study_id="storm"
        )
        states = run_files.tidy(folder, plan)
        trials.reconcile(opened, plan=plan, states=states, folder=folder)
        Schedule(
            trials.Ledger(opened, lock=lock),
            config=config,
            plan=plan,
            states=states,
            folder=folder,
            data_folder=folder,
            devices=["cpu"] * num_executors,
            open_channel=execution.open_locally(
                folder, devices=["cpu"] * num_executors
            ),
            on_progress=lambda progress: None,
        ).run(should_stop=lambda: bool(caught))
        storage.close(opened)
    return 128 + caught[0] if caught else 0


@dataclasses.dataclass(frozen=True)
class Aftermath:
    """What a storm left."""

    num_kills: int
    num_scheduler_kills: int
    lost: set[str]
    twice: set[str]
    unequal: set[str]


def rage(
    folder: Path,
    *,
    url: str,
    num_cells: int,
    num_executors: int,
    num_kills: int,
    seconds_between: float,
    seed: int,
) -> Aftermath:
    """Kills executors and the scheduler at random; then lets the study end."""
    draw = random.Random(seed)
    (folder / "runs").mkdir(parents=True)
    (folder / records.LOCK_FILE).touch()
    arguments = [str(folder), url, str(num_cells), str(num_executors)]
    command = [sys.executable, __file__, *arguments]
    places = (Path(__file__).parent, Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": ":".join(map(str, places))}

    def begin() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=environment, start_new_session=True)

    scheduler, kills, of_scheduler = begin(), 0, 0
    while kills < num_kills:
        time.sleep(draw.random() * 2 * seconds_between)
        if scheduler.poll() is not None:
            done = len(list((folder / "runs").glob("*.json")))
            if done == num_cells:
                break
            scheduler = begin()
        number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        with contextlib.suppress(OSError, ProcessLookupError):
            children = Path(f"/proc/{scheduler.pid}/task/{scheduler.pid}/children")
            executors = [int(child) for child in children.read_text().split()]
            if executors and draw.random() < 0.95:
                os.kill(draw.choice(executors), number)
                kills += 1
            elif executors:
                scheduler.send_signal(number)
                kills, of_scheduler = kills + 1, of_scheduler + 1
    for _ in range(5):
        if scheduler.wait() == 0:
            break
        scheduler = begin()
    cells = {cell.id: cell for cell in plan_of(num_cells).cells}
    runs = {cell: records.read_run(folder, cell) for cell in cells}
    log = (folder / "done.log").read_text().split()
    return Aftermath(
        num_kills=kills,
        num_scheduler_kills=of_scheduler,
        lost={cell for cell, run in runs.items() if run is None},
        twice={cell for cell in log if log.count(cell) > 1},
        unequal={
            cell
            for cell, run in runs.items()
            if run and run != run_of(cells[cell], num_epochs=NUM_EPOCHS)
        },
    )


if __name__ == "__main__":
    if len(sys.argv) == 3:  # As execution starts one: its lock, and how many processes.
        Executor().serve(Path(sys.argv[1]))
    else:
        place, url, cells, executors = sys.argv[1:]
        code = schedule(
            Path(place), url=url, num_cells=int(cells), num_executors=int(executors)
        )
        sys.exit(code)
