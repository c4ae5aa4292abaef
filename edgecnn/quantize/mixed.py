"""What a network gives with some layers left in float, without quantizing it anew.

The int8 graph holds every value as v -> quantize -> dequantize -> readers. A layer left in float reads v
itself where v is made in float, and the dequantized value where v is made in int8; int8 readers always read
the latter. Scales are those that the network with these layers in float has, since the graph carries its
ranges (`slot_parameters`); a graph without keeps the scales of full int8, 0.0 to 1.6 dB off.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.ao.quantization.fx import _decomposed  # noqa: F401 (registers torch.ops.quantized_decomposed)

from edgecnn.graph.nodes import argument, aten, copy_graph, fetch, is_constant
from edgecnn.quantize.constants import fold_constants
from edgecnn.quantize.float_layers import whole_layers
from edgecnn.quantize.islands import plan_islands
from edgecnn.quantize.leaky_relu import slope_of
from edgecnn.quantize.scheme import spec_of
from edgecnn.quantize.slot_parameters import kept_ranges, mixed_parameters

qd = torch.ops.quantized_decomposed
_LEAKY_RELU = aten.leaky_relu.default


class MixedGraph(fx.Interpreter):
    """A quantized graph of which named layers are computed in float.

    Args:
        quantized: by `quantize_static`, everything in int8.
        float_graph: what was quantized.
        shapes: of `infer_shapes`, by which operators without an int8 form were left in float.
    """

    def __init__(
        self,
        quantized: fx.GraphModule,
        float_graph: fx.GraphModule,
        shapes: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(quantized)
        self._ranges = kept_ranges(quantized)
        self._float_graph = fold_constants(copy_graph(float_graph))
        self._shapes = shapes
        self._constants = _float_constants(float_graph)
        self._floats: frozenset[str] = frozenset()
        self._slopes = {n.name: slope_of(n) for n in float_graph.graph.nodes if n.target is _LEAKY_RELU}
        self._real: dict[fx.Node, Any] = {}
        self._parameters: dict[fx.Node, tuple[float, int]] = {}

    def leave(self, names: Collection[str]) -> None:
        """Leave the layers whose nodes have these names in float from now on."""
        named = frozenset(n for n in self._float_graph.graph.nodes if n.name in names)
        plan = plan_islands(self._float_graph, whole_layers(named), self._shapes)
        self._floats = frozenset(node.name for node in plan.nodes)
        self._parameters = {}
        if self._ranges is None:
            return
        by_name = mixed_parameters(self._float_graph, plan, self._ranges)
        for node in self.graph.nodes:
            held = _held_by(node)
            if held is not None and held.name in by_name:
                self._parameters[node] = by_name[held.name]

    def run_batch(self, batch: torch.Tensor) -> Any:
        """Return what the network gives for float32 (n, c, h, w)."""
        self._real = {}
        with torch.inference_mode():
            return self.run(batch)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, in float where it was asked for."""
        if n.target is qd.quantize_per_tensor.default:
            self._real[n] = self.env[n.args[0]]  # type: ignore[index]
        if n in self._parameters:
            return n.target(self.env[n.args[0]], *self._parameters[n], *n.args[3:])  # type: ignore[operator,index]
        if n.target is qd.quantize_per_tensor.default:
            return super().run_node(n)
        if n.op == "output" and self._floats:
            return fx.map_arg(n.args[0], self._value)
        if n.name not in self._floats:
            return super().run_node(n)
        arguments: Any = fx.map_arg(n.args, self._value)
        if n.name in self._constants:
            arguments = (arguments[0], *self._constants[n.name], *arguments[3:])
        if n.name in self._slopes:
            arguments = (arguments[0], self._slopes[n.name], *arguments[2:])
        return n.target(*arguments, **fx.map_arg(n.kwargs, self._value))  # type: ignore[operator]

    def _value(self, node: fx.Node) -> Any:
        """Return what a reader in float reads."""
        held = node.args[0] if node.target is qd.dequantize_per_tensor.default else None
        if held not in self._real:
            return self.env[node]
        origin: Any = held
        while origin.args[0].target is qd.dequantize_per_tensor.default:  # converted on its way
            origin = origin.args[0].args[0]
        source = origin.args[0]
        if source.op == "placeholder" or source.name in self._floats:
            return self._real[origin]
        return self.env[node] if origin is held else self._real[held]  # type: ignore[index]


def _held_by(node: fx.Node) -> fx.Node | None:
    """Return the value whose parameters a quantize or dequantize node has, None for others and constants."""
    if node.target is qd.dequantize_per_tensor.default:
        node = node.args[0]  # type: ignore[assignment]
    if node.target is not qd.quantize_per_tensor.default:
        return None
    source: Any = node.args[0]
    if source.target is not qd.dequantize_per_tensor.default:
        return source  # type: ignore[no-any-return]
    return next(iter(next(iter(node.users)).users))  # converted for a concat


def _float_constants(graph: fx.GraphModule) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Return layer -> float weight and bias."""
    found = {}
    for node in graph.graph.nodes:
        spec = spec_of(node) if node.op == "call_function" else None
        if spec is None or spec.weight_axis is None or not is_constant(argument(node, 1, "weight")):
            continue
        bias = argument(node, 2, "bias")
        weight = fetch(graph, argument(node, 1, "weight"))
        found[node.name] = (weight, None if bias is None else fetch(graph, bias))
    return found


def mixed_outputs(graph: MixedGraph, batches: Sequence[torch.Tensor], names: Collection[str]) -> list[Any]:
    """Return what the network gives batch by batch with the named layers in float."""
    graph.leave(names)
    return [graph.run_batch(batch) for batch in batches]
