"""Made-up studies with the tables of a real one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd

from resnext_ablate.records.config import StudyConfig
from resnext_ablate.records.tables import StudyTables

NETS = ((1, 16), (2, 10), (4, 6), (8, 3), (32, 1))
MACS_ERRORS = (0.0, 0.9, 1.7, 2.6, -1.4)


def study(
    *,
    num_variants: int = 5,
    num_seeds: int = 3,
    num_epochs: int = 20,
    effects: Sequence[float] = (0.0, -0.3, -0.9, -1.3, -1.2),
    sd: float = 0.18,
    failed: Mapping[tuple[int, int], str] | None = None,
    missing: Collection[tuple[int, int]] = (),
    paper: str | None = "table3/ResNet-50",
    question: str = "Does cardinality beat width at equal FLOPs?",
    labels: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    num_images: int = 0,
) -> StudyTables:
    """A study whose errors are 6 % plus the variant's effect plus normal noise.

    Args:
        effects: points of test error for each variant, repeated as needed.
        sd: spread of the seeds in points.
        failed: reason for each (variant, seed) that failed.
        missing: (variant, seed) that have not run yet.
        labels: what the variants are called in place of their settings.
        names: of their nets.
        num_images: test images whose right and wrong answers each run keeps.
    """
    rng = np.random.default_rng(0)
    nets = _nets(num_variants, labels, names)
    runs, epochs = [], []
    for i, net in enumerate(nets.to_dict(orient="records")):
        for seed in range(num_seeds):
            if (i, seed) in missing:
                continue
            reason = (failed or {}).get((i, seed), "")
            error = 6 + effects[i % len(effects)] + sd * rng.standard_normal()
            curve = _curve(net, seed=seed, error=error, num_epochs=num_epochs, rng=rng)
            epochs.append(curve.head(3) if reason else curve)
            rank = (seed * num_variants + i) // 2
            run = _run(net, seed=seed, rank=rank, error=error, reason=reason, rng=rng)
            runs.append({**run, "epochs": len(epochs[-1])})
    config = StudyConfig.model_validate(
        {
            "name": "synthetic",
            "question": question,
            "net": {"template": "resnet29-t16", "cardinality": [1, 2]},
            "data": {"name": "digits"},
            "train": {"epochs": num_epochs},
            "report": {"paper": paper},
        }
    )
    return StudyTables(
        study="synthetic",
        config=config,
        provenance={
            "study": "synthetic",
            "question": question,
            "command": "resnext-ablate run studies/synthetic.toml",
            "cpu": "Made-up CPU, 2 cores",
            "gpu": "",
            "data_checksum": "0" * 64,
        },
        nets=nets,
        runs=pd.DataFrame(runs),
        epochs=pd.concat(epochs, ignore_index=True),
        attempts=pd.DataFrame(columns=["study", "cell", "cause", "reason"]),
        num_planned=num_variants * num_seeds,
        correct=_correct(pd.DataFrame(runs), num_images) if num_images else {},
    )


def _correct(runs: pd.DataFrame, num_images: int) -> dict[str, dict[int, np.ndarray]]:
    """Answers of each complete run that agree with its error; some images are hard."""
    rng = np.random.default_rng(1)
    hardness = rng.normal(0, 1, num_images)
    correct: dict[str, dict[int, np.ndarray]] = {}
    for run in runs[runs["state"] == "complete"].itertuples():
        order = np.argsort(-(hardness + rng.normal(0, 0.5, num_images)))
        wrong = order[: round(run.test_error_pct / 100 * num_images)]
        right = np.ones(num_images, dtype=bool)
        right[wrong] = False
        correct.setdefault(run.variant, {})[run.seed] = right
    return correct


def _nets(
    num_variants: int, labels: Sequence[str] | None, names: Sequence[str] | None
) -> pd.DataFrame:
    rows = []
    for i in range(num_variants):
        cardinality, width = NETS[i] if i < len(NETS) else (i + 1, 2 + i % 5)
        macs_error = MACS_ERRORS[i % len(MACS_ERRORS)]
        macs = round(47_000_000 * (1 + macs_error / 100))
        label = labels[i] if labels else f"{cardinality}x{width}d"
        rows.append(
            {
                "variant": label,
                "name": names[i] if names else f"resnext29-{cardinality}x{width}d-t16",
                "cardinality": cardinality,
                "base_width": width,
                "bottleneck_widths": f"{width},{2 * width},{4 * width}",
                "depth": 29,
                "template_width": 16,
                "image_size": 32,
                "macs": macs,
                "fvcore_macs": macs,
                "fvcore_total": macs + 900_000,
                "params": round(310_000 * (1 - macs_error / 120)),
                "params_without_bn": 300_000,
                "activations": 1_200_000 + 90_000 * i,
                "macs_error_pct": macs_error,
                "params_error_pct": -macs_error / 1.2,
                "activations_error_pct": 7.5 * i,
                "is_reference": i == 0,
            }
        )
    return pd.DataFrame(rows)


def _run(
    net: dict[str, object],
    *,
    seed: int,
    rank: int,
    error: float,
    reason: str,
    rng: np.random.Generator,
) -> dict[str, object]:
    speed = 5200 / (1 + 0.35 * np.log2(float(str(net["cardinality"]))))
    speed *= 1 + 0.02 * rng.standard_normal()
    measured = {
        "train_loss": 0.2,
        "train_error_pct": error - 2.5,
        "val_loss": 0.3,
        "val_error_pct": error + 0.2,
        "test_loss": 0.31,
        "test_error_pct": error,
        "train_time_s": 900_000 / speed,
        "images_per_s": speed,
        "roofline_pct": speed / 100,
        "peak_memory_mib": 410.0 + seed,
    }
    if reason:
        measured = dict.fromkeys(measured, float("nan"))
    return {
        "study": "synthetic",
        **{key: net[key] for key in ("variant", "name", "cardinality", "base_width")},
        "depth": 29,
        "template_width": 16,
        "seed": seed,
        "state": "diverged" if "loss" in reason else "failed" if reason else "complete",
        "reason": reason,
        **{key: net[key] for key in ("macs", "fvcore_macs", "params", "activations")},
        **measured,
        "device": "cpu: Made-up CPU",
        "precision": "fp32",
        "torch_version": "2.11",
        "package_version": "0.1.0",
        "git_commit": "abc",
        "data_checksum": "0" * 64,
        # Two executors, 20 minutes a run.
        "started_at": str(
            pd.Timestamp("2026-01-02T03:04:05", tz="UTC")
            + pd.Timedelta(minutes=20 * rank)
        ).replace(" ", "T"),
    }


def _curve(
    net: dict[str, object],
    *,
    seed: int,
    error: float,
    num_epochs: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    epoch = np.arange(1, num_epochs + 1)
    decay = 55 * np.exp(-epoch / (num_epochs / 5))
    noise = rng.standard_normal(num_epochs) * np.where(epoch > num_epochs / 2, 0.2, 1.5)
    return pd.DataFrame(
        {
            "study": "synthetic",
            "variant": net["variant"],
            "seed": seed,
            "epoch": epoch,
            "train_loss": 0.2 + decay / 50,
            "train_error_pct": error - 2.5 + 1.1 * decay + noise / 3,
            "val_loss": 0.3 + decay / 50,
            "val_error_pct": np.clip(error + 0.2 + decay + noise, 0.5, 100),
            "learning_rate": 0.1,
            "time_s": 4.0,
            "images_per_s": 5000.0,
            "peak_memory_mib": 410.0,
        }
    )
