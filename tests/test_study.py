"""Whole studies by real processes: run, kill, resume, refuse."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from optuna.trial import TrialState
from PIL import Image

from studies import (
    assert_equal_results,
    attempts_of,
    checkpoints_of,
    children_of,
    command,
    in_mid_run,
    lost_runs,
    run,
    runs_of,
    start,
    trials_of,
    wait_until,
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nobody disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_study_ends_with_table_and_report(unbroken: Path) -> None:
    """A study leaves its tables in both forms, the report and its own file."""
    results = unbroken / "results" / "tiny"
    for name in ("runs", "epochs", "variants", "comparisons"):
        csv = pd.read_csv(results / f"{name}.csv")
        parquet = pd.read_parquet(results / f"{name}.parquet")
        assert list(csv.columns) == list(parquet.columns)
        assert len(csv) == len(parquet) > 0
        assert parquet.attrs["torch_version"]
    assert (results / "report.html").stat().st_size > 100_000
    assert 'precision = "fp32"' in (results / "study.toml").read_text()


def test_every_cell_ran_exactly_once(unbroken: Path) -> None:
    """One complete run and one COMPLETE trial per variant and seed, no more."""
    runs = runs_of(unbroken)
    assert list(zip(runs.variant, runs.seed, strict=True)) == [
        ("1x8d", 0),
        ("1x8d", 1),
        ("2x5d", 0),
        ("2x5d", 1),
    ]
    assert set(runs.state) == {"complete"}
    trials = trials_of(unbroken)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4
    assert len({trial.user_attrs["cell"] for trial in trials}) == 4


def test_trials_hold_validation_errors_only_as_values(unbroken: Path) -> None:
    """Optuna sees the last epoch's validation error; test errors are attributes."""
    runs = runs_of(unbroken).set_index(["variant", "seed"])
    for trial in trials_of(unbroken):
        row = runs.loc[(trial.user_attrs["variant"], trial.params["seed"])]
        assert trial.value == pytest.approx(row.val_error_pct)
        assert trial.intermediate_values[5] == trial.value
        assert trial.user_attrs["test_error_pct"] == pytest.approx(row.test_error_pct)


def test_fvcore_count_stands_beside_the_closed_form(unbroken: Path) -> None:
    """Each variant's conv + linear count by fvcore equals its macs."""
    runs = runs_of(unbroken)
    assert (runs.fvcore_macs == runs.macs).all()
    assert (runs.macs > 0).all()


def test_same_command_again_runs_nothing(unbroken: Path) -> None:
    """A finished study only gets its report anew."""
    before = runs_of(unbroken)
    done = run(unbroken)
    assert done.returncode == 0, done.stderr
    assert "epoch" not in done.stderr
    pd.testing.assert_frame_equal(runs_of(unbroken), before)
    assert len(trials_of(unbroken)) == 4


def test_killed_scheduler_and_executor_change_no_result(
    unbroken: Path, tmp_path: Path
) -> None:
    """SIGKILL of an executor, then of the scheduler: resumed, all equals unbroken."""
    process = start(tmp_path)
    wait_until(lambda: in_mid_run(tmp_path))
    os.kill(children_of(process.pid)[0], signal.SIGKILL)
    wait_until(lambda: lost_runs(tmp_path) > 0 and in_mid_run(tmp_path))
    process.kill()
    process.communicate()

    done = run(tmp_path)

    assert done.returncode == 0, done.stderr
    assert_equal_results(tmp_path, unbroken)
    trials = trials_of(tmp_path)
    states = [trial.state for trial in trials]
    assert states.count(TrialState.COMPLETE) == 4
    assert TrialState.RUNNING not in states
    lost = [trial for trial in trials if trial.state == TrialState.FAIL]
    reasons = {trial.user_attrs["reason"] for trial in lost}
    assert "executor killed by SIGKILL" in reasons
    assert "its scheduler ended before the run did" in reasons
    causes = attempts_of(tmp_path).cause
    assert set(causes) == {"killed", "scheduler_died"}
    assert len(causes) == len(lost)
    assert checkpoints_of(tmp_path) == []


