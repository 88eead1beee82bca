"""Draws the data of `charts`: errors against what a net is and costs."""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go

from resnext_ablate.evidence import chart_style as style
from resnext_ablate.evidence.charts import CardinalityData, FamiliesData, PointsData
from resnext_ablate.evidence.drawing import (
    bars,
    colors_of,
    descriptions,
    draw_key,
    draw_means,
    draw_seeds,
    glyph,
    linked,
    name_places,
)

_MAX_TICK_LETTERS = 36
"""Of names under the ticks that fit side by side in a column of the report."""
_SEED_OFFSET = 0.02
"""How far left of its mean a seed is drawn, in widths of the plot."""


def points_figure(data: PointsData) -> go.Figure:
    """Each variant as a point with its interval, each seed as a dot beside it."""
    figure = style.new_figure(data.title, height=350)
    x_axis, offset = x_axis_of(data)
    draw_points(figure, data, offset=offset)
    figure.update_layout(
        xaxis={**x_axis, "title": {"text": data.x_title}},
        yaxis={
            "title": {"text": data.y_title},
            "rangemode": "tozero" if data.from_zero else "normal",
        },
    )
    return figure


def cardinality_figure(data: CardinalityData) -> go.Figure:
    """Error by cardinality; below it the paper's differences beside ours, if known."""
    if data.differences.empty:
        return points_figure(data.main)
    figure = style.new_figure(data.title, height=620)
    x_axis, offset = x_axis_of(data.main)
    draw_points(figure, data.main, offset=offset)
    for source, rows in data.differences.groupby("source"):
        _draw_differences(figure, rows, ours=source == "ours", offset=offset)
    figure.add_annotation(
        text=f"{glyph('circle', style.COLORS[0])} this study   "
        f"{glyph('diamond-open', style.COLORS[1])} {style.safe(data.paper)}",
        x=0,
        xref="paper",
        y=1,
        yref="y2 domain",
        xanchor="left",
        yanchor="bottom",
        showarrow=False,
    )
    figure.update_layout(
        xaxis={**x_axis, "anchor": "y2", "title": {"text": data.main.x_title}},
        yaxis={"domain": [0.48, 1.0], "title": {"text": data.main.y_title}},
        yaxis2={
            "domain": [0.0, 0.39],
            "anchor": "x",
            "automargin": True,
            "zeroline": True,
            "title": {"text": "difference (points)"},
        },
    )
    return figure


def x_axis_of(data: PointsData) -> tuple[dict[str, object], float]:
    """The axis, and how far left seeds lie: a factor on a log2 axis, else a step."""
    x = data.points["x"]
    if not data.log2_x:
        low, high = style.padded(x.min(), x.max(), share=0.14)
        axis: dict[str, object] = {"range": [low, high], "nticks": 5}
        if x.nunique() == 1:
            axis |= {"tickmode": "array", "tickvals": [x.iloc[0]]}
        return axis, -_SEED_OFFSET * (high - low)
    axis = style.log2_axis(x.tolist())
    if _names_on_axis(data):
        names = dict(zip(x, data.points["variant"], strict=True))
        axis["ticktext"] = [
            f"{tick:g}<br>{style.safe(names[tick])}" for tick in sorted(names)
        ]
    low, high = style.log2_range(x.tolist())
    return axis, float(10 ** (-_SEED_OFFSET * (high - low)))


def _names_on_axis(data: PointsData) -> bool:
    x = data.points["x"]
    num_letters = sum(map(len, data.points["variant"]))
    return data.log2_x and x.is_unique and num_letters <= _MAX_TICK_LETTERS


def draw_points(
    figure: go.Figure, data: PointsData, *, offset: float, axis: str = "y"
) -> None:
    """Means with intervals and names, single seeds left of them."""
    known = data.points.dropna(subset=["mean"])
    if known.empty:
        return
    marks = style.marks(data.points["variant"].tolist())
    if data.log2_x and known["x"].is_unique:
        _draw_line(figure, known)
    if len(data.seeds):
        at = data.seeds["x"] * offset if data.log2_x else data.seeds["x"] + offset
        draw_seeds(
            figure,
            data.seeds,
            x=at,
            y=data.seeds["y"],
            colors=colors_of(data.seeds["variant"], marks),
            shown="%{y:.4~g}",
            axis=axis,
        )
    few = len(marks) <= style.MAX_LABELLED
    x = known["x"].map(math.log2) if data.log2_x else known["x"]
    has_names, places = not _names_on_axis(data), None
    if few and has_names:
        names = known["variant"].tolist()
        places = name_places(x, known["mean"], names, from_zero=data.from_zero)
    draw_means(
        figure,
        known,
        x=known["x"],
        y=known["mean"],
        marks=marks,
        shown=descriptions(known),
        has_names=has_names,
        places=places,
        error_y=bars(known, "mean") if few or len(data.seeds) else None,
        axis=axis,
    )


def families_figure(data: FamiliesData) -> go.Figure:
    """Error against parameters, one line for each way to grow the reference."""
    figure = style.new_figure(data.title, height=400)
    families = list(dict.fromkeys(data.points["family"]))
    marks = style.marks(families)
    keys = []
    for i, family in enumerate(families):
        mark = marks[family]
        rows = data.points[data.points["family"] == family]
        seeds = data.seeds[data.seeds["family"] == family]
        draw_seeds(
            figure,
            seeds,
            x=seeds["x"] * 0.985,
            y=seeds["y"],
            colors=[mark.color] * len(seeds),
            shown="%{y:.4~g}",
        )
        figure.add_scatter(
            x=rows["x"],
            y=rows["mean"],
            customdata=linked(rows),
            mode="lines+markers",
            line={"color": mark.color, "width": 2, "dash": style.DASHES[i]},
            marker={"size": 10, "symbol": mark.symbol},
            error_y=bars(rows, "mean"),
            hovertext=descriptions(rows),
            hovertemplate="%{hovertext}<extra></extra>",
        )
        keys.append(f"{glyph(mark.symbol, mark.color)} more {family}")
    draw_key(figure, keys)
    figure.update_layout(
        xaxis={"title": {"text": "parameters (log scale)"}, "type": "log", "nticks": 6},
        yaxis={"title": {"text": "test error (%)"}},
    )
    return figure


def _draw_line(figure: go.Figure, known: pd.DataFrame) -> None:
    line = known.sort_values("x")
    figure.add_scatter(
        x=line["x"],
        y=line["mean"],
        mode="lines",
        line={"color": style.NEUTRAL, "width": 1},
        hoverinfo="skip",
    )


def _draw_differences(
    figure: go.Figure, rows: pd.DataFrame, *, ours: bool, offset: float
) -> None:
    known = rows.dropna(subset=["difference"]).sort_values("x")
    color = style.COLORS[0] if ours else style.COLORS[1]
    source = "this study" if ours else "paper"
    figure.add_scatter(
        x=known["x"] * (1 if ours else offset),
        y=known["difference"],
        yaxis="y2",
        mode="lines+markers" if known["x"].is_unique else "markers",
        line={"color": color, "width": 1.5, "dash": "solid" if ours else "dot"},
        marker={
            "symbol": "circle" if ours else "diamond-open",
            "size": 9,
            "color": color,
            "line": {"width": 0 if ours else 2},
        },
        error_y=bars(known, "difference") if ours else None,
        hovertext=[f"{source}, {style.safe(label)}" for label in known["label"]],
        hovertemplate="%{hovertext}: %{y:+.2f} points<extra></extra>",
    )
