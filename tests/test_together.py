"""Seeds that train together as one net are the runs that they would be alone."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import small_specs
from test_training import AUGMENTED, CPU, _config, _dataset

import studies
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.spec import InputError, ResNeXtSpec
from resnext_ablate.compute import graphs, together, training
from resnext_ablate.compute.checkpoint import Keeper, load_together
from resnext_ablate.compute.endings import NonFiniteLossError, RunStoppedError
from resnext_ablate.compute.layers import conv_key, settle
from resnext_ablate.compute.model import ResNeXt, build
from resnext_ablate.compute.training import RunResult, Seed
from resnext_ablate.records.config import TrainConfig
from resnext_ablate.records.records import EpochRecord

End = RunResult | NonFiniteLossError


def nets(spec: ResNeXtSpec, count: int) -> list[ResNeXt]:
    seeds = range(count)
    return [
        build(spec, generator=torch.Generator().manual_seed(seed)).double()
        for seed in seeds
    ]


@given(spec=small_specs(), count=st.integers(2, 3), data=st.data())
@settings(deadline=None, max_examples=40)
def test_any_nets_side_by_side_stay_themselves(
    spec: ResNeXtSpec, count: int, data: st.DataObject
) -> None:
    """Outputs, gradients and running averages of every kind, form and shortcut are
    those of each net alone; its tensors come out of the joint net as they went in."""
    alone = nets(spec, count)
    joint = together.fuse(alone)
    side = spec.total_stride + data.draw(st.integers(0, 5))
    images = torch.randn(4, count * spec.in_channels, side, side, dtype=torch.double)
    answers = joint(images)
    answers.square().sum().backward()
    expected = []
    for net, own in zip(alone, images.chunk(count, dim=1), strict=True):
        out = net(own)
        out.square().sum().backward()
        expected.append(out)
    torch.testing.assert_close(answers, torch.cat(expected, dim=1))
    parts = together.apart(joint.state_dict(), count=count)
    grads = {name: weight.grad for name, weight in joint.named_parameters()}
    for index, net in enumerate(alone):
        for name, tensor in net.state_dict().items():
            torch.testing.assert_close(parts[index][name], tensor)
        for name, weight in net.named_parameters():
            own_grad = grads[name].chunk(count)[index]
            torch.testing.assert_close(own_grad, weight.grad, rtol=1e-6, atol=1e-8)


def run(
    name: str,
    *,
    seeds: list[int],
    config: TrainConfig,
    folder: Path | None = None,
    should_stop: Any = training.never,
) -> dict[int, End]:
    """What becomes of seeds that train together."""
    ended: dict[int, End] = {}

    def seat(seed: int) -> Seed:
        keeper = folder and Keeper(folder / str(seed), identity="", every_s=1e9)
        return Seed(
            seed=seed,
            on_epoch=lambda metrics: None,
            on_end=lambda end: ended.update({seed: end}),
            keeper=keeper,
        )

    training.train_together(
        parse_spec(name),
        config=config,
        data_config=AUGMENTED,
        dataset=_dataset(),
        seeds=[seat(seed) for seed in seeds],
        device=CPU,
        deterministic=True,
        should_stop=should_stop,
    )
    return ended


def losses(end: End) -> list[float]:
    assert isinstance(end, RunResult), end
    curve: list[EpochRecord] = list(end.epochs)
    return [value for e in curve for value in (e.train_loss, e.val_loss)]


@pytest.mark.parametrize(
    ("name", "count", "fields"),
    [
        ("resnext11-1x4d-t4-in1-c4", 2, {"kernels": "fused"}),
        ("resnext11-4x2d-t4-in1-c4", 3, {"kernels": "fused", "label_smoothing": 0.1}),
        ("resnext11-2x2d-t4-in1-c4", 3, {"kernels": "torch", "channels_last": False}),
        ("resnext11-4x2d-t4-in1-c4", 2, {"kernels": "torch", "schedule": "cosine"}),
    ],
)
def test_seeds_together_are_the_runs_that_they_would_be_alone(
    name: str, count: int, fields: dict[str, Any]
) -> None:
    """Each has its own weights, order and crops, and loses what it would lose alone,
    within rounding over eight steps; the errors are the same."""
    config = _config(learning_rate=0.02, **fields)
    fused = run(name, seeds=[3, 1, 4][:count], config=config)
    for seed, end in fused.items():
        alone = run(name, seeds=[seed], config=config)[seed]
        assert losses(end) == pytest.approx(losses(alone), rel=2e-4)
        assert isinstance(end, RunResult) and isinstance(alone, RunResult)
        assert abs(end.test_error_pct - alone.test_error_pct) < 10
    first, second, *_ = fused.values()
    assert losses(first) != pytest.approx(losses(second), rel=1e-2)


def test_merged_groups_stay_within_a_seed() -> None:
    """Forms may merge the groups of one seed, never those of two."""
    spec = parse_spec("resnext11-4x2d-t4-in1-c4")
    layout = spec.layout(8).times(2)
    grouped = [conv for conv in layout.convs if conv.groups == 8]
    assert all(conv_key(conv).endswith("seeds 2") for conv in grouped)
    forms = {conv_key(conv): "merge4" for conv in grouped}
    config = _config(learning_rate=0.02, conv_forms=forms)
    merged = run(spec.name, seeds=[0, 1], config=config)
    plain = run(spec.name, seeds=[0, 1], config=_config(learning_rate=0.02))
    for seed in (0, 1):
        assert losses(merged[seed]) == pytest.approx(losses(plain[seed]), rel=2e-4)
        assert losses(merged[seed]) != losses(plain[seed])
    joint = together.fuse(nets(spec, 2))
    forms = {conv_key(conv): "merge8" for conv in grouped}
    with pytest.raises(InputError, match="has no form 'merge8'"):
        settle(joint, layout, kernels="torch", forms=forms)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["resnext11-1x4d-t4-in1-c4", "resnext11-8x2d-t4-in1-c4"]
)
def test_a_seed_that_diverges_harms_no_other(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends at its first bad step; the others lose to the last bit what they lose
    beside a sound one."""
    config = _config(learning_rate=0.02, precision=precision)
    sound = run(name, seeds=[0, 1, 2], config=config)
    update = graphs.update
    steps: list[int] = []

    def poisoned(learner: Any, batch: Any, **rest: Any) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 3:
            with torch.no_grad():
                for weight in learner.model.parameters():
                    weight.chunk(3)[1].fill_(math.nan)
        loss: torch.Tensor = update(learner, batch, **rest)
        return loss

    monkeypatch.setattr(graphs, "update", poisoned)
    ended = run(name, seeds=[0, 1, 2], config=config)
    error = ended[1]
    assert isinstance(error, NonFiniteLossError)
    assert (error.epoch, error.step) == (1, 3)
    for seed in (0, 2):
        assert losses(ended[seed]) == losses(sound[seed])


