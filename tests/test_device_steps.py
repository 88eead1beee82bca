"""What training does on a device beside the CPU, followed operation by operation.

Tensors without memory, torch's `meta` device, stand in for those of a GPU: to read a
value back is an error there, where a GPU would be waited for. Kernels of Triton are
noted in place of being launched. What autocast would cast stays float32.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from replays import Again
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.compute import graphs, layers, learner, training, training_state
from resnext_ablate.compute.data import Batch, DataInfo, Dataset, Split
from resnext_ablate.records.config import DataConfig, TrainConfig

DEVICE = torch.device("meta")
SPEC = parse_spec("resnext11-8x16d-t4")
SIDE = 16


class _Followed(TorchDispatchMode):
    """Counts operations by name, and those that see or make a tensor of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.done = Counter[str]()
        self.on_cpu = Counter[str]()
        self.across = Counter[str]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        # torch has no shapes of what this one returns: nothing.
        is_update = name == "_fused_sgd_"
        out = None if is_update else function(*args, **(kwargs or {}))
        seen = tree_leaves((args, kwargs, out))
        devices = {one.device.type for one in seen if isinstance(one, Tensor)}
        self.done[name] += 1
        self.on_cpu[name] += devices == {"cpu"}
        self.across[name] += len(devices) > 1
        return out


class _Noted:
    """In place of a kernel: its launches are counted, on tensors of the device."""

    def __init__(self, name: str, launches: Counter[str]) -> None:
        self._name, self._launches = name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, num_warps: int = 4) -> None:
        tensors = [one for one in arguments if isinstance(one, Tensor)]
        assert tensors and all(one.is_meta for one in tensors), self._name
        self._launches[self._name] += 1


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel of Triton would have been launched."""
    triton = pytest.importorskip("triton")
    from resnext_ablate.compute import triton_conv, triton_kernels

    found = Counter[str]()
    for module in (triton_conv, triton_kernels):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction):
                monkeypatch.setattr(module, name, _Noted(name, found))
    return found


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without memory passes for one with kernels of its own."""
    monkeypatch.setattr(learner, "_autocast", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(layers, "_autocast", lambda features: features)
    monkeypatch.setattr(layers, "_check_device", lambda conv, module: None)
    monkeypatch.setattr(learner, "resolve_kernels", lambda kernels, **_: kernels)


def _learner(
    kernels: str, form: str, *, num_seeds: int = 1, num_micro_batches: int = 1
) -> learner.Learner:
    convs = SPEC.layout(SIDE).times(num_seeds).convs
    forms = {
        layers.conv_key(conv): form
        for conv in convs
        if form and conv.groups > conv.copies
    }
    config = TrainConfig.model_validate(
        {
            "epochs": 1,
            "batch_size": 8,
            "precision": "fp32",
            "kernels": kernels,
            "conv_forms": forms,
        }
    )
    return learner.new_learner(
        SPEC,
        generators=[torch.Generator().manual_seed(seed) for seed in range(num_seeds)],
        config=config,
        image_size=SIDE,
        device=DEVICE,
        num_micro_batches=num_micro_batches,
    )


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize(
    ("kernels", "form"),
    [
        ("torch", ""),
        ("torch", "nchw+merge2"),
        ("torch", "triton"),
        ("fused", ""),
        ("fused", "merge2"),
        ("fused", "triton+merge2"),
    ],
)
def test_a_step_stays_on_its_device(
    kernels: str, form: str, num_seeds: int, launches: Counter[str]
) -> None:
    """Whatever the kernels and forms, for one seed or several: nothing that it reads,
    makes or asks for is on the CPU, so that a CUDA graph can hold all of it."""
    one = _learner(kernels, form, num_seeds=num_seeds, num_micro_batches=2)
    one.model.train()
    images = torch.empty(8, 3 * num_seeds, SIDE, SIDE, device=DEVICE)
    labels = torch.empty(8, num_seeds, dtype=torch.int64, device=DEVICE)
    wrong = torch.empty(num_seeds, dtype=torch.int64, device=DEVICE)
    rate = torch.empty((), device=DEVICE)
    batch = Batch(images.to(memory_format=torch.channels_last), labels)
    with _Followed() as followed:
        losses = learner.update(one, batch, learning_rate=rate, wrong=wrong)
    assert losses.shape == (num_seeds,) and losses.is_meta
    assert not +followed.on_cpu and not +followed.across
    assert followed.done["_fused_sgd_"] == 1
    # Two parts of a batch, three blocks.
    assert launches["_weight_parts"] == 2 * 3 * ("triton" in form)
    assert launches["relu_of_sum_backward"] == 2 * 3 * (kernels == "fused")


def _run(*, num_train: int, num_eval: int) -> training_state.Run:
    def split(count: int) -> Split:
        size = (count, SIDE, SIDE, 3)
        images = torch.empty(size, dtype=torch.uint8, device=DEVICE)
        return Split(images, torch.empty(count, dtype=torch.int64, device=DEVICE))

    one = _learner("fused", "triton")
    info = DataInfo(
        name="none",
        num_classes=SPEC.num_classes,
        class_names=tuple(map(str, range(SPEC.num_classes))),
        in_channels=3,
        image_size=SIDE,
        num_train=num_train,
        num_val=num_eval,
        num_test=num_eval,
        checksum="",
        corrupt_files=(),
    )
    dataset = Dataset(
        train=split(num_train),
        val=split(num_eval),
        test=split(num_eval),
        mean=torch.empty(3, device=DEVICE),
        std=torch.empty(3, device=DEVICE),
        info=info,
    )
    return training_state.Run(
        learner=one,
        step=graphs.GraphedStep(one, capture=Again()),
        config=one.config,
        data_config=DataConfig(name="digits", crop_padding=2),
        dataset=dataset,
        seeds=(
            training_state.Seed(seed=0, on_epoch=lambda _: None, on_end=lambda _: None),
        ),
        device=DEVICE,
        should_stop=training.never,
    )


@pytest.mark.usefixtures("launches")
def test_an_epoch_asks_for_nothing_before_its_losses_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The draws of an epoch go to the device once, and nothing comes back: images,
    crops and steps follow each other there, whatever the number of steps. Eight
    batches are augmented at once."""
    looks: list[int] = []

    def look(losses: Tensor, *, interval: int, epoch: int) -> dict[int, Any]:
        looks.append(len(losses))
        return {}

    monkeypatch.setattr(training, "_diverged", look)
    run = _run(num_train=240, num_eval=8)
    progress = training_state.fresh_epoch(run, epochs=[()], live={0})
    with _Followed() as followed:
        training._train_epoch(run, progress)
    assert followed.done["_fused_sgd_"] == progress.step == 30 and looks == [30]
    assert +followed.across == Counter({"_to_copy": 3})  # order, shift, mirrored
    assert followed.done["gather"] == -(-30 // 8)


@pytest.mark.usefixtures("launches")
def test_evaluation_asks_for_its_answers_once_all_are_there() -> None:
    """The first value that is read back is the sum of the last batch's losses too."""
    run = _run(num_train=8, num_eval=200)
    progress = training_state.fresh_epoch(run, epochs=[()], live={0})
    with (
        _Followed() as followed,
        pytest.raises(NotImplementedError, match="Cannot copy out of meta"),
    ):
        training._evaluate(run, "val", progress=progress)
    num_batches = -(-200 // (training._EVAL_BATCH_FACTOR * 8))
    assert followed.done["argmax"] == num_batches > 1
    assert not +followed.across
