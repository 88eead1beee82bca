"""What it brings to train seeds as one net.

Run as `python -m resnext_ablate.compute.fuse_bench NET`.

A training step of one seed and one of several as one net take turns, in seconds of one
CPU thread or of the device, so that a busy moment hits all.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from resnext_ablate.architecture.names import parse_spec
from resnext_ablate.architecture.spec import ResNeXtSpec
from resnext_ablate.compute import hardware, tuning
from resnext_ablate.compute.data import Batch
from resnext_ablate.compute.learner import Learner, new_learner, update
from resnext_ablate.compute.peaks import clock, timed_s
from resnext_ablate.compute.together import joint_batch
from resnext_ablate.records.config import TrainConfig

_ROUNDS = 25
_WARM_UP_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class FusedStep:
    """A step of several seeds as one net."""

    num_seeds: int
    step_s: float
    """Median."""
    speedup: float
    """Over steps of as many seeds one by one."""


def measure_fused(
    spec: ResNeXtSpec,
    *,
    train: TrainConfig,
    image_size: int,
    device: torch.device,
    counts: Sequence[int],
) -> tuple[FusedStep, ...]:
    """Times training steps of some numbers of seeds, one alone among them.

    Args:
        spec: the net.
        train: how; its precision settled.
        image_size: pixels of a side.
        device: where. On a CPU the caller sets the number of threads.
        counts: of seeds.
    """
    layout = spec.layout(image_size)
    counts = sorted({1, *counts})
    train = tuning.with_forms(
        train,
        convs=[conv for count in counts for conv in layout.times(count).convs],
        device=device,
    )
    benches = [
        _bench(spec, count=count, train=train, image_size=image_size, device=device)
        for count in counts
    ]
    times: list[list[float]] = [[] for _ in benches]
    seconds = clock(device, num_threads=torch.get_num_threads())
    with hardware.kernel_choice(deterministic=True):
        for _ in range(_WARM_UP_ROUNDS + _ROUNDS):
            for bench, own in zip(benches, times, strict=True):
                own.append(timed_s(bench.step, clock=seconds))
    medians = [statistics.median(own[_WARM_UP_ROUNDS:]) for own in times]
    return tuple(
        FusedStep(num_seeds=count, step_s=step_s, speedup=count * medians[0] / step_s)
        for count, step_s in zip(counts, medians, strict=True)
    )


@dataclass(frozen=True)
class _Bench:
    learner: Learner
    batch: Batch
    wrong: torch.Tensor

    def step(self) -> None:
        rate = self.learner.config.learning_rate
        update(self.learner, self.batch, learning_rate=rate, wrong=self.wrong)


def _bench(
    spec: ResNeXtSpec,
    *,
    count: int,
    train: TrainConfig,
    image_size: int,
    device: torch.device,
) -> _Bench:
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    learner = new_learner(
        spec,
        generators=generators,
        config=train,
        image_size=image_size,
        device=device,
    )
    size = (train.batch_size, image_size, image_size, spec.in_channels)
    batches = []
    for draw in generators:
        pixels = torch.randn(size, generator=draw).permute(0, 3, 1, 2)
        labels = torch.randint(spec.num_classes, size[:1], generator=draw)
        batches.append(Batch(pixels.to(device), labels.to(device)))
    wrong = torch.zeros(count, dtype=torch.int64, device=device)
    return _Bench(learner, joint_batch(batches), wrong)


def main() -> None:
    """Prints a line for each batch size, with the speedup of each number of seeds."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("nets", nargs="+", metavar="NET")
    parser.add_argument("--image-size", type=int, default=8)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    device = torch.device(given.device)
    precision = tuning.resolve_precision("auto", device=device)
    print(f"{hardware.device_name(device)}, 1 thread, {precision}")
    with hardware.one_thread():
        for name in given.nets:
            for batch_size in given.batch_sizes:
                train = TrainConfig(
                    epochs=1, batch_size=batch_size, precision=precision
                )
                alone, *fused = measure_fused(
                    parse_spec(name),
                    train=train,
                    image_size=given.image_size,
                    device=device,
                    counts=given.seeds,
                )
                gains = ", ".join(
                    f"{one.num_seeds} seeds x{one.speedup:.2f}" for one in fused
                )
                step = f"{1000 * alone.step_s:.2f} ms alone"
                print(f"{name} batch {batch_size}: {step}, {gains}", flush=True)


if __name__ == "__main__":
    main()
