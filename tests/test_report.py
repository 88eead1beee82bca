"""The report's tables, its sentence and its page as text."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import synthetic

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.evidence import embedding, report
from resnext_ablate.evidence.report import write_report

FAILED = {(2, 1): "non-finite loss at epoch 3, step 17", (4, 2): "executor died"}


def payload_of(html: str) -> dict[str, Any]:
    """The data that a page carries."""
    found = re.search(r'id="payload">([^<]*)<', html)
    assert found
    value: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(found[1])))
    return value


def test_tables(tmp_path: Path) -> None:
    """Variants and comparisons lie on disk as CSV and Parquet, with provenance."""
    tables = synthetic.study()
    files = write_report(tables, folder=tmp_path / "new" / "folder")
    folder = files.html.parent
    variants = pd.read_csv(folder / "variants.csv")
    assert variants["variant"].tolist() == tables.nets["variant"].tolist()
    assert set(tables.nets.columns) < set(variants.columns)
    errors = tables.runs[tables.runs["variant"] == "4x6d"]["test_error_pct"]
    row = variants.set_index("variant").loc["4x6d"]
    assert row["n"] == 3
    assert row["test_error_pct_mean"] == pytest.approx(errors.mean())
    assert row["test_error_pct_sd"] == pytest.approx(errors.std())
    half = 4.302653 * errors.std() / math.sqrt(3)
    assert row["test_error_pct_ci_high"] == pytest.approx(errors.mean() + half)
    speeds = tables.runs[tables.runs["variant"] == "4x6d"]["images_per_s"]
    assert row["time_per_image_ms_mean"] == pytest.approx((1000 / speeds).mean())
    comparisons = pd.read_parquet(folder / "comparisons.parquet")
    assert comparisons.attrs["command"] == tables.provenance["command"]
    assert comparisons["variant"].tolist() == ["2x10d", "4x6d", "8x3d", "32x1d"]
    assert comparisons["reference"].unique().tolist() == ["1x16d"]
    means = variants.set_index("variant")["test_error_pct_mean"]
    expected = means["8x3d"] - means["1x16d"]
    found = comparisons.set_index("variant")["difference_pct"]["8x3d"]
    assert found == pytest.approx(expected)
    assert (comparisons["ci_low"] < comparisons["difference_pct"]).all()


def test_failed_runs_do_not_count(tmp_path: Path) -> None:
    """Failed and diverged runs enter no number, and are listed with their reason."""
    tables = synthetic.study(failed=FAILED)
    # A number left over from a failed run must not slip in.
    tables.runs.loc[tables.runs["state"] != "complete", "test_error_pct"] = 90.0
    files = write_report(tables, folder=tmp_path)
    counts = files.evidence.variants.set_index("variant")["n"]
    assert counts.to_dict() == {
        "1x16d": 3,
        "2x10d": 3,
        "4x6d": 2,
        "8x3d": 3,
        "32x1d": 2,
    }
    assert files.evidence.variants["test_error_pct_mean"].max() < 10
    assert "13 of 15 runs are complete; 2 failed." in files.evidence.verdict
    html = files.html.read_text(encoding="utf-8")
    assert "non-finite loss at epoch 3, step 17" in html
    payload = payload_of(html)
    states = payload["frames"]["runs"]["values"]["state"]
    failed = [states[row] for row in payload["tables"]["failed"]["rows"]]
    assert failed == ["diverged", "failed"]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"effects": (0.0, -2.0), "num_variants": 2}, "2x10d has "),
        ({"num_variants": 1, "paper": None}, "there is no other variant"),
        ({"num_seeds": 1}, "nothing can be claimed"),
        ({"missing": {(0, 0), (0, 1), (0, 2)}}, "The reference 1x16d has no complete"),
        ({"missing": {(i, s) for i in range(5) for s in (1, 2)}}, "5 of 15 runs are"),
        ({"sd": 0.0, "effects": (0.0,)}, "equal values"),
        (
            {"failed": {(i, s): "lost" for i in range(5) for s in range(3)}},
            "No run is complete",
        ),
    ],
)
def test_partial_studies(tmp_path: Path, kwargs: dict[str, Any], expected: str) -> None:
    """A study of any state gives a report, which says what it lacks."""
    files = write_report(synthetic.study(**kwargs), folder=tmp_path)
    assert expected in files.evidence.verdict
    sentence = files.evidence.verdict.partition(". ")[0].replace(" %", "\u00a0%")
    assert sentence in files.html.read_text(encoding="utf-8")


def test_study_without_any_run(tmp_path: Path) -> None:
    """Before the first run has ended the report shows the match certificate alone."""
    tables = synthetic.study(num_seeds=1)
    object.__setattr__(tables, "runs", tables.runs.iloc[:0])
    object.__setattr__(tables, "epochs", tables.epochs.iloc[:0])
    files = write_report(tables, folder=tmp_path)
    assert files.evidence.verdict.startswith("No run is complete")
    assert payload_of(files.html.read_text())["figures"] == {}


def test_equality_is_said_as_it_is() -> None:
    """What is held counts as equal within the study's tolerance, else parameters do."""
    nets, config = synthetic.study().nets, synthetic.study().config.net
    assert report.equality(nets, config) == "At equal FLOPs (within 2.6 %)"
    nets["macs_error_pct"] = [0.0, 40.0, 80.0, 90.0, 96.0]
    assert report.equality(nets, config) == "At equal parameters (within 2.2 %)"
    closer = config.model_copy(update={"tolerance_pct": 2.0})
    assert report.equality(nets, closer) == "With 1 to 1.96 times the reference's FLOPs"
    timed = config.model_copy(update={"hold": "step_time"})
    nets["step_time_error_pct"] = [0.0, 1.5, -3.0, 0.2, 0.1]
    nets["step_time_error_pct_low"] = [0.0, 0.5, -4.25, 0.1, 0.0]
    nets["step_time_error_pct_high"] = [0.0, 2.5, -1.0, 0.3, 0.2]
    assert report.equality(nets, timed) == (
        "At equal measured step time (medians within 3.0 %, 95 % intervals within "
        "4.2 %)"
    )


