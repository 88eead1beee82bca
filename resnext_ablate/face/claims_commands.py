"""The command that holds the paper's claims to results, and makes those it lacks.

Imports that cost time stand inside the verb that needs them, so that `--help` is quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.face import results_commands, study_commands, terminal
from resnext_ablate.face.options import AsJson, Results

if TYPE_CHECKING:
    from resnext_ablate.evidence.claims import Claim
    from resnext_ablate.records.config import StudyConfig

_PROFILES = ("laptop", "gpu", "paper")


def reproduce(
    claims: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CLAIM]... [KEY=VALUE]...",
            help="Claims such as S1, or all, and overrides of their studies; none: "
            "lists them.",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[
        str, typer.Option(metavar="NAME", help="Budget: laptop, gpu or paper.")
    ] = "laptop",
    studies: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the study files.")
    ] = Path("studies"),
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run failed runs again.")
    ] = False,
    png: Annotated[
        bool, typer.Option("--png", help="The chart as PNG, SVG and PDF too.")
    ] = False,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Holds claims of the paper to results, and runs what is missing for them.

    Leaves a table of all claims in the results folder, as claims-PROFILE.
    """
    from resnext_ablate.evidence import claims as known

    given = claims or []
    keys = list(dict.fromkeys(one for one in given if "=" not in one))
    if keys == ["all"]:
        keys = [claim.key for claim in known.CLAIMS]
    overrides = [one for one in given if "=" in one]
    if not keys:
        if overrides or png:
            raise InputError("name the claims that are to be reproduced, as in S1.")
        _list(results, as_json=as_json)
        return
    asked = [known.claim_of(key) for key in keys]
    _refuse_names(overrides)
    num_failed = _make_results(
        asked,
        profile=profile,
        overrides=overrides,
        studies=studies,
        results=results,
        retry_failed=retry_failed,
    )
    _answer(keys, profile=profile, results=results, png=png, as_json=as_json)
    if num_failed:
        raise typer.Exit(3)


def _refuse_names(overrides: Sequence[str]) -> None:
    for one in overrides:
        if one.partition("=")[0].strip() == "name":
            raise InputError(
                "override name: a claim finds its study's results by file and profile; "
                "--results DIR keeps others apart."
            )


def _list(results: Path, *, as_json: bool) -> None:
    """Prints the claims and how far the results of each are."""
    from resnext_ablate.evidence import claims as known
    from resnext_ablate.face import claims_answers

    found: dict[str, dict[str, str]] = {}
    for claim in known.CLAIMS:
        if not claim.trains:
            done = all((results / study).is_dir() for study in claim.studies)
            found[claim.key] = {"": "computed"} if done else {}
            continue
        found[claim.key] = {
            profile: text
            for profile in _PROFILES
            if (text := _how_far(claim, profile=profile, results=results))
        }
    answer = claims_answers.of_list(
        known.CLAIMS, not_tested=known.NOT_TESTED, found=found
    )
    terminal.print_answer(answer, as_json=as_json)


def _how_far(claim: Claim, *, profile: str, results: Path) -> str:
    """Such as "12 of 25 runs"; empty where there are no results."""
    from resnext_ablate.evidence import claims_report
    from resnext_ablate.records import records

    texts = {}
    for study in claim.studies:
        folder = results / claims_report.study_name(study, profile=profile)
        if (folder / records.PLAN_FILE).exists():
            plan = records.read_plan(folder)
            runs = records.read_runs(folder, plan)
            done = sum(run.state == "complete" for run in runs)
            texts[study] = f"{done} of {len(plan.cells)} runs"
    if not texts:
        return ""
    return ", ".join(texts.get(study, "no runs") for study in claim.studies)


def _make_results(
    asked: Sequence[Claim],
    *,
    profile: str,
    overrides: Sequence[str],
    studies: Path,
    results: Path,
    retry_failed: bool,
) -> int:
    """Runs what is missing, each study once.

    Returns:
        How many runs failed.
    """
    from resnext_ablate.records.checks import load_check, read_checks
    from resnext_ablate.records.config import load_study

    num_failed = 0
    for study in dict.fromkeys(study for claim in asked for study in claim.studies):
        path = _study_file(studies, study)
        check = load_check(path)
        if check is not None:
            if not read_checks(results / check.name):
                study_commands.compute_checks(check, results=results)
            continue
        config = load_study(path, overrides=overrides, profile=profile)
        if not retry_failed and _is_complete(config, results, overrides=overrides):
            terminal.talk(f"study {config.name}: all runs are there")
            continue
        outcome = study_commands.run_config(
            config, results=results, retry_failed=retry_failed
        )
        results_commands.write_report(outcome.folder)
        num_failed += outcome.num_failed
    return num_failed


def _study_file(studies: Path, study: str) -> Path:
    path = studies / f"{study}.toml"
    if path.exists():
        return path
    raise InputError(
        f"study file {path}: is not there; the claims are asked by the files in the "
        "repository's studies/, which --studies DIR names."
    )


def _is_complete(
    config: StudyConfig, results: Path, *, overrides: Sequence[str]
) -> bool:
    """Whether the results hold every run of this study, of whatever copy of its images.

    Then nothing is prepared, and neither images nor torch are needed.
    """
    from resnext_ablate.records import records, study_file
    from resnext_ablate.records.config import differences, load_study

    folder = results / config.name
    if config.run.seeds == "adaptive" or not (folder / records.PLAN_FILE).exists():
        return False
    earlier = load_study(folder / records.STUDY_FILE)
    values = dict(study_file.flat(config.model_dump(mode="json")))
    free = ["question", "report", "data.root", *_of_runs(config)]
    free += [key for key, value in values.items() if value == "auto"]
    if not any(one.startswith("data.name=") for one in overrides):
        free.append("data.name")
    if differences(earlier, config, may_change=free):
        return False
    plan = records.read_plan(folder)
    done = {run.cell for run in records.read_runs(folder, plan)}
    return all(cell.id in done for cell in plan.cells)


def _of_runs(config: StudyConfig) -> list[str]:
    """Keys of the `[run]` part that touch no number."""
    return [f"run.{key}" for key in type(config.run).model_fields if key != "seeds"]


def _answer(
    keys: Sequence[str], *, profile: str, results: Path, png: bool, as_json: bool
) -> None:
    """Writes the table of all claims and prints those asked for."""
    from resnext_ablate.evidence import claims_report, export
    from resnext_ablate.face import claims_answers

    evidence = claims_report.read_evidence(results, profile=profile)
    table = claims_report.claims_table(evidence)
    folder = claims_report.write_claims(
        table, evidence=evidence, profile=profile, results=results
    )
    answer = claims_answers.of_claims(
        table,
        shown=claims_report.shown_table(table, profile=profile),
        keys=keys,
        folder=folder,
    )
    terminal.print_answer(answer, as_json=as_json)
    figures = claims_report.figures(table)
    if png and figures:
        export.write_figures(figures, folder=folder)
    elif png:
        terminal.talk("there is no chart yet: no claim about errors has results")
