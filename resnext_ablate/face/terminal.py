"""What the command line prints: tables, JSON, and progress that suits where it goes."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from resnext_ablate.face.answers import Answer
    from resnext_ablate.records.progress import Progress

_PLAIN_LINE_EVERY_S = 30.0


def talk(text: str) -> None:
    """A line for the person at the terminal, on standard error."""
    _talk_console().print(Text(text), soft_wrap=True)


def print_answer(answer: Answer, *, as_json: bool) -> None:
    """An answer on standard output: JSON, or text around a table."""
    if as_json:
        print(json.dumps(answer.value, indent=2, allow_nan=False))
        return
    parts = []
    if answer.opening:
        parts.append(answer.opening)
    if answer.rows:
        parts.append(_table_text(answer))
    if answer.closing:
        parts.append(answer.closing)
    # A heading stands apart from its table; a line apart from what it counts not.
    print(("\n\n" if answer.rows else "\n").join(parts))


def print_answers(first: Answer, main: Answer, *, key: str, as_json: bool) -> None:
    """Two answers on standard output, as JSON the first one below a key of the main."""
    if as_json:
        assert isinstance(main.value, dict)
        main = replace(main, value={**main.value, key: first.value})
    else:
        print_answer(first, as_json=False)
        print()
    print_answer(main, as_json=as_json)


def _table_text(answer: Answer) -> str:
    columns = [answer.header, *answer.rows]
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    lines = []
    for row in columns:
        fields = [
            field.ljust(width)
            if position < answer.num_text_columns
            else field.rjust(width)
            for position, (field, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(fields).rstrip())
    return "\n".join(lines)


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


class StudyWatch:
    """How far a study is, drawn anew on a terminal; elsewhere a line every 30 s."""

    def __init__(self, study: str) -> None:
        self._study = study
        self._console = Console(highlight=False)
        self._live = Live(console=self._console, auto_refresh=False)
        self._next_plain = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def __call__(self, progress: Progress, *, num_epochs: int) -> None:
        if self._console.is_terminal:
            drawn = _watched(self._study, progress, num_epochs=num_epochs)
            self._live.update(drawn, refresh=True)
        elif progress.running and time.monotonic() >= self._next_plain:
            self._next_plain = time.monotonic() + _PLAIN_LINE_EVERY_S
            line = f"{self._study}: {_progress_line(progress)}".removesuffix(" | ")
            self._console.print(Text(line), soft_wrap=True)


def _watched(study: str, progress: Progress, *, num_epochs: int) -> Table:
    """The whole study as a bar, below it a bar for each run under way."""
    table = Table.grid(padding=(0, 2))
    done = progress.num_complete + progress.num_pruned + progress.num_failed
    eta = "" if progress.eta_s is None else f"about {_duration(progress.eta_s)} left"
    failed = f", {progress.num_failed} failed" if progress.num_failed else ""
    table.add_row(
        Text(study, style="bold"),
        ProgressBar(total=max(progress.num_planned, 1), completed=done, width=32),
        Text(f"{done} of {progress.num_planned} runs{failed}"),
        Text(eta),
    )
    for one in progress.running:
        error = "" if one.val_error_pct is None else f"{one.val_error_pct:.2f} % wrong"
        table.add_row(
            Text(f"  {one.variant} seed {one.seed}"),
            ProgressBar(total=num_epochs, completed=one.epoch, width=32),
            Text(f"epoch {one.epoch} of {num_epochs}"),
            Text(error),
        )
    return table


def _finished_line(progress: Progress) -> str:
    run = progress.finished
    assert run is not None
    done = progress.num_complete + progress.num_pruned + progress.num_failed
    place = f"[{done}/{progress.num_planned}] {run.variant} seed {run.seed}"
    if run.state == "pruned":
        return f"{place}: {run.reason}"
    if run.state != "complete":
        return f"{place}: {run.state}: {run.reason}"
    return (
        f"{place}: test error {run.test_error_pct:.2f} %, validation "
        f"{run.epochs[-1].val_error_pct:.2f} %, {run.train_time_s:.1f} s of training"
    )


def _progress_line(progress: Progress) -> str:
    done = progress.num_complete + progress.num_pruned + progress.num_failed
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
