"""The page of a training benchmark: which loop makes what of the machine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from resnext_ablate.evidence import chart_style as style
from resnext_ablate.evidence import page
from resnext_ablate.evidence.drawing import bars
from resnext_ablate.evidence.gallery import Figure
from resnext_ablate.evidence.page import Column, Table
from resnext_ablate.numbers import stats
from resnext_ablate.records.records import write_atomically
from resnext_ablate.records.training_costs import TrainingCosts

_COLUMNS = (
    Column("title", "loop", "text"),
    Column("images_per_s", "images/s", digits=0),
    Column("ratio", "times the tutorial loop"),
    Column("ratio_interval", "95 % interval", "text"),
    Column("runs_per_hour", "runs per hour", digits=1),
    Column("runs_ratio", "times the tutorial loop"),
    Column("roofline_pct", "of roofline (%)", digits=0),
    Column("test_error_pct", "test error (%)"),
    Column("test_error_interval", "95 % interval", "text"),
    Column("n", "runs", digits=0),
)


@dataclass(frozen=True)
class LoopsData:
    """title: the finding; rows: one per loop, the tutorial loop first."""

    title: str
    rows: pd.DataFrame


def loops_data(costs: TrainingCosts) -> LoopsData:
    """Loops as rows: rate with its interval, ratio, and error over the seeds."""
    rows = []
    for one in costs.loops:
        error = stats.summarize(one.test_errors_pct)
        rows.append(
            {
                "loop": one.loop,
                "title": one.title,
                "images_per_s": one.images_per_s.median,
                "low": one.images_per_s.low,
                "high": one.images_per_s.high,
                "ratio": one.ratio.median,
                "ratio_interval": f"{one.ratio.low:.2f} to {one.ratio.high:.2f}",
                "runs_per_hour": one.runs_per_hour.median,
                "runs_ratio": one.runs_ratio.median,
                "roofline_pct": one.roofline_pct,
                "test_error_pct": error.mean,
                "test_error_interval": _interval_text(error.low, error.high),
                "n": len(one.test_errors_pct),
            }
        )
    frame = pd.DataFrame(rows)
    ours = frame[frame["loop"] == "ours"].iloc[0]
    title = (
        f"A study trains {ours['ratio']:.1f} times as many images a second as the "
        "tutorial loop"
    )
    return LoopsData(title, frame)


def loops_figure(data: LoopsData) -> go.Figure:
    """Images per second as bars, the fastest loop lowest."""
    figure = style.new_figure(data.title, height=300)
    rows = data.rows
    figure.add_bar(
        x=rows["images_per_s"],
        y=rows["title"],
        orientation="h",
        error_x=bars(rows, "images_per_s"),
        marker={
            "color": [
                style.COLORS[0] if loop == "ours" else style.NEUTRAL
                for loop in rows["loop"]
            ]
        },
        text=[f"{ratio:.1f} x" for ratio in rows["ratio"]],
        textposition="auto",  # Outside of a bar that is too short.
        textangle=0,
        insidetextanchor="start",
        hovertemplate="%{y}<br>%{x:,.0f} images/s<extra></extra>",
    )
    figure.update_layout(
        xaxis={"title": {"text": "images trained per second, whole machine"}},
        yaxis={"autorange": "reversed"},
        bargap=0.35,
    )
    return figure


def write_page(costs: TrainingCosts, path: Path) -> None:
    """Writes the benchmark as one HTML file that opens offline."""
    data = loops_data(costs)
    figure = Figure("loops", loops_figure(data), data.title, _note(costs))
    html = page.render(
        "loops.html",
        figures=[figure],
        tables=[Table("loops", "Training loops", "", data.rows, _COLUMNS)],
        embedded={"costs": dataclasses.asdict(costs)},
        words={"costs": costs, "finding": f"{data.title}."},
    )
    write_atomically(path, html)


def _note(costs: TrainingCosts) -> str:
    return (
        f"Medians of {costs.loops[0].images_per_s.num_repeats} turns with their "
        f"interval; ours in {costs.precision}."
    )


def _interval_text(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return f"{low:.2f} to {high:.2f}"
