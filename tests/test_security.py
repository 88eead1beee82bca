"""What comes from strangers runs no code and stays in its folder."""

import ast
import json
import sqlite3
from pathlib import Path

import pytest
from storm import plan_of, run_of

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.records import records
from resnext_ablate.records.config import load_study
from resnext_ablate.study import storage, trials

PACKAGE = Path(records.__file__).parents[1]


def calls(source: str) -> list[str]:
    """Calls and imports that could run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            names.append(getattr(node, "module", None) or "")
            banned = {"pickle", "dill", "joblib", "shelve", "marshal", "yaml"}
            found += [f"import {name}" for name in names if name in banned]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {keyword.arg: keyword.value for keyword in node.keywords}
            safe = options.get("weights_only")
            is_safe = isinstance(safe, ast.Constant) and safe.value is True
            if name in ("eval", "exec", "os.system"):
                found.append(name)
            elif name == "torch.load" and not is_safe:
                found.append("torch.load without weights_only")
            found += [key for key in ("allow_pickle", "shell") if key in options]
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem
)
def test_no_file_is_run(path: Path) -> None:
    """No pickle, no eval, no shell in the package."""
    assert calls(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "eval('1')",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run(c, shell=True)",
    ],
)
def test_the_search_for_code_bites(line: str) -> None:
    """Each planted way to run what a file holds is found."""
    assert calls(line)


@pytest.mark.parametrize("name", ["../up", "a/b", "..", "/root", "a\\b", "", ".hidden"])
def test_a_study_cannot_name_another_folder(tmp_path: Path, name: str) -> None:
    """A name with a way out of the results folder is refused."""
    path = tmp_path / "study.toml"
    path.write_text(
        f"name = {json.dumps(name)}\n[net]\ntemplate = 'resnet11-t8'\n"
        "variants = ['1x8d']\n[data]\nname = 'digits'\n[train]\nepochs = 1\n"
    )
    with pytest.raises(InputError, match="name"):
        load_study(path)


@pytest.mark.parametrize(
    "storage_url",
    [
        "postgresql://user:hunter2@host/db",
        "postgresql://host/db?password=hunter2",
        "mysql://host/db",
        "redis://host",
        "sqlite:////etc/passwd",
    ],
)
def test_a_study_file_holds_no_password_and_no_other_storage(
    tmp_path: Path, storage_url: str
) -> None:
    """Refused, and the password is not said back."""
    path = tmp_path / "study.toml"
    path.write_text(
        "name = 'a'\n[net]\ntemplate = 'resnet11-t8'\nvariants = ['1x8d']\n"
        "[data]\nname = 'digits'\n[train]\nepochs = 1\n"
    )
    with pytest.raises(InputError, match=r"run\.storage") as error:
        load_study(path, overrides=[f"run.storage={storage_url}"])
    assert "hunter2" not in str(error.value)


def test_a_plan_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    """A cell whose name is a way out of the folder makes a plan damaged."""
    records.write_plan(plan_of(1), tmp_path)
    path = tmp_path / records.PLAN_FILE
    values = json.loads(path.read_text())
    values["cells"][0]["id"] = "../../outside"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="damaged"):
        records.read_plan(tmp_path)


def filled(folder: Path) -> Path:
    """A storage with one trial under way."""
    plan = plan_of(1)
    opened = storage.open_storage("sqlite", folder=folder, name="s", study_id="")
    ledger = trials.Ledger(opened, lock=None)
    assert ledger.claim(net=plan.nets[0], cell=plan.cells[0], attempt=1) is not None
    storage.close(opened)
    return folder / storage.STORAGE_FILE


def reconcile(folder: Path) -> None:
    opened = storage.open_storage("sqlite", folder=folder, name="s", study_id="")
    try:
        trials.reconcile(opened, plan=plan_of(1), states={}, folder=folder)
    finally:
        storage.close(opened)


def change(path: Path, query: str, *values: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(query, values)
    connection.close()


def test_a_storage_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    """A trial whose cell is a way out of the folder leaves no file."""
    folder = tmp_path / "inner" / "study"
    folder.mkdir(parents=True)
    path = filled(folder)
    change(
        path,
        "UPDATE trial_user_attributes SET value_json = ? WHERE key = 'cell'",
        json.dumps("../../../outside"),
    )
    reconcile(folder)
    assert not list(tmp_path.rglob("*outside*"))
    assert not (folder / "attempts").exists()


@pytest.mark.parametrize(
    "distribution",
    [
        json.dumps({"name": "os.system", "attributes": {"command": "touch owned"}}),
        "[" * 100_000,
        "null",
    ],
)
def test_a_strange_storage_is_refused(tmp_path: Path, distribution: str) -> None:
    """Unknown or bottomless values of a storage are one message, and run nothing."""
    path = filled(tmp_path)
    change(path, "UPDATE trial_params SET distribution_json = ?", distribution)
    with pytest.raises(InputError, match="cannot be opened as Optuna's storage"):
        reconcile(tmp_path)


def test_a_storage_of_another_optuna_is_refused(tmp_path: Path) -> None:
    """Another major version read times otherwise: named, with what to do."""
    path = filled(tmp_path)
    change(path, "UPDATE version_info SET library_version = ?", "4.9.0")
    with pytest.raises(InputError, match=r"written by Optuna 4\.9\.0") as error:
        reconcile(tmp_path)
    assert "Move it away and run again" in str(error.value)


def test_a_finished_trial_is_not_ended_twice(tmp_path: Path) -> None:
    """What was written before an answer was lost is not an error the second time."""
    plan = plan_of(1)
    opened = storage.open_storage("sqlite", folder=tmp_path, name="s", study_id="")
    ledger = trials.Ledger(opened, lock=None)
    trial = ledger.claim(net=plan.nets[0], cell=plan.cells[0], attempt=1)
    assert trial is not None
    run = run_of(plan.cells[0], num_epochs=2)
    for _ in range(2):
        ledger.report(trial, epoch=run.epochs[0])
        ledger.tell(trial, run=run)
    assert ledger.num_waiting == 0
    (told,) = opened.study.get_trials()
    assert told.value == run.epochs[-1].val_error_pct
    storage.close(opened)


def test_a_rebuilt_storage_has_every_epoch(tmp_path: Path) -> None:
    """Trials made from run files, or told late, have the values of all epochs."""
    plan = plan_of(2)
    opened = storage.open_storage("sqlite", folder=tmp_path, name="s", study_id="")
    ledger = trials.Ledger(opened, lock=None)
    ledger.claim(net=plan.nets[0], cell=plan.cells[0], attempt=1)
    runs = {cell.id: run_of(cell, num_epochs=2) for cell in plan.cells}
    (tmp_path / "runs").mkdir()
    for run in runs.values():
        records.write_run(run, tmp_path)
    states = {cell: run.state for cell, run in runs.items()}
    trials.reconcile(opened, plan=plan, states=states, folder=tmp_path)
    for trial in opened.study.get_trials():
        run = runs[trial.user_attrs["cell"]]
        values = {epoch.epoch: epoch.val_error_pct for epoch in run.epochs}
        assert trial.intermediate_values == values
        assert trial.value == run.epochs[-1].val_error_pct
    assert len(opened.study.get_trials()) == 2
    storage.close(opened)
