"""Two studies side by side: nets of both, each one's differences, settings that differ.

A net that both studies trained is compared directly, all such nets as one family, and
the orders of such nets by their rank correlation: what short runs say of long ones.
Nets that only one has, such as those of another currency held equal, stand beside each
other by cardinality, each with its difference from its own study's reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.evidence import (
    charts_ranking,
    charts_studies,
    figures_ranking,
    figures_studies,
    page,
    ranks,
    report,
)
from resnext_ablate.evidence.gallery import Figure
from resnext_ablate.evidence.page import Column, Table
from resnext_ablate.evidence.ranks import Agreement
from resnext_ablate.evidence.report_page import Evidence
from resnext_ablate.numbers import families
from resnext_ablate.records.config import differences
from resnext_ablate.records.tables import StudyTables

_LEVEL = 0.05
_KEY = ("name", "question", "report.paper")
"""Settings that tell studies apart and change no number."""


@dataclass(frozen=True)
class StudyPair:
    """What two studies say together."""

    names: tuple[str, str]
    verdict: str
    nets: pd.DataFrame
    """One row per net of both studies, or per pair of equal cardinality: cardinality;
    variant, error, interval and difference of each; change with interval and verdict
    where the net is the same."""
    settings: pd.DataFrame
    """setting, first, second: those that differ."""
    agreement: Agreement | None
    """Of the orders by test error; None where they share fewer than three nets."""
    ranking: str
    """The same in words; empty where there is none."""
    figures: tuple[Figure, ...]


def compare(first: StudyTables, second: StudyTables) -> StudyPair:
    """Lays two studies side by side.

    Raises:
        InputError: both are the same study.
    """
    if first.study == second.study:
        raise InputError(f"{first.study} cannot be compared with itself.")
    found = (report.evidence_of(first), report.evidence_of(second))
    nets = _nets((first, second), found)
    agreement = rank_agreement(first, second)
    return StudyPair(
        names=(first.study, second.study),
        verdict=_verdict(nets, (first, second)),
        nets=nets,
        settings=_settings(first, second),
        agreement=agreement,
        ranking=_ranking(agreement),
        figures=(
            *_figures((first, second), found),
            *_ranking_figure((first, second), nets, agreement),
        ),
    )


def rank_agreement(first: StudyTables, second: StudyTables) -> Agreement | None:
    """How far two studies order the nets that both have trained alike.

    Returns:
        None where they share fewer than three nets.
    """
    orders = []
    for tables in (first, second):
        names = dict(zip(tables.nets["variant"], tables.nets["name"], strict=True))
        errors = _errors(tables)
        orders.append({names[v]: list(runs.values()) for v, runs in errors.items()})
    return ranks.agreement(orders[0], orders[1])


def write_page(pair: StudyPair, html: Path) -> None:
    """The pair as one HTML file."""
    text = page.render(
        "compare.html",
        figures=pair.figures,
        tables=page_tables(pair),
        embedded={},
        words={
            "names": pair.names,
            "verdict": pair.verdict,
            "ranking": pair.ranking,
        },
    )
    html.parent.mkdir(parents=True, exist_ok=True)
    temporary = html.with_name(f".{html.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(html)


def _ranking(agreement: Agreement | None) -> str:
    if agreement is None:
        return ""
    count = agreement.num_variants
    name = f"between their orders of the {count} nets that both trained"
    return ranks.sentence(agreement, name=name)


def page_tables(pair: StudyPair) -> list[Table]:
    """The tables of the page."""
    first, second = pair.names
    columns = (
        Column("cardinality", "cardinality", digits=0),
        *_side_columns("first", first),
        *_side_columns("second", second),
        Column("change", "change", signed=True),
        Column("change_interval", "simultaneous 95 %", "text"),
        Column("verdict", "verdict", "verdict"),
    )
    settings = (
        Column("setting", "setting", "text"),
        Column("first", first, "text"),
        Column("second", second, "text"),
    )
    return [
        Table("nets", "Nets", "", pair.nets, columns),
        Table("settings", "Settings that differ", "", pair.settings, settings),
    ]


def _side_columns(side: str, study: str) -> tuple[Column, ...]:
    return (
        Column(f"variant_{side}", f"{study}: variant", "text"),
        Column(f"error_{side}", "test error (%)"),
        Column(f"interval_{side}", "95 % interval", "text"),
        Column(f"difference_{side}", "from own reference", signed=True),
    )


def _nets(
    studies: tuple[StudyTables, StudyTables], found: tuple[Evidence, Evidence]
) -> pd.DataFrame:
    sides = [_side(evidence) for evidence in found]
    pairs = _paired(sides[0], sides[1])
    rows = pd.DataFrame(
        [
            {
                **_labelled(sides[0], i, side="first"),
                **_labelled(sides[1], j, side="second"),
                "cardinality": (sides[0] if i is not None else sides[1])["cardinality"][
                    i if i is not None else j
                ],
                "is_same_net": _is_same(sides, i, j),
            }
            for i, j in pairs
        ]
    )
    return rows.join(_changes(rows, studies))


def _side(evidence: Evidence) -> pd.DataFrame:
    against = evidence.against[["variant", "difference_pct"]]
    rows = evidence.variants.merge(against, on="variant", how="left")
    reference = rows["is_reference"].astype(bool)
    known = reference & rows["test_error_pct_mean"].notna()
    rows.loc[known, "difference_pct"] = 0.0
    return rows.reset_index(drop=True)


def _paired(
    first: pd.DataFrame, second: pd.DataFrame
) -> list[tuple[int | None, int | None]]:
    """Rows that belong together: the same net, else the only two of a cardinality."""
    left = dict.fromkeys(range(len(second)))
    pairs: list[tuple[int | None, int | None]] = []
    by_name = {name: j for j, name in enumerate(second["name"])}
    open_rows = []
    for i, name in enumerate(first["name"]):
        if name in by_name:
            pairs.append((i, by_name[name]))
            del left[by_name[name]]
        else:
            open_rows.append(i)
    for i in open_rows:
        cardinality = first["cardinality"][i]
        same = [j for j in left if second["cardinality"][j] == cardinality]
        rivals = [k for k in open_rows if first["cardinality"][k] == cardinality]
        match = same[0] if len(same) == len(rivals) == 1 else None
        if match is not None:
            del left[match]
        pairs.append((i, match))
    return [*pairs, *((None, j) for j in left)]


def _is_same(sides: list[pd.DataFrame], i: int | None, j: int | None) -> bool:
    if i is None or j is None:
        return False
    return bool(sides[0]["name"][i] == sides[1]["name"][j])


def _labelled(
    side_rows: pd.DataFrame, i: int | None, *, side: str
) -> dict[str, object]:
    if i is None:
        blank = {"variant": "", "error": None, "interval": "", "difference": None}
        return {f"{key}_{side}": value for key, value in blank.items()}
    row = side_rows.iloc[i]
    low, high = row["test_error_pct_ci_low"], row["test_error_pct_ci_high"]
    return {
        f"variant_{side}": row["variant"],
        f"error_{side}": row["test_error_pct_mean"],
        f"interval_{side}": "" if pd.isna(low) else f"{low:.2f} to {high:.2f}",
        f"difference_{side}": row["difference_pct"],
    }


def _changes(
    rows: pd.DataFrame, studies: tuple[StudyTables, StudyTables]
) -> pd.DataFrame:
    """Second minus first where the net is the same, all such nets as one family."""
    errors = [_errors(tables) for tables in studies]
    columns = ("change", "change_interval", "p_corrected", "verdict")
    changes = pd.DataFrame(index=rows.index, columns=list(columns), dtype=object)
    groups: list[dict[int, float]] = []
    tested = []
    for place, row in rows[rows["is_same_net"]].iterrows():
        both = (
            errors[1].get(row["variant_second"], {}),
            errors[0].get(row["variant_first"], {}),
        )
        changes.loc[place, "change"] = row["error_second"] - row["error_first"]
        changes.loc[place, "verdict"] = "undecided"
        if min(map(len, both)) >= 2:
            groups += both
            tested.append(place)
    if tested:
        pairs = [(2 * k, 2 * k + 1) for k in range(len(tested))]
        margin = studies[0].config.report.equivalence_margin_pct
        tests = families.compare_pairs(
            groups,
            pairs=pairs,
            margin=margin,
            family="pairs",
            pairing="unpaired",
            look=families.Look(),
        )
        for place, test in zip(tested, tests, strict=True):
            changes.loc[place] = _change(test, margin=margin)
    return changes.astype({"change": float, "p_corrected": float})


def _change(test: families.PairTest, *, margin: float) -> list[object]:
    low, high = test.difference - test.half_width, test.difference + test.half_width
    interval = "" if pd.isna(test.half_width) else f"{low:+.2f} to {high:+.2f}"
    verdict = "undecided"
    if test.p_corrected < _LEVEL:
        verdict = "better" if test.difference < 0 else "worse"
    elif test.p_equivalent < _LEVEL:
        verdict = f"equivalent within {margin:g} points"
    return [test.difference, interval, test.p_corrected, verdict]


def _errors(tables: StudyTables) -> dict[str, dict[int, float]]:
    complete = tables.runs[tables.runs["state"] == "complete"]
    return report.errors_by_seed(tables.nets, complete)


def _settings(first: StudyTables, second: StudyTables) -> pd.DataFrame:
    rows = []
    for text in differences(first.config, second.config, may_change=_KEY):
        key, _, values = text.partition(": ")
        before, _, after = values.partition(" -> ")
        rows.append({"setting": key, "first": before, "second": after})
    here, there = (t.provenance.get("data_checksum", "") for t in (first, second))
    if here != there:
        row = {"setting": "images (checksum)", "first": here[:12], "second": there[:12]}
        rows.append(row)
    return pd.DataFrame(rows, columns=["setting", "first", "second"])


def _verdict(nets: pd.DataFrame, studies: tuple[StudyTables, StudyTables]) -> str:
    first, second = (tables.study for tables in studies)
    shared = nets[nets["is_same_net"]]
    same = [t.provenance.get("data_checksum") for t in studies]
    warning = "" if same[0] == same[1] else " They used different images."
    if shared.empty:
        beside = int(
            ((nets["variant_first"] != "") & (nets["variant_second"] != "")).sum()
        )
        return (
            f"{first} and {second} share no net; {beside} of their nets stand side by "
            f"side by cardinality, each against its own reference.{warning}"
        )
    count = len(shared)
    differ = int(shared["verdict"].isin(["better", "worse"]).sum())
    nets_word = "net" if count == 1 else "nets"
    return (
        f"Of {count} {nets_word} that {first} and {second} share, {differ} "
        f"{'has' if differ == 1 else 'have'} a test error that is shown to differ."
        f"{warning}"
    )


def _figures(
    studies: tuple[StudyTables, StudyTables], found: tuple[Evidence, Evidence]
) -> tuple[Figure, ...]:
    names = (studies[0].study, studies[1].study)
    complete = [t.runs[t.runs["state"] == "complete"] for t in studies]
    drawn = []
    errors = charts_studies.errors_data(
        names, variants=[one.variants for one in found], runs=complete
    )
    if len(errors.points):
        figure = figures_studies.sides_figure(errors)
        drawn.append(Figure("sides-errors", figure, errors.title, errors.note))
    gaps = charts_studies.differences_data(
        names,
        variants=[e.variants for e in found],
        comparisons=[e.against for e in found],
    )
    if len(gaps.points):
        figure = figures_studies.sides_figure(gaps)
        drawn.append(Figure("sides-differences", figure, gaps.title, gaps.note))
    return tuple(drawn)


def _ranking_figure(
    studies: tuple[StudyTables, StudyTables],
    nets: pd.DataFrame,
    agreement: Agreement | None,
) -> tuple[Figure, ...]:
    """The nets that both trained, by their error here and there."""
    if agreement is None:
        return ()
    columns = ["variant_second", "error_first", "error_second"]
    means = nets.loc[nets["is_same_net"], columns].dropna()
    data = charts_ranking.orders_data(
        (studies[0].study, studies[1].study),
        means.set_axis(["variant", "x", "y"], axis=1),
        agreement=agreement,
    )
    figure = figures_ranking.budgets_figure(data)
    return (Figure("sides-ranks", figure, data.title, data.note),)
