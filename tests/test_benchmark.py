"""Measuring for real: small nets on the CPU, and studies whose nets are measured."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from test_cli import answer, program

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.roofline import training_floor_s
from resnext_ablate.architecture.spec import InputError, MeasuringError
from resnext_ablate.compute import benchmark, graphs
from resnext_ablate.compute.benchmark import Setup
from resnext_ablate.compute.model import build
from resnext_ablate.compute.peaks import known_peaks
from resnext_ablate.records.certificate import read_costs
from resnext_ablate.records.config import TrainConfig

SETUP = Setup(
    train=TrainConfig(epochs=1, batch_size=16, precision="fp32"),
    image_size=16,
    device="cpu",
    seconds_per_net=0.2,
    min_repeats=5,
)
STUDY = """
name = "timed"
[net]
template = "resnet11-t8"
cardinality = [1, 2]
hold = "{hold}"
tolerance_pct = 40
measure = {measure}
[data]
name = "digits"
image_size = 8
crop_padding = 1
flip = false
[train]
epochs = 1
precision = "fp32"
[run]
seeds = 1
executors = 1
device = "cpu"
"""


def test_wider_costs_more() -> None:
    """Four times the width takes more time and memory, and the floor is below both."""
    nets = [parse_spec("resnet11-t16"), parse_spec("resnet11-t64")]
    costs = benchmark.measure(nets, setup=SETUP)
    narrow, wide = costs.nets
    assert narrow.step_time_error_pct.median == 0
    assert wide.step_time_error_pct.low > 50
    assert wide.peak_memory_error_pct > 100
    for cost in costs.nets:
        assert 0 < cost.step_floor_s < cost.step_s.low
        assert cost.forward_s.median < cost.step_s.median
        assert cost.step_s.num_repeats >= 5
    assert (costs.num_threads, costs.precision, costs.batch_size) == (1, "fp32", 16)


def test_peak_memory_is_of_tensors_and_repeats_exactly() -> None:
    """The same step gives the same bytes, and about as many as weights, gradients,
    momentum and what torch's backward keeps need: ours overwrites some of that."""
    spec = parse_spec("resnet11-t16")
    first, second = (benchmark.measure_here([spec], setup=SETUP) for _ in range(2))
    measured = first.nets[0].peak_memory_mib
    assert second.nets[0].peak_memory_mib == measured

    net = build(spec)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = net(torch.zeros(16, 3, 16, 16))
    weights = 4 * sum(weight.numel() for weight in net.parameters())
    torchs = (3 * weights + sum(kept.values()) - weights) / 2**20
    assert outputs.shape == (16, 10)
    assert 0.9 * torchs < measured < 1.2 * torchs


def test_what_is_timed_is_what_a_study_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step goes through the function that trains runs, with the study's recipe,
    and each forward pass through the one that evaluates them, with folded norms."""
    recipe = {"precision": "fp32", "label_smoothing": 0.1, "kernels": "fused"}
    train = TrainConfig.model_validate({"epochs": 1, "batch_size": 8, **recipe})
    setup = Setup(
        train=train, image_size=8, device="cpu", seconds_per_net=0, min_repeats=2
    )
    losses, folds = [], []
    update, evaluator = benchmark.update, benchmark.evaluator

    def spied(learner: Any, batch: Any, **rest: Any) -> torch.Tensor:
        logits = learner.model(batch.images)
        expected = F.cross_entropy(logits, batch.labels[:, 0], label_smoothing=0.1)
        loss = update(learner, batch, **rest)
        losses.append(loss.item() - expected.item())
        return loss

    def unfolding(learner: Any) -> Any:
        folds.append(learner.model.bn1.is_fused)
        return evaluator(learner)

    monkeypatch.setattr(graphs, "update", spied)
    monkeypatch.setattr(benchmark, "update", spied)
    monkeypatch.setattr(benchmark, "evaluator", unfolding)
    benchmark.measure_here([parse_spec("resnet11-t8")], setup=setup)
    assert len(losses) == 5 + 2 + 1 and max(map(abs, losses)) < 1e-5
    assert folds == [True] * 7


def test_images_too_small_are_refused_before_a_process_starts() -> None:
    """An impossible net is the caller's mistake."""
    with pytest.raises(InputError, match="image_size must be at least 32"):
        benchmark.measure([parse_spec("resnet50")], setup=SETUP)


