"""What a cut network is checked for: it runs, its outputs keep their shapes, it costs what was predicted."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from edgecnn.errors import PassError, UnsupportedOpError
from edgecnn.graph.channels.trace import ShapeInterpreter
from edgecnn.graph.nodes import argument, copy_graph
from edgecnn.model import Model


class _Counter(ShapeInterpreter):
    """Runs a graph on tensors without data and adds up its multiply-accumulates."""

    def __init__(self, graph: fx.GraphModule, weighted: frozenset[str]) -> None:
        super().__init__(graph)
        self.weighted = weighted
        self.macs = 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.weighted:
            x, weight = (self.env[argument(n, i, name)] for i, name in ((0, "input"), (1, "weight")))
            if "conv" not in str(n.target):
                self.macs += prod(value.shape) * int(x.shape[-1])
            else:
                spread = x if "transpose" in str(n.target) else value
                self.macs += prod(spread.shape) * prod(weight.shape[1:])
        return value


def count_macs(model: Model, weighted: frozenset[str], batch: int) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Run a graph without data.

    Args:
        model: any.
        weighted: names of the nodes that multiply and accumulate.
        batch: number of images.

    Returns:
        Multiply-accumulates of one image, and the shapes of the outputs.

    Raises:
        PassError: naming the first node that does not run.
    """
    counter = _Counter(model.graph, weighted)
    try:
        outputs = pytree.tree_leaves(counter.run_shapes(model, batch))
    except UnsupportedOpError as error:
        raise PassError(f"after the cut, {error.message}") from error
    return counter.macs // batch, tuple(tuple(int(s) for s in o.shape) for o in outputs)


def _images(model: Model, batch: int) -> list[Tensor]:
    shapes = [(batch, *(int(d or 1) for d in spec.shape[1:])) for spec in model.spec.inputs]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def run_outputs(model: Model, batch: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the outputs for a batch of Gaussian noise, computed in float32 or in float64."""
    graph = model.graph if dtype == torch.float32 else copy_graph(model.graph).to(dtype)
    with torch.no_grad():
        return list(pytree.tree_leaves(graph(*(x.to(dtype) for x in _images(model, batch)))))


def batch_sizes(model: Model) -> tuple[int, ...]:
    """Return the batch sizes a network is tried with."""
    return (model.fixed_batch,) if model.fixed_batch is not None else (2, 3)
