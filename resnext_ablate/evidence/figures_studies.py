"""Draws the data of `charts_studies`: two studies over one axis."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from resnext_ablate.evidence import chart_style as style
from resnext_ablate.evidence.charts_studies import SidesData
from resnext_ablate.evidence.drawing import (
    bars,
    descriptions,
    draw_key,
    draw_seeds,
    glyph,
)

_APART = 0.035
"""How far right of the first study the second stands, in widths of the plot."""


def sides_figure(data: SidesData) -> go.Figure:
    """Two studies, told apart by colour, symbol and dash."""
    figure = style.new_figure(data.title, height=400)
    x = data.points["x"]
    low, high = style.padded(float(x.min()), float(x.max()), share=0.14)
    if data.log2_x:
        low, high = style.log2_range(x.tolist())
    marks = style.marks(data.names)
    keys = []
    for i, name in enumerate(data.names):
        mark = marks[name]
        step = _APART * (high - low)
        rows = data.points[data.points["study"] == name].sort_values("x")
        seeds = data.seeds[data.seeds["study"] == name]
        if len(seeds):
            draw_seeds(
                figure,
                seeds,
                x=_moved(seeds["x"], (i - 0.4) * step, log2_x=data.log2_x),
                y=seeds["y"],
                colors=[mark.color] * len(seeds),
                shown="%{y:.4~g}",
            )
        figure.add_scatter(
            x=_moved(rows["x"], i * step, log2_x=data.log2_x),
            y=rows["mean"],
            mode="lines+markers" if rows["x"].is_unique else "markers",
            line={"color": mark.color, "width": 1.5, "dash": style.DASHES[i]},
            marker={"size": 10, "symbol": mark.symbol},
            error_y=bars(rows, "mean"),
            hovertext=[f"{style.safe(name)}: {text}" for text in descriptions(rows)],
            hovertemplate="%{hovertext}<extra></extra>",
        )
        keys.append(f"{glyph(mark.symbol, mark.color)} {style.safe(name)}")
    draw_key(figure, keys)
    axis = style.log2_axis(x.tolist()) if data.log2_x else {"range": [low, high]}
    figure.update_layout(
        xaxis={**axis, "title": {"text": data.x_title}},
        yaxis={"title": {"text": data.y_title}},
    )
    return figure


def _moved(values: pd.Series, by: float, *, log2_x: bool) -> pd.Series:
    return values * 10**by if log2_x else values + by
