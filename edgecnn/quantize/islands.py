"""What an int8 network leaves in float by itself: operators without an int8 form, and what lies between them.

    conv -> permute -> [layer_norm] -> linear -> [gelu] -> linear        [...] in float, the rest in int8

An operator that the scheme does not know computes in float, a layer with weights in int8. Those without
weights follow: of all ways to divide them the one that converts the fewest values is taken, a minimum cut,
and of several such ways the one with more in float, which rounds less. So the scores, mask and softmax
between the two products of an attention are one piece with them, and the sums along a transformer, read by
every layer_norm, stay in float; those of a ConvNeXt, read by convolutions, are in int8.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from typing import Any

from torch import fx

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.nodes import layer_name
from edgecnn.graph.pool_padding import pads_with_lowest
from edgecnn.quantize.cut import INFINITE, FlowGraph
from edgecnn.quantize.float_layers import FloatPlan, computing_nodes, is_fused_clamp, is_size, plan_float
from edgecnn.quantize.scheme import Holds, spec_of

FLOAT_LAYERS = "float_layers"
"""The kind of detail that says which layers compute in float: "asked" (names, patterns) and "layers"."""

FLOAT_ISLANDS = "float_islands"
"""The kind of detail that says which operators have no int8 form: "operators" (layer, why) and "pieces"."""

NO_INT8_FORM = "no int8 form"
NEAR_FLOAT = "spares conversions between int8 and float"


def unknown_operators(graph: fx.GraphModule) -> list[fx.Node]:
    """Return the calls on activations that have no int8 form, in execution order."""
    return [node for node in computing_nodes(graph) if spec_of(node) is None]


def plan_islands(
    graph: fx.GraphModule, named: frozenset[fx.Node], shapes: Mapping[str, Any] | None = None
) -> FloatPlan:
    """Return what computes in float: what is named, what has no int8 form, and what would only cost there.

    Args:
        graph: float, batch norms and constants folded.
        named: layers to leave in float.
        shapes: of `infer_shapes`, to count the values that are converted; each counts alike for None.
    """
    asked = plan_float(graph, named)
    unknown = frozenset(unknown_operators(graph))
    if not unknown:
        return asked
    fixed = (named | unknown).difference(asked.alone)
    return FloatPlan(_cheapest(graph, fixed, shapes or {}), asked.alone)


def _cheapest(
    graph: fx.GraphModule, fixed: frozenset[fx.Node], shapes: Mapping[str, Any]
) -> frozenset[fx.Node]:
    """Return the nodes that compute in float where as few values as possible are converted.

    Layers with weights are in int8 unless they are fixed; the input comes and the output goes in float. What
    only moves values is in int8 where two ways cost the same, what computes them in float.
    """
    nodes = computing_nodes(graph)
    flow = FlowGraph()
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output") or node in fixed:
            flow.connect(_FLOAT, node, INFINITE)
    for node in nodes:
        if node not in fixed and _has_weight(node):
            flow.connect(node, _INT8, INFINITE)
        spec = spec_of(node)
        if spec is not None and spec.holds is Holds.SHARED:
            flow.connect(node, _INT8, _num_values(shapes.get(node.name)))  # four bytes are moved for one
        tied = _follows(node)
        if tied is not None:
            flow.connect(node, tied, INFINITE)
            flow.connect(tied, node, INFINITE)
    for node in (*(n for n in graph.graph.nodes if n.op == "placeholder"), *nodes):
        readers = [u for u in node.users if not is_size(u) and u.target is not operator.getitem]
        readers = [u for u in readers if not (is_fused_clamp(u) and u.args[0] is node)]
        size = _CONVERSION * _num_values(shapes.get(node.name))
        made_float, made_int8 = ("float", node), ("int8", node)
        flow.connect(node, made_float, size)  # quantized once for all its readers in int8
        flow.connect(made_int8, node, size)  # dequantized once for all its readers in float
        for reader in readers:
            flow.connect(made_float, reader, INFINITE)
            flow.connect(reader, made_int8, INFINITE)
    in_int8 = flow.far_side(_FLOAT, _INT8)
    return frozenset(node for node in nodes if node not in in_int8)


def _follows(node: fx.Node) -> fx.Node | None:
    """Return what a node is part of, or the pad whose minus infinity it must not read in int8."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    part = node.target is operator.getitem or is_fused_clamp(node)
    return source if part or (pads_with_lowest(source) and not _has_weight(node)) else None


