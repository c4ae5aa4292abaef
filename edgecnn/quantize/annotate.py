"""Which values of a graph are held in int8, and which of them share their parameters.

Each held value belongs to a slot; a slot has one (scale, zero_point). SHARED operators join the slots of
their input and output (union-find); a concat joins all its inputs.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

from torch import fx

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.nodes import argument, aten, layer_name, pair
from edgecnn.quantize.scheme import CLAMPS, POOL_TO_MEAN, POOL_TO_MEAN_SPEC, SCHEME, Holds, OpSpec


@dataclass
class Slots:
    """Held values grouped by shared parameters.

    Attributes:
        held: nodes whose value is quantized, in execution order.
        sources: nodes whose values must be observed: SHARED ones only repeat values already seen.
        fixed: slot root -> (scale, zero_point) prescribed by the operator.
        conversions: (producer, consumer) edges on which a value changes its parameters.
    """

    held: list[fx.Node] = field(default_factory=list)
    sources: list[fx.Node] = field(default_factory=list)
    fixed: dict[fx.Node, tuple[float, int]] = field(default_factory=dict)
    conversions: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    parent: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def root(self, node: fx.Node) -> fx.Node:
        """Return the node that stands for this node's slot."""
        while self.parent[node] is not node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def add(self, node: fx.Node) -> None:
        """Open a slot for a value."""
        self.parent[node] = node

    def join(self, a: fx.Node, b: fx.Node) -> None:
        """Put two values into one slot; prescribed parameters, which may not differ, become those of both."""
        first, second = self.root(a), self.root(b)
        if first is second:
            return
        self.parent[second] = first
        if second in self.fixed:
            self.fixed[first] = self.fixed[second]


def spec_of(node: fx.Node) -> OpSpec | None:
    """Return how a node is quantized, None for a node the scheme does not know."""
    if node.target is POOL_TO_MEAN:
        return POOL_TO_MEAN_SPEC[pair(node.args[1]) == (1, 1)]
    return SCHEME.get(node.target)


def fuses_into_clamp(node: fx.Node) -> bool:
    """Whether only the clamp after this node is held."""
    spec = spec_of(node)
    users = list(node.users)
    return spec is not None and spec.fuses_clamp and len(users) == 1 and users[0].target in CLAMPS


def assign_slots(graph: fx.GraphModule) -> Slots:
    """Return the slots of an exported float graph whose batch norms are folded.

    Raises:
        UnsupportedOpError: naming the first layer and operator that the scheme does not know.
    """
    slots = Slots()
    live: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            live.add(node)
            _hold(slots, node, source=True)
        elif node.op == "call_function" and any(n in live for n in node.all_input_nodes):
            if _is_size(node):
                continue
            live.add(node)
            _annotate(slots, node, live)
    return slots


def _is_size(node: fx.Node) -> bool:
    """Whether a node reads a shape rather than values."""
    return "sym_size" in str(node.target)


def _hold(slots: Slots, node: fx.Node, *, source: bool) -> None:
    slots.add(node)
    slots.held.append(node)
    if source:
        slots.sources.append(node)


def _annotate(slots: Slots, node: fx.Node, live: set[fx.Node]) -> None:
    spec = spec_of(node)
    if spec is None:
        raise UnsupportedOpError(
            f"{layer_name(node)} is not in the int8 scheme",
            hint="`edgecnn inspect MODEL` lists every operator that has no lowering",
        )
    inputs = [n for n in node.all_input_nodes if n in live]
    gives_list = any(user.target is operator.getitem for user in node.users)
    if node.target in CLAMPS and fuses_into_clamp(inputs[0]):
        _hold(slots, node, source=True)
        return
    if fuses_into_clamp(node):
        return
    if spec.holds is not Holds.SHARED:
        _hold(slots, node, source=spec.fixed is None)
        if spec.fixed is not None:
            slots.fixed[node] = spec.fixed
        return
    if node.target is aten.cat.default:
        _annotate_concat(slots, node, inputs)
        return
    slots.add(node)
    if not gives_list:
        slots.held.append(node)
    if _pads_with_number(node):
        slots.sources.append(node)
    slots.join(inputs[0], node)


def _annotate_concat(slots: Slots, node: fx.Node, inputs: list[fx.Node]) -> None:
    """Let a concat share one slot with its inputs, but for those whose parameters are prescribed.

    A sigmoid's would clip all others to [0, 1]; its value is converted, and the concat observed to cover it.
    """
    prescribed = [slots.fixed.get(slots.root(other)) for other in inputs]
    alike = len(set(prescribed)) == 1
    _hold(slots, node, source=not alike)
    for other, parameters in zip(inputs, prescribed, strict=True):
        if alike or parameters is None:
            slots.join(node, other)
        else:
            slots.conversions.append((other, node))


def _pads_with_number(node: fx.Node) -> bool:
    """Whether a pad brings in a value that its input need not have."""
    if node.target is aten.constant_pad_nd.default:
        return bool(argument(node, 2, "value", 0))
    return node.target is aten.pad.default and bool(argument(node, 3, "value", 0))
