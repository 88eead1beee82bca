"""One run: schedules, optimizer, precision, metrics, seeds and faults."""

from __future__ import annotations

import copy
import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from replays import Again

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.spec import InputError
from resnext_ablate.compute import (
    data,
    graphs,
    hardware,
    learner,
    optimization,
    preparation,
    training,
)
from resnext_ablate.compute.data import DataInfo, Dataset, Split
from resnext_ablate.compute.layers import conv_key
from resnext_ablate.compute.model import build
from resnext_ablate.compute.sources import CACHE_VARIABLE
from resnext_ablate.compute.training import NonFiniteLossError, RunResult
from resnext_ablate.records.config import DataConfig, TrainConfig
from resnext_ablate.records.records import EpochRecord

CPU = torch.device("cpu")
AUGMENTED = DataConfig(name="digits", crop_padding=1)
PLAIN = DataConfig(name="digits", crop_padding=0, flip=False)
SMALL = parse_spec("resnext11-1x4d-t4-in1-c4")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        return data.load(preparation.prepare(PLAIN).folder, device=CPU)


def _dataset(num_train: int = 40, *, num_eval: int = 12) -> Dataset:
    """Four easy classes of 8 x 8 pixels."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        labels = torch.arange(count) % 4
        noise = torch.randint(0, 60, (count, 8, 8, 1), generator=generator)
        pixels = noise + 50 * labels.view(-1, 1, 1, 1)
        return Split(pixels.to(torch.uint8), labels)

    info = DataInfo(
        name="made",
        num_classes=4,
        class_names=("a", "b", "c", "d"),
        in_channels=1,
        image_size=8,
        num_train=num_train,
        num_val=num_eval,
        num_test=num_eval,
        checksum="",
        corrupt_files=(),
    )
    return Dataset(
        train=split(num_train),
        val=split(num_eval),
        test=split(num_eval),
        mean=torch.tensor([0.4]),
        std=torch.tensor([0.2]),
        info=info,
    )


def _config(**fields: Any) -> TrainConfig:
    defaults = {"epochs": 2, "batch_size": 10, "precision": "fp32"}
    return TrainConfig.model_validate({**defaults, **fields})


def _train(
    config: TrainConfig,
    *,
    name: str = "resnext11-1x4d-t4-in1-c4",
    dataset: Dataset | None = None,
    seed: int = 0,
    data_config: DataConfig = AUGMENTED,
    on_epoch: Any = None,
) -> RunResult:
    return training.train(
        parse_spec(name),
        config=config,
        data_config=data_config,
        dataset=dataset or _dataset(),
        seed=seed,
        device=CPU,
        deterministic=True,
        on_epoch=on_epoch or (lambda metrics: None),
    )


def _numbers(result: RunResult) -> list[float]:
    """All that a seed decides."""
    return [
        result.test_loss,
        *result.correct.tolist(),
        *(
            value
            for e in result.epochs
            for value in (e.train_loss, e.train_error_pct, e.val_loss, e.val_error_pct)
        ),
    ]


# Schedules.


def _rates(config: TrainConfig, *, steps_per_epoch: int) -> list[float]:
    return [
        optimization.learning_rate(config, step=step, steps_per_epoch=steps_per_epoch)
        for step in range(config.epochs * steps_per_epoch)
    ]


def test_the_step_schedule_is_the_papers() -> None:
    """Over 300 epochs the rate drops tenfold at epochs 150 and 225 (Sec. 5.3)."""
    rates = _rates(TrainConfig(epochs=300), steps_per_epoch=3)
    assert rates[0] == rates[449] == 0.1
    assert rates[450] == rates[674] == pytest.approx(0.01)
    assert rates[675] == rates[899] == pytest.approx(0.001)


def test_the_step_schedule_scales_to_short_runs() -> None:
    """Over three epochs the drops lie in the middle of epochs."""
    config = _config(epochs=3, learning_rate=1.0, step_factor=0.5)
    rates = _rates(config, steps_per_epoch=4)
    assert rates == [1.0] * 6 + [0.5] * 3 + [0.25] * 3


def test_warm_up_rises_linearly_to_the_full_rate() -> None:
    """A warm-up of two epochs rises over its eight steps, then the schedule goes on."""
    config = _config(epochs=8, learning_rate=0.8, warmup_fraction=2 / 8)
    rates = _rates(config, steps_per_epoch=4)
    assert rates[:9] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.8])
    assert rates[15:17] == pytest.approx([0.8, 0.08])


def test_a_warm_up_below_one_step_is_none() -> None:
    """A warm-up shorter than a step never exceeds the full rate."""
    config = _config(epochs=2, learning_rate=0.3, warmup_fraction=0.05)
    assert max(_rates(config, steps_per_epoch=4)) == 0.3


def test_cosine_falls_along_half_a_cosine() -> None:
    """Without warm-up: full, 1/2 + sqrt(2)/4, half, 1/2 - sqrt(2)/4 at the quarters."""
    config = _config(epochs=4, learning_rate=1.0, schedule="cosine")
    rates = _rates(config, steps_per_epoch=1)
    assert rates == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])


def test_one_cycle_rises_and_falls_in_straight_lines() -> None:
    """Up over the warm-up, down to zero just after the last step."""
    config = _config(
        epochs=3, learning_rate=1.0, schedule="one_cycle", warmup_fraction=1 / 3
    )
    rates = _rates(config, steps_per_epoch=2)
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


@given(
    schedule=st.sampled_from(["step", "cosine", "one_cycle"]),
    epochs=st.integers(1, 30),
    steps_per_epoch=st.integers(1, 50),
    share=st.floats(0, 0.99),
)
@settings(deadline=None)
def test_rates_stay_above_zero_and_within_the_full_rate(
    schedule: str, epochs: int, steps_per_epoch: int, share: float
) -> None:
    """No schedule wastes a step at zero, exceeds the rate, or rises after warm-up."""
    config = _config(epochs=epochs, schedule=schedule, warmup_fraction=share)
    rates = _rates(config, steps_per_epoch=steps_per_epoch)
    assert all(0 < rate <= 0.1 + 1e-12 for rate in rates)
    peak = math.ceil(share * epochs * steps_per_epoch)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_the_rate_is_set_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer steps with the schedule's rates in order, and reports the last."""
    used: list[float] = []
    step = optimization.Sgd.step

    def spied(self: optimization.Sgd, *args: Any) -> Any:
        assert len({group["lr"] for group in self.param_groups}) == 1
        used.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(optimization.Sgd, "step", spied)
    config = _config(schedule="cosine", decay_norm_and_bias=False)
    result = _train(config)
    assert used == _rates(config, steps_per_epoch=4)
    assert [e.learning_rate for e in result.epochs] == [used[3], used[7]]


