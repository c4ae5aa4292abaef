"""Convolution, transposed convolution and linear as TFLite operators.

Weights are stored as the operators want them: CONV_2D (c_out, k_h, k_w, c_in/groups), DEPTHWISE_CONV_2D
(1, k_h, k_w, c_out), FULLY_CONNECTED (c_out, c_in). Every one has a bias, as XNNPACK takes none without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from edgecnn.export.tflite_layout import Order
from edgecnn.export.tflite_lowering import Lowering
from edgecnn.export.tflite_padding import choose_padding
from edgecnn.graph.program import Array, Op, QuantParams, Tensor

PADDING_CODES = {"SAME": 0, "VALID": 1}
"""Values of the schema's Padding."""

_NHWC: Order = (0, 2, 3, 1)


def pad_nhwc(
    lowering: Lowering, index: int, explicit: tuple[int, int, int, int], fill: int | None = None
) -> int:
    """Pad an NHWC file tensor by (top, left, bottom, right), nothing if all are 0.

    Args:
        lowering: the file so far.
        index: what to pad.
        explicit: rows and columns to add; XNNPACK fuses the PAD into the convolution that follows.
        fill: constant tensor to pad with, None for real zeros.
    """
    top, left, bottom, right = explicit
    if not any(explicit):
        return index
    n, height, width, channels = lowering.graph.tensors[index].shape
    output = lowering.like(index, (n, height + top + bottom, width + left + right, channels), "/padded")
    amounts = [[0, 0], [top, bottom], [left, right], [0, 0]]
    pads = lowering.integers(f"pads/{top}_{left}_{bottom}_{right}", amounts)
    if fill is None:
        return lowering.graph.add_operator("PAD", (index, pads), output)
    return lowering.graph.add_operator("PADV2", (index, pads, fill), output)


def conv2d(lowering: Lowering, op: Op) -> None:
    """Write a convolution: CONV_2D, or DEPTHWISE_CONV_2D where each group has one input channel."""
    x, w = lowering.tensor(op.inputs[0]), weight_tensor(lowering, op)
    attributes = op.attributes
    stride, dilation = _pair(attributes, "stride"), _pair(attributes, "dilation")
    groups = attributes.get("groups", 1)
    padding = choose_padding(
        (x.shape[2], x.shape[3]),
        (w.shape[2], w.shape[3]),
        stride,
        attributes.get("padding", (0, 0, 0, 0)),
        dilation,
    )
    options: dict[str, Any] = {
        "padding": PADDING_CODES[padding.scheme],
        "strideH": stride[0],
        "strideW": stride[1],
        "dilationHFactor": dilation[0],
        "dilationWFactor": dilation[1],
    }
    if groups == x.shape[1] and groups > 1:
        operator, perm, axis = "DEPTHWISE_CONV_2D", (1, 2, 3, 0), 3
        options["depthMultiplier"] = w.shape[0] // groups
    else:
        operator, perm, axis = "CONV_2D", (0, 2, 3, 1), 0
        options["groups"] = groups
    source = pad_nhwc(lowering, lowering.read(x.name, _NHWC), padding.explicit)
    weight = stored_weight(lowering, op, _data(w).transpose(perm), _moved_axis(w.quant, axis))
    inputs = (source, weight, _bias(lowering, op, w.shape[0]))
    lowering.write_clamped(op, _NHWC, operator, inputs, options)


