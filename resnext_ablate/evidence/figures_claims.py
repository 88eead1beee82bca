"""Draws the data of `charts_claims`: the paper's effects against ours."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from resnext_ablate.evidence import chart_style as style
from resnext_ablate.evidence.charts_claims import EffectsData
from resnext_ablate.evidence.drawing import bars

_ROW_HEIGHT = 34
_VERDICTS = {
    "consistent": (style.COLORS[0], "circle"),
    "contradicted": (style.COLORS[1], "square"),
    "undecided": (style.NEUTRAL, "diamond"),
}
"""Colour and symbol of a verdict."""


def effects_figure(data: EffectsData) -> go.Figure:
    """A row for each effect, the first one on top; zero is no effect."""
    rows = data.rows
    figure = style.new_figure(data.title, height=150 + _ROW_HEIGHT * len(rows))
    figure.add_vline(x=0, line={"color": style.NEUTRAL, "width": 1})
    _draw_ours(figure, rows)
    places = list(range(len(rows)))
    figure.add_scatter(
        x=rows["paper"],
        y=[place - 0.28 for place in places],
        name="the paper's",
        mode="markers",
        marker={
            "size": 9,
            "symbol": "diamond-open",
            "color": style.COLORS[2],
            "line": {"width": 1.5},
        },
        hovertemplate="paper %{x:+.2f}<extra></extra>",
    )
    figure.update_layout(
        xaxis={"title": {"text": "points of error"}},
        yaxis={
            "tickmode": "array",
            "tickvals": places,
            "ticktext": [
                f"{style.safe(row.label)}  <b>{row.claim}</b>"
                for row in rows.itertuples()
            ],
            "range": [len(rows) - 0.4, -0.6],
        },
        showlegend=True,
        # Names are long: title and legend start at the edge, not at the plot.
        title={"xref": "container", "x": 0.02},
        legend={
            "orientation": "h",
            "xref": "container",
            "x": 0.02,
            "xanchor": "left",
            "yref": "container",
            "y": 0.01,
            "yanchor": "bottom",
        },
        margin={"b": 90},
    )
    return figure


def _draw_ours(figure: go.Figure, rows: pd.DataFrame) -> None:
    """Our estimates with their intervals, a mark for each verdict."""
    for verdict, (color, symbol) in _VERDICTS.items():
        inside = rows["verdict"] == verdict
        of_verdict = rows[inside]
        if of_verdict.empty:
            continue
        figure.add_scatter(
            x=of_verdict["ours"],
            y=of_verdict.index,
            name=f"ours: {verdict}",
            mode="markers",
            marker={"size": 10, "symbol": symbol, "color": color},
            error_x=bars(of_verdict, "ours"),
            hovertext=[
                f"{style.safe(row.label)}<br>ours {row.ours:+.2f} "
                f"[{row.low:+.2f}, {row.high:+.2f}], {row.n} runs of each net<br>"
                f"paper {row.paper:+.2f}: {row.verdict}"
                for row in of_verdict.itertuples()
            ],
            hovertemplate="%{hovertext}<extra></extra>",
        )
