"""What a study will take and what it can show, before anything runs."""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.numbers import looks, power
from resnext_ablate.numbers.stats import pooled_sd
from resnext_ablate.numbers.verdicts import Rules
from resnext_ablate.records import records
from resnext_ablate.records.config import StudyConfig
from resnext_ablate.records.records import Cell

ASSUMED_SD = 0.2
"""Points between seeds where nothing is measured: of short runs on small images."""
_REPORT_MIB = 2.5
_REPORT_S = 2.0
"""Of a study of some dozen runs, and its tables."""
_EPOCH_BYTES = 300
_RUN_BYTES = 3000


@dataclass(frozen=True)
class RunCost:
    """What one run of a variant takes, beside as many others as run at once."""

    variant: str
    fixed_s: float
    """Once: the net is built, the first batch warms up, the run file is written."""
    step_s: float
    eval_image_s: float
    peak_memory_mib: float


@dataclass(frozen=True)
class Calibration:
    """Short runs of every variant, all executors at work."""

    costs: tuple[RunCost, ...]
    startup_s: float
    """From the command until the executors take jobs."""
    took_s: float


@dataclass(frozen=True)
class Workload:
    """What one run does."""

    epochs: int
    steps_per_epoch: int
    num_val: int
    num_test: int


@dataclass(frozen=True)
class Spread:
    """Standard deviation between the seeds of a variant, and where it is from."""

    sd: float
    source: str


@dataclass(frozen=True)
class AdaptiveRuns:
    """How many runs a study of adaptive seeds takes."""

    if_equal: float
    """Expected where all variants are equal."""
    if_different: float
    """Expected where every variant differs from the reference by `difference`."""
    difference: float
    """Points: twice what counts as no difference."""
    at_most: int


@dataclass(frozen=True)
class Forecast:
    """What a study takes; times and memory are None where nothing was timed."""

    spread: Spread
    detectable: float | None
    """Points that the study shows with 80 % power; None for one seed or variant."""
    time_s: float | None
    memory_mib: float | None
    """Of all executors together on a CPU, of one run on a GPU."""
    disk_mib: float
    calibration_s: float | None
    """How long the timing took."""
    adaptive: AdaptiveRuns | None
    """None for fixed seeds; else times are those of the runs at most."""


def run_s(cost: RunCost, work: Workload) -> float:
    """Seconds of one run."""
    epoch_s = work.steps_per_epoch * cost.step_s + work.num_val * cost.eval_image_s
    return cost.fixed_s + work.epochs * epoch_s + work.num_test * cost.eval_image_s


def makespan_s(durations: Sequence[float], *, num_executors: int) -> float:
    """Seconds until the last run ends; each goes to the first free executor."""
    free = [0.0] * num_executors
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def forecast(
    config: StudyConfig,
    *,
    cells: Sequence[Cell],
    num_variants: int,
    work: Workload,
    spread: Spread,
    calibration: Calibration | None,
    num_executors: int,
) -> Forecast:
    """What the cells of a study take and show.

    Args:
        config: resolved.
        cells: those still to run, in their order; of adaptive seeds all there can be.
        num_variants: the reference among them.
        work: of one run.
        spread: between seeds.
        calibration: None: no times, no memory.
        num_executors: that run at once.
    """
    time_s = memory_mib = None
    if calibration:
        costs = {cost.variant: cost for cost in calibration.costs}
        durations = [run_s(costs[cell.variant], work) for cell in cells]
        training_s = makespan_s(durations, num_executors=num_executors)
        time_s = calibration.startup_s + training_s + _REPORT_S
        peaks = [cost.peak_memory_mib for cost in calibration.costs]
        at_once = num_executors if config.run.device == "cpu" else 1
        memory_mib = at_once * max(peaks)
    run_bytes = _RUN_BYTES + work.num_test / 6 + work.epochs * _EPOCH_BYTES
    return Forecast(
        spread=spread,
        detectable=detectable(config, num_variants=num_variants, sd=spread.sd),
        time_s=time_s,
        memory_mib=memory_mib,
        # Twice: run files, and tables derived from them.
        disk_mib=_REPORT_MIB + 2 * len(cells) * run_bytes / 2**20,
        calibration_s=calibration.took_s if calibration else None,
        adaptive=adaptive_runs(config, num_variants=num_variants, sd=spread.sd),
    )


def adaptive_runs(
    config: StudyConfig, *, num_variants: int, sd: float
) -> AdaptiveRuns | None:
    """How many runs adaptive seeds take; None for fixed ones."""
    max_seeds = config.run.max_seeds
    if max_seeds is None:
        return None
    rules = _rules(config)

    def expected(difference: float) -> float:
        return looks.expected_runs(
            num_variants=num_variants,
            difference=difference,
            sd=sd,
            rules=rules,
            max_seeds=max_seeds,
        )

    return AdaptiveRuns(
        if_equal=expected(0.0),
        if_different=expected(2 * rules.margin),
        difference=2 * rules.margin,
        at_most=num_variants * max_seeds,
    )


def _rules(config: StudyConfig) -> Rules:
    how = config.report
    return Rules(how.equivalence_margin_pct, how.family, how.pairing)


def detectable(config: StudyConfig, *, num_variants: int, sd: float) -> float | None:
    """Points that a study shows with 80 % power; None for one seed or variant."""
    num_seeds = len(config.run.seed_list())
    if num_seeds < 2 or num_variants < 2:
        return None
    family, level = config.report.family, power.LEVEL
    if config.run.max_seeds is not None:
        comparisons = power.num_comparisons(num_variants, family=family)
        planned = looks.planned(
            max_seeds=num_seeds, num_comparisons=comparisons, family=family
        )
        level = planned[-1].level / power.PRICE_OF_CHOICE
    return sd * power.planned_detectable_in_sd(
        num_seeds,
        num_variants=num_variants,
        family=family,
        paired=config.report.pairing == "paired",
        level=level,
    )


def measured_spread(folder: Path) -> Spread | None:
    """The spread between seeds in the runs of a study; None where there are too few."""
    if not (folder / records.PLAN_FILE).exists():
        return None
    errors: dict[str, list[float]] = {}
    for run in records.read_runs(folder, records.read_plan(folder)):
        if run.state == "complete" and run.test_error_pct is not None:
            errors.setdefault(run.variant, []).append(run.test_error_pct)
    groups = [np.array(values) for values in errors.values() if len(values) >= 2]
    if not groups or (sd := pooled_sd(groups)) == 0:
        return None
    num_runs = sum(map(len, groups))
    return Spread(sd, f"measured in {folder.name}, {num_runs} runs")


def chosen_spread(text: str | None, *, study: str, results: Path) -> Spread:
    """The spread to plan with.

    Args:
        text: points, or the name of a study with results; None: the study's own runs
            where there are some, else an assumed spread.
        study: name of the study that is planned.
        results: folder that holds the studies' folders.

    Raises:
        InputError: the text is neither.
    """
    if text is None:
        own = measured_spread(results / study)
        return own or Spread(ASSUMED_SD, "assumed; --spread names another")
    try:
        sd = float(text)
    except ValueError:
        if found := measured_spread(results / text):
            return found
        known = sorted(path.parent.name for path in results.glob("*/plan.json"))
        raise InputError(
            f"--spread {text}: neither points, such as 0.3, nor a study in {results} "
            f"with two runs of a variant; there: {json.dumps(known)}."
        ) from None
    if not 0 < sd < 100:
        raise InputError(f"--spread must lie between 0 and 100 points, got {text}.")
    return Spread(sd, "as given")
