"""A Ray cluster of two simulated nodes for tests, all on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import pytest

TOKEN = "0123456789abcdef" * 4


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without room and two nodes of one core."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # The paths of Ray's sockets have room for no longer folder than this one.
    with TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        found.nodes = [found.add_node(num_cpus=1) for _ in range(2)]
        yield found
        found.shutdown()
