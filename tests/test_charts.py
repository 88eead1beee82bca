"""The numbers and findings behind the charts, and that they draw."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import synthetic

from resnext_ablate.evidence import (
    chart_style,
    charts,
    charts_compare,
    charts_cost,
    charts_ranking,
    drawing,
    figures,
    figures_compare,
    figures_cost,
    figures_ranking,
    gallery,
    image_tests,
    report,
)
from resnext_ablate.evidence.ranks import Agreement
from resnext_ablate.numbers.verdicts import Rules, compare
from resnext_ablate.records.tables import StudyTables

Frames = tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]


def _frames(tables: StudyTables) -> Frames:
    complete = tables.runs[tables.runs["state"] == "complete"]
    variants = report.variants_table(tables.nets, complete)
    runs = report.errors_by_seed(tables.nets, complete)
    found = compare(runs, reference=str(variants["variant"].iloc[0]), rules=Rules(0.5))
    by_image = image_tests.compare_images(found, correct=tables.correct)
    return variants, complete, report.comparisons_table(found, by_image)


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
    data = charts.complexity_data(variants, runs, currency="macs", equal_pct=5)
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
        variants, runs, comparisons=comparisons, paper=PAPER.iloc[:0], equal_pct=5
    )
    means = variants.set_index("variant")["test_error_pct_mean"]
    best = means.idxmin()
    lead = means["1x16d"] - means.min()
    assert main.title == (
        f"Lowest mean test error at FLOPs equal within 2.6 %: {best}, {lead:.2f} "
        "points below 1x16d (better)"
    )
    apart = means.max() - means.min()
    flops = charts.complexity_data(variants, runs, currency="macs", equal_pct=5)
    assert flops.title == (
        f"FLOPs equal within 2.6 %, mean test errors {apart:.2f} points apart"
    )
    strict = charts.complexity_data(variants, runs, currency="macs", equal_pct=2.5)
    assert "equal" not in strict.title
    strict_main = charts.cardinality_data(
        variants, runs, comparisons=comparisons, paper=PAPER, equal_pct=2.5
    )
    assert "equal" not in strict_main.title
    time = charts_cost.time_data(variants, runs)
    assert time.title.startswith("Equal FLOPs, unequal time: 32x1d takes 2.8 times")
    assert time.log2_x
    assert time.from_zero


def test_error_against_unequal_flops() -> None:
    """Where FLOPs differ the title tells the trend, and how much each cost differs."""
    tables = synthetic.study(sd=0.05, effects=(0.0, -0.5, -1.0, -1.5, -2.0))
    growth = [2.0**i for i in range(5)]
    tables.nets["macs"] = [round(47e6 * factor) for factor in growth]
    tables.nets["macs_error_pct"] = [100 * (factor - 1) for factor in growth]
    variants, runs, _ = _frames(tables)
    data = charts.complexity_data(variants, runs, currency="macs", equal_pct=5)
    assert data.title == "Test error falls with FLOPs (rank correlation -1.00)"
    costs = charts_cost.costs_data(variants, runs)
    assert costs.title.startswith("FLOPs differ by a factor of 16.00, activations ")


def test_paper_is_shown_as_differences(frames: Frames) -> None:
    """The paper's errors never share an axis with ours, its differences do."""
    variants, runs, comparisons = frames
    data = charts.cardinality_data(
        variants, runs, comparisons=comparisons, paper=PAPER, equal_pct=5
    )
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
    variants, runs, comparisons = frames
    ours = comparisons.set_index("variant")["difference_pct"]
    paper = PAPER.assign(paper_difference=[0.0, ours["2x10d"] + 0.01, -9.0])
    data = charts_compare.paper_data(variants, comparisons, runs=runs, paper=paper)
    assert data.rows["variant"].tolist() == ["2x10d", "32x1d"]
    assert data.title.endswith("inside our interval for 1 of 2 variants")


