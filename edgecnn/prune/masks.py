"""Training with zeros that stay zero: every sparse weight is read through a constant mask.

    y = conv(x; W * M)        M = 1 where W is not zero, a buffer without gradient

so the gradient of a masked weight is exactly 0 and the network trained is the one that is left. Afterwards
the masks are multiplied into the weights and their nodes go.

Source: Han et al. 2015, arXiv:1506.02626, section 3 (retrain the weights that are left).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from edgecnn.graph.nodes import add_constant, argument, aten, copy_graph, finish, insert_call
from edgecnn.model import Model

_PREFIX = "sparsity_mask"


def with_masks(model: Model, names: Collection[str]) -> Model:
    """Return the network with the weights of `names` read through masks of their zeros.

    Args:
        model: left as it is.
        names: attribute names of weights.
    """
    graph = copy_graph(model.graph)
    weights = dict(graph.named_parameters())
    for node in list(graph.graph.nodes):
        weight = argument(node, 1, "weight") if node.op == "call_function" else None
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or weight.target not in names:
            continue
        mask = (weights[str(weight.target)] != 0).to(weights[str(weight.target)].dtype)
        constant = add_constant(graph, node, f"{_PREFIX}_{weight.target}", mask)
        masked = insert_call(graph, node, aten.mul.Tensor, (weight, constant), like=node)
        node.replace_input_with(weight, masked)
    return model.with_graph(finish(graph))


def without_masks(model: Model) -> Model:
    """Return the network with the masks of `with_masks` multiplied into the weights."""
    graph = copy_graph(model.graph)
    weights, buffers = dict(graph.named_parameters()), dict(graph.named_buffers())
    for node in list(graph.graph.nodes):
        if node.target is not aten.mul.Tensor or not isinstance(node.args[1], fx.Node):
            continue
        weight, mask = node.args[0], node.args[1]
        if isinstance(weight, fx.Node) and mask.op == "get_attr" and str(mask.target).startswith(_PREFIX):
            with torch.no_grad():
                weights[str(weight.target)].mul_(buffers[str(mask.target)])
            node.replace_all_uses_with(weight)
            graph.graph.erase_node(node)
    return model.with_graph(finish(graph))
