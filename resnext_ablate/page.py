"""The report as one HTML file that needs neither network nor server.

plotly.js and all data travel gzipped in base64 and are unpacked by the browser. Base64
has no markup in it, so no name or label can break out of the data; everything else goes
through the template's escaping. The content policy admits one script, by its hash.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from resnext_ablate import chart_style
from resnext_ablate.gallery import Figure
from resnext_ablate.records import FAILURES
from resnext_ablate.tables import COST_COLUMNS, StudyTables

MAX_ROWS_SHOWN = 100
"""Rows of a table on the page at once; sorting and filtering reach all of them."""
MAX_QUESTIONS = 8
MAX_EPOCH_ROWS = 20_000
MAX_PACKED = 2_300_000
"""Characters of packed data. A table of epochs that is longer than the one or takes the
page beyond the other is not embedded; its files lie beside the report."""

Kind = Literal["text", "count", "number", "p_value", "verdict"]


@dataclass(frozen=True)
class Evidence:
    """What the page shows."""

    verdict: str
    variants: pd.DataFrame
    comparisons: pd.DataFrame
    """Each variant against the reference."""
    figures: tuple[Figure, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Column:
    """How the page shows one column of a table."""

    key: str
    label: str
    kind: Kind = "number"
    digits: int = 2
    signed: bool = False


@dataclass(frozen=True)
class Table:
    """A table that sorts, filters and downloads.

    `columns` are shown; a download holds all columns of `frame`.
    """

    key: str
    title: str
    note: str
    frame: pd.DataFrame
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Finding:
    """What the runs say beyond the verdicts, with the table that it rests on."""

    text: str
    table: Table


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
    """The whole page as text."""
    shown = _tables(tables, evidence)
    plotly = _packed(get_plotlyjs())
    payload = _payload(evidence, shown)
    if len(plotly) + len(payload) > MAX_PACKED:
        shown = [table for table in shown if table.key != "epochs"]
        payload = _payload(evidence, shown)
    template = _environment().get_template("report.html")
    return template.render(
        study=tables.study,
        question=tables.config.question,
        verdict=evidence.verdict.partition(". ")[0].removesuffix(".") + ".",
        verdict_rest=evidence.verdict.partition(". ")[2],
        open_questions=_open_questions(evidence.comparisons),
        num_undecided=int((evidence.comparisons["verdict"] == "undecided").sum()),
        num_complete=int((tables.runs["state"] == "complete").sum()),
        num_planned=tables.num_planned,
        num_failed=int(tables.runs["state"].isin(FAILURES).sum()),
        data_name=tables.config.data.name,
        margin=tables.config.report.equivalence_margin_pct,
        figures=evidence.figures,
        findings=evidence.findings,
        tables={table.key: table for table in shown},
        provenance=tables.provenance,
        study_file=tables.config.to_toml(),
        max_rows=MAX_ROWS_SHOWN,
        payload=payload,
        plotly=plotly,
    )


def _open_questions(comparisons: pd.DataFrame) -> list[tuple[str, str]]:
    """The first undecided variants, each with what would decide it."""
    undecided = comparisons[comparisons["verdict"] == "undecided"]
    undecided = undecided.head(MAX_QUESTIONS)
    return list(zip(undecided["variant"], undecided["explanation"], strict=True))


_SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("resnext_ablate", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["csp_hash"] = _csp_hash
    environment.filters["nbsp"] = lambda text: text.replace(" %", "\u00a0%")
    environment.filters["rows"] = _shown_rows
    return environment


def _csp_hash(script: str) -> Markup:
    digest = hashlib.sha256(str(script).encode()).digest()
    return Markup(f"'sha256-{base64.b64encode(digest).decode()}'")


def _payload(evidence: Evidence, tables: Sequence[Table]) -> str:
    value = {
        "figures": {f.key: _figure_value(f.figure) for f in evidence.figures},
        "themes": {scheme: chart_style.template(scheme) for scheme in _SCHEMES},
        "tables": {table.key: _table_value(table) for table in tables},
    }
    return _packed(json.dumps(value, allow_nan=False))


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _tables(tables: StudyTables, evidence: Evidence) -> list[Table]:
    """All tables of the page, the failed runs only where there are some."""
    failed = tables.runs[tables.runs["state"].isin(FAILURES)]
    shown = [
        Table("results", "Results", "", _results(evidence), _RESULT_COLUMNS),
        Table(
            "certificate", "Match certificate", "", tables.nets, _CERTIFICATE_COLUMNS
        ),
        Table("runs", "All runs", "", tables.runs, _RUN_COLUMNS),
    ]
    if "step_time_ms" in tables.nets:
        shown.append(
            Table("costs", "Measured costs", "", _costs(tables), _COST_COLUMNS)
        )
    shown += [finding.table for finding in evidence.findings]
    if len(failed):
        shown.append(Table("failed", "Runs that failed", "", failed, _FAILED_COLUMNS))
    if 0 < len(tables.epochs) <= MAX_EPOCH_ROWS:
        shown.append(Table("epochs", "All epochs", "", tables.epochs, _EPOCH_COLUMNS))
    return shown


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
    against = evidence.comparisons.drop(columns=["margin_pct"])
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


def _figure_value(figure: go.Figure) -> dict[str, Any]:
    """The figure for the page, which has its own title and themes."""
    value: dict[str, Any] = json.loads(figure.to_json())
    layout = value["layout"]
    layout.pop("title", None)
    layout.pop("template", None)
    layout["margin"]["t"] = 16
    return {"data": value["data"], "layout": layout}


def _table_value(table: Table) -> dict[str, Any]:
    # Column by column: like values side by side pack to half the size.
    return {
        "columns": [vars(column) for column in table.columns],
        "values": {
            key: [_plain(value) for value in values]
            for key, values in table.frame.items()
        },
        "length": len(table.frame),
    }


def _plain(value: Any) -> str | int | float | bool | None:
    """A value for JSON, floats to 7 digits; unknown and infinite ones become null."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, float):
        return float(f"{value:.7g}")
    return value if isinstance(value, (str, int, float, bool)) else str(value)


def _shown_rows(table: Table) -> list[list[str]]:
    """The first rows as text, for readers and printers without scripts."""
    head = table.frame.head(MAX_ROWS_SHOWN)
    cells: Sequence[list[str]] = [
        [_shown(_plain(value), column) for value in head[column.key]]
        for column in table.columns
    ]
    return [list(row) for row in zip(*cells, strict=True)]


def _shown(value: str | int | float | bool | None, column: Column) -> str:
    if value is None or value == "":
        return ""
    if column.kind == "count" and isinstance(value, (int, float)):
        return chart_style.count(float(value))
    if column.kind == "p_value" and isinstance(value, (int, float)):
        return "< 0.0001" if value < 0.0001 else f"{value:.4f}"
    if column.kind == "number" and isinstance(value, (int, float)):
        text = f"{abs(value):,.{column.digits}f}"
        if float(text.replace(",", "")) == 0:
            return text
        return f"{'-' if value < 0 else '+' if column.signed else ''}{text}"
    return str(value)
