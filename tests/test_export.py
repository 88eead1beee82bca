"""Figures and tables for a paper, and what is said where no browser is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import synthetic

from resnext_ablate.architecture.spec import MissingExtraError
from resnext_ablate.evidence import embedding, export, gallery, report_page
from resnext_ablate.evidence.page import Table
from resnext_ablate.evidence.report import evidence_of

REPOSITORY = Path(__file__).parents[1]
HOSTILE = r"50% of_$x$ & \input{y} #1 {a} ~^ <b>|"


def tables_of(labels: list[str] | None = None) -> list[Table]:
    tables = embedding.reduced(
        synthetic.study(num_seeds=2, num_epochs=4, labels=labels, paper=None)
    )
    return report_page.page_tables(tables, evidence_of(tables))


def test_every_table_has_four_forms(tmp_path: Path) -> None:
    """LaTeX and Markdown as shown; CSV and Parquet in full, with provenance."""
    tables = tables_of()
    paths = export.write_tables(
        tables, folder=tmp_path / "tables", provenance={"command": "made up"}
    )
    names = {path.name for path in paths}
    assert {"results.tex", "results.md", "runs.csv", "certificate.parquet"} <= names
    assert all(path.stat().st_size for path in paths)
    runs = pd.read_parquet(tmp_path / "tables" / "runs.parquet")
    assert len(runs) == 10
    assert runs.attrs == {"command": "made up"}
    markdown = (tmp_path / "tables" / "results.md").read_text().splitlines()
    assert len(markdown) == 7
    assert markdown[1].startswith("| --- | --- | --: |")
    assert all(line.count("|") == markdown[0].count("|") for line in markdown)


def test_latex_is_booktabs_with_the_best_in_bold(tmp_path: Path) -> None:
    """Rules by booktabs, one row per variant, the lowest mean error bold."""
    (results,) = (table for table in tables_of() if table.key == "results")
    export.write_tables([results], folder=tmp_path, provenance={})
    text = (tmp_path / "results.tex").read_text()
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    (bold,) = (line for line in text.splitlines() if r"\textbf" in line)
    best = results.frame["test_error_pct_mean"].idxmin()
    assert bold.startswith(results.frame["variant"][best])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_compiles(tmp_path: Path) -> None:
    """All tables, with names that LaTeX would choke on, go through pdflatex."""
    paths = export.write_tables(
        tables_of([HOSTILE, "b", "c", "d", "e"]), folder=tmp_path, provenance={}
    )
    inputs = [rf"\input{{{path.name}}}" for path in paths if path.suffix == ".tex"]
    document = [
        r"\documentclass{article}",
        r"\usepackage{booktabs}",
        r"\begin{document}",
        *inputs,
        r"\end{document}",
    ]
    (tmp_path / "all.tex").write_text("\n".join(document))
    command = ["pdflatex", "-halt-on-error", "-no-shell-escape", "all.tex"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
    if shutil.which("pdftotext"):
        printed = subprocess.run(
            ["pdftotext", "all.pdf", "-"], cwd=tmp_path, capture_output=True, text=True
        )
        assert r" of $x$ & \input{y} #1 {a} " in printed.stdout  # "_" is a rule.
        assert "<b>|" in printed.stdout


def test_bars_in_names_do_not_break_markdown(tmp_path: Path) -> None:
    """A bar inside a name is escaped, so columns stay columns."""
    (results,) = (
        t for t in tables_of([HOSTILE, "b", "c", "d", "e"]) if t.key == "results"
    )
    export.write_tables([results], folder=tmp_path, provenance={})
    row = (tmp_path / "results.md").read_text().splitlines()[2]
    assert row.startswith(r"| 50% of_$x$ & \input{y} #1 {a} ~^ <b>\| | reference |")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_figures_as_files(tmp_path: Path) -> None:
    """PNG, SVG and PDF of each figure, the fonts inside the PDF."""
    pytest.importorskip("kaleido")
    tables = synthetic.study(num_epochs=4, paper=None)
    figures = evidence_of(tables).figures[1:3]
    paths = export.write_figures(figures, folder=tmp_path)
    assert [path.suffix for path in paths] == [".png", ".svg", ".pdf"] * 2
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert "1x16d" in paths[1].read_text()
    assert paths[2].read_bytes().startswith(b"%PDF")
    if shutil.which("pdffonts"):
        listed = subprocess.run(
            ["pdffonts", paths[2]], capture_output=True, text=True, check=True
        ).stdout.splitlines()[2:]
        assert listed
        # Columns from the right: object, id, unicode, subset, embedded.
        assert all(line.split()[-5] == "yes" for line in listed)
        assert all("Type 3" not in line for line in listed)


def test_missing_kaleido_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without kaleido the message tells what to install, browser included."""
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(MissingExtraError, match=r"resnext-ablate\[figures\].*Chromium"):
        export.write_figures((), folder=tmp_path)


@pytest.mark.slow
def test_no_browser_costs_the_figures_only(tmp_path: Path) -> None:
    """Without a browser: exit 4, the remedy on stderr, and all tables written."""
    pytest.importorskip("kaleido")
    folder = tmp_path / "study"
    shutil.copytree(REPOSITORY / "results" / "cifar10_jpeg", folder)
    code = "from resnext_ablate.face.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "export", str(folder), "--paper"],
        env={"PATH": "/nowhere", "BROWSER_PATH": "/nowhere/chrome", "HOME": "/nowhere",
             "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "apt-get install chromium" in done.stderr
    assert "Traceback" not in done.stderr
    assert (folder / "tables" / "results.tex").exists()
    count = len(list((folder / "tables").iterdir()))
    assert count >= 20
    assert done.stdout.startswith(f"cifar10_jpeg: {count} files of tables in")


def test_print_is_light_on_white() -> None:
    """A figure for paper has a white ground and dark ink, its page's figure has not."""
    figure = gallery.Figure("key", _one_figure(), "title", "note").figure
    printed = export.for_print(figure)
    assert printed.layout.paper_bgcolor == "white"
    assert printed.layout.template.layout.font.color == "#1c2430"
    assert figure.layout.paper_bgcolor == "rgba(0,0,0,0)"


def _one_figure():  # type: ignore[no-untyped-def]
    return evidence_of(synthetic.study(num_epochs=4)).figures[0].figure
