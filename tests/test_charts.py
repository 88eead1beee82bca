"""The numbers and findings behind the charts, and that they draw."""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go
import pytest
import synthetic

from resnext_ablate import chart_style, charts, figures, report
from resnext_ablate.tables import StudyTables
from resnext_ablate.verdicts import compare

Frames = tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]


def _frames(tables: StudyTables) -> Frames:
    complete = tables.runs[tables.runs["state"] == "complete"]
    variants = report.variants_table(tables.nets, complete)
    runs = {
        variant: complete.loc[complete["variant"] == variant, "test_error_pct"]
        for variant in variants["variant"]
    }
    found = compare(runs, reference=str(variants["variant"].iloc[0]), margin=0.5)
    return variants, complete, report.comparisons_table(found)


@pytest.fixture(scope="module")
def frames() -> Frames:
    return _frames(synthetic.study(sd=0.05))


PAPER = pd.DataFrame(
    {
        "variant": ["1x16d", "2x10d", "32x1d"],
        "setting": ["1x64d", "2x40d", "32x4d"],
        "cardinality": [1, 2, 32],
        "paper_difference": [0.0, -0.9, -1.7],
        "model": "ResNet-50",
        "source": "arXiv:1611.05431v2, Table 3",
    }
)


def test_points_hold_every_seed_and_mean(frames: Frames) -> None:
    """Means, intervals and single seeds are those of the runs."""
    variants, runs, _ = frames
    data = charts.complexity_data(variants, runs, currency="macs")
    assert len(data.seeds) == len(runs) == 15
    by_hand = runs.groupby("variant")["test_error_pct"].mean()
    points = data.points.set_index("variant")
    assert points["mean"].to_dict() == pytest.approx(by_hand.to_dict())
    assert points.loc["2x10d", "x"] == 47_423_000
    assert (points["low"] < points["mean"]).all()
    assert data.x_title == "FLOPs (multiply-adds, as in the paper)"


def test_titles_state_what_the_data_show(frames: Frames) -> None:
    """Titles name the best variant, its lead, what is held and what is not."""
    variants, runs, comparisons = frames
    main = charts.cardinality_data(
        variants, runs, comparisons=comparisons, paper=PAPER.iloc[:0]
    )
    means = variants.set_index("variant")["test_error_pct_mean"]
    best = means.idxmin()
    lead = means["1x16d"] - means.min()
    assert main.title == (
        f"Lowest mean test error at FLOPs equal within 2.6 %: {best}, {lead:.2f} "
        "points below 1x16d (better)"
    )
    apart = means.max() - means.min()
    flops = charts.complexity_data(variants, runs, currency="macs")
    assert flops.title == (
        f"FLOPs equal within 2.6 %, mean test errors {apart:.2f} points apart"
    )
    time = charts.time_data(variants, runs)
    assert time.title.startswith("Equal FLOPs, unequal time: 32x1d takes 2.8 times")
    assert time.log2_x
    assert time.from_zero


def test_error_against_unequal_flops() -> None:
    """Where FLOPs differ the title tells the trend, and time is drawn against them."""
    tables = synthetic.study(sd=0.05, effects=(0.0, -0.5, -1.0, -1.5, -2.0))
    growth = [2.0**i for i in range(5)]
    tables.nets["macs"] = [round(47e6 * factor) for factor in growth]
    tables.nets["macs_error_pct"] = [100 * (factor - 1) for factor in growth]
    variants, runs, _ = _frames(tables)
    data = charts.complexity_data(variants, runs, currency="macs")
    assert data.title == "Test error falls with FLOPs (rank correlation -1.00)"
    time = charts.time_data(variants, runs)
    assert not time.log2_x
    assert not time.title.startswith("Equal")


def test_paper_is_shown_as_differences(frames: Frames) -> None:
    """The paper's errors never share an axis with ours, its differences do."""
    variants, runs, comparisons = frames
    data = charts.cardinality_data(variants, runs, comparisons=comparisons, paper=PAPER)
    paper = data.differences[data.differences["source"] == "paper"]
    assert paper["difference"].tolist() == [0.0, -0.9, -1.7]
    ours = data.differences[data.differences["source"] == "ours"]
    assert ours["difference"].iloc[0] == 0
    drawn = figures.cardinality_figure(data)
    lower = [trace for trace in drawn.data if trace.yaxis == "y2"]
    assert {trace.marker.symbol for trace in lower} == {"circle", "diamond-open"}
    upper = [y for t in drawn.data if t.yaxis != "y2" for y in t.y]
    assert max(upper) < 10  # Nothing near the paper's 22 to 24 %.


def test_paper_verdict_counts_intervals(frames: Frames) -> None:
    """The title counts the paper's differences that lie inside our intervals."""
    variants, _, comparisons = frames
    ours = comparisons.set_index("variant")["difference_pct"]
    paper = PAPER.assign(paper_difference=[0.0, ours["2x10d"] + 0.01, -9.0])
    data = charts.paper_data(variants, comparisons, paper=paper)
    assert data.rows["variant"].tolist() == ["2x10d", "32x1d"]
    assert data.title.endswith("inside our interval for 1 of 2 variants")


