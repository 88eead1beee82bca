"""Draws the data of `charts_ranking`: distributions, budgets, importance."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from resnext_ablate.evidence import chart_style as style
from resnext_ablate.evidence.charts_ranking import (
    BudgetsData,
    DistributionData,
    ImportanceData,
)
from resnext_ablate.evidence.drawing import colors_of, draw_means, draw_seeds, linked


def distribution_figure(data: DistributionData) -> go.Figure:
    """The empirical distribution as steps, with its band and its nets as ticks."""
    figure = style.new_figure(data.title, height=380)
    steps = data.steps
    color = style.COLORS[0]
    figure.add_scatter(
        x=np.concatenate([steps["error"], steps["error"][::-1]]),
        y=np.concatenate([steps["high"], steps["low"][::-1]]),
        mode="lines",
        line={"width": 0, "shape": "hv"},
        fill="toself",
        fillcolor=style.faded(color, opacity=0.16),
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=steps["error"],
        y=steps["share"],
        mode="lines",
        line={"color": color, "width": 2, "shape": "hv"},
        hovertemplate="%{y:.0%} of the nets: %{x:.2f} % or less<extra></extra>",
    )
    figure.add_scatter(
        x=data.nets["error"],
        y=[0.0] * len(data.nets),
        customdata=linked(data.nets),
        mode="markers",
        marker={"symbol": "line-ns-open", "size": 9, "color": color},
        hovertext=[style.safe(v) for v in data.nets["variant"]],
        hovertemplate="%{hovertext}: %{x:.2f} %<extra></extra>",
    )
    figure.update_layout(
        xaxis={"title": {"text": data.x_title}},
        yaxis={
            "title": {"text": "share of nets"},
            "range": [-0.04, 1.04],
            "tickformat": ".0%",
        },
    )
    _draw_badge(figure, data.badge)
    return figure


def budgets_figure(data: BudgetsData) -> go.Figure:
    """Each variant's error after few epochs against its error after all."""
    figure = style.new_figure(data.title, height=400)
    points = data.points
    marks = style.marks(points["variant"].tolist())
    if len(marks) <= style.MAX_LABELLED:
        draw_seeds(
            figure,
            data.seeds,
            x=data.seeds["x"],
            y=data.seeds["y"],
            colors=colors_of(data.seeds["variant"], marks),
            shown="%{x:.2f} %, then %{y:.2f} %",
        )
    draw_means(
        figure,
        points,
        x=points["x"],
        y=points["y"],
        marks=marks,
        shown=[
            f"<b>{style.safe(row.variant)}</b><br>rank {row.short_rank}, then "
            f"{row.long_rank}"
            for row in points.itertuples(index=False)
        ],
        more_shown="<br>%{x:.2f} %, then %{y:.2f} %",
    )
    figure.update_layout(
        xaxis={"title": {"text": data.x_title}},
        yaxis={"title": {"text": data.y_title}},
    )
    return figure


def importance_figure(data: ImportanceData) -> go.Figure:
    """A bar for each axis, the longest on top."""
    axes = data.axes
    figure = style.new_figure(data.title, height=130 + 36 * len(axes))
    figure.add_bar(
        orientation="h",
        x=axes["importance"],
        y=list(range(len(axes))),
        width=0.6,
        marker={"color": style.COLORS[0]},
        text=[f"{value:.0%}" for value in axes["importance"]],
        textposition="outside",
        hovertext=[style.safe(axis) for axis in axes["axis"]],
        hovertemplate="%{hovertext}: %{x:.1%}<extra></extra>",
        cliponaxis=False,
    )
    figure.update_layout(
        xaxis={
            "title": {"text": "share of what the axes explain"},
            "tickformat": ".0%",
            "range": [0, 1.12 * float(axes["importance"].max())],
        },
        yaxis={
            "tickmode": "array",
            "tickvals": list(range(len(axes))),
            "ticktext": [style.safe(axis) for axis in axes["axis"]],
            "range": [len(axes) - 0.4, -0.6],
            "showgrid": False,
        },
    )
    _draw_badge(figure, data.badge)
    return figure


def _draw_badge(figure: go.Figure, badge: str) -> None:
    """Says in the plot itself that it shows no distribution of the design space."""
    if not badge:
        return
    figure.add_annotation(
        text=style.safe(badge),
        x=1,
        xref="paper",
        y=0.06,
        yref="paper",
        xanchor="right",
        yanchor="bottom",
        showarrow=False,
        bordercolor=style.COLORS[1],
        borderwidth=1.5,
        borderpad=4,
    )
