"""One writer per kind of Program operator: which ONNX nodes stand for it.

The nodes are chosen for what ONNX Runtime's CPU provider runs in integers:

- arithmetic (Conv, Gemm, Add, Mul, AveragePool, GlobalAveragePool, LeakyRelu, Sigmoid, Softmax) stands
  between DequantizeLinear and QuantizeLinear, which the runtime fuses into its QLinear kernels;
- operators that keep the parameters of their input and compute nothing (concat, pad, reshape, slice,
  transpose, max pooling, nearest resize) move the integers themselves;
- ConvTranspose, which has no integer kernel, is written as Conv and DepthToSpace;
- the rest (a ReduceMean that is not a pooling, Sub of two activations, bilinear Resize) has no
  integer kernel there and runs in float between DequantizeLinear and QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from edgecnn.errors import ExportError, UnsupportedOpError
from edgecnn.export.onnx_dynamic import write_dynamic_linear
from edgecnn.export.onnx_float import FLOAT_WRITERS
from edgecnn.export.onnx_graph import GraphBuilder, integer_bounds, same_params
from edgecnn.export.onnx_pools import write_average_pool, write_max_pool
from edgecnn.export.onnx_resize import write_resize
from edgecnn.export.onnx_transposed import write_phases
from edgecnn.graph.program import Array, Op, QuantParams

Writer = Callable[[GraphBuilder, Op], None]


def write_op(graph: GraphBuilder, op: Op) -> None:
    """Append the nodes that stand for `op`.

    Raises:
        UnsupportedOpError: no writer knows the kind, or it cannot write these attributes.
        ExportError: an integer operator on tensors without quantization parameters.
    """
    writer = WRITERS.get(op.kind)
    if writer is None:
        known = ", ".join(sorted(WRITERS))
        raise UnsupportedOpError(
            f"{op.layer or op.output}: operator {op.kind!r} has no ONNX form, expected one of {known}"
        )
    writer(graph, op)


def _is_quantized(graph: GraphBuilder, op: Op) -> bool:
    return graph.tensor(op.output).quant is not None


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]


def _shape(values: Any) -> Array:
    return np.asarray(_ints(values), np.int64)


def _weighted(graph: GraphBuilder, op: Op) -> list[str]:
    """Return the float values of x, w and the bias if there is one."""
    x, *parameters = op.inputs
    return [graph.real(op, x), *(graph.real_parameter(op, graph.tensor(name)) for name in parameters)]


def _conv_attributes(graph: GraphBuilder, op: Op) -> dict[str, Any]:
    a = op.attributes
    return {
        "kernel_shape": _ints(graph.tensor(op.inputs[1]).shape[2:]),
        "strides": _ints(a["stride"]),
        "pads": _ints(a["padding"]),
        "dilations": _ints(a["dilation"]),
        "group": int(a["groups"]),
    }


def _conv2d(graph: GraphBuilder, op: Op) -> None:
    graph.store(op, "Conv", _weighted(graph, op), _conv_attributes(graph, op))


def _conv_transpose2d(graph: GraphBuilder, op: Op) -> None:
    kernel = graph.tensor(op.inputs[1]).data
    if _is_quantized(graph, op) and kernel is not None and graph.activation_dtype != "int16":
        write_phases(graph, op, kernel)
        return
    output_padding = _ints(op.attributes["output_padding"])
    attributes = _conv_attributes(graph, op) | {"output_padding": output_padding}
    graph.store(op, "ConvTranspose", _weighted(graph, op), attributes)


def _linear(graph: GraphBuilder, op: Op) -> None:
    """Write Gemm, on rows: (n, ..., c_in) -> (n * ..., c_in) -> (n * ..., c_out) -> (n, ..., c_out)."""
    if op.attributes.get("dynamic"):
        write_dynamic_linear(graph, op)
    elif len(graph.tensor(op.inputs[0]).shape) == 2:
        graph.store(op, "Gemm", _weighted(graph, op), {"transB": 1})
    else:
        _store_reshaped(graph, op, "Gemm", _rows(graph, op), {"transB": 1})


def _store_reshaped(
    graph: GraphBuilder, op: Op, op_type: str, inputs: list[str], attributes: Mapping[str, Any]
) -> None:
    """Append a node like `GraphBuilder.store`, and a Reshape of its result to the shape of op's output."""
    final, shaped_otherwise = graph.value(op.output), graph.unique(f"{op.output}/{op_type}_shape")
    graph.value_names[op.output] = shaped_otherwise
    graph.store(op, op_type, inputs, attributes)
    graph.value_names[op.output] = final
    shape = graph.constant(f"{op.output}/shape", _shape((-1, *graph.tensor(op.output).shape[1:])))
    graph.node(op, "Reshape", [shaped_otherwise, shape], final)


def _rows(graph: GraphBuilder, op: Op) -> list[str]:
    x = graph.tensor(op.inputs[0])
    shape = graph.constant(f"{op.output}/rows_shape", _shape((-1, x.shape[-1])))
    rows = graph.node(op, "Reshape", [graph.integers(x.name), shape])
    real = rows if x.quant is None else graph.dequantize(op, rows, x.quant)
    return [real, *(graph.real_parameter(op, graph.tensor(name)) for name in op.inputs[1:])]


