"""What the commands answer about a search."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from resnext_ablate.architecture.matching import percent
from resnext_ablate.evidence import search_report
from resnext_ablate.face import plan_answers
from resnext_ablate.face.answers import Answer

if TYPE_CHECKING:
    from resnext_ablate.records.tables import SearchTables
    from resnext_ablate.study.study_plan import PreparedStudy


def of_plan(prepared: PreparedStudy, *, num_fitting: int) -> Answer:
    """What a search would try, stop and confirm."""
    search = prepared.config.search
    assert search is not None
    named = plan_answers.of_plan(prepared, num_done=0, forecast=None)
    value: Any = named.value
    seeds = len(prepared.config.run.seed_list())
    epochs = prepared.config.train.epochs
    passes = 3 * epochs * prepared.data.info.num_train
    to_try = search.num_trials * seeds
    to_confirm = (len(prepared.plan.nets) + search.confirm_top) * search.confirm_seeds
    most = (to_try + to_confirm) * passes * prepared.plan.nets[0].macs
    rungs = ", ".join(f"{rung:g}" for rung in search.rungs)
    unit = "epochs of the reference" if search.rung_unit == "macs" else "seconds"
    pruning = f"pruned by {search.pruner}" + (f" at {rungs} {unit}" if rungs else "")
    lines = (
        f"{num_fitting:,} nets fit; {search.num_trials} of them tried by "
        f"{search.sampler}, with {seeds} seed{'s' * (seeds > 1)}, {pruning}",
        f"the best {search.confirm_top} and the {len(prepared.plan.nets)} above run "
        f"again with {search.confirm_seeds} fresh seeds",
        f"at most {to_try} + {to_confirm} runs of {epochs} epochs, {most:.3g} "
        "multiply-adds of training; less by what is pruned",
        f"{len(prepared.devices)} executors on {prepared.config.run.device}, "
        f"{prepared.config.train.precision}",
    )
    return replace(
        named,
        value={
            **value,
            "num_fitting": num_fitting,
            "num_trials": search.num_trials,
            "num_runs": to_try + to_confirm,
            "training_macs": most,
        },
        closing="\n".join(lines),
    )


def of_search(search: SearchTables) -> Answer:
    """The best nets of a search by validation error, and how the search went."""
    best = search_report.best(search)
    pruning = search_report.false_prunes(search)
    rows = best.to_dict(orient="records")
    return Answer(
        value={
            "best": [
                {
                    "variant": row["variant"],
                    "trial": row["trial"],
                    "val_error_pct": row["val_error_pct"],
                }
                for row in rows
            ],
            "num_tried": len(search.trials),
            "num_pruned": pruning.num_pruned,
            "num_audited": pruning.num_audited,
            "num_false_prunes": pruning.num_false,
        },
        header=("best nets found", "trial", "macs +-", "params", "validation error")
        if rows
        else (),
        rows=tuple(
            (
                str(row["variant"]),
                str(row["trial"]),
                percent(row["macs_error_pct"]),
                f"{row['params']:,}",
                f"{row['val_error_pct']:.2f}",
            )
            for row in rows
        ),
        closing=search_report.sentence(search),
    )
