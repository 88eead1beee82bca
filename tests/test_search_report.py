"""What is said of a search."""

from __future__ import annotations

import pandas as pd
import pytest

from resnext_ablate.evidence import search_report
from resnext_ablate.records.tables import SearchTables


def search(*rows: tuple[str, float | None, float | None, bool]) -> SearchTables:
    """A search by the state, error, rank and audit of its nets."""
    names = ["state", "val_error_pct", "rank", "is_audited"]
    trials = pd.DataFrame(rows, columns=names)
    trials.insert(0, "variant", [f"net{number}" for number in range(len(rows))])
    nothing = pd.DataFrame()
    return SearchTables(trials=trials, runs=nothing, epochs=nothing, importance=nothing)


FINISHED = search(
    ("complete", 10.0, 1, False),
    ("complete", 30.0, None, False),
    ("pruned", None, None, False),
    ("pruned", 12.0, 2, True),
    ("pruned", 40.0, None, True),
    ("failed", None, None, False),
)


def test_false_prune_rate_has_its_n_and_interval() -> None:
    """One of two audited nets is among the best: 50 %, exact interval 1 to 99 %."""
    said = search_report.sentence(FINISHED)
    assert said.startswith(
        "6 nets tried: 2 trained to the end, 3 pruned, 1 failed. Of the pruned nets 2 "
        "were trained to the end all the same; 1 of them came among the best: "
    )
    assert said.endswith("false-prune rate 50 % (95 % interval 1 to 99 %).")


def test_without_an_audit_nothing_is_claimed() -> None:
    """Where no pruned net was trained to the end, the rate is not known."""
    said = search_report.sentence(
        search(("complete", 10.0, 1, False), ("pruned", None, None, False))
    )
    assert "nothing is known of the false-prune rate" in said
    assert "%" not in said


def test_without_pruning_nothing_is_said_of_it() -> None:
    """A search whose pruner stopped nothing has no false prunes to speak of."""
    said = search_report.sentence(search(("complete", 10.0, 1, False)))
    assert said == "1 nets tried: 1 trained to the end."


def test_best_nets_come_by_rank() -> None:
    """The audited net is the second best."""
    best = search_report.best(FINISHED)
    assert best["variant"].tolist() == ["net0", "net3"]


def test_the_finding_warns_of_the_winners_luck() -> None:
    """The page says that the errors of chosen nets flatter them."""
    (finding,) = search_report.of_search(FINISHED)
    assert "fresh seeds" in finding.text
    assert len(finding.table.frame) == 6
    assert search_report.of_search(None) == ()


@pytest.mark.parametrize("audited", [0, 3])
def test_an_audited_net_still_under_way_counts_nothing(audited: int) -> None:
    """Only audited nets that have ended enter the rate."""
    rows = [("pruned", None, None, True)] * audited
    found = search_report.false_prunes(search(("complete", 1.0, 1, False), *rows))
    assert (found.num_pruned, found.num_audited) == (audited, 0)
