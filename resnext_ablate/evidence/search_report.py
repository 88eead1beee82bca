"""What a search came to, in words and in a table of its best nets."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from scipy.stats import binomtest

from resnext_ablate.evidence.page import Column, Finding, Table
from resnext_ablate.records.tables import SearchTables

_LEVEL = 0.95
_COLUMNS = (
    Column("trial", "trial", digits=0),
    Column("variant", "net", "text"),
    Column("state", "state", "text"),
    Column("rank", "rank", digits=0),
    Column("val_error_pct", "val error (%)"),
    Column("epochs", "epochs", digits=0),
    Column("pruned_at", "pruned at", digits=0),
    Column("macs_error_pct", "FLOPs off (%)", signed=True),
    Column("params", "params", digits=0),
)


@dataclass(frozen=True, kw_only=True)
class FalsePrunes:
    """What the pruned nets that were trained to the end tell of the pruning."""

    num_pruned: int
    num_audited: int
    """Of the pruned ones, trained to the end."""
    num_false: int
    """Of the audited ones, those among the best nets all the same."""


def of_search(search: SearchTables | None) -> tuple[Finding, ...]:
    """All nets that a search has tried; nothing where there was no search."""
    if search is None or search.trials.empty:
        return ()
    text = (
        f"{sentence(search)} Nets were stopped and chosen by validation error alone. "
        "The best look better here than they are, since that is why they were chosen: "
        "the results above come from fresh seeds."
    )
    table = Table("search", "Search: the nets tried", "", search.trials, _COLUMNS)
    return (Finding(text, table),)


def sentence(search: SearchTables) -> str:
    """How many nets were tried and pruned, and how often pruning was wrong."""
    states = search.trials["state"].value_counts()
    told = [
        f"{states[state]} {words}"
        for state, words in (
            ("complete", "trained to the end"),
            ("pruned", "pruned"),
            ("failed", "failed"),
            ("running", "under way"),
        )
        if state in states
    ]
    tried = f"{len(search.trials)} nets tried: {', '.join(told)}."
    return f"{tried} {_of_pruning(search)}".strip()


def best(search: SearchTables) -> pd.DataFrame:
    """The chosen nets, best first."""
    ranked = search.trials.dropna(subset="rank")
    return ranked.sort_values("rank").reset_index(drop=True)


def false_prunes(search: SearchTables) -> FalsePrunes:
    """How many pruned nets are among the best, of those trained to the end."""
    trials = search.trials
    audited = trials[
        trials["is_audited"].astype(bool) & trials["val_error_pct"].notna()
    ]
    return FalsePrunes(
        num_pruned=int((trials["state"] == "pruned").sum()),
        num_audited=len(audited),
        num_false=int(audited["rank"].notna().sum()),
    )


def _of_pruning(search: SearchTables) -> str:
    found = false_prunes(search)
    if not found.num_pruned:
        return ""
    if not found.num_audited:
        return (
            "No pruned net was drawn to be trained to the end, so nothing is known of "
            "the false-prune rate."
        )
    interval = binomtest(found.num_false, found.num_audited).proportion_ci(_LEVEL)
    rate = found.num_false / found.num_audited
    return (
        f"Of the pruned nets {found.num_audited} were trained to the end all the same; "
        f"{found.num_false} of them came among the best: false-prune rate "
        f"{100 * rate:.0f} % (95 % interval {100 * interval.low:.0f} to "
        f"{100 * interval.high:.0f} %)."
    )
