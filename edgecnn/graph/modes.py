"""Training and evaluation mode of an exported graph, and fresh statistics for its batch norms.

An exported graph has no `.train()`: each batch_norm and dropout node carries its mode as an argument.

    train:  y = gamma * (x - mean(x)) / sqrt(var(x) + eps) + beta
            running <- (1 - momentum) * running + momentum * batch statistic
    eval:   y = gamma * (x - running_mean) / sqrt(running_var + eps) + beta

Re-estimation replaces the running statistics by the mean, over some batches, of what each batch has:
running_mean = (1/B) sum_b mean(x_b), running_var = (1/B) sum_b var(x_b), the variance being unbiased.

Source: Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 2 (statistics over several batches).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from edgecnn.graph.nodes import argument, aten

_FLAG = {  # position of the argument that says "training"
    aten.batch_norm.default: 5,
    aten.instance_norm.default: 5,
    aten.dropout.default: 2,
    aten.dropout_.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
}
_NORMS = {aten.batch_norm.default: "training", aten.instance_norm.default: "use_input_stats"}
_MOMENTUM = 6


def set_training(graph: fx.GraphModule, training: bool) -> None:
    """Flip every batch_norm and dropout of a graph, in place, and compile it again.

    A batch_norm without running statistics always uses the batch's and stays as it is.

    Args:
        graph: a copy (`edgecnn.graph.nodes.copy_graph`), since it is changed.
        training: True for batch statistics and dropout, False for running statistics and none.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.BatchNorm2d(1)).eval()
        >>> graph = torch.export.export(net, (torch.ones(2, 1, 2, 2),)).module()
        >>> set_training(graph, True)
        >>> y = graph(torch.full((2, 1, 2, 2), 4.0)).detach()
        >>> float(y.abs().max()), round(float(graph.get_buffer("0.running_mean")), 6)
        (0.0, 0.4)
    """
    for node in graph.graph.nodes:
        position = _FLAG.get(node.target)
        if position is None:
            continue
        name = "train"
        if node.target in _NORMS:
            if argument(node, 3, "running_mean") is None:
                continue
            name = _NORMS[node.target]
        _set_argument(node, position, name, training)
    graph.recompile()


def _set_argument(node: fx.Node, position: int, name: str, value: Any) -> None:
    """Write a call's argument where it stands, by position or by keyword."""
    if len(node.args) > position:
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def batch_norm_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    """Return the batch_norm nodes that keep running statistics, in execution order."""
    return [
        node
        for node in graph.graph.nodes
        if node.target is aten.batch_norm.default and argument(node, 3, "running_mean") is not None
    ]


def reestimate_batch_norm(graph: fx.GraphModule, batches: Iterable[torch.Tensor]) -> int:
    """Replace the running statistics by the mean of what each batch has; the weights stay.

    After pruning, or for averaged weights (EMA), the statistics that training left behind fit no more.

    Args:
        graph: changed in place; its modes are as they were afterwards.
        batches: network inputs (n, c, h, w), on the graph's device, n at least 2.

    Returns:
        The number of batches used; with 0 nothing is changed.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.BatchNorm2d(1)).eval()
        >>> graph = torch.export.export(net, (torch.ones(2, 1, 1, 1),)).module()
        >>> reestimate_batch_norm(graph, [torch.tensor([0.0, 2.0]).reshape(2, 1, 1, 1)])
        1
        >>> float(graph.get_buffer("0.running_mean")), float(graph.get_buffer("0.running_var"))
        (1.0, 2.0)
    """
    nodes = batch_norm_nodes(graph)
    if not nodes:
        return 0
    saved = [(node, argument(node, 5, "training"), argument(node, _MOMENTUM, "momentum")) for node in nodes]
    count = 0
    try:
        with torch.no_grad():
            for count, batch in enumerate(batches, 1):
                for node in nodes:
                    _set_argument(node, 5, "training", True)
                    # momentum 1/b makes the running value the mean of the first b batches
                    _set_argument(node, _MOMENTUM, "momentum", 1.0 / count)
                graph.recompile()
                graph(batch)
    finally:
        for node, training, momentum in saved:
            _set_argument(node, 5, "training", training)
            _set_argument(node, _MOMENTUM, "momentum", momentum)
        graph.recompile()
    return count
