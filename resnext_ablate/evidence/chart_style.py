"""How all charts look: colours, marks, axes, and where their labels go."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import plotly.graph_objects as go

FLOPS_AXIS = "FLOPs (multiply-adds, as in the paper)"
MAX_LABELLED = 12
"""With more variants than this, names appear on hover only."""

# Okabe and Ito without black and yellow: apart under all common colour blindness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "pentagon", "star")
DASHES = ("solid", "longdash", "dashdot", "longdashdot", "dash", "dot")
NEUTRAL = "#808890"
"""A grey that reads on white and on black."""

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
_INK = {"light": "#1c2430", "dark": "#e6e9ee"}
_GRID = {"light": "#e3e7ec", "dark": "#2e3540"}
_AXIS = {"light": "#9aa3ad", "dark": "#6b7480"}
_HOVER = {"light": "#ffffff", "dark": "#232a34"}


@dataclass(frozen=True)
class Mark:
    """How one variant is drawn: never by colour alone."""

    color: str
    symbol: str


def marks(labels: Sequence[str]) -> dict[str, Mark]:
    """A mark for each variant; the first six differ in colour and in symbol."""
    return {
        label: Mark(COLORS[i % 6], SYMBOLS[(i + i // 6) % 6])
        for i, label in enumerate(labels)
    }


def safe(text: str) -> str:
    """Text that plotly shows as it is: no tags, no entities."""
    return html.escape(str(text), quote=False)


def faded(color: str, *, opacity: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"


def template(scheme: Literal["light", "dark"]) -> dict[str, Any]:
    """Colours of text and grid; figures name none themselves."""
    axis = {
        "gridcolor": _GRID[scheme],
        "zerolinecolor": _AXIS[scheme],
        "linecolor": _AXIS[scheme],
        "tickcolor": _AXIS[scheme],
        "tickfont": {"size": 12},
        "title": {"font": {"size": 13}, "standoff": 10},
    }
    return {
        "layout": {
            "font": {"family": _FONT, "size": 13, "color": _INK[scheme]},
            "annotationdefaults": {"font": {"size": 12}},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {
                "bgcolor": _HOVER[scheme],
                "bordercolor": _AXIS[scheme],
                "font": {"family": _FONT, "size": 13, "color": _INK[scheme]},
                "align": "left",
            },
            "modebar": {
                "bgcolor": "rgba(0,0,0,0)",
                "color": _AXIS[scheme],
                "activecolor": _INK[scheme],
            },
        }
    }


def new_figure(title: str, *, height: int) -> go.Figure:
    """An empty figure of the house style; `height` in pixels.

    It names no colours of text and grid: those come with a `template`.
    """
    wrapped = "<br>".join(safe(line) for line in textwrap.wrap(title, 72))
    axis = {"zeroline": False, "automargin": True}
    return go.Figure(
        layout={
            "template": "none",
            "title": {"text": wrapped, "x": 0, "xref": "paper", "font": {"size": 16}},
            "height": height,
            "margin": {"l": 64, "r": 24, "t": 64, "b": 56},
            "showlegend": False,
            "hovermode": "closest",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "xaxis": {**axis, "showline": True, "ticks": "outside"},
            "yaxis": axis,
        }
    )


def log2_axis(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis that ticks at the values themselves, which are few."""
    ticks = sorted(set(values))
    if len(ticks) > MAX_LABELLED:
        ticks = [2**i for i in range(math.ceil(math.log2(ticks[-1])) + 1)]
    return {
        "type": "log",
        "range": list(log2_range(values)),
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
        "minor": {"showgrid": False},
    }


def log2_range(values: Sequence[float]) -> tuple[float, float]:
    """Ends of that axis, half a doubling beyond the values, as powers of ten."""
    return math.log10(min(values) / 1.45), math.log10(max(values) * 1.45)


def padded(low: float, high: float, *, share: float = 0.08) -> list[float]:
    """An axis range around values, also where all of them are equal."""
    room = (high - low) * share or max(abs(high) * 0.05, 1e-6)
    return [low - room, high + room]


def spread(positions: Sequence[float], *, gap: float) -> list[float]:
    """Moves positions apart to at least `gap`, each as little as the rest allow."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    groups: list[tuple[float, list[int]]] = []  # centre of each run of labels
    for i in order:
        centre, members = positions[i], [i]
        while groups and _overlap(groups[-1], (centre, members), gap):
            before, others = groups.pop()
            total = before * len(others) + centre * len(members)
            members = others + members
            centre = total / len(members)
        groups.append((centre, members))
    placed = [0.0] * len(positions)
    for centre, members in groups:
        for rank, i in enumerate(members):
            placed[i] = centre + (rank - (len(members) - 1) / 2) * gap
    return placed


def _overlap(
    below: tuple[float, list[int]], above: tuple[float, list[int]], gap: float
) -> bool:
    room = (len(below[1]) + len(above[1])) / 2 * gap
    return above[0] - below[0] < room - 1e-12


def count(value: float) -> str:
    """A count with an SI prefix and three digits, such as `4.09 G`."""
    for size, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"
