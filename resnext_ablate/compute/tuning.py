"""What is fastest on this machine: timed once, and kept in the cache.

A study asks when it begins and keeps the answers with its results, since the forms of a
layer differ in rounding, and all its runs must agree.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypeGuard

import torch
from torch import Tensor

from resnext_ablate.architecture.shapes import Conv
from resnext_ablate.architecture.spec import InputError
from resnext_ablate.compute import hardware
from resnext_ablate.compute.blocks import convolution
from resnext_ablate.compute.hardware import Precision
from resnext_ablate.compute.layers import Conv2d, Kernels, conv_key, is_narrow
from resnext_ablate.compute.sources import cache_folder
from resnext_ablate.records.config import TrainConfig
from resnext_ablate.records.records import write_atomically

_ROUNDS = 7
_CLEARLY_FASTER = 0.95
"""A form is taken where it needs less than this share of torch's own time."""
_WIDEST_BLOCK = 128
"""Channels of a block of merged groups: beyond, most of the work is on zeros."""
_LARGEST_BATCH = 128

_logger = logging.getLogger(__name__)


def settled(
    train: TrainConfig, *, earlier: TrainConfig | None, device: torch.device
) -> TrainConfig:
    """The config of a study with `auto` precision and kernels settled.

    What earlier results settled stays settled; those without kernels had torch's.
    """
    asked = train.model_dump(include={"precision", "kernels", "conv_forms"})
    if earlier is None:
        asked["precision"] = resolve_precision(train.precision, device=device)
        asked["kernels"] = resolve_kernels(
            train.kernels, device=device, channels_last=train.channels_last
        )
    else:
        torchs_own = {"kernels": "torch", "conv_forms": {}}
        for key in [key for key, value in asked.items() if value == "auto"]:
            value = getattr(earlier, key)
            asked[key] = torchs_own[key] if value == "auto" else value
    return train.model_copy(update=asked)


def with_forms(
    train: TrainConfig, *, convs: Sequence[Conv], device: torch.device
) -> TrainConfig:
    """The config with the fastest form of each convolution of a study.

    Args:
        train: with its precision settled. Forms that it names stay, and an empty table
            stays empty: torch's own forms.
        convs: of all nets.
        device: where the study trains.
    """
    known = {} if train.conv_forms == "auto" else train.conv_forms
    missing = [conv for conv in convs if conv_key(conv) not in known]
    if train.conv_forms == {} or not missing:
        return train
    assert train.precision != "auto"
    new = fastest_forms(
        missing, batch_size=train.batch_size, precision=train.precision, device=device
    )
    return train.model_copy(update={"conv_forms": {**known, **new}})


def resolve_kernels(
    kernels: Literal["auto", "torch", "fused"],
    *,
    device: torch.device,
    channels_last: bool,
) -> Kernels:
    """Which kernels to train with; `auto` is fused where those can be.

    Raises:
        InputError: fused is asked for where it cannot be.
    """
    can_fuse = device.type == "cpu" and channels_last
    if kernels == "fused" and not can_fuse:
        raise InputError(
            'train.kernels = "fused" needs a CPU and train.channels_last = true; '
            '"auto" takes torch\'s own elsewhere.'
        )
    return "fused" if kernels != "torch" and can_fuse else "torch"


def resolve_precision(
    precision: Literal["auto", "fp32", "bf16"], *, device: torch.device
) -> Precision:
    """As `hardware.resolve_precision`, with the same answer from day to day."""
    if precision != "auto" or device.type != "cpu":
        return hardware.resolve_precision(precision, device=device)

    def measured(held: Mapping[str, object]) -> dict[str, object]:
        if held.get("precision") in ("fp32", "bf16"):
            return dict(held)
        with hardware.one_thread():  # As runs train: more would wait for busy cores.
            return {"precision": hardware.resolve_precision("auto", device=device)}

    found = kept({"what": "precision", **machine(device)}, measured)
    return "bf16" if found["precision"] == "bf16" else "fp32"


def fastest_forms(
    convs: Iterable[Conv],
    *,
    batch_size: int,
    precision: Precision,
    device: torch.device,
) -> dict[str, str]:
    """The fastest exact form of each convolution in training, channels-last.

    Forward and backward are timed on one CPU thread or the device, a few milliseconds
    a form, and torch's own form is kept unless another is clearly faster.

    Args:
        convs: of any nets; equal shapes are timed once.
        batch_size: images of a step.
        precision: of the activations.
        device: where to train.

    Returns:
        A form of `layers.Conv2d` by `layers.conv_key`.
    """
    shapes = {conv_key(conv): conv for conv in convs if not conv.in_branches}
    batch_size = min(batch_size, _LARGEST_BATCH)
    forms_of = partial(candidate_forms, precision=precision, device=device)
    one = partial(_times_ms, batch_size=batch_size, precision=precision, device=device)

    def completed(held: Mapping[str, object]) -> dict[str, object]:
        known = {key: times for key, times in held.items() if _is_sound(times)}
        missing = {
            key: conv
            for key, conv in shapes.items()
            # A form that is new since then is timed beside the others.
            if not set(forms_of(conv)) <= set(known.get(key, ()))
        }
        return {**known, **{key: one(conv) for key, conv in missing.items()}}

    about = {"what": "forms", "batch": str(batch_size), "precision": precision}
    with hardware.one_thread():
        found = kept({**about, **machine(device)}, completed)
    return {key: _choice(found[key]) for key in shapes}


