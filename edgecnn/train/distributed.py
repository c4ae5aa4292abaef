"""Several processes that train one network: `torchrun --nproc-per-node N -m edgecnn compress ...`.

Each process makes its share of every batch; the gradients (and the BatchNorm statistics, which each process
has of its own share) are averaged after the backward pass, so that all take the same step:

    g = (1 / N) sum_i g_i,    g_i the gradient of the mean loss over process i's share

which is the gradient of the mean over the whole batch, shares being equal. BatchNorm normalizes each share by
itself, so a network that has it trains a little otherwise than in one process. Every process does all passes;
the first alone (it leads) keeps checkpoints, and writes and measures what comes of them. The averaging is
done here and not by DistributedDataParallel, since the loss also reads values inside the graph, trains
parameters outside it and may add a penalty on weights, which that wrapper does not see.

Source: Li et al. 2020, arXiv:2006.15704, section 2.2.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from edgecnn.errors import EdgeCNNError, PassError

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes that train together.

    Attributes:
        rank: number of this one, from 0.
        world: how many there are; 1 where there is but this one.
    """

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes checkpoints and shows progress."""
        return self.rank == 0

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace float tensors by their mean over the processes, in place, in one exchange."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        offset = 0
        for tensor in tensors:
            tensor.copy_(flat[offset : offset + tensor.numel()].view(tensor.shape))
            offset += tensor.numel()

    @torch.no_grad()
    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of the process that leads, in place."""
        if self.world == 1:
            return
        for tensor in tensors:
            same = tensor.contiguous()
            dist.broadcast(same, src=0)
            tensor.copy_(same)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether the flag is set in any process."""
        if self.world == 1:
            return flag
        value = torch.tensor([float(flag)], device=device)
        dist.all_reduce(value)
        return bool(value.item() > 0)

    def share(self, make: Callable[[], T]) -> T:
        """Return what `make` gives in the process that leads; the others do not call it.

        Raises:
            EdgeCNNError: what `make` raised there, in every process.
        """
        if self.world == 1:
            return make()
        said: list[Any] = [None, None]
        if self.leads:
            try:
                said[0] = make()
            except EdgeCNNError as error:
                said[1] = error
        dist.broadcast_object_list(said, src=0)
        if said[1] is not None:
            raise said[1]
        made: T = said[0]
        return made

    def require_same(self, what: str, digest: str) -> None:
        """Check that all processes have the same of something.

        Args:
            what: names it, for the message.
            digest: of it.

        Raises:
            PassError: naming the first process that has another than the first one.
        """
        if self.world == 1:
            return
        digests: list[Any] = [None] * self.world
        dist.all_gather_object(digests, digest)
        other = next((rank for rank, found in enumerate(digests) if found != digests[0]), None)
        if other is not None:
            raise PassError(
                f"process {other} of {self.world} has {what} other than that of process 0, expected the same",
                hint="start every process with the same command, model and data, on machines of one kind",
            )


def launched() -> Team:
    """Return which of torchrun's processes this one is, joined or not; a team of one where there are none.

    Example:
        >>> launched()
        Team(rank=0, world=1)
    """
    world, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "")
    if _released or not (world.isdigit() and rank.isdigit()) or int(world) == 1 or not dist.is_available():
        return Team()
    return Team(int(rank), int(world))


def join_team(batch_size: int) -> Team:
    """Return the processes that torchrun started, joined on first use; a team of one without it.

    Args:
        batch_size: of all processes together.

    Raises:
        PassError: if the batch cannot be shared out evenly.
    """
    world = launched().world
    if world == 1:
        return Team()
    if batch_size % world:
        raise PassError(
            f"batch_size is {batch_size}, expected a multiple of the {world} processes",
            hint=f"use {max(batch_size // world, 1) * world}",
        )
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(_leave)
    return Team(dist.get_rank(), dist.get_world_size())


_released = False
"""Whether this process goes on alone."""


def leave_team() -> None:
    """Go on alone: training from now on is this process's own. Nothing happens where there is no team."""
    global _released
    if launched().world > 1:
        _released = True
        _leave()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
