"""Which values of a graph are held in int8, and which of them share their parameters.

Each held value belongs to a slot; a slot has one (scale, zero_point). SHARED operators join the slots of
their input and output (union-find); a concat joins all its inputs. Where some layers compute in float
(`float_layers`), their values are held only for the integer operators that read them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

from torch import fx

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.nodes import argument, aten, layer_name
from edgecnn.quantize.float_layers import FloatPlan, is_size
from edgecnn.quantize.scheme import CLAMPS, Holds
from edgecnn.quantize.scheme import fuses_into_clamp as fuses_into_clamp
from edgecnn.quantize.scheme import spec_of as spec_of


@dataclass
class Slots:
    """Held values grouped by shared parameters.

    Attributes:
        held: nodes whose value is quantized, in execution order.
        sources: nodes whose values must be observed: SHARED ones only repeat values already seen.
        fixed: slot root -> (scale, zero_point) prescribed by the operator.
        conversions: (producer, consumer) edges on which a value changes its parameters.
        floats: what computes in float; such a value, and the input's, is held on its way into int8 alone.
    """

    held: list[fx.Node] = field(default_factory=list)
    sources: list[fx.Node] = field(default_factory=list)
    fixed: dict[fx.Node, tuple[float, int]] = field(default_factory=dict)
    conversions: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    parent: dict[fx.Node, fx.Node] = field(default_factory=dict)
    floats: FloatPlan = field(default_factory=FloatPlan)

    def root(self, node: fx.Node) -> fx.Node:
        """Return the node that stands for this node's slot."""
        while self.parent[node] is not node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def add(self, node: fx.Node) -> None:
        """Open a slot for a value."""
        self.parent[node] = node

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Return who reads a held value in int8."""
        is_real = node in self.floats.nodes or (node.op == "placeholder" and bool(self.floats.nodes))
        return [u for u in node.users if not is_size(u) and (not is_real or self.floats.reads_int8(u))]

    def join(self, a: fx.Node, b: fx.Node) -> None:
        """Put two values into one slot; prescribed parameters, which may not differ, become those of both."""
        first, second = self.root(a), self.root(b)
        if first is second:
            return
        self.parent[second] = first
        if second in self.fixed:
            self.fixed[first] = self.fixed[second]


def assign_slots(graph: fx.GraphModule, floats: FloatPlan | None = None) -> Slots:
    """Return the slots of an exported float graph whose batch norms are folded.

    Args:
        graph: float.
        floats: what computes in float; nothing for None.

    Raises:
        UnsupportedOpError: naming the first layer and operator that the scheme does not know.
    """
    slots = Slots(floats=floats or FloatPlan())
    live: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            live.add(node)
            if slots.readers(node) or not slots.floats.nodes:
                _hold(slots, node, source=True)
        elif node.op == "call_function" and any(n in live for n in node.all_input_nodes):
            if is_size(node):
                continue
            live.add(node)
            if node not in slots.floats.nodes:
                _annotate(slots, node, live)
            elif slots.readers(node) and not fuses_into_clamp(node) and not _gives_list(node):
                _hold(slots, node, source=True)
    return slots


def _gives_list(node: fx.Node) -> bool:
    """Whether a node gives several values, which others pick from."""
    return any(user.target is operator.getitem for user in node.users)


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
    if not _gives_list(node):
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
