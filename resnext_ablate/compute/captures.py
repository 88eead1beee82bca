"""Work on a device that is recorded once and done again, and how long it takes so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from resnext_ablate.compute.hardware import is_out_of_memory, synchronised_time_s

_NUM_EAGER = 3
"""Times that work is done before it is captured: it compiles, and allocates."""
_ROUNDS = 7
_REPLAYS = 8
"""In a row, so that waiting for the device weighs little."""

_logger = logging.getLogger(__name__)


class Capture(Protocol):
    """What records work on a device and does it again."""

    def beside(self, act: Callable[[], None]) -> None:
        """Does it now, where it would be captured."""

    def record(self, act: Callable[[], None]) -> None:
        """Captures it, without doing it.

        Raises:
            RuntimeError: something in it cannot be captured.
        """

    def replay(self) -> None:
        """Does what was captured."""


class Pool:
    """Memory that graphs share; it is kept by stream, so they share that as well."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.handle = torch.cuda.graph_pool_handle()


class CudaCapture:
    """A CUDA graph and the stream that it is captured on.

    Args:
        device: where it runs.
        pool: of graphs that are never replayed at once, and whose results nobody reads;
            None: its own.
    """

    def __init__(self, device: torch.device, *, pool: Pool | None = None) -> None:
        pool = pool or Pool(device)
        self._device = device
        self._pool, self._stream = pool.handle, pool.stream
        self._graph = torch.cuda.CUDAGraph()

    def beside(self, act: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            act()
        current.wait_stream(self._stream)

    def record(self, act: Callable[[], None]) -> None:
        """See `Capture`, as the other two."""
        # Another thread of an executor reads its input; only this one is captured.
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(
                self._graph,
                pool=self._pool,
                stream=self._stream,
                capture_error_mode="thread_local",
            ),
        ):
            act()

    def replay(self) -> None:
        self._graph.replay()


def replayed_ms(
    acts: Mapping[str, Callable[[], None]],
    *,
    reference: str,
    capture: Callable[[], Capture],
    clock_s: Callable[[], float],
) -> dict[str, float]:
    """The best time of each act, in milliseconds, of several turns of all.

    Steps are replayed from a CUDA graph, so that launches from Python count for
    nothing; an act that cannot be captured is timed with them.

    Args:
        acts: work on a device, by name.
        reference: the act that must succeed; others that fail are left out.
        capture: makes what captures one act.
        clock_s: seconds, once the device has done its work.

    Raises:
        torch.OutOfMemoryError: no room for one of them.
    """
    ready = dict[str, Callable[[], None]]()
    for name, act in acts.items():
        try:
            ready[name] = _prepared(act, capture=capture())
            ready[name]()
            clock_s()  # What goes wrong on a device is said when it is waited for.
        except Exception as error:
            if name == reference or is_out_of_memory(error):
                raise
            _logger.info("%s is left out, it fails here: %s", name, error)
            ready.pop(name, None)
    best = dict.fromkeys(ready, float("inf"))
    for _ in range(_ROUNDS):
        for name, act in ready.items():
            start = clock_s()
            for _ in range(_REPLAYS):
                act()
            elapsed_ms = 1000 * (clock_s() - start) / _REPLAYS
            best[name] = min(best[name], elapsed_ms)
    return best


def device_ms(
    acts: Mapping[str, Callable[[], None]], *, reference: str, device: torch.device
) -> dict[str, float]:
    """As `replayed_ms`, on a CUDA device."""
    # Each act's activations would stay allocated otherwise.
    pool = Pool(device)
    return replayed_ms(
        acts,
        reference=reference,
        capture=lambda: CudaCapture(device, pool=pool),
        clock_s=lambda: synchronised_time_s(device),
    )


def _prepared(act: Callable[[], None], *, capture: Capture) -> Callable[[], None]:
    """Does it a few times, and returns what does it again."""
    for _ in range(_NUM_EAGER):
        capture.beside(act)
    try:
        capture.record(act)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        _logger.info("timed without a CUDA graph: %s", error)
        return lambda: capture.beside(act)
    return capture.replay
