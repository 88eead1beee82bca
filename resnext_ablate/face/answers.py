"""What each command answers: a value for JSON, and a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnext_ablate.architecture.complexity import complexity, stage_table
from resnext_ablate.architecture.matching import Match, percent
from resnext_ablate.architecture.spec import ResNeXtSpec

if TYPE_CHECKING:
    import pandas as pd

    from resnext_ablate.architecture.space import Space, Window
    from resnext_ablate.compute.interop import Exported
    from resnext_ablate.compute.model import FvcoreCount
    from resnext_ablate.evidence.report import ReportFiles
    from resnext_ablate.records.progress import RunningRun
    from resnext_ablate.records.records import Plan, RunRecord


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer in both forms."""

    value: object
    """Plain values for `--json`."""
    opening: str = ""
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    num_text_columns: int = 1
    """How many columns from the left hold text; the others hold numbers."""
    closing: str = ""


def of_net(spec: ResNeXtSpec, *, image_size: int, fvcore: FvcoreCount) -> Answer:
    """The stage table of a net, its sums, and fvcore's count of it."""
    total = complexity(spec, image_size)
    stages = stage_table(spec, image_size)
    rows = tuple(
        (
            row.stage,
            f"{row.out_side}x{row.out_side}",
            str(row.out_channels),
            str(row.num_blocks or ""),
            f"{row.cardinality}x{row.bottleneck_width}d" if row.cardinality else "",
            f"{row.complexity.macs:,}",
            f"{row.complexity.params:,}",
            f"{row.complexity.activations:,}",
        )
        for row in stages
    )
    sums = (f"{total.macs:,}", f"{total.params:,}", f"{total.activations:,}")
    agrees = "equal" if fvcore.conv_linear == total.macs else "DIFFERENT"
    unheld = _unheld(spec, image_size)
    return Answer(
        value={
            "name": spec.name,
            "image_size": image_size,
            "depth": spec.depth,
            "cardinality": spec.cardinality,
            "bottleneck_widths": spec.bottleneck_widths,
            **asdict(total),
            "fvcore": asdict(fvcore),
            "not_held_at": unheld,
            "stages": [_stage_value(asdict(row)) for row in stages],
        },
        opening=f"{spec.name}: {spec.depth} layers, {image_size} x {image_size} pixels",
        header=(
            "",
            "output",
            "channels",
            "blocks",
            "C x d",
            "macs",
            "params",
            "activations",
        ),
        rows=(*rows, ("total", "", "", "", "", *sums)),
        closing=(
            f"params without batch norm: {total.params_without_bn:,}\n"
            f"fvcore: conv + linear {fvcore.conv_linear:,} ({agrees}), "
            f"total with batch norm and pooling {fvcore.total:,}"
            + _unheld_text(spec, unheld)
        ),
    )


def of_export(spec: ResNeXtSpec, *, format: str, exported: Exported) -> Answer:
    """The file of an exported net, and how near its outputs are."""
    values = {**asdict(exported), "path": str(exported.path)}
    size = exported.image_size
    return Answer(
        value={"name": spec.name, "format": format, **values},
        closing=(
            f"{exported.path}: {spec.name} as {format}, {exported.num_bytes:,} bytes\n"
            f"read back: logits differ by at most {exported.largest_difference:.2g} "
            f"(largest logit {exported.largest_logit:.3g}), {size} x {size} pixels"
        ),
    )


def of_matches(found: Sequence[Match]) -> Answer:
    """The matched nets with their residuals in every currency."""
    return Answer(
        value=[
            {
                "name": one.spec.name,
                "image_size": one.image_size,
                "setting": one.spec.setting,
                "cardinality": one.spec.cardinality,
                "base_width": one.spec.base_width,
                "bottleneck_widths": one.spec.bottleneck_widths,
                **asdict(one.complexity),
                "macs_error_pct": one.macs_error_pct,
                "params_error_pct": one.params_error_pct,
                "activations_error_pct": one.activations_error_pct,
                "block_params_error_pct": one.block_params_error_pct,
            }
            for one in found
        ],
        header=("net", "C x d", *COMPLEXITY_HEADER),
        rows=tuple(
            (
                one.spec.name,
                one.spec.setting,
                f"{one.complexity.macs:,}",
                f"{one.complexity.params:,}",
                f"{one.complexity.activations:,}",
                percent(one.macs_error_pct),
                percent(one.params_error_pct),
                percent(one.activations_error_pct),
            )
            for one in found
        ),
        num_text_columns=2,
    )


