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
from scipy import stats

from resnext_ablate import chart_style as style

MAX_SEEDS_DRAWN = 60
"""With more variants than this only means are drawn."""
MAX_CURVES = 6
MAX_DIFFERENCES = 30
EQUAL_PCT = 10.0
"""Variants whose FLOPs differ by less than this are held equal."""

Currency = Literal["macs", "params"]
CURRENCIES: dict[Currency, str] = {"macs": "FLOPs", "params": "parameters"}
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
    figure = style.new_figure(data.main.title, height=660)
    _draw_points(figure, data.main)
    for source, rows in data.differences.groupby("source"):
        _draw_differences(figure, rows, ours=source == "ours")
    legend = f"<b>\u25cf</b> this study   <b>\u25c7</b> {style.safe(data.paper)}"
    figure.add_annotation(
        text=legend,
        x=0,
        xref="paper",
        y=1,
        yref="y2 domain",
        xanchor="left",
        yanchor="bottom",
        showarrow=False,
    )
    figure.update_layout(
        xaxis={**style.log2_axis(data.main.points["x"].tolist()), "anchor": "y2"},
        xaxis_title_text=data.main.x_title,
        yaxis={"domain": [0.47, 1.0], "title": {"text": data.main.y_title}},
        yaxis2={
            "domain": [0.0, 0.38],
            "anchor": "x",
            "automargin": True,
            "zeroline": True,
            "title": {"text": "against reference (points)"},
        },
    )
    return figure


def _draw_differences(figure: go.Figure, rows: pd.DataFrame, *, ours: bool) -> None:
    known = rows.dropna(subset=["difference"]).sort_values("x")
    color = style.COLORS[0] if ours else style.COLORS[1]
    joined = "lines+markers" if known["x"].is_unique else "markers"
    figure.add_scatter(
        x=known["x"] * (0.97 if ours else 1.03),
        y=known["difference"],
        yaxis="y2",
        mode=joined,
        line={"color": color, "width": 1.5, "dash": "solid" if ours else "dot"},
        marker={
            "symbol": "circle" if ours else "diamond-open",
            "size": 10,
            "color": color,
            "line": {"width": 2},
        },
        error_y=_bars(known, "difference") if ours else None,
        text=[style.safe(label) for label in known["label"]],
        hovertemplate=("this study" if ours else "paper")
        + ", %{text}: %{y:+.2f} points<extra></extra>",
    )


def complexity_data(
    variants: pd.DataFrame, runs: pd.DataFrame, *, currency: Currency
) -> PointsData:
    """Test error against FLOPs or parameters."""
    word = CURRENCIES[currency]
    known = variants.dropna(subset=["test_error_pct_mean"])
    span = _span_pct(variants[currency])
    means = known["test_error_pct_mean"]
    if len(known) < 2:
        title = f"Test error and {word} of {_only(known)}"
    elif span <= EQUAL_PCT:
        title = (
            f"{word[0].upper()}{word[1:]} differ by {span:.1f} % at most, mean test "
            f"errors by {means.max() - means.min():.2f} points"
        )
    else:
        tau = stats.kendalltau(known[currency], means).statistic
        trend = "falls" if tau < 0 else "rises"
        title = f"Test error {trend} with {word} (rank correlation {tau:+.2f})"
        if math.isnan(tau) or abs(tau) < 0.5:
            title = f"Test error does not follow {word} (rank correlation {tau:+.2f})"
    return _points(variants, runs, x=currency, title=title)


def time_data(variants: pd.DataFrame, runs: pd.DataFrame) -> PointsData:
    """Measured training time per image, against FLOPs or, where those are held equal,
    against cardinality."""
    equal = _span_pct(variants["macs"]) <= EQUAL_PCT
    x = "cardinality" if equal and variants["cardinality"].nunique() > 1 else "macs"
    per_image = "time_per_image_ms"
    known = variants.dropna(subset=[f"{per_image}_mean"])
    timed = runs.assign(**{per_image: 1000.0 / runs["images_per_s"]})
    means = known[f"{per_image}_mean"]
    title = "Training time per image"
    if len(known) > 1:
        slow, fast = known.loc[means.idxmax()], known.loc[means.idxmin()]
        ratio = slow[f"{per_image}_mean"] / fast[f"{per_image}_mean"]
        start = "Equal FLOPs, unequal time: " if equal and ratio >= 1.1 else ""
        title = (
            f"{start}{slow['variant']} takes {ratio:.1f} times as long per image as "
            f"{fast['variant']}"
        )
    return _points(
        variants, timed, x=x, title=title, y=per_image, y_title="time per image (ms)"
    )


