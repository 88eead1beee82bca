"""Which engine a study's executors run on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from resnext_ablate.engines import execution
from resnext_ablate.engines.execution import Channel
from resnext_ablate.records.config import StudyConfig


@contextlib.contextmanager
def opened(
    config: StudyConfig, *, devices: Sequence[str], folder: Path, data_checksum: str
) -> Iterator[Callable[[int], Channel]]:
    """What starts an executor by its number, while the engine is open.

    Args:
        config: resolved; `run.engine` names the engine.
        devices: one for each executor.
        folder: of the study.
        data_checksum: of the images, which every node must have.

    Raises:
        InputError: there is no cluster at `run.ray_address`.
        MissingExtraError: the engine's package is not installed.
    """
    if config.run.engine == "local":
        yield execution.open_locally(
            folder, devices=devices, devices_per_run=config.run.devices_per_run
        )
        return
    from resnext_ablate.engines.ray_engine import RayEngine
    from resnext_ablate.engines.slurm_engine import SlurmEngine

    kind = RayEngine if config.run.engine == "ray" else SlurmEngine
    engine = kind(config, data_checksum=data_checksum, folder=folder)
    try:
        yield engine.open_channel
    finally:
        engine.close()
