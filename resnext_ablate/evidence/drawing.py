"""What several figures draw alike: bars, names beside points, marks in text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from resnext_ablate.evidence import chart_style as style

_MARK_PX = 30  # a glyph, its space and the gap to the plot
_LETTER_PX = 8  # of the report's font at its size, digits as wide as any
# Sizes beside points, in spans of the points along their axis.
_LETTER_SHARE, _MARK_SHARE = 0.026, 0.028
_LINE = 0.075  # the height of a line in a plot of full height
_EDGE = 0.16  # how far the plot goes on beyond its points


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


def names_beside(variants: pd.Series, places: Sequence[str]) -> list[str]:
    """Names with room for the mark on one side and for the seeds on the other."""
    return [
        f"\u00a0{style.safe(variant)}\u00a0\u00a0\u00a0" if place else ""
        for variant, place in zip(variants, places, strict=True)
    ]


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
        places = name_places(x, y, points["variant"].tolist())
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
        text=names_beside(points["variant"], places or []) if named else None,
        textposition=[p or "middle right" for p in places or []] if named else None,
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


def draw_end_names(
    figure: go.Figure,
    names: Sequence[str],
    *,
    heights: Sequence[float],
    marks: Mapping[str, style.Mark],
) -> None:
    """Names with their marks right of the plot, where their lines end.

    Args:
        names: of variants; the margin takes the longest.
        heights: of each on the y axis, which no other name is to touch.
        marks: by variant.
    """
    for name, y in zip(names, heights, strict=True):
        figure.add_annotation(
            text=f"{glyph(marks[name].symbol, marks[name].color)} {style.safe(name)}",
            x=1.015,
            xref="paper",
            y=y,
            xanchor="left",
            showarrow=False,
        )
    longest = max(map(len, names), default=0)
    figure.update_layout(margin_r=max(84, min(_MARK_PX + _LETTER_PX * longest, 240)))


def name_places(
    x: pd.Series,
    y: pd.Series,
    names: Sequence[str],
    *,
    levels: Sequence[str] = ("middle", "top", "bottom"),
    from_zero: bool = False,
) -> list[str]:
    """Where each name stands beside its point: clear of points, names and edges.

    Each takes the first place of the fewest clashes, in the order of the points. Where
    it would lie over another name or be cut, it shows under the pointer only.

    Args:
        x: of the points, as the axis spaces them.
        levels: of the places that are tried, in this order.
        from_zero: whether the y axis starts there; such plots are low.

    Returns:
        Places as plotly calls them, such as "middle right"; "" for none.
    """
    width = max(float(np.ptp(x)), 1e-9)
    height = max(float(y.max() if from_zero else np.ptp(y)), 1e-9)
    line = 2 * _LINE if from_zero else _LINE
    across, up = (x - x.min()) / width, (y - y.min()) / height
    points = list(zip(across, up, strict=True))
    taken = [
        (px - _MARK_SHARE, px + _MARK_SHARE, py - 0.3 * line, py + 0.3 * line)
        for px, py in points
    ]
    places = []
    for i, (point, name) in enumerate(zip(points, names, strict=True)):
        others = [box for j, box in enumerate(taken) if j != i]
        boxes = {
            f"{level} {side}": _box(*point, len(name), f"{level} {side}", line=line)
            for level in levels
            for side in ("right", "left")
        }
        place = min(boxes, key=lambda p: _num_clashes(boxes[p], others))
        is_free = not _num_clashes(boxes[place], taken[len(points) :])
        if is_free:
            taken.append(boxes[place])
        places.append(place if is_free else "")
    return places


_Box = tuple[float, float, float, float]  # left, right, bottom, top


def _box(x: float, y: float, num_letters: int, place: str, *, line: float) -> _Box:
    """What a name covers at a place, in spans of the points."""
    level, side = place.split()
    bottom = y + {"top": 0.4, "middle": -0.4, "bottom": -1.2}[level] * line
    far = _MARK_SHARE + num_letters * _LETTER_SHARE
    left, right = (-_MARK_SHARE, far) if side == "right" else (-far, _MARK_SHARE)
    return x + left, x + right, bottom, bottom + 0.8 * line


def _num_clashes(box: _Box, others: Sequence[_Box]) -> int:
    left, right, bottom, top = box
    hits = sum(
        left < o_right and o_left < right and bottom < o_top and o_bottom < top
        for o_left, o_right, o_bottom, o_top in others
    )
    return hits + 2 * (left < -_EDGE or right > 1 + _EDGE)


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