def points_figure(data: PointsData) -> go.Figure:
    """Each variant as a point with its interval, each seed as a dot beside it."""
    figure = style.new_figure(data.title, height=420)
    _draw_points(figure, data)
    if data.log2_x:
        figure.update_xaxes(**style.log2_axis(data.points["x"].tolist()))
    else:
        x = data.points["x"]
        figure.update_xaxes(range=style.padded(x.min(), x.max(), share=0.12), nticks=6)
        if x.nunique() == 1:
            figure.update_xaxes(tickmode="array", tickvals=[x.iloc[0]])
    figure.update_xaxes(title_text=data.x_title)
    figure.update_yaxes(title_text=data.y_title)
    return figure


def _draw_points(figure: go.Figure, data: PointsData) -> None:
    known = data.points.dropna(subset=["mean"])
    if known.empty:
        return
    if data.log2_x and known["x"].is_unique:
        line = known.sort_values("x")
        figure.add_scatter(
            x=line["x"],
            y=line["mean"],
            mode="lines",
            line={"color": style.NEUTRAL, "width": 1},
            hoverinfo="skip",
        )
    marks = style.marks(data.points["variant"].tolist())
    few = len(data.points) <= style.MAX_LABELLED
    places = _label_places(data) if few else {}
    looks = [
        marks[v] if few else style.Mark(style.COLORS[0], "circle")
        for v in known["variant"]
    ]
    if len(data.seeds):
        shift = 0.96 if data.log2_x else 1.0
        seeds = data.seeds
        figure.add_scatter(
            x=seeds["x"] * shift,
            y=seeds["y"],
            mode="markers",
            marker={
                "size": 6,
                "opacity": 0.55,
                "color": [
                    marks[v].color if few else style.COLORS[0] for v in seeds["variant"]
                ],
            },
            text=[
                f"{style.safe(v)}, seed {s}"
                for v, s in zip(seeds["variant"], seeds["seed"], strict=True)
            ],
            hovertemplate="%{text}: %{y:.4g}<extra></extra>",
        )
    figure.add_scatter(
        x=known["x"],
        y=known["mean"],
        mode="markers+text" if few else "markers",
        marker={
            "size": 11 if few else 6,
            "color": [look.color for look in looks],
            "symbol": [look.symbol for look in looks],
        },
        error_y=_bars(known, "mean") if len(known) <= MAX_SEEDS_DRAWN else None,
        text=[style.safe(v) for v in known["variant"]],
        textposition=[places.get(v, "middle right") for v in known["variant"]],
        customdata=known[["low", "high", "n"]].to_numpy(),
        hovertemplate="<b>%{text}</b><br>mean %{y:.4g}, interval %{customdata[0]:.4g} "
        "to %{customdata[1]:.4g}, %{customdata[2]} runs<extra></extra>",
        cliponaxis=False,
    )


def _bars(rows: pd.DataFrame, centre: str) -> dict[str, object]:
    """Error bars; where an interval is unknown there is none."""
    return {
        "type": "data",
        "symmetric": False,
        "array": (rows["high"] - rows[centre]).fillna(0.0),
        "arrayminus": (rows[centre] - rows["low"]).fillna(0.0),
        "thickness": 1.5,
        "width": 5,
        "color": style.NEUTRAL,
    }


def _label_places(data: PointsData) -> dict[str, str]:
    """Labels right of their points, or left where the right side is taken."""
    points = data.points.dropna(subset=["mean"])
    x = points["x"].map(math.log2) if data.log2_x else points["x"].astype(float)
    lows, highs = (
        points["low"].fillna(points["mean"]),
        points["high"].fillna(points["mean"]),
    )
    width = max(x.max() - x.min(), 1e-9)
    height = max(highs.max() - lows.min(), 1e-9)
    places = {}
    for i, variant in enumerate(points["variant"]):
        dx = (x - x.iloc[i]) / width
        dy = (points["mean"] - points["mean"].iloc[i]).abs() / height
        others = np.arange(len(points)) != i
        right = (others & (dx >= 0) & (dx < 0.14) & (dy < 0.07)).any()
        left = (others & (dx <= 0) & (dx > -0.14) & (dy < 0.07)).any()
        places[variant] = "middle left" if right and not left else "middle right"
    return places


