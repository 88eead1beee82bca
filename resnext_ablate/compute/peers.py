"""The processes that train one run together, a device each, as torchrun starts them.

The first one leads: it alone hears the scheduler, and what it hears it says to the
others over a connection of their own. Gradients are DistributedDataParallel's matter;
what else a step leaves is averaged here, so that after each step all hold the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_T = TypeVar("_T")

_IDLE = timedelta(days=1000)
"""How long peers may wait for word: the next run may come late."""


@dataclass(frozen=True)
class Peers:
    """All processes of a run as one of them sees them."""

    rank: int = 0
    """Which of them this is."""
    count: int = 1
    group: dist.ProcessGroup | None = None
    """For words, on the CPU."""

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def hear(self, text: str) -> str:
        """The leader's text, which all must ask for at the same point."""
        if self.count == 1:
            return text
        content = text.encode() if self.leads else b""
        length = torch.tensor([len(content)])
        dist.broadcast(length, src=0, group=self.group)
        letters = torch.empty(int(length), dtype=torch.uint8)
        if self.leads:
            letters = torch.tensor(list(content), dtype=torch.uint8)
        dist.broadcast(letters, src=0, group=self.group)
        return bytes(letters.tolist()).decode()

    def agree(self, answer: bool) -> bool:
        """The leader's answer, which all must ask for at the same point."""
        if self.count == 1:
            return answer
        said = torch.tensor([answer])
        dist.broadcast(said, src=0, group=self.group)
        return bool(said)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier(group=self.group)

    def after_leader(self, call: Callable[[], _T]) -> _T:
        """What a call gives to each, the leader's before the others'."""
        if self.count == 1:
            return call()
        if not self.leads:
            self.wait()
        found = call()
        if self.leads:
            self.wait()
        self.wait()
        return found

    def apart(self, trained: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Within, gradients add up here alone, and go out with the next ones."""
        if isinstance(trained, DistributedDataParallel):
            return trained.no_sync()
        return contextlib.nullcontext()

    def total(self, values: Tensor) -> Tensor:
        """The sum of all processes' tensors of one shape, the same in each."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def wrapped(self, model: nn.Module, *, example: Tensor) -> nn.Module:
        """The net whose gradients are the average of all processes'.

        Args:
            model: on its device, the same everywhere.
            example: images (N, C, H, W) that it can take, of which nothing stays.
        """
        if self.count == 1:
            return model
        on_gpu = example.device.type == "cuda"
        together = DistributedDataParallel(
            model,
            device_ids=[example.device] if on_gpu else None,
            gradient_as_bucket_view=True,
        )
        before = {name: one.clone() for name, one in model.named_buffers()}
        # Gradients are put in another order after the first step. Adding them up in
        # that order from the start, a resumed run does as an unbroken one.
        together(example).sum().backward()
        model.zero_grad()
        for name, one in model.named_buffers():
            one.copy_(before[name])
        return together

    def share_step(self, model: nn.Module, values: Tensor) -> Tensor:
        """Averages the running statistics of batch normalisation over all processes.

        Args:
            model: its floating-point buffers change.
            values: float32 (K,) on the device.

        Returns:
            (K,): the average of all processes' values.
        """
        held = [one for one in model.buffers() if one.is_floating_point()]
        every = torch.cat([values, *(one.flatten() for one in held)]) / self.count
        sizes = [len(values), *(one.numel() for one in held)]
        mean: Tensor
        mean, *averaged = torch.split(self.total(every), sizes)
        for one, average in zip(held, averaged, strict=True):
            one.copy_(average.view_as(one))
        return mean


ALONE = Peers()


@contextlib.contextmanager
def joined(count: int) -> Iterator[Peers]:
    """This process among those that torchrun has started.

    Args:
        count: how many they are; 1: there is no torchrun, and nothing to join.
    """
    if count == 1:
        yield ALONE
        return
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    group = dist.new_group(backend="gloo", timeout=_IDLE)
    assert isinstance(group, dist.ProcessGroup)
    yield Peers(dist.get_rank(), dist.get_world_size(), group)
    dist.destroy_process_group()  # After an error it could wait for the others.
