"""Local executors keep to cores of their own, where they fill the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from resnext_ablate.engines.execution import LocalChannel, open_locally


def cores_of(channel: LocalChannel) -> set[int]:
    return os.sched_getaffinity(channel._process.pid)


@pytest.mark.parametrize("missing", [0, 1])
def test_executors_are_pinned_where_they_fill_all_cores(
    tmp_path: Path, missing: int
) -> None:
    """As many as cores: one core each. Fewer: the system chooses."""
    cores = os.sched_getaffinity(0)
    count = len(cores) - missing
    if count == 0:
        pytest.skip("one core can only be filled")
    open_channel = open_locally(tmp_path, devices=("cpu",) * count)
    channels = [open_channel(index) for index in range(count)]
    try:
        found = [cores_of(channel) for channel in channels]
    finally:
        for channel in channels:
            for _ in channel.lines():
                break
            channel.close()
    if missing:
        assert found == [cores] * count
    else:
        assert sorted(map(tuple, found)) == [(core,) for core in sorted(cores)]


def test_gpu_executors_are_not_pinned(tmp_path: Path) -> None:
    """What feeds a GPU may need any core."""
    cores = os.sched_getaffinity(0)
    open_channel = open_locally(tmp_path, devices=("cuda:0",) * len(cores))
    channel = open_channel(0)
    try:
        assert cores_of(channel) == cores
    finally:
        channel.close()
        for _ in channel.lines():
            pass
