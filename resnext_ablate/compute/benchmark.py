"""What nets cost on a device: time of a training step and of a forward pass, memory.

Nets are measured in a process of their own, in the environment and with the step of a
run: a CPU's allocator reads its settings when a process starts. Repeats go round all
nets in turn, so that a busy moment hits each of them, and each net is compared with the
reference within the same round.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from resnext_ablate.architecture.roofline import training_floor_s
from resnext_ablate.architecture.spec import MeasuringError, ResNeXtSpec, spec_from_dict
from resnext_ablate.compute import tuning
from resnext_ablate.compute.data import Batch, EpochDraws, augment, draw_epoch
from resnext_ablate.compute.graphs import Step, step_of
from resnext_ablate.compute.hardware import (
    TRAINING_ENVIRONMENT,
    Precision,
    device_name,
    kernel_choice,
)
from resnext_ablate.compute.learner import Learner, evaluator, new_learner, update
from resnext_ablate.compute.peaks import clock, measure_peaks, timed_s
from resnext_ablate.compute.together import joint_batch
from resnext_ablate.records.certificate import (
    DeviceCosts,
    NetCost,
    Spread,
    costs_from,
    spread_of,
)
from resnext_ablate.records.config import TrainConfig

_WARM_UP_ROUNDS = 5  # A CUDA graph is captured in the fourth.
_MAX_ROUNDS = 101
_CROP_PADDING = 4


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How nets are measured: as the runs of a study would train them."""

    train: TrainConfig
    """Batch size, layout and optimizer; precision must not be `auto`."""
    image_size: int
    device: str
    deterministic: bool = True
    num_threads: int = 1
    """Of a CPU; runs train on one each."""
    seconds_per_net: float = 3.0
    """About how long the repeats of one net may take, once there are `min_repeats`."""
    min_repeats: int = 9


def measure(specs: Sequence[ResNeXtSpec], *, setup: Setup) -> DeviceCosts:
    """Measures nets beside the first of them, in a process of its own.

    Takes about `setup.seconds_per_net` for each net, and some seconds to start.

    Args:
        specs: the nets, the reference first; equal ones are measured once each.
        setup: how.

    Raises:
        InputError: the images are smaller than a net's total stride.
        MeasuringError: the process failed, for want of memory perhaps.
    """
    for spec in specs:
        spec.layout(setup.image_size)
    job = {
        "specs": [spec.to_dict() for spec in specs],
        "setup": {
            **{
                field.name: getattr(setup, field.name)
                for field in dataclasses.fields(setup)
            },
            "train": setup.train.model_dump(mode="json"),
        },
    }
    threads = str(setup.num_threads)
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            **TRAINING_ENVIRONMENT,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
        },
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        last = lines[-1] if lines else f"exit code {done.returncode}"
        raise MeasuringError(f"nets could not be measured: {last}")
    return costs_from(json.loads(done.stdout.splitlines()[-1]))


def measure_here(specs: Sequence[ResNeXtSpec], *, setup: Setup) -> DeviceCosts:
    """As `measure`, in this process and its environment."""
    device = torch.device(setup.device)
    torch.set_num_threads(setup.num_threads)
    setup = _with_forms(setup, specs, device=device)
    with kernel_choice(deterministic=setup.deterministic):
        benches = [_bench(spec, setup=setup, device=device) for spec in specs]
        steps, forwards = _interleaved(benches, setup=setup, device=device)
        memory = [_peak_memory_mib(bench, device=device) for bench in benches]
    peaks = measure_peaks(device, precision=_precision(setup))
    nets = tuple(
        NetCost(
            name=spec.name,
            step_s=spread_of(steps[at]),
            forward_s=spread_of(forwards[at]),
            step_floor_s=training_floor_s(
                spec,
                image_size=setup.image_size,
                batch_size=setup.train.batch_size,
                peaks=peaks,
            ),
            peak_memory_mib=memory[at],
            step_time_error_pct=_error_pct(steps[at], steps[0]),
            peak_memory_error_pct=100 * (memory[at] / memory[0] - 1),
        )
        for at, spec in enumerate(specs)
    )
    return DeviceCosts(
        device=device_name(device),
        num_threads=setup.num_threads,
        precision=_precision(setup),
        channels_last=setup.train.channels_last,
        deterministic=setup.deterministic,
        batch_size=setup.train.batch_size,
        image_size=setup.image_size,
        peaks=peaks,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        torch_version=torch.__version__,
        nets=nets,
    )


@dataclass(frozen=True)
class _Bench:
    """A net with all that its steps need, and one batch as a data set holds it.

    images: uint8 (N, H, W, C); labels: int64 (N,).
    """

    learner: Learner
    images: Tensor
    labels: Tensor
    draws: EpochDraws
    wrong: Tensor
    take_step: Step

    def step(self) -> None:
        """A step of training, from the images as a data set holds them."""
        rate = self.learner.config.learning_rate
        self.take_step(self._batch(), learning_rate=rate, wrong=self.wrong)

    def step_in_parts(self) -> None:
        """The same, each kernel on its own: what a graph holds is not seen to grow."""
        rate = self.learner.config.learning_rate
        update(self.learner, self._batch(), learning_rate=rate, wrong=self.wrong)

    def forward(self) -> Callable[[], object]:
        """A forward pass as in evaluation, of the net as it is now."""
        logits_of, images = evaluator(self.learner), self._batch().images
        return lambda: logits_of(images)

    def _batch(self) -> Batch:
        channels = self.images.shape[-1]
        moments = torch.full((2, channels), 0.5, device=self.images.device)
        images = augment(
            self.images,
            positions=self.draws.order,
            shift=self.draws.shift,
            mirrored=self.draws.mirrored,
            mean=moments[0],
            std=moments[1],
        )
        return joint_batch([Batch(images, self.labels)])