def of_space(
    space: Space,
    windows: Sequence[Window],
    *,
    count: int,
    drawn: Sequence[Match],
    nearest: str,
) -> Answer:
    """How many nets of a space fit its windows, and some of them drawn."""
    nets = of_matches(drawn)
    rows = nets.rows
    if len(space.image_sizes) > 1:
        rows = tuple(
            (f"{name} at {one.image_size} pixels", *rest)
            for one, (name, *rest) in zip(drawn, rows, strict=True)
        )
    asked = " and ".join(f"{w.currency} {w.low:,} to {w.high:,}" for w in windows)
    return Answer(
        value={
            "num_nets": space.num_nets,
            "windows": [asdict(window) for window in windows],
            "count": count,
            "nets": nets.value,
        },
        opening=f"{count:,} of {space.num_nets:,} nets fit {asked}",
        header=nets.header if drawn else (),
        rows=rows,
        num_text_columns=nets.num_text_columns,
        closing=nearest,
    )


def of_status(
    name: str,
    *,
    plan: Plan,
    runs: Sequence[RunRecord],
    process: int | None,
    running: Sequence[RunningRun],
) -> Answer:
    """How far a study is."""
    failed = [run for run in runs if run.state in ("failed", "diverged")]
    num_complete = sum(run.state == "complete" for run in runs)
    num_pruned = sum(trial.pruned_at is not None for trial in plan.trials)
    tried = f"{len(plan.trials)} nets tried, {num_pruned} pruned; "
    tried = tried if plan.trials else ""
    lines = [
        f"  running: {one.variant} seed {one.seed}, epoch {one.epoch}"
        + (
            ""
            if one.val_error_pct is None
            else f", validation error {one.val_error_pct:.2f} %"
        )
        for one in running
    ]
    lines += [
        f"  {run.state}: {run.variant} seed {run.seed}: {run.reason}" for run in failed
    ]
    return Answer(
        value={
            "study": name,
            "num_planned": len(plan.cells),
            "num_complete": num_complete,
            "num_failed": len(failed),
            "num_tried": len(plan.trials),
            "num_pruned": num_pruned,
            "scheduler_process": process,
            "running": [asdict(one) for one in running],
            "failed": [
                {
                    "variant": run.variant,
                    "seed": run.seed,
                    "state": run.state,
                    "reason": run.reason,
                }
                for run in failed
            ],
        },
        opening=(
            f"{name}: {num_complete} of {len(plan.cells)} runs complete, "
            f"{len(failed)} failed; "
            + tried
            + (f"run by process {process}" if process else "not running")
        ),
        closing="\n".join(lines),
    )


def of_studies(
    studies: Sequence[tuple[Path, Plan, Sequence[RunRecord]]],
) -> Answer:
    """A line for each study of a results folder."""
    rows = [
        {
            "study": folder.name,
            "data": plan.provenance.get("data_name", ""),
            "variants": len(plan.nets),
            "runs": len(plan.cells),
            "complete": sum(run.state == "complete" for run in runs),
            "failed": sum(run.state in ("failed", "diverged") for run in runs),
            "started_at": plan.provenance.get("started_at", ""),
        }
        for folder, plan, runs in studies
    ]
    return Answer(
        value=rows,
        header=tuple(rows[0]) if rows else (),
        rows=tuple(tuple(map(str, row.values())) for row in rows),
        num_text_columns=2,
    )


