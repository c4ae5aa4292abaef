"""A network in the form from which files are made: the batch first, and rare operators as common ones.

    conv1d, avg_pool1d     those of images of height 1
    conv3d                 conv2d, where the kernel has size 1 along the depth
    stack                  concatenation along a new dimension
    sum over dimensions    mean times their size, for which there are integer kernels
    x^2, addcmul           products and sums
    pad with -inf          padding of the max pool behind it

Computed values are equal up to float rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import fx

from edgecnn.graph.batch_first import put_batch_first
from edgecnn.graph.nodes import (
    add_constant,
    argument,
    aten,
    copy_graph,
    fetch,
    finish,
    insert_call,
    is_constant,
)
from edgecnn.graph.pool_padding import max_pool_padding, pads_with_lowest
from edgecnn.graph.shapes import infer_shapes
from edgecnn.model import Model

Shapes = dict[str, Any]


def to_inference_form(model: Model) -> Model:
    """Return the model in that form; the same one where nothing is to be done.

    Args:
        model: float.

    Raises:
        UnsupportedOpError: if a value has no form with the batch first, or a max pool only padding to read.
    """
    if any(node.target in _WRAPPERS for node in model.graph.graph.nodes):
        graph = copy_graph(model.graph)
        for node in [n for n in graph.graph.nodes if n.target in _WRAPPERS]:
            _inline(graph, node)
        model = model.with_graph(finish(graph))
    model = put_batch_first(model)
    if not any(_has_rewrite(node) for node in model.graph.graph.nodes):
        return model
    work = model.with_graph(copy_graph(model.graph))
    shapes = infer_shapes(work)
    for node in list(work.graph.graph.nodes):
        replacement = _REWRITES[node.target](work.graph, node, shapes) if _has_rewrite(node) else None
        if replacement is not None:
            shapes[replacement.name] = shapes[node.name]
            node.replace_all_uses_with(replacement)
            work.graph.graph.erase_node(node)
    return work.with_graph(finish(work.graph))


def _has_rewrite(node: fx.Node) -> bool:
    """Whether a call may be replaced; of max pools only those that read a pad with minus infinity."""
    return node.target in _REWRITES and (
        node.target is not aten.max_pool2d.default or pads_with_lowest(node.args[0])
    )


_WRAPPERS = frozenset(
    {torch.ops.higher_order.wrap_with_autocast, torch.ops.higher_order.wrap_with_set_grad_enabled}
)


def _inline(graph: fx.GraphModule, node: fx.Node) -> None:
    """Put the calls of a part that was wrapped (autocast off, gradients off) in its place."""
    place = next(i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
    inner = getattr(graph, str(node.args[place].target))  # type: ignore[union-attr]
    values = iter(node.args[place + 1 :])
    env: dict[fx.Node, Any] = {}
    for part in inner.graph.nodes:
        if part.op == "placeholder":
            env[part] = next(values)
        elif part.op == "output":
            results = part.args[0]
            for user in list(node.users):
                user.replace_all_uses_with(env[results[user.args[1]]])
                graph.graph.erase_node(user)
        elif "_assert" in str(part.target):
            continue
        elif part.target is aten.to.dtype and part.args[1] is torch.float32:
            env[part] = env[part.args[0]]
        else:
            with graph.graph.inserting_before(node):
                env[part] = graph.graph.node_copy(part, lambda n: env[n])
    graph.graph.erase_node(node)


def _conv1d(graph: fx.GraphModule, node: fx.Node, shapes: Shapes) -> fx.Node | None:  # noqa: ARG001
    weight, padding = argument(node, 1, "weight"), argument(node, 4, "padding", 0)
    if not is_constant(weight) or isinstance(padding, str):
        return None
    values = fetch(graph, weight)
    wide = add_constant(graph, node, f"{node.name}_weight", values.unsqueeze(2))
    size = [_single(argument(node, i, name, 1)) for i, name in ((3, "stride"), (5, "dilation"))]
    x = insert_call(graph, node, aten.unsqueeze.default, (node.args[0], 2), like=node)
    groups = int(argument(node, 6, "groups", 1))
    bias = argument(node, 2, "bias")
    args = (x, wide, bias, [1, size[0]], [0, _single(padding)], [1, size[1]], groups)
    y = insert_call(graph, node, aten.conv2d.default, args, like=node)
    return insert_call(graph, node, aten.squeeze.dim, (y, 2), like=node)


def _avg_pool1d(graph: fx.GraphModule, node: fx.Node, shapes: Shapes) -> fx.Node | None:  # noqa: ARG001
    kernel = _single(argument(node, 1, "kernel_size"))
    given = argument(node, 2, "stride", None)
    stride = _single(given) if given else kernel
    padding = _single(argument(node, 3, "padding", 0))
    flags = (bool(argument(node, 4, "ceil_mode", False)), bool(argument(node, 5, "count_include_pad", True)))
    x = insert_call(graph, node, aten.unsqueeze.default, (node.args[0], 2), like=node)
    args = (x, [1, kernel], [1, stride], [0, padding], *flags)
    y = insert_call(graph, node, aten.avg_pool2d.default, args, like=node)
    return insert_call(graph, node, aten.squeeze.dim, (y, 2), like=node)


def _conv3d(graph: fx.GraphModule, node: fx.Node, shapes: Shapes) -> fx.Node | None:
    """Return a depthwise convolution for one of (n, 1, h, w, d) whose kernel has size 1 along d."""
    x, weight = shapes[str(node.args[0])], argument(node, 1, "weight")
    names = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    stride, padding, dilation = (list(argument(node, i, name, [d] * 3)) for i, name, d in names)
    if not is_constant(weight) or isinstance(argument(node, 4, "padding", 0), str):
        return None
    values = fetch(graph, weight)
    last = (values.shape[4], stride[-1], padding[-1])
    if x[1] != 1 or last != (1, 1, 0) or len(stride) != 3 or len(padding) != 3:
        return None
    depth, c_out = x[4], values.shape[0]
    wide = add_constant(graph, node, f"{node.name}_weight", values[..., 0].repeat(depth, 1, 1, 1))
    bias = argument(node, 2, "bias")
    if is_constant(bias):
        bias = add_constant(graph, node, f"{node.name}_bias", fetch(graph, bias).repeat(depth))

    def call(target: Any, *args: Any) -> fx.Node:
        return insert_call(graph, node, target, args, like=node)

    image = call(aten.squeeze.dim, call(aten.permute.default, node.args[0], [0, 1, 4, 2, 3]), 1)
    y = call(aten.conv2d.default, image, wide, bias, stride[:2], padding[:2], dilation[:2], depth)
    _, _, height, width, _ = shapes[node.name]
    parts = call(aten.reshape.default, y, [-1, depth, c_out, height, width])
    return call(aten.permute.default, parts, [0, 2, 3, 4, 1])


def _single(value: Any) -> int:
    return int(value) if isinstance(value, int) else int(value[0])


def _stack(graph: fx.GraphModule, node: fx.Node, shapes: Shapes) -> fx.Node:
    dim = int(argument(node, 1, "dim", 0)) % len(shapes[node.name])
    parts = [
        insert_call(graph, node, aten.unsqueeze.default, (part, dim), like=node)
        for part in node.args[0]  # type: ignore[union-attr]
    ]
    return insert_call(graph, node, aten.cat.default, (parts, dim), like=node)


def _sum(graph: fx.GraphModule, node: fx.Node, shapes: Shapes) -> fx.Node | None:
    shape = shapes[str(node.args[0])]
    dims: Any = argument(node, 1, "dim")
    sizes = [shape[d] for d in ([dims] if isinstance(dims, int) else dims or [0])]
    if min(sizes) < 1:
        return None
    keepdim = bool(argument(node, 2, "keepdim", False))
    mean = insert_call(graph, node, aten.mean.dim, (node.args[0], dims, keepdim), like=node)
    return insert_call(graph, node, aten.mul.Tensor, (mean, float(prod(sizes))), like=node)


def _square(graph: fx.GraphModule, node: fx.Node, shapes: Shapes) -> fx.Node | None:  # noqa: ARG001
    if node.target is aten.pow.Tensor_Scalar and node.args[1] != 2:
        return None
    return insert_call(graph, node, aten.mul.Tensor, (node.args[0], node.args[0]), like=node)


def _addcmul(graph: fx.GraphModule, node: fx.Node, shapes: Shapes) -> fx.Node | None:  # noqa: ARG001
    if node.kwargs.get("value", 1) != 1:
        return None
    product = insert_call(graph, node, aten.mul.Tensor, (node.args[1], node.args[2]), like=node)
    return insert_call(graph, node, aten.add.Tensor, (node.args[0], product), like=node)


_REWRITES: dict[Any, Callable[[fx.GraphModule, fx.Node, Shapes], fx.Node | None]] = {
    aten.addcmul.default: _addcmul,
    aten.avg_pool1d.default: _avg_pool1d,
    aten.conv1d.default: _conv1d,
    aten.conv3d.default: _conv3d,
    aten.max_pool2d.default: max_pool_padding,
    aten.pow.Tensor_Scalar: _square,
    aten.square.default: _square,
    aten.stack.default: _stack,
    aten.sum.dim_IntList: _sum,
}