# Optimizer and loss.


def test_all_weights_decay_as_in_the_papers_code() -> None:
    """By default one group decays every parameter, with Nesterov momentum."""
    model = build(SMALL)
    (group,) = optimization.make_optimizer(model, config=_config()).param_groups
    assert len(group["params"]) == len(list(model.parameters()))
    assert (group["weight_decay"], group["momentum"]) == (5e-4, 0.9)
    assert group["nesterov"]


def test_normalisation_and_biases_can_be_spared() -> None:
    """Decay then leaves out exactly the norms' parameters and the head's bias."""
    model = build(SMALL)
    config = _config(decay_norm_and_bias=False)
    decayed, spared = optimization.make_optimizer(model, config=config).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (5e-4, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    norms = {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d)
        for kind in ("weight", "bias")
    }
    assert {names[id(p)] for p in spared["params"]} == norms | {"fc.bias"}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


@pytest.mark.parametrize("decays_all", [False, True])
@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)]
)
def test_each_step_is_torchs_to_the_bit(
    momentum: float, nesterov: bool, decays_all: bool
) -> None:
    """Steps at changing rates leave the weights of torch.optim.SGD, and half-way each
    loads the state dict of the other."""
    config = _config(
        momentum=momentum, nesterov=nesterov, decay_norm_and_bias=decays_all
    )
    models = [build(SMALL, generator=torch.Generator().manual_seed(1)) for _ in "ab"]
    ours, groups = (optimization.make_optimizer(m, config=config) for m in models)
    theirs = torch.optim.SGD(groups.param_groups, fused=True)
    places = [
        [group["params"] for group in one.state_dict()["param_groups"]]
        for one in (ours, theirs)
    ]
    assert places[0] == places[1]
    for step in range(5):
        for optimizer, model in ((ours, models[0]), (theirs, models[1])):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (1 + step)
            optimizer.step()
        for one, other in zip(*(m.parameters() for m in models), strict=True):
            assert one.equal(other)
        if step == 2:
            kept, torchs = (copy.deepcopy(one.state_dict()) for one in (ours, theirs))
            ours.load_state_dict(torchs)
            for param_group in kept["param_groups"]:
                param_group |= theirs.defaults | param_group
            theirs.load_state_dict(kept)