def _points(
    variants: pd.DataFrame,
    runs: pd.DataFrame,
    *,
    x: str,
    title: str,
    y: str = "test_error_pct",
    y_title: str = "test error (%)",
) -> PointsData:
    has_interval = f"{y}_ci_low" in variants
    points = pd.DataFrame(
        {
            "variant": variants["variant"],
            "x": variants[x],
            "mean": variants[f"{y}_mean"],
            "low": variants[f"{y}_ci_low"] if has_interval else math.nan,
            "high": variants[f"{y}_ci_high"] if has_interval else math.nan,
            "n": variants["n"],
        }
    )
    notes = ["Each small dot is one seed, each large mark a mean"]
    if has_interval:
        notes[0] += " with its 95 % t-interval"
    seeds = runs.merge(points[["variant", "x"]], on="variant")
    seeds = seeds[["variant", "seed", "x", y]].set_axis(
        ["variant", "seed", "x", "y"], axis=1
    )
    if len(points) > MAX_SEEDS_DRAWN:
        notes = [
            f"Means of {len(points):,} variants; seeds and intervals are in the table"
        ]
        seeds = seeds.iloc[:0]
    single = [v for v, n in zip(points["variant"], points["n"], strict=True) if n == 1]
    if single and len(single) <= style.MAX_LABELLED:
        notes.append(f"one run only, so no interval: {', '.join(single)}")
    log2_x = x == "cardinality"
    x_title = "cardinality (log2 scale)" if log2_x else _AXES[x]
    return PointsData(
        title=title,
        note="; ".join(notes) + ".",
        x_title=x_title,
        y_title=y_title,
        log2_x=log2_x,
        points=points,
        seeds=seeds,
    )


def _trend_title(variants: pd.DataFrame) -> str:
    known = variants.dropna(subset=["test_error_pct_mean"])
    if len(known) < 2:
        return f"Test error of {_only(known)}"
    best = known.loc[known["test_error_pct_mean"].idxmin()]
    span = _span_pct(variants["macs"])
    held = f" at FLOPs equal within {span:.1f} %" if span <= EQUAL_PCT else ""
    reference = known[known["is_reference"]]
    if len(reference) == 0 or bool(best["is_reference"]):
        gap = known["test_error_pct_mean"].max() - best["test_error_pct_mean"]
        return (
            f"Lowest mean test error{held}: {best['variant']}, {gap:.2f} points below "
            "the highest"
        )
    gap = reference["test_error_pct_mean"].iloc[0] - best["test_error_pct_mean"]
    return (
        f"Lowest mean test error{held}: {best['variant']}, {gap:.2f} points below "
        f"{reference['variant'].iloc[0]}"
    )


def _only(known: pd.DataFrame) -> str:
    return str(known["variant"].iloc[0]) if len(known) else "no variant yet"


def _span_pct(values: pd.Series) -> float:
    """Largest over smallest value, in percent above one."""
    return float(100 * (values.max() / values.min() - 1))


def curves_data(epochs: pd.DataFrame, variants: pd.DataFrame) -> CurvesData:
    """Mean error by epoch over the seeds of each variant, with the seeds' range."""
    shown = variants.dropna(subset=["test_error_pct_mean"])
    if len(shown) > MAX_CURVES:
        best = shown.sort_values("test_error_pct_mean").head(MAX_CURVES - 1)
        keep = set(best["variant"]) | set(shown[shown["is_reference"]]["variant"])
        shown = shown[shown["variant"].isin(keep)]
    curves = (
        epochs[epochs["variant"].isin(shown["variant"])]
        .groupby(["variant", "epoch"], observed=True)
        .agg(
            train=("train_error_pct", "mean"),
            val=("val_error_pct", "mean"),
            val_low=("val_error_pct", "min"),
            val_high=("val_error_pct", "max"),
            n=("seed", "nunique"),
        )
        .reset_index()
    )
    note = (
        "Solid: validation, mean over seeds, the band spans the seeds. Dashed: training, "
        "on augmented batches as they pass."
    )
    if len(shown) < len(variants):
        note += f" {len(shown)} of {len(variants)} variants: the reference and those of lowest error."
    title = "Training curves"
    if len(curves):
        last = curves[curves["epoch"] == curves["epoch"].max()]
        low, high = last.loc[last["val"].idxmin()], last.loc[last["val"].idxmax()]
        title = (
            f"After {low['epoch']} epochs the mean validation error is "
            f"{low['val']:.1f} % ({low['variant']})"
        )
        if len(last) > 1:
            title += f" to {high['val']:.1f} % ({high['variant']})"
    return CurvesData(title, note, curves, tuple(variants["variant"]))