def test_when_all_have_diverged_training_ends() -> None:
    """No step is spent on nets that are all lost."""
    config = _config(epochs=9, learning_rate=1e30, weight_decay=0.1)
    ended = run("resnext11-1x4d-t4-in1-c4", seeds=[0, 1], config=config)
    for end in ended.values():
        assert isinstance(end, NonFiniteLossError) and end.epoch == 1


def stop_after(count: int) -> Any:
    calls: list[int] = []

    def should_stop() -> bool:
        calls.append(1)
        return len(calls) > count

    return should_stop


@pytest.mark.parametrize("kernels", ["fused", "torch"])
def test_a_stop_loses_no_step_of_any_seed(tmp_path: Path, kernels: str) -> None:
    """Stopped in mid-epoch they go on together to the very numbers of an unbroken run;
    one of them alone goes on from there too, to the same within rounding."""
    name, config = "resnext11-2x2d-t4-in1-c4", _config(epochs=3, kernels=kernels)
    unbroken = run(name, seeds=[0, 1], config=config)
    for folder in (tmp_path / "both", tmp_path / "one"):
        with pytest.raises(RunStoppedError, match="epoch 2 after step 1"):
            run(
                name,
                seeds=[0, 1],
                config=config,
                folder=folder,
                should_stop=stop_after(6),
            )
    resumed = run(name, seeds=[0, 1], config=config, folder=tmp_path / "both")
    for seed in (0, 1):
        assert losses(resumed[seed]) == losses(unbroken[seed])
    told = run(name, seeds=[1], config=config, folder=tmp_path / "one")
    assert losses(told[1]) == pytest.approx(losses(unbroken[1]), rel=2e-3)