def test_a_parameter_without_gradient_stays() -> None:
    """Neither decay nor velocity moves a weight that has no gradient."""
    model = build(SMALL)
    optimizer = optimization.make_optimizer(model, config=_config())
    before = copy.deepcopy(model.state_dict())
    model.fc.bias.grad = torch.ones_like(model.fc.bias)
    optimizer.step()
    after = model.state_dict()
    changed = {key for key, value in before.items() if not value.equal(after[key])}
    assert changed == {"fc.bias"}
    optimizer.zero_grad()
    assert model.fc.bias.grad is None


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_imports_nothing_that_it_does_not_need(deterministic: bool) -> None:
    """Not torch's compiler, 1.3 s of every process, nor what prepares and plots."""
    folder = preparation.prepare(PLAIN).folder
    code = f"""
import sys, torch
from pathlib import Path
from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.compute import data, training
from resnext_ablate.records.config import DataConfig, TrainConfig
cpu = torch.device("cpu")
training.train(
    parse_spec("resnext11-1x4d-t4-in1-c10"),
    config=TrainConfig(epochs=1, batch_size=64, precision="fp32", kernels="fused"),
    data_config=DataConfig(name="digits", crop_padding=1),
    dataset=data.load(Path({str(folder)!r}), device=cpu),
    seed=0, device=cpu, deterministic={deterministic}, on_epoch=print,
)
print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    assert "resnext_ablate.compute.residual" in loaded
    needless = {"torch._dynamo", "torchvision", "optuna", "pandas", "plotly", "sklearn"}
    assert not needless.intersection(loaded)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_first_loss_is_torchs_smoothed_cross_entropy(smoothing: float) -> None:
    """The train loss is the smoothed one; validation's is the plain one."""
    dataset = _dataset(num_train=10)
    config = _config(
        epochs=1, label_smoothing=smoothing, learning_rate=1e-12, weight_decay=0.0
    )
    result = _train(config, dataset=dataset, data_config=PLAIN)
    seed = data.epoch_generator(0, epoch=0).initial_seed()
    model = build(SMALL, generator=torch.Generator().manual_seed(seed))
    images = (dataset.train.images.permute(0, 3, 1, 2) / 255 - 0.4) / 0.2
    logits = model.train()(images)
    expected = F.cross_entropy(logits, dataset.train.labels, label_smoothing=smoothing)
    assert result.epochs[0].train_loss == pytest.approx(expected.item(), rel=1e-4)
    wrong = (logits.argmax(dim=1) != dataset.train.labels).sum().item()
    assert result.epochs[0].train_error_pct == pytest.approx(100 * wrong / 10)
    with torch.no_grad():
        images = (dataset.val.images.permute(0, 3, 1, 2) / 255 - 0.4) / 0.2
        logits = model.eval()(images)
    expected = F.cross_entropy(logits, dataset.val.labels)
    assert result.epochs[0].val_loss == pytest.approx(expected.item(), rel=1e-4)


# What a run gives.


def test_a_run_learns_digits(digits: Dataset) -> None:
    """A small net reaches less than 10 % test error on real digits within seconds."""
    told: list[EpochRecord] = []
    result = _train(
        _config(
            epochs=6,
            batch_size=64,
            schedule="one_cycle",
            warmup_fraction=0.25,
            precision="fp32",
        ),
        name="resnext11-1x8d-t8-in1",
        dataset=digits,
        data_config=PLAIN,
        on_epoch=told.append,
    )
    assert result.test_error_pct < 10
    assert tuple(told) == result.epochs
    assert [metrics.epoch for metrics in told] == [1, 2, 3, 4, 5, 6]
    assert told[0].train_error_pct > told[-1].train_error_pct
    assert told[-1].val_error_pct < 15
    assert result.correct.dtype == np.bool_ and result.correct.shape == (359,)
    assert result.test_error_pct == pytest.approx(100 * (1 - result.correct.mean()))
    assert result.train_time_s == pytest.approx(sum(m.time_s for m in told))
    images = 6 * 20 * 64
    assert result.images_per_s == pytest.approx(images / result.train_time_s)
    assert told[0].images_per_s == pytest.approx(20 * 64 / told[0].time_s)
    assert result.device.startswith("cpu: ") and result.precision == "fp32"