def test_curves_are_means_with_the_seeds_range() -> None:
    """At each epoch the mean of the seeds, and the least and greatest of them."""
    tables = synthetic.study(num_seeds=2)
    variants, _, _ = _frames(tables)
    data = charts_compare.curves_data(tables.epochs, variants)
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
    data = charts_compare.curves_data(epochs, variants)
    curve = data.curves[data.curves["variant"] == "2x10d"]
    assert curve["n"].unique().tolist() == [2]


def test_many_variants_are_thinned_and_say_so() -> None:
    """Beyond what can be read, less is drawn and the note tells how much."""
    tables = synthetic.study(num_variants=70, num_seeds=2, num_epochs=4, paper=None)
    variants, runs, comparisons = _frames(tables)
    points = charts.complexity_data(variants, runs, currency="params", equal_pct=5)
    assert points.seeds.empty
    assert "70 variants" in points.note
    curves = charts_compare.curves_data(tables.epochs, variants)
    assert curves.curves["variant"].nunique() == charts_compare.MAX_CURVES
    assert "6 of 70 variants" in curves.note
    assert "1x16d" in set(curves.curves["variant"])
    differences = charts_compare.differences_data(comparisons, variants, runs)
    assert len(differences.rows) == charts_compare.MAX_DIFFERENCES
    assert "the 30 lowest of 69" in differences.note


def test_one_run_has_no_interval() -> None:
    """With one seed points are drawn without bars, and the note says why."""
    variants, runs, _ = _frames(synthetic.study(num_seeds=1))
    data = charts.complexity_data(variants, runs, currency="macs", equal_pct=5)
    assert data.points["low"].isna().all()
    assert "one run only" in data.note
    bars = figures.points_figure(data).data[-1].error_y
    assert not any(bars.array)
    assert not any(bars.arrayminus)


def test_curves_differ_by_more_than_colour(frames: Frames) -> None:
    """Any two variants differ in symbol; training and validation differ in dash."""
    variants, _, _ = frames
    data = charts_compare.curves_data(synthetic.study().epochs, variants)
    drawn = figures_compare.curves_figure(data)
    solid = [t for t in drawn.data if t.line.dash == "solid"]
    assert len(solid) == 5
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
    variants, _, comparisons = _frames(tables)
    drawn = gallery.draw(
        tables.runs,
        tables.epochs,
        variants=variants,
        comparisons=comparisons,
        paper=PAPER.iloc[:0],
        equal_pct=5,
    )
    # The reference itself is not among the differences.
    drawn_figures = [one.figure for one in drawn if one.key != "differences"]
    assert len(drawn_figures) == 9
    for figure in drawn_figures:
        # What links a point to its net is plain text that plotly never shows.
        figure.update_traces(customdata=None)
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
    assert figures_compare._curve_range(short) == (40.0, 90.0)
    assert figures_compare._curve_range(long) == (40.0, 60.0)


def test_every_seed_is_drawn(frames: Frames) -> None:
    """Each chart of errors or times holds all 15 runs as single points."""
    variants, runs, comparisons = frames
    epochs = synthetic.study().epochs
    paper = charts_compare.paper_data(variants, comparisons, runs=runs, paper=PAPER)
    assert len(charts_compare.curves_data(epochs, variants).seeds) == 15 * 20
    assert len(charts_cost.costs_data(variants, runs).time.seeds) == 15
    assert len(charts_cost.pareto_data(variants, runs).seeds) == 15
    # Differences are drawn for what is compared: four variants, and two of the paper.
    assert len(charts_compare.differences_data(comparisons, variants, runs).seeds) == 12
    assert len(paper.seeds) == 6
    mean = paper.seeds.groupby("variant")["difference"].mean()
    ours = paper.rows.set_index("variant")["ours"]
    assert mean.to_dict() == pytest.approx(ours.to_dict())


