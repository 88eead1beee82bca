"""What the report shows of a study, and in which words around its numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from resnext_ablate.evidence import embedding, page
from resnext_ablate.evidence.gallery import Figure
from resnext_ablate.evidence.page import Column, Finding, Table
from resnext_ablate.records.records import FAILURES
from resnext_ablate.records.tables import COST_COLUMNS, StudyTables

MAX_QUESTIONS = 8


@dataclass(frozen=True)
class Evidence:
    """All that a report says of a study."""

    verdict: str
    variants: pd.DataFrame
    """One row per variant: nets columns, n, mean, sd and interval of the test error."""
    comparisons: pd.DataFrame
    """One row per variant that is not the reference; with `report.family = "pairs"`
    then one for each other pair."""
    against: pd.DataFrame
    """The first of these: each variant against the reference."""
    images: pd.DataFrame
    """One row per comparison and seed, by test images."""
    effects: pd.DataFrame
    """One row per effect: of cardinality, and how far rankings agree."""
    figures: tuple[Figure, ...]
    findings: tuple[Finding, ...]

    @property
    def effect(self) -> str:
        """What cardinality does, in a sentence; empty where nets are not matched."""
        rows = self.effects["effect"] == "points per doubling of cardinality"
        return " ".join(self.effects.loc[rows, "statement"])


_RESULT_COLUMNS = (
    Column("variant", "variant", "text"),
    Column("verdict", "verdict", "verdict"),
    Column("test_error_pct_mean", "test error (%)"),
    Column("interval", "95 % interval", "text"),
    Column("difference_pct", "difference", signed=True),
    Column("difference_interval", "simultaneous 95 %", "text"),
    Column("p_corrected", "p corrected", "p_value"),
    Column("n", "runs", digits=0),
    Column("macs", "FLOPs", "count"),
    Column("params", "params", "count"),
    Column("time_per_image_ms_mean", "ms per image", digits=3),
)
_CERTIFICATE_COLUMNS = (
    Column("variant", "variant", "text"),
    Column("name", "net", "text"),
    Column("bottleneck_widths", "widths by stage", "text"),
    Column("macs", "FLOPs", digits=0),
    Column("macs_error_pct", "off (%)", signed=True),
    Column("fvcore_macs", "FLOPs by fvcore", digits=0),
    Column("params", "params", digits=0),
    Column("params_error_pct", "off (%)", signed=True),
    Column("activations", "activations", digits=0),
    Column("activations_error_pct", "off (%)", signed=True),
)
_COST_COLUMNS = (
    Column("variant", "variant", "text"),
    Column("step_time_ms", "step (ms)", digits=2),
    Column("step_time_error_pct", "off (%)", signed=True),
    Column("step_time_interval", "95 % interval", "text"),
    Column("forward_time_ms", "forward (ms)", digits=2),
    Column("roofline_pct", "of roofline (%)", digits=0),
    Column("step_peak_memory_mib", "peak memory (MiB)", digits=1),
    Column("step_peak_memory_error_pct", "off (%)", signed=True),
)
_FAILED_COLUMNS = (
    Column("variant", "variant", "text"),
    Column("seed", "seed", digits=0),
    Column("state", "state", "text"),
    Column("reason", "reason", "text"),
)
_RUN_COLUMNS = (
    Column("variant", "variant", "text"),
    Column("seed", "seed", digits=0),
    Column("state", "state", "text"),
    Column("test_error_pct", "test error (%)"),
    Column("val_error_pct", "val error (%)"),
    Column("train_error_pct", "train error (%)"),
    Column("train_time_s", "training (s)", digits=1),
    Column("images_per_s", "images/s", digits=0),
    Column("roofline_pct", "of roofline (%)", digits=0),
    Column("peak_memory_mib", "peak memory (MiB)", digits=0),
    Column("device", "device", "text"),
    Column("precision", "precision", "text"),
    Column("started_at", "started", "text"),
)
_EPOCH_COLUMNS = (
    Column("variant", "variant", "text"),
    Column("seed", "seed", digits=0),
    Column("epoch", "epoch", digits=0),
    Column("train_loss", "train loss", digits=4),
    Column("train_error_pct", "train error (%)"),
    Column("val_loss", "val loss", digits=4),
    Column("val_error_pct", "val error (%)"),
    Column("learning_rate", "learning rate", digits=5),
    Column("time_s", "seconds"),
)


def render(tables: StudyTables, evidence: Evidence) -> str:
    """The whole report as text.

    Args:
        tables: the study as `embedding.reduced` gives it.
        evidence: what follows from them.
    """
    embedded = embedding.to_value(tables)
    checksum = embedding.checksum(embedded)
    sentence, _, rest = evidence.verdict.partition(". ")
    return page.render(
        "report.html",
        figures=evidence.figures,
        tables=page_tables(tables, evidence),
        embedded={"study": tables.study, "checksum": checksum, **embedded},
        words={
            "study": tables.study,
            "question": tables.config.question,
            "verdict": sentence.removesuffix(".") + ".",
            "verdict_rest": rest,
            "open_questions": _open_questions(evidence.against),
            "num_undecided": int((evidence.against["verdict"] == "undecided").sum()),
            "num_complete": int((tables.runs["state"] == "complete").sum()),
            "num_planned": tables.num_planned,
            "num_failed": int(tables.runs["state"].isin(FAILURES).sum()),
            "data_name": tables.config.data.name,
            "margin": tables.config.report.equivalence_margin_pct,
            "findings": evidence.findings,
            "provenance": tables.provenance,
            "study_file": tables.config.to_toml(),
            "epochs_note": embedding.epochs_note(tables),
            "checksum": checksum,
        },
    )


def _open_questions(comparisons: pd.DataFrame) -> list[tuple[str, str]]:
    """The first undecided variants, each with what would decide it."""
    undecided = comparisons[comparisons["verdict"] == "undecided"]
    undecided = undecided.head(MAX_QUESTIONS)
    return list(zip(undecided["variant"], undecided["explanation"], strict=True))


def page_tables(tables: StudyTables, evidence: Evidence) -> list[Table]:
    """All tables of the page, the failed runs only where there are some."""
    failed = tables.runs[tables.runs["state"].isin(FAILURES)]
    shown = [
        Table("results", "Results", "", _results(evidence), _RESULT_COLUMNS),
        Table(
            "certificate",
            "Match certificate",
            "",
            tables.nets,
            _CERTIFICATE_COLUMNS,
            source="nets",
        ),
        Table(
            "runs",
            "All runs",
            "",
            tables.runs,
            _known(_RUN_COLUMNS, tables.runs),
            source="runs",
        ),
        Table(
            "epochs",
            "All epochs"
            if len(tables.epochs) == tables.runs["epochs"].sum()
            else "Epochs",
            "",
            tables.epochs,
            _known(_EPOCH_COLUMNS, tables.epochs),
            source="epochs",
        ),
    ]
    if "step_time_ms" in tables.nets:
        shown.append(
            Table("costs", "Measured costs", "", _costs(tables), _COST_COLUMNS)
        )
    shown += [finding.table for finding in evidence.findings]
    if len(failed):
        shown.append(
            Table(
                "failed", "Runs that failed", "", failed, _FAILED_COLUMNS, source="runs"
            )
        )
    return shown


def _known(columns: tuple[Column, ...], frame: pd.DataFrame) -> tuple[Column, ...]:
    """Those that a frame has: one of an earlier release lacks some."""
    return tuple(column for column in columns if column.key in frame)


def _costs(tables: StudyTables) -> pd.DataFrame:
    nets = tables.nets[["variant", *COST_COLUMNS]].copy()
    nets["step_time_interval"] = _intervals(
        nets["step_time_error_pct_low"],
        nets["step_time_error_pct_high"],
        form="{:+.2f}",
    )
    return nets


_ONLY_IN_CERTIFICATE = {column.key for column in _CERTIFICATE_COLUMNS} - {
    "variant",
    "macs",
    "params",
}


def _results(evidence: Evidence) -> pd.DataFrame:
    """Variants with their comparison in one row each."""
    against = evidence.against.drop(columns=["margin_pct"])
    rows = evidence.variants.drop(columns=list(_ONLY_IN_CERTIFICATE))
    rows = rows.merge(against, on="variant", how="left")
    rows["verdict"] = rows["verdict"].astype(object)
    rows.loc[rows["is_reference"].astype(bool), "verdict"] = "reference"
    rows["interval"] = _intervals(
        rows["test_error_pct_ci_low"], rows["test_error_pct_ci_high"], form="{:.2f}"
    )
    rows["difference_interval"] = _intervals(
        rows["ci_low"], rows["ci_high"], form="{:+.2f}"
    )
    return rows


def _intervals(low: pd.Series, high: pd.Series, *, form: str) -> list[str]:
    return [
        "" if math.isnan(a) else f"{form.format(a)} to {form.format(b)}"
        for a, b in zip(low, high, strict=True)
    ]
