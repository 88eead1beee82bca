"""What the commands answer that measure nets on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING, Any

from resnext_ablate.architecture.matching import Match, percent
from resnext_ablate.face.answers import Answer, of_matches

if TYPE_CHECKING:
    from pathlib import Path

    from resnext_ablate.records.certificate import DeviceCosts, NetCost, Spread
    from resnext_ablate.records.training_costs import TrainingCosts


def of_costs(costs: DeviceCosts) -> Answer:
    """The measured costs of nets, the reference first."""
    return Answer(
        value=asdict(costs),
        header=("net", *_HEADER),
        rows=tuple(
            (
                cost.name,
                f"{1000 * cost.step_s.median:.2f}",
                f"{costs.batch_size / cost.step_s.median:,.0f}",
                f"{100 * cost.step_floor_s / cost.step_s.median:.0f} %",
                f"{1000 * cost.forward_s.median:.2f}",
                f"{cost.peak_memory_mib:.1f}",
                *_errors(cost, is_reference=cost is costs.nets[0]),
            )
            for cost in costs.nets
        ),
        closing=how_measured(costs),
    )


def of_measured_matches(matches: Sequence[Match], costs: DeviceCosts) -> Answer:
    """Nets matched by measuring: residuals in every currency, the measured ones too."""
    shapes = of_matches(matches)
    by_name = {cost.name: cost for cost in costs.nets}
    found = [by_name[one.spec.name] for one in matches]
    assert isinstance(shapes.value, list)
    values: list[dict[str, Any]] = [
        {**value, "measured": asdict(cost)}
        for value, cost in zip(shapes.value, found, strict=True)
    ]
    errors = measured_errors(costs)
    return Answer(
        value={"device": costs.device, "precision": costs.precision, "nets": values},
        header=(*shapes.header, *ERROR_HEADER),
        rows=tuple(
            (*row, *errors[one.spec.name])
            for row, one in zip(shapes.rows, matches, strict=True)
        ),
        num_text_columns=shapes.num_text_columns,
        closing=how_measured(costs),
    )


def of_training_costs(costs: TrainingCosts, *, path: Path) -> Answer:
    """What each loop makes of the machine."""
    rows = []
    for one in costs.loops:
        errors = one.test_errors_pct
        rows.append(
            (
                one.title,
                f"{one.images_per_s.median:,.0f}",
                f"{one.ratio.median:.2f}",
                f"{one.ratio.low:.2f} to {one.ratio.high:.2f}",
                f"{one.runs_per_hour.median:,.0f}",
                f"{one.runs_ratio.median:.2f}",
                f"{one.roofline_pct:.0f} %",
                f"{fmean(errors):.2f} %",
                f"{min(errors):.2f} to {max(errors):.2f} %",
                str(len(errors)),
            )
        )
    peaks = costs.peaks
    return Answer(
        value=asdict(costs),
        header=(
            "loop",
            "images/s",
            "ratio",
            "95 % interval",
            "runs/h",
            "ratio",
            "of roofline",
            "test error",
            "over seeds",
            "n",
        ),
        rows=tuple(rows),
        closing=(
            f"{costs.net} on {costs.num_train:,} images of {costs.data}, "
            f"{costs.epochs} epochs, batch {costs.batch_size}; ours in "
            f"{costs.precision}\n"
            f"{costs.device}, {costs.num_cores} cores; peaks measured: "
            f"{peaks.macs_per_s / 1e9:,.0f} G multiply-adds/s, "
            f"{peaks.bytes_per_s / 1e9:,.1f} GB/s\n"
            f"{path}, {path.with_suffix('.html').name}"
        ),
    )


ERROR_HEADER = ("step +-", "95 % interval", "memory +-")
_HEADER = (
    "step ms",
    "images/s",
    "of roofline",
    "forward ms",
    "peak MiB",
    *ERROR_HEADER,
)


def measured_errors(costs: DeviceCosts) -> dict[str, tuple[str, ...]]:
    """The cells under `ERROR_HEADER`, by net."""
    return {
        cost.name: _errors(cost, is_reference=cost is costs.nets[0])
        for cost in costs.nets
    }


def _errors(cost: NetCost, *, is_reference: bool) -> tuple[str, str, str]:
    if is_reference:
        return "reference", "", ""
    error = cost.step_time_error_pct
    return (
        percent(error.median),
        f"{error.low:+.1f} to {error.high:+.1f} %",
        percent(cost.peak_memory_error_pct),
    )


def how_measured(costs: DeviceCosts) -> str:
    """How it was measured, and how far the times scatter."""
    scatter = max(_half_width_pct(cost.step_s) for cost in costs.nets)
    repeats = costs.nets[0].step_s.num_repeats
    threads = "1 thread" if costs.num_threads == 1 else f"{costs.num_threads} threads"
    peaks = costs.peaks
    return (
        f"{costs.device}, {threads}, {costs.precision}, batch {costs.batch_size}, "
        f"{costs.image_size} x {costs.image_size} pixels\n"
        f"medians of {repeats} repeats, each within +-{scatter:.1f} % (95 %); peaks "
        f"measured: {peaks.macs_per_s / 1e9:,.0f} G multiply-adds/s, "
        f"{peaks.bytes_per_s / 1e9:,.0f} GB/s"
    )


def _half_width_pct(spread: Spread) -> float:
    return 50 * (spread.high - spread.low) / spread.median
