"""The paper's claims: their numbers, their nets, and verdicts where truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic

from resnext_ablate.architecture.complexity import complexity
from resnext_ablate.architecture.matching import match
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec
from resnext_ablate.compute import form_check
from resnext_ablate.evidence import claim_nets, claims, claims_report
from resnext_ablate.evidence.claims import CLAIMS, Evidence, claim_of
from resnext_ablate.evidence.contrasts import Contrast
from resnext_ablate.records import checks, paper
from resnext_ablate.records.config import StudyConfig, load_study
from resnext_ablate.records.tables import StudyTables

STUDIES = Path(__file__).parents[1] / "studies"
PROFILES = ("laptop", "gpu", "paper")
TRAINED = sorted({study for claim in CLAIMS if claim.trains for study in claim.studies})


def specs_of(config: StudyConfig) -> list[ResNeXtSpec]:
    """The nets of a study; those matched by measuring are stood in for."""
    if config.net.variants:
        return list(config.net.variant_specs())
    assert config.data.image_size is not None
    is_measured = config.net.is_matched_by_measuring
    found = match(
        config.net.template_spec(),
        cardinalities=config.net.cardinality,
        hold="macs" if is_measured else config.net.hold,
        widths="doubling" if is_measured else config.net.widths,
        tolerance_pct=20.0 if is_measured else config.net.tolerance_pct,
        image_size=config.data.image_size,
    )
    return [one.spec for one in found]


@cache
def nets_of(study: str, profile: str = "laptop") -> pd.DataFrame:
    config = load_study(STUDIES / f"{study}.toml", profile=profile)
    rows = []
    for spec in specs_of(config):
        cost = complexity(spec, config.data.image_size or 32)
        rows.append(
            {
                "variant": spec.name,
                "name": spec.name,
                "cardinality": spec.cardinalities[0],
                "base_width": spec.base_width,
                "depth": spec.depth,
                "macs": cost.macs,
                "params": cost.params,
            }
        )
    return pd.DataFrame(rows)


def made_up(
    study: str,
    truth: Mapping[str, float],
    *,
    num_seeds: int = 5,
    sd: float = 0.2,
    seed: int = 0,
) -> StudyTables:
    """A study of a laptop profile whose nets have these true errors."""
    rng = np.random.default_rng(seed)
    nets = nets_of(study)
    rows = [
        {
            "variant": variant,
            "seed": number,
            "state": "complete",
            "test_error_pct": truth[variant] + sd * rng.standard_normal(),
            "train_error_pct": 2 * truth[variant] + sd * rng.standard_normal(),
        }
        for variant in nets["variant"]
        for number in range(num_seeds)
    ]
    base = synthetic.study(num_variants=1, num_seeds=1, num_epochs=1)
    return replace(base, study=study, nets=nets, runs=pd.DataFrame(rows))


def truth_of(
    study: str,
    contrasts_of: Callable[[pd.DataFrame], tuple[Contrast, ...]],
    *,
    direction: int,
) -> dict[str, float]:
    """Errors that put every contrast of a claim 3 points to its side, or opposite.

    The least-norm solution of the contrasts' equations.
    """
    nets = nets_of(study)
    variants = list(nets["variant"])
    contrasts = contrasts_of(nets)
    matrix = np.array([[c.weights.get(v, 0.0) for v in variants] for c in contrasts])
    sides = np.array([3.0 * direction * c.sign for c in contrasts])
    errors = np.linalg.lstsq(matrix, sides, rcond=None)[0]
    return dict(zip(variants, 30 + errors, strict=True))


CASES = [
    ("S1", "table3_cardinality_vs_width", claim_nets.cardinality_at_equal_cost),
    ("S2", "table4_double_complexity", claim_nets.ways_to_double),
    ("S4", "fig7_model_size", claim_nets.curves_of_size),
    ("S5", "fig5_training_curves", claim_nets.cardinality_at_equal_cost),
    ("S7", "table4_double_complexity", claim_nets.once_against_twice),
    ("T1", "step_time_matched", claim_nets.cardinality_at_equal_cost),
]


@pytest.mark.parametrize(("key", "study", "contrasts_of"), CASES)
@pytest.mark.parametrize(
    ("direction", "verdict"), [(1, "consistent"), (-1, "contradicted")]
)
def test_verdict_is_that_of_the_truth(
    key: str,
    study: str,
    contrasts_of: Callable[[pd.DataFrame], tuple[Contrast, ...]],
    direction: int,
    verdict: str,
) -> None:
    """Large true effects are found, on the side of zero where they lie."""
    tables = made_up(study, truth_of(study, contrasts_of, direction=direction))
    judged = claim_of(key).judge(Evidence({study: tables}, {}))
    assert {one.verdict for one in judged.findings} == {verdict}
    assert judged.verdict == verdict
    for one in judged.findings:
        assert one.low <= one.ours <= one.high
        assert one.num_runs == 5


def test_residual_claim_needs_all_four_of_its_parts() -> None:
    """Both lose, ResNeXt loses less and stays ahead; one part the other way refutes."""
    a, b, c, d = nets_of("residual")["variant"]
    told = {a: 30.0, b: 37.3, c: 28.3, d: 32.2}  # as in the paper
    judged = claim_of("S3").judge(Evidence({"residual": made_up("residual", told)}, {}))
    assert judged.verdict == "consistent"
    assert [round(one.paper, 1) for one in judged.findings] == [7.3, 3.9, -3.4, -5.1]
    assert [round(one.ours) for one in judged.findings] == [7, 4, -3, -5]
    told[d] = 40.0  # ResNeXt loses more
    judged = claim_of("S3").judge(Evidence({"residual": made_up("residual", told)}, {}))
    assert [one.verdict for one in judged.findings] == [
        "consistent",
        "consistent",
        "contradicted",
        "contradicted",
    ]
    assert judged.verdict == "contradicted"


@pytest.mark.parametrize("study", sorted({case[1] for case in CASES} | {"residual"}))
def test_equal_nets_are_seldom_called_anything(study: str) -> None:
    """Where all nets are equal, a claim is decided in about 5 % of studies, not more.

    Of 60 studies a rate of 5 % would decide more than 9 in 1 of 500.
    """
    truth = dict.fromkeys(nets_of(study)["variant"], 30.0)
    asked = [claim for claim in CLAIMS if claim.trains and claim.studies == (study,)]
    tables = [made_up(study, truth, seed=seed) for seed in range(60)]
    for claim in asked:
        verdicts = [claim.judge(Evidence({study: one}, {})).verdict for one in tables]
        assert sum(verdict != "undecided" for verdict in verdicts) <= 9


def test_undecided_tells_how_many_seeds_would_decide() -> None:
    """An effect of one spread with 5 seeds is open; some 18 seeds would show it."""
    study = "table3_cardinality_vs_width"
    truth = truth_of(study, claim_nets.cardinality_at_equal_cost, direction=1)
    tables = made_up(study, truth, sd=3.0, seed=3)
    (finding,) = claim_of("S1").judge(Evidence({study: tables}, {})).findings
    assert finding.verdict == "undecided"
    assert 5 < finding.seeds_to_decide < 100


@pytest.mark.parametrize(
    ("rows", "contrasts_of", "numbers"),
    [
        (["table3/ResNet-50"], claim_nets.cardinality_at_equal_cost, [-1.7]),
        (["table3/ResNet-101"], claim_nets.cardinality_at_equal_cost, [-0.8]),
        (["table4/ResNet-101"], claim_nets.ways_to_double, [-0.9, -0.4]),
        (["table4/ResNet-101"], claim_nets.once_against_twice, [-0.5, -0.1]),
        (["fig5/ResNet-50 training"], claim_nets.cardinality_at_equal_cost, [-5.24]),
    ],
)
def test_the_papers_numbers_are_read_by_the_same_function(
    rows: list[str],
    contrasts_of: Callable[[pd.DataFrame], tuple[Contrast, ...]],
    numbers: list[float],
) -> None:
    """What is said of the paper is a difference of its printed errors."""
    found = claims._of_paper(tuple(rows), contrasts_of=contrasts_of)
    assert found == pytest.approx(numbers)


def test_gap_between_curves_is_exact_for_straight_ones() -> None:
    """Two straight curves a fixed gap apart give that gap, whatever their nets."""
    nets = nets_of("fig7_model_size")
    (contrast,) = claim_nets.curves_of_size(nets)
    falls = -2.5 * np.log(nets["params"].to_numpy(float))
    means = dict(
        zip(nets["variant"], falls - 0.7 * (nets["cardinality"] > 1), strict=True)
    )
    assert contrast.of_means(means) == pytest.approx(-0.7)
    assert sum(contrast.weights.values()) == pytest.approx(0)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.trains], ids=lambda c: c.key)
def test_every_profile_has_the_nets_of_its_claims(
    claim: claims.Claim, profile: str
) -> None:
    """A claim finds its nets in each of its studies at each budget."""
    if claim.key == "R1":
        short, long = (nets_of(study, profile) for study in claim.studies)
        assert list(short["name"]) == list(long["name"])
        return
    functions = {key: of for key, _, of in CASES}
    contrasts_of = functions.get(claim.key, claim_nets.shortcuts_removed)
    for contrast in contrasts_of(nets_of(claim.studies[0], profile)):
        assert sum(contrast.weights.values()) == pytest.approx(0)


def test_study_without_the_nets_of_its_claim_is_refused() -> None:
    """A changed list of nets is named, not guessed at."""
    nets = nets_of("table4_double_complexity")
    with pytest.raises(InputError, match="needs one net that is deeper"):
        claim_nets.ways_to_double(nets[nets["depth"] == nets["depth"].min()])


def ranked(errors: list[float], *, sd: float, seed: int) -> StudyTables:
    variants = list(nets_of("short_vs_long")["variant"])
    truth = dict(zip(variants, errors, strict=True))
    return made_up("short_vs_long", truth, sd=sd, seed=seed)


def test_short_runs_rank_as_long_ones_or_do_not() -> None:
    """Equal orders are consistent, opposed ones are not, and noise leaves it open."""
    order = [40.0, 38.0, 36.0, 34.0, 32.0]
    judge = claim_of("R1").judge

    def verdict(short: list[float], sd: float) -> str:
        studies = {
            claims.SHORT: ranked(short, sd=sd, seed=1),
            claims.TABLE3: ranked(order, sd=sd, seed=2),
        }
        return judge(Evidence(studies, {})).verdict

    assert verdict([60, 58, 56, 54, 52], 0.2) == "consistent"
    assert verdict([52, 54, 56, 58, 60], 0.2) == "contradicted"
    assert verdict([60, 60, 60, 60, 60], 9.0) == "undecided"


def test_every_count_of_tables_1_and_2_holds() -> None:
    """All counts are exact; all that is printed lies within 1 % or rounds to print."""
    found = checks.count_checks(["table1", "table2"])
    assert len(found) == len(paper.load_counts()) == 68
    assert all(one.holds and one.ours == one.expected for one in found)
    printed = [one for one in found if not math.isnan(one.printed)]
    beyond = {(one.name, one.part) for one in printed if abs(one.printed_off_pct) > 1}
    assert len(printed) == 19
    # The paper prints about 70 k and 0.22 G for every block of Table 2.
    assert beyond == {("resnext50-8x14d", "block")}


def test_wrong_count_contradicts() -> None:
    """One count that is off by one is enough."""
    found = list(checks.count_checks(["table1"]))
    right = claim_of("C1").judge(Evidence({}, {claims.COUNTS: tuple(found)}))
    assert right.verdict == "consistent"
    found[3] = replace(found[3], ours=found[3].ours + 1, holds=False)
    wrong = claim_of("C1").judge(Evidence({}, {claims.COUNTS: tuple(found)}))
    assert wrong.verdict == "contradicted"


def test_forms_are_held_to_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted nets agree; a conversion that loses a weight is seen."""
    found = form_check.form_checks(["resnext11-4x3d-t8"])
    assert all(one.holds for one in found)
    assert {one.part for one in found} == {"form a", "form b"}

    convert = form_check.convert_form

    def lossy(model: form_check.ResNeXt, *, form: str) -> form_check.ResNeXt:
        changed = convert(model, form=form)  # type: ignore[arg-type]
        if form == "a":
            changed.fc.bias.data[0] += 1e-6
        return changed

    monkeypatch.setattr(form_check, "convert_form", lossy)
    found = form_check.form_checks(["resnext11-4x3d-t8"])
    assert {one.part for one in found if not one.holds} == {"form a"}


