"""What a network gives with some layers left in float, without quantizing it anew.

The int8 graph holds every value as v -> quantize -> dequantize -> readers. A layer left in float reads v
itself where v is made in float, and the dequantized value where v is made in int8; int8 readers always read
the latter. Scales are those of the full int8 network: those that mixed precision chooses for values between
float and int8 differ a little, since float operators demand nothing of them (0.0 to 0.5 dB on ResNet-20).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.ao.quantization.fx import _decomposed  # noqa: F401 (registers torch.ops.quantized_decomposed)

from edgecnn.graph.nodes import argument, fetch, is_constant
from edgecnn.quantize.float_layers import whole_layers
from edgecnn.quantize.islands import plan_islands
from edgecnn.quantize.scheme import spec_of

qd = torch.ops.quantized_decomposed


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
        self._float_graph = float_graph
        self._shapes = shapes
        self._constants = _float_constants(float_graph)
        self._floats: frozenset[str] = frozenset()
        self._real: dict[fx.Node, Any] = {}

    def leave(self, names: Collection[str]) -> None:
        """Leave the layers whose nodes have these names in float from now on."""
        named = frozenset(n for n in self._float_graph.graph.nodes if n.name in names)
        plan = plan_islands(self._float_graph, whole_layers(named), self._shapes)
        self._floats = frozenset(node.name for node in plan.nodes)

    def run_batch(self, batch: torch.Tensor) -> Any:
        """Return what the network gives for float32 (n, c, h, w)."""
        self._real = {}
        with torch.inference_mode():
            return self.run(batch)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, in float where it was asked for."""
        if n.target is qd.quantize_per_tensor.default:
            self._real[n] = self.env[n.args[0]]  # type: ignore[index]
            return super().run_node(n)
        if n.op == "output" and self._floats:
            return fx.map_arg(n.args[0], self._value)
        if n.name not in self._floats:
            return super().run_node(n)
        arguments: Any = fx.map_arg(n.args, self._value)
        if n.name in self._constants:
            arguments = (arguments[0], *self._constants[n.name], *arguments[3:])
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
