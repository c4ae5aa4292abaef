"""Mixed precision: which nodes of a network compute in float when some of its layers are named.

A name is a module path ("features.0"), the whole name that messages use ("features.0 (aten.conv2d.default)"),
a node's own name ("conv2d_3"), or a pattern of any of them ("features.1.*"). From the layers named follows
what else computes in float:

    a clamp that is part of a layer goes with it
    an operator that only moves or picks values stays in float on the way from float to float, and a max pool
    behind a layer in float, which leaves less to quantize
    the input is not quantized for a reader in float, nor the output of a layer in float

An operator without weights that stands alone between int8 neighbours has its inputs and its output in int8
whatever it computes in, so that it stays an integer operator; `FloatPlan.alone` says so.

Source: Nagel et al. 2021, arXiv:2106.08295, section 3.5 (layers kept at higher precision).
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import fx

from edgecnn.errors import RecipeError
from edgecnn.graph.nodes import argument, aten, layer_name, pair
from edgecnn.model import Model
from edgecnn.quantize.scheme import CLAMPS, Holds, fuses_into_clamp, spec_of


@dataclass(frozen=True)
class FloatPlan:
    """What computes in float.

    Attributes:
        nodes: calls whose result is made in float.
        alone: calls that were named and compute in integers all the same, in execution order.
    """

    nodes: frozenset[fx.Node] = frozenset()
    alone: tuple[fx.Node, ...] = ()

    def reads_int8(self, user: fx.Node) -> bool:
        """Whether a reader computes in integers."""
        return user.op == "call_function" and user not in self.nodes and not is_size(user)


def is_size(node: fx.Node) -> bool:
    """Whether a node reads a shape rather than values."""
    return "sym_size" in str(node.target)


def computing_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    """Return the calls that depend on the network's input, in execution order."""
    live: dict[fx.Node, None] = {}
    for node in graph.graph.nodes:
        reads = any(n in live or n.op == "placeholder" for n in node.all_input_nodes)
        if node.op == "call_function" and reads and not is_size(node):
            live[node] = None
    return list(live)


def layer_names(model: Model) -> list[str]:
    """Return the layers that can be left in float, in execution order, as messages name them.

    Operators that only move values, and clamps that are part of a layer, are left out: they follow.

    Args:
        model: float, batch norms folded.

    Example:
        >>> import torch
        >>> from edgecnn.load import LoadOptions, load_model
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
        >>> layer_names(load_model(net, LoadOptions(input_shape=(3, 8, 8))))
        ['0 (aten.conv2d.default)']
    """
    found = [layer_name(node) for node in computing_nodes(model.graph) if not _is_mover(node)]
    return list(dict.fromkeys(found))


def match_layers(graph: fx.GraphModule, patterns: Sequence[str]) -> frozenset[fx.Node]:
    """Return the calls that names or patterns stand for, with the clamps that are part of them.

    Raises:
        RecipeError: for one that stands for nothing, with the nearest names.
    """
    nodes = computing_nodes(graph)
    named: set[fx.Node] = set()
    for pattern in patterns:
        found = [node for node in nodes if any(fnmatchcase(name, pattern) for name in _names(node))]
        if not found:
            raise RecipeError(
                f"float_layers names {pattern!r}, and the network has no such layer",
                hint=_suggestion(pattern, nodes),
            )
        named.update(found)
    return whole_layers(frozenset(named))


def whole_layers(nodes: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """Return the nodes with the clamps that are part of them, and the layers that they are part of."""
    return frozenset(member for node in nodes if node.op == "call_function" for member in _unit(node))


def plan_float(graph: fx.GraphModule, named: frozenset[fx.Node]) -> FloatPlan:
    """Return what computes in float when the layers in `named` do.

    Args:
        graph: float, batch norms folded.
        named: of `match_layers`.
    """
    if not named:
        return FloatPlan()
    nodes = computing_nodes(graph)
    movers = {node for node in nodes if _is_mover(node) and node not in named}
    from_float: set[fx.Node] = set()
    for node in nodes:
        sources = node.all_input_nodes
        if any(n.op == "placeholder" or n in named or (n in movers and n in from_float) for n in sources):
            from_float.add(node)
    to_float: set[fx.Node] = set()
    for node in reversed(nodes):
        wanted = any(u.op == "output" or u in named or (u in movers and u in to_float) for u in node.users)
        if wanted or (shrinks(node) and node.all_input_nodes[0].op != "placeholder"):
            to_float.add(node)
    between = {node for node in movers if node in from_float and node in to_float}
    for node in nodes:  # a piece of a value is in float if the value is
        if node.target is operator.getitem and node in movers:
            (between.add if node.args[0] in between | named else between.discard)(node)
    found = named | between
    alone = tuple(n for n in nodes if n in named and _is_alone(n, found))
    return FloatPlan(frozenset(found.difference(alone)), alone)


def _names(node: fx.Node) -> tuple[str, str, str]:
    """Return what a node can be called: its path, the whole name in messages, its own name."""
    whole = layer_name(node)
    return whole.split(" (")[0], whole, node.name


def _is_mover(node: fx.Node) -> bool:
    """Whether a node follows its neighbours: it moves or picks values, or is part of the layer ahead."""
    spec = spec_of(node)
    return spec is not None and spec.holds is Holds.SHARED


def shrinks(node: fx.Node) -> bool:
    """Whether a node is a max pool that leaves fewer values."""
    if node.target not in (aten.max_pool2d.default, aten.max_pool2d_with_indices.default):
        return False
    stride = argument(node, 2, "stride") or argument(node, 1, "kernel_size")
    return max(pair(stride)) > 1


def is_fused_clamp(node: fx.Node) -> bool:
    """Whether a node is part of the layer ahead of it."""
    source = node.args[0] if node.args else None
    return node.target in CLAMPS and isinstance(source, fx.Node) and fuses_into_clamp(source)


def _unit(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return a node with the clamp that is part of it, or with the layer that it is part of."""
    if fuses_into_clamp(node):
        return node, next(iter(node.users))
    return (node.all_input_nodes[0], node) if is_fused_clamp(node) else (node,)


def _is_alone(node: fx.Node, found: frozenset[fx.Node]) -> bool:
    """Whether a named node has no weights and only int8 neighbours."""
    unit = _unit(node)
    if any(_has_weight(n) for n in unit):
        return False
    sources = [n for member in unit for n in member.all_input_nodes if n not in unit]
    users = [n for member in unit for n in member.users if n not in unit]
    reads_float = any(n.op == "placeholder" or n in found for n in sources)
    return not reads_float and not any(n.op == "output" or n in found for n in users)


def _has_weight(node: fx.Node) -> bool:
    spec = spec_of(node)
    return spec is None or spec.weight_axis is not None


def _suggestion(pattern: str, nodes: Sequence[fx.Node]) -> str:
    """Return the nearest names, or the pattern that would have found the layers inside a module."""
    paths = list(dict.fromkeys(_names(node)[0] for node in nodes))
    inside = [path for path in paths if path.startswith(f"{pattern}.")]
    if inside:
        return f"{len(inside)} layers lie inside it: '{pattern}.*' names them all"
    known = [*paths, *dict.fromkeys(name for node in nodes for name in _names(node)[1:])]
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
    listing = "`edgecnn inspect MODEL` lists them"
    return f"did you mean {' or '.join(map(repr, near))}? {listing}" if near else listing
