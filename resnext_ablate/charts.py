"""The charts of a study: for each a function frame -> data and one data -> figure.

Frames are the `variants`, `comparisons`, `runs` and `epochs` tables of a study, with
complete runs only in `runs`. The data functions hold every number and the finding that
the title states; the figure functions only draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from scipy import stats

from resnext_ablate import chart_style as style

MAX_SEEDS_DRAWN = 60
"""With more variants than this only means are drawn."""
MAX_CURVES = 6
MAX_DIFFERENCES = 30
EQUAL_PCT = 10.0
"""Variants whose FLOPs differ by less than this are held equal."""

Currency = Literal["macs", "params"]
_CURRENCIES = {"macs": "FLOPs", "params": "parameters"}
_AXES = {"macs": style.FLOPS_AXIS, "params": "parameters"}


@dataclass(frozen=True)
class PointsData:
    """Variants as points with interval, their seeds, and what they show."""

    title: str
    note: str
    x_title: str
    y_title: str
    log2_x: bool
    points: pd.DataFrame
    """variant, x, mean, low, high, n."""
    seeds: pd.DataFrame
    """variant, seed, x, y; empty where there are too many to draw."""


@dataclass(frozen=True)
class CardinalityData:
    """Error against cardinality; below it differences, the paper's beside ours."""

    main: PointsData
    differences: pd.DataFrame
    """source ("ours" or "paper"), label, x, difference, low, high; maybe empty."""
    paper: str


@dataclass(frozen=True)
class CurvesData:
    """Errors by epoch: mean over seeds, and their range."""

    title: str
    note: str
    curves: pd.DataFrame
    """variant, epoch, train, val, val_low, val_high, n."""
    order: tuple[str, ...]
    """All variants of the study, which fixes the colours."""


@dataclass(frozen=True)
class DifferencesData:
    """Differences from the reference with simultaneous intervals."""

    title: str
    note: str
    rows: pd.DataFrame
    """variant, difference, low, high, verdict, n; in plan order."""
    margin: float
    order: tuple[str, ...]


@dataclass(frozen=True)
class PaperData:
    """The paper's differences against ours."""

    title: str
    note: str
    rows: pd.DataFrame
    """variant, cardinality, paper, ours, low, high."""
    paper: str
    order: tuple[str, ...]


def cardinality_data(
    variants: pd.DataFrame,
    runs: pd.DataFrame,
    *,
    comparisons: pd.DataFrame,
    paper: pd.DataFrame,
) -> CardinalityData:
    """Test error against cardinality.

    Args:
        variants, runs, comparisons: the study's tables.
        paper: rows matched to variants (`variant`, `paper_difference`, `source`); may
            be empty.
    """
    main = _points(variants, runs, x="cardinality", title=_trend_title(variants))
    ours = variants[["variant", "cardinality"]].merge(
        comparisons[["variant", "difference_pct", "ci_low", "ci_high"]],
        on="variant",
        how="left",
    )
    is_reference = variants["is_reference"].to_numpy()
    ours.loc[is_reference, "difference_pct"] = 0.0
    ours = ours.set_axis(["label", "x", "difference", "low", "high"], axis=1)
    rows = [ours.assign(source="ours")]
    if len(paper):
        theirs = pd.DataFrame(
            {
                "label": paper["setting"],
                "x": paper["cardinality"],
                "difference": paper["paper_difference"],
                "low": math.nan,
                "high": math.nan,
                "source": "paper",
            }
        )
        rows.append(theirs)
    differences = pd.concat(rows, ignore_index=True) if len(paper) else ours.iloc[:0]
    name = str(paper["source"].iloc[0]) if len(paper) else ""
    return CardinalityData(main=main, differences=differences, paper=name)


def cardinality_figure(data: CardinalityData) -> go.Figure:
    if data.differences.empty:
        return points_figure(data.main)
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.09, row_heights=[3, 2]
    )
    figure.update_layout(style.new_figure(data.main.title, height=640).layout)
    figure.update_yaxes(zeroline=False, automargin=True)
    _draw_points(figure, data.main)
    for source, rows in data.differences.groupby("source"):
        ours = source == "ours"
        known = rows.dropna(subset=["difference"]).sort_values("x")
        x = known["x"] * (0.97 if ours else 1.03)
        figure.add_scatter(
            x=x,
            y=known["difference"],
            mode="lines+markers" if known["x"].is_unique else "markers",
            line={"color": style.NEUTRAL, "width": 1, "dash": "solid" if ours else "dot"},
            marker={
                "symbol": "circle" if ours else "diamond-open",
                "size": 10,
                "color": style.COLORS[0] if ours else style.COLORS[1],
                "line": {"width": 2},
            },
            error_y=_error_bars(known, "difference") if ours else None,
            text=[style.safe(label) for label in known["label"]],
            hovertemplate=f"{'this study' if ours else 'paper'} %{{text}}: "
            "%{y:+.2f} points<extra></extra>",
            row=2,
            col=1,
        )
    figure.add_hline(y=0, line={"color": style.NEUTRAL, "width": 1}, row=2, col=1)
    figure.add_annotation(
        text=f"<b>●</b> this study, 95 % simultaneous interval   <b>◇</b> {style.safe(data.paper)}",
        x=0,
        xref="paper",
        y=1,
        yref="y2 domain",
        xanchor="left",
        yanchor="bottom",
        showarrow=False,
    )
    figure.update_xaxes(**style.log2_axis(data.main.points["x"].tolist()))
    figure.update_xaxes(showline=True, ticks="outside", zeroline=False)
    figure.update_xaxes(title_text=data.main.x_title, row=2, col=1)
    figure.update_yaxes(title_text=data.main.y_title, row=1, col=1)
    figure.update_yaxes(title_text="difference (points)", row=2, col=1)
    return figure
