"""What the command line prints: tables, JSON, and progress that suits where it goes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd

    from resnext_ablate.schedule import Progress

_PLAIN_LINE_EVERY_S = 30.0


def talk(text: str) -> None:
    """A line for the person at the terminal, on standard error."""
    _talk_console().print(Text(text), soft_wrap=True)


def print_json(value: object) -> None:
    """One JSON document on standard output; NaN becomes null."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows as plain values, None where a number is missing."""
    rows: list[dict[str, Any]] = frame.to_dict(orient="records")
    return [{key: _plain(value) for key, value in row.items()} for row in rows]


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int
) -> None:
    """A table on standard output; columns from the `left`-th on align right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for position, name in enumerate(header):
        right = position >= left
        table.add_column(
            name, justify="right" if right else "left", no_wrap=True
        )
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(highlight=False)
    if not console.is_terminal:
        # Whoever reads a pipe or a file wants whole rows.
        console = Console(highlight=False, width=10_000)
        lines = console.render_lines(table, pad=False)
        for line in lines:
            print("".join(segment.text for segment in line).rstrip())
        return
    console.print(table, soft_wrap=True)


class DataProgress:
    """Says now and then how many images are decoded."""

    def __init__(self) -> None:
        self._next = time.monotonic() + 2.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 5.0
            talk(f"decoding images: {done} of {total}")


class RunProgress:
    """A live line on a terminal; elsewhere a line per finished run and every 30 s."""

    def __init__(self) -> None:
        self._console = _talk_console()
        self._live = Live(console=self._console, transient=True, refresh_per_second=4)
        self._next_plain = time.monotonic() + _PLAIN_LINE_EVERY_S

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def __call__(self, progress: Progress) -> None:
        if progress.note:
            self._print(progress.note)
        if progress.finished is not None:
            self._print(_finished_line(progress))
        line = _progress_line(progress)
        if self._console.is_terminal:
            self._live.update(Text(line, overflow="ellipsis", no_wrap=True))
        elif time.monotonic() >= self._next_plain:
            self._print(line)

    def _print(self, line: str) -> None:
        self._next_plain = time.monotonic() + _PLAIN_LINE_EVERY_S
        self._console.print(Text(line), soft_wrap=True)


def _finished_line(progress: Progress) -> str:
    run = progress.finished
    assert run is not None
    done = progress.num_complete + progress.num_failed
    place = f"[{done}/{progress.num_planned}] {run.variant} seed {run.seed}"
    if run.state != "complete":
        return f"{place}: {run.state}: {run.reason}"
    return (
        f"{place}: test error {run.test_error_pct:.2f} %, validation "
        f"{run.epochs[-1].val_error_pct:.2f} %, {run.train_time_s:.1f} s of training"
    )


def _progress_line(progress: Progress) -> str:
    done = progress.num_complete + progress.num_failed
    eta = "" if progress.eta_s is None else f", about {_duration(progress.eta_s)} left"
    running = "; ".join(
        f"{one.variant} seed {one.seed} epoch {one.epoch}"
        + ("" if one.val_error_pct is None else f" ({one.val_error_pct:.1f} %)")
        for one in progress.running[:4]
    )
    more = len(progress.running) - 4
    running += f"; {more} more" if more > 0 else ""
    failed = f", {progress.num_failed} failed" if progress.num_failed else ""
    return f"{done} of {progress.num_planned} runs{failed}{eta} | {running}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _talk_console() -> Console:
    return Console(stderr=True, highlight=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
