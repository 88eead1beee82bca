"""A study's figures and tables as files for a paper.

Tables need nothing beyond pandas. Figures are drawn by a browser, which kaleido steers;
it is an extra, and all tables are written before it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from resnext_ablate.architecture.spec import MissingExtraError
from resnext_ablate.evidence import chart_style, page
from resnext_ablate.evidence.gallery import Figure
from resnext_ablate.evidence.page import Table
from resnext_ablate.records.tables import write_table

FIGURE_FORMATS = ("png", "svg", "pdf")
_WIDTH = 720
_PNG_SCALE = 3
_REMEDY = (
    "Install Chromium (apt-get install chromium) or Chrome (plotly_get_chrome), or "
    "name one in BROWSER_PATH"
)


def write_tables(
    tables: Sequence[Table], *, folder: Path, provenance: dict[str, str]
) -> tuple[Path, ...]:
    """Each table as LaTeX and Markdown, as shown, and as CSV and Parquet, in full.

    Returns:
        The files, in the order of the tables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for table in tables:
        stem = folder / table.key
        shown = pd.DataFrame(
            page.shown_rows(table, limit=None),
            columns=[column.label for column in table.columns],
        )
        (folder / f"{table.key}.tex").write_text(_latex(shown, table), encoding="utf-8")
        (folder / f"{table.key}.md").write_text(
            _markdown(shown, table), encoding="utf-8"
        )
        write_table(table.frame, stem, provenance=provenance)
        paths += [folder / f"{table.key}.{e}" for e in ("tex", "md", "csv", "parquet")]
    return tuple(paths)


def write_figures(figures: Sequence[Figure], *, folder: Path) -> tuple[Path, ...]:
    """Each figure as PNG, SVG and PDF, light, on white, with fonts embedded.

    Raises:
        MissingExtraError: kaleido is not installed, or finds no browser.
    """
    try:
        import kaleido
    except ImportError:
        raise MissingExtraError(
            "figures as files need kaleido: pip install 'resnext-ablate[figures]'. "
            f"{_REMEDY}."
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for one in figures:
        drawn = for_print(one.figure)
        for form in FIGURE_FORMATS:
            scale = _PNG_SCALE if form == "png" else 1
            size = {"width": _WIDTH, "height": drawn.layout.height, "scale": scale}
            path = folder / f"{one.key}.{form}"
            jobs.append({"fig": drawn, "path": path, "opts": {"format": form, **size}})
    try:
        # One browser for all of them; MathJax would be fetched, and nothing needs it.
        kaleido.write_fig_from_object_sync(
            jobs, cancel_on_error=True, kopts={"n": 1, "mathjax": False}
        )
    except RuntimeError as error:  # No browser, or one that does not start.
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise MissingExtraError(
            f"figures as files need a browser, and none starts ({first_line}). "
            f"{_REMEDY}."
        ) from None
    return tuple(job["path"] for job in jobs)


def for_print(figure: go.Figure) -> go.Figure:
    """The figure in the light scheme on white."""
    printed = go.Figure(figure)
    printed.update_layout(
        template=chart_style.template("light"),
        paper_bgcolor="white",
        plot_bgcolor="white",
        margin_t=48 + 22 * (1 + str(figure.layout.title.text).count("<br>")),
    )
    return printed


def _latex(shown: pd.DataFrame, table: Table) -> str:
    """A booktabs table; text is escaped, the lowest mean error bold."""
    style = shown.style.hide(axis="index").format(escape="latex")
    style = style.format_index(escape="latex", axis=1)
    best = _best_row(table)
    if best is not None:
        cell = pd.IndexSlice[best, ["test error (%)"]]
        style = style.set_properties(subset=cell, textbf="--rwrap")
    sides = ("l" if _is_text(column.kind) else "r" for column in table.columns)
    text: str = style.to_latex(
        hrules=True, column_format="".join(sides), position_float="centering"
    )
    # In LaTeX's own font encoding these would print as other signs.
    for sign, name in (("<", "textless"), (">", "textgreater"), ("|", "textbar")):
        text = text.replace(sign, rf"\{name}{{}}")
    return f"% {table.title}; needs the package booktabs\n{text}"


def _best_row(table: Table) -> int | None:
    if table.key != "results" or table.frame["test_error_pct_mean"].isna().all():
        return None
    return int(table.frame["test_error_pct_mean"].to_numpy().argmin())


def _is_text(kind: str) -> bool:
    return kind in ("text", "verdict")


def _markdown(shown: pd.DataFrame, table: Table) -> str:
    """A pipe table; bars and line breaks in text are escaped."""
    sides = ("---" if _is_text(column.kind) else "--:" for column in table.columns)
    rows = [list(shown.columns), list(sides), *shown.to_numpy().tolist()]
    clean = (
        [re.sub(r"\s+", " ", str(cell)).replace("|", r"\|") for cell in row]
        for row in rows
    )
    return "".join(f"| {' | '.join(row)} |\n" for row in clean)
