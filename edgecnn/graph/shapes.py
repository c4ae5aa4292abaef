"""Shapes of every value in a graph, with the batch dimension told apart.

The graph is run twice on tensors without data, for two batch sizes; a dimension that follows the batch
is the batch. That needs no symbolic shapes and works after any edit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.nodes import layer_name
from edgecnn.graph.program import BATCH
from edgecnn.model import Model, copy_graph


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph and keeps the shape of every tensor value."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.shapes: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UnsupportedOpError(f"{layer_name(n)} cannot be traced for shapes: {first_line}") from error
        if isinstance(value, torch.Tensor):
            self.shapes[n.name] = tuple(int(d) for d in value.shape)
        elif isinstance(value, (tuple, list)):
            self.shapes[n.name] = [tuple(v.shape) if isinstance(v, torch.Tensor) else None for v in value]
        return value


def infer_shapes(model: Model) -> dict[str, Any]:
    """Return node name -> shape, dimension 0 of a batched value being BATCH.

    Args:
        model: its graph may have been edited since the export.

    Returns:
        A tuple of ints per tensor node, a list of such tuples per node that gives several tensors.

    Raises:
        UnsupportedOpError: if the batch moves away from dimension 0 or is folded into another size.
    """
    if model.fixed_batch is not None:
        sizes: tuple[int, ...] = (model.fixed_batch,)
    else:
        sizes = (2, 3)
    meta_graph = copy_graph(model.graph).to("meta")
    runs = []
    for size in sizes:
        recorder = _ShapeRecorder(meta_graph)
        feeds = [
            torch.empty((size, *(int(d or 1) for d in spec.shape[1:])), device="meta")
            for spec in model.spec.inputs
        ]
        with torch.no_grad():
            recorder.run(*feeds)
        runs.append(recorder.shapes)
    nodes = {node.name: node for node in model.graph.graph.nodes}
    depends = _batch_dependent(model.graph)
    return {
        name: _merge(nodes[name], [run[name] for run in runs], sizes, name in depends) for name in runs[0]
    }


def _batch_dependent(graph: fx.GraphModule) -> set[str]:
    """Return names of the nodes that depend on an input."""
    found: set[str] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or any(n.name in found for n in node.all_input_nodes):
            found.add(node.name)
    return found


def _merge(node: fx.Node, shapes: list[Any], sizes: tuple[int, ...], batched: bool) -> Any:
    """Return the shape common to all runs, with BATCH where it follows the batch."""
    if isinstance(shapes[0], list):
        return [_merge(node, [s[i] for s in shapes], sizes, batched) for i in range(len(shapes[0]))]
    first = shapes[0]
    if first is None or not batched:
        return first
    if all(len(s) > 0 and s[0] == size for s, size in zip(shapes, sizes, strict=True)) and all(
        s[1:] == first[1:] for s in shapes
    ):
        return (BATCH, *first[1:])
    if all(s == first for s in shapes) and len(sizes) > 1:
        return first
    raise UnsupportedOpError(
        f"{layer_name(node)} gives shapes {shapes} for batches {sizes}, expected the batch first",
        hint="write the reshape with the batch first, for instance x.view(x.shape[0], ...)",
    )
