"""Counting, listing and drawing against brute force."""

from __future__ import annotations

import resource
import time
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from resnext_ablate.architecture import halves
from resnext_ablate.architecture.complexity import complexity
from resnext_ablate.architecture.costs import CURRENCIES, Currency
from resnext_ablate.architecture.feasible import (
    count,
    draw,
    enumerate_nets,
    nearest,
    nets,
    none_fits,
    sample,
    solve,
)
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.space import (
    Nets,
    PerStage,
    Shared,
    Space,
    Window,
    around,
    multiples,
    powers_of_two,
)
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec

Net = tuple[ResNeXtSpec, int]
Costs = dict[Net, dict[Currency, int]]
Problem = tuple[Space, list[Window], Costs, set[Net]]

TEMPLATES = ("resnext3.-4x8d-t8", "resnext1.2-2x3d-t4", "resnext20-2x4d-t8", "resnet50")


@st.composite
def axes(draw: st.DrawFn, num_stages: int, *, largest: int) -> Shared | PerStage | None:
    values = st.lists(st.integers(1, largest), min_size=1, max_size=3).map(tuple)
    per_stage = st.lists(values, min_size=num_stages, max_size=num_stages).map(tuple)
    return draw(
        st.one_of(
            st.none(),
            values.map(Shared),
            per_stage.map(PerStage),
            values.map(lambda one: PerStage((one,))),
        )
    )


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Spaces of every kind, small enough to list."""
    template = parse_spec(draw(st.sampled_from(TEMPLATES)))
    stages = template.num_stages
    space = Space(
        template=template,
        image_sizes=draw(st.sampled_from([(32,), (32, 40, 33)])),
        cardinality=draw(axes(stages, largest=5)),
        width=draw(axes(stages, largest=9)),
        stage_depth=draw(axes(stages, largest=4)) if stages < 4 else None,
        template_widths=draw(st.sampled_from([(), (8, 4)])),
        inner_multiple=draw(st.sampled_from([1, 1, 2])),
    )
    return space


def _values(axis: Shared | PerStage | None, fixed: tuple[int, ...]) -> list[list[int]]:
    """Every vector of stage numbers that an axis allows."""
    stages = len(fixed)
    if axis is None:
        return [list(fixed)]
    if isinstance(axis, Shared):
        return [[value] * stages for value in sorted(set(axis.values))]
    each = axis.values if len(axis.values) > 1 else axis.values * stages
    return [list(one) for one in product(*(sorted(set(values)) for values in each))]


def brute_force(space: Space) -> Costs:
    """Every net of a space with its image size and costs, one by one."""
    template = space.template
    widths = _values(space.width, template.bottleneck_widths)
    if isinstance(space.width, Shared):
        widths = [[value << s for s, value in enumerate(row)] for row in widths]
    found = {}
    for top, size, c, n, d in product(
        space.template_widths,
        space.image_sizes,
        _values(space.cardinality, template.cardinalities),
        _values(space.stage_depth, template.stage_depths),
        widths,
    ):
        if any(np.multiply(c, d) % space.inner_multiple):
            continue
        spec = ResNeXtSpec(
            stage_depths=tuple(n),
            cardinality=tuple(c),
            bottleneck_widths=tuple(d),
            template_width=top,
            stem=template.stem,
            num_classes=template.num_classes,
        )
        cost = complexity(spec, size)
        found[spec, size] = {name: getattr(cost, name) for name in CURRENCIES}
    return found


def _as_list(found: Nets) -> list[tuple[ResNeXtSpec, int]]:
    return list(zip(found.specs(), found.image_sizes.tolist(), strict=True))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A space, windows whose ends often fall on nets, all nets and those that fit."""
    space = draw(spaces())
    everything = brute_force(space)
    currencies = draw(st.permutations(CURRENCIES))[: draw(st.integers(1, 3))]
    windows = []
    for currency in currencies:
        costs = sorted({cost[currency] for cost in everything.values()} | {10**6})
        ends = [
            draw(st.sampled_from(costs)) + draw(st.sampled_from([-1, 0, 1]))
            for _ in range(2)
        ]
        windows.append(Window(currency, *sorted(ends)))
    fits = {
        net
        for net, cost in everything.items()
        if all(w.low <= cost[w.currency] <= w.high for w in windows)
    }
    return space, windows, everything, fits


SLOW = settings(deadline=None, max_examples=60)


@SLOW
@given(problem=problems(), few=st.sampled_from([0, 1 << 21]), chunk=st.integers(3, 99))
def test_exactly_the_nets_that_fit(problem: Problem, few: int, chunk: int) -> None:
    """Count and list equal brute force, in one, two or three currencies at once."""
    space, windows, everything, fits = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halves, "_FEW_LISTED", few)
        patch.setattr(halves, "_CHUNK", chunk)
        found = _as_list(enumerate_nets(space, windows))
        assert count(space, windows) == len(fits)
    assert space.num_nets == len(everything)
    assert len(found) == len(set(found))
    assert set(found) == fits


