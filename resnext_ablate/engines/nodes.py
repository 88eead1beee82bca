"""What another machine makes of a study: its images, its folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from resnext_ablate.architecture.spec import InputError
from resnext_ablate.compute import preparation
from resnext_ablate.records.config import StudyConfig


def images(config: str, checksum: str) -> tuple[Path, str]:
    """This machine's own images of a study, prepared here where they are not yet.

    Args:
        config: the resolved `StudyConfig` as JSON.
        checksum: of the scheduler's images.

    Returns:
        Their folder, and why they cannot be used; empty where they can.
    """
    node = f"node {os.uname().nodename}"
    try:
        prepared = preparation.prepare(StudyConfig.model_validate_json(config).data)
    except InputError as error:
        return Path(), f"{node}: {error}"
    own = prepared.info.checksum
    if own == checksum:
        return prepared.folder, ""
    return prepared.folder, (
        f"{node} has other images (checksum {own[:12]}, not {checksum[:12]})"
    )


def fitted(values: dict[str, Any], *, data_folder: Path) -> dict[str, Any]:
    """A line to an executor, with images and device as this machine has them."""
    if "job" not in values:
        return values
    job = {**values["job"], "data_folder": str(data_folder)}
    if job["device"].startswith("cuda"):
        job["device"] = "cuda:0"  # An executor is shown its own one alone.
    return {**values, "job": job}
