"""What several figures draw alike: bars, names beside points, marks in text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from resnext_ablate.evidence import chart_style as style


def linked(rows: pd.DataFrame) -> list[list[object]]:
    """Variant and seed of each point, by which the page finds its net and curve."""
    seeds = rows["seed"].tolist() if "seed" in rows else [None] * len(rows)
    return [[v, seed] for v, seed in zip(rows["variant"], seeds, strict=True)]


def run_names(rows: pd.DataFrame) -> list[str]:
    """Such as "32x4d, seed 1", as plotly shows it."""
    pairs = zip(rows["variant"], rows["seed"], strict=True)
    return [f"{style.safe(v)}, seed {seed}" for v, seed in pairs]


def draw_seeds(
    figure: go.Figure,
    seeds: pd.DataFrame,
    *,
    x: Sequence[float] | pd.Series,
    y: Sequence[float] | pd.Series,
    colors: Sequence[str],
    shown: str,
    opacities: Sequence[float] | float = 0.6,
    axis: str = "y",
) -> None:
    """A small dot for each run.

    Args:
        shown: what hovering tells after the name, in plotly's template language.
    """
    figure.add_scatter(
        x=x,
        y=y,
        yaxis=axis,
        customdata=linked(seeds),
        mode="markers",
        marker={"size": 6, "opacity": opacities, "color": list(colors)},
        hovertext=run_names(seeds),
        hovertemplate=f"%{{hovertext}}: {shown}<extra></extra>",
    )


def descriptions(known: pd.DataFrame) -> list[str]:
    """What is said of each mean under the pointer: value, interval, number of runs."""
    return [
        f"<b>{style.safe(row.variant)}</b><br>mean {row.mean:.4g}"
        + ("" if math.isnan(row.low) else f", {row.low:.4g} to {row.high:.4g}")
        + f"<br>{row.n} run{'' if row.n == 1 else 's'}"
        for row in known.itertuples(index=False)
    ]


def bars(rows: pd.DataFrame, centre: str) -> dict[str, object]:
    """Error bars; where an interval is unknown there is none."""
    return {
        "type": "data",
        "symmetric": False,
        "array": (rows["high"] - rows[centre]).fillna(0.0),
        "arrayminus": (rows[centre] - rows["low"]).fillna(0.0),
        "thickness": 1.5,
        "width": 4,
        "color": style.NEUTRAL,
    }


def names_beside(variants: pd.Series) -> list[str]:
    """Names with room for the mark on one side and for the seeds on the other."""
    return [f"\u00a0{style.safe(v)}\u00a0\u00a0\u00a0" for v in variants]


def colors_of(variants: pd.Series, marks: dict[str, style.Mark]) -> list[str]:
    """A colour for each row; many variants share one."""
    few = len(marks) <= style.MAX_LABELLED
    return [marks[v].color if few else style.COLORS[0] for v in variants]


def draw_means(
    figure: go.Figure,
    points: pd.DataFrame,
    *,
    x: pd.Series,
    y: pd.Series,
    marks: dict[str, style.Mark],
    shown: Sequence[str],
    more_shown: str = "",
    has_names: bool = True,
    places: Sequence[str] | None = None,
    error_y: dict[str, object] | None = None,
    opacities: Sequence[float] | None = None,
    axis: str = "y",
) -> None:
    """A large mark for each variant, with its name where they are few.

    Args:
        marks: of all variants of the chart.
        shown: what hovering tells of each.
        more_shown: what it tells after that, in plotly's template language.
        has_names: whether few variants are named beside their points.
        places: of the names; None: beside the points, where there is room.
        error_y: as `bars` makes them.
    """
    few = len(marks) <= style.MAX_LABELLED
    named = few and has_names
    if named and places is None:
        places = name_places(x, y)
    figure.add_scatter(
        x=x,
        y=y,
        yaxis=axis,
        customdata=linked(points),
        mode="markers+text" if named else "markers",
        marker={
            "size": 11 if few else 6,
            "color": colors_of(points["variant"], marks),
            "symbol": [marks[v].symbol if few else "circle" for v in points["variant"]],
            "opacity": opacities,
        },
        error_y=error_y,
        text=names_beside(points["variant"]) if named else None,
        textposition=places if named else None,
        hovertext=shown,
        hovertemplate=f"%{{hovertext}}{more_shown}<extra></extra>",
        cliponaxis=False,
    )


def draw_key(figure: go.Figure, entries: Sequence[str]) -> None:
    """Names with their marks, above the plot."""
    figure.add_annotation(
        text="   ".join(entries),
        x=0,
        xref="paper",
        y=1,
        yref="paper",
        xanchor="left",
        yanchor="bottom",
        showarrow=False,
    )


def name_places(x: pd.Series, y: pd.Series) -> list[str]:
    """Labels right of their points, or left where the right side is taken."""
    width, height = (max(float(np.ptp(v)), 1e-9) for v in (x, y))
    places = []
    for i in range(len(x)):
        dx = ((x - x.iloc[i]) / width).to_numpy()
        dy = ((y - y.iloc[i]).abs() / height).to_numpy()
        close = (np.arange(len(x)) != i) & (dy < 0.1)
        right = (close & (dx >= 0) & (dx < 0.2)).any()
        left = (close & (dx <= 0) & (dx > -0.2)).any()
        # The rightmost point has the edge of the plot beside it.
        crowded = right or (dx.max() <= 0 and not left)
        places.append("middle left" if crowded and not left else "middle right")
    return places


def glyph(symbol: str, color: str) -> str:
    """A marker as text, so that a name can follow it in the colour of the ink."""
    glyphs = {
        "circle": "\u25cf",
        "square": "\u25a0",
        "diamond": "\u25c6",
        "diamond-open": "\u25c7",
        "triangle-up": "\u25b2",
        "pentagon": "\u2b1f",
        "star": "\u2605",
    }
    return f'<span style="color:{color}">{glyphs[symbol]}</span>'
