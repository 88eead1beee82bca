"""The paper's own numbers, set beside a study's."""

from __future__ import annotations

import importlib.resources

import pandas as pd

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.records.complaints import did_you_mean


def matched_rows(nets: pd.DataFrame, *, key: str | None) -> pd.DataFrame:
    """The paper's rows of a study, each with the variant it belongs to.

    A row belongs to the one variant of its cardinality; where several share that, to
    the one of the same net. `paper_difference` is against the paper's own reference,
    the row that our reference belongs to.

    Raises:
        InputError: see `load_paper`.
    """
    columns = [
        "variant",
        "setting",
        "cardinality",
        "paper_difference",
        "model",
        "source",
    ]
    if key is None:
        return pd.DataFrame(columns=columns)
    rows = load_paper(key)
    unique = rows["cardinality"].is_unique and nets["cardinality"].is_unique
    on = "cardinality" if unique else "name"
    matched = rows.merge(nets[[on, "variant", "is_reference"]], on=on)
    own = matched.loc[matched["is_reference"].astype(bool), "top1_error_pct"]
    if own.empty:
        return pd.DataFrame(columns=columns)
    matched["paper_difference"] = matched["top1_error_pct"] - own.iloc[0]
    return matched[columns]


def load_paper(key: str) -> pd.DataFrame:
    """Numbers of the ResNeXt paper (arXiv:1611.05431).

    Args:
        key: table and model, such as "table3/ResNet-50".

    Raises:
        InputError: there are no such rows; the message names those that are.
    """
    rows = _read("paper.csv").dropna(subset="top1_error_pct")
    keys = rows["table"] + "/" + rows["model"]
    if key not in set(keys):
        known = tuple(dict.fromkeys(keys))
        raise InputError(
            f"report.paper: no rows {key!r}{did_you_mean(key, known)}; known: "
            f"{', '.join(known)}."
        )
    return rows[keys == key].reset_index(drop=True)


def load_counts() -> pd.DataFrame:
    """Every count of Tables 1 and 2, one row each.

    Columns: table, name, image_size; part (whole, block, stem, a stage, head); count;
    printed, with the step of its last digit where print is but approximate (NaN: not
    printed); measured, of built nets; source.
    """
    return _read("paper_counts.csv")


def _read(name: str) -> pd.DataFrame:
    folder = importlib.resources.files("resnext_ablate.records")
    with folder.joinpath(name).open() as file:
        return pd.read_csv(file)
