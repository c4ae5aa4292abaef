"""Write weights, biases and constant operands into the graph as integers behind dequantize nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.nodes import add_constant, argument, aten, fetch, finish, is_constant, layer_name
from edgecnn.quantize.annotate import spec_of
from edgecnn.quantize.parameters import (
    activation_parameters,
    mean_shift,
    quantize_bias,
    quantize_weight,
    weight_scales,
    widen_for_bias,
)
from edgecnn.quantize.ties import factor_scale, tie_free_scale

if TYPE_CHECKING:
    from edgecnn.quantize.static import QuantizeStatic

qd = torch.ops.quantized_decomposed
_OPERANDS = frozenset(
    {
        aten.add.Tensor,
        aten.add.Scalar,
        aten.sub.Tensor,
        aten.rsub.Scalar,
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
    }
)
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
_AS_TENSOR = {
    aten.add.Scalar: aten.add.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
}


def fold_constants(graph: fx.GraphModule) -> fx.GraphModule:
    """Replace calls whose inputs are all parameters by their value, and divisions by products."""
    for node in list(graph.graph.nodes):
        sources = node.all_input_nodes
        if node.op == "call_function" and sources and all(is_constant(n) for n in sources):
            arguments = fx.map_arg(node.args, lambda n: fetch(graph, n))
            value = node.target(*arguments, **node.kwargs)
            if isinstance(value, torch.Tensor):
                node.replace_all_uses_with(add_constant(graph, node, node.name, value))
        elif node.target is aten.div.Tensor and not isinstance(node.args[1], fx.Node):
            node.target, node.args = aten.mul.Tensor, (node.args[0], 1.0 / float(node.args[1]))
        elif node.target is aten.div.Tensor and is_constant(node.args[1]):
            reciprocal = add_constant(
                graph, node, f"{node.name}_reciprocal", 1.0 / fetch(graph, node.args[1])
            )
            node.target, node.args = aten.mul.Tensor, (node.args[0], reciprocal)
        elif node.target is aten.neg.default:
            node.target, node.args = aten.mul.Tensor, (node.args[0], -1.0)
    return finish(graph)


def quantize_layer(
    graph: fx.GraphModule,
    node: fx.Node,
    x_scale: float,
    options: QuantizeStatic,
    input_mean: npt.NDArray[np.float64] | None,
    scales: npt.NDArray[np.float32] | None = None,
) -> None:
    """Replace a layer's weight and bias by integers.

    Args:
        graph: edited in place.
        node: a convolution or linear call.
        x_scale: scale of its input.
        options: weight_bits, weight_observer.
        input_mean: mean input per channel for bias correction, None to leave the bias as it is.
        scales: of the weight per output channel, None to choose them.
    """
    spec = spec_of(node)
    weight_node, bias_node = argument(node, 1, "weight"), argument(node, 2, "bias")
    if spec is None or spec.weight_axis is None or not is_constant(weight_node):
        raise UnsupportedOpError(
            f"{layer_name(node)} has a weight computed from the input, expected a parameter"
        )
    axis, bits = spec.weight_axis, options.weight_bits
    weight = fetch(graph, weight_node).float().numpy()
    groups = _groups(node)
    bias = None if bias_node is None else fetch(graph, bias_node).float().numpy()
    if scales is None:
        scales = layer_scales(weight, axis, groups, options)
    if bias is not None:
        reach = bias if len(bias) == len(scales) else np.full_like(scales, np.abs(bias).max())
        scales = widen_for_bias(scales, reach, x_scale)
    q_weight = quantize_weight(weight, scales, axis, num_bits=bits)
    if input_mean is not None and axis == 0:
        bias = _corrected(weight, q_weight, scales, input_mean, groups, bias)
    new_weight = dequantized(graph, node, f"{weight_node.target}_int8", q_weight, scales, axis)
    new_bias = None
    if bias is not None:
        channel_scales = np.resize(scales, len(bias)) if len(scales) != len(bias) else scales
        bias_scale = (np.float32(x_scale) * channel_scales).astype(np.float32)
        new_bias = dequantized(
            graph, node, f"{node.name}_bias_int32", quantize_bias(bias, bias_scale), bias_scale, 0
        )
    tail = node.args[3:]
    node.args = (node.args[0], new_weight, new_bias, *tail)
    node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("weight", "bias")}


def layer_scales(
    weight: npt.NDArray[np.float32], axis: int, groups: int, options: QuantizeStatic
) -> npt.NDArray[np.float32]:
    """Return the scales of a layer's weight, float32 (c_out,), all one in a grouped transposed convolution.

    Args:
        weight: any shape.
        axis: of the output channels.
        groups: of the convolution.
        options: weight_bits, weight_observer.
    """
    mse = options.weight_observer == "mse"
    scales = weight_scales(weight, axis, num_bits=options.weight_bits, minimize_mse=mse)
    if axis == 1 and groups > 1:  # a scale per output channel of a group would have to serve all groups
        return np.full_like(scales, scales.max())
    return scales


def _groups(node: fx.Node) -> int:
    if node.target is aten.linear.default:
        return 1
    return int(argument(node, 6, "groups", 1))


def _corrected(
    weight: npt.NDArray[np.float32],
    q_weight: npt.NDArray[np.int8],
    scales: npt.NDArray[np.float32],
    input_mean: npt.NDArray[np.float64],
    groups: int,
    bias: npt.NDArray[np.float32] | None,
) -> npt.NDArray[np.float32]:
    """Return the bias less the mean error of the rounded weights."""
    shape = (-1, *([1] * (weight.ndim - 1)))
    error = q_weight.astype(np.float64) * scales.reshape(shape) - weight
    flat = error.reshape(weight.shape[0], weight.shape[1], -1)  # (c_out, c_in/groups, k_h * k_w)
    start = np.zeros(weight.shape[0], np.float32) if bias is None else bias
    return (start - mean_shift(flat, input_mean, groups)).astype(np.float32)


def dequantized(
    graph: fx.GraphModule,
    before: fx.Node,
    name: str,
    values: npt.NDArray[Any],
    scales: npt.NDArray[np.float32],
    axis: int,
) -> fx.Node:
    """Add integer values as a buffer and return a dequantize_per_channel node reading it.

    Args:
        graph: edited in place.
        before: the call ahead of which they are added.
        name: of the buffer, where it is free.
        values: int8 or int32, any shape.
        scales: float32, one per index of dimension `axis`.
        axis: of the channels.
    """
    stored = add_constant(graph, before, name, torch.from_numpy(np.ascontiguousarray(values)))
    scale = add_constant(graph, before, f"{name}_scale", torch.from_numpy(scales.copy()))
    zeros = add_constant(graph, before, f"{name}_zero_point", torch.zeros(len(scales), dtype=torch.int64))
    info = np.iinfo(values.dtype)
    dtype = torch.int8 if values.dtype == np.int8 else torch.int32
    args = (stored, scale, zeros, axis, int(info.min), int(info.max), dtype)
    with graph.graph.inserting_before(before):
        return graph.graph.call_function(qd.dequantize_per_channel.default, args)


def quantize_operands(
    graph: fx.GraphModule, node: fx.Node, y_scale: float, x_scale: float | None = None
) -> None:
    """Replace numbers and parameters that arithmetic reads by int8 constants.

    A number is held exactly: scale |c| / 127 and the integer 127 or -127. A parameter gets a scale without
    ties.

    Args:
        graph: edited in place.
        node: an operator that the scheme knows.
        y_scale: scale of its output.
        x_scale: scale of the operand that is no constant, None where there is none.
    """
    if node.target not in _OPERANDS:
        return
    operands = list(node.args[:2])
    for index, operand in enumerate(operands):
        if isinstance(operand, (int, float)):
            scale, zero_point = float(np.float32(max(abs(operand), 2.0**-24) / 127.0)), 0
            values = torch.tensor(int(np.sign(operand)) * 127, dtype=torch.int8)
        elif is_constant(operand):
            real = fetch(graph, operand).float().numpy()  # type: ignore[arg-type]
            scale, zero_point = activation_parameters(float(real.min()), float(real.max()))
            if node.target in _SUMS:
                scale = tie_free_scale(scale, y_scale)
            elif node.target is aten.mul.Tensor and x_scale is not None:
                scale = factor_scale(scale, x_scale, y_scale)
            q = np.clip(np.rint(real / np.float32(scale)) + zero_point, -128, 127)
            values = torch.from_numpy(np.asarray(q, np.int8))
        else:
            continue
        stored = add_constant(graph, node, f"{node.name}_operand_int8", values)
        with graph.graph.inserting_before(node):
            operands[index] = graph.graph.call_function(
                qd.dequantize_per_tensor.default, (stored, scale, zero_point, -128, 127, torch.int8)
            )
    if node.target is aten.rsub.Scalar:
        node.target, operands = aten.sub.Tensor, [operands[1], operands[0]]
    node.target = _AS_TENSOR.get(node.target, node.target)
    node.args = (*operands, *node.args[2:])
