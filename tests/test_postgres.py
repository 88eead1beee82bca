"""Studies on PostgreSQL: a real server, started here, stopped and killed."""

import signal
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from postgres import PASSWORD, Server, free_port, program, server

from studies import (
    STUDY,
    assert_equal_results,
    run,
    start,
    wait_until,
)

SEARCH = """
[search]
axes = ["stage-cardinality=1..8*2", "stage-width=2..16/2"]
num_trials = 6
pruner = "asha"
confirm_top = 1
confirm_seeds = 2
"""

__all__ = ["server"]  # a fixture

ONE = ["run.executors=1", "run.seeds=1", "run.checkpoint_every_s=1e-9"]


pytestmark = pytest.mark.skipif(
    program("initdb") is None, reason="needs PostgreSQL's initdb and pg_ctl"
)


def trials_of(server: Server, name: str) -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.RDBStorage(Server.driven(server.url))
    try:
        return optuna.load_study(study_name=name, storage=storage).get_trials()
    finally:
        storage.engine.dispose()


def num_reports(server: Server, name: str) -> int:
    try:
        trials = trials_of(server, name)
    except KeyError:
        return 0
    return sum(len(trial.intermediate_values) for trial in trials)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same study on SQLite, which nobody disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = run(folder, *ONE)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_study_survives_its_database_and_its_scheduler(
    server: Server, unbroken: Path, tmp_path: Path
) -> None:
    """The database is away for a while, a second launch refused, the scheduler killed.

    The tables are those of an undisturbed study on SQLite, and no file and no line
    holds the password.
    """
    arguments = [*ONE, f"run.storage={server.url}", "train.epochs=5"]
    process = start(tmp_path, *arguments)
    wait_until(lambda: num_reports(server, "tiny") > 0)

    process.send_signal(signal.SIGSTOP)  # It holds the study, and has time.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    second = run(elsewhere, *arguments)
    assert second.returncode == 2, second.stderr
    assert f"is being run by process {process.pid} on " in second.stderr

    server.stop()
    process.send_signal(signal.SIGCONT)
    assert process.stderr is not None
    heard = ""
    while "the storage does not answer: runs go on, their results wait" not in heard:
        heard += process.stderr.readline()
        assert process.poll() is None, heard
    runs = tmp_path / "results" / "tiny" / "runs"
    wait_until(lambda: len(list(runs.glob("*.json"))) > 0)
    server.begin()
    wait_until(
        lambda: any(
            trial.state == TrialState.COMPLETE for trial in trials_of(server, "tiny")
        )
    )
    process.kill()
    _, talk = process.communicate()

    done = run(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert_equal_results(tmp_path, unbroken)
    states = [trial.state for trial in trials_of(server, "tiny")]
    assert states.count(TrialState.COMPLETE) == 2
    assert TrialState.RUNNING not in states
    complete = [t for t in trials_of(server, "tiny") if t.state == TrialState.COMPLETE]
    assert all(len(trial.intermediate_values) == 5 for trial in complete)

    said = second.stderr + heard + talk + done.stdout + done.stderr
    assert PASSWORD not in said
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert PASSWORD.encode() not in path.read_bytes(), path

    other = run(elsewhere, *arguments)
    assert other.returncode == 2
    assert "holds a study tiny of another results folder" in other.stderr
    assert "optuna delete-study" in other.stderr


def test_a_database_that_is_not_there_is_one_message(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No server, or a wrong password: said once, without the password, code 2."""
    nowhere = server.url.replace(str(server.port), str(free_port()))
    for url, secret in ((nowhere, PASSWORD), (server.url, "wrong-password")):
        monkeypatch.setenv("PGPASSWORD", secret)
        done = run(tmp_path, *ONE, f"run.storage={url}")
        assert done.returncode == 2, done.stderr
        assert "cannot be opened as Optuna's storage" in done.stderr
        assert "Traceback" not in done.stderr
        assert secret not in done.stderr


@pytest.mark.full
def test_a_database_away_for_thirty_seconds(
    server: Server, unbroken: Path, tmp_path: Path
) -> None:
    """Runs go on for half a minute without a database, and nothing of them is lost."""
    arguments = [*ONE, f"run.storage={server.url}", "name=away"]
    (tmp_path / "tiny.toml").unlink(missing_ok=True)
    process = start(tmp_path, *arguments)
    wait_until(lambda: num_reports(server, "away") > 0)
    server.stop()
    time.sleep(30)
    server.begin()
    _, talk = process.communicate(timeout=240)
    assert process.returncode == 0, talk
    assert "the storage answers again" in talk
    states = [trial.state for trial in trials_of(server, "away")]
    assert states == [TrialState.COMPLETE] * 2


@pytest.mark.full
def test_a_search_goes_on_without_its_database(server: Server, tmp_path: Path) -> None:
    """The database is away for half a minute in a search: its run goes on meanwhile.

    Afterwards the search does too, and ends with all its nets tried and confirmed.
    """
    text = STUDY.replace('name = "tiny"', 'name = "tiny"\nkind = "search"')
    text = text.replace('variants = ["1x8d", "2x5d"]', "tolerance_pct = 5.0")
    (tmp_path / "tiny.toml").write_text(text + SEARCH)
    arguments = [*ONE, f"run.storage={server.url}", "name=hunt", "train.epochs=4"]
    process = start(tmp_path, *arguments)
    wait_until(lambda: num_reports(server, "hunt") > 0)
    server.stop()
    time.sleep(30)
    server.begin()
    _, talk = process.communicate(timeout=400)
    assert process.returncode == 0, talk
    assert "the storage does not answer: runs go on" in talk
    assert "the storage answers again" in talk
    nets = trials_of(server, "hunt (nets)")
    assert {one.state for one in nets} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert len(nets) == 6
    runs = trials_of(server, "hunt")
    ended = [one for one in runs if one.state != TrialState.FAIL]
    cells = [one.user_attrs["cell"] for one in ended]
    files = {path.stem for path in tmp_path.glob("results/hunt/runs/*.json")}
    assert len(set(cells)) == len(cells)
    assert set(cells) == files
    assert TrialState.RUNNING not in [one.state for one in runs]
    assert len(ended) >= 6 + 2 * 2