def test_unknown_paper_rows(tmp_path: Path) -> None:
    """A misspelt paper key is an input error that names the known ones."""
    with pytest.raises(InputError, match="table3/ResNet-50, table3/ResNet-101"):
        write_report(synthetic.study(paper="table9/VGG"), folder=tmp_path)


def test_paper_rows_match_by_cardinality(tmp_path: Path) -> None:
    """The paper's 32x4d stands beside our 32x1d, against the paper's own 1x64d."""
    files = write_report(synthetic.study(), folder=tmp_path)
    figure = payload_of(files.html.read_text())["figures"]["paper"]
    texts = [text for trace in figure["data"] for text in trace.get("hovertext", ())]
    assert any("32x1d" in text and "paper -1.70" in text for text in texts)
    bare = write_report(synthetic.study(paper=None), folder=tmp_path)
    assert "paper" not in payload_of(bare.html.read_text())["figures"]


def test_page_carries_all_data(tmp_path: Path) -> None:
    """Every run, epoch and answer can be read back from the page alone."""
    tables = synthetic.study(num_images=50)
    html = write_report(tables, folder=tmp_path).html.read_text(encoding="utf-8")
    carried = embedding.from_value(payload_of(html))
    pd.testing.assert_frame_equal(carried.runs, tables.runs)
    pd.testing.assert_frame_equal(carried.nets, tables.nets)
    pd.testing.assert_frame_equal(carried.epochs, tables.epochs, rtol=1e-4)
    answers = carried.correct["4x6d"][2]
    assert answers.tolist() == tables.correct["4x6d"][2].tolist()
    # Nothing of a study is missing from its page: a new field belongs here too.
    assert {field.name for field in dataclasses.fields(tables)} == {
        *("study", "config", "provenance", "nets", "runs", "epochs"),
        *("num_planned", "correct", "attempts", "search"),
    }
    assert carried.config == tables.config
    assert carried.num_planned == tables.num_planned
    assert carried.provenance == tables.provenance


def test_page_is_sealed(tmp_path: Path) -> None:
    """One script runs, by its hash; nothing is loaded; no button shares data."""
    html = write_report(synthetic.study(), folder=tmp_path).html.read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == 1
    digest = hashlib.sha256(scripts[0].encode()).digest()
    assert base64.b64encode(digest).decode() in policy[1]
    assert "unsafe-inline" not in policy[1].partition("style-src")[0]
    assert "showSendToCloud: false" in scripts[0]
    assert not re.search(r"(?:src|href)=\"(?!#)", html)


HOSTILE = "</script><img src=x onerror=alert(1)>\"'{{ 7*7 }}"


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    """Markup in labels, reasons, questions and provenance stays text."""
    tables = synthetic.study(
        labels=[HOSTILE, "b", "c", "d", "e"],
        failed={(1, 1): HOSTILE},
        question=HOSTILE,
        paper=None,
    )
    tables.provenance["cpu"] = HOSTILE
    html = write_report(tables, folder=tmp_path).html.read_text(encoding="utf-8")
    assert "<img" not in html
    assert html.count("</script>") == 3
    assert "{{ 7*7 }}" in html


def test_report_repeats(tmp_path: Path) -> None:
    """The same study gives the same bytes."""
    first = write_report(synthetic.study(), folder=tmp_path).html.read_bytes()
    assert write_report(synthetic.study(), folder=tmp_path).html.read_bytes() == first


@pytest.mark.slow
def test_a_thousand_variants(tmp_path: Path) -> None:
    """1,000 variants with 5 seeds stay one file of 5 MB, made in seconds."""
    tables = synthetic.study(num_variants=1000, num_seeds=5, num_epochs=30, paper=None)
    start = time.process_time()  # The machine may be busy.
    files = write_report(tables, folder=tmp_path)
    assert time.process_time() - start < 20
    assert files.html.stat().st_size <= 5e6
    html = files.html.read_text()
    assert html.count("<tr>") < 450
    assert payload_of(html)["tables"]["runs"]["length"] == 5000


def test_report_needs_no_training_library() -> None:
    """A report renders where torch and Optuna are not installed."""
    code = (
        "import sys; import resnext_ablate.evidence.report; "
        "sys.exit('torch' in sys.modules or 'optuna' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