def of_report(study: str, files: ReportFiles) -> Answer:
    """The verdict table of a study and where its report is."""
    comparisons = rows_of(files.evidence.comparisons)
    against = {str(row["variant"]): row for row in comparisons}
    variants = rows_of(files.evidence.variants)
    return Answer(
        value={
            "study": study,
            "verdict": files.evidence.verdict,
            "effect": files.evidence.effect,
            "report": str(files.html),
            "variants": variants,
            "comparisons": comparisons,
        },
        header=(
            "variant",
            "macs",
            "params",
            "n",
            "test error, 95 % interval",
            "against reference",
            "verdict",
        ),
        rows=tuple(
            _verdict_row(row, against.get(str(row["variant"]))) for row in variants
        ),
        closing="\n".join(
            text
            for text in (
                files.evidence.verdict,
                files.evidence.effect,
                f"report: {files.html}",
            )
            if text
        ),
    )


COMPLEXITY_HEADER = (
    "macs",
    "params",
    "activations",
    "macs +-",
    "params +-",
    "activations +-",
)


_SETTINGS_OF_TABLE_2 = ((1, 64), (2, 40), (4, 24), (8, 14), (32, 4))


def _unheld(spec: ResNeXtSpec, image_size: int) -> list[dict[str, Any]]:
    """How far a net drifts at settings of equal block complexity; empty if it does not.

    The paper's nets hold their complexity there to a few percent.
    """
    if spec.family != "from_scratch":
        return []
    own = complexity(spec, image_size)
    rows = []
    for cardinality, width in _SETTINGS_OF_TABLE_2:
        other = spec.with_setting(cardinality, width)
        cost = complexity(other, image_size)
        rows.append(
            {
                "setting": other.setting,
                "macs": cost.macs,
                "params": cost.params,
                "macs_error_pct": 100 * (cost.macs / own.macs - 1),
                "params_error_pct": 100 * (cost.params / own.params - 1),
            }
        )
    return rows


def _unheld_text(spec: ResNeXtSpec, unheld: Sequence[dict[str, Any]]) -> str:
    if not unheld:
        return ""
    rows = (
        f"  {row['setting']:>6}  macs {row['macs_error_pct']:+7.2f} %  "
        f"params {row['params_error_pct']:+7.2f} %"
        for row in unheld
    )
    return (
        "\n\nComplexity is NOT held when cardinality changes: in this net a block puts "
        "out 2 C d channels,\nso its settings do not trade width for cardinality. The "
        f"settings of the paper's Table 2, against {spec.setting}:\n" + "\n".join(rows)
    )


def _stage_value(row: dict[str, Any]) -> dict[str, Any]:
    sums = row.pop("complexity")
    return {**row, **sums}


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A frame for JSON, unknown numbers as null."""
    rows: list[dict[str, Any]] = frame.to_dict(orient="records")
    return [
        {key: None if value != value else value for key, value in row.items()}
        for row in rows
    ]


def _verdict_row(
    variant: dict[str, Any], comparison: dict[str, Any] | None
) -> tuple[str, ...]:
    error = _with_interval(
        variant["test_error_pct_mean"],
        variant["test_error_pct_ci_low"],
        variant["test_error_pct_ci_high"],
        sign="",
    )
    difference, verdict = "", ""
    if variant["is_reference"]:
        difference = "reference"
    elif comparison:
        verdict = str(comparison["verdict"])
        difference = _with_interval(
            comparison["difference_pct"],
            comparison["ci_low"],
            comparison["ci_high"],
            sign="+",
        )
    return (
        str(variant["variant"]),
        f"{variant['macs']:,}",
        f"{variant['params']:,}",
        str(variant["n"]),
        error,
        difference,
        verdict,
    )


def _with_interval(
    value: float | None, low: float | None, high: float | None, *, sign: str
) -> str:
    if value is None:
        return ""
    text = format(value, f"{sign}.2f")
    if low is None or high is None:
        return text
    return f"{text} [{format(low, f'{sign}.2f')}, {format(high, f'{sign}.2f')}]"
