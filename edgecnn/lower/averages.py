"""Write averages over windows and over channels as convolutions with constant weights.

    avg_pool2d(x; k_h, k_w) = depthwise conv2d(x; w = 1 / (k_h k_w))        mean over c = conv2d(x; w = 1 / c)

Runtimes round the average of an even number of integers differently (LiteRT away from zero, ONNX Runtime
after a float division, so at random for a tie); a convolution they requantize alike, bit for bit. XNNPACK has
no int8 average pool either, so the pool would also break its delegate in two.

Measured on DenseNet-121 with random weights: the tie-prone pools moved 9 % of the ONNX outputs by 2 or 3 LSB
and cut the TFLite file into 6 delegates; as convolutions the files agree bit for bit, in one delegate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from edgecnn.graph.nodes import add_constant, argument, aten, copy_graph, finish, insert_call, pair
from edgecnn.graph.same_outputs import refuse_changed_outputs
from edgecnn.graph.shapes import infer_shapes
from edgecnn.model import Model


@dataclass(frozen=True)
class AveragesToConvolutions:
    """Pass: average pools and channel means become convolutions; outputs equal up to float rounding.

    Global averages, and pools that leave padding out of the count, stay.

    Source: Lin et al. 2014, arXiv:1312.4400, section 3.2 (what an average pool computes).
    """

    name: ClassVar[str] = "averages_to_convolutions"
    needs: ClassVar[frozenset[Any]] = frozenset()

    def requires(self, model: Model) -> None:
        """Accept every model."""

    def run(self, model: Model, context: Any) -> Model:  # noqa: ARG002 (the Pass protocol's signature)
        """Return the model with the averages rewritten."""
        work = model.with_graph(copy_graph(model.graph))
        shapes = infer_shapes(work)
        for node in list(work.graph.graph.nodes):
            replacement = None
            if node.target is aten.avg_pool2d.default:
                replacement = _pool(work.graph, node, shapes[node.args[0].name], shapes[node.name])
            elif node.target is aten.adaptive_avg_pool2d.default:
                replacement = _adaptive(work.graph, node, shapes[node.args[0].name], shapes[node.name])
            elif node.target is aten.mean.dim:
                replacement = _channel_mean(work.graph, node, shapes[node.args[0].name])
            if replacement is not None:
                shapes[replacement.name] = shapes[node.name]
                node.replace_all_uses_with(replacement)
                work.graph.graph.erase_node(node)
        return work.with_graph(finish(work.graph))

    def ensures(self, before: Model, after: Model) -> None:
        """Check that noise gives the same outputs; what has no such form stays as it is."""
        refuse_changed_outputs(before, after, self.name)


def _depthwise(
    graph: fx.GraphModule,
    node: fx.Node,
    channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> fx.Node:
    weight = torch.full((channels, 1, *kernel), 1.0 / (kernel[0] * kernel[1]))
    constant = add_constant(graph, node, f"{node.name}_weight", weight)
    args = (node.args[0], constant, None, list(stride), list(padding), [1, 1], channels)
    return insert_call(graph, node, aten.conv2d.default, args, like=node)


def _pool(graph: fx.GraphModule, node: fx.Node, x: tuple[int, ...], y: tuple[int, ...]) -> fx.Node | None:
    """Return the convolution for a pool whose windows all divide by the same count."""
    kernel = pair(argument(node, 1, "kernel_size"))
    stride = pair(argument(node, 2, "stride", None) or kernel)
    padding = pair(argument(node, 3, "padding", 0))
    divisor = argument(node, 6, "divisor_override", None)
    excludes_padding = any(padding) and not argument(node, 5, "count_include_pad", True)
    floor_sizes = tuple((x[2 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2))
    if excludes_padding or divisor not in (None, kernel[0] * kernel[1]) or floor_sizes != tuple(y[2:]):
        return None
    return _depthwise(graph, node, x[1], kernel, stride, padding)


def _adaptive(graph: fx.GraphModule, node: fx.Node, x: tuple[int, ...], y: tuple[int, ...]) -> fx.Node | None:
    """Return the convolution for an adaptive pool with equal windows, neither global nor the identity."""
    if y[2:] == (1, 1) or x[2:] == y[2:] or x[2] % y[2] or x[3] % y[3]:
        return None
    kernel = (x[2] // y[2], x[3] // y[3])
    return _depthwise(graph, node, x[1], kernel, kernel, (0, 0))


def _channel_mean(graph: fx.GraphModule, node: fx.Node, x: tuple[int, ...]) -> fx.Node | None:
    """Return the 1x1 convolution to one channel for a mean over dimension 1 that keeps it."""
    dims = argument(node, 1, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or [])
    if len(x) != 4 or [int(d) % 4 for d in dims] != [1] or not argument(node, 2, "keepdim", False):
        return None
    constant = add_constant(graph, node, f"{node.name}_weight", torch.full((1, x[1], 1, 1), 1.0 / x[1]))
    args = (node.args[0], constant, None, [1, 1], [0, 0], [1, 1], 1)
    return insert_call(graph, node, aten.conv2d.default, args, like=node)
