"""Widths solved by measuring: exact on a made-up device, honest about a noisy one."""

from collections.abc import Sequence

import numpy as np
import pytest
from test_certificate import COST, COSTS

from resnext_ablate.architecture.complexity import complexity
from resnext_ablate.architecture.matching import Hold, Widths
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec
from resnext_ablate.compute.measured import match_measured
from resnext_ablate.records.certificate import DeviceCosts, NetCost, Spread

REFERENCE = parse_spec("resnet29-t32")


class MadeUpDevice:
    """Time grows with macs and with cardinality; memory with activations."""

    def __init__(self, *, noise: float = 0.0, half_width_pct: float = 0.1) -> None:
        self.rng = np.random.default_rng(0)
        self.noise = noise
        self.half_width_pct = half_width_pct
        self.measured: list[tuple[ResNeXtSpec, ...]] = []

    def time_s(self, spec: ResNeXtSpec) -> float:
        slowdown = 1 + 0.1 * np.log2(spec.cardinalities[0])
        return (1e6 + complexity(spec, 32).macs) * slowdown

    def __call__(self, specs: Sequence[ResNeXtSpec]) -> DeviceCosts:
        self.measured.append(tuple(specs))
        memory = [complexity(spec, 32).activations for spec in specs]
        nets = []
        for spec, bytes_of in zip(specs, memory, strict=True):
            error = 100 * (self.time_s(spec) / self.time_s(specs[0]) - 1)
            error += self.noise * self.rng.standard_normal()
            nets.append(
                NetCost(
                    name=spec.name,
                    step_s=COST.step_s,
                    forward_s=COST.forward_s,
                    step_floor_s=0.1,
                    peak_memory_mib=float(bytes_of),
                    step_time_error_pct=Spread(
                        median=error,
                        low=error - self.half_width_pct,
                        high=error + self.half_width_pct,
                        num_repeats=9,
                    ),
                    peak_memory_error_pct=100 * (bytes_of / memory[0] - 1),
                )
            )
        return DeviceCosts(**{**vars(COSTS), "nets": tuple(nets)})


def solve(
    device: MadeUpDevice,
    *,
    hold: Hold = "step_time",
    tolerance_pct: float = 1.0,
    widths: Widths = "auto",
    cardinalities: Sequence[int] = (1, 2, 4, 8, 32),
) -> tuple[tuple[ResNeXtSpec, ...], DeviceCosts]:
    return match_measured(
        REFERENCE,
        cardinalities=cardinalities,
        hold=hold,
        tolerance_pct=tolerance_pct,
        image_size=32,
        reference=REFERENCE,
        widths=widths,
        search=device,
        confirm=device,
    )


def test_equal_time_on_an_exact_device() -> None:
    """Every cardinality is brought within the tolerance, the reference as it is."""
    device = MadeUpDevice()
    found, costs = solve(device)
    assert found[0] == REFERENCE
    assert [spec.cardinality for spec in found] == [1, 2, 4, 8, 32]
    for spec in found:
        assert device.time_s(spec) == pytest.approx(device.time_s(REFERENCE), rel=0.01)
    # Equal time is not equal macs here: 32 groups are half slower.
    assert complexity(found[-1], 32).macs < 0.72 * complexity(REFERENCE, 32).macs
    assert [cost.name for cost in costs.nets] == [spec.name for spec in found]


def test_what_was_found_is_measured_afresh() -> None:
    """The last measurement is of the found nets together, and its costs are given."""
    device = MadeUpDevice(noise=0.3)
    found, costs = solve(device, tolerance_pct=3)
    assert device.measured[-1] == found
    assert costs.nets[1].step_time_error_pct.median != 0
    assert len(device.measured) <= 12


def test_doubling_is_kept_where_it_reaches() -> None:
    """Free widths come only where no doubling base width is within the tolerance."""
    found, _ = solve(MadeUpDevice(), tolerance_pct=4, cardinalities=(2, 16))
    assert found[0].doubles and not found[1].doubles


def test_equal_memory() -> None:
    """The other measured currency is held as well."""
    found, costs = solve(MadeUpDevice(), hold="peak_memory", tolerance_pct=2)
    own = complexity(REFERENCE, 32).activations
    for spec in found:
        assert complexity(spec, 32).activations == pytest.approx(own, rel=0.02)
    assert all(abs(cost.peak_memory_error_pct) <= 2 for cost in costs.nets)


def test_out_of_reach_names_the_nearest() -> None:
    """Where widths cannot meet the reference, the nearest is named with its error."""
    with pytest.raises(InputError, match=r"nearest: resnext29-512x.*free widths may"):
        solve(MadeUpDevice(), widths="doubling", cardinalities=(512,))


def test_noise_that_hides_a_match_is_said() -> None:
    """A match within 1 % cannot be shown by measurements of +-5 %."""
    with pytest.raises(InputError, match=r"measured to \+-5.0 %.*match within 1 %"):
        solve(MadeUpDevice(half_width_pct=5.0))


def test_bad_requests_are_refused_before_anything_is_measured() -> None:
    """The rules of `match` hold here too."""
    device = MadeUpDevice()
    with pytest.raises(InputError, match="more than once: 4"):
        solve(device, cardinalities=(4, 4))
    with pytest.raises(InputError, match="tolerance_pct"):
        solve(device, tolerance_pct=float("nan"))
    assert device.measured == []
