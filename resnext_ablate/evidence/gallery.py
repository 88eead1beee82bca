"""The charts that a study has data for, drawn, in reading order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import pandas as pd
import plotly.graph_objects as go

from resnext_ablate.evidence import (
    charts,
    charts_compare,
    charts_cost,
    charts_ranking,
    figures,
    figures_compare,
    figures_cost,
    figures_ranking,
    ranks,
)

_SHORT_BUDGET = 4
"""The shorter budget of the rank chart is this fraction of the epochs."""


@dataclass(frozen=True)
class Figure:
    """A chart with the words around it."""

    key: str
    figure: go.Figure
    title: str
    note: str


def draw(
    runs: pd.DataFrame,
    epochs: pd.DataFrame,
    *,
    variants: pd.DataFrame,
    comparisons: pd.DataFrame,
    paper: pd.DataFrame,
    equal_pct: float,
) -> tuple[Figure, ...]:
    """All charts of a study.

    Args:
        runs: every finished run, failed ones too.
        epochs: of complete runs.
        variants, comparisons: the study's tables.
        paper: rows of the paper that belong to variants; may be empty.
        equal_pct: variants whose costs differ by no more than this are held equal.
    """
    complete = runs[runs["state"] == "complete"]
    if complete.empty:
        return ()
    return (
        *_errors(
            complete,
            variants=variants,
            comparisons=comparisons,
            paper=paper,
            equal_pct=equal_pct,
        ),
        *_compared(
            complete, epochs, variants=variants, comparisons=comparisons, paper=paper
        ),
        *_costs(runs, complete, variants=variants, equal_pct=equal_pct),
        *_ranked(epochs, variants=variants),
    )


def draw_search(
    trials: pd.DataFrame, importance: pd.DataFrame, *, sampler: str, pruner: str
) -> tuple[Figure, ...]:
    """The nets that a search has trained to the end, and what mattered in them.

    Args:
        trials: one row per net tried: variant, state, val_error_pct.
        importance: axis, importance, evaluator, seed, num_nets; may be empty.
        sampler, pruner: how nets were chosen, and how the worse ones were stopped.
    """
    ended = trials[trials["state"] == "complete"].dropna(subset=["val_error_pct"])
    if len(ended) < charts_ranking.MIN_DISTRIBUTION:
        return ()
    stopped = trials["state"].eq("pruned").any()
    is_uniform = sampler == "random" and not stopped
    chosen_by = f"{sampler} and {pruner}" if stopped else sampler
    data = charts_ranking.distribution_data(
        ended[["variant", "val_error_pct"]].set_axis(["variant", "error"], axis=1),
        is_uniform=is_uniform,
        sampler=chosen_by,
        measure="validation error",
    )
    drawn = _figure("search-nets", figures_ranking.distribution_figure, data)
    if importance.empty:
        return (drawn,)
    shares = charts_ranking.importance_data(
        importance, is_uniform=is_uniform, sampler=chosen_by
    )
    return (
        drawn,
        _figure("search-importance", figures_ranking.importance_figure, shares),
    )


def _errors(
    complete: pd.DataFrame,
    *,
    variants: pd.DataFrame,
    comparisons: pd.DataFrame,
    paper: pd.DataFrame,
    equal_pct: float,
) -> Iterator[Figure]:
    if variants["cardinality"].nunique() > 1:
        data = charts.cardinality_data(
            variants,
            complete,
            comparisons=comparisons,
            paper=paper,
            equal_pct=equal_pct,
        )
        yield _figure("error-cardinality", figures.cardinality_figure, data)
    if families := charts.families_data(variants, complete):
        yield _figure("families", figures.families_figure, families)
    for currency in charts.CURRENCIES if len(variants) > 1 else ():
        points = charts.complexity_data(
            variants, complete, currency=currency, equal_pct=equal_pct
        )
        yield _figure(f"error-{currency}", figures.points_figure, points)


def _compared(
    complete: pd.DataFrame,
    epochs: pd.DataFrame,
    *,
    variants: pd.DataFrame,
    comparisons: pd.DataFrame,
    paper: pd.DataFrame,
) -> Iterator[Figure]:
    if comparisons["difference_pct"].notna().any():
        against = charts_compare.differences_data(comparisons, variants, complete)
        yield _figure("differences", figures_compare.differences_figure, against)
    if paper["variant"].isin(comparisons["variant"]).any():
        beside = charts_compare.paper_data(
            variants, comparisons, runs=complete, paper=paper
        )
        if len(beside.rows):
            yield _figure("paper", figures_compare.paper_figure, beside)
    curves = charts_compare.curves_data(epochs, variants)
    if len(curves.curves):
        yield _figure("curves", figures_compare.curves_figure, curves)


def _costs(
    runs: pd.DataFrame,
    complete: pd.DataFrame,
    *,
    variants: pd.DataFrame,
    equal_pct: float,
) -> Iterator[Figure]:
    costs = charts_cost.costs_data(variants, complete)
    yield _figure("costs", figures_cost.costs_figure, costs)
    held_equal = charts.off_pct(variants, "macs") <= equal_pct
    if held_equal and variants["cardinality"].nunique() > 1:
        time = charts_cost.time_data(variants, complete)
        yield _figure("time-cardinality", figures.points_figure, time)
    if len(variants) > 1:
        pareto = charts_cost.pareto_data(variants, complete)
        yield _figure("pareto", figures_cost.pareto_figure, pareto)
    timeline = charts_cost.timeline_data(runs, tuple(variants["variant"]))
    yield _figure("timeline", figures_cost.timeline_figure, timeline)


def _ranked(epochs: pd.DataFrame, *, variants: pd.DataFrame) -> Iterator[Figure]:
    known = variants.dropna(subset=["test_error_pct_mean"])
    if len(known) >= charts_ranking.MIN_DISTRIBUTION:
        nets = known[["variant", "test_error_pct_mean"]]
        distribution = charts_ranking.distribution_data(
            nets.set_axis(["variant", "error"], axis=1),
            is_uniform=False,
            sampler="the study file",
        )
        yield _figure("distribution", figures_ranking.distribution_figure, distribution)
    last = int(epochs["epoch"].max())
    # A large study's page keeps some epochs only.
    earlier = [e for e in sorted(epochs["epoch"].unique()) if e <= last / _SHORT_BUDGET]
    if len(known) < 3 or not earlier:
        return
    short = int(earlier[-1])
    agreement = ranks.agreement(
        charts_ranking.errors_after(epochs, short),
        charts_ranking.errors_after(epochs, last),
    )
    if agreement is None:
        return
    budgets = charts_ranking.budgets_data(
        epochs, short_epoch=short, agreement=agreement
    )
    yield _figure("budgets", figures_ranking.budgets_figure, budgets)


class _Worded(Protocol):
    @property
    def title(self) -> str: ...

    @property
    def note(self) -> str: ...


_Data = TypeVar("_Data", bound=_Worded)


def _figure(key: str, draw: Callable[[_Data], go.Figure], data: _Data) -> Figure:
    return Figure(key, draw(data), data.title, data.note)
