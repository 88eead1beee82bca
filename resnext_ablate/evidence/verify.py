"""Whether a report says what its data say.

A page carries the tables it was made from. Here it is made again from those, and what
the two pages show is compared piece by piece: texts, table cells, charts, script and
style. Where the study's folder is there, its run files have the last word on the data.
"""

from __future__ import annotations

import base64
import difflib
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.evidence import embedding, page, report, report_page
from resnext_ablate.records.records import PLAN_FILE
from resnext_ablate.records.tables import StudyTables, read_tables

_RELATIVE = 1e-9
"""Numbers that differ by less are equal: other machines round the last digit apart."""
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_FRAMES = ("nets", "runs", "epochs", "attempts")


@dataclass(frozen=True)
class Finding:
    """One place where a page and its data part."""

    where: str
    shown: str
    expected: str


@dataclass(frozen=True)
class Verification:
    """What became of checking a page."""

    findings: tuple[Finding, ...]
    num_numbers: int
    """Numbers on the page, in texts, tables and charts, that were compared."""
    num_runs: int
    run_files: Literal["agree", "differ", "not there"]
    made_with: dict[str, str]
    checked_with: dict[str, str]


def verify(html: Path) -> Verification:
    """Recomputes all that a report shows from the data inside it.

    Args:
        html: a report; if it lies in its study's folder, run files are compared too.

    Raises:
        InputError: the file is no report, or its data cannot be read.
    """
    try:
        text = html.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{html}: cannot be read as a report.") from None
    payload = _payload(text, html)
    tables = embedding.from_value(payload)
    expected = report_page.render(tables, report.evidence_of(tables))
    texts = _compare_texts(text, expected)
    values = _compare_values(payload, _payload(expected, html))
    findings = [*_check_sum(payload), *texts, *values, *_check_plotly(text)]
    from_files: list[Finding] = []
    has_files = (html.parent / PLAN_FILE).exists()
    if has_files:
        from_files = list(_compare_files(tables, read_tables(html.parent)))
    return Verification(
        findings=(*findings, *from_files),
        num_numbers=_count_numbers(expected, payload),
        num_runs=len(tables.runs),
        run_files="differ" if from_files else "agree" if has_files else "not there",
        made_with=payload.get("made_with", {}),
        checked_with=page.made_with(),
    )


def _packed_part(text: str, name: str) -> str:
    found = re.search(rf'<script type="text/plain" id="{name}">([^<]*)</script>', text)
    if not found:
        raise ValueError(f"there is no {name}")
    return page.unpacked(found[1])


def _payload(text: str, html: Path) -> dict[str, Any]:
    try:
        value = json.loads(_packed_part(text, "payload"))
        if not isinstance(value, dict) or "frames" not in value:
            raise ValueError("there are no tables")
    except (ValueError, OSError, EOFError) as error:
        raise InputError(
            f"{html}: is no report of this package, or a damaged one: {error}."
        ) from None
    return value


def _check_sum(payload: dict[str, Any]) -> Iterator[Finding]:
    found, expected = str(payload.get("checksum")), embedding.checksum(payload)
    if found != expected:
        yield Finding("checksum of the data inside", found, expected)


def _check_plotly(text: str) -> Iterator[Finding]:
    """The drawing library on the page is that of plotly, untouched."""
    try:
        found = _packed_part(text, "plotly")
    except (ValueError, OSError, EOFError):
        found = ""
    expected = page.unpacked(page.packed_plotly())
    if found != expected:
        versions = [re.search(r"plotly\.js v([\d.]+)", t) for t in (found, expected)]
        names = [f"plotly.js {v[1]}" if v else "not plotly.js" for v in versions]
        yield Finding("the drawing library", names[0], f"{names[1]}, unchanged")


# ---- what the page says ----


@dataclass(frozen=True)
class _Piece:
    where: str
    text: str


