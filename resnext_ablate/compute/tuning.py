"""What is fastest on this machine: timed once, and kept in the cache.

A study asks when it begins and keeps the answers with its results, since the forms of a
layer differ in rounding, and all its runs must agree.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from resnext_ablate.architecture.shapes import Conv
from resnext_ablate.architecture.spec import InputError
from resnext_ablate.compute import captures, hardware
from resnext_ablate.compute.blocks import convolution
from resnext_ablate.compute.hardware import Precision
from resnext_ablate.compute.layers import (
    BatchNorm2d,
    Conv2d,
    Kernels,
    conv_key,
    has_direct,
)
from resnext_ablate.compute.sources import cache_folder
from resnext_ablate.records.config import TrainConfig
from resnext_ablate.records.records import write_atomically

_ROUNDS = 7
_CLEARLY_FASTER = 0.95
"""A form is taken where it needs less than this share of torch's own time."""
_WIDEST_BLOCK = 128
"""Channels of a block of merged groups: beyond, most of the work is on zeros."""
_WIDEST_BY_TRITON = 64
"""Channels of a group in its own kernel, which keeps a whole group on the chip."""
_LARGEST_BATCH = 128
_TYPICAL = (128, 128, 32, 32)
"""Activations (N, C, H, W) that fused kernels are timed on."""

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

    On CUDA it is fused where a short timed probe finds that faster.

    Raises:
        InputError: fused is asked for where it cannot be.
    """
    has_kernels = device.type == "cpu" or (device.type == "cuda" and has_triton())
    can_fuse = has_kernels and channels_last
    if kernels == "fused" and not can_fuse:
        raise InputError(
            'train.kernels = "fused" needs train.channels_last = true, and a CPU or '
            'CUDA with the package triton; "auto" takes torch\'s own elsewhere.'
        )
    if kernels == "auto" and can_fuse and device.type == "cuda":
        return "fused" if _is_fused_faster(device) else "torch"
    return "fused" if kernels != "torch" and can_fuse else "torch"


def has_triton() -> bool:
    """Whether Triton can be imported, as with torch for CUDA on Linux."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


def _is_fused_faster(device: torch.device) -> bool:
    """Whether it clearly is on a device; what fails there is not, and is tried again.

    Another program may have had all the memory.
    """

    def measured(held: Mapping[str, object]) -> dict[str, object]:
        if {"torch", "fused"} <= held.keys() and _are_times(held):
            return dict(held)
        return {**_kernel_times_ms(device)}

    try:
        times = kept({"what": "kernels", **machine(device)}, measured)
    except Exception as error:
        _logger.info("torch's own kernels: the fused ones fail here: %s", error)
        return False
    return _fastest(times, reference="torch") == "fused"


def _kernel_times_ms(device: torch.device) -> dict[str, float]:
    """Milliseconds of norm and ReLU, forward and backward, in either kernels."""
    precision = hardware.resolve_precision("auto", device=device)
    dtype = hardware.DTYPES[precision]
    features = _activations(_TYPICAL, dtype=dtype, device=device)
    norm = BatchNorm2d(_TYPICAL[1]).to(device)

    def act(kernels: Kernels) -> None:
        norm.kernels = kernels
        _differentiated(norm.relu(features), features, norm)

    names: tuple[Kernels, ...] = ("torch", "fused")
    acts: dict[str, Callable[[], None]] = {name: partial(act, name) for name in names}
    return captures.device_ms(acts, reference="torch", device=device)


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
    a form, and torch's own form is kept unless another is clearly faster. On CUDA forms
    that fail are left out.

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
            # A form that is new since then is timed beside the others. On CUDA one may
            # be missing because it failed.
            if key not in known
            or (device.type == "cpu" and not set(forms_of(conv)) <= set(known[key]))
        }
        return {**known, **{key: one(conv) for key, conv in missing.items()}}

    about = {"what": "forms", "batch": str(batch_size), "precision": precision}
    about["as"] = "replayed" if device.type == "cuda" else "in a block"
    with hardware.one_thread():
        found = kept({**about, **machine(device)}, completed)
    return {key: _choice(found[key]) for key in shapes}


def candidate_forms(
    conv: Conv, *, precision: Precision, device: torch.device
) -> tuple[str, ...]:
    """The forms that may be fastest for a shape, torch's own first."""
    own = _direct_form(conv, precision=precision, device=device)
    if conv.kernel_size == 1 and conv.groups == 1:
        return ("plain", "matmul", *own)
    width = max(conv.in_channels, conv.out_channels) // conv.groups
    own_groups = conv.groups // conv.copies  # Seeds are never merged.
    merges = [
        f"merge{merged}"
        for merged in range(2, own_groups + 1)
        if own_groups % merged == 0 and merged * width <= _WIDEST_BLOCK
    ]
    if device.type != "cuda" or conv.groups == 1:
        return ("plain", *merges, *own)
    # Half of the group widths are slow in one layout, the other half in the other.
    both = ("plain", *merges, "nchw", *(f"nchw+{merge}" for merge in merges))
    return (*both, *_triton_forms(width, own_groups)) if has_triton() else both


