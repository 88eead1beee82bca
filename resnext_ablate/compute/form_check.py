"""Fig. 3: the three forms of a block are one function, to be seen on built nets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from resnext_ablate.architecture.complexity import complexity
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.shapes import BlockForm
from resnext_ablate.compute.hardware import one_thread
from resnext_ablate.compute.model import ResNeXt, build, convert_form
from resnext_ablate.records.checks import DIFFERENCE, Check

IMAGE_SIZE = 64
"""Pixels of a side; a form's function does not depend on it."""
_ROUNDING = 1e-11
"""What sums in another order may differ by, in double precision over 50 layers."""


def form_checks(names: Sequence[str]) -> tuple[Check, ...]:
    """Each net in forms (a) and (b), held to (c) in outputs, macs and parameters.

    Args:
        names: of nets in form (c).
    """
    with one_thread():  # Many small convolutions: threads would only wait.
        return tuple(check for name in names for check in _checks(name))


def _checks(name: str) -> Iterator[Check]:
    generator = torch.Generator().manual_seed(0)
    spec = replace(parse_spec(name), block_form="c")
    grouped = build(spec, generator=generator).double()
    shape = 2, spec.in_channels, IMAGE_SIZE, IMAGE_SIZE
    images = torch.randn(shape, dtype=torch.float64, generator=generator)
    expected = _outputs(grouped, images)
    own = complexity(spec, IMAGE_SIZE)
    forms: tuple[BlockForm, ...] = get_args(BlockForm)
    for form in forms:
        if form == "c":
            continue
        converted = convert_form(grouped, form=form)
        found = _outputs(converted, images)
        off = float((found - expected).abs().max() / expected.abs().max())
        yield _check(name, form, DIFFERENCE, off, _ROUNDING, holds=off <= _ROUNDING)
        cost = complexity(converted.spec, IMAGE_SIZE)
        for count in ("macs", "params"):
            ours, theirs = getattr(cost, count), getattr(own, count)
            yield _check(name, form, count, ours, theirs, holds=ours == theirs)


@torch.no_grad()
def _outputs(model: ResNeXt, images: Tensor) -> Tensor:
    """(2, images, classes) logits in train and in eval mode, the statistics unmoved."""
    model = convert_form(model, form=model.spec.block_form)  # a copy of its own
    in_eval = model.eval()(images)
    return torch.stack([model.train()(images), in_eval])


def _check(
    name: str, form: str, count: str, ours: float, expected: float, *, holds: bool
) -> Check:
    nan = float("nan")
    return Check(name, f"form {form}", count, ours, expected, nan, nan, holds)
