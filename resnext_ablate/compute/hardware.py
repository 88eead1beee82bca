"""What a device is and what it gives: name, precision, kernels, time and memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import platform
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from resnext_ablate.architecture.spec import InputError

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

# glibc serves tensors above 32 MiB by mmap and hands them back at once, so that every
# step faults its activations in afresh; huge pages make the first touch cheap.
TRAINING_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
    "THP_MEM_ALLOC_ENABLE": "1",
    # Huge pages for smaller tensors too: those of small nets fit none of their own.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    # Without it cuBLAS has no deterministic mode; it must stand before CUDA starts.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
"""What a process that trains needs in its environment before it starts."""

_CUDA_CONTEXT_MIB = 600
"""About what a process takes of a GPU before its first tensor."""
_USABLE_SHARE = 0.9
"""Of a GPU's memory; fragments take the rest."""
_CLEARLY_FASTER = 0.8
"""bf16 is taken on a CPU when it needs less than this share of fp32's time."""


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory of this machine, or of its smallest GPU where that is less."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = [
        torch.cuda.get_device_properties(index).total_memory
        for index in range(torch.cuda.device_count())
    ]
    return min(host, *gpus) if gpus else host


def devices(wanted: str) -> tuple[str, ...]:
    """The devices that runs may use: every GPU, one named, or the CPU.

    Raises:
        InputError: a CUDA device is asked for that is not there.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not available):
        return ("cpu",)
    known = tuple(f"cuda:{index}" for index in range(available))
    if wanted in ("auto", "cuda") and known:
        return known
    if wanted in known:
        return (wanted,)
    raise InputError(
        f"run.device = {wanted!r}: this machine has no such device; it has "
        f"{', '.join(('cpu', *known))}."
    )


def placed(
    found: Sequence[str],
    *,
    executors: int | Literal["auto"],
    runs_per_device: int,
    devices_per_run: int,
) -> tuple[str, ...]:
    """The device of each executor, its first one where it has several.

    Args:
        found: the devices that runs may use.
        executors: how many; auto: one per core, or so many as GPUs have room for.
        runs_per_device: that share a GPU.
        devices_per_run: that a run takes.

    Raises:
        InputError: runs are to share a device that is a CPU, or need more GPUs.
    """
    if found[0] == "cpu":
        if executors == "auto":
            if runs_per_device > 1:
                raise InputError(
                    f"run.runs_per_device = {runs_per_device}: runs share GPUs only, "
                    "and this study trains on the CPU, one run per core; run.executors "
                    "changes that."
                )
            return ("cpu",) * max(1, usable_cores() // devices_per_run)
        return ("cpu",) * executors
    if devices_per_run > len(found):
        raise InputError(
            f"run.devices_per_run = {devices_per_run}: there are {len(found)} GPUs."
        )
    firsts = found[::devices_per_run][: len(found) // devices_per_run]
    if executors == "auto":
        executors = len(firsts) * runs_per_device
    return tuple(firsts[index % len(firsts)] for index in range(executors))


def check_room(placed: Sequence[str], *, run_mib: float) -> None:
    """Sees that the runs on each GPU have room beside each other.

    Args:
        placed: the device of each executor.
        run_mib: what the largest net was measured to need.

    Raises:
        InputError: they have not.
    """
    for device, count in Counter(placed).items():
        if device == "cpu":
            continue
        total_mib = torch.cuda.get_device_properties(device).total_memory / 2**20
        room = int(total_mib * _USABLE_SHARE / (run_mib + _CUDA_CONTEXT_MIB))
        if 1 <= room < count:
            raise InputError(
                f"{count} runs are to share {device}, but the largest net was measured "
                f"to need {run_mib:,.0f} MiB, so that {room} have room in its "
                f"{total_mib:,.0f} MiB; set run.runs_per_device = {room}."
            )


def resolve_precision(
    precision: Literal["auto", "fp32", "bf16"], *, device: torch.device
) -> Precision:
    """The precision to train in; `auto` is bf16 where the device is faster in it.

    On CUDA that is known; on a CPU a convolution is timed in both, forward and
    backward. A study resolves it once, so that all its runs agree.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        with torch.cuda.device(device):
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if fast else "fp32"
    times: dict[Precision, float] = {"fp32": math.inf, "bf16": math.inf}
    for _ in range(5):  # Interleaved, so that a busy moment hits both.
        for name in times:
            times[name] = min(times[name], _probe_s(name))
    return "bf16" if times["bf16"] < _CLEARLY_FASTER * times["fp32"] else "fp32"


def device_name(device: torch.device) -> str:
    """A device as people know it, such as `cpu: AMD EPYC` or the name of a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
                break
    return f"{device.type}: {name}"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread for torch, as each executor has; restored at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def kernel_choice(*, deterministic: bool) -> Iterator[None]:
    """Deterministic kernels, or else the fastest by trial; restored at the end."""
    cudnn = torch.backends.cudnn
    fill: Any = torch.utils.deterministic
    before = (
        torch.get_deterministic_debug_mode(),
        cudnn.deterministic,
        cudnn.benchmark,
        fill.fill_uninitialized_memory,
    )
    if deterministic:
        # cuBLAS reads this when it starts on a device.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Its better known sibling imports torch's compiler: 1.3 s and 150 MiB a process.
    torch.set_deterministic_debug_mode("warn" if deterministic else "default")
    cudnn.deterministic, cudnn.benchmark = deterministic, not deterministic
    fill.fill_uninitialized_memory = False  # Nothing here reads what it did not write.
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1], before[2]
        fill.fill_uninitialized_memory = before[3]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the host has no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch has no type of its own for the host's memory.
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("allocate memory", "bad_alloc")
    )


def _probe_s(precision: Precision) -> float:
    """Seconds of a 3x3 convolution, forward and backward, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 32, 16, 16, generator=generator)
    images = images.to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(32, 32, 3, 3, generator=generator, requires_grad=True)
    start = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        outputs = F.conv2d(images, weight, padding=1)
    outputs.backward(torch.ones_like(outputs))  # type: ignore[no-untyped-call]
    return time.perf_counter() - start


def synchronised_time_s(device: torch.device) -> float:
    """Seconds of a steady clock, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new peak, so that earlier runs of the process do not count."""
    gc.collect()
    # What lives now is not looked at again: 0.2 s less before each of the next runs.
    gc.freeze()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Hand freed memory back, where the C library can.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory since the reset: of tensors on CUDA, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)
