"""What a device can do, and what runs say they made of it."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.roofline import Peaks, training_floor_s
from resnext_ablate.compute import peaks
from resnext_ablate.compute.sources import CACHE_VARIABLE
from resnext_ablate.records import records
from resnext_ablate.records.records import RunRecord

CPU = torch.device("cpu")
MADE_UP = Peaks(macs_per_s=1e11, bytes_per_s=1e10, bytes_per_value=2)


def test_peaks_are_measured_once_on_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second question is answered from the cache, also in another process; each
    precision has its own answer, and a damaged one is measured anew."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    measured: list[str] = []

    def measure(device: torch.device, *, precision: str) -> Peaks:
        measured.append(precision)
        return MADE_UP

    monkeypatch.setattr(peaks, "measure_peaks", measure)
    for precision in ("bf16", "bf16", "fp32", "bf16"):
        assert peaks.known_peaks(CPU, precision=precision) == MADE_UP
    assert measured == ["bf16", "fp32"]
    for path in (tmp_path / "tuning").glob("*.json"):
        kept = json.loads(path.read_text())
        kept["values"]["bytes_per_s"] = 0
        path.write_text(json.dumps(kept))
    peaks.known_peaks(CPU, precision="bf16")
    assert measured == ["bf16", "fp32", "bf16"]


def test_peaks_of_this_machine_are_possible() -> None:
    """A product and a copy take time: more than 1 G multiply-adds and 1 GB a second,
    less than what no core does."""
    found = peaks.measure_peaks(CPU, precision="fp32")
    assert 1e9 < found.macs_per_s < 1e12
    assert 1e9 < found.bytes_per_s < 1e12
    assert found.bytes_per_value == 4


def test_a_device_has_time_to_reach_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is slow at first is repeated for a while, not a few times alone."""
    now, calls = [0.0], [0]

    def call() -> None:
        time.sleep(0.001)
        calls[0] += 1
        now[0] += 5.0 if calls[0] <= 14 else 2.0

    monkeypatch.setattr(peaks, "clock", lambda device, **_: lambda: now[0])
    assert peaks._best_s(call, device=CPU) == 2.0


def test_a_run_at_the_floor_uses_the_whole_device() -> None:
    """Steps as long as the floor are 100 %, twice as long ones 50 %."""
    spec = parse_spec("resnext11-2x4d-t8")
    shape = {"image_size": 16, "batch_size": 32}
    floor_s = training_floor_s(spec, **shape, peaks=MADE_UP)
    for times, expected in ((1, 100), (2, 50)):
        rate = 32 / (times * floor_s)
        used = peaks.roofline_pct(spec, images_per_s=rate, **shape, peaks=MADE_UP)
        assert used == pytest.approx(expected)


def test_runs_of_earlier_releases_do_not_know_it(tmp_path: Path) -> None:
    """A run file without the share still loads."""
    run = RunRecord(
        cell="0" * 16,
        variant="1x8d",
        seed=0,
        state="complete",
        reason="",
        device="cpu",
        precision="fp32",
        data_checksum="",
        started_at="",
        environment={},
        roofline_pct=12.5,
    )
    records.write_run(run, tmp_path)
    path = records.run_path(tmp_path, run.cell)
    values = json.loads(path.read_text())
    assert values.pop("roofline_pct") == 12.5
    path.write_text(json.dumps(values))
    older = records.read_run(tmp_path, run.cell)
    assert older == dataclasses.replace(run, roofline_pct=None)
