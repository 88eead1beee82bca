"""Two studies side by side: what they share, how it changed, what differs."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import synthetic

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.evidence.compare import compare, write_page
from resnext_ablate.records.tables import StudyTables

REPOSITORY = Path(__file__).parents[1]


def other(tables: StudyTables, *, shift: float = 0.0, **config: Any) -> StudyTables:
    """The study under another name, its errors shifted, settings replaced."""
    runs = tables.runs.assign(test_error_pct=tables.runs["test_error_pct"] + shift)
    renamed = tables.config.model_copy(update={"name": "other", **config})
    return dataclasses.replace(tables, study="other", config=renamed, runs=runs)


def test_shared_nets_are_compared_directly() -> None:
    """The same net in both: second minus first, with one family's intervals."""
    first = synthetic.study(sd=0.05, num_seeds=5)
    pair = compare(first, other(first, shift=-1.0))
    assert pair.nets["is_same_net"].all()
    assert pair.nets["change"].tolist() == pytest.approx([-1.0] * 5)
    assert pair.nets["verdict"].unique().tolist() == ["better"]
    assert (pair.nets["p_corrected"] < 1e-4).all()
    low, high = pair.nets["change_interval"][0].split(" to ")
    assert float(low) < -1.0 < float(high)
    assert pair.verdict == (
        "Of 5 nets that synthetic and other share, 5 have a test error that is shown "
        "to differ."
    )
    assert pair.settings.empty


def test_no_change_is_no_claim() -> None:
    """Two equal studies differ in nothing; precise ones are shown equivalent."""
    first = synthetic.study(sd=0.05, num_seeds=5)
    verdicts = compare(first, other(first)).nets["verdict"].unique().tolist()
    assert verdicts == ["equivalent within 0.5 points"]


def test_other_currency_pairs_by_cardinality() -> None:
    """Nets of another budget stand beside those of equal cardinality, untested."""
    first = synthetic.study()
    second = other(synthetic.study(num_variants=4))
    second.nets["name"] = second.nets["name"] + "-other"
    net = second.config.net.model_copy(update={"hold": "params"})
    second = dataclasses.replace(
        second, config=second.config.model_copy(update={"net": net})
    )
    pair = compare(first, second)
    assert not pair.nets["is_same_net"].any()
    assert pair.nets["variant_second"].tolist() == [
        "1x16d",
        "2x10d",
        "4x6d",
        "8x3d",
        "",
    ]
    assert pair.nets["change"].isna().all()
    assert pair.nets["difference_second"][0] == 0.0
    assert pair.verdict.startswith(
        "synthetic and other share no net; 4 of their nets stand side by side"
    )
    assert pair.settings.to_dict("records") == [
        {"setting": "net.hold", "first": "'macs'", "second": "'params'"}
    ]


def test_other_images_are_said() -> None:
    """Errors on different images are compared with a warning, not in silence."""
    first = synthetic.study()
    second = dataclasses.replace(
        other(first), provenance={**first.provenance, "data_checksum": "1" * 64}
    )
    pair = compare(first, second)
    assert pair.verdict.endswith("They used different images.")
    assert pair.settings["setting"].tolist() == ["images (checksum)"]


def test_single_runs_claim_nothing() -> None:
    """With one seed the change is shown without interval and undecided."""
    first = synthetic.study(num_seeds=1)
    nets = compare(first, other(first, shift=-2.0)).nets
    assert nets["change"].tolist() == pytest.approx([-2.0] * 5)
    assert nets["verdict"].unique().tolist() == ["undecided"]
    assert nets["change_interval"].isna().all()


def test_orders_of_shared_nets_are_correlated(tmp_path: Path) -> None:
    """Short against long: tau with interval and noise ceiling, in words and drawn."""
    first = synthetic.study(sd=0.3, num_seeds=5)
    second = other(first)
    turned = {"1x16d": 0.0, "2x10d": -2.0}  # The second best of the others by far.
    shift = second.runs["variant"].map(turned).fillna(0.0)
    second.runs["test_error_pct"] += shift
    pair = compare(first, second)
    assert pair.agreement is not None
    # One net passes three others: three of ten pairs turn.
    assert pair.agreement.tau == pytest.approx((10 - 2 * 3) / 10)
    assert pair.agreement.low < 0.4 < pair.agreement.high
    assert 0.8 < pair.agreement.ceiling <= 1
    said = pair.ranking
    assert said.startswith(
        "Kendall's tau between their orders of the 5 nets that both trained: +0.40 (95"
    )
    assert "seed noise leaves" in said
    chart = pair.figures[-1]
    assert chart.key == "sides-ranks"
    assert chart.title == (
        "Rank correlation +0.40 between synthetic and other: 2x10d, best in other, is "
        "4th in synthetic"
    )
    write_page(pair, tmp_path / "both.html")
    assert "their orders of the 5" in (tmp_path / "both.html").read_text().replace(
        "\u00a0", " "
    )


def test_few_shared_nets_have_no_order() -> None:
    """Two nets in both studies say nothing of their orders."""
    first = synthetic.study(num_variants=2)
    pair = compare(first, other(first))
    assert pair.agreement is None
    assert pair.ranking == ""
    assert [one.key for one in pair.figures] == ["sides-errors", "sides-differences"]


def test_a_study_is_not_compared_with_itself() -> None:
    """The same study twice is a slip, and says so."""
    tables = synthetic.study()
    with pytest.raises(InputError, match="cannot be compared with itself"):
        compare(tables, tables)


def test_page_shows_both(tmp_path: Path) -> None:
    """One sealed file with both studies' charts, told apart by more than colour."""
    first = synthetic.study()
    pair = compare(first, other(first, shift=-0.4))
    html = tmp_path / "new" / "both.html"
    write_page(pair, html)
    text = html.read_text(encoding="utf-8")
    assert "synthetic and other" in text
    assert not re.search(r"(?:src|href)=\"(?!#)", text)
    for one in pair.figures[:2]:
        lines = [t for t in one.figure.data if t.mode and t.mode.startswith("lines")]
        assert len({trace.marker.symbol for trace in lines}) == 2
        assert len({trace.line.dash for trace in lines}) == 2
    assert len(pair.figures[0].figure.data) == 4  # Seeds and means of each study.


@pytest.mark.slow
def test_command_compares_two_folders(tmp_path: Path) -> None:
    """The command prints table and settings that differ, and writes the page."""
    for name, lr in (("one", "0.1"), ("two", "0.05")):
        shutil.copytree(REPOSITORY / "results" / "cifar10_jpeg", tmp_path / name)
        file = tmp_path / name / "study.toml"
        text = file.read_text().replace('name = "cifar10_jpeg"', f'name = "{name}"')
        file.write_text(
            re.sub(r"learning_rate = [\d.]+", f"learning_rate = {lr}", text)
        )
    code = "from resnext_ablate.face.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "compare", "one", "two", "--results", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "train.learning_rate: 0.1 in one, 0.05 in two" in done.stdout
    assert "Of 4 nets that one and two share, 0 have" in done.stdout
    assert (tmp_path / "one-and-two.html").stat().st_size < 2.5e6