def _with_forms(
    setup: Setup, specs: Sequence[ResNeXtSpec], *, device: torch.device
) -> Setup:
    """The setup with the form of each convolution settled, as a study settles it."""
    layouts = [spec.layout(setup.image_size) for spec in specs]
    train = tuning.with_forms(
        setup.train,
        convs=[conv for layout in layouts for conv in layout.convs],
        device=device,
    )
    return replace(setup, train=train)


def _bench(spec: ResNeXtSpec, *, setup: Setup, device: torch.device) -> _Bench:
    generator = torch.Generator().manual_seed(0)
    count, side = setup.train.batch_size, setup.image_size
    learner = new_learner(
        spec,
        generators=[generator],
        config=setup.train,
        image_size=side,
        device=device,
    )
    size = (count, side, side, spec.in_channels)
    images = torch.randint(256, size, generator=generator, dtype=torch.uint8)
    labels = torch.randint(spec.num_classes, (count,), generator=generator)
    draws = draw_epoch(
        count, crop_padding=_CROP_PADDING, flip=True, generator=generator
    )
    return _Bench(
        learner=learner,
        images=images.to(device),
        labels=labels.to(device),
        draws=EpochDraws(
            *(one.to(device) for one in (draws.order, draws.shift, draws.mirrored))
        ),
        take_step=step_of(learner),
        wrong=torch.zeros(1, dtype=torch.int64, device=device),
    )


def _interleaved(
    benches: Sequence[_Bench], *, setup: Setup, device: torch.device
) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of each net's steps and forward passes, a round of all at a time."""
    seconds = clock(device, num_threads=setup.num_threads)
    steps: list[list[float]] = [[] for _ in benches]
    forwards: list[list[float]] = [[] for _ in benches]
    rounds, start = -_WARM_UP_ROUNDS, time.perf_counter()
    while rounds < setup.min_repeats or (
        rounds < _MAX_ROUNDS
        and time.perf_counter() - start < setup.seconds_per_net * len(benches)
    ):
        if rounds == 0:
            start = time.perf_counter()
        # Another net begins each round: none is always behind the same neighbour.
        for turn in range(len(benches)):
            at = (rounds + turn) % len(benches)
            benches[at].learner.model.train()
            step_s = timed_s(benches[at].step, clock=seconds)
            forward_s = timed_s(benches[at].forward(), clock=seconds)
            if rounds >= 0:
                steps[at].append(step_s)
                forwards[at].append(forward_s)
        rounds += 1
    return steps, forwards


def _peak_memory_mib(bench: _Bench, *, device: torch.device) -> float:
    """Largest memory of all the net's tensors at once, in a training step.

    Allocations count, not pages: the same step gives the same number each time.
    """
    # Gradients are the step's own: those of the last step must not count as well.
    bench.learner.optimizer.zero_grad()
    bench.learner.model.train()
    held = _held_bytes(bench)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        bench.step_in_parts()
        torch.cuda.synchronize(device)
        grown = torch.cuda.max_memory_allocated(device) - before
    else:
        grown = _grown_on_cpu(bench)
    return (held + grown) / 2**20


def _grown_on_cpu(bench: _Bench) -> int:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    # torch 2.11 warns of what comes after one cycle unless events are kept.
    with profile(activities=activities, profile_memory=True, acc_events=True) as seen:
        bench.step_in_parts()
    results: Any = seen.profiler
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in results.kineto_results.events()
        if event.name() == "[memory]"
    )
    held = peak = 0
    for _, num_bytes in changes:
        held += num_bytes
        peak = max(peak, held)
    return peak


def _held_bytes(bench: _Bench) -> int:
    """Of what stays between two steps: weights, statistics and momentum."""
    model, states = bench.learner.model, bench.learner.optimizer.state.values()
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [
        value
        for state in states
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _error_pct(times: Sequence[float], reference: Sequence[float]) -> Spread:
    pairs = zip(times, reference, strict=True)
    return spread_of([100 * (ours / theirs - 1) for ours, theirs in pairs])


def _precision(setup: Setup) -> Precision:
    assert setup.train.precision != "auto", "resolved before nets are measured"
    return setup.train.precision


def _serve() -> None:
    """The measuring process: a job from standard input, costs on standard output."""
    job = json.loads(sys.stdin.read())
    given = job["setup"]
    setup = Setup(**{**given, "train": TrainConfig.model_validate(given["train"])})
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # What libraries print must not garble the answer.
    costs = measure_here([spec_from_dict(one) for one in job["specs"]], setup=setup)
    answers.write(json.dumps(dataclasses.asdict(costs)) + "\n")
    answers.flush()


if __name__ == "__main__":
    _serve()
