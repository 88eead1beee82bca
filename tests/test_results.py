"""Committed results are what their run files say, and the README says what they do."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from resnext_ablate.compute.form_check import form_checks
from resnext_ablate.evidence import claims_report
from resnext_ablate.evidence.report import write_report
from resnext_ablate.evidence.verify import verify
from resnext_ablate.records import checks, study_file
from resnext_ablate.records.config import differences, load_study
from resnext_ablate.records.tables import read_tables, write_tables

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "results"
FOLDERS = sorted(path.parent for path in RESULTS.glob("*/plan.json"))
LAPTOP = [folder for folder in FOLDERS if folder.name.endswith("-laptop")]
CHECKED = sorted(path.parent for path in RESULTS.glob("*/checks.csv"))
CLAIMED = sorted(path.parent for path in RESULTS.glob("claims-*/claims.csv"))


def assert_same_tables(folder: Path, fresh: Path) -> None:
    """Every table written anew is the committed one; other versions round alike."""
    for path in sorted(fresh.glob("*.csv")):
        committed = pd.read_csv(folder / path.name)
        pd.testing.assert_frame_equal(committed, pd.read_csv(path), rtol=1e-9)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_tables_and_report_are_what_the_run_files_say(
    folder: Path, tmp_path: Path
) -> None:
    """Regenerated tables are the committed ones, and the report verifies."""
    tables = read_tables(folder)
    write_tables(tables, tmp_path)
    write_report(tables, folder=tmp_path)
    assert_same_tables(folder, tmp_path)
    found = verify(folder / "report.html")
    assert not found.findings
    assert found.run_files == "agree"


@pytest.mark.parametrize("folder", LAPTOP, ids=lambda folder: folder.name)
def test_results_are_those_of_the_profile(folder: Path) -> None:
    """What was run is what the study file's profile says, but for where images lay."""
    study = folder.name.removesuffix("-laptop")
    profile = load_study(REPOSITORY / "studies" / f"{study}.toml", profile="laptop")
    values = study_file.flat(profile.model_dump(mode="json"))
    settled = [key for key, value in values if value == "auto"]
    free = ["data.name", "data.root", *settled]
    committed = load_study(folder / "study.toml")
    assert differences(committed, profile, may_change=free) == ()


@pytest.mark.parametrize("folder", CHECKED, ids=lambda folder: folder.name)
def test_checks_are_computed_anew(folder: Path) -> None:
    """Committed counts are computed again, and still hold."""
    config = checks.load_check(REPOSITORY / "studies" / f"{folder.name}.toml")
    assert config is not None
    part = config.check
    fresh = checks.count_checks(part.counts) or form_checks(part.forms)
    committed = checks.read_checks(folder)
    assert [one.holds for one in committed] == [True] * len(fresh)
    for mine, theirs in zip(fresh, committed, strict=True):
        assert (mine.name, mine.part, mine.count) == (
            theirs.name,
            theirs.part,
            theirs.count,
        )
        if mine.count == checks.DIFFERENCE:  # rounding differs by machine
            assert mine.holds
        else:
            assert mine.ours == theirs.ours


@pytest.mark.parametrize("folder", CLAIMED, ids=lambda folder: folder.name)
def test_claims_are_judged_anew(folder: Path, tmp_path: Path) -> None:
    """The table of claims is what the results beside it say."""
    profile = folder.name.removeprefix("claims-")
    evidence = claims_report.read_evidence(RESULTS, profile=profile)
    fresh = claims_report.write_claims(
        claims_report.claims_table(evidence),
        evidence=evidence,
        profile=profile,
        results=tmp_path,
    )
    assert_same_tables(folder, fresh)
    assert (folder / "claims.md").read_text() == (fresh / "claims.md").read_text()


def test_results_table_of_the_readme_is_a_committed_table() -> None:
    """Every row of it, word for word, stands in claims-laptop/claims.md.

    `resnext-ablate reproduce all` writes that file.
    """
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = readme.partition("\n## The paper's trade-offs\n")[2].partition("\n## ")[0]
    shown = re.findall(r"^\| .*\n", section, re.MULTILINE)
    committed = (RESULTS / "claims-laptop" / "claims.md").read_text(encoding="utf-8")
    assert "".join(shown) == committed