def test_a_process_that_fails_says_why() -> None:
    """Its last words come through."""
    absent = Setup(
        train=SETUP.train, image_size=16, device="cuda:63", seconds_per_net=0.1
    )
    with pytest.raises(MeasuringError, match=r"nets could not be measured: .+"):
        benchmark.measure([parse_spec("resnet11-t16")], setup=absent)


def test_bench_command_measures_beside_the_first() -> None:
    """The table's numbers are those of the JSON."""
    arguments = ("resnet11-t8", "resnext11-4x3d-t8", "--image-size", "16")
    costs = answer("bench", *arguments, "--seconds", "0.2", "--batch-size", "8")
    assert isinstance(costs, dict)
    assert [net["name"] for net in costs["nets"]] == list(arguments[:2])
    assert costs["nets"][0]["step_time_error_pct"]["median"] == 0
    assert costs["batch_size"] == 8


def test_study_with_measured_nets(tmp_path: Path) -> None:
    """Costs are measured before the runs, kept, and shown in variants and report;
    a second launch measures nothing again."""
    (tmp_path / "s.toml").write_text(STUDY.format(hold="macs", measure="true"))
    done = program("run", "s.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "results" / "timed"
    costs = read_costs(folder)
    assert costs is not None
    assert [cost.name for cost in costs.nets] == [
        "resnet11-t8-in1",
        "resnext11-2x5d-t8-in1",
    ]
    variants = pd.read_csv(folder / "variants.csv")
    median = 1000 * costs.nets[1].step_s.median
    assert variants.loc[1, "step_time_ms"] == pytest.approx(median)
    assert "What they cost on the device" in (folder / "report.html").read_text()
    runs = pd.read_csv(folder / "runs.csv")
    peaks = known_peaks(torch.device("cpu"), precision="fp32")
    for run, name in zip(runs.itertuples(), variants["name"], strict=True):
        floor_s = training_floor_s(
            parse_spec(name), image_size=8, batch_size=128, peaks=peaks
        )
        share = 100 * run.images_per_s * floor_s / 128
        assert run.roofline_pct == pytest.approx(share) and 0 < share < 100
    assert variants["roofline_pct_mean"].tolist() == runs["roofline_pct"].tolist()
    again = program("run", "s.toml", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert read_costs(folder) == costs


def _timed_plan(folder: Path) -> dict[str, Any]:
    """The plan of a study at equal step time, run in a folder."""
    (folder / "s.toml").write_text(STUDY.format(hold="step_time", measure="false"))
    done = program("run", "s.toml", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)["verdict"]
    assert "At equal measured step time (medians within" in verdict
    plan = (folder / "results" / "timed" / "plan.json").read_text()
    return dict(json.loads(plan))


@pytest.mark.slow
def test_study_at_equal_step_time_keeps_its_nets(tmp_path: Path) -> None:
    """Widths solved by measuring are settled once: noise cannot change them later."""
    plan = _timed_plan(tmp_path)
    costs = read_costs(tmp_path / "results" / "timed")
    assert costs is not None and len(costs.nets) == len(plan["nets"]) == 2
    assert _timed_plan(tmp_path)["nets"] == plan["nets"]
    assert read_costs(tmp_path / "results" / "timed") == costs


@pytest.mark.full
def test_study_at_equal_step_time_grows_by_a_net(tmp_path: Path) -> None:
    """Those that it has stay what they are beside a new one, which is measured."""
    plan = _timed_plan(tmp_path)
    folder = tmp_path / "results" / "timed"
    more = program("run", "s.toml", "net.cardinality=[1, 2, 4]", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    grown = json.loads((folder / "plan.json").read_text())
    assert grown["nets"][:2] == plan["nets"]
    assert len(grown["nets"]) == 3
    costs = read_costs(folder)
    assert costs is not None and len(costs.nets) == 3
