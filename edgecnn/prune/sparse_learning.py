"""Sparse learning: a penalty that drives whole channels to zero before they are cut.

    R(W) = strength sum_g sum_k a_gk ||W_gk||^2         a_gk = 2^(alpha (I_max - I_gk) / (I_max - I_min))

with W_gk every slice of channel k of group g, I_gk = ||W_gk|| (the group's l2 importance) and alpha = 4: the
least channel of a group shrinks 16 times as fast as the most important one. The weights a_gk follow the
importances of the moment, without a gradient of their own.

Source: Fang et al. 2023 (DepGraph), arXiv:2301.12900, section 3.3, equations 4 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from edgecnn.graph.channels import Coupling, Member
from edgecnn.graph.nodes import copy_graph
from edgecnn.model import Model
from edgecnn.prune.groups import cuttable, weight_members

ALPHA = 4.0


@dataclass(frozen=True)
class _Slices:
    """One tensor of a group: for each index along `dim`, the channel it belongs to."""

    tensor: str
    dim: int
    indices: torch.Tensor  # int64 (m,)
    channels: torch.Tensor  # int64 (m,)


class GroupLasso:
    """The penalty of a network's groups, as the training loop's `penalty`.

    Args:
        model: the network to be trained; its tensor names are those of the graph given later.
        coupling: its groups.
        strength: factor of the whole penalty, 0 or more.

    Example:
        of one group with two channels of norm 1 and 2, `a` is 16 and 1, and R = strength * (16 * 1 + 1 * 4).
    """

    def __init__(self, model: Model, coupling: Coupling, strength: float) -> None:
        self.strength = strength
        graph = copy_graph(model.graph)
        parameters = {name for name, _ in graph.named_parameters()}
        self._groups: list[tuple[int, list[_Slices]]] = []
        for group in cuttable(coupling):
            members = [m for m in weight_members(graph, coupling, group) if m.tensor in parameters]
            if members:
                self._groups.append((len(group.channels), [_slices(member) for member in members]))

    def __call__(self, graph: fx.GraphModule) -> torch.Tensor:
        """Return R of the graph's present weights, a scalar that gradients flow through."""
        parameters = dict(graph.named_parameters())
        total = next(iter(parameters.values())).new_zeros(())
        for size, members in self._groups:
            energies = sum(_energies(parameters[m.tensor], m, size) for m in members)
            total = total + (shrinkage(energies.detach().sqrt()) * energies).sum()  # type: ignore[union-attr]
        return self.strength * total


def _slices(member: Member) -> _Slices:
    pairs = [(i, k) for k, indices in enumerate(member.positions) for i in indices]
    table = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return _Slices(member.tensor, member.dim, table[:, 0], table[:, 1])


def _energies(parameter: torch.Tensor, slices: _Slices, size: int) -> torch.Tensor:
    """Return the sum of squares of each channel's slices, (size,)."""
    others = [d for d in range(parameter.dim()) if d != slices.dim]
    squares = parameter.float().square()
    per_index = squares.sum(dim=others) if others else squares
    zeros = per_index.new_zeros(size)
    return zeros.index_add(
        0, slices.channels.to(per_index.device), per_index[slices.indices.to(per_index.device)]
    )


def shrinkage(importances: torch.Tensor) -> torch.Tensor:
    """Return a_k, from 1 (most important) to 2^alpha (least).

    Example:
        >>> shrinkage(torch.tensor([1.0, 3.0, 2.0])).tolist()
        [16.0, 1.0, 4.0]
    """
    low, high = importances.min(), importances.max()
    spread = (high - low).clamp_min(torch.finfo(importances.dtype).tiny)
    return torch.pow(2.0, ALPHA * (high - importances) / spread)