def test_curves_are_means_with_the_seeds_range() -> None:
    """At each epoch the mean of the seeds, and the least and greatest of them."""
    tables = synthetic.study(num_seeds=2)
    variants, _, _ = _frames(tables)
    data = charts.curves_data(tables.epochs, variants)
    epochs = tables.epochs
    last = epochs[(epochs["variant"] == "4x6d") & (epochs["epoch"] == 20)]
    curve = data.curves[data.curves["variant"] == "4x6d"].iloc[-1]
    assert curve["val"] == pytest.approx(last["val_error_pct"].mean())
    assert curve["val_low"] == last["val_error_pct"].min()
    assert curve["val_high"] == last["val_error_pct"].max()
    assert curve["n"] == 2
    assert data.title.startswith("After 20 epochs the mean validation error is ")


def test_curves_of_failed_runs_are_left_out() -> None:
    """A run that stopped early bends no mean curve."""
    tables = synthetic.study(failed={(1, 0): "non-finite loss"})
    variants, complete, _ = _frames(tables)
    epochs = report.epochs_of(tables.epochs, complete)
    data = charts.curves_data(epochs, variants)
    curve = data.curves[data.curves["variant"] == "2x10d"]
    assert curve["n"].unique().tolist() == [2]


def test_many_variants_are_thinned_and_say_so() -> None:
    """Beyond what can be read, less is drawn and the note tells how much."""
    tables = synthetic.study(num_variants=70, num_seeds=2, num_epochs=4, paper=None)
    variants, runs, comparisons = _frames(tables)
    points = charts.complexity_data(variants, runs, currency="params")
    assert points.seeds.empty
    assert "70 variants" in points.note
    curves = charts.curves_data(tables.epochs, variants)
    assert curves.curves["variant"].nunique() == charts.MAX_CURVES
    assert "6 of 70 variants" in curves.note
    assert "1x16d" in set(curves.curves["variant"])
    differences = charts.differences_data(comparisons, variants)
    assert len(differences.rows) == charts.MAX_DIFFERENCES
    assert "the 30 lowest of 69" in differences.note


def test_one_run_has_no_interval() -> None:
    """With one seed points are drawn without bars, and the note says why."""
    variants, runs, _ = _frames(synthetic.study(num_seeds=1))
    data = charts.complexity_data(variants, runs, currency="macs")
    assert data.points["low"].isna().all()
    assert "one run only" in data.note
    bars = figures.points_figure(data).data[-1].error_y
    assert not any(bars.array)
    assert not any(bars.arrayminus)


def test_curves_differ_by_more_than_colour(frames: Frames) -> None:
    """Any two variants differ in symbol; training and validation differ in dash."""
    variants, _, _ = frames
    data = charts.curves_data(synthetic.study().epochs, variants)
    drawn = figures.curves_figure(data)
    solid = [t for t in drawn.data if t.line.dash == "solid"]
    assert len({trace.marker.symbol for trace in solid}) == 5
    assert sum(trace.line.dash == "dash" for trace in drawn.data) == 5


def test_first_marks_are_distinct() -> None:
    """Colour and symbol both differ for six, their pairs for 36."""
    marks = list(chart_style.marks([str(i) for i in range(36)]).values())
    assert len({mark.color for mark in marks[:6]}) == 6
    assert len({mark.symbol for mark in marks[:6]}) == 6
    assert len(set(marks)) == 36


def test_labels_are_spread() -> None:
    """Labels keep their order and a gap, and move no more than they must."""
    placed = chart_style.spread([5.0, 5.1, 9.0], gap=1.0)
    assert placed == pytest.approx([4.55, 5.55, 9.0])
    assert chart_style.spread([1.0, 1.0, 1.9], gap=1.0) == pytest.approx(
        [0.3, 1.3, 2.3]
    )
    assert chart_style.spread([], gap=1.0) == []


def test_labels_cannot_carry_markup(frames: Frames) -> None:
    """Angle brackets of a label reach the figure as entities."""
    hostile = "<img src=x onerror=alert(1)>"
    labels = [hostile, "b", "c", "d", "e"]
    tables = synthetic.study(labels=labels, paper=None)
    variants, runs, comparisons = _frames(tables)
    drawn: list[go.Figure] = [
        figures.points_figure(charts.complexity_data(variants, runs, currency="macs")),
        figures.curves_figure(charts.curves_data(tables.epochs, variants)),
        figures.cardinality_figure(
            charts.cardinality_data(
                variants, runs, comparisons=comparisons, paper=PAPER.iloc[:0]
            )
        ),
    ]
    for figure in drawn:
        assert "<img" not in str(figure.to_dict())
        assert "&lt;img" in str(figure.to_dict())


@pytest.mark.parametrize(
    ("value", "expected"),
    [(4_089_184_256, "4.09 G"), (47_000_000, "47 M"), (310_000, "310 k"), (64, "64")],
)
def test_counts(value: float, expected: str) -> None:
    """Counts carry three digits and an SI prefix."""
    assert chart_style.count(value) == expected


def test_log2_axis_ticks_at_the_values() -> None:
    """Cardinalities are the ticks, equally spaced by doublings."""
    axis = chart_style.log2_axis([1, 2, 32])
    assert axis["tickvals"] == [1, 2, 32]
    low, high = axis["range"]
    assert low < 0
    assert high > math.log10(32)


def test_short_curves_stay_inside_whole() -> None:
    """A run of three epochs shows its first one; a long one may leave it above."""
    columns = {"train": 50.0, "val_low": 40.0, "val_high": 60.0}
    short = pd.DataFrame([{"epoch": 1, **columns, "val_high": 90.0}])
    short = pd.concat([short, pd.DataFrame([{"epoch": 3, **columns}])])
    long = pd.concat([short, pd.DataFrame([{"epoch": 100, **columns}])])
    assert figures._curve_range(short) == (40.0, 90.0)
    assert figures._curve_range(long) == (40.0, 60.0)
