"""Measured costs on disk, and the interval of a median."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from resnext_ablate.architecture.roofline import Peaks
from resnext_ablate.architecture.spec import InputError
from resnext_ablate.records.certificate import (
    BENCHMARK_FILE,
    DeviceCosts,
    NetCost,
    Spread,
    read_costs,
    spread_of,
    write_costs,
)

EXACT = Spread(median=0.0, low=0.0, high=0.0, num_repeats=9)
SECOND = Spread(median=1.0, low=0.9, high=1.2, num_repeats=9)
COST = NetCost(
    name="resnet11-t16",
    step_s=SECOND,
    forward_s=SECOND,
    step_floor_s=0.25,
    peak_memory_mib=12.5,
    step_time_error_pct=EXACT,
    peak_memory_error_pct=0.0,
)
COSTS = DeviceCosts(
    device="cpu: made up",
    num_threads=1,
    precision="fp32",
    channels_last=True,
    deterministic=True,
    batch_size=8,
    image_size=16,
    peaks=Peaks(macs_per_s=1e9, bytes_per_s=1e9, bytes_per_value=4),
    measured_at="2026-01-02T03:04:05+00:00",
    torch_version="2.11",
    nets=(COST, dataclasses.replace(COST, name="resnext11-4x6d-t16")),
)


def test_costs_survive_the_disk(tmp_path: Path) -> None:
    """What is written is read back, to the last bit."""
    assert read_costs(tmp_path) is None
    write_costs(COSTS, tmp_path)
    assert read_costs(tmp_path) == COSTS


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"schema_version": 1', '"schema_version": 7'),
        lambda text: text.replace('"step_floor_s"', '"step_flour_s"'),
        lambda text: json.dumps([text]),
    ],
)
def test_damaged_costs_are_an_input_error(tmp_path: Path, damage) -> None:
    """A damaged file is named, and how to mend it."""
    write_costs(COSTS, tmp_path)
    path = tmp_path / BENCHMARK_FILE
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match=r"benchmark.json: damaged: .* resnext-ablate"):
        read_costs(tmp_path)


def test_spread_of_known_values() -> None:
    """The 2nd and 8th of 9 values bound the median with 96.1 % (binomial tables)."""
    found = spread_of([5, 1, 9, 3, 7, 2, 8, 4, 6])
    assert found == Spread(median=5, low=2, high=8, num_repeats=9)
    assert spread_of([3.0, 1.0]) == Spread(median=2, low=1, high=3, num_repeats=2)


@pytest.mark.parametrize("count", [9, 20, 51])
def test_spread_covers_the_median(count: int) -> None:
    """Of skewed values the interval holds the true median 95 % of the time or more."""
    draws = np.random.default_rng(count).exponential(size=(4000, count))
    spreads = [spread_of(row.tolist()) for row in draws]
    covered = np.mean([one.low <= np.log(2) <= one.high for one in spreads])
    assert 0.945 <= covered <= 0.985