def test_bf16_learns_as_well(digits: Dataset) -> None:
    """bf16 with spared norms, smoothing and cosine learns digits, and differs."""
    config = _config(
        epochs=5,
        batch_size=64,
        schedule="cosine",
        warmup_fraction=0.2,
        precision="bf16",
        label_smoothing=0.1,
        decay_norm_and_bias=False,
        channels_last=False,
    )
    net = "resnext11-2x4d-t8-in1"
    result = _train(config, name=net, dataset=digits, data_config=PLAIN)
    assert result.test_error_pct < 15 and result.precision == "bf16"
    fp32 = config.model_copy(update={"precision": "fp32", "epochs": 2})
    short = config.model_copy(update={"epochs": 2})
    first, second = (
        _train(c, name=net, dataset=digits, data_config=PLAIN) for c in (fp32, short)
    )
    assert first.epochs[0].train_loss != second.epochs[0].train_loss
    assert first.epochs[0].train_loss == pytest.approx(
        second.epochs[0].train_loss, rel=0.1
    )


class _Sealed:
    """A split that may be read only once it has been opened, and counts its uses."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self.is_open = False
        self.uses = 0

    @property
    def images(self) -> torch.Tensor:
        assert self.is_open, "the test split was read before the last epoch's end"
        self.uses += 1
        return self._split.images

    @property
    def labels(self) -> torch.Tensor:
        assert self.is_open, "the test split was read before the last epoch's end"
        return self._split.labels


def test_the_test_split_is_scored_once_at_the_end() -> None:
    """Nothing reads the test split before the last epoch; then one pass does."""
    dataset = _dataset()
    sealed: Any = _Sealed(dataset.test)
    dataset = dataclasses.replace(dataset, test=sealed)

    def on_epoch(metrics: EpochRecord) -> None:
        sealed.is_open = metrics.epoch == 3

    _train(_config(epochs=3), dataset=dataset, on_epoch=on_epoch)
    assert sealed.uses == 1


@pytest.mark.parametrize(
    ("num_bytes", "images"), [(10 * 16 * 8 * 8 * 4, 10), (1, 8), (4 << 20, 4 * 20)]
)
def test_evaluation_takes_what_a_cache_holds(
    monkeypatch: pytest.MonkeyPatch, num_bytes: int, images: int
) -> None:
    """As many images as have room, each with 16 x 8 x 8 values: from 8 to 4 batches.

    The numbers are those of any other size.
    """
    sizes = []
    own = Dataset.eval_batches

    def spied(self: Dataset, *args: Any, batch_size: int, **kwargs: Any) -> Any:
        sizes.append(batch_size)
        return own(self, *args, batch_size=batch_size, **kwargs)

    expected = _train(_config(batch_size=20), dataset=_dataset(num_eval=100))
    monkeypatch.setattr(Dataset, "eval_batches", spied)
    monkeypatch.setattr(training, "_EVAL_BYTES", num_bytes)
    result = _train(_config(batch_size=20), dataset=_dataset(num_eval=100))
    assert set(sizes) == {images}
    assert _numbers(result) == pytest.approx(_numbers(expected), rel=1e-4)


def test_what_on_epoch_raises_ends_the_run() -> None:
    """A pruner's exception passes through, and switches are put back."""

    def stop(metrics: EpochRecord) -> None:
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyError("pruned")

    with pytest.raises(KeyError, match="pruned"):
        _train(_config(), on_epoch=stop)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_set_below_one_batch_is_trained_whole() -> None:
    """Batches larger than the training split take all of it, and rates count it."""
    result = _train(_config(batch_size=64), dataset=_dataset(num_train=8))
    first = result.epochs[0]
    assert first.images_per_s == pytest.approx(8 / first.time_s)


