"""Lowerings of convolution, linear, normalization, pooling and reductions.

Padding is written as what is read: a convolution or pool whose stride skips the end of the padded input
gets less padding at the end than PyTorch's symmetric argument says (top, left, bottom, right).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.build import ProgramBuilder
from edgecnn.graph.nodes import argument, layer_name, pair
from edgecnn.graph.pool_padding import holds_padding_alone, windows_of

qd = torch.ops.quantized_decomposed


def read_padding(size: int, out: int, kernel: int, stride: int, dilation: int, before: int) -> int:
    """Return the padding at the end that `out` windows really read.

    Example: 224 pixels, kernel 7, stride 2, padding 3: 112 windows read 2 at the end.
        >>> read_padding(224, 112, 7, 2, 1, 3)
        2
    """
    return max((out - 1) * stride + dilation * (kernel - 1) + 1 - size - before, 0)


def _window(
    x_shape: tuple[int, ...], out_shape: tuple[int, ...], attributes: dict[str, Any], before: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return padding (top, left, bottom, right) for windows with the given kernel, stride and dilation."""
    ends = [
        read_padding(
            x_shape[2 + i],
            out_shape[2 + i],
            attributes["kernel"][i],
            attributes["stride"][i],
            attributes["dilation"][i],
            before[i],
        )
        for i in range(2)
    ]
    return (before[0], before[1], ends[0], ends[1])


def _weights(builder: ProgramBuilder, node: fx.Node) -> tuple[list[str], tuple[int, ...]]:
    """Return the names of x, w and b where there is one, and the weight's shape."""
    x, w, b = node.args[0], node.args[1], argument(node, 2, "bias")
    names = [builder.tensor(x), builder.weight(w)]
    weight = builder.tensors[names[1]]
    if not weight.is_constant:
        raise UnsupportedOpError(
            f"{layer_name(node)} has a weight computed from the input, expected a parameter"
        )
    if b is not None:
        names.append(builder.tensor(b))
    return names, weight.shape


def _run_time(node: fx.Node, over: str) -> dict[str, Any]:
    """Return the attribute `dynamic` of a layer whose input is quantized at run time, else nothing."""
    x = node.args[0]
    is_dynamic = isinstance(x, fx.Node) and x.target is qd.dequantize_per_tensor.tensor
    return {"dynamic": over} if is_dynamic else {}


