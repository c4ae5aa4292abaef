"""Several processes that train one network: `torchrun --nproc-per-node N -m edgecnn ...`.

Each process makes its share of every batch; the gradients (and the BatchNorm statistics, which each process
has of its own share) are averaged after the backward pass, so that all take the same step:

    g = (1 / N) sum_i g_i,    g_i the gradient of the mean loss over process i's share

which is the gradient of the mean over the whole batch, shares being equal. It is done here and not by
DistributedDataParallel, since the loss also reads values inside the graph, trains parameters outside it and
may add a penalty on weights, which that wrapper does not see.

Source: Li et al. 2020, arXiv:2006.15704, section 2.2.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from edgecnn.errors import PassError


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

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether the flag is set in any process."""
        if self.world == 1:
            return flag
        value = torch.tensor([float(flag)], device=device)
        dist.all_reduce(value)
        return bool(value.item() > 0)


def join_team(batch_size: int) -> Team:
    """Return the processes that torchrun started, joined on first use; a team of one without it.

    Args:
        batch_size: of all processes together.

    Raises:
        PassError: if the batch cannot be shared out evenly.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ or not dist.is_available():
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


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