# Seeds.


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kernels", ["torch", "fused"])
def test_the_same_seed_gives_the_same_numbers(precision: str, kernels: str) -> None:
    """Bit for bit, after other work in the process and other draws as well."""
    name = "resnext11-4x2d-t4-in1-c4"
    convs = parse_spec(name).layout(8).convs
    forms = {conv_key(conv): "merge2" for conv in convs if conv.groups > 1}
    config = _config(epochs=2, precision=precision, kernels=kernels, conv_forms=forms)
    first = _numbers(_train(config, name=name))
    torch.manual_seed(99)
    torch.rand(7)
    _train(config, seed=5, name="resnext11-2x2d-t4-in1-c4")
    assert _numbers(_train(config, name=name)) == first
    assert _numbers(_train(config, name=name, seed=1)) != first


def test_the_fast_path_is_as_accurate_as_the_plain_loop(digits: Dataset) -> None:
    """bf16, fused kernels and merged groups err as plain fp32 does, within the seeds'
    noise: means of three seeds differ by less than three standard errors and a point.
    """
    name = "resnext11-8x2d-t8-in1"
    convs = parse_spec(name).layout(8).convs
    recipe = {"epochs": 4, "batch_size": 64, "schedule": "one_cycle"}
    plain = _config(
        **recipe,
        warmup_fraction=0.25,
        precision="fp32",
        kernels="torch",
        conv_forms={},
        channels_last=False,
    )
    fast = _config(
        **recipe,
        warmup_fraction=0.25,
        precision="bf16",
        kernels="fused",
        conv_forms={
            conv_key(conv): "merge4" if conv.groups > 1 else "matmul"
            for conv in convs
            if conv.groups > 1 or conv.kernel_size == 1
        },
    )
    errors = np.array(
        [
            [
                _train(
                    config, name=name, seed=seed, dataset=digits, data_config=PLAIN
                ).test_error_pct
                for seed in range(3)
            ]
            for config in (plain, fast)
        ]
    )
    standard_error = np.sqrt(errors.var(axis=1, ddof=1).sum() / 3)
    difference = errors[1].mean() - errors[0].mean()
    assert errors.max() < 15
    assert abs(difference) < 3 * standard_error + 1, errors


def test_a_run_leaves_global_random_state_alone() -> None:
    """Training draws nothing from the generators of torch and numpy."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    _train(_config(epochs=1))
    assert torch.get_rng_state().equal(before)


def test_variants_see_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one seed every net gets the same images, labels and augmentation."""
    seen: dict[str, list[torch.Tensor]] = {}
    update = graphs.update
    for name in ("resnext11-1x4d-t4-in1-c4", "resnext11-4x3d-t8-in1-c4"):
        kept = seen.setdefault(name, [])

        def spied(
            learner: Any, batch: data.Batch, *, kept: Any = kept, **rest: Any
        ) -> Any:
            kept.extend((batch.images.clone(), batch.labels.clone()))
            return update(learner, batch, **rest)

        monkeypatch.setattr(graphs, "update", spied)
        _train(_config(), name=name, seed=3)
    first, second = seen.values()
    assert len(first) == 16
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    assert not first[0].equal(first[8]), "epochs must differ"


def test_initial_weights_differ_from_seed_to_seed() -> None:
    """Seeds decide the weights too: a first step on one batch loses differently."""
    losses = {
        _train(_config(epochs=1, batch_size=40), seed=seed, data_config=PLAIN)
        .epochs[0]
        .train_loss
        for seed in (0, 1)
    }
    assert len(losses) == 2


# Faults.


def test_a_diverging_run_names_the_first_bad_step() -> None:
    """An absurd rate stops the run at the first loss that is not finite."""
    with pytest.raises(NonFiniteLossError, match=r"train loss is (nan|inf)") as caught:
        _train(_config(epochs=9, learning_rate=1e30, weight_decay=0.1))
    error = caught.value
    assert f"at epoch {error.epoch}, step {error.step};" in str(error)
    assert error.epoch == 1 and 2 <= error.step <= 4


