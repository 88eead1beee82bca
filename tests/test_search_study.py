"""Whole searches by real processes: run, kill, resume, report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState

from resnext_ablate.architecture.complexity import complexity
from resnext_ablate.architecture.spec import spec_from_dict
from resnext_ablate.evidence import report, verify
from resnext_ablate.records import records
from resnext_ablate.records.importance import Importance, write_importance
from resnext_ablate.records.tables import read_tables

SEARCH = """\
name = "hunt"
question = "Which net is best at equal FLOPs?"
kind = "search"

[net]
template = "resnet11-t8"
tolerance_pct = 5.0

[search]
axes = ["stage-cardinality=1..8*2", "stage-width=2..16/2"]
num_trials = 5
sampler = "tpe"
startup_trials = 3
pruner = "asha"
reduction_factor = 2
audit_fraction = 0.7
confirm_top = 1
confirm_seeds = 2

[data]
name = "digits"
crop_padding = 1
flip = false

[train]
epochs = 3
batch_size = 64
learning_rate = 0.05
precision = "fp32"

[run]
seeds = 1
executors = 1
device = "cpu"
"""

PROGRAM = [sys.executable, "-c", "from resnext_ablate.face.cli import main; main()"]


def command(folder: Path, *arguments: str) -> list[str]:
    (folder / "hunt.toml").write_text(SEARCH, encoding="utf-8")
    return [*PROGRAM, "run", "hunt.toml", *arguments]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *arguments),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def wait_until(reached: Callable[[], bool], *, timeout_s: float = 200) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, "the search does not get there"
        time.sleep(0.02)


def table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / "results" / "hunt" / f"{name}.csv")


def nets_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{folder}/results/hunt/study.db"
    return optuna.load_study(study_name="hunt (nets)", storage=storage).get_trials()


def plan_of(folder: Path) -> records.Plan:
    return records.read_plan(folder / "results" / "hunt")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that nobody disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stdout, encoding="utf-8")
    return folder


def test_all_nets_tried_differ_and_hold_the_budget(unbroken: Path) -> None:
    """Every net's macs, counted anew, lie within the tolerance of the reference's."""
    plan = plan_of(unbroken)
    assert len({trial.variant for trial in plan.trials}) == len(plan.trials) == 5
    for trial in plan.trials:
        net = plan.net(trial.variant)
        macs = complexity(spec_from_dict(net.spec), net.image_size).macs
        assert macs == net.fvcore_macs
        assert abs(macs / plan.nets[0].macs - 1) <= 0.05


def test_pruned_runs_end_at_the_rung_and_count_nowhere(unbroken: Path) -> None:
    """A pruned run has the epochs of its rung, its own state, and no test error."""
    runs = table(unbroken, "runs")
    pruned = runs[runs.state == "pruned"]
    assert len(pruned) >= 1
    assert set(pruned.epochs) == {1}
    assert pruned.test_error_pct.isna().all()
    assert pruned.reason.str.fullmatch(
        "pruned by asha at rung 1 of 1: 1 reference epochs"
    ).all()
    assert not set(pruned.variant) & set(table(unbroken, "variants").variant)
    epochs = table(unbroken, "epochs")
    assert set(pruned.variant) <= set(epochs.variant)


def test_both_of_optunas_studies_tell_the_same(unbroken: Path) -> None:
    """Nets and runs are trials in one storage, with equal states and no zombie."""
    trials = table(unbroken, "search")
    nets = nets_of(unbroken)
    assert [trial.state.name.lower() for trial in nets] == trials.state.tolist()
    storage = f"sqlite:///{unbroken}/results/hunt/study.db"
    own = optuna.load_study(study_name="hunt", storage=storage).get_trials()
    states = [trial.state for trial in own]
    runs = table(unbroken, "runs")
    assert states.count(TrialState.PRUNED) == (runs.state == "pruned").sum()
    assert states.count(TrialState.COMPLETE) == (runs.state == "complete").sum()
    assert TrialState.RUNNING not in states


def test_best_net_is_confirmed_with_fresh_seeds(unbroken: Path) -> None:
    """The best by validation error runs again, beside the reference, as an ablation."""
    trials = table(unbroken, "search")
    best = trials.sort_values("val_error_pct").iloc[0]
    assert best["rank"] == 1
    variants = table(unbroken, "variants")
    assert set(variants.variant) == {"1x8d", best.variant}
    assert set(variants.n) == {2}
    runs = table(unbroken, "runs")
    confirming = runs[runs.variant.isin(variants.variant) & (runs.seed > 0)]
    assert sorted(confirming.seed) == [1, 1, 2, 2]
    assert variants.test_error_pct_mean.tolist() == pytest.approx(
        confirming.groupby("variant").test_error_pct.mean()[variants.variant].tolist()
    )


def test_search_ends_with_best_nets_verdicts_and_false_prune_rate(
    unbroken: Path,
) -> None:
    """What is printed: the best nets, how pruning did, and the verdict table."""
    said = (unbroken / "said").read_text(encoding="utf-8")
    trials = table(unbroken, "search")
    pruned, audited = (trials.state == "pruned").sum(), trials.is_audited.sum()
    assert audited >= 1
    assert f"5 nets tried: {5 - pruned} trained to the end, {pruned} pruned." in said
    assert f"Of the pruned nets {audited} were trained to the end" in said
    assert "false-prune rate" in said
    assert trials.sort_values("val_error_pct").variant.iloc[0] in said
    assert "reference" in said
    assert "undecided" in said or "better" in said or "worse" in said
    page = (unbroken / "results" / "hunt" / "report.html").read_text(encoding="utf-8")
    assert "Search: the nets tried" in page
    assert "false-prune rate" in page


def test_report_of_a_search_is_recomputed_from_its_own_data(unbroken: Path) -> None:
    """`verify` finds the nets tried in the page, and nothing that differs."""
    done = subprocess.run(
        [*PROGRAM, "verify", "results/hunt/report.html"],
        cwd=unbroken,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "DIFFER" not in done.stdout


def test_status_plan_and_report_know_of_a_search(unbroken: Path) -> None:
    """The other verbs tell of trials as well, also as JSON."""

    def answer(*arguments: str) -> Any:
        done = subprocess.run(
            [*PROGRAM, *arguments, "--json"],
            cwd=unbroken,
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    assert answer("status", "hunt")["num_tried"] == 5
    report = answer("report", "hunt")
    assert report["search"]["num_tried"] == 5
    assert len(report["search"]["best"]) == 1
    plan = answer("plan", "hunt.toml")
    assert plan["num_fitting"] > 1000
    assert plan["num_runs"] == 5 + 2 * 2


def test_killed_search_goes_on_to_the_same_end(unbroken: Path, tmp_path: Path) -> None:
    """SIGKILL of executor and scheduler: nothing lost, nothing twice, all equal."""
    process = subprocess.Popen(
        command(tmp_path), cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    runs = tmp_path / "results" / "hunt" / "runs"
    wait_until(lambda: len(list(runs.glob("*.json"))) >= 1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    os.kill(int(children.split()[0]), signal.SIGKILL)
    wait_until(lambda: len(list(runs.glob("*.json"))) >= 3)
    process.kill()
    process.wait()

    done = run(tmp_path)

    assert done.returncode == 0, done.stderr
    timed = ["step_time_ms"]
    pd.testing.assert_frame_equal(
        table(tmp_path, "search").drop(columns=timed),
        table(unbroken, "search").drop(columns=timed),
    )
    expected, found = plan_of(unbroken), plan_of(tmp_path)
    assert found.trials == expected.trials
    assert found.cells == expected.cells
    errors = ["variant", "seed", "state", "epochs", "val_error_pct", "test_error_pct"]
    pd.testing.assert_frame_equal(
        table(tmp_path, "runs")[errors], table(unbroken, "runs")[errors]
    )
    assert all(trial.state.is_finished() for trial in nets_of(tmp_path))


def test_changed_search_is_refused(unbroken: Path) -> None:
    """Another sampler, space or tolerance would be another search."""
    done = run(unbroken, "search.sampler_seed=1", "net.tolerance_pct=4.0")
    assert done.returncode == 2
    assert "search.sampler_seed: 0 -> 1" in done.stderr
    assert "net.tolerance_pct: 5.0 -> 4.0" in done.stderr


def test_two_aims_with_two_executors(tmp_path: Path) -> None:
    """NSGA-II weighs error against measured step time; the front is confirmed."""
    text = SEARCH.replace("startup_trials = 3", 'also_minimize = "step_time"')
    text = text.replace("reduction_factor = 2\n", "population_size = 2\n")
    text = text.replace('"tpe"', '"nsga2"').replace('"asha"', '"none"')
    text = text.replace("epochs = 3", "epochs = 1").replace(
        "num_trials = 5", "num_trials = 4"
    )
    (tmp_path / "two.toml").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [*PROGRAM, "run", "two.toml", "run.executors=2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    trials = table(tmp_path, "search")
    assert (trials.state == "complete").all()
    nets = nets_of(tmp_path)
    for row in trials.to_dict(orient="records"):
        assert nets[row["trial"]].values == pytest.approx(
            [row["val_error_pct"], row["step_time_ms"]]
        )


def test_importance_is_held_to_its_file(unbroken: Path, tmp_path: Path) -> None:
    """A report embeds the importance, and `verify` finds one that differs."""
    folder = tmp_path / "hunt"
    shutil.copytree(unbroken / "results" / "hunt", folder)
    shares = {"width_1": 0.75, "cardinality_1": 0.25}
    found = Importance(evaluator="fANOVA", seed=0, num_nets=8, shares=shares)
    write_importance(found, folder)
    html = report.write_report(read_tables(folder), folder=folder).html
    assert verify.verify(html).findings == ()
    other = replace(found, shares={"width_1": 0.7, "cardinality_1": 0.3})
    write_importance(other, folder)
    checked = verify.verify(html)
    assert [one.where for one in checked.findings] == [
        "importance of width_1, by the run files",
        "importance of cardinality_1, by the run files",
    ]