def candidate_forms(
    conv: Conv, *, precision: Precision, device: torch.device
) -> tuple[str, ...]:
    """The forms that may be fastest for a shape, torch's own first."""
    if conv.kernel_size == 1 and conv.groups == 1:
        return ("plain", "matmul")
    width = max(conv.in_channels, conv.out_channels) // conv.groups
    own_groups = conv.groups // conv.copies  # Seeds are never merged.
    merges = [
        f"merge{merged}"
        for merged in range(2, own_groups + 1)
        if own_groups % merged == 0 and merged * width <= _WIDEST_BLOCK
    ]
    if device.type == "cpu" and precision == "bf16" and is_narrow(conv):
        # Imported here because it brings a compiler.
        from resnext_ablate.compute.dots import HAS_DOTS

        return ("plain", *merges, *(["direct"] if HAS_DOTS else []))
    if device.type != "cuda" or conv.groups == 1:
        return ("plain", *merges)
    # Half of the group widths are slow in one layout, the other half in the other.
    return ("plain", *merges, "nchw", *(f"nchw+{merge}" for merge in merges))


def _choice(times: object) -> str:
    assert isinstance(times, dict)
    best = min(times, key=lambda form: times[form])
    return best if times[best] < _CLEARLY_FASTER * times["plain"] else "plain"


def _is_sound(times: object) -> TypeGuard[dict[str, float]]:
    return (
        isinstance(times, dict)
        and "plain" in times
        and all(isinstance(value, float) and value > 0 for value in times.values())
    )


def _times_ms(
    conv: Conv, *, batch_size: int, precision: Precision, device: torch.device
) -> dict[str, float]:
    """Milliseconds of each form; interleaved, so that a busy moment hits all."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = (batch_size, conv.in_channels, conv.in_side, conv.in_side)
    features = torch.randn(size, generator=torch.Generator().manual_seed(0))
    features = features.to(device, dtype, memory_format=torch.channels_last)
    module = convolution(conv).to(device).to(memory_format=torch.channels_last)
    features.requires_grad_()
    forms = candidate_forms(conv, precision=precision, device=device)
    best = dict.fromkeys(forms, float("inf"))
    for _ in range(1 + _ROUNDS):
        for form in forms:
            module.form = form
            start = _clock_s(device)
            _step(module, features)
            best[form] = min(best[form], 1000 * (_clock_s(device) - start))
    return best


def _step(conv: Conv2d, features: Tensor) -> None:
    """Forward and backward, as a block calls it."""
    is_bf16 = features.dtype == torch.bfloat16
    kind = features.device.type
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=is_bf16):
        if conv.form == "matmul":
            # The fork before a shortcut skips pixels, and adds gradients at no cost.
            rows, columns = conv.stride
            thinned = features.detach()[:, :, ::rows, ::columns]
            thinned = thinned.contiguous(memory_format=torch.channels_last)
            outputs = conv.pointwise(thinned.requires_grad_())
        else:
            outputs = conv(features)
    torch.autograd.backward(outputs, torch.ones_like(outputs))


def _clock_s(device: torch.device) -> float:
    """Steady on a device; on a CPU without what other processes take."""
    if device.type == "cpu":
        return time.process_time()
    return hardware.synchronised_time_s(device)


def machine(device: torch.device) -> dict[str, str]:
    """What an answer of the cache holds for."""
    return {"device": hardware.device_name(device), "torch": torch.__version__}


def kept(
    about: Mapping[str, str],
    completed: Callable[[Mapping[str, object]], dict[str, object]],
) -> dict[str, object]:
    """What the cache holds about something, completed and kept again.

    One process at a time completes it; a damaged file counts as none, and a cache that
    cannot be written is done without.
    """
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / "tuning" / f"{name}.json"
    with _locked(path):
        held = _read(path)
        values = completed(held)
        if values != held:
            text = json.dumps({"about": about, "values": values}, indent=1)
            try:
                write_atomically(path, text)
            except OSError as error:
                _logger.info("%s cannot be written: %s", path, error)
    return values


def _read(path: Path) -> dict[str, object]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["values"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return values if isinstance(values, dict) else {}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(path.with_suffix(".lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
