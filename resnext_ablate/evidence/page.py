"""One HTML file that needs neither network nor server.

plotly.js and all data travel gzipped in base64 and are unpacked by the browser. Base64
has no markup in it, so no name or label can break out of the data; everything else goes
through the template's escaping. The content policy admits one script, by its hash.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from functools import cache, partial
from typing import Any, Literal

import jinja2
import pandas as pd
import plotly
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from resnext_ablate import __version__
from resnext_ablate.evidence import chart_style
from resnext_ablate.evidence.gallery import Figure

MAX_ROWS_SHOWN = 100
"""Rows of a table on the page at once; sorting and filtering reach all of them."""

Kind = Literal["text", "count", "number", "p_value", "verdict"]
_SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


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
    source: str = ""
    """The embedded frame that `frame` is, or whose rows it has; else it is embedded."""


@dataclass(frozen=True)
class Finding:
    """What the runs say beyond the verdicts, with the table that it rests on."""

    text: str
    table: Table


def render(
    template: str,
    *,
    figures: Sequence[Figure],
    tables: Sequence[Table],
    embedded: Mapping[str, Any],
    words: Mapping[str, object],
) -> str:
    """The whole page as text.

    Args:
        template: name of the template.
        figures, tables: what the page shows.
        embedded: further values for the page's script.
        words: further values for the template.
    """
    payload = {
        "figures": {one.key: _figure_value(one.figure) for one in figures},
        "themes": {scheme: chart_style.template(scheme) for scheme in _SCHEMES},
        "colors": chart_style.COLORS,
        "symbols": chart_style.SYMBOLS,
        "made_with": made_with(),
        "tables": {table.key: _table_value(table) for table in tables},
        **embedded,
    }
    return (
        _environment()
        .get_template(template)
        .render(
            **words,
            figures=figures,
            tables={table.key: table for table in tables},
            max_rows=MAX_ROWS_SHOWN,
            made_with=made_with(),
            style=_text("page.css"),
            script=_text("page.js"),
            payload=packed(json.dumps(payload, allow_nan=False)),
            plotly=packed_plotly(),
        )
    )


def made_with() -> dict[str, str]:
    """Versions that a page depends on."""
    return {"resnext_ablate": __version__, "plotly": plotly.__version__}


def packed(text: str) -> str:
    """Text as the page carries it."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def unpacked(text: str) -> str:
    """The text of `packed`.

    Raises:
        ValueError, OSError, EOFError: it is no such text.
    """
    return gzip.decompress(base64.b64decode(text, validate=True)).decode()


@cache
def packed_plotly() -> str:
    return packed(get_plotlyjs())


def _text(name: str) -> Markup:
    files = importlib.resources.files("resnext_ablate.evidence")
    return Markup(files.joinpath(name).read_text(encoding="utf-8"))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("resnext_ablate.evidence", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["csp_hash"] = _csp_hash
    environment.filters["nbsp"] = lambda text: text.replace(" %", "\u00a0%")
    # For readers and printers without scripts.
    environment.filters["rows"] = partial(shown_rows, limit=MAX_ROWS_SHOWN)
    return environment


def _csp_hash(script: str) -> Markup:
    digest = hashlib.sha256(str(script).encode()).digest()
    return Markup(f"'sha256-{base64.b64encode(digest).decode()}'")


def _figure_value(figure: go.Figure) -> dict[str, Any]:
    """The figure for the page, which has its own title and themes."""
    value: dict[str, Any] = json.loads(figure.to_json())
    layout = value["layout"]
    layout.pop("title", None)
    layout.pop("template", None)
    layout["margin"]["t"] = 16
    return {"data": value["data"], "layout": layout}


def _table_value(table: Table) -> dict[str, Any]:
    value: dict[str, Any] = {"columns": [vars(column) for column in table.columns]}
    if not table.source:
        return {
            **value,
            "values": frame_values(table.frame),
            "length": len(table.frame),
        }
    value |= {"frame": table.source, "length": len(table.frame)}
    places = table.frame.index.tolist()
    return value if places == list(range(len(places))) else {**value, "rows": places}


def frame_values(frame: pd.DataFrame) -> dict[str, list[Any]]:
    """A frame for JSON; unknown and infinite numbers become null."""
    # Column by column: like values side by side pack to half the size.
    return {key: [_plain(value) for value in values] for key, values in frame.items()}


def _plain(value: Any) -> str | int | float | bool | None:
    if hasattr(value, "item"):
        value = value.item()
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value if isinstance(value, (str, int, float, bool)) else str(value)


def shown_rows(table: Table, *, limit: int | None) -> list[list[str]]:
    """The first rows, or all, as text."""
    head = table.frame if limit is None else table.frame.head(limit)
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
        # As the browser rounds: half up, of the decimal that is written.
        step = Decimal(1).scaleb(-column.digits)
        rounded = Decimal(repr(abs(value))).quantize(step, ROUND_HALF_UP)
        text = f"{rounded:,f}"
        if float(text.replace(",", "")) == 0:
            return text
        return f"{'-' if value < 0 else '+' if column.signed else ''}{text}"
    return str(value)
