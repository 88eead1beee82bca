"""Widths that hold a budget, and the errors when none does."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import small_specs

from resnext_ablate.architecture.complexity import block_params, complexity
from resnext_ablate.architecture.costs import CURRENCIES, Currency, costs_of
from resnext_ablate.architecture.feasible import enumerate_nets
from resnext_ablate.architecture.matching import (
    Hold,
    Match,
    WhenNone,
    Widths,
    certify,
    match,
    percent,
)
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.space import PerStage, Space, around
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec, doubled

HOLDS: tuple[Hold, ...] = ("block_params", "macs", "params")
PAPER_CARDINALITIES = (1, 2, 4, 8, 32)


def _match(
    *cardinalities: int,
    template: str = "resnet50",
    hold: Hold = "macs",
    tolerance_pct: float = 5,
    image_size: int = 224,
    reference: str | None = None,
    widths: Widths = "doubling",
    when_none: WhenNone = "refuse",
) -> tuple[Match, ...]:
    return match(
        parse_spec(template),
        cardinalities=cardinalities,
        hold=hold,
        tolerance_pct=tolerance_pct,
        image_size=image_size,
        reference=None if reference is None else parse_spec(reference),
        widths=widths,
        when_none=when_none,
    )


def _cost(spec: ResNeXtSpec, hold: Hold, image_size: int) -> int:
    if hold == "block_params":
        return block_params(
            spec.cardinalities[0], spec.base_width, spec.out_channels[0]
        )
    cost = complexity(spec, image_size)
    return int(getattr(cost, hold))


@pytest.mark.parametrize("template", ["resnet50", "resnet101", "resnext101-32x4d"])
def test_equation_4_widths(template: str) -> None:
    """Holding block parameters gives the widths of the paper's Table 2."""
    matches = _match(
        *PAPER_CARDINALITIES,
        template=template,
        hold="block_params",
        reference="resnet50",
    )
    assert [match.spec.base_width for match in matches] == [64, 40, 24, 14, 4]
    assert list(PAPER_CARDINALITIES) == [match.spec.cardinality for match in matches]
    assert all(match.spec.doubles for match in matches)


def test_equation_4_errors() -> None:
    """The blocks of Table 2 and the nets of Table 3 miss by the known percents."""
    matches = _match(*PAPER_CARDINALITIES, hold="block_params")
    blocks = [round(match.block_params_error_pct, 2) for match in matches]
    assert blocks == [0, 0.18, 0.37, 2.62, 0.74]
    assert [round(m.macs_error_pct, 2) for m in matches] == [0, 0.86, 1.73, 4.36, 3.46]
    params = [round(match.params_error_pct, 2) for match in matches]
    assert params == [0, -0.52, -1.03, 0.18, -2.07]


def test_macs_of_table_3_at_101_layers() -> None:
    """The 101-layer nets of Table 3 miss ResNet-101's macs by the known percents."""
    reference = parse_spec("resnet101")
    specs = [
        reference.with_setting(*setting)
        for setting in ((1, 64), (2, 40), (4, 24), (8, 14), (32, 4))
    ]
    errors = [
        certify(spec, reference=reference, image_size=224).macs_error_pct
        for spec in specs
    ]
    assert [round(error, 2) for error in errors] == [0, 0.54, 1.08, 3.53, 2.16]


def test_holding_macs_takes_the_nearest_width() -> None:
    """Holding macs, C = 8 takes 13 (-3.41 %) where Eq. 4 takes 14 (+4.36 %)."""
    (nearest,) = _match(8)
    assert nearest.spec.name == "resnext50-8x13d"
    assert round(nearest.macs_error_pct, 2) == -3.41


def test_budget_of_another_net() -> None:
    """The budget is the reference's, the rest the template's."""
    (found,) = _match(
        4, template="resnet29-t16-c100", reference="resnext29-2x64d-t16", image_size=32
    )
    assert (
        found.spec.num_classes,
        found.spec.template_width,
        found.spec.cardinality,
    ) == (100, 16, 4)
    assert found.macs_error_pct == pytest.approx(
        100 * (found.complexity.macs / _cost_of("resnext29-2x64d-t16") - 1)
    )
    assert abs(found.macs_error_pct) < 5


def _cost_of(name: str) -> int:
    return complexity(parse_spec(name), 32).macs


