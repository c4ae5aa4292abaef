"""Run the float and the quantized graph side by side, node by node, over all images at once.

An algorithm that goes through a network layer by layer (bias correction, AdaRound) wants at each layer what
came in and out over all images, in both networks, with every earlier layer finished. Stopping at each layer
costs one run of each network in all; starting again for every layer would cost as many as there are layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from edgecnn.graph.nodes import argument, aten, fetch, is_constant
from edgecnn.graph.shapes import infer_shapes
from edgecnn.model import Model
from edgecnn.quantize.annotate import fuses_into_clamp, spec_of

MAX_VALUE_BYTES = 256 * 2**20
"""Images are as many as keep the largest value of a network, over all of them, below this."""


class Stepper:
    """A graph that is run up to a node, then further.

    Attributes:
        graph: may be edited where it has not been run yet; constants are read when a node uses them.
    """

    def __init__(self, graph: fx.GraphModule, batches: Sequence[torch.Tensor]) -> None:
        self.graph = graph
        self._batches = list(batches)
        self._nodes = list(graph.graph.nodes)
        self._position = 0
        self._values: dict[fx.Node, list[Any]] = {}
        self._last_use = {source: node for node in self._nodes for source in node.all_input_nodes}

    def run_until(self, node: fx.Node) -> None:
        """Run everything ahead of a node."""
        while self._nodes[self._position] is not node:
            self._step(self._nodes[self._position])
            self._position += 1

    def run_through(self, node: fx.Node) -> list[torch.Tensor]:
        """Run up to and with a node; return its value, batch by batch."""
        if node not in self._values:
            self.run_until(node)
            self._step(node)
            self._position += 1
        return self._values[node]

    def value(self, node: fx.Node) -> list[torch.Tensor]:
        """Return a value that has been computed and is still to be used, batch by batch."""
        return self._values[node]

    def has(self, node: fx.Node) -> bool:
        """Return whether `value` knows the node now."""
        return node in self._values

    def constant(self, node: fx.Node) -> Any:
        """Return the value of a node that depends on parameters only."""
        if is_constant(node):
            return fetch(self.graph, node)
        arguments = fx.map_arg(node.args, self.constant)
        return node.target(*arguments, **fx.map_arg(node.kwargs, self.constant))  # type: ignore[operator]

    def _step(self, node: fx.Node) -> None:
        sources = node.all_input_nodes
        if node.op == "placeholder":
            self._values[node] = self._batches
        elif node.op == "call_function" and any(source in self._values for source in sources):
            known = {source: self.constant(source) for source in sources if source not in self._values}
            with torch.no_grad():
                self._values[node] = [self._call(node, known, i) for i in range(len(self._batches))]
        for source in sources:
            if self._last_use[source] is node:
                self._values.pop(source, None)

    def _call(self, node: fx.Node, known: dict[fx.Node, Any], index: int) -> Any:
        def look_up(source: fx.Node) -> Any:
            return known[source] if source in known else self._values[source][index]

        return node.target(*fx.map_arg(node.args, look_up), **fx.map_arg(node.kwargs, look_up))  # type: ignore[operator]


@dataclass(frozen=True)
class LayerPair:
    """One layer in both networks.

    Attributes:
        float_node: the layer in the float graph.
        node: the same layer in the quantized graph.
        float_end: the float layer itself, or the clamp that is part of it.
        clamp: (low, high) of that clamp, None where there is no bound.
    """

    float_node: fx.Node
    node: fx.Node
    float_end: fx.Node
    clamp: tuple[float | None, float | None]


def layer_pairs(float_graph: fx.GraphModule, graph: fx.GraphModule) -> list[LayerPair]:
    """Return every layer with integer weights in both graphs, in execution order.

    Args:
        float_graph: what was quantized.
        graph: the quantized graph, whose nodes kept their names.
    """
    by_name = {node.name: node for node in float_graph.graph.nodes}
    pairs = []
    for node in graph.graph.nodes:
        spec = spec_of(node) if node.op == "call_function" else None
        if spec is None or spec.weight_axis is None or is_constant(argument(node, 1, "weight")):
            continue  # the last is a layer left in float
        float_node = by_name[node.name]
        end = next(iter(float_node.users)) if fuses_into_clamp(float_node) else float_node
        pairs.append(LayerPair(float_node, node, end, clamp_bounds(end)))
    return pairs


def clamp_bounds(node: fx.Node) -> tuple[float | None, float | None]:
    """Return (low, high) of a clamp, (None, None) of anything else."""
    if node.target is aten.relu.default:
        return 0.0, None
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    if node.target is aten.hardtanh.default:
        return float(argument(node, 1, "min_val", -1.0)), float(argument(node, 2, "max_val", 1.0))
    if node.target in (aten.clamp.default, aten.clamp_min.default):
        low, high = argument(node, 1, "min"), argument(node, 2, "max")
        return None if low is None else float(low), None if high is None else float(high)
    return None, None


def affordable_images(model: Model, wanted: int) -> int:
    """Return how many images fit into memory at once, at most `wanted`, at least 1."""
    shapes = [s for s in infer_shapes(model).values() if isinstance(s, tuple) and s[:1] == (-1,)]
    largest = max((int(np.prod(shape[1:])) for shape in shapes), default=1)
    return max(min(wanted, MAX_VALUE_BYTES // (4 * max(largest, 1))), 1)
