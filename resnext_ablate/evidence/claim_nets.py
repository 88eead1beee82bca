"""The nets that play a part in a claim, found in a study by their shapes.

One function reads our nets and the paper's, so that both are summed alike. Each takes a
frame with a row for each net (variant, name, cardinality, base_width, depth, macs,
params) and returns the contrasts of one claim, or raises InputError where the study has
not the nets for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.evidence.contrasts import Contrast


def cardinality_at_equal_cost(nets: pd.DataFrame) -> tuple[Contrast, ...]:
    """The most cardinality against none (S1, T1, S5)."""
    most = nets["cardinality"].max()
    return (
        _less(
            _only(nets[nets["cardinality"] == most], "of the most cardinality"),
            _only(nets[nets["cardinality"] == 1], "of cardinality 1"),
            label=f"cardinality {most} minus cardinality 1",
        ),
    )


def ways_to_double(nets: pd.DataFrame) -> tuple[Contrast, ...]:
    """At twice the FLOPs cardinality against width, and width against depth (S2)."""
    double = _double(nets)
    return (
        _less(double.grouped, double.wider, label="cardinality minus width, at 2x"),
        _less(double.wider, double.deeper, label="width minus depth, at 2x"),
    )


def once_against_twice(nets: pd.DataFrame) -> tuple[Contrast, ...]:
    """Cardinality at 1x FLOPs against depth and width at twice those (S7)."""
    double = _double(nets)
    once = nets[~nets["variant"].isin(double.all)]
    grouped = _only(once[once["cardinality"] > 1], "of cardinality at the lower FLOPs")
    return (
        _less(grouped, double.deeper, label="cardinality at 1x minus depth at 2x"),
        _less(grouped, double.wider, label="cardinality at 1x minus width at 2x"),
    )


def shortcuts_removed(nets: pd.DataFrame) -> tuple[Contrast, ...]:
    """What goes without shortcuts, in a net of one branch and in one of many (S3)."""
    without = nets["name"].str.contains("-noshortcut")
    plain = nets["cardinality"] == 1
    a = _only(nets[plain & ~without], "of cardinality 1 with shortcuts")
    b = _only(nets[plain & without], "of cardinality 1 without shortcuts")
    c = _only(nets[~plain & ~without], "of cardinality with shortcuts")
    d = _only(nets[~plain & without], "of cardinality without shortcuts")
    return (
        Contrast("ResNet, without minus with shortcuts", {b: 1, a: -1}, 1),
        Contrast("ResNeXt, without minus with shortcuts", {d: 1, c: -1}, 1),
        Contrast(
            "loss of ResNeXt minus loss of ResNet", {d: 1, c: -1, b: -1, a: 1}, -1
        ),
        Contrast("without shortcuts, ResNeXt minus ResNet", {d: 1, b: -1}, -1),
    )


def curves_of_size(nets: pd.DataFrame) -> tuple[Contrast, ...]:
    """Cardinality against width at equal parameters, over the sizes of both (S4).

    The curve of width is drawn straight between its nets over the logarithm of the
    parameters; the gap is the mean over the nets of the other curve that lie within.
    """
    base = nets.loc[nets["cardinality"].idxmin(), "base_width"]
    wide = nets[nets["cardinality"] == 1].sort_values("params")
    sizes = np.log(wide["params"].to_numpy(float))
    many = nets[(nets["cardinality"] > 1) & (nets["base_width"] == base)]
    at = np.log(many["params"].to_numpy(float))
    inside = (at >= sizes[0]) & (at <= sizes[-1])
    if not inside.any():
        raise InputError("the claim needs two curves of nets that overlap in size.")
    weights = dict.fromkeys(nets["variant"], 0.0)
    for variant, size in zip(many["variant"][inside], at[inside], strict=True):
        weights[variant] += 1 / inside.sum()
        shares = _interpolation(sizes, size)
        for other, share in zip(wide["variant"], shares, strict=True):
            weights[other] -= share / inside.sum()
    used = {variant: weight for variant, weight in weights.items() if weight}
    label = f"cardinality minus width, mean over {inside.sum()} sizes"
    return (Contrast(label, used, -1),)


def _interpolation(places: np.ndarray, at: float) -> list[float]:
    """The share of each place in the value at a point between two of them."""
    units = np.eye(len(places))
    return [float(np.interp(at, places, unit)) for unit in units]


@dataclass(frozen=True)
class _Double:
    """The nets at twice the FLOPs, by what was raised."""

    deeper: str
    wider: str
    grouped: str
    all: tuple[str, ...]


def _double(nets: pd.DataFrame) -> _Double:
    double = nets[nets["macs"] > 0.75 * nets["macs"].max()]
    depth = double["depth"].min()
    plain = double[double["cardinality"] == 1]
    return _Double(
        deeper=_only(
            plain[plain["depth"] > depth], "that is deeper at twice the FLOPs"
        ),
        wider=_only(plain[plain["depth"] == depth], "that is wider at twice the FLOPs"),
        grouped=_only(
            double[double["cardinality"] == max(2, double["cardinality"].max())],
            "of the most cardinality at twice the FLOPs",
        ),
        all=tuple(double["variant"]),
    )


def _only(nets: pd.DataFrame, what: str) -> str:
    """The one net that plays a part in a claim.

    Raises:
        InputError: there is none, or there are several.
    """
    if len(nets) == 1:
        return str(nets["variant"].iloc[0])
    found = ", ".join(nets["variant"]) or "none"
    raise InputError(f"the claim needs one net {what}; the study has {found}.")


def _less(first: str, second: str, *, label: str) -> Contrast:
    """That the first of two nets has the lower error."""
    return Contrast(label, {first: 1, second: -1}, -1)