@settings(deadline=None)
@given(
    reference=small_specs(),
    template=small_specs(),
    cardinality=st.integers(1, 9),
    hold=st.sampled_from(HOLDS),
)
def test_nearest_of_all_widths(
    reference: ResNeXtSpec, template: ResNeXtSpec, cardinality: int, hold: Hold
) -> None:
    """No width comes nearer to the budget than the one found."""
    image_size = max(reference.total_stride, template.total_stride) + 3
    (found,) = match(
        template,
        cardinalities=(cardinality,),
        hold=hold,
        tolerance_pct=1e9,
        image_size=image_size,
        reference=reference,
    )
    budget = _cost(reference, hold, image_size)

    def distance(width: int) -> int:
        spec = template.with_setting(cardinality, width)
        return abs(_cost(spec, hold, image_size) - budget)

    nearest = min(map(distance, range(1, 2 * found.spec.base_width + 8)))
    assert nearest == distance(found.spec.base_width)
    assert template.with_setting(cardinality, found.spec.base_width) == found.spec


@given(reference=small_specs(), hold=st.sampled_from(HOLDS))
def test_a_net_matches_itself(reference: ResNeXtSpec, hold: Hold) -> None:
    """A net whose width doubles is its own match, with no error in any currency."""
    template = reference.with_setting(reference.cardinalities[0], reference.base_width)
    (found,) = match(
        template,
        cardinalities=template.cardinalities[:1],
        hold=hold,
        tolerance_pct=1e-9,
        image_size=64,
    )
    assert template == found.spec
    assert (
        found.macs_error_pct,
        found.params_error_pct,
        found.activations_error_pct,
        found.block_params_error_pct,
    ) == (0, 0, 0, 0)


def test_errors_are_signed_percents_of_the_reference() -> None:
    """Each error is (ours - reference) / reference, in its own currency."""
    ours, theirs = parse_spec("resnext50-32x4d"), parse_spec("resnet101")
    found = certify(ours, reference=theirs, image_size=64)
    a, b = complexity(ours, 64), complexity(theirs, 64)
    assert a == found.complexity
    for error, value, reference in (
        (found.macs_error_pct, a.macs, b.macs),
        (found.params_error_pct, a.params, b.params),
        (found.activations_error_pct, a.activations, b.activations),
        (found.block_params_error_pct, 70144, 69632),
    ):
        assert error == pytest.approx(100 * (value / reference - 1))
    errors = [found.error_pct(hold) for hold in HOLDS]
    assert [
        found.block_params_error_pct,
        found.macs_error_pct,
        found.params_error_pct,
    ] == errors


def test_no_match_names_nearest_widths() -> None:
    """Without a match the error names both neighbours and the tolerance needed."""
    with pytest.raises(InputError) as caught:
        _match(1, 16, tolerance_pct=4)
    assert str(caught.value) == (
        "no width holds macs within 4 % of resnet50 at cardinality 16: nearest 16x7d "
        "(-4.30 %), 16x8d (+9.11 %). A tolerance of 4.30 % admits the nearest."
    )
    assert _match(16, tolerance_pct=4.3)[0].spec.setting == "16x7d"


def test_no_match_names_every_cardinality() -> None:
    """One error names all cardinalities that fail, and no other."""
    with pytest.raises(InputError) as caught:
        _match(1, 300, 2, 8, tolerance_pct=1)
    message = str(caught.value)
    assert "at cardinality 300: nearest 300x1d (+116.77 %); at cardinality 8" in message
    assert "nearest 8x13d (-3.41 %), 8x14d (+4.36 %)" in message
    assert "cardinality 2:" not in message
    assert "A tolerance of 116.78 % admits" in message


@pytest.mark.parametrize("tolerance", [3.41, 0.87, 4.36])
def test_tolerance_is_inclusive(tolerance: float) -> None:
    """No match is further away than the tolerance."""
    for found in _match(1, 2, tolerance_pct=tolerance):
        assert abs(found.macs_error_pct) <= tolerance


