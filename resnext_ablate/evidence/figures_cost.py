"""Draws the data of `charts_cost`: what errors cost, and where the time went."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from resnext_ablate.evidence import chart_style as style
from resnext_ablate.evidence.charts_cost import CostsData, ParetoData, TimelineData
from resnext_ablate.evidence.drawing import (
    bars,
    colors_of,
    descriptions,
    draw_means,
    draw_seeds,
    linked,
    name_places,
    run_names,
)
from resnext_ablate.evidence.figures import draw_points, x_axis_of

_FADED = 0.35


def costs_figure(data: CostsData) -> go.Figure:
    """Time above, activations below, on one axis of FLOPs."""
    figure = style.new_figure(data.title, height=520)
    x_axis, offset = x_axis_of(data.time)
    draw_points(figure, data.time, offset=offset)
    draw_points(figure, data.activations, offset=offset, axis="y2")
    figure.update_layout(
        xaxis={**x_axis, "anchor": "y2", "title": {"text": data.time.x_title}},
        yaxis={
            "domain": [0.55, 1.0],
            "title": {"text": data.time.y_title},
            "rangemode": "tozero",
        },
        yaxis2={
            "domain": [0.0, 0.45],
            "anchor": "x",
            "automargin": True,
            "title": {"text": data.activations.y_title},
            "rangemode": "tozero",
        },
    )
    return figure


def pareto_figure(data: ParetoData) -> go.Figure:
    """Error against time; the front joined by steps, what it dominates faded."""
    figure = style.new_figure(data.title, height=380)
    points = data.points
    marks = style.marks(points["variant"].tolist())
    few = len(marks) <= style.MAX_LABELLED
    front = points[~points["dominated"]].sort_values("x")
    figure.add_scatter(
        x=front["x"],
        y=front["mean"],
        mode="lines",
        line={"color": style.NEUTRAL, "width": 1.5, "shape": "hv"},
        hoverinfo="skip",
    )
    if few:
        draw_seeds(
            figure,
            data.seeds,
            x=data.seeds["x"],
            y=data.seeds["y"],
            colors=colors_of(data.seeds["variant"], marks),
            shown="%{y:.4~g} %, %{x:.4~g} ms",
            opacities=_opacities(data.seeds, solid=0.6),
        )
    places = None
    if few:
        names = points["variant"].tolist()
        # Above or below, clear of the front's line.
        places = name_places(
            points["x"], points["mean"], names, levels=("top", "bottom")
        )
    draw_means(
        figure,
        points,
        x=points["x"],
        y=points["mean"],
        marks=marks,
        shown=descriptions(points),
        more_shown="<br>%{x:.4~g} ms per image",
        places=places,
        error_y=bars(points, "mean") if few else None,
        opacities=_opacities(points, solid=1.0),
    )
    figure.update_layout(
        xaxis={
            "title": {"text": data.x_title},
            "range": style.padded(points["x"].min(), points["x"].max(), share=0.14),
        },
        yaxis={"title": {"text": "test error (%)"}},
    )
    return figure


def _opacities(rows: pd.DataFrame, *, solid: float) -> list[float]:
    return [solid * (_FADED if dominated else 1) for dominated in rows["dominated"]]


def timeline_figure(data: TimelineData) -> go.Figure:
    """A bar for each run in lanes, failed ones crossed."""
    num_lanes = int(data.bars["lane"].max()) + 1
    figure = style.new_figure(data.title, height=min(150 + 24 * num_lanes, 620))
    few = len(data.order) <= style.MAX_LABELLED
    marks = style.marks(data.order)
    done = data.bars[data.bars["length"] > 0]
    figure.add_bar(
        orientation="h",
        base=done["start"],
        x=done["length"],
        y=done["lane"],
        customdata=linked(done),
        width=0.7,
        marker={
            "color": [
                marks[v].color if few else style.COLORS[0] for v in done["variant"]
            ],
            "line": {"width": 0},
        },
        # Bars too short for a name go without; small print helps nobody.
        text=[style.safe(v) for v in done["variant"]] if few else None,
        textposition="inside",
        textangle=0,
        insidetextanchor="start",
        hovertext=run_names(done),
        hovertemplate="%{hovertext}: %{x:.3~g} " + data.unit + "<extra></extra>",
    )
    failed = data.bars[data.bars["has_failed"]]
    figure.add_scatter(
        x=failed["start"] + failed["length"],
        y=failed["lane"],
        customdata=linked(failed),
        mode="markers",
        marker={"symbol": "x", "size": 11, "color": style.COLORS[1]},
        hovertext=[
            f"{name}: {style.safe(state)}<br>{style.safe(reason)}"
            for name, state, reason in zip(
                run_names(failed), failed["state"], failed["reason"], strict=True
            )
        ],
        hovertemplate="%{hovertext}<extra></extra>",
    )
    figure.update_layout(
        xaxis={"title": {"text": f"since the first run ({data.unit})"}},
        yaxis={
            "title": {"text": "at the same time"},
            "tickmode": "array",
            "tickvals": list(range(num_lanes)),
            "ticktext": [str(lane + 1) for lane in range(num_lanes)],
            "range": [num_lanes - 0.4, -0.6],
            "showgrid": False,
        },
        uniformtext={"minsize": 9, "mode": "hide"},
    )
    return figure
