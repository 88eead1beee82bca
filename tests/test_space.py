"""Spaces, windows and the texts that name values."""

from __future__ import annotations

import pytest

from resnext_ablate.architecture.complexity import complexity
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.space import (
    PerStage,
    Shared,
    Space,
    Window,
    around,
    multiples,
    parse_values,
    powers_of_two,
    settings_of,
)
from resnext_ablate.architecture.spec import InputError

TEMPLATE = parse_spec("resnet50")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("4", (4,)),
        ("1,2,8", (1, 2, 8)),
        ("3..6", (3, 4, 5, 6)),
        ("3..25/8", (8, 16, 24)),
        ("8..24/8", (8, 16, 24)),
        ("1..64*2", (1, 2, 4, 8, 16, 32, 64)),
        ("3..20*2, 5", (4, 8, 16, 5)),
    ],
)
def test_values_parse(text: str, values: tuple[int, ...]) -> None:
    """Lists, ranges, multiples and powers of two have each their form."""
    assert values == parse_values(text)


@pytest.mark.parametrize("text", ["", "a", "1-4", "-4", "8..4", "1..8/0", "1..8*3"])
def test_bad_values(text: str) -> None:
    """Anything else, and a range without numbers, is refused with the forms."""
    with pytest.raises(InputError, match=r"names no values; write 1,2,4 or 1\.\.64"):
        parse_values(text)


def test_value_helpers() -> None:
    """Multiples and powers of two take both ends in."""
    assert multiples(8, low=8, high=32) == (8, 16, 24, 32)
    assert multiples(8, low=9, high=31) == (16, 24)
    assert powers_of_two(1, 8) == (1, 2, 4, 8)
    assert powers_of_two(3, 9) == (4, 8)
    assert powers_of_two(5, 7) == ()


@pytest.mark.parametrize(
    ("space", "num_nets"),
    [
        (Space(template=TEMPLATE, image_sizes=(224,)), 1),
        (Space(template=TEMPLATE, image_sizes=(224, 192), template_widths=(16, 32)), 4),
        (
            Space(
                template=TEMPLATE,
                image_sizes=(224,),
                cardinality=Shared((1, 2, 4)),
                width=Shared((4, 8, 12, 4)),
            ),
            9,
        ),
        (
            Space(
                template=TEMPLATE,
                image_sizes=(224,),
                cardinality=Shared((1, 2, 4)),
                width=PerStage(((1, 2), (3,), (4, 5, 6), (7,))),
            ),
            18,
        ),
        (
            Space(
                template=TEMPLATE,
                image_sizes=(224,),
                cardinality=PerStage(((2, 4),)),
                width=Shared((3, 4)),
                inner_multiple=8,
            ),
            # d = 3, 6, 12, 24 allows (none); d = 4, 8, 16, 32 all of 2, 4.
            16,
        ),
        (
            Space(
                template=TEMPLATE,
                image_sizes=(224,),
                cardinality=Shared((1, 4, 8)),
                width=Shared((1, 2, 3)),
                inner_multiple=8,
            ),
            # C d of stage 1: 8 = 4 x 2 = 8 x 1, 16 = 8 x 2, 24 = 8 x 3.
            4,
        ),
    ],
)
def test_number_of_nets(space: Space, num_nets: int) -> None:
    """Axes multiply, repeated values count once, a multiple thins them."""
    assert num_nets == space.num_nets


def test_huge_space_is_counted_at_once() -> None:
    """The number of nets of a space is exact where it passes any machine number."""
    axis = PerStage((tuple(range(1, 1001)),))
    space = Space(
        template=parse_spec("resnext2.2.2.2.2.2.2-4x8d"),
        image_sizes=(224,),
        width=axis,
        stage_depth=axis,
    )
    assert space.num_nets == 10**42


def test_window_around_a_net() -> None:
    """The window is the cost plus and minus the tolerance, rounded inwards."""
    macs = complexity(TEMPLATE, 224).macs
    window = around(TEMPLATE, currency="macs", tolerance_pct=0.1, image_size=224)
    assert window == Window("macs", -(-macs * 999 // 1000), macs * 1001 // 1000)
    exact = around(TEMPLATE, currency="params", tolerance_pct=0, image_size=224)
    assert exact == Window("params", 25_557_032, 25_557_032)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (("flops", 1, 2), "currency must be one of macs, params, activations; got 'fl"),
        (("macs", 3, 2), "macs must rise from 0 or more, got 3 to 2"),
        (("macs", -1, 2), "macs must rise from 0 or more, got -1 to 2"),
    ],
)
def test_bad_windows(window: tuple[str, int, int], message: str) -> None:
    """A window that cannot be is refused with its ends."""
    with pytest.raises(InputError, match=message):
        Window(*window)  # type: ignore[arg-type]


@pytest.mark.parametrize("tolerance", [-1, 101, float("nan")])
def test_bad_tolerance(tolerance: float) -> None:
    """A tolerance that is no percentage is refused."""
    with pytest.raises(InputError, match="tolerance_pct must lie between 0 and 100"):
        around(TEMPLATE, currency="macs", tolerance_pct=tolerance, image_size=224)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cardinality": Shared(())}, "cardinality must name at least one value"),
        ({"cardinality": Shared((0, 1))}, "cardinality must be whole .* got 0"),
        ({"width": PerStage(((1,), (-2,), (1,), (1,)))}, "width, stage 2 must .* -2"),
        ({"width": PerStage(((1,), (2,)))}, "for each of 4; got 2 sets of values"),
        ({"stage_depth": Shared((1.5,))}, "stage_depth must be whole .* got 1.5"),
        ({"template_widths": (0,)}, "template_widths must be whole .* got 0"),
        ({"inner_multiple": 0}, "inner_multiple must be whole .* got 0"),
        ({"image_sizes": ()}, "image_sizes must name at least one value"),
        ({"image_sizes": (224, 31)}, "image_size must be at least 32"),
    ],
)
def test_bad_axes(fields: dict[str, object], message: str) -> None:
    """An axis that breaks its rule is refused by name, rule and value."""
    with pytest.raises(InputError, match=message):
        Space(**{"template": TEMPLATE, "image_sizes": (224,), **fields})  # type: ignore[arg-type]


def test_too_many_choices_are_refused() -> None:
    """A stage with more combinations than memory holds is refused before it is laid."""
    many = PerStage((tuple(range(1, 3001)),))
    space = Space(template=TEMPLATE, image_sizes=(224,), cardinality=many, width=many)
    with pytest.raises(
        InputError, match=r"9,000,000 combinations .* at most 4,000,000"
    ):
        list(settings_of(space, currencies=("macs",)))


def test_too_many_settings_are_refused() -> None:
    """So are more combinations of shared numbers than can be worked through."""
    space = Space(
        template=TEMPLATE,
        image_sizes=(224,),
        cardinality=Shared(tuple(range(1, 10_002))),
        width=PerStage(((1, 2),)),
    )
    with pytest.raises(InputError, match="10,001 combinations of shared numbers"):
        list(settings_of(space, currencies=("macs",)))


def test_a_net_beyond_int64_is_refused() -> None:
    """Costs that int64 cannot hold are refused, never wrapped."""
    space = Space(
        template=TEMPLATE, image_sizes=(224,), width=PerStage(((2**26, 2**27),))
    )
    with pytest.raises(InputError, match=r"pass(es)? 2\*\*62"):
        list(settings_of(space, currencies=("macs",)))