@pytest.mark.parametrize(
    ("cardinalities", "hold", "tolerance", "message"),
    [
        ((1,), "macs", 0, "tolerance_pct must be .* above 0, such as 5; got 0"),
        ((1,), "macs", -1, "tolerance_pct must be .* got -1"),
        ((1,), "macs", math.nan, "tolerance_pct must be .* got nan"),
        ((), "macs", 5, "cardinalities must name at least one"),
        ((2, 0), "macs", 5, "whole numbers of at least 1, got 0"),
        ((2, -4), "block_params", 5, "whole numbers of at least 1, got -4"),
        ((2.5,), "macs", 5, "must be a whole number of at least 1, got 2.5"),
        ((2, 4, 2, 4, 8), "macs", 5, "given more than once: 2, 4"),
        ((1,), "flops", 5, "hold must be one of .* step_time, peak_memory; got 'fl"),
    ],
)
def test_bad_arguments(
    cardinalities: tuple[int, ...], hold: Hold, tolerance: float, message: str
) -> None:
    """An argument that breaks its rule raises with argument, rule and value."""
    with pytest.raises(InputError, match=message):
        _match(*cardinalities, hold=hold, tolerance_pct=tolerance)


@pytest.mark.parametrize("hold", HOLDS)
def test_small_image_is_refused(hold: Hold) -> None:
    """An image below the net's stride is refused, whatever is held."""
    with pytest.raises(InputError, match="image_size must be at least 32"):
        _match(2, hold=hold, image_size=31)


@pytest.mark.parametrize("cardinality", [8, 16, 32, 64])
def test_free_widths_reach_a_fortieth_of_a_percent(cardinality: int) -> None:
    """Cardinalities that no base width matches come within 0.025 % of a ResNet-50."""
    (found,) = _match(cardinality, tolerance_pct=0.025, widths="free")
    assert abs(found.macs_error_pct) <= 0.025
    ratios = [b / a for a, b in itertools.pairwise(found.spec.bottleneck_widths)]
    assert all(1.3 < ratio <= 3 for ratio in ratios)


def test_free_widths_are_the_nearest_to_doubling() -> None:
    """At 0.1 % the widths are those nearest to doubling, known from all that fit."""
    found = _match(8, 16, tolerance_pct=0.1, widths="free")
    assert [one.spec.setting for one in found] == ["8x13.27.54.109d", "16x7.15.29.60d"]


@pytest.mark.parametrize(("cardinality", "tolerance"), [(16, 0.02), (35, 0.1)])
def test_no_stage_further_off_makes_a_nearer_net(
    cardinality: int, tolerance: float
) -> None:
    """A net that is off in one stage alone may be nearer than one off in all."""
    (found,) = _match(cardinality, tolerance_pct=tolerance, widths="free")
    template = parse_spec("resnet50")
    base = found.spec.base_width
    budget = complexity(template, 224).macs
    low, high = 0.0, 64.0
    for _ in range(60):  # Costs at whole widths tell those between: a quadratic.
        middle = (low + high) / 2
        y = [
            _cost(template.with_setting(cardinality, n), "macs", 224) for n in (1, 2, 3)
        ]
        a = (y[2] - 2 * y[1] + y[0]) / 2
        cost = a * (middle - 1) * (middle - 2) + (y[1] - y[0]) * (middle - 1) + y[0]
        low, high = (middle, high) if cost < budget else (low, middle)
    ideal = high * 2.0 ** np.arange(4)
    ranges = tuple(
        tuple(range(max(1, math.floor(d / 2)), math.ceil(2 * d) + 1)) for d in ideal
    )
    space = Space(
        template=template.with_setting(cardinality, base),
        image_sizes=(224,),
        width=PerStage(ranges),
    )
    window = around(template, currency="macs", tolerance_pct=tolerance, image_size=224)
    every = enumerate_nets(space, [window]).widths
    distances = (np.log(every / ideal) ** 2).sum(axis=1)
    nearest = tuple(every[distances.argmin()].tolist())
    assert nearest == found.spec.bottleneck_widths


