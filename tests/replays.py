"""What stands in for a CUDA graph where there is no CUDA."""

from __future__ import annotations

from collections.abc import Callable


class Again:
    """A capture that does its work anew at each replay, as a graph would.

    Args:
        error: what recording raises; None: nothing.

    Attributes:
        done: what it was asked for, in order.
    """

    def __init__(self, *, error: Exception | None = None) -> None:
        self._error = error
        self.done: list[str] = []

    def beside(self, act: Callable[[], None]) -> None:
        self.done.append("beside")
        act()

    def record(self, act: Callable[[], None]) -> None:
        if self._error:
            raise self._error
        self.done.append("record")
        self._act = act

    def replay(self) -> None:
        self.done.append("replay")
        self._act()