@settings(deadline=None, max_examples=40)
@given(problem=problems())
def test_nearest_is_nearest(problem: Problem) -> None:
    """Where none fits, no net is nearer than those named, on either side."""
    space, windows, everything, fits = problem
    if fits or not everything:
        return
    named = [everything[net] for net in nearest(space, windows)]
    if len(windows) == 1:
        (window,) = windows
        costs = [cost[window.currency] for cost in everything.values()]
        below = [max((cost for cost in costs if cost < window.low), default=None)]
        above = [min((cost for cost in costs if cost > window.high), default=None)]
        expected = [cost for cost in below + above if cost is not None]
        assert expected == [cost[window.currency] for cost in named]
        return

    def miss(cost: dict[Currency, int]) -> float:
        return max(
            max(
                (w.low - cost[w.currency]) / max(w.low, 1),
                (cost[w.currency] - w.high) / max(w.high, 1),
            )
            for w in windows
        )

    assert [min(map(miss, everything.values()))] == [miss(cost) for cost in named]


def _four_stages() -> tuple[Space, Costs]:
    axis = PerStage(((1, 2, 4),))
    space = Space(
        template=parse_spec("resnext1.1.1.1-2x8d-t8"),
        image_sizes=(32, 48),
        cardinality=axis,
        width=PerStage(((2, 3), (4, 7), (8, 13), (16, 30))),
        template_widths=(8, 12),
    )
    return space, brute_force(space)


