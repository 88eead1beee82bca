"""Nets are compared at equal compute, whatever an epoch of each costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_parts import curve

from resnext_ablate.records.rungs import Rungs, epochs_to_wait, errors_at


def rungs(*compute: float, unit: str = "macs", tolerance: float = 0.0) -> Rungs:
    return Rungs(
        compute=compute,
        unit=unit,  # type: ignore[arg-type]
        tolerance=tolerance,
        guess_error_pct=90.0,
    )


def test_a_net_of_half_the_macs_is_judged_after_twice_the_epochs() -> None:
    """Both have then spent the same multiply-adds."""
    where = rungs(2, 4)
    assert epochs_to_wait(where, relative_macs=1.0, num_epochs=10) == (2, 4)
    assert epochs_to_wait(where, relative_macs=0.5, num_epochs=10) == (4, 8)
    assert epochs_to_wait(where, relative_macs=2.0, num_epochs=10) == (1, 2)


def test_error_at_a_rung_is_that_of_equal_compute() -> None:
    """The cheap net's fourth epoch stands beside the other's second."""
    errors = [80.0, 60.0, 50.0, 45.0, 42.0]
    assert errors_at(rungs(2), curve(*errors), relative_macs=1.0) == (60.0,)
    assert errors_at(rungs(2), curve(*errors), relative_macs=0.5) == (45.0,)


def test_between_epochs_the_error_lies_on_the_line_through_both() -> None:
    """A net of 0.8 of the macs passes a rung of 2 half-way through its third epoch."""
    found = errors_at(rungs(2), curve(80, 60, 50), relative_macs=0.8)
    assert found == (pytest.approx(55.0),)


def test_before_the_first_epoch_a_net_guesses() -> None:
    """A net that costs twice the rung in one epoch was half-way from guessing there."""
    found = errors_at(rungs(1), curve(50.0), relative_macs=2.0)
    assert found == (pytest.approx(70.0),)


def test_within_the_studys_tolerance_compute_counts_as_equal() -> None:
    """A net a little cheaper than the reference is not held up for a whole epoch."""
    where = rungs(1, 3, tolerance=0.02)
    assert epochs_to_wait(where, relative_macs=0.99, num_epochs=9) == (1, 3)
    assert errors_at(where, curve(70.0), relative_macs=0.99) == (70.0,)
    assert epochs_to_wait(where, relative_macs=0.95, num_epochs=9) == (2, 4)


def test_seconds_are_those_of_training() -> None:
    """In seconds a run may pass a rung behind any epoch but the last."""
    where = rungs(5.0, unit="seconds")
    assert epochs_to_wait(where, relative_macs=1.0, num_epochs=4) == (1, 2, 3)
    found = errors_at(where, curve(80, 60, time_s=4.0), relative_macs=1.0)
    assert found == (pytest.approx(75.0),)


def test_no_rung_no_wait() -> None:
    """Without rungs a run is never held up, and behind the last epoch none is."""
    assert epochs_to_wait(rungs(), relative_macs=1.0, num_epochs=5) == ()
    assert epochs_to_wait(rungs(4.5), relative_macs=1.0, num_epochs=5) == ()


@given(
    relative_macs=st.floats(0.2, 5),
    compute=st.lists(st.integers(1, 12), min_size=1, unique=True).map(sorted),
    slope=st.floats(0.1, 5),
)
def test_linear_curve_gives_the_error_of_the_rungs_own_compute(
    relative_macs: float, compute: list[int], slope: float
) -> None:
    """Where error falls in proportion to compute, nets are equal at every rung."""
    errors = [90 - slope * relative_macs * epoch for epoch in range(1, 13)]
    found = errors_at(rungs(*compute), curve(*errors), relative_macs=relative_macs)
    spent = 12 * relative_macs
    assert len(found) == sum(rung <= spent for rung in compute)
    assert found == pytest.approx([90 - slope * rung for rung in compute[: len(found)]])


@given(
    relative_macs=st.floats(0.2, 5),
    compute=st.lists(st.integers(1, 12), min_size=1, unique=True).map(sorted),
    tolerance=st.sampled_from([0.0, 0.01, 0.05]),
)
def test_a_run_waits_exactly_where_it_passes_a_rung(
    relative_macs: float, compute: list[int], tolerance: float
) -> None:
    """After each epoch waited for more rungs are passed; after no other."""
    where = rungs(*compute, tolerance=tolerance)
    waits = epochs_to_wait(where, relative_macs=relative_macs, num_epochs=12)
    epochs = curve(*range(90, 78, -1))
    passed = [
        len(errors_at(where, epochs[:count], relative_macs=relative_macs))
        for count in range(13)
    ]
    rises = {count for count in range(1, 12) if passed[count] > passed[count - 1]}
    assert set(waits) == rises