def test_second_launch_is_refused_and_executors_die_with_the_first(
    tmp_path: Path,
) -> None:
    """Two schedulers never share a study, and a killed one leaves no orphan."""
    process = start(tmp_path, "train.epochs=100")
    try:
        wait_until(lambda: in_mid_run(tmp_path))
        done = run(tmp_path, "train.epochs=100")
        assert done.returncode == 2
        assert f"being run by process {process.pid}" in done.stderr
        children = children_of(process.pid)
        assert children
    finally:
        process.kill()
        process.communicate()
    wait_until(
        lambda: not any(Path(f"/proc/{child}").exists() for child in children),
        timeout_s=10,
    )


def test_executor_that_keeps_dying_fails_its_run_alone(tmp_path: Path) -> None:
    """With one attempt allowed a killed run is failed, and the others complete."""
    overrides = ["run.max_attempts=1", "run.executors=1", "run.seeds=1"]
    process = start(tmp_path, *overrides)
    wait_until(lambda: in_mid_run(tmp_path))
    os.kill(children_of(process.pid)[0], signal.SIGKILL)
    _, talk = process.communicate(timeout=240)
    assert process.returncode == 3, talk
    runs = runs_of(tmp_path)
    assert list(runs.state) == ["failed", "complete"]
    assert runs.reason[0] == "executor killed by SIGKILL (attempt 1 of 1)"

    again = run(tmp_path, *overrides)
    assert again.returncode == 3, "a failure stays one until a retry is asked for"
    retried = run(tmp_path, *overrides, "--retry-failed")
    assert retried.returncode == 0, retried.stderr
    assert set(runs_of(tmp_path).state) == {"complete"}


def test_diverged_runs_are_kept_and_counted(tmp_path: Path) -> None:
    """A loss that is not finite ends the run, not the study; exit code 3."""
    done = run(tmp_path, "train.learning_rate=1e30", "run.seeds=1")
    assert done.returncode == 3, done.stderr
    runs = runs_of(tmp_path)
    assert list(runs.state) == ["diverged", "diverged"]
    assert runs.reason.str.contains("epoch 1").all()
    assert runs.test_error_pct.isna().all()
    assert all(trial.state == TrialState.FAIL for trial in trials_of(tmp_path))


def copy_of(unbroken: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(unbroken, folder)
    return folder


def test_more_seeds_are_added_to_results(unbroken: Path, tmp_path: Path) -> None:
    """A wider plan keeps every finished run and adds the missing ones."""
    folder = copy_of(unbroken, tmp_path)
    before = runs_of(folder)
    done = run(folder, "run.seeds=3")
    assert done.returncode == 0, done.stderr
    after = runs_of(folder)
    assert len(after) == 6
    kept = after[after.seed < 2].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, before)


def test_fewer_seeds_drop_no_result(unbroken: Path, tmp_path: Path) -> None:
    """Narrowing a plan never loses what is computed."""
    folder = copy_of(unbroken, tmp_path)
    assert run(folder, "run.seeds=1").returncode == 0
    assert len(runs_of(folder)) == 4


def test_changed_settings_are_refused_with_the_difference(
    unbroken: Path, tmp_path: Path
) -> None:
    """Runs that are not comparable never end up in one table."""
    folder = copy_of(unbroken, tmp_path)
    done = run(folder, "train.epochs=7", "data.crop_padding=2")
    assert done.returncode == 2
    assert "train.epochs: 5 -> 7" in done.stderr
    assert "data.crop_padding: 1 -> 2" in done.stderr
    assert len(runs_of(folder)) == 4


def test_lost_storage_is_rebuilt_from_the_run_files(
    unbroken: Path, tmp_path: Path
) -> None:
    """The run files are the truth: without a storage nothing is run again."""
    folder = copy_of(unbroken, tmp_path)
    (folder / "results" / "tiny" / "study.db").unlink()
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert [trial.state for trial in trials_of(folder)] == [TrialState.COMPLETE] * 4
    pd.testing.assert_frame_equal(runs_of(folder), runs_of(unbroken))


def test_damaged_run_file_is_run_again_to_the_same_numbers(
    unbroken: Path, tmp_path: Path
) -> None:
    """A torn run file counts as none, and its cell gives the same result."""
    folder = copy_of(unbroken, tmp_path)
    path = sorted((folder / "results" / "tiny" / "runs").glob("*.json"))[0]
    path.write_text(path.read_text()[:100])
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert_equal_results(folder, unbroken)