def test_families_grow_the_reference_in_one_way() -> None:
    """A net belongs to the family that changed it; slopes are per doubling."""
    tables = synthetic.study(sd=0.0, effects=(0.0, -0.4, -0.8, -1.0, -2.0))
    tables.nets["cardinality"] = [4, 4, 4, 8, 16]
    tables.nets["base_width"] = [8, 16, 32, 8, 8]
    tables.nets["params"] = [100_000, 200_000, 400_000, 200_000, 400_000]
    variants, runs, _ = _frames(tables)
    data = charts.families_data(variants, runs)
    assert data is not None
    members = data.points.groupby("family")["variant"].apply(list).to_dict()
    assert members == {
        "width": ["1x16d", "2x10d", "4x6d"],
        "cardinality": ["1x16d", "8x3d", "32x1d"],
    }
    assert data.title == (
        "Points of test error per doubling of parameters: width -0.40, "
        "cardinality -1.00"
    )
    drawn = figures.families_figure(data)
    lines = [trace for trace in drawn.data if trace.mode == "lines+markers"]
    assert len({trace.line.dash for trace in lines}) == 2
    assert len({trace.marker.symbol for trace in lines}) == 2


def test_matched_study_has_no_families(frames: Frames) -> None:
    """Nets of one size grow in no way, so the chart is not drawn."""
    variants, runs, _ = frames
    assert charts.families_data(variants, runs) is None


def test_costs_say_how_far_time_strays_from_flops(frames: Frames) -> None:
    """Equal FLOPs, more activations and more time: each as a factor in the title."""
    variants, runs, _ = frames
    data = charts_cost.costs_data(variants, runs)
    time = variants["time_per_image_ms_mean"]
    assert data.title == (
        "FLOPs differ by a factor of 1.04, activations differ by a factor of 1.30, "
        f"time by one of {time.max() / time.min():.2f}"
    )
    assert data.activations.points["mean"].tolist() == variants["activations"].tolist()
    drawn = figures_cost.costs_figure(data)
    assert {trace.yaxis for trace in drawn.data} == {"y", "y2"}


def test_costs_prefer_the_measured_step(frames: Frames) -> None:
    """Where the certificate timed a step, that time is shown, in ms."""
    variants, runs, _ = frames
    step = np.array([10.0, 12.0, 14.0, 16.0, 25.0])
    timed = variants.assign(
        step_time_ms=step, step_time_ms_low=step - 0.1, step_time_ms_high=step + 0.1
    )
    data = charts_cost.costs_data(timed, runs)
    assert data.time.points["mean"].tolist() == [10.0, 12.0, 14.0, 16.0, 25.0]
    assert data.time.y_title == "training step (ms)"
    assert data.title.endswith("time by one of 2.50")


def test_pareto_keeps_what_nothing_beats(frames: Frames) -> None:
    """A variant is faded when another is no worse in both and better in one."""
    variants, runs, _ = frames
    shown = variants.assign(
        test_error_pct_mean=[5.0, 4.0, 4.0, 3.0, 6.0],
        time_per_image_ms_mean=[1.0, 2.0, 3.0, 3.0, 1.0],
    )
    data = charts_cost.pareto_data(shown, runs)
    assert data.points["dominated"].tolist() == [False, False, True, False, True]
    assert data.title.endswith("on average: 1x16d, 2x10d, 8x3d")
    drawn = figures_cost.pareto_figure(data)
    assert drawn.data[-1].marker.opacity == (1.0, 1.0, 0.35, 1.0, 0.35)
    assert drawn.data[0].line.shape == "hv"


def test_timeline_packs_runs_into_lanes() -> None:
    """Runs at the same time lie in lanes of their own, others share one."""
    runs = pd.DataFrame(
        {
            "variant": ["a", "b", "a", "b"],
            "seed": [0, 0, 1, 1],
            "state": ["complete", "complete", "failed", "complete"],
            "reason": ["", "", "lost", ""],
            "started_at": [
                "2026-01-02T03:00:00+00:00",
                "2026-01-02T03:01:00+00:00",
                "2026-01-02T03:05:00+00:00",
                "2026-01-02T03:10:00+00:00",
            ],
            "train_time_s": [240.0, 600.0, math.nan, 120.0],
        }
    )
    data = charts_cost.timeline_data(runs, ("a", "b"))
    assert data.bars["lane"].tolist() == [0, 1, 0, 0]
    assert data.bars["start"].tolist() == [0.0, 1.0, 5.0, 10.0]
    assert data.unit == "min"
    assert data.title == "4 runs, 1 failed: 16.0 min of training within 12.0 min"
    bars, crosses = figures_cost.timeline_figure(data).data
    assert len(bars.x) == 3
    assert list(crosses.x) == [5.0]