_FLOAT, _INT8 = "float", "int8"
_CONVERSION = 8
"""What a conversion of a value costs, in the cost of moving it in float rather than in int8."""


def _num_values(shape: Any) -> int:
    """Return how many values of one image a shape has."""
    return 1 if not isinstance(shape, tuple) else max(abs(prod(shape)), 1)


def _has_weight(node: fx.Node) -> bool:
    spec = spec_of(node)
    return spec is not None and spec.weight_axis is not None


def refuse_unknown(graph: fx.GraphModule, named: Collection[fx.Node]) -> None:
    """Check that every operator that is not named has an int8 form.

    Raises:
        UnsupportedOpError: naming the first that have none.
    """
    unknown = [node for node in unknown_operators(graph) if node not in named]
    if unknown:
        first = ", ".join(layer_list(unknown)[:3])
        raise UnsupportedOpError(
            f"{len(unknown)} operators have no int8 form, first {first}, and unsupported is 'error'",
            hint='unsupported = "float" leaves them in float, as do their names in float_layers',
        )


def float_records(
    graph: fx.GraphModule, floats: FloatPlan, named: frozenset[fx.Node], asked: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the details for the report: what was asked for, and what has no int8 form.

    Args:
        graph: that was planned.
        floats: by `plan_islands`.
        named: nodes that `float_layers` names.
        asked: `float_layers` itself.
    """
    followed = plan_float(graph, named).nodes
    in_order = [n for n in graph.graph.nodes if n in floats.nodes and not is_fused_clamp(n)]
    found: list[dict[str, Any]] = []
    unknown = set(unknown_operators(graph))
    mine = [n for n in in_order if n not in followed]
    has_islands = bool(unknown.intersection(mine))
    if asked:  # where all that has no int8 form is named, what spares conversions beside it follows too
        layers = layer_list(n for n in in_order if n in followed or not has_islands)
        found.append({"kind": FLOAT_LAYERS, "asked": list(asked), "layers": layers})
    if has_islands:
        reasons = {layer_name(n): NO_INT8_FORM if n in unknown else NEAR_FLOAT for n in mine}
        reasons |= {layer_name(n): NO_INT8_FORM for n in mine if n in unknown}
        operators = [{"layer": layer, "why": why} for layer, why in reasons.items()]
        found.append({"kind": FLOAT_ISLANDS, "operators": operators, "pieces": _pieces(floats.nodes)})
    return found


def _pieces(nodes: Collection[fx.Node]) -> int:
    """Return how many connected pieces the nodes form."""
    left, count = set(nodes), 0
    while left:
        count += 1
        edge = [left.pop()]
        while edge:
            node = edge.pop()
            near = [n for n in (*node.all_input_nodes, *node.users) if n in left]
            left.difference_update(near)
            edge.extend(near)
    return count


def island_names(nodes: Iterable[fx.Node]) -> str:
    """Return operators by kind with their number, the most frequent first.

    Example: "layer_norm (23), gelu (18)".
    """
    counts = Counter(str(node.target).removeprefix("aten.").partition(".")[0] for node in nodes)
    listed = [f"{kind} ({count})" for kind, count in counts.most_common()]
    return ", ".join(listed)


def float_warnings(floats: FloatPlan, layers: Collection[fx.Node], unknown: Collection[fx.Node]) -> list[str]:
    """Return what the user should know about the layers that `float_layers` names.

    Args:
        floats: the plan.
        layers: with weights, in int8.
        unknown: operators without an int8 form.
    """
    found = []
    if floats.nodes and not layers:
        why = (
            "no layer with weights has an int8 form"
            if unknown
            else "float_layers names every layer with weights"
        )
        found.append(f"{why}: the files compute them all in float")
    alone = [node for node in floats.alone if not is_fused_clamp(node)]
    if alone:
        found.append(
            f"float_layers names {', '.join(layer_list(alone))}, without weights and between int8 "
            "layers: in int8 all the same, as inputs and output are"
        )
    return found


def layer_list(nodes: Iterable[fx.Node]) -> list[str]:
    """Return where in the network nodes come from, each once."""
    return list(dict.fromkeys(layer_name(node) for node in nodes))
