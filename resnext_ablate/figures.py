"""Draws the data of `charts`: one function for each kind of data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from resnext_ablate import chart_style as style
from resnext_ablate.charts import (
    CardinalityData,
    CurvesData,
    DifferencesData,
    PaperData,
    PointsData,
)

_MAX_NAMED_TICKS = 6
_LOG_TICKS = [digit * 10.0**power for power in range(-3, 3) for digit in (1, 2, 5)]
_SEED_OFFSET = 0.02
"""How far left of its mean a seed is drawn, in widths of the plot."""


def points_figure(data: PointsData) -> go.Figure:
    """Each variant as a point with its interval, each seed as a dot beside it."""
    figure = style.new_figure(data.title, height=350)
    x_axis, offset = _x_axis(data)
    _draw_points(figure, data, offset=offset)
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
    x_axis, offset = _x_axis(data.main)
    _draw_points(figure, data.main, offset=offset)
    for source, rows in data.differences.groupby("source"):
        _draw_differences(figure, rows, ours=source == "ours", offset=offset)
    figure.add_annotation(
        text=f"{_glyph('circle', style.COLORS[0])} this study   "
        f"{_glyph('diamond-open', style.COLORS[1])} {style.safe(data.paper)}",
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


def _x_axis(data: PointsData) -> tuple[dict[str, object], float]:
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
    return data.log2_x and x.is_unique and len(x) <= _MAX_NAMED_TICKS


def _draw_points(figure: go.Figure, data: PointsData, *, offset: float) -> None:
    known = data.points.dropna(subset=["mean"])
    if known.empty:
        return
    few = len(data.points) <= style.MAX_LABELLED
    marks = style.marks(data.points["variant"].tolist())
    plain = style.Mark(style.COLORS[0], "circle")
    if data.log2_x and known["x"].is_unique:
        _draw_line(figure, known)
    if len(data.seeds):
        at = data.seeds["x"] * offset if data.log2_x else data.seeds["x"] + offset
        names = zip(data.seeds["variant"], data.seeds["seed"], strict=True)
        figure.add_scatter(
            x=at,
            y=data.seeds["y"],
            mode="markers",
            marker={
                "size": 6,
                "opacity": 0.6,
                "color": [
                    (marks[v] if few else plain).color for v in data.seeds["variant"]
                ],
            },
            hovertext=[f"{style.safe(v)}, seed {seed}" for v, seed in names],
            hovertemplate="%{hovertext}: %{y:.4~g}<extra></extra>",
        )
    labelled = few and not _names_on_axis(data)
    looks = [marks[v] if few else plain for v in known["variant"]]
    x = known["x"].map(math.log2) if data.log2_x else known["x"]
    figure.add_scatter(
        x=known["x"],
        y=known["mean"],
        mode="markers+text" if labelled else "markers",
        marker={
            "size": 11 if few else 6,
            "color": [look.color for look in looks],
            "symbol": [look.symbol for look in looks],
        },
        error_y=_bars(known, "mean") if few or len(data.seeds) else None,
        text=_labels(known["variant"]) if labelled else None,
        textposition=_label_places(x, known["mean"]),
        hovertext=_descriptions(known),
        hovertemplate="%{hovertext}<extra></extra>",
        cliponaxis=False,
    )


def _draw_line(figure: go.Figure, known: pd.DataFrame) -> None:
    line = known.sort_values("x")
    figure.add_scatter(
        x=line["x"],
        y=line["mean"],
        mode="lines",
        line={"color": style.NEUTRAL, "width": 1},
        hoverinfo="skip",
    )


def _descriptions(known: pd.DataFrame) -> list[str]:
    return [
        f"<b>{style.safe(row.variant)}</b><br>mean {row.mean:.4g}"
        + ("" if math.isnan(row.low) else f", {row.low:.4g} to {row.high:.4g}")
        + f"<br>{row.n} run{'' if row.n == 1 else 's'}"
        for row in known.itertuples(index=False)
    ]


def _bars(rows: pd.DataFrame, centre: str) -> dict[str, object]:
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


def _labels(variants: pd.Series) -> list[str]:
    """Names with room for the mark on one side and for the seeds on the other."""
    return [f"\u00a0{style.safe(v)}\u00a0\u00a0\u00a0" for v in variants]


def _label_places(x: pd.Series, y: pd.Series) -> list[str]:
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
        error_y=_bars(known, "difference") if ours else None,
        hovertext=[f"{source}, {style.safe(label)}" for label in known["label"]],
        hovertemplate="%{hovertext}: %{y:+.2f} points<extra></extra>",
    )


def curves_figure(data: CurvesData) -> go.Figure:
    """Validation solid with a band over the seeds, training dashed."""
    figure = style.new_figure(data.title, height=420)
    marks = style.marks(data.order)
    groups = {v: g for v, g in data.curves.groupby("variant", sort=False)}
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
        margin_r=84,
    )
    ends = [float(curve["val"].iloc[-1]) for curve in groups.values()]
    scaled = [math.log10(end) if log else end for end in ends]
    span = math.log10(high / low) if log else high
    heights = style.spread(scaled, gap=span * 0.058)
    for variant, y in zip(groups, heights, strict=True):
        mark = marks[variant]
        figure.add_annotation(
            text=f"{_glyph(mark.symbol, mark.color)} {style.safe(variant)}",
            x=1.015,
            xref="paper",
            y=y,
            xanchor="left",
            showarrow=False,
        )
    return figure


def _draw_curve(
    figure: go.Figure, curve: pd.DataFrame, *, mark: style.Mark, name: str
) -> None:
    for column, word in (("train", "training"), ("val", "validation")):
        solid = column == "val"
        figure.add_scatter(
            x=curve["epoch"],
            y=curve[column],
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
    figure.add_scatter(
        x=rows["difference"],
        y=list(range(len(rows))),
        mode="markers",
        marker={
            "size": 11,
            "color": [marks[v].color for v in rows["variant"]],
            "symbol": [marks[v].symbol for v in rows["variant"]],
        },
        error_x=_bars(rows, "difference"),
        hovertext=_difference_texts(rows),
        hovertemplate="%{hovertext}<extra></extra>",
    )
    edges = [
        *rows["low"],
        *rows["high"],
        *rows["difference"],
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
    """The paper's differences across, ours upward, equality as a line."""
    rows = data.rows
    figure = style.new_figure(data.title, height=380)
    paper = style.padded(min([*rows["paper"], 0]), max([*rows["paper"], 0]), share=0.14)
    figure.add_scatter(
        x=paper,
        y=paper,
        mode="lines",
        line={"color": style.NEUTRAL, "dash": "dash", "width": 1.5},
        hoverinfo="skip",
    )
    marks = style.marks(data.order)
    pairs = zip(rows["variant"], rows["paper"], rows["ours"], strict=True)
    figure.add_scatter(
        x=rows["paper"],
        y=rows["ours"],
        mode="markers+text",
        marker={
            "size": 11,
            "color": [marks[v].color for v in rows["variant"]],
            "symbol": [marks[v].symbol for v in rows["variant"]],
        },
        error_y=_bars(rows, "ours"),
        text=_labels(rows["variant"]),
        textposition=_label_places(rows["paper"], rows["ours"]),
        hovertext=[
            f"<b>{style.safe(v)}</b><br>paper {theirs:+.2f}, this study {ours:+.2f}"
            for v, theirs, ours in pairs
        ],
        hovertemplate="%{hovertext}<extra></extra>",
        cliponaxis=False,
    )
    figure.update_layout(
        xaxis={"title": {"text": "paper: difference (points)"}, "range": paper},
        yaxis={
            "title": {"text": "this study: difference (points)"},
            "range": _known_range(rows, paper),
            "zeroline": True,
        },
    )
    return figure


def _known_range(rows: pd.DataFrame, paper: Sequence[float]) -> list[float]:
    values = [*rows[["ours", "low", "high"]].to_numpy(dtype=float).ravel(), *paper]
    return style.padded(float(np.nanmin(values)), float(np.nanmax(values)), share=0.03)


def _glyph(symbol: str, color: str) -> str:
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