@settings(deadline=None, max_examples=30)
@given(
    depths=st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple),
    cardinality=st.integers(1, 6),
    base=st.integers(1, 5),
    hold=st.sampled_from(CURRENCIES),
    tolerance=st.sampled_from((0.01, 0.3, 2, 40)),
)
def test_no_free_net_is_nearer_to_doubling(
    depths: tuple[int, ...],
    cardinality: int,
    base: int,
    hold: Currency,
    tolerance: float,
) -> None:
    """Brute force over all widths finds no net nearer, and none where none is found."""
    template = ResNeXtSpec(
        stage_depths=depths,
        cardinality=2,
        bottleneck_widths=doubled(base, len(depths)),
        template_width=4,
        stem="cifar",
    )
    budget = _cost(template, hold, 16)
    (found,) = match(
        template,
        cardinalities=(cardinality,),
        hold=hold,
        tolerance_pct=tolerance,
        image_size=16,
        widths="free",
        when_none="nearest",
    )
    ranges = [range(1, 12 * width + 20) for width in template.bottleneck_widths]
    every = np.array(list(itertools.product(*ranges)))
    costs = costs_of(
        template,
        16,
        cardinalities=np.full_like(every, cardinality),
        widths=every,
        depths=np.full_like(every, depths),
    )[hold]
    errors = np.abs(costs - budget)
    fits = every[100 * errors / budget <= tolerance]
    if not len(fits):
        assert abs(_cost(found.spec, hold, 16) - budget) == errors.min()
        return
    ideal = _ideal(template, cardinality, hold, budget)

    assert abs(found.error_pct(hold)) <= tolerance
    distances = (np.log(fits / ideal) ** 2).sum(axis=1)
    own = (np.log(np.array(found.spec.bottleneck_widths) / ideal) ** 2).sum()
    assert own == pytest.approx(distances.min(), rel=1e-6, abs=1e-12)


def _ideal(
    template: ResNeXtSpec, cardinality: int, hold: Hold, budget: int
) -> list[float]:
    """Real widths that double and meet the budget, by the exact cost's quadratic."""

    def cost(base: float) -> float:
        # The cost is quadratic in the base width; three whole ones tell all others.
        y = [_cost(template.with_setting(cardinality, n), hold, 16) for n in (1, 2, 3)]
        a = (y[2] - 2 * y[1] + y[0]) / 2
        b = y[1] - y[0] - 3 * a
        return a * base**2 + b * base + y[0] - a - b

    low, high = 0.0, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) < budget else (low, middle)
    return [high * 2**stage for stage in range(template.num_stages)]


def test_auto_frees_only_where_doubling_fails() -> None:
    """With auto a cardinality whose doubling widths are near enough keeps them."""
    found = _match(2, 8, tolerance_pct=0.9, widths="auto")
    assert [one.spec.setting for one in found] == ["2x40d", "8x13.27.54.108d"]
    assert all(one.spec.doubles for one in _match(2, 8, widths="auto"))


def test_nearest_is_taken_on_request() -> None:
    """Where none is within the tolerance, the nearest comes with its error."""
    (doubling,) = _match(16, tolerance_pct=1, when_none="nearest")
    assert doubling.spec.setting == "16x7d"
    assert round(doubling.macs_error_pct, 2) == -4.30
    (free,) = _match(3, tolerance_pct=1e-9, widths="free", when_none="nearest")
    assert 0 < abs(free.macs_error_pct) < 1e-3


def test_no_free_match_names_the_tightest() -> None:
    """The error of free widths names the nets on either side, with small errors."""
    with pytest.raises(InputError) as caught:
        _match(3, tolerance_pct=1e-9, widths="free")
    message = str(caught.value)
    assert message.count("3x") == 2
    assert "A tolerance of 0.0000" in message
    assert "(+0.00 %)" not in message


def test_activations_can_be_held() -> None:
    """Equal activations mean equal inner channels: 8x8d beside 1x64d."""
    found = _match(1, 8, 32, hold="activations", tolerance_pct=0.01)
    assert [one.spec.setting for one in found] == ["1x64d", "8x8d", "32x2d"]
    assert [one.error_pct("activations") for one in found] == [0, 0, 0]


def test_free_widths_need_a_currency_of_the_net() -> None:
    """A block's parameters fix stage 1 alone, so they cannot hold free widths."""
    with pytest.raises(
        InputError, match="free widths need macs, params or activations"
    ):
        _match(8, hold="block_params", widths="free")
    with pytest.raises(InputError, match="widths must be one of doubling, free, auto"):
        _match(8, widths="wide")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (0, "+0.00 %"),
        (-4.302, "-4.30 %"),
        (0.0236, "+0.0236 %"),
        (-0.00004, "-0.0000 %"),
    ],
)
def test_errors_keep_the_digits_that_tell(error: float, text: str) -> None:
    """A small error is not printed as none."""
    assert percent(error) == text