def linear(lowering: Lowering, op: Op) -> None:
    """Write a FULLY_CONNECTED over the last dimension; a flatten before it goes into the weight's columns."""
    x, w = lowering.tensor(op.inputs[0]), weight_tensor(lowering, op)
    num_dims = len(x.shape)
    data = _data(w)
    if num_dims == 2:
        index, columns = lowering.read_columns(op.inputs[0])
        order: Order = (0, 1)
        if columns is not None:
            data = np.ascontiguousarray(data[:, columns])
    else:
        order = lowering.order(op.inputs[0])
        if order[-1] != num_dims - 1:
            order = (*(dim for dim in order if dim != num_dims - 1), num_dims - 1)
        index = lowering.read(op.inputs[0], order)
    weight = stored_weight(lowering, op, data, w.quant)
    inputs = (index, weight, _bias(lowering, op, w.shape[0]))
    options: dict[str, Any] = {"keepNumDims": num_dims > 2}
    if op.attributes.get("dynamic"):
        options["asymmetricQuantizeInputs"] = True  # XNNPACK does it always, TFLite's own kernel when told
    lowering.write_clamped(op, order, "FULLY_CONNECTED", inputs, options)


def weight_tensor(lowering: Lowering, op: Op) -> Tensor:
    """Return the weight of an op, which must be a constant."""
    weight = lowering.tensor(op.inputs[1])
    if weight.data is None:
        raise lowering.unsupported(op, f"weight '{weight.name}' is computed, expected a constant")
    return weight


def stored_weight(lowering: Lowering, op: Op, data: Array, quant: QuantParams | None) -> int:
    """Add an op's weight as the operator reads it, and return its index.

    A narrow weight of an op that computes in float goes through DEQUANTIZE, which XNNPACK carries out once,
    when it loads the file. An int8 weight beside float inputs makes the op quantize those for every image,
    which the attribute `dynamic` asks for.

    Args:
        lowering: the file so far.
        op: the layer.
        data: float32, float16 or int8, in stored order.
        quant: parameters of int8; their axis counts stored dimensions.
    """
    name = op.inputs[1]
    stored = lowering.constant(name, data, quant)
    is_narrow = data.dtype == np.float16 or quant is not None
    if not is_narrow or lowering.tensor(op.output).quant is not None or op.attributes.get("dynamic"):
        return stored
    real = lowering.graph.add_tensor(f"{name}/real", data.shape, "float32", None)
    return lowering.graph.add_operator("DEQUANTIZE", (stored,), real)


def _data(tensor: Tensor) -> Array:
    """Return the values of a constant."""
    return np.asarray(tensor.data)


def _pair(attributes: Mapping[str, Any], name: str) -> tuple[int, int]:
    height, width = attributes.get(name, (1, 1))
    return height, width


def _moved_axis(quant: QuantParams | None, axis: int) -> QuantParams | None:
    """Return per_channel parameters for the stored channel dimension."""
    return quant if quant is None or quant.axis is None else replace(quant, axis=axis)


def bias_parameters(lowering: Lowering, op: Op, c_out: int) -> tuple[Array, QuantParams | None]:
    """Return the bias (c_out,) and its parameters, zeros where the op has none."""
    if len(op.inputs) > 2:
        bias = lowering.tensor(op.inputs[2])
        if bias.data is None:
            raise lowering.unsupported(op, f"bias '{bias.name}' is computed, expected a constant")
        return bias.data, bias.quant
    x, w = lowering.tensor(op.inputs[0]), lowering.tensor(op.inputs[1])
    if x.quant is None or w.quant is None:
        return np.zeros(c_out, np.float32), None
    scale = np.float32(x.quant.scale) * np.asarray(w.quant.scale, np.float32)
    quant = QuantParams(np.asarray(scale, np.float32), 0, None if w.quant.axis is None else 0)
    return np.zeros(c_out, np.int32), quant


def _bias(lowering: Lowering, op: Op, c_out: int) -> int:
    name = op.inputs[2] if len(op.inputs) > 2 else f"{op.inputs[1]}/zero_bias"
    data, quant = bias_parameters(lowering, op, c_out)
    x = lowering.tensor(op.inputs[0]).quant
    return lowering.constant(name, data if quant is None else data.astype(bias_dtype(x)), quant)


def bias_dtype(quant: QuantParams | None) -> type[np.signedinteger[Any]]:
    """Return the type of a bias beside an input with these parameters: 16-bit kernels take int64."""
    return np.int64 if quant is not None and quant.num_bits == 16 else np.int32
