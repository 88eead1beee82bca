"""Draws the data of `charts_compare`: curves, differences, the paper beside ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from resnext_ablate.evidence import chart_style as style
from resnext_ablate.evidence.charts_compare import (
    CurvesData,
    DifferencesData,
    PaperData,
)
from resnext_ablate.evidence.drawing import (
    bars,
    draw_end_names,
    draw_seeds,
    linked,
    run_names,
)

_LOG_TICKS = [digit * 10.0**power for power in range(-3, 3) for digit in (1, 2, 5)]


def curves_figure(data: CurvesData) -> go.Figure:
    """Validation solid with a band over the seeds, training dashed."""
    figure = style.new_figure(data.title, height=420)
    marks = style.marks(data.order)
    groups = {v: g for v, g in data.curves.groupby("variant", sort=False)}
    for _, seed in data.seeds.groupby(["variant", "seed"], sort=False):
        _draw_seed_curve(figure, seed, color=marks[seed["variant"].iloc[0]].color)
    for variant, curve in groups.items():
        _draw_band(figure, curve, color=marks[variant].color)
    for variant, curve in groups.items():
        _draw_curve(figure, curve, mark=marks[variant], name=style.safe(variant))
    low, high = _curve_range(data.curves)
    log = low > 0 and high / low > 5
    figure.update_layout(
        xaxis={"title": {"text": "epoch"}, "rangemode": "tozero"},
        yaxis={
            "title": {"text": "error (%, log scale)" if log else "error (%)"},
            "type": "log" if log else "linear",
            "range": np.log10([low * 0.88, high * 1.06]).tolist()
            if log
            else [0, high * 1.06],
            **({"tickvals": _LOG_TICKS} if log else {}),
        },
    )
    ends = [float(curve["val"].iloc[-1]) for curve in groups.values()]
    scaled = [math.log10(end) if log else end for end in ends]
    span = math.log10(high / low) if log else high
    heights = style.spread(scaled, gap=span * 0.058)
    draw_end_names(figure, list(groups), heights=heights, marks=marks)
    return figure


def _draw_curve(
    figure: go.Figure, curve: pd.DataFrame, *, mark: style.Mark, name: str
) -> None:
    for column, word in (("train", "training"), ("val", "validation")):
        solid = column == "val"
        figure.add_scatter(
            x=curve["epoch"],
            y=curve[column],
            customdata=linked(curve[["variant"]]),
            mode="lines+markers" if solid else "lines",
            line={
                "color": mark.color,
                "dash": "solid" if solid else "dash",
                "width": 2 if solid else 1.2,
            },
            marker={"symbol": mark.symbol, "size": 7, "maxdisplayed": 7},
            hovertext=[name] * len(curve),
            hovertemplate=f"%{{hovertext}}, epoch %{{x}}<br>{word} "
            "%{y:.2f} %<extra></extra>",
        )


def _draw_seed_curve(figure: go.Figure, seed: pd.DataFrame, *, color: str) -> None:
    figure.add_scatter(
        x=seed["epoch"],
        y=seed["val"],
        customdata=linked(seed),
        mode="lines",
        line={"color": style.faded(color, opacity=0.35), "width": 1},
        hovertext=run_names(seed),
        hovertemplate="%{hovertext}, epoch %{x}<br>validation %{y:.2f} %"
        "<extra></extra>",
    )


def _draw_band(figure: go.Figure, curve: pd.DataFrame, *, color: str) -> None:
    figure.add_scatter(
        x=np.concatenate([curve["epoch"], curve["epoch"][::-1]]),
        y=np.concatenate([curve["val_high"], curve["val_low"][::-1]]),
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=style.faded(color, opacity=0.14),
        hoverinfo="skip",
    )


def _curve_range(curves: pd.DataFrame) -> tuple[float, float]:
    """In a long run the first twentieth may leave the chart, the rest stays inside."""
    late = curves[curves["epoch"] > 0.05 * curves["epoch"].max()]
    values = late[["train", "val_low", "val_high"]].to_numpy(dtype=float)
    return float(np.nanmin(values)), float(np.nanmax(values)) or 1.0


def differences_figure(data: DifferencesData) -> go.Figure:
    """Forest plot: one row for each variant, the margin shaded."""
    rows = data.rows
    figure = style.new_figure(data.title, height=130 + 44 * len(rows))
    figure.add_vrect(
        x0=-data.margin,
        x1=data.margin,
        fillcolor=style.faded(style.NEUTRAL, opacity=0.16),
        line_width=0,
        layer="below",
    )
    figure.add_vline(x=0, line={"color": style.NEUTRAL, "width": 1})
    marks = style.marks(data.order)
    row_of = {variant: i for i, variant in enumerate(rows["variant"])}
    draw_seeds(
        figure,
        data.seeds,
        x=data.seeds["difference"],
        y=[row_of[v] + 0.22 for v in data.seeds["variant"]],
        colors=[marks[v].color for v in data.seeds["variant"]],
        shown="%{x:+.2f} points",
    )
    figure.add_scatter(
        x=rows["difference"],
        y=list(range(len(rows))),
        customdata=linked(rows),
        mode="markers",
        marker={
            "size": 11,
            "color": [marks[v].color for v in rows["variant"]],
            "symbol": [marks[v].symbol for v in rows["variant"]],
        },
        error_x=bars(rows, "difference"),
        hovertext=_difference_texts(rows),
        hovertemplate="%{hovertext}<extra></extra>",
    )
    edges = [
        *rows["low"],
        *rows["high"],
        *rows["difference"],
        *data.seeds["difference"],
        -data.margin,
        data.margin,
    ]
    known = [edge for edge in edges if not math.isnan(edge)]
    figure.update_layout(
        xaxis={
            "title": {"text": "difference in test error (points)"},
            "range": style.padded(min(known), max(known)),
        },
        yaxis={
            "tickmode": "array",
            "tickvals": list(range(len(rows))),
            "ticktext": _row_names(rows),
            "range": [len(rows) - 0.4, -0.9],
            "showgrid": False,
        },
    )
    _name_sides(figure)
    return figure


def _name_sides(figure: go.Figure) -> None:
    """Says which side of zero is the better one."""
    for text, x, anchor in (
        ("\u2190 better", 0, "left"),
        ("worse \u2192", 1, "right"),
    ):
        figure.add_annotation(
            text=text,
            x=x,
            xref="paper",
            y=1,
            yref="paper",
            xanchor=anchor,
            yanchor="top",
            showarrow=False,
        )


def _row_names(rows: pd.DataFrame) -> list[str]:
    return [
        f"<b>{style.safe(v)}</b><br>{verdict.split()[0]}"
        for v, verdict in zip(rows["variant"], rows["verdict"], strict=True)
    ]


def _difference_texts(rows: pd.DataFrame) -> list[str]:
    return [
        f"<b>{style.safe(row.variant)}</b>: {row.difference:+.2f} points"
        + ("" if math.isnan(row.low) else f", {row.low:+.2f} to {row.high:+.2f}")
        + f"<br>{style.safe(row.verdict)}"
        for row in rows.itertuples(index=False)
    ]


def paper_figure(data: PaperData) -> go.Figure:
    """A slope for each variant: the paper's difference left, ours right."""
    rows = data.rows
    figure = style.new_figure(data.title, height=440)
    figure.add_hline(y=0, line={"color": style.NEUTRAL, "width": 1})
    marks = style.marks(data.order)
    places = _slope_ends(len(rows))
    seeds = data.seeds.merge(rows[["variant"]].assign(x=places), on="variant")
    draw_seeds(
        figure,
        seeds,
        x=seeds["x"],
        y=seeds["difference"],
        colors=[marks[v].color for v in seeds["variant"]],
        shown="%{y:+.2f} points",
    )
    for place, row in zip(places, rows.to_dict(orient="records"), strict=True):
        _draw_slope(figure, row, mark=marks[row["variant"]], place=place)
    low, high = _known_range(rows, [0.0, *rows["paper"]])
    ends = style.spread(rows["ours"].tolist(), gap=0.06 * (high - low))
    draw_end_names(figure, rows["variant"].tolist(), heights=ends, marks=marks)
    figure.update_layout(
        xaxis={
            "range": [-0.12, 1.16],
            "tickmode": "array",
            "tickvals": [0, 1],
            "ticktext": [f"paper ({style.safe(data.paper)})", "this study"],
            "showgrid": False,
        },
        yaxis={
            "title": {"text": "difference from own reference (points)"},
            "range": [low, high],
        },
    )
    return figure