def test_storage_that_is_none_is_refused(unbroken: Path, tmp_path: Path) -> None:
    """A file that is no SQLite storage is one message, and results stay."""
    folder = copy_of(unbroken, tmp_path)
    (folder / "results" / "tiny" / "study.db").write_text("not a storage\n" * 100)
    done = run(folder)
    assert done.returncode == 2
    assert "is no SQLite storage" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list((folder / "results" / "tiny" / "runs").glob("*.json"))) == 4


@pytest.mark.parametrize("place", ["/proc/none", "a-file"])
def test_unwritable_results_folder_is_refused(tmp_path: Path, place: str) -> None:
    """Where results cannot be written, the study says so before it trains."""
    (tmp_path / "a-file").write_text("")
    done = run(tmp_path, "--results", place)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.name=imagefolder", "data.root=nowhere"], "nowhere"),
        (["data.image_size=3"], "image_size must be at least 4"),
        (
            ["net.variants=[]", "net.cardinality=[3]", "net.tolerance_pct=0.01"],
            "no width holds macs within 0.01 %",
        ),
        (["run.device=cuda:7"], "this machine has no such device"),
        (["report.paper=table3/ResNet-51"], "did you mean 'table3/ResNet-50'?"),
    ],
)
def test_bad_study_is_one_message_and_code_2(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    """What only the data or the machine can tell is refused as clearly as a typo."""
    done = run(tmp_path, *overrides)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_status_and_ls_tell_of_a_study(unbroken: Path) -> None:
    """Both verbs read a results folder without torch or a scheduler."""
    program = command(unbroken)[:3]
    for arguments in (["status", "tiny", "--json"], ["ls", "--json"]):
        done = subprocess.run(
            [*program, *arguments],
            cwd=unbroken,
            capture_output=True,
            text=True,
            check=True,
        )
        value = json.loads(done.stdout)
        found = value[0] if isinstance(value, list) else value
        assert found["study"] == "tiny"
    assert found["complete"] == 4


def image_folder(root: Path) -> Path:
    """Three classes of real JPEG files, each in its own colour."""
    colours = {"blue": (20, 40, 200), "green": (30, 180, 60), "red": (210, 40, 30)}
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for name, colour in colours.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                noise = rng.integers(-20, 20, size=(12, 12, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.jpg", quality=90)
    return root


FOLDER_STUDY = [
    "data.name=imagefolder",
    "data.root=images",
    "train.epochs=4",
    "train.batch_size=16",
    "run.seeds=1",
]


def test_own_images_with_a_truncated_file_run_to_a_report(tmp_path: Path) -> None:
    """Colours are learned from folders; the broken file is named, not fatal."""
    folder = image_folder(tmp_path / "images")
    broken = folder / "train" / "red" / "7.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    done = run(tmp_path, *FOLDER_STUDY)
    assert done.returncode == 0, done.stderr
    runs = runs_of(tmp_path)
    assert list(runs.state) == ["complete", "complete"]
    assert (runs.test_error_pct < 20).all()
    parquet = pd.read_parquet(tmp_path / "results" / "tiny" / "runs.parquet")
    assert parquet.attrs["corrupt_files"] == "train/red/7.jpg"
    assert parquet.attrs["data_counts"] == "53 train, 6 val, 18 test"
    assert "train/red/7.jpg" in (
        tmp_path / "results" / "tiny" / "report.html"
    ).read_text(encoding="utf-8")


def test_empty_class_folder_is_refused_by_name(tmp_path: Path) -> None:
    """A class without images is a mistake in the data, told before anything runs."""
    folder = image_folder(tmp_path / "images")
    (folder / "train" / "yellow").mkdir()
    done = run(tmp_path, *FOLDER_STUDY)
    assert done.returncode == 2
    assert "yellow" in done.stderr
    assert "Traceback" not in done.stderr


def test_changed_images_are_not_mixed_with_earlier_results(tmp_path: Path) -> None:
    """Results of other images under the same study name are refused."""
    folder = image_folder(tmp_path / "images")
    assert run(tmp_path, *FOLDER_STUDY).returncode == 0
    (folder / "train" / "red" / "7.jpg").unlink()
    done = run(tmp_path, *FOLDER_STUDY)
    assert done.returncode == 2
    assert "the images are not those of the results so far" in done.stderr