def curves_figure(data: CurvesData) -> go.Figure:
    figure = style.new_figure(data.title, height=480)
    marks = style.marks(data.order)
    groups = {v: g for v, g in data.curves.groupby("variant", sort=False)}
    for variant, curve in groups.items():
        color = marks[variant].color
        _draw_band(figure, curve, color=color)
        for column, dash, width in (("train", "dot", 1.2), ("val", "solid", 2.2)):
            figure.add_scatter(
                x=curve["epoch"],
                y=curve[column],
                mode="lines",
                line={"color": color, "dash": dash, "width": width},
                name=style.safe(variant),
                hovertemplate=f"{'validation' if column == 'val' else 'training'}, epoch "
                "%{x}: %{y:.2f} %<extra>%{fullData.name}</extra>",
            )
    ceiling = _curve_ceiling(data.curves)
    figure.update_layout(
        xaxis={"title": {"text": "epoch"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "error (%)"}, "range": [0, ceiling]},
        margin_r=96,
    )
    ends = {v: float(g["val"].iloc[-1]) for v, g in groups.items()}
    heights = style.spread(list(ends.values()), gap=ceiling * 0.052)
    for variant, y in zip(ends, heights, strict=True):
        figure.add_annotation(
            text=f"<b>{style.safe(variant)}</b>",
            font_color=marks[variant].color,
            x=1.01,
            xref="paper",
            y=y,
            xanchor="left",
            showarrow=False,
        )
    return figure


def _draw_band(figure: go.Figure, curve: pd.DataFrame, *, color: str) -> None:
    x = np.concatenate([curve["epoch"], curve["epoch"][::-1]])
    y = np.concatenate([curve["val_high"], curve["val_low"][::-1]])
    figure.add_scatter(
        x=x,
        y=y,
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=style.faded(color, opacity=0.14),
        hoverinfo="skip",
    )


def _curve_ceiling(curves: pd.DataFrame) -> float:
    """Top of the axis: the first epochs of a run may leave it, the rest stays inside."""
    if curves.empty:
        return 100.0
    late = curves[curves["epoch"] >= 1 + 0.1 * curves["epoch"].max()]
    top = float(np.nanmax(late[["train", "val_high"]].to_numpy()))
    return top * 1.08 or 1.0


def differences_data(
    comparisons: pd.DataFrame, variants: pd.DataFrame
) -> DifferencesData:
    """Each variant's difference from the reference."""
    rows = pd.DataFrame(
        {
            "variant": comparisons["variant"],
            "difference": comparisons["difference_pct"],
            "low": comparisons["ci_low"],
            "high": comparisons["ci_high"],
            "verdict": comparisons["verdict"],
            "n": comparisons["n_variant"],
        }
    ).dropna(subset=["difference"])
    reference = str(comparisons["reference"].iloc[0])
    counts = rows["verdict"].str.split().str[0].value_counts()
    words = [
        f"{counts[word]} {word}"
        for word in ("better", "worse", "equivalent", "undecided")
        if word in counts
    ]
    title = f"Against {reference}: {', '.join(words) or 'nothing to compare yet'}"
    note = (
        "Difference in test error, variant minus reference, with the interval that holds "
        "for all comparisons together at 95 %. Shaded: differences that count as none."
    )
    if len(rows) > MAX_DIFFERENCES:
        note += f" Drawn: the {MAX_DIFFERENCES} lowest of {len(rows):,}."
        lowest = rows.sort_values("difference").head(MAX_DIFFERENCES).index
        rows = rows.loc[sorted(lowest)]
    margin = float(comparisons["margin_pct"].iloc[0])
    return DifferencesData(
        title, note, rows.reset_index(drop=True), margin, tuple(variants["variant"])
    )


