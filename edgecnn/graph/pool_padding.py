"""Padding with minus infinity ahead of a max pool, written as padding of the pool.

timm's `MaxPool2dSame` pads as TensorFlow's "SAME" does, one side more than the other, and with minus
infinity, since nothing of the padding may win. No level is minus infinity, and the padding of every runtime's
max pool never wins:

    max_pool2d(pad(x, (0, 1, 0, 1), -inf), 3, 2) = max_pool2d(x, 3, 2, ceil_mode=True)    x of even size

aten.max_pool2d pads both sides alike; where its windows start elsewhere it gets more padding, and the windows
that nobody asked for are cut off.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.nodes import argument, aten, insert_call, layer_name, pair
from edgecnn.graph.windows import Windows

_LOWEST = float(np.finfo(np.float32).min)


def pads_with_lowest(node: Any) -> bool:
    """Whether a node pads with minus infinity, or with the lowest number there is, which stands for it."""
    if not isinstance(node, fx.Node):
        return False
    if node.target is aten.constant_pad_nd.default:
        value = argument(node, 2, "value", 0)
    elif node.target is aten.pad.default and argument(node, 2, "mode", "constant") == "constant":
        value = argument(node, 3, "value", 0)
    else:
        return False
    return float(value or 0) <= _LOWEST


def max_pool_padding(graph: fx.GraphModule, node: fx.Node, shapes: dict[str, Any]) -> fx.Node | None:
    """Return the max pool that pads by itself for one that reads a pad with minus infinity.

    Args:
        graph: of the pool.
        node: aten.max_pool2d.
        shapes: of `infer_shapes`.

    Returns:
        None where it reads something else, or where no padding of a pool gives the same windows.

    Raises:
        UnsupportedOpError: if a window holds padding alone.
    """
    pad: Any = node.args[0]
    if not pads_with_lowest(pad):
        return None
    amounts = [int(amount) for amount in pad.args[1]]
    if min(amounts) < 0 or any(amounts[4:]):
        return None
    left, _, top, _ = (*amounts, 0, 0, 0, 0)[:4]
    read = windows_of(node, shapes[pad.args[0].name], shapes[node.name])
    wanted = [replace(dim, before=dim.before + more) for dim, more in zip(read, (top, left), strict=True)]
    if any(dim.hold_padding_alone() for dim in wanted):
        raise holds_padding_alone(node)
    found = [dim.padded_alike() for dim in wanted]
    alike = [dim for dim in found if dim is not None]
    if len(alike) < len(found):
        return None
    bounds = [(y.skipped, y.skipped + dim.count) for y, dim in zip(alike, wanted, strict=True)]
    up = any(y.count < stop for y, (_, stop) in zip(alike, bounds, strict=True))
    size, stride = argument(node, 1, "kernel_size"), argument(node, 2, "stride", [])
    padding, dilation = [y.padding for y in alike], argument(node, 4, "dilation", 1)
    args = (pad.args[0], size, stride, padding, dilation, up)
    pool = insert_call(graph, node, aten.max_pool2d.default, args, like=node)
    for dim, (y, (start, stop)) in enumerate(zip(alike, bounds, strict=True), 2):
        if (start, stop) != (0, y.count_up if up else y.count):
            pool = insert_call(graph, node, aten.slice.Tensor, (pool, dim, start, stop), like=node)
    return pool


def windows_of(node: fx.Node, x: tuple[int, ...], y: tuple[int, ...]) -> tuple[Windows, Windows]:
    """Return the windows of aten.max_pool2d along h and w.

    Args:
        node: the pool.
        x: shape of what it reads, (n, c, h, w).
        y: shape of what it gives.
    """
    kernel = pair(argument(node, 1, "kernel_size"))
    stride = pair(argument(node, 2, "stride", None) or kernel)
    padding, dilation = pair(argument(node, 3, "padding", 0)), pair(argument(node, 4, "dilation", 1))
    height, width = (
        Windows(x[2 + i], y[2 + i], kernel[i], stride[i], padding[i], dilation[i]) for i in range(2)
    )
    return height, width


def holds_padding_alone(node: fx.Node) -> UnsupportedOpError:
    """Return the error of a max pool with windows of which no value is known."""
    return UnsupportedOpError(
        f"{layer_name(node)} has a window that holds padding alone, whose maximum is minus infinity, "
        "expected a value of the input in each",
        hint="pad by less than the window",
    )
