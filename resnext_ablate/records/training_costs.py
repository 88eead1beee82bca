"""Whole training loops side by side: what was measured of each, and its file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from resnext_ablate.architecture.roofline import Peaks
from resnext_ablate.records.certificate import Spread, spread_of
from resnext_ablate.records.records import write_atomically

Loop = Literal["tutorial", "tutorial_per_core", "recipe", "ours"]
LOOPS: tuple[Loop, ...] = ("tutorial", "tutorial_per_core", "recipe", "ours")

TITLES: dict[Loop, str] = {
    "tutorial": "tutorial loop",
    "tutorial_per_core": "tutorial loop, one process per core",
    "recipe": "torchvision's recipe shape",
    "ours": "resnext-ablate",
}
"""Plain PyTorch (DataLoader, PIL, fp32, `loss.item()` each step) on the whole machine;
the same once per core; mixed precision and DataLoader workers; what a study runs."""


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """One run by one loop, from its first step to its test score."""

    loop: Loop
    seed: int
    num_images: int
    """Images that training steps saw, all epochs together."""
    train_s: float
    """Of the training steps and their data."""
    total_s: float
    """Evaluation included, start of the process left out."""
    test_error_pct: float


@dataclass(frozen=True, kw_only=True)
class LoopCost:
    """What a loop makes of the machine, over its turns. A turn is one run, or one on
    each core at once."""

    loop: Loop
    title: str
    images_per_s: Spread
    ratio: Spread
    """Of images per second to the tutorial loop's, turn by turn."""
    runs_per_hour: Spread
    runs_ratio: Spread
    roofline_pct: float
    """Of what the layers' multiply-adds and traffic allow on this machine."""
    test_errors_pct: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TrainingCosts:
    """Loops that trained one net on the same images, in turns."""

    net: str
    data: str
    num_train: int
    num_test: int
    image_size: int
    batch_size: int
    epochs: int
    precision: str
    """Of our loop; the recipe's is mixed, the tutorial's fp32."""
    device: str
    num_cores: int
    peaks: Peaks
    """Of the whole machine."""
    measured_at: str
    torch_version: str
    loops: tuple[LoopCost, ...]


def loop_costs(
    turns: dict[Loop, list[list[TrainedRun]]], *, floor_s_per_image: float
) -> tuple[LoopCost, ...]:
    """The costs of loops from their turns, the tutorial loop first.

    Args:
        turns: of each loop the runs of every turn; turn by turn the loops took turns.
        floor_s_per_image: by the roofline.
    """
    rates = {
        loop: [_images_per_s(runs) for runs in done] for loop, done in turns.items()
    }
    hourly = {
        loop: [_runs_per_hour(runs) for runs in done] for loop, done in turns.items()
    }
    return tuple(
        LoopCost(
            loop=loop,
            title=TITLES[loop],
            images_per_s=spread_of(rates[loop]),
            ratio=_ratio(rates[loop], rates["tutorial"]),
            runs_per_hour=spread_of(hourly[loop]),
            runs_ratio=_ratio(hourly[loop], hourly["tutorial"]),
            roofline_pct=100 * spread_of(rates[loop]).median * floor_s_per_image,
            test_errors_pct=tuple(run.test_error_pct for runs in done for run in runs),
        )
        for loop, done in turns.items()
    )


def write_training_costs(costs: TrainingCosts, path: Path) -> None:
    """Writes them as JSON."""
    write_atomically(path, json.dumps(dataclasses.asdict(costs), indent=1))


def _images_per_s(runs: list[TrainedRun]) -> float:
    return sum(run.num_images / run.train_s for run in runs)


def _runs_per_hour(runs: list[TrainedRun]) -> float:
    return sum(3600 / run.total_s for run in runs)


def _ratio(values: list[float], baseline: list[float]) -> Spread:
    return spread_of([a / b for a, b in zip(values, baseline, strict=True)])