class _Reader(HTMLParser):
    """Every tag and text of a page, each with a place that a person finds."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[_Piece] = []
        self._heading = "the page's head"
        self._table = ""
        self._row: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "tr":
            self._row = []
        if values.get("data-table"):
            self._table = f"table {values['data-table']}"
        if tag in ("section", "h2", "h3"):
            self._table = ""
        self._open.append(tag)
        # What the script holds in packed form is compared by value.
        if values.get("id") in ("payload", "plotly"):
            self._open[-1] = "packed"
        said = " ".join(f'{key}="{value}"' for key, value in attrs)
        self.pieces.append(_Piece(self._place(), f"<{tag} {said}>"))

    def handle_endtag(self, tag: str) -> None:
        self.pieces.append(_Piece(self._place(), f"</{tag}>"))
        if self._open:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "packed":
            return
        if inside in ("h1", "h2", "h3"):
            self._heading = f'under "{data.strip()[:60]}"'
        if inside in ("td", "th"):
            self._row.append(data.strip())
        self.pieces.append(_Piece(self._place(), data.strip()))

    def handle_comment(self, data: str) -> None:
        self.pieces.append(_Piece(self._place(), f"comment {data}"))

    def handle_decl(self, decl: str) -> None:
        self.pieces.append(_Piece(self._place(), decl))

    def _place(self) -> str:
        if self._table:
            row = f", row {self._row[0]}, cell {len(self._row)}" if self._row else ""
            return f"{self._table}{row}"
        return self._heading


def _pieces(text: str) -> list[_Piece]:
    reader = _Reader()
    reader.feed(text)
    reader.close()
    return [piece for piece in reader.pieces if piece.text]


def _compare_texts(text: str, expected: str) -> Iterator[Finding]:
    if _without_packed(text) == _without_packed(expected):
        return
    found, wanted = _pieces(text), _pieces(expected)
    matcher = difflib.SequenceMatcher(
        a=[piece.text for piece in found],
        b=[piece.text for piece in wanted],
        autojunk=False,
    )
    num_found = 0
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            continue
        for here, there in itertools.zip_longest(found[a:b], wanted[c:d]):
            num_found += 1
            place = (there or here).where
            yield Finding(
                place,
                here.text if here else "nothing",
                there.text if there else "nothing",
            )
    if not num_found:
        yield Finding("the page's source", "other markup", "that of the template")


def _without_packed(text: str) -> str:
    return re.sub(r'(id="(?:payload|plotly)">)[^<]*', r"\1", text)


# ---- what the page's script draws from ----


def _compare_values(found: Any, expected: Any, where: str = "") -> Iterator[Finding]:
    """Every leaf of the payload against the one made again."""
    if found == expected:
        return
    if isinstance(found, dict) and isinstance(expected, dict):
        if "bdata" in expected and "bdata" in found:
            found, expected = _array(found), _array(expected)
        else:
            for key in dict.fromkeys([*expected, *found]):
                at = f"{where}, {key}" if where else _NAMES.get(key, key)
                yield from _compare_values(found.get(key), expected.get(key), at)
            return
    if isinstance(found, list) and isinstance(expected, list):
        if len(found) != len(expected):
            yield Finding(where, f"{len(found)} values", f"{len(expected)} values")
            return
        for i, (here, there) in enumerate(zip(found, expected, strict=True)):
            yield from _compare_values(here, there, f"{where} {i + 1}")
        return
    if not _alike(found, expected):
        yield Finding(where, _said(found), _said(expected))


_NAMES = {"figures": "chart", "tables": "table", "frames": "data"}


def _array(value: dict[str, Any]) -> list[Any]:
    try:
        data = base64.b64decode(value["bdata"], validate=True)
        numbers = np.frombuffer(data, dtype=value["dtype"])
    except (ValueError, TypeError, KeyError):
        return []
    return [None if math.isnan(x) else x for x in numbers.tolist()]


def _alike(found: Any, expected: Any) -> bool:
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, int) and isinstance(expected, int):
        return found == expected
    if isinstance(found, (int, float)) and isinstance(expected, (int, float)):
        return math.isclose(found, expected, rel_tol=_RELATIVE, abs_tol=1e-12)
    return bool(found == expected)


def _said(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _count_numbers(text: str, payload: dict[str, Any]) -> int:
    shown = sum(len(_NUMBER.findall(piece.text)) for piece in _shown_pieces(text))
    return shown + _count_leaves({key: payload.get(key) for key in _NAMES})


def _shown_pieces(text: str) -> Iterator[_Piece]:
    body = re.sub(r"<(script|style)\b[^>]*>.*?</\1>", "", text, flags=re.DOTALL)
    return (piece for piece in _pieces(body) if not piece.text.startswith("<"))


def _count_leaves(value: Any) -> int:
    if isinstance(value, dict):
        if "bdata" in value:
            return len(_array(value))
        return sum(map(_count_leaves, value.values()))
    if isinstance(value, list):
        return sum(map(_count_leaves, value))
    return int(isinstance(value, (int, float)) and not isinstance(value, bool))


# ---- what the run files say ----


def _compare_files(inside: StudyTables, files: StudyTables) -> Iterator[Finding]:
    files = embedding.reduced(files)
    for field in ("study", "num_planned", "provenance"):
        here, there = getattr(inside, field), getattr(files, field)
        if here != there:
            yield Finding(f"{field} in the study's folder", _said(here), _said(there))
    if inside.config != files.config:
        yield Finding("the study file in the study's folder", "another", "as printed")
    if _packed_bits(inside) != _packed_bits(files):
        yield Finding(
            "answers to test images, by the run files", "others", "as they are"
        )
    for name in _FRAMES:
        keys = [k for k in ("variant", "seed", "epoch") if k in getattr(files, name)]
        yield from _compare_frames(
            getattr(inside, name), getattr(files, name), name=name, keys=keys
        )
    if inside.search is not None and files.search is not None:
        for name, key in (("trials", "variant"), ("importance", "axis")):
            here, there = getattr(inside.search, name), getattr(files.search, name)
            yield from _compare_frames(here, there, name=name, keys=[key])


def _packed_bits(tables: StudyTables) -> Any:
    return embedding.to_value(tables)["correct"]


def _compare_frames(
    inside: pd.DataFrame, files: pd.DataFrame, *, name: str, keys: list[str]
) -> Iterator[Finding]:
    if len(inside) != len(files):
        yield Finding(
            f"{name} in the study's folder", str(len(inside)), str(len(files))
        )
        return
    here, there = page.frame_values(inside), page.frame_values(files)
    places = [" ".join(map(str, row)) for row in files[keys].itertuples(index=False)]
    for column in dict.fromkeys([*there, *here]):
        pairs = zip(
            here.get(column, [None] * len(files)),
            there.get(column, [None] * len(files)),
            places,
            strict=True,
        )
        for found, expected, place in pairs:
            if not _alike(found, expected):
                where = f"{column} of {place}, by the run files"
                yield Finding(where, _said(found), _said(expected))
