"""From a study's tables to its verdicts: two tables and one HTML file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from resnext_ablate.evidence import (
    charts,
    embedding,
    findings,
    gallery,
    image_tests,
    report_page,
    search_report,
)
from resnext_ablate.evidence.report_page import Evidence
from resnext_ablate.numbers import looks, stats, verdicts
from resnext_ablate.records import paper
from resnext_ablate.records.config import NetConfig
from resnext_ablate.records.tables import StudyTables, write_table

_MEASURES = (
    "val_error_pct",
    "train_error_pct",
    "train_time_s",
    "images_per_s",
    "time_per_image_ms",
    "roofline_pct",
    "peak_memory_mib",
)
_COMPARISON_COLUMNS = {
    "variant": "variant",
    "reference": "reference",
    "num_variant": "n_variant",
    "num_reference": "n_reference",
    "difference": "difference_pct",
    "low": "ci_low",
    "high": "ci_high",
    "p_value": "p_value",
    "p_corrected": "p_corrected",
    "correction": "correction",
    "p_equivalent": "p_equivalent",
    "margin": "margin_pct",
    "detectable": "detectable_pct",
    "seeds_to_decide": "seeds_to_decide",
    "minutes_to_decide": "minutes_to_decide",
    "verdict": "verdict",
    "num_looks": "looks",
    "p_images": "p_images",
    "low_images": "ci_low_images",
    "high_images": "ci_high_images",
    "explanation": "explanation",
}


_IMAGE_COLUMNS = (
    "variant",
    "reference",
    "seed",
    "only_variant_right",
    "only_reference_right",
    "p_value",
)


@dataclass(frozen=True)
class ReportFiles:
    """What a report found and where it lies."""

    evidence: Evidence
    html: Path


def write_report(tables: StudyTables, *, folder: Path) -> ReportFiles:
    """Writes the tables of a study, as CSV and Parquet, and `report.html`.

    Args:
        tables: a study, also one that is not complete.
        folder: where the files go; made if it is not there.

    Raises:
        InputError: `report.paper` names no rows of the paper.
    """
    kept = embedding.reduced(tables)
    evidence = evidence_of(kept)
    frames = {
        "variants": evidence.variants,
        "comparisons": evidence.comparisons,
        "images": evidence.images,
        "effects": evidence.effects,
    }
    if len(kept.correct) != len(tables.correct):
        # A large study's page holds less than its tables rest on.
        whole = _compared(tables)
        frames |= {"comparisons": whole.comparisons, "images": whole.images}
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        write_table(frame, folder / name, provenance=tables.provenance)
    html = folder / "report.html"
    temporary = html.with_name(f".{html.name}")
    temporary.write_text(report_page.render(kept, evidence), encoding="utf-8")
    temporary.replace(html)
    evidence = dataclasses.replace(
        evidence, comparisons=frames["comparisons"], images=frames["images"]
    )
    return ReportFiles(evidence, html)


@dataclass(frozen=True)
class _Compared:
    """What the comparisons of a study came to."""

    verdict: str
    comparisons: pd.DataFrame
    images: pd.DataFrame


def _compared(tables: StudyTables) -> _Compared:
    complete = _complete(tables)
    standing = _standing(tables, complete)
    found = standing.comparisons if standing else _compare(tables, complete)
    by_image = image_tests.compare_images(found, correct=tables.correct)
    return _Compared(
        verdict=_verdict(tables, complete, found, standing=standing),
        comparisons=comparisons_table(found, by_image),
        images=images_table(by_image),
    )


def _complete(tables: StudyTables) -> pd.DataFrame:
    return tables.runs[tables.runs["state"] == "complete"]


def evidence_of(tables: StudyTables) -> Evidence:
    """All that a report says of a study: verdict, tables and charts.

    Raises:
        InputError: `report.paper` names no rows of the paper.
    """
    complete = _complete(tables)
    variants = variants_table(tables.nets, complete)
    compared = _compared(tables)
    comparisons, images = compared.comparisons, compared.images
    rows = paper.matched_rows(tables.nets, key=tables.config.report.paper)
    epochs = epochs_of(tables.epochs, complete)
    equal_pct = tables.config.net.tolerance_pct
    effects = findings.effects_table(
        errors_by_seed(tables.nets, complete),
        variants=variants,
        epochs=epochs,
        paper=rows,
        is_matched=_differ_in_cardinality(variants, equal_pct=equal_pct),
    )
    to_reference = comparisons["reference"] == _reference(tables.nets)
    against = comparisons[to_reference].reset_index(drop=True)
    return Evidence(
        verdict=compared.verdict,
        variants=variants,
        comparisons=comparisons,
        against=against,
        images=images,
        effects=effects,
        figures=(
            *gallery.draw(
                tables.runs,
                epochs,
                variants=variants,
                comparisons=against,
                paper=rows,
                equal_pct=equal_pct,
            ),
            *_search_figures(tables),
        ),
        findings=(
            *search_report.of_search(tables.search),
            *findings.of_pairs(comparisons[~to_reference]),
            *findings.of_effects(effects),
            *findings.of_images(images, against),
        ),
    )


def _search_figures(tables: StudyTables) -> tuple[gallery.Figure, ...]:
    if tables.search is None or tables.config.search is None:
        return ()
    how = tables.config.search
    return gallery.draw_search(
        tables.search.trials,
        tables.search.importance,
        sampler=how.sampler,
        pruner=how.pruner,
    )


def _differ_in_cardinality(variants: pd.DataFrame, *, equal_pct: float) -> bool:
    """Whether nothing but cardinality and width varies, at equal FLOPs."""
    held = charts.off_pct(variants, "macs") <= equal_pct
    shape = variants[["depth", "template_width"]].drop_duplicates()
    return held and len(shape) == 1


def variants_table(nets: pd.DataFrame, complete: pd.DataFrame) -> pd.DataFrame:
    """The nets with what their complete runs measured.

    Args:
        nets: one row per variant.
        complete: the runs that count.
    """
    errors = errors_by_seed(nets, complete)
    summaries = [
        stats.summarize(list(errors[variant].values())) for variant in nets["variant"]
    ]
    table = nets.reset_index(drop=True).assign(
        n=[summary.num_runs for summary in summaries],
        test_error_pct_mean=[summary.mean for summary in summaries],
        test_error_pct_sd=[summary.sd for summary in summaries],
        test_error_pct_ci_low=[summary.low for summary in summaries],
        test_error_pct_ci_high=[summary.high for summary in summaries],
    )
    timed = complete.assign(time_per_image_ms=1000.0 / complete["images_per_s"])
    # Runs of earlier releases do not know all of them.
    known = [measure for measure in _MEASURES if measure in timed]
    means = timed.groupby("variant", observed=True)[known].mean()
    means = means.reindex(table["variant"]).add_suffix("_mean").reset_index(drop=True)
    return pd.concat([table, means], axis=1)


def epochs_of(epochs: pd.DataFrame, complete: pd.DataFrame) -> pd.DataFrame:
    """The epochs of complete runs."""
    return epochs.merge(complete[["variant", "seed"]], on=["variant", "seed"])


def errors_by_seed(
    nets: pd.DataFrame, complete: pd.DataFrame
) -> dict[str, dict[int, float]]:
    """Test errors by variant, then by seed."""
    return _by_seed(nets, complete.dropna(subset="test_error_pct"))


def _by_seed(nets: pd.DataFrame, runs: pd.DataFrame) -> dict[str, dict[int, float]]:
    errors: dict[str, dict[int, float]] = {variant: {} for variant in nets["variant"]}
    columns = (runs[key].tolist() for key in ("variant", "seed", "test_error_pct"))
    for variant, seed, error in zip(*columns, strict=True):
        errors[variant][seed] = error
    return errors


def _run_minutes(tables: StudyTables, complete: pd.DataFrame) -> dict[str, float]:
    """What one more run of each variant adds to the time of the study."""
    executors = tables.config.run.executors
    if not isinstance(executors, int):
        return {}
    seconds = complete.groupby("variant", observed=True)["train_time_s"].mean()
    return dict((seconds / 60 / executors).items())


def _reference(nets: pd.DataFrame) -> str:
    return str(nets.loc[nets["is_reference"], "variant"].iloc[0])


def _compare(
    tables: StudyTables, complete: pd.DataFrame
) -> tuple[verdicts.Comparison, ...]:
    return verdicts.compare(
        errors_by_seed(tables.nets, complete),
        reference=_reference(tables.nets),
        rules=_rules(tables, complete),
    )


def _rules(tables: StudyTables, complete: pd.DataFrame) -> verdicts.Rules:
    how = tables.config.report
    return verdicts.Rules(
        margin=how.equivalence_margin_pct,
        family=how.family,
        pairing=how.pairing,
        run_minutes=_run_minutes(tables, complete),
    )


def _standing(tables: StudyTables, complete: pd.DataFrame) -> looks.Standing | None:
    """Where a study of adaptive seeds stands; None for one of fixed seeds."""
    run = tables.config.run
    if run.seeds != "adaptive" or run.max_seeds is None:
        return None
    ended = tables.runs.assign(
        test_error_pct=tables.runs["test_error_pct"].where(
            tables.runs["state"] == "complete"
        )
    )
    return looks.replay(
        _by_seed(tables.nets, ended),
        reference=_reference(tables.nets),
        rules=_rules(tables, complete),
        max_seeds=run.max_seeds,
    )


def comparisons_table(
    found: Sequence[verdicts.Comparison],
    by_image: Sequence[image_tests.ImageComparison],
) -> pd.DataFrame:
    """One row for each comparison; unknown and uncountable numbers are missing."""
    rows = [
        {
            **dataclasses.asdict(comparison),
            "p_images": images.p_images,
            "low_images": images.low,
            "high_images": images.high,
        }
        for comparison, images in zip(found, by_image, strict=True)
    ]
    table = pd.DataFrame(rows, columns=list(_COMPARISON_COLUMNS))
    need = ["seeds_to_decide", "minutes_to_decide"]
    table[need] = table[need].astype(float).replace(math.inf, math.nan)
    return table.rename(columns=_COMPARISON_COLUMNS)


def images_table(by_image: Sequence[image_tests.ImageComparison]) -> pd.DataFrame:
    """One row for each comparison and seed that both variants have."""
    rows = [
        {
            "variant": comparison.variant,
            "reference": comparison.reference,
            "seed": test.seed,
            "only_variant_right": test.only_first,
            "only_reference_right": test.only_second,
            "p_value": test.p_value,
        }
        for comparison in by_image
        for test in comparison.by_seed
    ]
    return pd.DataFrame(rows, columns=list(_IMAGE_COLUMNS))


def _verdict(
    tables: StudyTables,
    complete: pd.DataFrame,
    found: tuple[verdicts.Comparison, ...],
    *,
    standing: looks.Standing | None,
) -> str:
    sentence = verdicts.study_verdict(
        errors_by_seed(tables.nets, complete),
        found,
        reference=_reference(tables.nets),
        setting=equality(tables.nets, tables.config.net),
    )
    if standing:
        sentence += f" {looks.sentence(standing)}"
    num_complete = len(complete)
    if num_complete < tables.num_planned:
        num_failed = len(tables.runs) - num_complete
        failures = f"; {num_failed} failed" if num_failed else ""
        sentence += (
            f" {num_complete} of {tables.num_planned} runs are complete{failures}."
        )
    return sentence


def equality(nets: pd.DataFrame, config: NetConfig) -> str:
    """What the variants share, such as "At equal FLOPs (within 2.6 %)".

    What the study holds comes first. Beyond its tolerance nothing counts as equal.
    """
    shared = [("macs_error_pct", "FLOPs"), ("params_error_pct", "parameters")]
    if config.hold == "step_time":
        shared.insert(0, ("step_time_error_pct", "measured step time"))
    elif config.hold == "peak_memory":
        shared.insert(0, ("step_peak_memory_error_pct", "peak memory"))
    elif config.hold == "activations":
        shared.insert(0, ("activations_error_pct", "activations"))
    for column, word in shared:
        worst = float(nets[column].abs().max()) if column in nets else math.inf
        if worst == 0:
            return f"At equal {word}"
        if worst > config.tolerance_pct:
            continue
        within = f"within {max(worst, 0.1):.1f} %"
        if column == "step_time_error_pct":
            ends = nets[[f"{column}_low", f"{column}_high"]].abs()
            noise = f"95 % intervals within {float(ends.max(axis=None)):.1f} %"
            return f"At equal {word} (medians {within}, {noise})"
        return f"At equal {word} ({within})"
    ratios = 1 + nets["macs_error_pct"] / 100
    return f"With {ratios.min():.3g} to {ratios.max():.3g} times the reference's FLOPs"