def test_distribution_band_is_the_bootstrap_of_shares() -> None:
    """Shares climb by ties; the band holds 95 % of resampled shares."""
    nets = pd.DataFrame({"variant": list("abcdefghij"), "error": [*range(9), 8.0]})
    data = charts_ranking.distribution_data(nets, is_uniform=True, sampler="uniform")
    assert data.steps["share"].tolist() == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0]
    )
    rng = np.random.default_rng(0)
    draws = rng.choice(nets["error"].to_numpy(), size=(20_000, 10))
    shares = (draws <= 4.0).mean(axis=1)
    row = data.steps.iloc[4]
    assert row["low"] == pytest.approx(np.quantile(shares, 0.025), abs=1e-9)
    assert row["high"] == pytest.approx(np.quantile(shares, 0.975), abs=1e-9)
    assert data.badge == ""
    assert not figures_ranking.distribution_figure(data).layout.annotations


IMPORTANCE = pd.DataFrame(
    {
        "axis": ["depth", "width"],
        "importance": [0.2, 0.8],
        "evaluator": "fANOVA",
        "seed": 0,
        "num_nets": 12,
    }
)


def test_searched_nets_carry_a_badge() -> None:
    """What a search has drawn is never shown as the space: title, note and plot."""
    nets = pd.DataFrame({"variant": list("abcdefgh"), "error": range(8)})
    data = charts_ranking.distribution_data(
        nets, is_uniform=False, sampler="TPE", measure="validation error"
    )
    assert data.title.endswith("(not a uniform sample)")
    assert "chosen by TPE" in data.note
    (badge,) = figures_ranking.distribution_figure(data).layout.annotations
    assert badge.text == "not a uniform sample: chosen by TPE"
    importance = charts_ranking.importance_data(
        IMPORTANCE, is_uniform=False, sampler="TPE"
    )
    assert importance.axes["axis"].tolist() == ["width", "depth"]
    assert importance.axes["importance"].tolist() == [0.8, 0.2]
    assert importance.title == (
        "width explains most of the validation error (80 % of what the axes explain)"
    )
    assert "fANOVA (seed 0) over 12 nets" in importance.note
    assert "where TPE looked" in importance.note
    drawn = figures_ranking.importance_figure(importance)
    assert drawn.layout.annotations[-1].text == badge.text


def test_budgets_tell_ranks_and_their_uncertainty() -> None:
    """Ranks at both budgets, tau with interval, and what noise alone allows."""
    rows = [
        (variant, seed, epoch, error + 0.1 * seed)
        for variant, first, last in (("a", 30.0, 5.0), ("b", 20.0, 6.0), ("c", 40.0, 7))
        for seed in (0, 1)
        for epoch, error in ((1, first), (2, 15.0), (4, last))
    ]
    epochs = pd.DataFrame(rows, columns=["variant", "seed", "epoch", "val_error_pct"])
    agreement = Agreement(1 / 3, low=-0.5, high=1.0, ceiling=0.7, num_variants=4)
    data = charts_ranking.budgets_data(epochs, short_epoch=1, agreement=agreement)
    assert data.points["short_rank"].tolist() == [2, 1, 3]
    assert data.points["long_rank"].tolist() == [1, 2, 3]
    assert data.points["x"].tolist() == pytest.approx([30.05, 20.05, 40.05])
    assert len(data.seeds) == 6
    assert data.title == (
        "Rank correlation +0.33 between 1 and 4 epochs: a, best after 4, is 2nd after 1"
    )
    assert "+0.33 [-0.50, +1.00]" in data.note
    assert "hold tau at +0.70" in data.note
    assert figures_ranking.budgets_figure(data).layout.xaxis.title.text == (
        "validation error after 1 epoch (%)"
    )