def _add_or_mul(graph: GraphBuilder, op: Op) -> None:
    graph.store(op, op.kind.capitalize(), [graph.real_operand(op, name) for name in op.inputs])


def _sub(graph: GraphBuilder, op: Op) -> None:
    """Write x - constant as x + (-constant), for which there is an integer kernel."""
    a, b = op.inputs
    if _is_quantized(graph, op) and graph.tensor(b).is_constant:
        graph.store(op, "Add", [graph.real_operand(op, a), graph.real_operand(op, b, negated=True)])
    else:
        graph.store(op, "Sub", [graph.real_operand(op, name) for name in op.inputs])


def _clamp(graph: GraphBuilder, op: Op) -> None:
    x, y = graph.tensor(op.inputs[0]), graph.tensor(op.output)
    if x.quant is None or y.quant is None:
        graph.store(op, "Clamp", [graph.real(op, x.name)])
    elif y.quant.num_bits == 16:
        graph.store_quantized(op, graph.real(op, x.name))
    elif same_params(x.quant, y.quant):
        graph.clip_integers(op, graph.integers(x.name), integer_bounds(op, y.quant))
    else:
        _requantize(graph, op)


def _requantize(graph: GraphBuilder, op: Op) -> None:
    """Write LeakyRelu with slope 1, the identity that ONNX Runtime runs as one look-up table.

    Without it the runtime would merge the neighbouring DequantizeLinear/QuantizeLinear pairs into one with
    parameters that are neither tensor's. A requantize for one concat only is left out: QLinearConcat does it.
    """
    users = graph.consumers[op.output]
    clamped = tuple(op.attributes.get("clamp") or (None, None)) != (None, None)
    if not clamped and op.output not in graph.kept and [user.kind for user in users] == ["concat"]:
        graph.absorbed[op.output] = op.inputs[0]
        return
    graph.store(op, "LeakyRelu", [graph.real(op, op.inputs[0])], {"alpha": 1.0})


def _leaky_relu(graph: GraphBuilder, op: Op) -> None:
    attributes = {"alpha": float(op.attributes["negative_slope"])}
    graph.store(op, "LeakyRelu", [graph.real(op, op.inputs[0])], attributes)


def _sigmoid(graph: GraphBuilder, op: Op) -> None:
    graph.store(op, "Sigmoid", [graph.real(op, op.inputs[0])])


def _tanh(graph: GraphBuilder, op: Op) -> None:
    """Write tanh(x) = 2 sigmoid(2 x) - 1, since there is an integer Sigmoid and no integer Tanh.

    With tanh's parameters (1/128, 0), q = round(128 tanh(x)) = round(256 sigmoid(2 x)) - 128: the integers
    of a sigmoid whose input has twice the scale and whose output has the parameters (1/256, -128).
    """
    x, y = graph.tensor(op.inputs[0]), graph.tensor(op.output)
    if x.quant is None or x.is_constant or y.quant is None or not same_params(y.quant, _TANH):
        graph.store(op, "Tanh", [graph.real(op, x.name)])
        return
    doubled = QuantParams(np.float32(2) * x.quant.scale, x.quant.zero_point)
    real = graph.node(op, "Sigmoid", [graph.dequantize(op, graph.value(x.name), doubled)])
    graph.store_quantized(op, real, QuantParams(np.asarray(1 / 256, np.float32), -128))


_TANH = QuantParams(np.asarray(1 / 128, np.float32), 0)


def _softmax(graph: GraphBuilder, op: Op) -> None:
    graph.store(op, "Softmax", [graph.real(op, op.inputs[0])], {"axis": int(op.attributes["axis"])})


def _mean(graph: GraphBuilder, op: Op) -> None:
    """Write GlobalAveragePool over (2, 3), a 1x1 Conv of ones over (1,), ReduceMean over other axes."""
    x = graph.tensor(op.inputs[0])
    axes, keepdim = tuple(op.attributes["axes"]), bool(op.attributes["keepdim"])
    if len(x.shape) == 4 and axes == (2, 3):
        op_type, inputs, attributes = "GlobalAveragePool", [graph.real(op, x.name)], {}
    elif len(x.shape) == 4 and axes == (1,) and _is_quantized(graph, op) and x.quant is not None:
        op_type, inputs = "Conv", [graph.real(op, x.name), _mean_weight(graph, op, x.shape[1])]
        attributes = {"kernel_shape": [1, 1]}
    else:
        more, attributes = _reduced_axes(graph, op, "ReduceMean", axes, keepdim)
        graph.store(op, "ReduceMean", [graph.real(op, x.name), *more], attributes)
        return
    if keepdim:
        graph.store(op, op_type, inputs, attributes)
    else:
        _store_reshaped(graph, op, op_type, inputs, attributes)