def test_checks_survive_their_file(tmp_path: Path) -> None:
    """What is read back is what was computed."""
    config = checks.load_check(STUDIES / "table1_table2_complexity.toml")
    assert config is not None
    found = checks.count_checks(config.check.counts)
    folder = checks.write_checks(config, found, results=tmp_path)
    assert pd.DataFrame(checks.read_checks(folder)).equals(pd.DataFrame(found))


def test_mistakes_in_a_check_are_named(tmp_path: Path) -> None:
    """Line, key and rule, as for studies."""
    path = tmp_path / "study.toml"
    path.write_text(
        'name = "x"\nquestion = "?"\nkind = "check"\n[check]\ncounts = ["table9"]\n'
        "form = 3\n"
    )
    with pytest.raises(InputError) as caught:
        checks.load_check(path)
    message = str(caught.value)
    assert "study.toml:5: check.counts: must be 'table1' or 'table2'" in message
    assert (
        "study.toml:6: unknown key 'form' in [check] (did you mean 'forms'" in message
    )


def test_unknown_claims_name_the_known() -> None:
    """A key that no claim has, and one that no study asks."""
    with pytest.raises(InputError, match="no claim 'S9'; there are S1, S2"):
        claim_of("S9")
    with pytest.raises(InputError, match="S6 is not tested here"):
        claim_of("S6")


def test_table_names_what_is_not_there() -> None:
    """Claims without results are rows without numbers, and counted as such."""
    study = "residual"
    a, b, c, d = nets_of(study)["variant"]
    tables = made_up(study, {a: 30.0, b: 37.3, c: 28.3, d: 32.2})
    evidence = Evidence({study: tables}, {})
    table = claims_report.claims_table(evidence)
    assert list(dict.fromkeys(table["claim"])) == [claim.key for claim in CLAIMS]
    assert claims_report.headline(table) == (
        "Of 10 claims, 1 come out as the paper says, 9 have no results yet."
    )
    shown = claims_report.shown_table(table, profile="laptop").frame
    rows = shown[shown["claim"] == "S3"]
    assert list(rows["statement_text"])[1:] == ["", "", ""]
    assert rows["statement_text"].iloc[0].endswith("ahead: consistent")
    assert list(rows["paper_text"]) == ["+7.30", "+3.90", "-3.40", "-5.10"]
    (drawn,) = claims_report.figures(table)
    assert "4 of 4 differences have the paper's sign; 4 are shown to" in drawn.title