def _slope_ends(count: int) -> list[float]:
    """Right ends side by side around 1, so that no interval hides another."""
    return [1 + 0.045 * (i - (count - 1) / 2) for i in range(count)]


def _draw_slope(
    figure: go.Figure, row: dict[str, Any], *, mark: style.Mark, place: float
) -> None:
    known = not math.isnan(row["low"])
    figure.add_scatter(
        x=[0, place],
        y=[row["paper"], row["ours"]],
        customdata=[[row["variant"], None]] * 2,
        mode="lines+markers",
        line={"color": mark.color, "width": 1.5},
        marker={
            "size": 10,
            "symbol": [f"{mark.symbol}-open", mark.symbol],
            "line": {"width": 2, "color": mark.color},
        },
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [0, row["high"] - row["ours"] if known else 0],
            "arrayminus": [0, row["ours"] - row["low"] if known else 0],
            "thickness": 1.5,
            "width": 4,
            "color": style.NEUTRAL,
        },
        hovertext=[
            f"<b>{style.safe(row['variant'])}</b><br>paper {row['paper']:+.2f}, "
            f"this study {row['ours']:+.2f}"
        ]
        * 2,
        hovertemplate="%{hovertext}<extra></extra>",
    )


def _known_range(rows: pd.DataFrame, paper: Sequence[float]) -> list[float]:
    values = [*rows[["ours", "low", "high"]].to_numpy(dtype=float).ravel(), *paper]
    return style.padded(float(np.nanmin(values)), float(np.nanmax(values)), share=0.03)
