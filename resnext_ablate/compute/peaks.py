"""What a device can do at best, and the share of it that a run has used."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch

from resnext_ablate.architecture.roofline import Peaks, training_floor_s
from resnext_ablate.architecture.spec import ResNeXtSpec
from resnext_ablate.compute import tuning
from resnext_ablate.compute.hardware import DTYPES, Precision, synchronised_time_s

_REPEATS = 12
_SHORTEST_S = 0.25
"""Of all repeats: a GPU at rest takes some time to reach its clock."""


def known_peaks(
    device: torch.device, *, precision: Literal["auto", "fp32", "bf16"]
) -> Peaks:
    """As `measure_peaks`, but once on a machine for this number of threads.

    Asked before a run begins, so that the first ones are not measured beside others.
    """
    precision = tuning.resolve_precision(precision, device=device)

    def completed(held: Mapping[str, object]) -> dict[str, object]:
        if _is_sound(held):
            return dict(held)
        peaks = measure_peaks(device, precision=precision)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # Runs beside this one may need the room.
        return dataclasses.asdict(peaks)

    threads = str(torch.get_num_threads())
    about = {"what": "peaks", "precision": precision, "threads": threads}
    kept = tuning.kept({**about, **tuning.machine(device)}, completed)
    return Peaks(**kept)  # type: ignore[arg-type]


def measure_peaks(device: torch.device, *, precision: Precision) -> Peaks:
    """The best of a large matrix product and of a large copy, on the threads set."""
    dtype = DTYPES[precision]
    on_cuda = device.type == "cuda"
    side = 8192 if on_cuda else 1024
    # Of equal numbers a GPU's product is faster than its power allows of others.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(side, side, generator=generator, dtype=dtype, device=device)
        for _ in "ab"
    )
    num_values = 2**30 if on_cuda else 2**26
    source = torch.ones(num_values, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product_s = _best_s(lambda: torch.mm(left, right), device=device)
    copy_s = _best_s(lambda: target.copy_(source), device=device)
    return Peaks(
        macs_per_s=side**3 / product_s,
        bytes_per_s=2 * num_values / copy_s,
        bytes_per_value=dtype.itemsize,
    )


def roofline_pct(
    spec: ResNeXtSpec,
    *,
    images_per_s: float,
    image_size: int,
    batch_size: int,
    peaks: Peaks,
) -> float:
    """What a run made of its device, in percent of what the net's layers allow there.

    See `roofline.training_floor_s`. Runs that share a device each have their share.
    """
    floor_s = training_floor_s(
        spec, image_size=image_size, batch_size=batch_size, peaks=peaks
    )
    return 100 * images_per_s * floor_s / batch_size


def clock(device: torch.device, *, num_threads: int) -> Callable[[], float]:
    """Seconds, of the processor where one thread does all: a busy neighbour takes
    turns on the same core, which says nothing of the net."""
    if device.type == "cpu" and num_threads == 1:
        return time.process_time
    return partial(synchronised_time_s, device)


def timed_s(call: Callable[[], object], *, clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def _best_s(call: Callable[[], object], *, device: torch.device) -> float:
    seconds = clock(device, num_threads=torch.get_num_threads())
    start, times = time.perf_counter(), list[float]()
    while len(times) < _REPEATS or time.perf_counter() - start < _SHORTEST_S:
        times.append(timed_s(call, clock=seconds))
    return min(times)


def _is_sound(held: Mapping[str, object]) -> bool:
    fields = {field.name for field in dataclasses.fields(Peaks)}
    return held.keys() == fields and all(
        isinstance(value, (int, float)) and 0 < value < math.inf
        for value in held.values()
    )
