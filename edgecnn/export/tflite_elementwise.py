"""Element-wise operators, softmax, and the changes between float and int8, as TFLite operators."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgecnn.export.tflite_activation import FUSED_CODES, choose_activation
from edgecnn.export.tflite_layout import Order, complete_order
from edgecnn.export.tflite_lowering import Lowering, common_order, same_parameters
from edgecnn.graph.program import Op, QuantParams

_BINARY = {"add": "ADD", "sub": "SUB", "mul": "MUL", "div": "DIV"}


def binary(lowering: Lowering, op: Op) -> None:
    """Write ADD, SUB or MUL with NumPy's broadcasting."""
    num_dims = len(lowering.tensor(op.output).shape)
    order = common_order(lowering, op.inputs, num_dims)
    inputs = [_operand(lowering, op, name, order) for name in op.inputs]
    operator, quant = _BINARY[op.kind], lowering.tensor(op.output).quant
    is_wide = quant is not None and quant.num_bits == 16
    options = {"potScaleInt16": False} if is_wide and operator != "MUL" else {}  # any scales, not powers of 2
    lowering.write_clamped(op, order, operator, inputs, options)


def _operand(lowering: Lowering, op: Op, name: str, order: Order) -> int:
    """Return one operand in `order`, with leading dimensions of size 1 put before those it has."""
    tensor = lowering.tensor(name)
    missing = len(order) - len(tensor.shape)
    if tensor.data is not None:
        data = tensor.data.reshape((1,) * missing + tensor.data.shape)
        return lowering.constant(tensor.name, np.ascontiguousarray(data.transpose(order)), tensor.quant)
    if missing:
        raise lowering.unsupported(
            op, f"operand '{name}' has {len(tensor.shape)} dimensions, expected {len(order)} like the result"
        )
    return lowering.read(name, order)


def clamp(lowering: Lowering, op: Op) -> None:
    """Write a clamp: nothing if it bounds nothing, else RELU, RELU6, RELU_N1_TO_1 or MAXIMUM and MINIMUM.

    In int8 a MUL by 1 with the activation fused stands for the first three, which XNNPACK has in float only.
    """
    x, y = lowering.tensor(op.inputs[0]), lowering.tensor(op.output)
    activation = choose_activation(op.attributes.get("clamp"), y.quant)
    is_changed = not same_parameters(x, y)
    if is_changed or (y.quant is not None and activation.fused != "NONE"):
        requantize(lowering, op)
        return
    index, order = lowering.read(x.name), lowering.order(x.name)
    if activation.fused != "NONE":
        if activation.is_fused:
            lowering.write(y.name, order, activation.fused, (index,))
            return
        bounded = lowering.new_tensor(y.name, order, "/" + activation.fused.lower())
        index = lowering.graph.add_operator(activation.fused, (index,), bounded)
    if activation.is_fused:
        lowering.place(y.name, index, order)
    else:
        lowering.write_bounds(y.name, order, index, activation)


def requantize(lowering: Lowering, op: Op) -> None:
    """Write a change of int8 parameters, with the op's clamp, as a MUL by the quantized number 1.

    A QUANTIZE would say the same, in a fifth of the time (8 us for 37 on 200,000 values); but XNNPACK
    computes it with an 8-bit multiplier, and 1 to 2 % of the values come out one level off. Its MUL is exact.
    """
    x, y = lowering.tensor(op.inputs[0]), lowering.tensor(op.output)
    if y.quant is None or x.quant is None:
        raise lowering.unsupported(op, f"'{x.name}' is {x.dtype} and '{y.name}' {y.dtype}, expected int8")
    index, order = lowering.read(x.name), lowering.order(x.name)
    ones = np.ones((1,) * len(order), y.quant.dtype)
    unit = QuantParams(np.asarray(1, np.float32), num_bits=y.quant.num_bits)
    one = lowering.constant(f"one/{len(order)}", ones, unit)
    lowering.write_clamped(op, order, "MUL", (index, one))


def leaky_relu(lowering: Lowering, op: Op) -> None:
    """Write a LEAKY_RELU."""
    _unary(lowering, op, "LEAKY_RELU", {"alpha": float(op.attributes.get("negative_slope", 0.01))})


def sigmoid(lowering: Lowering, op: Op) -> None:
    """Write a LOGISTIC."""
    _unary(lowering, op, "LOGISTIC", {})


def tanh(lowering: Lowering, op: Op) -> None:
    """Write a TANH."""
    _unary(lowering, op, "TANH", {})


def hard_swish(lowering: Lowering, op: Op) -> None:
    """Write a HARD_SWISH."""
    _check_float(lowering, op)
    _unary(lowering, op, "HARD_SWISH", {})


def hard_sigmoid(lowering: Lowering, op: Op) -> None:
    """Write relu6(x + 3) / 6: an ADD with RELU6 fused and a MUL."""
    _check_float(lowering, op)
    index, order = lowering.read(op.inputs[0]), lowering.order(op.inputs[0])
    three, sixth = (
        lowering.constant(f"{name}/{len(order)}", np.full((1,) * len(order), value, np.float32))
        for name, value in (("three", 3.0), ("one_sixth", 1 / 6))
    )
    bounded = lowering.new_tensor(op.output, order, "/relu6")
    options = {"fusedActivationFunction": FUSED_CODES["RELU6"]}
    lowering.graph.add_operator("ADD", (index, three), bounded, options)
    lowering.write(op.output, order, "MUL", (bounded, sixth))


def _check_float(lowering: Lowering, op: Op) -> None:
    if lowering.tensor(op.output).quant is not None:
        hint = "run the pass decompose_activations before quantizing"
        raise lowering.unsupported(op, "it is quantized, expected float32", hint=hint)


def quantize(lowering: Lowering, op: Op) -> None:
    """Write a QUANTIZE of float numbers."""
    _unary(lowering, op, "QUANTIZE", {})


def dequantize(lowering: Lowering, op: Op) -> None:
    """Write a DEQUANTIZE."""
    _unary(lowering, op, "DEQUANTIZE", {})


def softmax(lowering: Lowering, op: Op) -> None:
    """Write a SOFTMAX, which runs over the last stored dimension."""
    x = lowering.tensor(op.inputs[0])
    axis = op.attributes.get("axis", -1) % len(x.shape)
    order = complete_order(x.shape, lowering.order(x.name))
    if order[-1] != axis:
        order = (*(dim for dim in order if dim != axis), axis)
    lowering.write(op.output, order, "SOFTMAX", (lowering.read(x.name, order),), {"beta": 1.0})


def _unary(lowering: Lowering, op: Op, operator: str, options: dict[str, Any]) -> None:
    index = lowering.read(op.inputs[0])
    lowering.write(op.output, lowering.order(op.inputs[0]), operator, (index,), options)