def _mean_weight(graph: GraphBuilder, op: Op, num_channels: int) -> str:
    """Return 1 / c as int8 weights (1, c, 1, 1) of value 1 and scale 1 / c."""
    weight = graph.constant(f"{op.output}/ones", np.ones((1, num_channels, 1, 1), np.int8))
    scale = graph.constant(f"{op.output}/one_over_c", np.asarray(1 / num_channels, np.float32))
    zero_point = graph.constant(f"{op.output}/zero", np.asarray(0, np.int8))
    return graph.node(op, "DequantizeLinear", [weight, scale, zero_point], graph.unique(f"{weight}/real"))


def _reduced_axes(
    graph: GraphBuilder, op: Op, op_type: str, axes: tuple[int, ...], keepdim: bool
) -> tuple[list[str], dict[str, Any]]:
    """Return further inputs and the attributes of a reduction: axes became an input with opset 18."""
    attributes: dict[str, Any] = {"keepdims": int(keepdim)}
    if graph.opset < 18:
        return [], attributes | {"axes": _ints(axes)}
    return [graph.constant(f"{op.output}/{op_type}_axes", _shape(axes))], attributes


def _amax(graph: GraphBuilder, op: Op) -> None:
    axes, keepdim = tuple(op.attributes["axes"]), bool(op.attributes["keepdim"])
    inputs, attributes = _reduced_axes(graph, op, "ReduceMax", axes, keepdim)
    graph.move(op, "ReduceMax", inputs, attributes)


def _concat(graph: GraphBuilder, op: Op) -> None:
    """Write Concat of the integers, or of floats where a requantize of an input can be left to the kernel."""
    axis = {"axis": int(op.attributes["axis"])}
    sources = [graph.absorbed.get(name, name) for name in op.inputs]
    if sources == list(op.inputs):
        graph.node(op, "Concat", [graph.integers(name) for name in sources], graph.value(op.output), axis)
    else:
        graph.store(op, "Concat", [graph.real_operand(op, name) for name in sources], axis)


def _slice(graph: GraphBuilder, op: Op) -> None:
    a = op.attributes
    extra = [
        graph.constant(f"{op.output}/{which}", _shape([value]))
        for which, value in (
            ("start", a["start"]),
            ("stop", a["stop"]),
            ("axis", a["axis"]),
            ("step", a["step"]),
        )
    ]
    graph.move(op, "Slice", extra)


def _gather(graph: GraphBuilder, op: Op) -> None:
    indices = graph.constant(f"{op.output}/indices", _shape(op.attributes["indices"]))
    graph.move(op, "Gather", [indices], {"axis": int(op.attributes["axis"])})


def _pad(graph: GraphBuilder, op: Op) -> None:
    before, after = zip(*op.attributes["pads"], strict=True)
    value = np.asarray(op.attributes["value"], np.float32)
    quant = graph.tensor(op.output).quant
    if quant is not None and quant.num_bits == 8:
        value = graph.shift(quant.quantize(value))
    pads = graph.constant(f"{op.output}/pads", _shape((*before, *after)))
    if op.attributes.get("mode") == "reflect":
        graph.move(op, "Pad", [pads], {"mode": "reflect"})
        return
    graph.move(op, "Pad", [pads, graph.constant(f"{op.output}/pad_value", value)])


def _reshape(graph: GraphBuilder, op: Op) -> None:
    shape = _shape((0, *op.attributes["shape"][1:]))
    graph.move(op, "Reshape", [graph.constant(f"{op.output}/shape", shape)])


def _transpose(graph: GraphBuilder, op: Op) -> None:
    graph.move(op, "Transpose", (), {"perm": _ints(op.attributes["perm"])})


def _quantize(graph: GraphBuilder, op: Op) -> None:
    value = graph.value(op.inputs[0])
    if op.output in graph.shielded:
        value = graph.node(op, "Sum", [value])
    graph.store_quantized(op, value)


def _dequantize(graph: GraphBuilder, op: Op) -> None:
    x = graph.tensor(op.inputs[0])
    if x.quant is None:
        raise ExportError(
            f"{op.layer or op.output}: dequantize of {x.name!r}, which has no quantization parameters"
        )
    value = graph.integers(x.name)
    inputs = [value, *graph.parameters(value, x.quant)]
    graph.node(op, "DequantizeLinear", inputs, graph.value(op.output))


WRITERS: Mapping[str, Writer] = MappingProxyType(
    {
        "conv2d": _conv2d,
        "conv_transpose2d": _conv_transpose2d,
        "linear": _linear,
        "add": _add_or_mul,
        "sub": _sub,
        "mul": _add_or_mul,
        "clamp": _clamp,
        "leaky_relu": _leaky_relu,
        "sigmoid": _sigmoid,
        "tanh": _tanh,
        "softmax": _softmax,
        "max_pool2d": write_max_pool,
        "avg_pool2d": write_average_pool,
        "mean": _mean,
        "amax": _amax,
        "concat": _concat,
        "slice": _slice,
        "gather": _gather,
        "pad": _pad,
        "reshape": _reshape,
        "transpose": _transpose,
        "quantize": _quantize,
        "dequantize": _dequantize,
        "requantize": _requantize,
        "resize": write_resize,
        **FLOAT_WRITERS,
    }
)
