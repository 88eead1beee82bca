"""Two studies in one chart, by cardinality or by FLOPs: frames -> data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from resnext_ablate.evidence import chart_style as style


@dataclass(frozen=True)
class SidesData:
    """Points of two studies over one axis."""

    title: str
    note: str
    x_title: str
    y_title: str
    log2_x: bool
    names: tuple[str, str]
    points: pd.DataFrame
    """study, variant, x, mean, low, high, n; `study` is a name."""
    seeds: pd.DataFrame
    """study, variant, seed, x, y."""


def errors_data(
    names: tuple[str, str],
    *,
    variants: Sequence[pd.DataFrame],
    runs: Sequence[pd.DataFrame],
) -> SidesData:
    """Test errors of both studies, every seed too.

    Args:
        names: of the two studies.
        variants, runs: the tables of each; complete runs only.
    """
    x, log2_x = _axis(variants)
    points = pd.concat(
        pd.DataFrame(
            {
                "study": name,
                "variant": table["variant"],
                "x": table[x],
                "mean": table["test_error_pct_mean"],
                "low": table["test_error_pct_ci_low"],
                "high": table["test_error_pct_ci_high"],
                "n": table["n"],
            }
        )
        for name, table in zip(names, variants, strict=True)
    ).dropna(subset=["mean"])
    seeds = pd.concat(
        runs_of[["variant", "seed", "test_error_pct"]].merge(
            table[["variant"]].assign(x=table[x], study=name), on="variant"
        )
        for name, table, runs_of in zip(names, variants, runs, strict=True)
    )
    columns = ["study", "variant", "seed", "x", "test_error_pct"]
    best = points.sort_values("mean").drop_duplicates("study")
    said = "; ".join(
        f"{row.study} {row.mean:.2f} % ({row.variant})"
        for row in best.itertuples(index=False)
    )
    return SidesData(
        title=f"Lowest mean test error: {said}",
        note="Each small dot is one seed, each large mark a mean with its 95 % "
        "t-interval.",
        x_title="cardinality (log2 scale)" if log2_x else style.FLOPS_AXIS,
        y_title="test error (%)",
        log2_x=log2_x,
        names=names,
        points=points.reset_index(drop=True),
        seeds=seeds[columns]
        .set_axis(["study", "variant", "seed", "x", "y"], axis=1)
        .reset_index(drop=True),
    )


def differences_data(
    names: tuple[str, str],
    *,
    variants: Sequence[pd.DataFrame],
    comparisons: Sequence[pd.DataFrame],
) -> SidesData:
    """Differences of both studies, each from its own reference."""
    x, log2_x = _axis(variants)
    parts = []
    for name, table, found in zip(names, variants, comparisons, strict=True):
        rows = found.merge(table[["variant"]].assign(x=table[x]), on="variant")
        part = rows[
            ["variant", "x", "difference_pct", "ci_low", "ci_high", "n_variant"]
        ]
        part = part.set_axis(["variant", "x", "mean", "low", "high", "n"], axis=1)
        parts.append(part.assign(study=name))
    points = pd.concat(parts, ignore_index=True).dropna(subset=["mean"])
    lower = ", ".join(
        f"{int((points.loc[points['study'] == name, 'mean'] < 0).sum())} of "
        f"{int((points['study'] == name).sum())} in {name}"
        for name in names
    )
    return SidesData(
        title=f"Lower mean error than their own reference: {lower}",
        note="Variant minus its own study's reference, with the interval that holds "
        "for all comparisons of that study together at 95 %.",
        x_title="cardinality (log2 scale)" if log2_x else style.FLOPS_AXIS,
        y_title="difference (points)",
        log2_x=log2_x,
        names=names,
        points=points.reset_index(drop=True),
        seeds=pd.DataFrame(columns=["study", "variant", "seed", "x", "y"]),
    )


def _axis(variants: Sequence[pd.DataFrame]) -> tuple[str, bool]:
    """Cardinality where both studies vary it, else FLOPs."""
    if all(table["cardinality"].nunique() > 1 for table in variants):
        return "cardinality", True
    return "macs", False