@pytest.mark.parametrize(("interval", "looks"), [(1, [3]), (2, [4]), (100, [5])])
def test_the_first_bad_step_is_named_however_often_one_looks(
    interval: int, looks: list[int]
) -> None:
    """Looking every 1, 2 or 100 steps finds the same step, later, of the seed alone
    that it is of."""
    losses = torch.ones(5, 2)
    losses[:, 1] = torch.tensor([1.0, 2.0, math.nan, math.inf, math.nan])
    found = []
    for step in range(1, 6):
        if step % interval == 0 or step == 5:
            bad = training._diverged(losses[:step], interval=interval, epoch=2)
            if bad:
                assert bad.keys() == {1}
                assert (bad[1].epoch, bad[1].step) == (2, 3)
                found.append(step)
                break
    assert found == looks


def test_a_validation_loss_that_is_not_finite_stops_the_run() -> None:
    """Weights ruined by an epoch's last step are noticed on the validation split."""
    config = _config(epochs=1, batch_size=40, learning_rate=1e38)
    with pytest.raises(NonFiniteLossError, match=r"validation loss is .* step 1"):
        _train(config)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnext11-1x4d-t4-in1", "num_classes must be 4, as in the data set made"),
        ("resnext11-1x4d-t4-c4", "in_channels must be 1, .*; got 3"),
        ("resnext50-1x4d-t4-in1-c4", "image_size must be at least 32"),
    ],
)
def test_a_net_that_does_not_fit_the_data_is_refused(name: str, expected: str) -> None:
    """Classes, channels and image size of net and data must agree."""
    with pytest.raises(InputError, match=expected):
        _train(_config(), name=name)


# Hardware.


def test_precision_is_kept_or_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for stays; auto takes bf16 only where it is clearly faster."""
    for precision in ("fp32", "bf16"):
        assert hardware.resolve_precision(precision, device=CPU) == precision
    assert hardware.resolve_precision("auto", device=CPU) in ("fp32", "bf16")
    for bf16_s, expected in ((0.5, "bf16"), (0.9, "fp32"), (3.0, "fp32")):
        times = {"fp32": 1.0, "bf16": bf16_s}
        monkeypatch.setattr(hardware, "_probe_s", times.__getitem__)
        assert hardware.resolve_precision("auto", device=CPU) == expected


def test_runs_share_gpus_where_they_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many executors per GPU; on a CPU, or without room, the message says what is
    possible."""
    two = ("cuda:0", "cuda:1")

    def placed(found: tuple[str, ...], runs_per_device: int) -> tuple[str, ...]:
        return hardware.placed(
            found, executors="auto", runs_per_device=runs_per_device, devices_per_run=1
        )

    assert placed(two, 3) == two * 3
    assert len(placed(("cpu",), 1)) >= 1
    with pytest.raises(InputError, match="runs_per_device = 2: runs share GPUs only"):
        placed(("cpu",), 2)

    gpu = SimpleNamespace(total_memory=10_000 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    hardware.check_room(two * 3, run_mib=2400)  # 3 x (2400 + 600) = 9000
    with pytest.raises(InputError, match=r"3 runs .* cuda:0.*runs_per_device = 2\."):
        hardware.check_room(two * 3, run_mib=2500)
    hardware.check_room(("cuda:0",), run_mib=50_000)  # Smaller batches may still do.
    hardware.check_room(("cpu", "cpu"), run_mib=1e9)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peaks are reset on Linux"
)
def test_peak_memory_is_of_this_run_alone() -> None:
    """The peak rises with memory in use and falls again after a reset."""
    hardware.reset_peak_memory(CPU)
    before = hardware.peak_memory_mib(CPU)
    block = np.ones(64 * 2**20, dtype=np.uint8)
    assert hardware.peak_memory_mib(CPU) >= before + 60
    del block
    hardware.reset_peak_memory(CPU)
    assert hardware.peak_memory_mib(CPU) < before + 30


