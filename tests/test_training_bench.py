"""Loops side by side: the same task for each, and figures that follow from it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_cli import program

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.roofline import Peaks
from resnext_ablate.compute import data, preparation
from resnext_ablate.compute.hardware import usable_cores
from resnext_ablate.compute.reference_loops import train_plainly
from resnext_ablate.evidence.loops_page import loops_data, loops_figure
from resnext_ablate.records.config import DataConfig, TrainConfig
from resnext_ablate.records.training_costs import (
    LOOPS,
    LoopCost,
    TrainedRun,
    TrainingCosts,
    loop_costs,
)
from resnext_ablate.study.training_bench import _subset

DIGITS = DataConfig(name="digits", image_size=8, crop_padding=1, flip=False)
STUDY = """
name = "raced"
[net]
template = "resnet11-t8"
cardinality = [2]
[data]
name = "digits"
image_size = 8
crop_padding = 1
flip = false
[train]
epochs = 1
batch_size = 64
schedule = "one_cycle"
precision = "fp32"
"""


def run(loop: str, *, rate: float, total_s: float, error: float) -> TrainedRun:
    return TrainedRun(
        loop=loop,
        seed=0,
        num_images=1000,
        train_s=1000 / rate,
        total_s=total_s,
        test_error_pct=error,
    )


def costs_of(*, ours: float) -> tuple[LoopCost, ...]:
    """Three turns; the machine is half as fast in the last."""
    speeds = (1.0, 1.0, 0.5)
    rates = {"tutorial": 100, "tutorial_per_core": 80, "recipe": 150, "ours": ours}
    counts = {"tutorial": 1, "tutorial_per_core": 2, "recipe": 1, "ours": 2}
    turns = {
        loop: [
            [
                run(loop, rate=rates[loop] * speed, total_s=20 / speed, error=5.0 + n)
                for n in range(counts[loop])
            ]
            for speed in speeds
        ]
        for loop in LOOPS
    }
    return loop_costs(turns, floor_s_per_image=1e-3)


def test_a_turn_on_all_cores_counts_all_its_runs() -> None:
    """Rates add up over what runs at once, and ratios are of the same turn."""
    tutorial, per_core, recipe, ours = costs_of(ours=300)
    assert tutorial.images_per_s.median == 100
    assert per_core.images_per_s.median == 160
    assert ours.images_per_s.median == 600
    # The slow turn slows both: it moves the rate and not the ratio.
    assert ours.images_per_s.low == 300
    assert ours.ratio.low == ours.ratio.high == pytest.approx(6)
    assert recipe.ratio.median == pytest.approx(1.5)
    assert ours.runs_per_hour.median == pytest.approx(2 * 3600 / 20)
    assert ours.runs_ratio.median == pytest.approx(2)
    assert ours.roofline_pct == pytest.approx(60)
    assert ours.test_errors_pct == (5.0, 6.0) * 3


def test_chart_says_what_the_ratio_is() -> None:
    """The finding is the measured ratio, and every bar carries its own."""
    costs = TrainingCosts(
        net="resnet11-t16",
        data="digits",
        num_train=1000,
        num_test=300,
        image_size=16,
        batch_size=64,
        epochs=2,
        precision="bf16",
        device="cpu: made up",
        num_cores=2,
        peaks=Peaks(macs_per_s=1e9, bytes_per_s=1e9, bytes_per_value=2),
        measured_at="2026-01-02T03:04:05+00:00",
        torch_version="2.11",
        loops=costs_of(ours=300),
    )
    shown = loops_data(costs)
    assert shown.title.startswith("A study trains 6.0 times as many images a second")
    (bars,) = loops_figure(shown).data
    assert list(bars.text) == ["1.0 x", "1.6 x", "1.5 x", "6.0 x"]
    assert list(bars.error_x.arrayminus) == pytest.approx([50, 80, 75, 300])


def test_reference_loops_learn() -> None:
    """The baseline is no straw man: it learns digits in either precision."""
    dataset = data.load(preparation.prepare(DIGITS).folder, device=torch.device("cpu"))
    for mixed in (False, True):
        times = train_plainly(
            parse_spec("resnet11-t8-in1"),
            config=TrainConfig(epochs=2, batch_size=32, schedule="one_cycle"),
            data_config=DIGITS,
            dataset=dataset,
            seed=0,
            device=torch.device("cpu"),
            mixed_precision=mixed,
            num_workers=0,
        )
        assert times.test_error_pct < 35
        assert times.num_images == 2 * 32 * (len(dataset.train.labels) // 32)
        assert 0 < times.train_s < times.total_s


def test_every_loop_has_the_same_images() -> None:
    """The subset depends on its size alone."""
    dataset = data.load(preparation.prepare(DIGITS).folder, device=torch.device("cpu"))
    one, other = _subset(dataset, 300), _subset(replace(dataset), 300)
    assert torch.equal(one.train.images, other.train.images)
    assert (len(one.train.labels), len(one.val.labels)) == (300, 30)
    assert len(set(one.train.labels.tolist())) == 10


@pytest.mark.slow
def test_bench_training_command(tmp_path: Path) -> None:
    """One turn of each loop for real; the files say what the table says."""
    (tmp_path / "s.toml").write_text(STUDY)
    arguments = ("bench-training", "s.toml", "--images", "256", "--turns", "1")
    done = program(*arguments, "--variant", "2x5d", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert [loop["loop"] for loop in value["loops"]] == list(LOOPS)
    assert len(value["loops"][-1]["test_errors_pct"]) == usable_cores()
    folder = tmp_path / "results" / "benchmarks"
    assert json.loads((folder / "raced-2x5d.json").read_text()) == value
    assert "Training loops side by side" in (folder / "raced-2x5d.html").read_text()


def test_unknown_variant_is_refused(tmp_path: Path) -> None:
    """A net that the study lacks is named beside those that it has."""
    (tmp_path / "s.toml").write_text(STUDY)
    done = program("bench-training", "s.toml", "--variant", "9x9d", cwd=tmp_path)
    assert done.returncode == 2
    assert "study raced has 1x8d, 2x5d; got 9x9d" in done.stderr
