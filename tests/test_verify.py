"""A report is recomputed from its own data, and what was edited in it is found."""

from __future__ import annotations

import base64
import copy
import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.evidence import embedding
from resnext_ablate.evidence.report import write_report
from resnext_ablate.evidence.verify import Verification, verify
from resnext_ablate.records.tables import read_tables

REAL = Path(__file__).parents[1] / "results" / "cifar10_jpeg"
PAYLOAD = re.compile(r'(?<=id="payload">)[^<]*')


def small_study() -> Any:
    return synthetic.study(num_variants=3, num_seeds=2, num_epochs=4, num_images=50)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("whole")
    return write_report(small_study(), folder=folder).html.read_text(encoding="utf-8")


def opened(text: str) -> Any:
    found = PAYLOAD.search(text)
    assert found
    return json.loads(gzip.decompress(base64.b64decode(found[0])))


def closed(text: str, payload: Any) -> str:
    packed = base64.b64encode(gzip.compress(json.dumps(payload).encode())).decode()
    return PAYLOAD.sub(packed, text)


def checked(text: str, folder: Path) -> Verification:
    html = folder / "report.html"
    html.write_text(text, encoding="utf-8")
    return verify(html)


def test_untouched_report_holds(text: str, tmp_path: Path) -> None:
    """Every number follows from the data inside, thousands of them."""
    found = checked(text, tmp_path)
    assert found.findings == ()
    assert found.num_numbers > 1000
    assert found.num_runs == 6
    assert found.run_files == "not there"


def number_leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the numbers of a payload stand."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return [path] if is_number else []
    return [leaf for key, one in items for leaf in number_leaves(one, (*path, key))]


def with_changed(payload: Any, path: tuple[Any, ...]) -> Any:
    """A copy with one number changed by 1 percent."""
    changed = copy.deepcopy(payload)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    value = inner[path[-1]]
    step = round(value * 0.01) or 1 if isinstance(value, int) else 0.01 * abs(value)
    inner[path[-1]] = value + (step or 0.01)
    return changed


def edit_of_text(text: str, rng: np.random.Generator) -> str:
    """Changes one digit of what a reader sees without scripts."""
    body = text.index("<body")
    end = text.index('<script type="text/plain"')
    digits = [m.start() for m in re.finditer(r"(?<=[\s>.+-])\d", text[body:end])]
    at = body + int(rng.choice(digits))
    return f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}"


def edit_of_chart(text: str, rng: np.random.Generator) -> str:
    """Changes one number that a chart is drawn from."""
    payload = opened(text)
    charts = payload["figures"]
    packed = [
        trace[axis]
        for chart in charts.values()
        for trace in chart["data"]
        for axis in ("x", "y")
        if isinstance(trace.get(axis), dict) and "shape" not in trace[axis]
    ]
    if rng.random() < 0.5:
        array = packed[rng.integers(len(packed))]
        values = np.frombuffer(
            base64.b64decode(array["bdata"]), dtype=array["dtype"]
        ).copy()
        values[rng.integers(len(values))] += 1
        array["bdata"] = base64.b64encode(values.tobytes()).decode()
        return closed(text, payload)
    leaves = number_leaves(charts)
    return closed(
        text,
        {**payload, "figures": with_changed(charts, leaves[rng.integers(len(leaves))])},
    )


def edit_of_results(text: str, rng: np.random.Generator) -> str:
    """Changes one number of the table of results."""
    payload = opened(text)
    tables = payload["tables"]
    leaves = [
        leaf for leaf in number_leaves(tables) if leaf[:2] == ("results", "values")
    ]
    changed = with_changed(tables, leaves[rng.integers(len(leaves))])
    return closed(text, {**payload, "tables": changed})


def edit_of_data(text: str, rng: np.random.Generator) -> str:
    """Changes one number of the data themselves."""
    payload = opened(text)
    frames = payload["frames"]
    leaves = [leaf for leaf in number_leaves(frames) if leaf[1] == "values"]
    changed = with_changed(frames, leaves[rng.integers(len(leaves))])
    return closed(text, {**payload, "frames": changed})


