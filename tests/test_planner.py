"""Forecasts of what a study takes and can show."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.numbers.families import Look, compare_pairs
from resnext_ablate.records import records
from resnext_ablate.records.config import StudyConfig, load_study
from resnext_ablate.records.records import Cell
from resnext_ablate.study import calibration, planner
from resnext_ablate.study.planner import Calibration, RunCost, Spread, Workload
from resnext_ablate.study.study import run_study
from resnext_ablate.study.study_plan import prepare

PROGRAM = [sys.executable, "-c", "from resnext_ablate.face.cli import main; main()"]
STUDY = """
name = "tiny"
net = {template = "resnet11-t8", cardinality = [1, 2], tolerance_pct = 20.0}
train = {epochs = 2, batch_size = 64}
run = {seeds = 3, executors = 2, device = "cpu"}
[data]
name = "digits"
"""


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    path = tmp_path / "tiny.toml"
    path.write_text(STUDY)
    return load_study(path)


def test_a_run_is_the_sum_of_its_parts() -> None:
    """Fixed part, steps, validation each epoch and one test."""
    cost = RunCost("a", 2.0, 0.5, 0.01, 100.0)
    work = Workload(epochs=3, steps_per_epoch=10, num_val=20, num_test=30)
    assert planner.run_s(cost, work) == pytest.approx(2 + 3 * (5 + 0.2) + 0.3)


@pytest.mark.parametrize(
    ("durations", "num_executors", "expected"),
    [
        ([3.0, 1.0, 1.0, 1.0], 2, 3.0),
        ([1.0, 1.0, 1.0, 3.0], 2, 4.0),  # The long one begins second to last.
        ([2.0] * 5, 1, 10.0),
        ([], 2, 0.0),
    ],
)
def test_makespan(durations: list[float], num_executors: int, expected: float) -> None:
    """The first free executor takes the next run; the last to end counts."""
    found = planner.makespan_s(durations, num_executors=num_executors)
    assert found == pytest.approx(expected)


def test_forecast_counts_what_is_left(config: StudyConfig) -> None:
    """Time is that of the cells still to run; memory that of all executors."""
    timed = Calibration(
        (RunCost("a", 0.0, 0.5, 0.0, 100.0), RunCost("b", 0.0, 1.0, 0.0, 120.0)),
        startup_s=4.0,
        took_s=20.0,
    )
    work = Workload(epochs=2, steps_per_epoch=10, num_val=10, num_test=10_000)
    cells = [Cell(f"{v}{s}", v, s) for s in range(3) for v in "ab"]

    def of(cells: list[Cell], calibrated: Calibration | None) -> planner.Forecast:
        return planner.forecast(
            config,
            cells=cells,
            num_variants=2,
            work=work,
            spread=Spread(0.2, "as given"),
            calibration=calibrated,
            num_executors=2,
        )

    whole = of(cells, timed)
    assert whole.time_s == pytest.approx(4 + 50 + 2)
    assert whole.memory_mib == 240
    half = of(cells[:2], timed)
    assert half.time_s == pytest.approx(4 + 20 + 2)
    assert half.disk_mib < whole.disk_mib
    untimed = of(cells, None)
    assert (untimed.time_s, untimed.memory_mib) == (None, None)


def test_detectable_difference_is_what_the_verdict_shows(config: StudyConfig) -> None:
    """Studies whose one difference is that forecast claim it in about 80 %."""
    shift = planner.detectable(config, num_variants=2, sd=0.3)
    assert shift is not None
    rng = np.random.default_rng(4)
    shown = 0
    for _ in range(500):
        runs = rng.normal(5, 0.3, (2, 3))
        runs[1] -= shift
        (test,) = compare_pairs(
            [dict(enumerate(row.tolist())) for row in runs],
            pairs=[(1, 0)],
            margin=0.5,
            family="reference",
            pairing="auto",
            look=Look(),
        )
        shown += test.p_corrected < 0.05
    assert shown / 500 == pytest.approx(0.8, abs=0.05)
    single = config.model_copy(
        update={"run": config.run.model_copy(update={"seeds": 1})}
    )
    assert planner.detectable(single, num_variants=2, sd=0.3) is None


def test_spread_is_given_measured_or_assumed(tmp_path: Path) -> None:
    """Points, a study's name, the study's own runs, or an assumption that says so."""
    results = Path(__file__).parents[1] / "results"

    def of(text: str | None) -> Spread:
        return planner.chosen_spread(text, study="new", results=results)

    assert of("0.3") == Spread(0.3, "as given")
    assert of(None).sd == planner.ASSUMED_SD
    assert "assumed" in of(None).source
    for text in ("cifar10_jpeg", "nothing", "-1", "0"):  # The first has one seed.
        with pytest.raises(InputError, match="--spread"):
            of(text)


@pytest.mark.slow
def test_calibration_foretells_a_study(config: StudyConfig, tmp_path: Path) -> None:
    """Every variant is timed, and the forecast is of the right size.

    How near forecasts came stands in the README.
    """
    prepared = prepare(config)
    start = time.monotonic()
    timed = calibration.calibrate(
        prepared.config,
        nets=prepared.plan.nets,
        prepared=prepared.data,
        devices=prepared.devices,
        prepared_s=100.0,
    )
    assert time.monotonic() - start < calibration.BUDGET_S + 5
    assert 100 < timed.startup_s < 100 + calibration.BUDGET_S
    timed = replace(timed, startup_s=timed.startup_s - 100)
    assert [cost.variant for cost in timed.costs] == [
        net.variant for net in prepared.plan.nets
    ]
    forecast = planner.forecast(
        prepared.config,
        cells=prepared.plan.cells,
        num_variants=2,
        work=calibration.workload(prepared.config, prepared.data.info),
        spread=planner.chosen_spread(None, study="tiny", results=tmp_path),
        calibration=timed,
        num_executors=2,
    )
    start = time.monotonic()
    outcome = run_study(config, results=tmp_path)
    took_s = time.monotonic() - start
    assert outcome.num_complete == 6
    assert forecast.time_s is not None and forecast.memory_mib is not None
    assert took_s / 4 < forecast.time_s < 4 * took_s  # The machine may be busy.
    runs = records.read_runs(outcome.folder, prepared.plan)
    peak = max(run.peak_memory_mib or 0 for run in runs)
    assert forecast.memory_mib == pytest.approx(2 * peak, rel=0.3)
    again = planner.chosen_spread(None, study="tiny", results=tmp_path)
    assert again.source == "measured in tiny, 6 runs"


@pytest.mark.slow
def test_plan_without_calibration_says_so(tmp_path: Path) -> None:
    """`plan` gives the detectable difference at once, and names the way to a time."""
    path = tmp_path / "tiny.toml"
    path.write_text(STUDY)
    command = [*PROGRAM, "plan", str(path), "--spread", "0.4", "--results", "r"]

    def said(*more: str) -> str:
        done = subprocess.run(
            [*command, *more], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout

    text = said()
    assert "spread between seeds 0.40 points, as given" in text
    assert "--calibrate takes a minute" in text
    forecast = json.loads(said("--json"))["forecast"]
    assert forecast["spread"] == {"sd": 0.4, "source": "as given"}
    assert forecast["time_s"] is None
    assert f"a difference of {forecast['detectable']:.2f} points" in text


def test_calibration_that_cannot_fit_says_so(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget that does not suffice ends in one message, with no process left."""
    monkeypatch.setattr(calibration, "BUDGET_S", 0.05)
    prepared = prepare(config)
    with pytest.raises(calibration.ExecutorError, match="do not suffice"):
        calibration.calibrate(
            prepared.config,
            nets=prepared.plan.nets,
            prepared=prepared.data,
            devices=prepared.devices,
        )


def test_cost_of_a_calibration_run() -> None:
    """The second epoch is timed; what is left of the run is its fixed part."""
    work = Workload(epochs=2, steps_per_epoch=4, num_val=10, num_test=20)
    one = calibration._Timed("a", begun=0.0, work=work)
    one = replace(one, epoch_ends=[10.0, 15.0], epoch_seconds=[8.0, 4.0], ended=18.0)
    cost = one.cost()
    assert cost.step_s == pytest.approx(1.0)
    assert cost.eval_image_s == pytest.approx(0.1)
    assert cost.fixed_s == pytest.approx(18 - 2 * 5 - 2)
