"""Fold batch normalization into the convolution or linear layer ahead of it.

    y = gamma * (conv(x; W, b) - mean) / sqrt(var + eps) + beta = conv(x; W', b')
    W' = W * g        b' = (b - mean) * g + beta        g = gamma / sqrt(var + eps)

A batch_norm that no such layer precedes (DenseNet, pre-activation ResNet) becomes a 1x1 depthwise
convolution with weight g and bias beta - mean * g: one kernel in every runtime, with its own scale per
channel once quantized. Of vectors (batch_norm after an activation in a classifier head) it becomes x * g + b.

Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2 (folding for inference).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from edgecnn.errors import PassError
from edgecnn.graph.inference_form import to_inference_form
from edgecnn.graph.nodes import (
    add_constant,
    argument,
    aten,
    copy_graph,
    fetch,
    finish,
    insert_call,
    is_constant,
    layer_name,
)
from edgecnn.graph.shapes import infer_shapes
from edgecnn.model import Model

_CHANNEL_AXIS = {  # axis of the output channels in the weight
    aten.conv2d.default: 0,
    aten.conv2d.padding: 0,
    aten.linear.default: 0,
    aten.conv_transpose2d.input: 1,
}


STATISTICS = "batch_norm_statistics"
"""Key in a layer's `meta`: (mean, std) of its output per channel in training, float64 (c_out,) each."""


@dataclass(frozen=True)
class FoldBatchNorm:
    """Pass: no batch_norm is left in the graph; the outputs are the same up to float rounding.

    The graph also gets the form from which files are made (`inference_form`).

    Source: arXiv:1712.05877, section 3.2.
    """

    name: ClassVar[str] = "fold_batch_norm"
    needs: ClassVar[frozenset[Any]] = frozenset()

    def requires(self, model: Model) -> None:
        """Refuse a graph whose batch norms are in training mode (their statistics move with the batch)."""
        for node in model.graph.graph.nodes:
            if node.target is not aten.batch_norm.default or not _reads_image(node):
                continue
            if argument(node, 3, "running_mean") is None or argument(node, 4, "running_var") is None:
                raise PassError(
                    f"{layer_name(node)} has no running statistics: it normalizes each batch by its own",
                    hint="train it with track_running_stats=True",
                )
            if argument(node, 5, "training"):
                raise PassError(
                    f"{layer_name(node)} is in training mode, expected eval mode",
                    hint="call .eval() before exporting",
                )

    def run(self, model: Model, context: Any) -> Model:  # noqa: ARG002 (the Pass protocol's signature)
        """Return the model with every batch_norm folded."""
        model = to_inference_form(model)
        graph = copy_graph(model.graph)
        found = [node for node in graph.graph.nodes if node.target is aten.batch_norm.default]
        shapes = infer_shapes(model) if found else {}
        for node in found:
            _fold(graph, node, len(shapes[node.name]))
        return model.with_graph(finish(graph))

    def ensures(self, before: Model, after: Model) -> None:  # noqa: ARG002
        """Check that none is left."""
        left = [n for n in after.graph.graph.nodes if n.target is aten.batch_norm.default]
        if left:
            raise PassError(f"{len(left)} batch_norm nodes are left, first {layer_name(left[0])}")


def _reads_image(node: fx.Node) -> bool:
    """Whether a value depends on the input: standardized weights do not."""
    seen, left = {node}, [node]
    while left:
        for source in left.pop().all_input_nodes:
            if source.op == "placeholder":
                return True
            if source not in seen:
                seen.add(source)
                left.append(source)
    return False


def _fold(graph: fx.GraphModule, node: fx.Node, rank: int) -> None:
    """Fold one batch_norm of values of shape (n, c, ...) with `rank` dimensions."""
    x, gamma, beta, mean, var = (argument(node, i, "") for i in range(5))
    eps = float(argument(node, 7, "eps", 1e-5))
    mean_value = fetch(graph, mean).double()
    inv_std = torch.rsqrt(fetch(graph, var).double() + eps)
    g = inv_std * fetch(graph, gamma).double() if gamma is not None else inv_std
    shift = fetch(graph, beta).double() if beta is not None else torch.zeros_like(mean_value)
    producer_weight = argument(x, 1, "weight") if x.target in _CHANNEL_AXIS else None
    if x.target is aten.linear.default and rank != 2:  # its channels are last, those of batch_norm second
        producer_weight = None
    spread = fetch(graph, gamma).double().abs() if gamma is not None else torch.ones_like(shift)
    if producer_weight is not None and is_constant(producer_weight) and len(x.users) == 1:
        _scale_producer(graph, x, g, shift - mean_value * g)
        x.meta[STATISTICS] = (shift, spread)
        node.replace_all_uses_with(x)
    elif rank != 4:
        shape = (-1, *([1] * (rank - 2)))
        factor = add_constant(graph, node, f"{node.name}_weight", g.float().reshape(shape))
        offset = add_constant(
            graph, node, f"{node.name}_bias", (shift - mean_value * g).float().reshape(shape)
        )
        scaled = insert_call(graph, node, aten.mul.Tensor, (x, factor), like=node)
        node.replace_all_uses_with(insert_call(graph, node, aten.add.Tensor, (scaled, offset), like=node))
    else:
        weight = add_constant(graph, node, f"{node.name}_weight", g.float().reshape(-1, 1, 1, 1))
        bias = add_constant(graph, node, f"{node.name}_bias", (shift - mean_value * g).float())
        args = (x, weight, bias, [1, 1], [0, 0], [1, 1], int(g.numel()))
        conv = insert_call(graph, node, aten.conv2d.default, args, like=node)
        conv.meta[STATISTICS] = (shift, spread)
        node.replace_all_uses_with(conv)
    graph.graph.erase_node(node)


def _scale_producer(graph: fx.GraphModule, conv: fx.Node, g: torch.Tensor, shift: torch.Tensor) -> None:
    """Write W * g and b * g + shift into the layer ahead (shapes (c_out, ...) and (c_out,))."""
    axis = _CHANNEL_AXIS[conv.target]  # type: ignore[index]
    weight_node, bias_node = argument(conv, 1, "weight"), argument(conv, 2, "bias")
    weight = fetch(graph, weight_node).double()
    groups = int(argument(conv, 6, "groups", 1)) if axis == 1 else 1
    if axis == 1 and groups > 1:  # (c_in, c_out/groups, k_h, k_w): the groups lie along c_in
        per_group = g.reshape(groups, 1, -1, 1, 1)
        scaled = (weight.reshape(groups, -1, *weight.shape[1:]) * per_group).reshape(weight.shape)
    else:
        shape = [1] * weight.dim()
        shape[axis] = -1
        scaled = weight * g.reshape(shape)
    bias = fetch(graph, bias_node).double() * g if bias_node is not None else torch.zeros_like(shift)
    new_weight = add_constant(graph, conv, str(weight_node.target), scaled.float())
    new_bias = add_constant(graph, conv, f"{conv.name}_bias", (bias + shift).float())
    arguments = list(conv.args)
    arguments[1] = new_weight
    if len(arguments) > 2:
        arguments[2] = new_bias
    else:
        arguments.append(new_bias)
    conv.args = tuple(arguments)
    conv.kwargs = {key: value for key, value in conv.kwargs.items() if key not in ("weight", "bias")}
