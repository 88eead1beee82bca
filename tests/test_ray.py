"""Executors on a Ray cluster: the same results, whatever happens to a node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import cluster

import studies
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.compute import preparation
from resnext_ablate.engines.execution import Job
from resnext_ablate.engines.ray_engine import Relay
from resnext_ablate.records import records
from resnext_ablate.records.config import StudyConfig, load_study

__all__ = ["cluster"]  # a fixture


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


def open_relay(study: StudyConfig, *, folder: str, study_id: str) -> Relay:
    checksum = preparation.prepare(study.data).info.checksum
    return Relay(
        study.model_dump_json(), checksum, study_folder=folder, study_id=study_id
    )


def begin(relay: Relay, study: StudyConfig, *, folder: str) -> Job:
    """Hands a ready relay a run, as a scheduler with such a folder would."""
    assert read(relay)[0]["event"] == "ready"
    spec = parse_spec("resnet11-t8-in1")
    job = Job(
        cell=records.cell_id(spec, 0),
        variant="1x8d",
        seed=0,
        spec=spec.to_dict(),
        config=study.model_dump_json(),
        data_folder="/not/here",
        study_folder=folder,
        checkpoint_root=folder,
        device="cpu",
        environment={},
        attempt=1,
        num_micro_batches=1,
    )
    relay.write(json.dumps({"job": vars(job)}))
    return job


def read_until(relay: Relay, event: str) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []
    while event not in [message["event"] for message in said]:
        said += read(relay)
    return said


def test_relay_brings_back_the_run_file_and_leaves_nothing(study: StudyConfig) -> None:
    """A node's executor works in a folder of its own; its run comes with the message.

    What the scheduler's machine calls folders and devices means nothing to a node.
    """
    relay = open_relay(study, folder="/nor/here", study_id="none")
    job = begin(relay, study, folder="/nor/here")
    said = read_until(relay, "finished")
    assert "epoch" in [message["event"] for message in said]
    run = json.loads(said[-1]["run"])
    assert (run["cell"], run["state"]) == (job.cell, "complete")
    folder = relay._folder
    relay.close()
    assert not folder.exists()


@pytest.mark.parametrize("study_id", ["this", "another"])
def test_checkpoints_are_kept_where_all_nodes_see_them(
    study: StudyConfig, tmp_path: Path, study_id: str
) -> None:
    """A run goes on elsewhere from its checkpoint if nodes share the study's folder.

    The time that an epoch took tells whether it was trained again.
    """
    plan = records.Plan(nets=(), cells=(), provenance={"study_id": "this"})
    records.write_plan(plan, tmp_path)
    place = str(tmp_path)
    long = study.model_copy(
        update={
            "train": study.train.model_copy(update={"epochs": 500}),
            "run": study.run.model_copy(update={"checkpoint_every_s": 1e-9}),
        }
    )
    times = []
    for _ in range(2):
        relay = open_relay(long, folder=place, study_id=study_id)
        begin(relay, long, folder=place)
        epochs = [m["epoch"] for m in read_until(relay, "epoch") if m.get("epoch")]
        read_until(relay, "epoch")  # By now the first epoch has its checkpoint.
        times.append(epochs[0]["time_s"])
        relay.close()
    is_shared = study_id == "this"
    assert (times[0] == times[1]) == is_shared
    assert bool(list(tmp_path.glob("checkpoints/*/*.pt"))) == is_shared


def test_node_with_other_images_is_refused(study: StudyConfig) -> None:
    """Runs on other images would not compare: the node says what it has."""
    relay = Relay(
        study.model_dump_json(), "0" * 64, study_folder="/not/here", study_id="none"
    )
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
    process = studies.start(
        tmp_path, "run.engine=ray", "train.epochs=20000", environment=environment
    )
    studies.wait_until(lambda: studies.in_mid_run(tmp_path), timeout_s=200)
    for mode in ("token", "disabled"):
        with pytest.raises(subprocess.SubprocessError):
            subprocess.run(
                [sys.executable, "-c", "import ray; ray.init('auto'); print('in')"],
                env={**environment, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "f" * 64},
                capture_output=True,
                timeout=40,  # Some who are refused ask again and again.
                check=True,
            )
    assert process.poll() is None, "it ran all the while"
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 130, talk
    assert not (tmp_path / ".ray").exists()