def test_seeds_a_step_apart_go_on_from_the_step_that_all_have(tmp_path: Path) -> None:
    """A kill between their saves loses the last step only; without a common step they
    begin anew."""
    name, config = "resnext11-1x4d-t4-in1-c4", _config(epochs=3)
    for count in (2, 3):
        with pytest.raises(RunStoppedError):
            run(
                name,
                seeds=[0, 1],
                config=config,
                folder=tmp_path,
                should_stop=stop_after(count),
            )
    keepers = [Keeper(tmp_path / seed, identity="", every_s=1) for seed in "01"]
    newest = max((tmp_path / "1").glob("*.pt"))
    newest.unlink()
    found = load_together(keepers)
    assert [kept.step for kept in found if kept] == [2, 2]
    for path in (tmp_path / "1").glob("*.pt"):
        path.unlink()
    assert load_together(keepers) == (None, None)


def test_times_are_each_seeds_share() -> None:
    """The training times of seeds together add up to the time that they took, and
    images per second are those of a run alone that takes its share."""
    fused = run("resnext11-1x4d-t4-in1-c4", seeds=[0, 1], config=_config())
    first, second = fused.values()
    assert isinstance(first, RunResult) and isinstance(second, RunResult)
    assert first.train_time_s == second.train_time_s
    images = 2 * 40
    assert first.images_per_s == pytest.approx(images / first.train_time_s)


def test_a_joint_batch_holds_each_seeds_own() -> None:
    """Images lie seed by seed in the channels, labels in columns."""
    images = torch.arange(2 * 2 * 3 * 2 * 2).view(2, 2, 3, 2, 2).float()
    labels = torch.tensor([[0, 1], [2, 3]])
    batches = [together.Batch(images[i], labels[i]) for i in range(2)]
    both = together.joint_batch(batches)
    assert both.images[:, :3].equal(images[0]) and both.images[:, 3:].equal(images[1])
    assert both.labels.tolist() == [[0, 2], [1, 3]]
    again = together.repeated(images[0], count=2)
    assert again[:, :3].equal(images[0]) and again[:, 3:].equal(images[0])
    loss = F.cross_entropy(torch.zeros(2, 4), both.labels[:, 1])
    assert loss == pytest.approx(math.log(4))


@pytest.mark.slow
def test_a_study_of_fused_seeds_survives_kill_and_interrupt(tmp_path: Path) -> None:
    """Three seeds in twos: interrupted in mid-run the study goes on to the very numbers
    of an unbroken one; with a killed executor to the same within rounding, each seed
    with its own trial, run file and checkpoints. None is left over."""
    fused = ("run.fuse_seeds=2", "run.seeds=2", 'net.variants=["1x8d"]')
    settings = (*fused, "run.executors=1", "run.checkpoint_every_s=0.1")
    folders = [tmp_path / name for name in ("unbroken", "interrupted", "killed")]
    for folder in folders:
        folder.mkdir()
    unbroken, interrupted, killed = folders
    assert studies.run(unbroken, *settings).returncode == 0

    process = studies.start(interrupted, *settings)
    studies.wait_until(lambda: studies.in_mid_run(interrupted))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    kept = studies.checkpoints_of(interrupted)
    assert len({path.parent for path in kept}) == 2
    assert studies.run(interrupted, *settings).returncode == 0
    studies.assert_equal_results(unbroken, interrupted)

    process = studies.start(killed, *settings)
    studies.wait_until(lambda: studies.in_mid_run(killed))
    (executor,) = studies.children_of(process.pid)
    os.kill(executor, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == 0
    frames = [studies.runs_of(folder) for folder in (unbroken, killed)]
    errors = [frame["test_error_pct"].to_numpy() for frame in frames]
    assert abs(errors[0] - errors[1]).max() < 5
    assert frames[0]["num_fused"].tolist() == [2, 2]
    assert frames[1]["num_fused"].tolist() == [1, 1]
    assert frames[1]["lost_attempts"].tolist() == ["killed"] * 2
    for folder in folders:
        assert studies.checkpoints_of(folder) == []
    states = [trial.state.name for trial in studies.trials_of(killed)]
    assert sorted(states) == ["COMPLETE", "COMPLETE", "FAIL", "FAIL"]
