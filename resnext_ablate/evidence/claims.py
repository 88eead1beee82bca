"""The paper's trade-offs as claims, and what results say of each.

A claim is a statement of the ResNeXt paper (arXiv:1611.05431v2) with the study that
asks it. Most are contrasts of mean errors over nets that `claim_nets` finds. Absolute
errors depend on images, nets and epochs; what is compared is on which side of zero a
difference lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pandas as pd

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.evidence import claim_nets, contrasts, ranks
from resnext_ablate.evidence.contrasts import Contrast, Verdict
from resnext_ablate.records import checks, paper
from resnext_ablate.records.tables import StudyTables

Measure = Literal["test_error_pct", "train_error_pct"]
Unit = Literal["points", "tau", "share"]

TABLE3 = "table3_cardinality_vs_width"
SHORT = "short_vs_long"
COUNTS = "table1_table2_complexity"
FORMS = "fig3_block_forms"


@dataclass(frozen=True)
class Finding:
    """One number of a claim beside the paper's; NaN where it is not known."""

    label: str
    paper: float
    ours: float
    low: float
    high: float
    """Bounds of the interval that holds for the whole claim at 95 %."""
    unit: Unit
    num_runs: int
    """Of the net that has the fewest; 0 where nothing is trained."""
    seeds_to_decide: float
    verdict: Verdict
    detail: str


@dataclass(frozen=True)
class Judged:
    """What results say of a claim."""

    findings: tuple[Finding, ...]
    verdict: Verdict


@dataclass(frozen=True)
class Evidence:
    """What the results of one profile hold."""

    studies: Mapping[str, StudyTables]
    """By the name of the study file."""
    checks: Mapping[str, tuple[checks.Check, ...]]


@dataclass(frozen=True)
class Claim:
    """A statement, the paper's numbers for it, and the studies that ask it."""

    key: str
    statement: str
    numbers: str
    """The paper's, and where they stand."""
    studies: tuple[str, ...]
    judge: Callable[[Evidence], Judged]
    trains: bool = True


def _by_contrasts(
    evidence: Evidence,
    *,
    study: str,
    rows: tuple[str, ...],
    contrasts_of: Callable[[pd.DataFrame], tuple[Contrast, ...]],
    measure: Measure = "test_error_pct",
) -> Judged:
    """A claim about differences of mean errors.

    Args:
        rows: keys of the paper's rows that give its numbers.
    """
    tables = evidence.studies[study]
    ours = contrasts_of(tables.nets)
    theirs = _of_paper(rows, contrasts_of=contrasts_of)
    found = contrasts.estimate(_errors(tables, measure), contrasts=ours)
    findings = tuple(
        Finding(
            label=contrast.label,
            paper=number,
            ours=one.points,
            low=one.low,
            high=one.high,
            unit="points",
            num_runs=one.num_runs,
            seeds_to_decide=one.seeds_to_decide,
            verdict=one.verdict,
            detail="runs are paired by seed" if one.is_paired else "",
        )
        for contrast, number, one in zip(ours, theirs, found, strict=True)
    )
    return Judged(findings, contrasts.verdict_of([one.verdict for one in findings]))


def _of_paper(
    rows: tuple[str, ...],
    *,
    contrasts_of: Callable[[pd.DataFrame], tuple[Contrast, ...]],
) -> list[float]:
    """The same contrasts of the paper's numbers."""
    nets = pd.concat(map(paper.load_paper, rows)).drop_duplicates("name")
    nets = nets.assign(variant=nets["name"]).reset_index(drop=True)
    means = dict(zip(nets["name"], nets["top1_error_pct"], strict=True))
    return [contrast.of_means(means) for contrast in contrasts_of(nets)]


def _errors(tables: StudyTables, measure: Measure) -> dict[str, dict[int, float]]:
    """Errors of complete runs by variant and seed."""
    complete = tables.runs[tables.runs["state"] == "complete"]
    return {
        str(variant): dict(zip(runs["seed"].tolist(), runs[measure], strict=True))
        for variant, runs in complete.groupby("variant", observed=True)
    }


def _by_ranks(evidence: Evidence) -> Judged:
    """That a short run ranks the nets as a long one does.

    Consistent where agreement is shown; contradicted where the true orders are shown to
    differ and no agreement is.
    """
    errors = [_errors(evidence.studies[s], "test_error_pct") for s in (SHORT, TABLE3)]
    shared = [variant for variant in errors[0] if variant in errors[1]]
    short, long = ({v: list(one[v].values()) for v in shared} for one in errors)
    found = ranks.agreement(short, long)
    if found is None:
        raise InputError("the claim needs three nets that both studies have run.")
    verdict: Verdict = "undecided"
    if found.low > 0:
        verdict = "consistent"
    elif found.high < 1:
        verdict = "contradicted"
    finding = Finding(
        label="Kendall's tau, short against long runs",
        paper=math.nan,
        ours=found.tau,
        low=found.low,
        high=found.high,
        unit="tau",
        num_runs=min(map(len, (*short.values(), *long.values()))),
        seeds_to_decide=math.nan,
        verdict=verdict,
        detail=f"{found.num_variants} nets; if the true orders were equal, seeds alone "
        f"would let it be {found.ceiling:.2f} on average",
    )
    return Judged((finding,), verdict)