def _direct_form(
    conv: Conv, *, precision: Precision, device: torch.device
) -> list[str]:
    """That of the loops, where a CPU has what they need."""
    if device.type != "cpu" or not has_direct(conv):
        return []
    # Imported here because it brings a compiler.
    from resnext_ablate.compute.direct import is_precision_possible

    can_be = is_precision_possible(hardware.DTYPES[precision], groups=conv.groups)
    return ["direct"] if can_be else []


def _triton_forms(width: int, groups: int) -> list[str]:
    """Our own kernels, with groups merged until one fills half of their smallest block,
    16 channels, as far as that goes."""
    merges = [
        merged
        for merged in range(1, groups + 1)
        if groups % merged == 0 and merged * width <= _WIDEST_BY_TRITON
    ]
    useful = [merged for merged in merges if merged * width > 8] or merges[-1:]
    return ["triton" if n == 1 else f"triton+merge{n}" for n in useful]


def _choice(times: object) -> str:
    assert isinstance(times, dict)
    return _fastest(times, reference="plain")


def _fastest(times: Mapping[str, Any], *, reference: str) -> str:
    best = min(times, key=lambda name: times[name])
    return best if times[best] < _CLEARLY_FASTER * times[reference] else reference


def _is_sound(times: object) -> TypeGuard[dict[str, float]]:
    return isinstance(times, dict) and "plain" in times and _are_times(times)


def _are_times(times: Mapping[str, object]) -> bool:
    return all(isinstance(value, float) and value > 0 for value in times.values())


def _times_ms(
    conv: Conv, *, batch_size: int, precision: Precision, device: torch.device
) -> dict[str, float]:
    """Milliseconds of each form; interleaved, so that a busy moment hits all."""
    dtype = hardware.DTYPES[precision]
    size = (batch_size, conv.in_channels, conv.in_side, conv.in_side)
    features = _activations(size, dtype=dtype, device=device)
    module = convolution(conv).to(device).to(memory_format=torch.channels_last)
    forms = candidate_forms(conv, precision=precision, device=device)
    if device.type == "cuda":
        return _device_times_ms(module, features, forms=forms, device=device)
    # Imported here because it brings a compiler.
    from resnext_ablate.compute import residual

    features = features.detach()
    best = dict.fromkeys(forms, float("inf"))
    for _ in range(1 + _ROUNDS):
        for form in forms:
            module.form = form
            start = _clock_s(device)
            residual.act(module, features)
            best[form] = min(best[form], 1000 * (_clock_s(device) - start))
    return best


def _activations(
    size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Of a size (N, C, H, W), channels-last, as a leaf."""
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(0))
    drawn = drawn.to(device, dtype, memory_format=torch.channels_last)
    return drawn.requires_grad_()


def _device_times_ms(
    module: Conv2d, features: Tensor, *, forms: Sequence[str], device: torch.device
) -> dict[str, float]:
    """As `_times_ms`, replayed as training is; without the forms that fail here."""

    def act(form: str) -> None:
        module.form = form
        outputs, seen = _forward(module, features)
        _differentiated(outputs, seen, module)

    acts = {form: partial(act, form) for form in forms}
    return captures.device_ms(acts, reference="plain", device=device)


def _differentiated(outputs: Tensor, features: Tensor, module: nn.Module) -> None:
    """Backward; the gradients go, as those of a block's features do."""
    wanted = [features, *module.parameters()]
    torch.autograd.grad(outputs, wanted, torch.ones_like(outputs))


def _forward(conv: Conv2d, features: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the leaf that it is made from."""
    is_bf16 = features.dtype == torch.bfloat16
    kind = features.device.type
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=is_bf16):
        if conv.is_product:
            # The fork before a shortcut skips pixels, and adds gradients at no cost.
            rows, columns = conv.stride
            thinned = features.detach()[:, :, ::rows, ::columns]
            thinned = thinned.contiguous(memory_format=torch.channels_last)
            return conv.pointwise(thinned.requires_grad_()), thinned
        return conv(features), features


def _clock_s(device: torch.device) -> float:
    """Steady on a device; on a CPU without what other processes take."""
    if device.type == "cpu":
        return time.process_time()
    return hardware.synchronised_time_s(device)


def machine(device: torch.device) -> dict[str, str]:
    """What an answer of the cache holds for."""
    about = {"device": hardware.device_name(device), "torch": torch.__version__}
    return about | {"triton": _triton_version()} if device.type == "cuda" else about


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


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
