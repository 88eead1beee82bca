"""Executors on a Ray cluster: the same results, whatever happens to a node."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import studies
from resnext_ablate import preparation, records
from resnext_ablate.config import StudyConfig, load_study
from resnext_ablate.execution import Job
from resnext_ablate.names import parse_spec
from resnext_ablate.ray_engine import Relay

TOKEN = "0123456789abcdef" * 4


@pytest.fixture
def study(tmp_path: Path) -> StudyConfig:
    (tmp_path / "tiny.toml").write_text(studies.STUDY, encoding="utf-8")
    return load_study(tmp_path / "tiny.toml", overrides=["train.epochs=1"])


def read(relay: Relay) -> list[dict[str, Any]]:
    """The next messages of a relay's executor."""
    deadline = time.monotonic() + 120
    while not (lines := relay.read()):
        assert lines is not None, relay.ending()
        assert time.monotonic() < deadline
    return [json.loads(line) for line in lines]


def test_relay_brings_back_the_run_file_and_leaves_nothing(study: StudyConfig) -> None:
    """A node's executor works in a folder of its own; its run comes with the message.

    What the scheduler's machine calls folders and devices means nothing to a node.
    """
    prepared = preparation.prepare(study.data)
    relay = Relay(study.model_dump_json(), prepared.info.checksum)
    assert read(relay)[0]["event"] == "ready"
    spec = parse_spec("resnet11-t8-in1")
    job = Job(
        cell=records.cell_id(spec, 0),
        variant="1x8d",
        seed=0,
        spec=spec.to_dict(),
        config=study.model_dump_json(),
        data_folder="/not/here",
        study_folder="/nor/here",
        device="cpu",
        environment={},
        attempt=1,
        num_micro_batches=1,
    )
    relay.write(json.dumps({"job": vars(job)}))
    said: list[dict[str, Any]] = []
    while not said or said[-1]["event"] != "finished":
        said += read(relay)
    assert "epoch" in [message["event"] for message in said]
    run = json.loads(said[-1]["run"])
    assert (run["cell"], run["state"]) == (job.cell, "complete")
    folder = relay._folder
    relay.close()
    assert not folder.exists()


def test_node_with_other_images_is_refused(study: StudyConfig) -> None:
    """Runs on other images would not compare: the node says what it has."""
    relay = Relay(study.model_dump_json(), "0" * 64)
    assert relay.read() is None
    reason, by_signal, _ = relay.ending()
    own = preparation.prepare(study.data).info.checksum[:12]
    assert f"has other images (checksum {own}, not 000000000000)" in reason
    assert not by_signal


def test_missing_ray_is_named(tmp_path: Path) -> None:
    """Without the extra the study says what to install, with code 4."""
    (tmp_path / "ray.py").write_text("raise ImportError('no ray')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = studies.run(
        tmp_path, "run.engine=ray", environment={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 4, done.stderr
    assert 'pip install "resnext-ablate[ray]"' in done.stderr


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without room and two nodes of one core, all on this machine."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    found.nodes = [found.add_node(num_cpus=1) for _ in range(2)]
    yield found
    found.shutdown()


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_node_killed_in_mid_run_changes_no_result(cluster: Any, tmp_path: Path) -> None:
    """A study over two nodes loses one and gets another: it equals a local one.

    Two executors need a core each, so that they run at once on both nodes alone.
    """
    local, spread = tmp_path / "local", tmp_path / "spread"
    local.mkdir()
    spread.mkdir()
    overrides = ["train.epochs=8", "run.seeds=3"]
    done = studies.run(local, *overrides)
    assert done.returncode == 0, done.stderr
    process = studies.start(
        spread, *overrides, "run.engine=ray", f"run.ray_address={cluster.address}"
    )
    both = (
        "SELECT COUNT(*) FROM (SELECT COUNT(*) AS epochs FROM trials "
        "JOIN trial_intermediate_values USING (trial_id) "
        "WHERE state = 'RUNNING' GROUP BY trial_id) WHERE epochs >= 1"
    )
    studies.wait_until(lambda: studies.count(spread, both) == 2, timeout_s=200)
    cluster.remove_node(cluster.nodes[0], allow_graceful=False)
    studies.wait_until(lambda: studies.lost_runs(spread) > 0, timeout_s=200)
    cluster.add_node(num_cpus=1)
    _, talk = process.communicate(timeout=300)
    assert process.returncode == 0, talk
    assert "trying again" in talk
    studies.assert_equal_results(spread, local)
    states = [trial.state.name for trial in studies.trials_of(spread)]
    assert states.count("COMPLETE") == 6
    assert "RUNNING" not in states


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_wrong_token_is_refused(cluster: Any, tmp_path: Path) -> None:
    """Who has another token does not get in, and is told so in one message."""
    done = studies.run(
        tmp_path,
        "run.engine=ray",
        f"run.ray_address={cluster.address}",
        environment={**os.environ, "RAY_AUTH_TOKEN": "f" * 64},
    )
    assert done.returncode == 2, done.stderr
    assert "no Ray cluster answers there with this token" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_own_cluster_has_a_token_of_its_own(tmp_path: Path) -> None:
    """A cluster started for a study refuses who has no token; no token is written."""
    pytest.importorskip("ray")
    environment = {
        name: value for name, value in os.environ.items() if "RAY_" not in name
    }
    environment["HOME"] = str(tmp_path)
    process = studies.start(tmp_path, "run.engine=ray", environment=environment)
    studies.wait_until(lambda: studies.in_mid_run(tmp_path), timeout_s=200)
    for mode in ("token", "disabled"):
        intruder = studies.subprocess.run(
            [sys.executable, "-c", "import ray; ray.init('auto'); print('in')"],
            env={**environment, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "f" * 64},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert "in\n" not in intruder.stdout
        assert intruder.returncode != 0
    _, talk = process.communicate(timeout=300)
    assert process.returncode == 0, talk
    assert not (tmp_path / ".ray").exists()
