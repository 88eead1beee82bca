"""Run files, plans and tables: whole or absent, and read back as written."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.spec import InputError
from resnext_ablate.records import records, tables
from resnext_ablate.records.records import EpochRecord, RunRecord

finite = st.floats(allow_nan=False, allow_infinity=False)

epoch_records = st.builds(
    EpochRecord,
    epoch=st.integers(1, 1000),
    train_loss=finite,
    train_error_pct=finite,
    val_loss=finite,
    val_error_pct=finite,
    learning_rate=finite,
    time_s=finite,
    images_per_s=finite,
    peak_memory_mib=finite,
)

run_records = st.builds(
    RunRecord,
    cell=st.text("0123456789abcdef", min_size=16, max_size=16),
    variant=st.text(max_size=20),
    seed=st.integers(0, 2**31 - 1),
    state=st.sampled_from(["complete", "diverged", "failed"]),
    reason=st.text(max_size=80),
    device=st.text(max_size=20),
    precision=st.sampled_from(["fp32", "bf16"]),
    data_checksum=st.text(max_size=20),
    started_at=st.text(max_size=20),
    environment=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
    epochs=st.lists(epoch_records, max_size=3).map(tuple),
    test_error_pct=st.none() | finite,
    train_time_s=st.none() | finite,
    roofline_pct=st.none() | finite,
)

RUN = RunRecord(
    cell="0123456789abcdef",
    variant="1x8d",
    seed=0,
    state="complete",
    reason="",
    device="cpu",
    precision="fp32",
    data_checksum="",
    started_at="",
    environment={},
)


@given(run=run_records)
def test_run_file_reads_back_as_the_same_run(
    tmp_path_factory: pytest.TempPathFactory, run: RunRecord
) -> None:
    """No field of any run is lost or rounded on disk."""
    folder = tmp_path_factory.mktemp("study")
    records.write_run(run, folder)
    assert records.read_run(folder, run.cell) == run


@pytest.mark.parametrize("size", [0, 1, 50, -1])
def test_torn_run_file_counts_as_none(tmp_path: Path, size: int) -> None:
    """A file cut anywhere is no result, and no exception."""
    records.write_run(RUN, tmp_path)
    path = records.run_path(tmp_path, RUN.cell)
    path.write_text(path.read_text()[:size])
    assert records.read_run(tmp_path, RUN.cell) is None


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", '{"schema_version": 1}', "\xff"]
)
def test_foreign_run_file_counts_as_none(tmp_path: Path, content: str) -> None:
    """JSON of another shape, or no text at all, is no result either."""
    path = records.run_path(tmp_path, RUN.cell)
    path.parent.mkdir()
    path.write_bytes(content.encode("latin-1"))
    assert records.read_run(tmp_path, RUN.cell) is None


def test_run_of_another_schema_version_counts_as_none(tmp_path: Path) -> None:
    """A later package's run file is not misread."""
    records.write_run(RUN, tmp_path)
    path = records.run_path(tmp_path, RUN.cell)
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "schema_version": 2}))
    assert records.read_run(tmp_path, RUN.cell) is None


def test_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the disk fails in mid-write, the file is the old one and no litter stays."""
    path = tmp_path / "file.json"
    records.write_atomically(path, "old")

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        records.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_cell_ids_tell_nets_and_seeds_apart() -> None:
    """Each (net, seed) has its own id, the same in every process."""
    nets = [parse_spec(name) for name in ("resnet11-t8", "resnext11-2x5d-t8")]
    ids = [records.cell_id(net, seed) for net in nets for seed in range(3)]
    assert len(set(ids)) == 6
    assert records.cell_id(parse_spec("resnet11"), 0) == "35c1b608eb7445af"


def test_packed_bits_hold_one_bit_per_image() -> None:
    """1,000 verdicts take 125 bytes, and unpack to themselves."""
    correct = np.random.default_rng(0).random(1000) < 0.9
    packed = np.frombuffer(
        records.base64.b64decode(records.pack_bits(correct)), dtype=np.uint8
    )
    assert packed.size == 125
    assert (np.unpackbits(packed).astype(bool) == correct).all()


def test_folder_without_a_plan_is_refused(tmp_path: Path) -> None:
    """A folder that holds no study is named as such."""
    with pytest.raises(InputError, match="holds no study"):
        records.read_plan(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"schema_version": 1}'])
def test_damaged_plan_is_refused(tmp_path: Path, content: str) -> None:
    """A damaged plan is one message."""
    (tmp_path / records.PLAN_FILE).write_text(content)
    with pytest.raises(InputError, match="damaged"):
        records.read_plan(tmp_path)


def test_table_carries_provenance_and_equals_in_both_forms(tmp_path: Path) -> None:
    """Parquet keeps the provenance; CSV and Parquet hold the same numbers."""
    frame = pd.DataFrame({"variant": ["1x8d", "2x5d"], "error": [1 / 3, float("nan")]})
    tables.write_table(frame, tmp_path / "table", provenance={"torch_version": "9"})
    parquet = pd.read_parquet(tmp_path / "table.parquet")
    assert parquet.attrs == {"torch_version": "9"}
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "table.csv"), frame)
    pd.testing.assert_frame_equal(parquet, frame, check_dtype=False)


def test_empty_tables_keep_their_columns() -> None:
    """A study without a finished run still has tables with all columns."""
    plan = records.Plan(nets=(), cells=(), provenance={})
    runs = tables._runs_frame("tiny", plan, (), attempts=())
    assert {"variant", "seed", "test_error_pct", "fvcore_macs"} <= set(runs.columns)
    epochs = tables._epochs_frame("tiny", ())
    assert list(epochs.columns)[:3] == ["study", "variant", "seed"]
    fields = {field.name for field in dataclasses.fields(EpochRecord)}
    assert fields <= set(epochs.columns)
