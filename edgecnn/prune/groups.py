"""Which groups can be cut, and which tensors make up their channels."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from edgecnn.errors import PassError
from edgecnn.graph.channels import Coupling, Group, Member
from edgecnn.graph.nodes import argument, aten

MAX_NAMED = 3
"""Frozen groups that a message names."""

_SCALE_ARGUMENT = {
    aten.batch_norm.default: (1, "weight"),
    aten.layer_norm.default: (2, "weight"),
    aten.group_norm.default: (2, "weight"),
    aten.instance_norm.default: (1, "weight"),
}
"""Which argument of a norm holds gamma."""


def cuttable(coupling: Coupling) -> list[Group]:
    """Return the groups that are not frozen."""
    return [group for group in coupling.groups if group.frozen is None and group.channels]


def emptiable_values(coupling: Coupling) -> dict[str, frozenset[int]]:
    """Return value -> its channels, for values made of nothing but channels that can be cut.

    A slice can read channels of one group only while its source has others: when those go, the source is
    left but the slice is not, and no file format has room for a tensor without elements.
    """
    found: dict[str, frozenset[int]] = {}
    for name, value in coupling.values.items():
        parts = value if isinstance(value, tuple) else (value,)
        for index, ids in enumerate(parts):
            small = ids[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in ids.strides)]
            if small.size and (small >= 0).all():
                found[f"{name}[{index}]" if isinstance(value, tuple) else name] = frozenset(
                    np.unique(small).tolist()
                )
    return found


def weight_members(graph: fx.GraphModule, coupling: Coupling, group: Group) -> list[Member]:
    """Return the members whose slices make up a channel: weights (out, in) and norm scales, each once."""
    weights = {layer.weight for layer in coupling.layers}
    scales = norm_scales(graph)
    found: dict[tuple[str, int], Member] = {}
    for member in group.members:
        if member.tensor in weights or (member.role == "norm" and member.tensor in scales):
            found.setdefault((member.tensor, member.dim), member)
    return list(found.values())


def norm_scales(graph: fx.GraphModule) -> set[str]:
    """Return the attribute names of every norm's gamma."""
    found = set()
    for node in graph.graph.nodes:
        if node.target in _SCALE_ARGUMENT:
            scale = argument(node, *_SCALE_ARGUMENT[node.target])
            if isinstance(scale, fx.Node) and scale.op == "get_attr":
                found.add(str(scale.target))
    return found


def tensor_of(graph: fx.GraphModule, name: str) -> torch.Tensor:
    """Return a parameter or buffer by its attribute name."""
    owner, _, leaf = name.rpartition(".")
    value = getattr(graph.get_submodule(owner) if owner else graph, leaf)
    return value.detach()  # type: ignore[no-any-return]


def nothing_prunable(coupling: Coupling) -> PassError:
    """Return the error for a network of which no channel can be cut, with the commonest reason."""
    frozen = [group for group in coupling.groups if group.frozen is not None]
    listed = [f"{group.name} ({group.frozen})" for group in frozen[:MAX_NAMED]]
    more = f" and {len(frozen) - MAX_NAMED} more groups" if len(frozen) > MAX_NAMED else ""
    why = f": {', '.join(listed)}{more}" if listed else ", it has no convolution or linear layer to cut"
    return PassError(
        f"nothing in this network can be pruned{why}",
        hint="`edgecnn inspect MODEL --groups` says for each group why not",
    )
