"""What the commands about claims and checks answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from resnext_ablate.face import answers
from resnext_ablate.face.answers import Answer

if TYPE_CHECKING:
    import pandas as pd

    from resnext_ablate.evidence.claims import Claim
    from resnext_ablate.evidence.page import Table
    from resnext_ablate.records.checks import Check


def of_checks(study: str, found: Sequence[Check]) -> Answer:
    """Every number that was checked."""
    from resnext_ablate.records import checks

    values = [{key: _plain(v) for key, v in asdict(one).items()} for one in found]
    return Answer(
        value={"study": study, "summary": checks.summary(found), "checks": values},
        header=("net", "part", "count", "ours", "expected", "print", "off print", ""),
        rows=tuple(
            (
                one.name,
                one.part,
                one.count,
                _number(one.ours),
                _number(one.expected),
                "" if math.isnan(one.printed) else f"{one.printed:,.0f}",
                "" if math.isnan(one.printed) else f"{one.printed_off_pct:+.2f} %",
                "" if one.holds else "DIFFERS",
            )
            for one in found
        ),
        num_text_columns=3,
        closing=f"{study}: {checks.summary(found)}",
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.1g}"


def _plain(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value


def of_list(
    claims: Sequence[Claim],
    *,
    not_tested: Mapping[str, str],
    found: Mapping[str, Mapping[str, str]],
) -> Answer:
    """The claims, and what results there are of each.

    Args:
        claims: in their order.
        not_tested: statements that no study asks, by key.
        found: by claim and profile, how far the results are.
    """
    rows = [
        (
            claim.key,
            claim.statement,
            ", ".join(claim.studies),
            "; ".join(f"{p} {text}".strip() for p, text in found[claim.key].items()),
        )
        for claim in claims
    ]
    rows += [(key, text, "", "not tested here") for key, text in not_tested.items()]
    return Answer(
        value=[
            {
                "claim": key,
                "statement": statement,
                "paper": next((c.numbers for c in claims if c.key == key), None),
                "studies": [one for one in studies.split(", ") if one],
                "results": dict(found.get(key, {})),
            }
            for key, statement, studies, _ in rows
        ],
        header=("claim", "statement", "studies", "results"),
        rows=tuple(rows),
        num_text_columns=4,
        closing="resnext-ablate reproduce CLAIM... --profile NAME runs what is missing",
    )


def of_claims(
    table: pd.DataFrame, *, shown: Table, keys: Sequence[str], folder: Path
) -> Answer:
    """Claims with their verdicts; the files hold those of all."""
    asked = table["claim"].isin(keys)
    rows = table[asked]
    text = shown.frame[asked]
    verdicts = rows.drop_duplicates("claim").set_index("claim")["claim_verdict"]
    statements = rows.drop_duplicates("claim").set_index("claim")["statement"]
    lines = [f"{key} {verdicts[key]}: {statements[key]}" for key in verdicts.index]
    lines += [f"{row.claim}: {row.detail}" for row in rows.itertuples() if row.detail]
    return Answer(
        value={
            "claims": answers.rows_of(rows),
            "verdicts": verdicts.to_dict(),
            "folder": str(folder),
        },
        header=("claim", "number", "paper", "here, 95 % interval", "runs", "verdict"),
        rows=tuple(
            (
                row.claim,
                row.label,
                row.paper_text,
                row.ours_text,
                row.runs_text,
                row.verdict_text,
            )
            for row in text.itertuples()
        ),
        num_text_columns=2,
        closing="\n".join([*lines, f"{folder / 'claims.html'}"]),
    )