def test_a_study_gets_its_charts_in_reading_order(frames: Frames) -> None:
    """A matched study with the paper beside it has eleven charts, each with a note."""
    variants, _, comparisons = frames
    tables = synthetic.study()
    drawn = gallery.draw(
        tables.runs,
        tables.epochs,
        variants=variants,
        comparisons=comparisons,
        paper=PAPER,
        equal_pct=5,
    )
    assert [one.key for one in drawn] == [
        "error-cardinality",
        "error-macs",
        "error-params",
        "differences",
        "paper",
        "curves",
        "costs",
        "time-cardinality",
        "pareto",
        "timeline",
        "budgets",
    ]
    assert all(one.title and one.note.endswith(".") for one in drawn)


@pytest.mark.parametrize(
    ("sampler", "num_pruned", "badge"),
    [
        ("random", 0, ""),
        ("random", 3, "not a uniform sample: chosen by random and asha"),
        ("tpe", 0, "not a uniform sample: chosen by tpe"),
    ],
)
def test_search_shows_its_nets_for_what_they_are(
    sampler: str, num_pruned: int, badge: str
) -> None:
    """Nets drawn uniformly and all trained are a distribution; others carry a badge."""
    trials = pd.DataFrame(
        {
            "variant": [f"net{i}" for i in range(12)],
            "state": ["pruned"] * num_pruned + ["complete"] * (12 - num_pruned),
            "val_error_pct": [float(i) for i in range(12)],
        }
    )
    drawn, importance = gallery.draw_search(
        trials, IMPORTANCE, sampler=sampler, pruner="asha"
    )
    assert importance.figure.data[0].x.tolist() == [0.8, 0.2]
    assert drawn.title.startswith(f"Half of {12 - num_pruned} nets have a validation")
    assert [one.text for one in drawn.figure.layout.annotations] == (
        [badge] if badge else []
    )
    few = trials.iloc[-4:]
    nothing = IMPORTANCE.iloc[:0]
    assert gallery.draw_search(few, nothing, sampler=sampler, pruner="asha") == ()


def test_names_keep_clear_of_each_other_and_of_the_edge() -> None:
    """Near points send their names apart; the rightmost writes to the left."""
    x = pd.Series([0.0, 0.4, 0.5, 0.6, 1.0])
    y = pd.Series([0.0, 0.5, 0.5, 0.5, 1.0])
    names = ["1x16d", "2x10d", "4x6d", "8x3d", "32x1.2.3d"]
    places = drawing.name_places(x, y, names)
    assert places[0] == places[3] == "middle right"
    assert places[1] == "middle left" and places[2] == "top right"
    assert places[4] == "middle left"
    assert drawing.name_places(x[:1], y[:1], names[:1]) == ["middle right"]


def test_heights_that_start_at_zero_crowd_sooner() -> None:
    """What is far apart between its ends is near on an axis from zero."""
    x, y = pd.Series([0.0, 0.01, 1.0]), pd.Series([100.0, 101.0, 102.0])
    names = ["1x16d", "2x10d", "4x6d"]
    assert len(set(drawing.name_places(x, y, names)[:2])) == 1
    assert len(set(drawing.name_places(x, y, names, from_zero=True)[:2])) == 2


def test_names_at_the_ends_of_curves_have_room() -> None:
    """The margin takes the longest name, and no more than a third of a chart."""
    figure = chart_style.new_figure("t", height=400)
    for names, margin in (["1x16d"], 84), (["32x1.2.3d-t16"], 134), (["n" * 90], 240):
        marks = chart_style.marks(names)
        drawing.draw_end_names(figure, names, heights=[1.0], marks=marks)
        assert figure.layout.margin.r == margin