def forgery_of_data(text: str, rng: np.random.Generator) -> str:
    """Changes a run's result, and renews the checksum to match."""
    payload = opened(text)
    columns = ("test_error_pct", "val_error_pct", "train_time_s", "images_per_s")
    values = payload["frames"]["runs"]["values"][columns[rng.integers(len(columns))]]
    values[rng.integers(len(values))] *= 1.01
    payload["checksum"] = embedding.checksum(payload)
    return closed(text, payload)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "count"),
    [
        (edit_of_text, 35),
        (edit_of_chart, 25),
        (edit_of_results, 15),
        (edit_of_data, 15),
        (forgery_of_data, 10),
    ],
)
def test_planted_edits_are_found(
    text: str, tmp_path: Path, edit: Any, count: int
) -> None:
    """Of 100 seeded edits in texts, charts, tables and data, all 100 are found."""
    rng = np.random.default_rng(6)
    for _ in range(count):
        edited = edit(text, rng)
        assert edited != text
        assert checked(edited, tmp_path).findings


def test_finding_says_where(text: str, tmp_path: Path) -> None:
    """A changed cell is named by table and row, with what it says and should say."""
    cell = re.search(r"<td class=\"number\">(\d+\.\d\d)</td>", text)
    assert cell
    edited = text.replace(cell[0], cell[0].replace(cell[1], "1.23"), 1)
    (finding,) = checked(edited, tmp_path).findings
    assert finding.where == "table results, row 1x16d, cell 3"
    assert (finding.shown, finding.expected) == ("1.23", cell[1])


def test_edited_script_and_library_are_found(text: str, tmp_path: Path) -> None:
    """What draws the numbers is checked as they are."""
    script = text.replace("const show = ", "const shown = ", 1)
    assert checked(script, tmp_path).findings
    packed = base64.b64encode(gzip.compress(b"alert(1)")).decode()
    library = re.sub(r'(?<=id="plotly">)[^<]*', packed, text)
    (finding,) = checked(library, tmp_path).findings
    assert finding.where == "the drawing library"


@pytest.mark.parametrize("content", ["", "<p>no report</p>", '<script id="payload">'])
def test_other_files_are_no_reports(tmp_path: Path, content: str) -> None:
    """A file that is no report is bad input, not an edited report."""
    with pytest.raises(InputError, match="is no report of this package"):
        checked(content, tmp_path)


def test_run_files_have_the_last_word(tmp_path: Path) -> None:
    """In its folder a report is held to the run files, cell by cell."""
    folder = tmp_path / "study"
    shutil.copytree(REAL, folder)
    write_report(read_tables(folder), folder=folder)
    html = folder / "report.html"
    assert verify(html).run_files == "agree"
    assert verify(html).findings == ()
    run = next(folder.glob("runs/*.json"))
    values = json.loads(run.read_text())
    values["test_error_pct"] -= 1.0
    run.write_text(json.dumps(values))
    found = verify(html)
    assert found.run_files == "differ"
    (finding,) = found.findings
    assert finding.where.startswith("test_error_pct of ")
    assert finding.where.endswith("by the run files")


def test_large_studies_keep_evenly_chosen_epochs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beyond the limit each run keeps as many epochs, its last one among them."""
    monkeypatch.setattr(embedding, "MAX_WHOLE_EPOCHS", 20)
    monkeypatch.setattr(embedding, "MAX_EPOCHS", 30)
    tables = synthetic.study(num_variants=5, num_seeds=2, num_epochs=21)
    kept = embedding.reduced(tables)
    epochs = kept.epochs.groupby(["variant", "seed"])["epoch"].apply(list)
    assert set(map(tuple, epochs)) == {(1, 11, 21)}
    assert "train_loss" not in kept.epochs
    assert embedding.epochs_note(kept).startswith("30 of 210 epochs, evenly chosen")
    assert embedding.reduced(kept).epochs.equals(kept.epochs)
    whole = synthetic.study(num_variants=1, num_seeds=1, num_epochs=20)
    assert embedding.epochs_note(embedding.reduced(whole)) == ""
