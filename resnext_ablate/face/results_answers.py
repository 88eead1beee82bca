"""What the commands about a report answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from resnext_ablate.face import answers
from resnext_ablate.face.answers import Answer

if TYPE_CHECKING:
    from resnext_ablate.evidence.compare import StudyPair
    from resnext_ablate.evidence.verify import Verification

MAX_FINDINGS = 20
_RUN_FILES = {
    "agree": "the run files beside it agree",
    "differ": "the run files beside it DIFFER",
    "not there": "no run files lie beside it",
}


def of_verification(html: Path, found: Verification) -> Answer:
    """Whether a report holds, or where it and its data part."""
    numbers = f"{found.num_numbers:,} numbers from {found.num_runs:,} runs"
    files = _RUN_FILES[found.run_files]
    findings = found.findings
    opening = f"{html}: {numbers} recomputed, all agree; {files}"
    closing = ""
    if findings:
        count = f"{len(findings)} place{'' if len(findings) == 1 else 's'}"
        opening = f"{html}: {numbers} recomputed, {count} DIFFER; {files}"
        more = len(findings) - MAX_FINDINGS
        closing = f"and {more} more" if more > 0 else ""
    return Answer(
        value={
            "report": str(html),
            "holds": not findings,
            **{key: value for key, value in asdict(found).items() if key != "findings"},
            "findings": [asdict(finding) for finding in findings],
        },
        opening=opening,
        header=("where", "the report says", "recomputed") if findings else (),
        rows=tuple(
            (_short(one.where), _short(one.shown), _short(one.expected))
            for one in findings[:MAX_FINDINGS]
        ),
        num_text_columns=3,
        closing=closing,
    )


def of_export(study: str, *, tables: Sequence[Path], figures: Sequence[Path]) -> Answer:
    """The files that an export has written."""
    lines = [
        f"{len(paths)} files of {word} in {paths[0].parent}"
        for word, paths in (("tables", tables), ("figures", figures))
        if paths
    ]
    return Answer(
        value={
            "study": study,
            "tables": [str(path) for path in tables],
            "figures": [str(path) for path in figures],
        },
        opening=f"{study}: {'; '.join(lines)}",
    )


def of_pair(pair: StudyPair, *, html: Path) -> Answer:
    """Two studies net by net, and where their settings differ."""
    first, second = pair.names
    nets, settings = pair.nets, pair.settings
    rows = tuple(
        (
            row.variant_first,
            _points(row.error_first, "{:.2f}"),
            _points(row.difference_first, "{:+.2f}"),
            row.variant_second,
            _points(row.error_second, "{:.2f}"),
            _points(row.difference_second, "{:+.2f}"),
            _points(row.change, "{:+.2f}")
            + (f" [{row.change_interval}]" if row.change_interval else ""),
            str(row.verdict or ""),
        )
        for row in nets.fillna({"change_interval": "", "verdict": ""}).itertuples()
    )
    lines = [
        f"  {row.setting}: {row.first} in {first}, {row.second} in {second}"
        for row in settings.itertuples()
    ]
    differ = "\n".join(["settings that differ:", *lines]) if lines else ""
    return Answer(
        value={
            "studies": list(pair.names),
            "verdict": pair.verdict,
            "page": str(html),
            "nets": answers.rows_of(nets),
            "settings": answers.rows_of(settings),
            "rank_correlation": asdict(pair.agreement) if pair.agreement else None,
        },
        header=(
            first,
            "error",
            "own diff.",
            second,
            "error",
            "own diff.",
            "change [95 %]",
            "verdict",
        ),
        rows=rows,
        closing="\n".join(
            line
            for line in (pair.verdict, pair.ranking, differ, f"page: {html}")
            if line
        ),
    )


def _points(value: float | None, form: str) -> str:
    return "" if value is None or value != value else form.format(value)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."
