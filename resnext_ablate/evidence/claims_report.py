"""The claims as one table, read from the results of one profile.

One row for each number of a claim, beside the paper's; claims whose studies have no
results yet are rows without numbers. What is written is derived from run files alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from resnext_ablate.evidence import export, page
from resnext_ablate.evidence.charts_claims import effects_data
from resnext_ablate.evidence.claims import CLAIMS, Claim, Evidence
from resnext_ablate.evidence.figures_claims import effects_figure
from resnext_ablate.evidence.gallery import Figure
from resnext_ablate.evidence.page import Column, Table
from resnext_ablate.numbers import power
from resnext_ablate.records import checks, records
from resnext_ablate.records.tables import StudyTables, read_tables

NOT_RUN = "not run"
_COLUMNS = (
    "claim",
    "statement",
    "numbers",
    "label",
    "paper",
    "ours",
    "low",
    "high",
    "unit",
    "num_runs",
    "verdict",
    "claim_verdict",
    "seeds_to_decide",
    "detail",
)
_SHOWN = (
    Column("claim", "claim", "text"),
    Column("statement_text", "statement", "text"),
    Column("label", "number (points of mean error)", "text"),
    Column("paper_text", "paper", "text"),
    Column("ours_text", "here, 95 % interval", "text"),
    Column("runs_text", "runs of each net", "text"),
    Column("verdict_text", "verdict", "text"),
)


def study_name(study: str, *, profile: str) -> str:
    """The results folder of a claim's study; what trains nothing has no profiles."""
    trains = any(study in claim.studies and claim.trains for claim in CLAIMS)
    return f"{study}-{profile}" if trains else study


def read_evidence(results: Path, *, profile: str) -> Evidence:
    """The results of one profile, as far as every net of a study has a complete run."""
    studies: dict[str, StudyTables] = {}
    found: dict[str, tuple[checks.Check, ...]] = {}
    for claim in CLAIMS:
        for study in claim.studies:
            folder = results / study_name(study, profile=profile)
            if not claim.trains:
                found[study] = checks.read_checks(folder)
            elif (folder / records.PLAN_FILE).exists():
                tables = read_tables(folder)
                if _every_net_has_run(tables):
                    studies[study] = tables
    return Evidence(studies, {study: rows for study, rows in found.items() if rows})


def _every_net_has_run(tables: StudyTables) -> bool:
    complete = tables.runs[tables.runs["state"] == "complete"]
    return set(tables.nets["variant"]) <= set(complete["variant"])


def is_answered(claim: Claim, evidence: Evidence) -> bool:
    """Whether all studies of a claim have results."""
    return {*claim.studies} <= {*evidence.studies, *evidence.checks}


def claims_table(evidence: Evidence) -> pd.DataFrame:
    """One row for each finding of each claim, in the order of the claims.

    Raises:
        InputError: a study has not the nets that its claim is about.
    """
    rows: list[dict[str, object]] = []
    for claim in CLAIMS:
        said = {
            "claim": claim.key,
            "statement": claim.statement,
            "numbers": claim.numbers,
        }
        if not is_answered(claim, evidence):
            rows.append({**said, "verdict": NOT_RUN, "claim_verdict": NOT_RUN})
            continue
        judged = claim.judge(evidence)
        rows += [
            {**said, **asdict(finding), "claim_verdict": judged.verdict}
            for finding in judged.findings
        ]
    table = pd.DataFrame(rows, columns=[*_COLUMNS])
    numbers = ["paper", "ours", "low", "high", "num_runs", "seeds_to_decide"]
    table[numbers] = table[numbers].astype(float).replace(math.inf, math.nan)
    return table.astype({"num_runs": "Int64"}).fillna(
        {"label": "", "unit": "", "detail": ""}
    )


def shown_table(table: pd.DataFrame, *, profile: str) -> Table:
    """The table as people read it."""
    frame = table.assign(
        paper_text=[_paper_text(row) for row in table.itertuples()],
        ours_text=[_ours_text(row) for row in table.itertuples()],
        runs_text=["" if pd.isna(n) or n == 0 else str(n) for n in table["num_runs"]],
        verdict_text=[_verdict_text(row) for row in table.itertuples()],
    )
    frame["statement_text"] = _statements(table)
    return Table(
        "claims", f"The paper's trade-offs, profile {profile}", "", frame, _SHOWN
    )


