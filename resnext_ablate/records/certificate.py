"""The measured part of a match certificate: what nets cost on a device, in a file.

Macs, params and activations follow from a net's shapes; step time and peak memory are
of a device and are measured. `benchmark.json` in a study's folder holds them, and the
tables read them from there.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from resnext_ablate.architecture.roofline import Peaks
from resnext_ablate.architecture.spec import InputError
from resnext_ablate.records.records import write_atomically

BENCHMARK_FILE = "benchmark.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The median of repeated measurements, and its 95 % interval."""

    median: float
    low: float
    high: float
    num_repeats: int


@dataclass(frozen=True, kw_only=True)
class NetCost:
    """What one net costs on a device. Errors are signed: positive costs more."""

    name: str
    step_s: Spread
    """Of a training step: forward, backward and update of one batch."""
    forward_s: Spread
    """Of a forward pass in eval mode."""
    step_floor_s: float
    """Least time of a training step by `roofline.training_floor_s`."""
    peak_memory_mib: float
    """Of all tensors within a training step, weights and optimizer included."""
    step_time_error_pct: Spread
    """Against the reference, repeat by repeat."""
    peak_memory_error_pct: float


@dataclass(frozen=True, kw_only=True)
class DeviceCosts:
    """What nets cost on one device, the reference first."""

    device: str
    num_threads: int
    precision: str
    channels_last: bool
    deterministic: bool
    batch_size: int
    image_size: int
    peaks: Peaks
    measured_at: str
    """UTC, ISO 8601."""
    torch_version: str
    nets: tuple[NetCost, ...]


def spread_of(values: Sequence[float]) -> Spread:
    """The median and its 95 % interval by order statistics, whatever the distribution.

    Of fewer than six values, which have no such interval, the whole range.
    """
    ordered = sorted(values)
    count = len(ordered)
    # Skip as many values on either side as the median exceeds with chance 2.5 %.
    skipped, tail = 0, 0.5**count
    while tail + math.comb(count, skipped + 1) * 0.5**count <= 0.025:
        skipped += 1
        tail += math.comb(count, skipped) * 0.5**count
    return Spread(
        median=median(ordered),
        low=ordered[skipped],
        high=ordered[count - 1 - skipped],
        num_repeats=count,
    )


def write_costs(costs: DeviceCosts, folder: Path) -> None:
    """Keeps the costs of a study's nets in its folder."""
    values = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(costs)}
    write_atomically(folder / BENCHMARK_FILE, json.dumps(values, indent=1))


def read_costs(folder: Path) -> DeviceCosts | None:
    """The costs that a study's folder holds; None where nothing was measured.

    Raises:
        InputError: the file is damaged or of another version of the package.
    """
    path = folder / BENCHMARK_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema version {version}, not {SCHEMA_VERSION}")
        return costs_from(values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: damaged: {error}; remove it, and resnext-ablate bench STUDY.toml "
            "measures the nets again."
        ) from None


def costs_from(values: dict[str, Any]) -> DeviceCosts:
    """The costs that `dataclasses.asdict` took apart."""
    nets = tuple(_net_from(net) for net in values["nets"])
    return DeviceCosts(**{**values, "peaks": Peaks(**values["peaks"]), "nets": nets})


def _net_from(values: dict[str, Any]) -> NetCost:
    spreads = ("step_s", "forward_s", "step_time_error_pct")
    return NetCost(**{**values, **{name: Spread(**values[name]) for name in spreads}})