def _by_checks(evidence: Evidence, *, study: str, label: str) -> Judged:
    """That numbers computed here are those of the paper."""
    found = evidence.checks[study]
    share = sum(one.holds for one in found) / len(found)
    verdict: Verdict = "consistent" if share == 1 else "contradicted"
    nan = math.nan
    finding = Finding(
        label=label,
        paper=1.0,
        ours=share,
        low=nan,
        high=nan,
        unit="share",
        num_runs=0,
        seeds_to_decide=nan,
        verdict=verdict,
        detail=checks.summary(found),
    )
    return Judged((finding,), verdict)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "S1",
        "At equal FLOPs error falls as cardinality rises",
        "23.9 to 22.2 % (ResNet-50), 22.0 to 21.2 % (ResNet-101), Table 3",
        (TABLE3,),
        partial(
            _by_contrasts,
            study=TABLE3,
            rows=("table3/ResNet-50",),
            contrasts_of=claim_nets.cardinality_at_equal_cost,
        ),
    ),
    Claim(
        "S2",
        "At twice the FLOPs cardinality beats width, and width beats depth",
        "20.4, 21.3 and 21.7 %, Table 4",
        ("table4_double_complexity",),
        partial(
            _by_contrasts,
            study="table4_double_complexity",
            rows=("table4/ResNet-101",),
            contrasts_of=claim_nets.ways_to_double,
        ),
    ),
    Claim(
        "S3",
        "Without shortcuts both get worse; ResNeXt loses less and stays ahead",
        "23.9 to 31.2 % (ResNet-50), 22.2 to 26.1 % (ResNeXt-50), Sec. 5.1",
        ("residual",),
        partial(
            _by_contrasts,
            study="residual",
            rows=("residual/ResNet-50", "residual/ResNeXt-50"),
            contrasts_of=claim_nets.shortcuts_removed,
        ),
    ),
    Claim(
        "S4",
        "At equal parameters cardinality beats width, on CIFAR-10",
        "4.39 to 3.58 % (up to 16x64d) against 4.39 to 3.73 % (up to 1x384d), Fig. 7",
        ("fig7_model_size",),
        partial(
            _by_contrasts,
            study="fig7_model_size",
            rows=("fig7/ResNeXt-29 width", "fig7/ResNeXt-29 cardinality"),
            contrasts_of=claim_nets.curves_of_size,
        ),
    ),
    Claim(
        "S5",
        "Cardinality lowers the training error too",
        "23.5 to 18.2 % (50 layers), 20.3 to 16.1 % (101 layers), Fig. 5",
        ("fig5_training_curves",),
        partial(
            _by_contrasts,
            study="fig5_training_curves",
            rows=("fig5/ResNet-50 training",),
            contrasts_of=claim_nets.cardinality_at_equal_cost,
            measure="train_error_pct",
        ),
    ),
    Claim(
        "S7",
        "Cardinality at 1x FLOPs beats depth and width at 2x",
        "21.2 % against 21.7 % (ResNet-200) and 21.3 % (1x100d), Table 4",
        ("table4_double_complexity",),
        partial(
            _by_contrasts,
            study="table4_double_complexity",
            rows=("table4/ResNet-101",),
            contrasts_of=claim_nets.once_against_twice,
        ),
    ),
    Claim(
        "T1",
        "At equal step time on this device cardinality still wins",
        "not in the paper, which holds FLOPs; its numbers of S1 stand beside",
        ("step_time_matched",),
        partial(
            _by_contrasts,
            study="step_time_matched",
            rows=("table3/ResNet-50",),
            contrasts_of=claim_nets.cardinality_at_equal_cost,
        ),
    ),
    Claim(
        "R1",
        "A short run ranks the nets as a long one does",
        "not in the paper",
        (TABLE3, SHORT),
        _by_ranks,
    ),
    Claim(
        "F3",
        "The three forms of the block are one function, at equal complexity",
        "Fig. 3",
        (FORMS,),
        partial(_by_checks, study=FORMS, label="outputs, macs and parameters agree"),
        trains=False,
    ),
    Claim(
        "C1",
        "The counts of Tables 1 and 2 are those of the nets",
        "25.5 M and 4.1 G, 25.0 M and 4.2 G; about 70 k and 0.22 G a block",
        (COUNTS,),
        partial(
            _by_checks, study=COUNTS, label="counts agree with built nets and print"
        ),
        trains=False,
    ),
)
NOT_TESTED = {
    "S6": "More data and more classes widen the gap (ImageNet-5K, Table 6): no study "
    "here asks it."
}


def claim_of(key: str) -> Claim:
    """The claim of a key such as "S1".

    Raises:
        InputError: there is none, or no study asks it.
    """
    if key in NOT_TESTED:
        raise InputError(f"claim {key} is not tested here: {NOT_TESTED[key]}")
    for claim in CLAIMS:
        if claim.key == key:
            return claim
    known = ", ".join(claim.key for claim in CLAIMS)
    raise InputError(f"there is no claim {key!r}; there are {known}.")