def conv2d(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.conv2d, with a number or "same"/"valid" as padding."""
    names, w_shape = _weights(builder, node)
    stride, dilation = pair(argument(node, 3, "stride", 1)), pair(argument(node, 5, "dilation", 1))
    padding = argument(node, 4, "padding", 0)
    kernel = (w_shape[2], w_shape[3])
    if padding == "same":
        before = (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2)
    else:
        before = (0, 0) if padding == "valid" else pair(padding)
    window = {"kernel": kernel, "stride": stride, "dilation": dilation}
    pads = _window(builder.tensors[names[0]].shape, builder.shape(node), window, before)
    groups = int(argument(node, 6, "groups", 1))
    attributes = {"stride": stride, "padding": pads, "dilation": dilation, "groups": groups}
    return builder.emit(node, "conv2d", names, {**attributes, **_run_time(node, "image")})


def conv_transpose2d(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.conv_transpose2d."""
    names, _ = _weights(builder, node)
    padding = pair(argument(node, 4, "padding", 0))
    return builder.emit(
        node,
        "conv_transpose2d",
        names,
        {
            "stride": pair(argument(node, 3, "stride", 1)),
            "padding": (*padding, *padding),
            "output_padding": pair(argument(node, 5, "output_padding", 0)),
            "groups": int(argument(node, 6, "groups", 1)),
            "dilation": pair(argument(node, 7, "dilation", 1)),
        },
    )


def linear(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.linear."""
    names, _ = _weights(builder, node)
    return builder.emit(node, "linear", names, _run_time(node, "row"))


def batch_norm(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower a batch_norm that was not folded (float baselines of raw graphs).

    On an image it is a 1x1 depthwise convolution, elsewhere a multiplication and an addition.
    """
    x = builder.tensor(node.args[0])
    if argument(node, 5, "training"):
        raise UnsupportedOpError(f"{layer_name(node)} is in training mode, expected eval mode")
    parts = [builder.constant_value(argument(node, i, "")) for i in range(1, 5)]
    gamma, beta, mean, var = (None if p is None else p.double() for p in parts)
    if mean is None or var is None:
        raise UnsupportedOpError(f"{layer_name(node)} has no running statistics")
    g = torch.rsqrt(var + float(argument(node, 7, "eps", 1e-5)))
    g = g if gamma is None else g * gamma
    shift = (torch.zeros_like(mean) if beta is None else beta) - mean * g
    rank = len(builder.tensors[x].shape)
    if rank != 4:
        shape = (-1, *([1] * (rank - 2)))
        factor = builder.constant(g.float().reshape(shape).numpy(), f"{node.name}_weight")
        offset = builder.constant(shift.float().reshape(shape).numpy(), f"{node.name}_bias")
        return builder.emit(node, "add", [builder.emit(node, "mul", [x, factor]), offset])
    weight = builder.constant(g.float().reshape(-1, 1, 1, 1).numpy(), f"{node.name}_weight")
    bias = builder.constant(np.asarray(shift.float()), f"{node.name}_bias")
    return builder.emit(
        node,
        "conv2d",
        [x, weight, bias],
        {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": int(g.numel())},
    )


def max_pool2d(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.max_pool2d; ceil_mode shows in the output's shape."""
    out = builder.shapes[node.name]
    return _max_pool(builder, node, tuple(out[0]) if isinstance(out, list) else tuple(out))


def max_pool2d_with_indices(builder: ProgramBuilder, node: fx.Node) -> list[str | None]:
    """Lower the form that gives indices too; those have no lowering."""
    return [max_pool2d(builder, node), None]


def _max_pool(builder: ProgramBuilder, node: fx.Node, out: tuple[int, ...]) -> str:
    x = builder.tensor(node.args[0])
    kernel = pair(argument(node, 1, "kernel_size"))
    stride = pair(argument(node, 2, "stride", None) or kernel)
    dilation = pair(argument(node, 4, "dilation", 1))
    window = {"kernel": kernel, "stride": stride, "dilation": dilation}
    before = pair(argument(node, 3, "padding", 0))
    if any(dim.hold_padding_alone() for dim in windows_of(node, builder.tensors[x].shape, out)):
        raise holds_padding_alone(node)
    pads = _window(builder.tensors[x].shape, out, window, before)
    return builder.emit(node, "max_pool2d", [x], {"padding": pads, **window}, out)


def avg_pool2d(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.avg_pool2d where every window divides by the same count or excludes padding."""
    x = builder.tensor(node.args[0])
    x_shape, out = builder.tensors[x].shape, builder.shape(node)
    kernel = pair(argument(node, 1, "kernel_size"))
    stride = pair(argument(node, 2, "stride", None) or kernel)
    before = pair(argument(node, 3, "padding", 0))
    divisor = argument(node, 6, "divisor_override", None)
    if divisor not in (None, kernel[0] * kernel[1]):
        raise UnsupportedOpError(
            f"{layer_name(node)} has divisor_override={divisor}, expected the window's size"
        )
    pads = _window(x_shape, out, {"kernel": kernel, "stride": stride, "dilation": (1, 1)}, before)
    include = bool(argument(node, 5, "count_include_pad", True)) and any(
        before
    )  # ceil_mode's is never counted
    if include and (pads[2] > before[0] or pads[3] > before[1]):
        raise UnsupportedOpError(
            f"{layer_name(node)}: ceil_mode with count_include_pad divides edge windows unevenly",
            hint="use ceil_mode=False or count_include_pad=False",
        )
    include = include or not any(pads)
    return builder.emit(
        node,
        "avg_pool2d",
        [x],
        {"kernel": kernel, "stride": stride, "padding": pads, "count_include_pad": include},
    )


def _adaptive_window(builder: ProgramBuilder, node: fx.Node, out: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the kernel of an adaptive pool whose windows are all alike; None for the identity."""
    x_shape = builder.tensors[builder.tensor(node.args[0])].shape
    sizes = list(zip(x_shape[2:], out[2:], strict=False))
    if any(size % target for size, target in sizes):
        raise UnsupportedOpError(
            f"{layer_name(node)} from {x_shape[2:]} to {out[2:]} has windows of unequal size",
            hint="choose an --input-shape for which the sizes divide",
        )
    kernel = (sizes[0][0] // sizes[0][1], sizes[1][0] // sizes[1][1])
    return None if kernel == (1, 1) else kernel


def adaptive_avg_pool2d(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower to a mean over (h, w), an average pool, or nothing."""
    x, out = builder.tensor(node.args[0]), builder.shape(node)
    kernel = _adaptive_window(builder, node, out)
    if kernel is None:
        return x
    if out[2:] == (1, 1):
        return builder.emit(node, "mean", [x], {"axes": (2, 3), "keepdim": True})
    return builder.emit(
        node,
        "avg_pool2d",
        [x],
        {"kernel": kernel, "stride": kernel, "padding": (0, 0, 0, 0), "count_include_pad": True},
    )


def adaptive_max_pool2d(builder: ProgramBuilder, node: fx.Node) -> list[str | None]:
    """Lower to a maximum over (h, w), a max pool, or nothing; the indices have no lowering."""
    x, out = builder.tensor(node.args[0]), tuple(builder.shapes[node.name][0])
    kernel = _adaptive_window(builder, node, out)
    if kernel is None:
        return [x, None]
    if out[2:] == (1, 1):
        return [builder.emit(node, "amax", [x], {"axes": (2, 3), "keepdim": True}, out), None]
    return [
        builder.emit(
            node,
            "max_pool2d",
            [x],
            {"kernel": kernel, "stride": kernel, "padding": (0, 0, 0, 0), "dilation": (1, 1)},
            out,
        ),
        None,
    ]


def reduction(builder: ProgramBuilder, node: fx.Node, kind: str, out: tuple[int, ...]) -> str:
    """Lower a reduction over dimensions to the operator `kind`."""
    x = builder.tensor(node.args[0])
    rank = len(builder.tensors[x].shape)
    dims = argument(node, 1, "dim")
    axes = tuple(sorted(int(d) % rank for d in ([dims] if isinstance(dims, int) else dims)))
    keepdim = bool(argument(node, 2, "keepdim", False))
    if not axes or 0 in axes:
        raise UnsupportedOpError(f"{layer_name(node)} reduces over the batch")
    return builder.emit(node, kind, [x], {"axes": axes, "keepdim": keepdim}, out)


def mean(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.mean over dimensions."""
    return reduction(builder, node, "mean", builder.shape(node))


def amax(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.amax."""
    return reduction(builder, node, "amax", builder.shape(node))


def max_dim(builder: ProgramBuilder, node: fx.Node) -> list[str | None]:
    """Lower aten.max over one dimension; the indices have no lowering."""
    return [reduction(builder, node, "amax", tuple(builder.shapes[node.name][0])), None]
