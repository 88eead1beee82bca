"""Hypothesis strategies shared by the tests."""

from __future__ import annotations

from typing import get_args

from hypothesis import strategies as st

from resnext_ablate.architecture.shapes import (
    Activation,
    BlockForm,
    BlockKind,
    Shortcut,
)
from resnext_ablate.architecture.spec import IMAGENET_STAGE_DEPTHS, ResNeXtSpec, Stem


@st.composite
def small_specs(draw: st.DrawFn) -> ResNeXtSpec:
    """Nets of every kind that are cheap to build and run."""
    depths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    return draw(_specs_with(tuple(depths), largest=6))


@st.composite
def any_specs(draw: st.DrawFn) -> ResNeXtSpec:
    """Nets of every kind and size, never to be built."""
    depths = draw(
        st.one_of(
            st.lists(st.integers(1, 60), min_size=1, max_size=6).map(tuple),
            st.integers(1, 40).map(lambda blocks: (blocks,) * 3),
            st.sampled_from(tuple(IMAGENET_STAGE_DEPTHS.values())),
        )
    )
    return draw(_specs_with(depths, largest=300))


def sizes_for(spec: ResNeXtSpec) -> st.SearchStrategy[int]:
    """Sides of images that are large enough, odd ones included, pixels."""
    return st.integers(spec.total_stride, spec.total_stride + 9)


@st.composite
def _specs_with(
    draw: st.DrawFn, depths: tuple[int, ...], *, largest: int
) -> ResNeXtSpec:
    template_width = draw(st.one_of(st.just(64), st.integers(1, 2 * largest)))
    if largest < 64:
        template_width = min(template_width, 2 * largest)
    number = st.integers(1, largest)
    free = st.lists(number, min_size=len(depths), max_size=len(depths)).map(tuple)
    cardinality = draw(st.one_of(st.just(1), number, free))
    base = st.one_of(st.just(template_width), number)
    doubling = base.map(lambda width: tuple(width << n for n in range(len(depths))))
    style = {
        "shortcut": draw(st.sampled_from(get_args(Shortcut))),
        "block": draw(st.sampled_from(get_args(BlockKind))),
        "block_form": draw(st.sampled_from(("c", *get_args(BlockForm)))),
        "activation": draw(st.sampled_from(get_args(Activation))),
    }
    if draw(st.integers(0, 4)) == 0:  # a family that has one style
        style = {"family": "from_scratch"}
    return ResNeXtSpec(
        stage_depths=depths,
        cardinality=cardinality,
        bottleneck_widths=draw(st.one_of(doubling, free)),
        template_width=template_width,
        stem=draw(st.sampled_from(get_args(Stem))),
        in_channels=draw(st.integers(1, 4)),
        num_classes=draw(st.sampled_from((0, 1, 7, 10, 1000))),
        **style,
    )