@pytest.mark.parametrize(
    "currencies", [("macs",), ("macs", "params"), ("macs", "params", "activations")]
)
@pytest.mark.parametrize("few", [0, 1 << 21])
def test_draws_are_uniform(
    currencies: tuple[Currency, ...], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every net that fits is drawn equally often: chi-square, and it does reject."""
    monkeypatch.setattr(halves, "_FEW_LISTED", few)
    space, everything = _four_stages()
    windows = []
    for currency in currencies:
        costs = sorted(cost[currency] for cost in everything.values())
        windows.append(Window(currency, costs[800], costs[2400]))
    feasible = solve(space, windows)
    assert 200 < feasible.count < 4000
    drawn = draw(feasible, 25 * feasible.count, np.random.default_rng(5))
    keys = np.column_stack(
        [
            drawn.template_widths,
            drawn.image_sizes,
            drawn.cardinalities,
            drawn.widths,
            drawn.stage_depths,
        ]
    )
    counts = np.unique(keys, axis=0, return_counts=True)[1]
    assert len(counts) == feasible.count
    assert 1e-4 < stats.chisquare(counts).pvalue < 1 - 1e-4
    skewed = counts + 12 * (np.arange(len(counts)) % 2)
    assert stats.chisquare(skewed).pvalue < 1e-9


@pytest.mark.parametrize("few", [0, 1 << 21])
def test_ends_of_a_second_window_belong_to_it(
    few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nets that lie on an end of the wider window, which is solved second, count."""
    monkeypatch.setattr(halves, "_FEW_LISTED", few)
    space, everything = _four_stages()
    macs = sorted(cost["macs"] for cost in everything.values())
    window = Window("macs", macs[2000], macs[2100])
    found = sorted(
        cost["activations"]
        for cost in everything.values()
        if window.low <= cost["macs"] <= window.high
    )
    for low, high in ((0, -1), (0, 60), (30, -1), (10, 80)):
        other = Window("activations", found[low], found[high])
        inside = sum(other.low <= value <= other.high for value in found)
        assert inside == count(space, [window, other])


def test_seeds_decide_the_draw() -> None:
    """Equal seeds draw equal nets, other seeds others."""
    space, _ = _four_stages()
    windows = [Window("macs", 0, 10**9)]
    one, same, other = (
        _as_list(sample(space, windows, 20, np.random.default_rng(seed)))
        for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


def test_numbers_name_nets_in_any_order() -> None:
    """The net of a number does not hang on what else is asked for."""
    space, _ = _four_stages()
    feasible = solve(space, [Window("macs", 0, 5 * 10**6)])
    listed = _as_list(nets(feasible, np.arange(feasible.count)))
    numbers = np.random.default_rng(0).permutation(feasible.count)[:50]
    assert _as_list(nets(feasible, numbers)) == [listed[number] for number in numbers]


def test_solved_anew_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that are not kept in memory give the same nets."""
    space, _ = _four_stages()
    windows = [Window("macs", 0, 5 * 10**6)]
    kept = solve(space, windows)
    monkeypatch.setattr("resnext_ablate.architecture.feasible._KEPT_COMBINATIONS", 60)
    short = solve(space, windows)
    assert len(short.solved) < len(kept.solved)
    numbers = np.arange(0, kept.count, 7)
    assert _as_list(nets(short, numbers)) == _as_list(nets(kept, numbers))


def _huge() -> Space:
    return Space(
        template=parse_spec("resnet50"),
        image_sizes=(224,),
        cardinality=PerStage((powers_of_two(1, 64),)),
        width=PerStage((multiples(4, low=4, high=180),)),
        stage_depth=PerStage((tuple(range(1, 12)),)),
    )


def test_huge_space_at_the_rate_promised() -> None:
    """1e14 nets, a window of 0.1 %: set-up and 100,000 draws in a second or so."""
    space = _huge()
    assert space.num_nets > 10**14
    window = around(space.template, currency="macs", tolerance_pct=0.1, image_size=224)
    start = time.process_time()
    feasible = solve(space, [window])
    middle = time.process_time()
    drawn = draw(feasible, 100_000, np.random.default_rng(0))
    end = time.process_time()
    assert feasible.count == 15_576_994_309
    assert middle - start < 3  # 0.7 s alone on a core; tests may share theirs.
    assert end - middle < 1
    for row in range(0, 100_000, 997):
        spec = drawn.spec(row)
        assert window.low <= complexity(spec, 224).macs <= window.high
        assert set(spec.cardinalities) <= set(powers_of_two(1, 64))


def test_huge_count_is_the_sum_of_its_parts() -> None:
    """The count over a huge space is additive over windows, and whole when wide."""
    space = Space(
        template=parse_spec("resnet50"),
        image_sizes=(224,),
        width=PerStage((tuple(range(1, 1001)),)),
    )
    cuts = [0, 3 * 10**9, 10**10, 10**14]
    parts = [Window("macs", a + (a > 0), b) for a, b in pairwise(cuts)]
    assert sum(count(space, [part]) for part in parts) == 10**12


def test_too_large_for_memory_is_refused() -> None:
    """A space whose halves pass the memory is refused before it is tabulated."""
    space = Space(
        template=parse_spec("resnet50"),
        image_sizes=(224,),
        cardinality=PerStage((tuple(range(1, 65)),)),
        width=PerStage((tuple(range(1, 257)),)),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="combinations near the windows, and at most"):
        count(space, [Window("macs", 0, 10**15)])
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 200_000


def test_empty_window_names_its_neighbours() -> None:
    """The message of an empty window names the nearest nets and what they cost."""
    space = Space(
        template=parse_spec("resnet50"),
        image_sizes=(224,),
        cardinality=Shared((8, 16)),
        width=Shared(tuple(range(1, 64))),
    )
    window = around(space.template, currency="macs", tolerance_pct=1, image_size=224)
    assert count(space, [window]) == 0
    message = (
        "no net fits macs 4,048,292,414 to 4,130,076,098; nearest: resnext50-8x13d "
        "(3,949,895,680 macs), resnext50-8x14d (4,267,409,408 macs)."
    )
    assert none_fits(space, [window]) == message
    with pytest.raises(InputError) as caught:
        sample(space, [window], 5, np.random.default_rng(0))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("window", "named"),
    [
        (Window("macs", 0, 10), ["resnext1.1.1.1-1x4.4.4.4d"]),
        (Window("macs", 10**15, 10**16), ["resnext11.11.11.11-64x180.180.180.180d"]),
    ],
)
def test_window_beyond_a_huge_space(window: Window, named: list[str]) -> None:
    """A window that no net of a huge space comes near names the extreme net at once."""
    start = time.process_time()
    assert [spec.name for spec, _ in nearest(_huge(), [window])] == named
    assert time.process_time() - start < 5


def test_empty_space_says_so() -> None:
    """A space whose rules leave no net says that, not where the nearest is."""
    space = Space(
        template=parse_spec("resnet50"),
        image_sizes=(224,),
        cardinality=Shared((1, 3)),
        width=Shared((3, 5)),
        inner_multiple=16,
    )
    assert space.num_nets == 0
    with pytest.raises(InputError, match="no net fits macs 1 to 2: the space is empty"):
        sample(space, [Window("macs", 1, 2)], 1, np.random.default_rng(0))


def test_bad_requests() -> None:
    """No window, two of a currency, a negative number, a list too long: refused."""
    space, _ = _four_stages()
    window = Window("macs", 0, 10**9)
    with pytest.raises(InputError, match="at least one currency, got none"):
        count(space, [])
    with pytest.raises(InputError, match="different currencies, got macs, macs"):
        count(space, [window, window])
    with pytest.raises(InputError, match="at least 0, got -1"):
        sample(space, [window], -1, np.random.default_rng(0))
    with pytest.raises(InputError, match="5,184 nets fit, more than the 10"):
        enumerate_nets(space, [window], at_most=10)