def _statements(table: pd.DataFrame) -> list[str]:
    """Each statement once; where it has several numbers, with its own verdict."""
    sizes = table["claim"].value_counts()
    return [
        ""
        if is_repeated
        else f"{row.statement}: {row.claim_verdict}"
        if sizes[row.claim] > 1
        else str(row.statement)
        for row, is_repeated in zip(
            table.itertuples(), table["claim"].duplicated(), strict=True
        )
    ]


def _paper_text(row: object) -> str:
    values = _values(row)
    if values["unit"] != "points":
        return ""
    return f"{values['paper']:+.2f}"


def _ours_text(row: object) -> str:
    values = _values(row)
    if values["verdict"] == NOT_RUN:
        return ""
    if values["unit"] == "share":
        return f"{100 * float(str(values['ours'])):.3g} % hold"
    text = f"{values['ours']:+.2f}"
    if math.isnan(float(str(values["low"]))):
        return text
    return f"{text} [{values['low']:+.2f}, {values['high']:+.2f}]"


def _verdict_text(row: object) -> str:
    """Such as "undecided (12 seeds would decide)"."""
    values = _values(row)
    verdict = str(values["verdict"])
    if verdict != "undecided" or values["unit"] != "points":
        return verdict
    seeds = float(str(values["seeds_to_decide"]))
    if not math.isnan(seeds):
        return f"undecided ({seeds:.0f} seeds would decide)"
    if math.isnan(float(str(values["low"]))):
        return "undecided (no spread is known)"
    return f"undecided (more than {power.MAX_SEEDS} seeds)"


def _values(row: object) -> Mapping[str, object]:
    return row._asdict()  # type: ignore[attr-defined, no-any-return]


def headline(table: pd.DataFrame) -> str:
    """How many claims came out how."""
    verdicts = table.drop_duplicates("claim")["claim_verdict"].value_counts()
    words = {
        "consistent": "come out as the paper says",
        "contradicted": "come out the other way",
        "undecided": "are undecided",
        NOT_RUN: "have no results yet",
    }
    parts = [
        f"{verdicts[key]} {text}" for key, text in words.items() if key in verdicts
    ]
    return f"Of {verdicts.sum()} claims, {', '.join(parts)}."


def figures(table: pd.DataFrame) -> tuple[Figure, ...]:
    """The chart of the claims that are differences of errors; none without results."""
    data = effects_data(table)
    if data.rows.empty:
        return ()
    return (Figure("claims", effects_figure(data), data.title, data.note),)


def write_claims(
    table: pd.DataFrame, *, evidence: Evidence, profile: str, results: Path
) -> Path:
    """Writes the table as CSV, Parquet, Markdown and LaTeX, and as one HTML file.

    Returns:
        The folder of the files.
    """
    folder = results / f"claims-{profile}"
    shown = shown_table(table, profile=profile)
    export.write_tables([shown], folder=folder, provenance=_provenance(evidence))
    html = page.render(
        "claims.html",
        figures=figures(table),
        tables=[shown],
        embedded={},
        words={
            "profile": profile,
            "headline": headline(table),
            "settings": _settings(evidence),
        },
    )
    records.write_atomically(folder / "claims.html", html)
    return folder


def _provenance(evidence: Evidence) -> dict[str, str]:
    return {
        f"{study}.{key}": tables.provenance.get(key, "")
        for study, tables in evidence.studies.items()
        for key in ("study_id", "started_at", "cpu", "gpu", "data_checksum")
    }


def _settings(evidence: Evidence) -> list[str]:
    """How each study trained, in a line."""
    return [_setting(study, tables) for study, tables in evidence.studies.items()]


def _setting(study: str, tables: StudyTables) -> str:
    config, provenance = tables.config, tables.provenance
    size = config.data.image_size
    pixels = f", {size} x {size} pixels" if size else ""
    return (
        f"{study}: {config.train.epochs} epochs, {config.net.template}, "
        f"{provenance.get('data_name', config.data.name)}{pixels} "
        f"({provenance.get('data_counts', 'counts unknown')}), "
        f"{provenance.get('gpu') or provenance.get('cpu', 'device unknown')}"
    )
