"""What `plan` answers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from resnext_ablate.architecture.matching import percent
from resnext_ablate.face.answers import COMPLEXITY_HEADER, Answer
from resnext_ablate.face.cost_answers import (
    ERROR_HEADER,
    how_measured,
    measured_errors,
)
from resnext_ablate.numbers import looks

if TYPE_CHECKING:
    from resnext_ablate.study.planner import AdaptiveRuns, Forecast
    from resnext_ablate.study.study_plan import PreparedStudy


def of_plan(
    prepared: PreparedStudy, *, num_done: int, forecast: Forecast | None
) -> Answer:
    """What a study would run, and what of it is done."""
    config, info = prepared.config, prepared.data.info
    nets, cells = prepared.plan.nets, prepared.plan.cells
    macs = {net.variant: net.macs for net in nets}
    # A step costs about three forward passes: one forward, two backward.
    passes = 3 * config.train.epochs * info.num_train
    training_macs = sum(passes * macs[cell.variant] for cell in cells)
    measured = measured_errors(prepared.costs) if prepared.costs else {}
    errors = ERROR_HEADER if measured else ()
    return Answer(
        value={
            "study": config.name,
            "nets": [
                {key: value for key, value in asdict(net).items() if key != "spec"}
                for net in nets
            ],
            "num_runs": len(cells),
            "num_done": num_done,
            "executors": len(prepared.devices),
            "device": config.run.device,
            "precision": config.train.precision,
            "training_macs": training_macs,
            "costs": asdict(prepared.costs) if prepared.costs else None,
            "forecast": asdict(forecast) if forecast else None,
        },
        opening=f"{config.name}: {config.question}",
        header=("variant", "net", *COMPLEXITY_HEADER, *errors),
        rows=tuple(
            (
                net.variant,
                net.name,
                f"{net.macs:,}",
                f"{net.params:,}",
                f"{net.activations:,}",
                percent(net.macs_error_pct),
                percent(net.params_error_pct),
                percent(net.activations_error_pct),
                *measured.get(net.name, ()),
            )
            for net in nets
        ),
        num_text_columns=2,
        closing=(
            f"{_runs_text(prepared)}, {num_done} done\n"
            f"{info.num_train} images to train on, {info.num_val} to validate, "
            f"{info.num_test} to test; {info.image_size} x {info.image_size} pixels\n"
            f"{len(prepared.devices)} executors on {config.run.device}, "
            f"{config.train.precision}\n"
            f"training compute: {training_macs:.3g} multiply-adds"
            + (f"\n{_forecast_text(forecast)}" if forecast else "")
            + (f"\nmeasured: {how_measured(prepared.costs)}" if prepared.costs else "")
        ),
    )


def _runs_text(prepared: PreparedStudy) -> str:
    """Such as "4 variants x 3 seeds = 12 runs of 20 epochs"."""
    config, plan = prepared.config, prepared.plan
    num_seeds = len(config.run.seed_list())
    seeds = f"{num_seeds} seed{'s' * (num_seeds > 1)}"
    if config.run.seeds == "adaptive":
        seeds = f"{looks.FIRST_SEEDS} to {seeds}"
    most = "at most " if config.run.seeds == "adaptive" else ""
    return (
        f"{len(plan.nets)} variants x {seeds} = {most}{len(plan.cells)} runs of "
        f"{config.train.epochs} epochs"
    )


def _adaptive_text(runs: AdaptiveRuns) -> str:
    return (
        f"runs expected: {runs.if_equal:.0f} where all variants are equal, "
        f"{runs.if_different:.0f} where each differs from the reference by "
        f"{runs.difference:g} points; {runs.at_most} at most"
    )


def _forecast_text(forecast: Forecast) -> str:
    spread = f"spread between seeds {forecast.spread.sd:.2f} points"
    lines = [
        "detectable with 80 % power: "
        + (
            "nothing; that takes two seeds and two variants"
            if forecast.detectable is None
            else f"a difference of {forecast.detectable:.2f} points"
        )
        + f" ({spread}, {forecast.spread.source})"
    ]
    if forecast.adaptive:
        lines.insert(0, _adaptive_text(forecast.adaptive))
    if forecast.time_s is None or forecast.memory_mib is None:
        lines.append("time and memory: not timed yet; --calibrate takes a minute")
    else:
        lines.append(
            f"time: {_time_text(forecast, forecast.time_s)}; memory: "
            f"{forecast.memory_mib:,.0f} MiB "
            f"(timed for {forecast.calibration_s:.0f} s)"
        )
    lines.append(f"disk: {forecast.disk_mib:.1f} MiB")
    return "\n".join(lines)


def _time_text(forecast: Forecast, time_s: float) -> str:
    runs = forecast.adaptive
    if runs is None:
        return f"about {_duration(time_s)}"
    expected_s = time_s * min(1.0, runs.if_equal / runs.at_most)
    return (
        f"about {_duration(expected_s)} where all variants are equal, at most "
        f"{_duration(time_s)}"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
