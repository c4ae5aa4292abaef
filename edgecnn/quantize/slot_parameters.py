"""From calibrated ranges to the scale and zero point of every slot, for any choice of layers in float.

Which values share a slot, and what is asked of their scales (`ties`), depends on what computes in float. So
a quantized graph carries its ranges along, from which the parameters of the same network with other layers
in float follow without calibrating anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from edgecnn.quantize.annotate import Slots, assign_slots
from edgecnn.quantize.float_layers import FloatPlan, plan_float
from edgecnn.quantize.parameters import activation_parameters
from edgecnn.quantize.ties import remove_ties

Parameters = dict[fx.Node, tuple[float, int]]

_KEY = "calibrated_ranges"


@dataclass(frozen=True)
class Ranges:
    """What calibration saw, by the names of nodes.

    Attributes:
        seen: (low, high) of every value that was observed.
        mean_counts: how many values each mean averages.
        floats: what computed in float.
    """

    seen: dict[str, tuple[float, float]]
    mean_counts: dict[str, int]
    floats: frozenset[str]


def slot_parameters(
    slots: Slots, ranges: Mapping[fx.Node, tuple[float, float]], mean_counts: Mapping[fx.Node, int]
) -> Parameters:
    """Return (scale, zero_point) of every slot, by its root.

    Args:
        slots: of the graph.
        ranges: (low, high) of every source of the slots.
        mean_counts: how many values each mean averages.
    """
    joined: dict[fx.Node, tuple[float, float]] = {}
    for node in slots.sources:
        low, high = ranges[node]
        root = slots.root(node)
        seen = joined.get(root, (0.0, 0.0))
        joined[root] = (min(seen[0], low), max(seen[1], high))
    by_root: Parameters = {root: activation_parameters(*seen) for root, seen in joined.items()}
    for node, fixed in slots.fixed.items():
        if slots.root(node) is node:
            by_root[node] = fixed
    remove_ties(slots, by_root, mean_counts)
    return by_root


def keep_ranges(graph: fx.GraphModule, ranges: Ranges) -> None:
    """Let a quantized graph, and its copies, carry the ranges."""
    graph.meta[_KEY] = ranges


def kept_ranges(graph: fx.GraphModule) -> Ranges | None:
    """Return the ranges that a quantized graph carries, None if its scales have another origin."""
    found = graph.meta.get(_KEY)
    return found if isinstance(found, Ranges) else None


def mixed_parameters(graph: fx.GraphModule, plan: FloatPlan, ranges: Ranges) -> dict[str, tuple[float, int]]:
    """Return (scale, zero_point) by the names of the values that are held in int8.

    A value that was not observed by itself, since it shared a slot, has the range of what it was made of.

    Args:
        graph: float, batch norms and constants folded.
        plan: what computes in float.
        ranges: of the network in int8.
    """
    apart = frozenset(n for n in graph.graph.nodes if n.name in ranges.floats)
    slots = assign_slots(graph, plan_float(graph, plan.nodes | apart) if apart - plan.nodes else plan)
    seen = {node: _range(node, ranges.seen) for node in slots.sources}
    counts = {
        node: ranges.mean_counts[node.name]
        for node in slots.held
        if node.name in ranges.mean_counts and slots.floats.reads_int8(node)
    }
    by_root = slot_parameters(slots, seen, counts)
    return {node.name: by_root[slots.root(node)] for node in slots.parent}


def _range(node: fx.Node, seen: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    if node.name in seen:
        return seen[node.name]
    parts = [(0.0, 0.0), *(_range(source, seen) for source in node.all_input_nodes)]
    return min(low for low, _ in parts), max(high for _, high in parts)