def differences_figure(data: DifferencesData) -> go.Figure:
    rows = data.rows
    figure = style.new_figure(data.title, height=150 + 42 * max(len(rows), 1))
    marks = style.marks(data.order)
    figure.add_vrect(
        x0=-data.margin,
        x1=data.margin,
        fillcolor=style.faded(style.NEUTRAL, opacity=0.16),
        line_width=0,
        layer="below",
    )
    figure.add_vline(x=0, line={"color": style.NEUTRAL, "width": 1})
    bars = {key: value for key, value in _bars(rows, "difference").items()}
    figure.add_scatter(
        x=rows["difference"],
        y=list(range(len(rows))),
        mode="markers",
        marker={
            "size": 12,
            "color": [marks[v].color for v in rows["variant"]],
            "symbol": [marks[v].symbol for v in rows["variant"]],
        },
        error_x=bars,
        text=[style.safe(v) for v in rows["variant"]],
        customdata=rows[["low", "high", "verdict"]].to_numpy(),
        hovertemplate="<b>%{text}</b>: %{x:+.2f} points, interval %{customdata[0]:+.2f} "
        "to %{customdata[1]:+.2f}, %{customdata[2]}<extra></extra>",
    )
    known = [abs(v) for c in ("low", "high", "difference") for v in rows[c].dropna()]
    reach = max([*known, data.margin]) * 1.12
    names = [
        f"<b>{style.safe(v)}</b><br>{w.split()[0]}"
        for v, w in zip(rows["variant"], rows["verdict"], strict=True)
    ]
    figure.update_layout(
        xaxis={
            "title": {
                "text": "better  \u2190  difference in test error (points)  \u2192  worse"
            },
            "range": [-reach, reach],
            "tickformat": "+.2~f",
        },
        yaxis={
            "tickmode": "array",
            "tickvals": list(range(len(rows))),
            "ticktext": names,
            "range": [len(rows) - 0.4, -0.6],
            "showgrid": False,
        },
    )
    return figure


def paper_data(
    variants: pd.DataFrame, comparisons: pd.DataFrame, *, paper: pd.DataFrame
) -> PaperData:
    """The paper's differences from its reference beside ours, variant by variant."""
    ours = comparisons[["variant", "difference_pct", "ci_low", "ci_high"]]
    rows = paper[["variant", "cardinality", "paper_difference"]].merge(
        ours, on="variant"
    )
    rows = rows.dropna(subset=["difference_pct"])
    rows = rows.set_axis(
        ["variant", "cardinality", "paper", "ours", "low", "high"], axis=1
    )
    name = str(paper["source"].iloc[0])
    if len(rows) == 0:
        title = "No variant of the paper is complete yet"
    else:
        inside = int(
            ((rows["low"] <= rows["paper"]) & (rows["paper"] <= rows["high"])).sum()
        )
        title = (
            f"The paper's difference lies inside our interval for {inside} of "
            f"{len(rows)} variants"
        )
    note = (
        f"{name}: another data set and longer training, so only differences from each "
        "one's own reference are set side by side. On the dashed line both agree."
    )
    return PaperData(title, note, rows, name, tuple(variants["variant"]))


def paper_figure(data: PaperData) -> go.Figure:
    rows = data.rows
    figure = style.new_figure(data.title, height=440)
    values = rows[["paper", "ours", "low", "high"]].to_numpy(dtype=float)
    known = [*values[~np.isnan(values)], 0.0]
    low, high = style.padded(min(known), max(known))
    paper_low, paper_high = style.padded(
        min([*rows["paper"], 0]), max([*rows["paper"], 0]), share=0.15
    )
    figure.add_scatter(
        x=[paper_low, paper_high],
        y=[paper_low, paper_high],
        mode="lines",
        line={"color": style.NEUTRAL, "dash": "dash", "width": 1.5},
        hoverinfo="skip",
    )
    marks = style.marks(data.order)
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
        text=[style.safe(v) for v in rows["variant"]],
        textposition="middle right",
        hovertemplate="<b>%{text}</b><br>paper %{x:+.2f}, ours %{y:+.2f}<extra></extra>",
        cliponaxis=False,
    )
    figure.update_layout(
        xaxis={
            "title": {"text": "paper: difference from its reference (points)"},
            "range": [paper_low, paper_high],
        },
        yaxis={
            "title": {"text": "this study: difference (points)"},
            "range": [low, high],
            "zeroline": True,
        },
    )
    return figure
