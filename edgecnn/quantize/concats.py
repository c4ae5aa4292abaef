"""Concatenations at the network's end whose inputs are far apart: a detector's boxes beside its scores.

In one int8 tensor all values share one step. Boxes in 0..300 beside scores in 0..1 give steps of 1.2, and
every score becomes 0 or 1. Where the joined value only goes out, it is joined in float instead, each input
out of a scale of its own; that costs nothing, since it is dequantized there in any case.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from edgecnn.graph.nodes import aten, layer_name
from edgecnn.quantize.annotate import Slots, spec_of
from edgecnn.quantize.scheme import Holds

MAX_APART = 8.0
"""How many times as wide the widest input may be as the narrowest, which then keeps 32 of 256 steps."""

Ranges = Mapping[fx.Node, tuple[float, float]]


def concats_far_apart(graph: fx.GraphModule, slots: Slots, ranges: Ranges) -> dict[fx.Node, float]:
    """Return the concatenations that only lead out and join ranges too far apart, and how far.

    Args:
        graph: float.
        slots: of the graph.
        ranges: (low, high) seen of every observed value.

    Example:
        Scores in [0, 1] joined with boxes in [0, 300] are 300 times apart.
    """
    seen: dict[fx.Node, tuple[float, float]] = {}
    found = {}
    for node in graph.graph.nodes:
        sources = [seen[n] for n in node.all_input_nodes if n in seen]
        spec = spec_of(node) if node.op == "call_function" else None
        if node in ranges:
            seen[node] = _with_zero(*ranges[node])
        elif spec is not None and spec.fixed is not None:
            scale, zero_point = spec.fixed
            seen[node] = (scale * (-128 - zero_point), scale * (127 - zero_point))
        elif sources:
            seen[node] = (min(low for low, _ in sources), max(high for _, high in sources))
        if node.target is aten.cat.default and node in slots.parent and _only_leads_out(node):
            widths = [high - low for low, high in (seen[n] for n in node.all_input_nodes if n in seen)]
            narrowest = min((width for width in widths if width > 0), default=0.0)
            if narrowest and max(widths) > MAX_APART * narrowest:
                found[node] = max(widths) / narrowest
    return found


def apart_text(node: fx.Node, times: float) -> str:
    """Return the warning about one of them."""
    return (
        f"{layer_name(node)} joins values whose ranges are {times:.0f} times apart at the network's output: "
        "joined in float, each from a scale of its own"
    )


def _with_zero(low: float, high: float) -> tuple[float, float]:
    return min(low, 0.0), max(high, 0.0)


def _only_leads_out(node: fx.Node) -> bool:
    """Whether a value goes nowhere but out of the network, at most moved about on the way."""
    for user in node.users:
        if user.op == "output":
            continue
        spec = spec_of(user) if user.op == "call_function" else None
        if spec is None or spec.holds is not Holds.SHARED or not _only_leads_out(user):
            return False
    return bool(node.users)
