"""The least time of a net, against sums by hand and what really moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import any_specs, sizes_for

from resnext_ablate.architecture.complexity import complexity
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.roofline import (
    Peaks,
    forward_floor_s,
    training_floor_s,
)
from resnext_ablate.architecture.spec import ResNeXtSpec

NO_TRAFFIC = Peaks(macs_per_s=1e9, bytes_per_s=1e30, bytes_per_value=4)
NO_COMPUTE = Peaks(macs_per_s=1e30, bytes_per_s=1e9, bytes_per_value=2)


@given(st.data())
def test_compute_alone_is_the_closed_form(data: st.DataObject) -> None:
    """With free memory a forward pass takes its macs, a step three times that less
    the gradient of the images, which nobody needs."""
    spec = data.draw(any_specs())
    size = data.draw(sizes_for(spec))
    macs = complexity(spec, size).macs
    stem = spec.layout(size).stem
    stem_macs = stem.num_weights * stem.out_side**2
    forward = forward_floor_s(spec, image_size=size, batch_size=3, peaks=NO_TRAFFIC)
    step = training_floor_s(spec, image_size=size, batch_size=3, peaks=NO_TRAFFIC)
    assert forward == pytest.approx(3 * macs / 1e9)
    assert step == pytest.approx(3 * (3 * macs - stem_macs) / 1e9)


def test_traffic_alone_by_hand() -> None:
    """Each tensor of a convolution moves once; a strided 1x1 reads what it uses."""
    spec = ResNeXtSpec(
        stage_depths=(1, 1),
        cardinality=2,
        bottleneck_widths=(3, 5),
        template_width=4,
        stem="cifar",
        num_classes=10,
    )
    # (inputs, outputs) per image and weights of each layer, at 8 x 8 pixels.
    layers = (
        (3 * 64, 4 * 64, 27 * 4),  # stem
        (4 * 64, 6 * 64, 4 * 6),  # 1x1
        (6 * 64, 6 * 64, 9 * 3 * 6),  # 3x3, two groups of three
        (6 * 64, 16 * 64, 6 * 16),
        (4 * 64, 16 * 64, 4 * 16),  # projection
        (16 * 64, 10 * 64, 16 * 10),
        (10 * 64, 10 * 16, 9 * 5 * 10),  # 3x3 of stride 2 reads every pixel
        (10 * 16, 32 * 16, 10 * 32),
        (16 * 16, 32 * 16, 16 * 32),  # projection of stride 2: a quarter of them
        (32, 10, 32 * 10),  # head
    )
    moved = [weights + 5 * (read + written) for read, written, weights in layers]
    forward = forward_floor_s(spec, image_size=8, batch_size=5, peaks=NO_COMPUTE)
    step = training_floor_s(spec, image_size=8, batch_size=5, peaks=NO_COMPUTE)
    assert forward == pytest.approx(2 * sum(moved) / 1e9)
    assert step == pytest.approx(2 * (3 * sum(moved) - moved[0]) / 1e9)


def test_each_layer_takes_the_longer_of_its_two() -> None:
    """The floor is no less than compute or traffic alone, and no more than both."""
    spec = parse_spec("resnext29-8x14d")
    both = Peaks(macs_per_s=2e11, bytes_per_s=2e10, bytes_per_value=4)
    floors = [
        training_floor_s(spec, image_size=32, batch_size=64, peaks=peaks)
        for peaks in (
            both,
            Peaks(macs_per_s=2e11, bytes_per_s=1e30, bytes_per_value=4),
            Peaks(macs_per_s=1e30, bytes_per_s=2e10, bytes_per_value=4),
        )
    ]
    assert max(floors[1:]) < floors[0] < sum(floors[1:])


def test_branches_cost_what_they_move() -> None:
    """Form (a) puts out all channels from each branch, so its floor is higher."""
    grouped, summed = (
        training_floor_s(
            parse_spec(name), image_size=32, batch_size=8, peaks=NO_COMPUTE
        )
        for name in ("resnext29-8x14d", "resnext29-8x14d-form_a")
    )
    assert summed > 1.5 * grouped