def test_kernel_choice_is_put_back() -> None:
    """Deterministic mode sets torch's switches and restores what was there."""
    cudnn = torch.backends.cudnn
    before = (cudnn.deterministic, cudnn.benchmark)
    with hardware.kernel_choice(deterministic=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
    with hardware.kernel_choice(deterministic=False):
        assert not torch.are_deterministic_algorithms_enabled()
        assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
    assert (cudnn.deterministic, cudnn.benchmark) == before
    assert not torch.are_deterministic_algorithms_enabled()


def _learner(**fields: Any) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    config = _config(kernels="torch", **fields)
    return learner.new_learner(
        SMALL, generators=generators, config=config, image_size=8, device=CPU
    )


def _joint_batches(count: int) -> list[data.Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        data.Batch(
            torch.randn(10, 2, 8, 8, generator=generator),
            torch.randint(4, (10, 2), generator=generator),
        )
        for _ in range(count)
    ]


def test_a_captured_step_is_the_step() -> None:
    """Three steps are eager, one is captured, and from then on it is replayed: losses,
    wrong answers and weights are those of eager steps, at every rate."""
    eager, captured = _learner(), _learner()
    capture = Again()
    step = graphs.GraphedStep(captured, capture=capture)
    wrong = torch.zeros(2, 2, dtype=torch.int64)
    for number, batch in enumerate(_joint_batches(7)):
        rate = 0.05 / (1 + number)
        expected = learner.update(eager, batch, learning_rate=rate, wrong=wrong[0])
        found = step(batch, learning_rate=rate, wrong=wrong[1])
        torch.testing.assert_close(found, expected)
        assert wrong[0].equal(wrong[1])
    assert capture.done == ["beside"] * 3 + ["record"] + ["replay"] * 4
    for one, other in zip(
        eager.model.parameters(), captured.model.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_step_that_cannot_be_captured_stays_eager() -> None:
    """The run goes on as it began; memory that runs out is for the scheduler."""
    capture = Again(error=RuntimeError("operation not permitted when capturing"))
    step = graphs.GraphedStep(_learner(), capture=capture)
    wrong = torch.zeros(2, dtype=torch.int64)
    for batch in _joint_batches(6):
        assert step(batch, learning_rate=0.1, wrong=wrong).isfinite().all()
    assert capture.done == ["beside"] * 6
    full = Again(error=torch.OutOfMemoryError("CUDA out of memory"))
    step = graphs.GraphedStep(_learner(), capture=full)
    with pytest.raises(torch.OutOfMemoryError):
        for batch in _joint_batches(4):
            step(batch, learning_rate=0.1, wrong=wrong)


def test_a_cpu_steps_as_ever() -> None:
    """Graphs are for CUDA alone."""
    assert not isinstance(graphs.step_of(_learner()), graphs.GraphedStep)


def _on_cuda() -> tuple[torch.device, Dataset]:
    device = torch.device("cuda")
    on_cpu = _dataset()
    splits = {
        name: Split(split.images.to(device), split.labels.to(device))
        for name in ("train", "val", "test")
        for split in [getattr(on_cpu, name)]
    }
    moments = {"mean": on_cpu.mean.to(device), "std": on_cpu.std.to(device)}
    return device, dataclasses.replace(on_cpu, **splits, **moments)


def _train_on_cuda() -> RunResult:
    device, dataset = _on_cuda()
    return training.train(
        SMALL,
        config=_config(epochs=4, precision="bf16", schedule="cosine"),
        data_config=AUGMENTED,
        dataset=dataset,
        seed=0,
        device=device,
        deterministic=True,
        on_epoch=lambda metrics: None,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_repeats_itself_and_never_waits_within_an_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On CUDA the same seed gives the same numbers, and captured steps do not
    synchronise."""
    call = graphs.GraphedStep.__call__
    num_replayed = 0

    def without_waiting(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal num_replayed
        num_replayed += self._is_captured
        torch.cuda.set_sync_debug_mode("error" if self._is_captured else "default")
        try:
            return call(self, *arguments, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(graphs.GraphedStep, "__call__", without_waiting)
    first, second = _train_on_cuda(), _train_on_cuda()
    assert _numbers(first) == _numbers(second)
    assert num_replayed == 2 * (4 * 4 - 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_learns_as_eager_steps_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of all epochs agree with steps that are never captured."""
    captured = _train_on_cuda()
    monkeypatch.setattr(graphs, "_NUM_EAGER", 10**6)
    eager = _train_on_cuda()
    assert _numbers(captured) == pytest.approx(_numbers(eager), rel=1e-3)
