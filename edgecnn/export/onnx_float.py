"""ONNX forms of the operators that exist in float alone.

Before opset 17 there is no LayerNormalization, before 20 no Gelu; the nodes are then those that ONNX Runtime
joins when it loads a float file: to Gelu, and to SimplifiedLayerNormalization behind a mean.
"""

from __future__ import annotations

import math

import numpy as np

from edgecnn.errors import UnsupportedOpError
from edgecnn.export.onnx_graph import GraphBuilder
from edgecnn.graph.program import Op

ONE_NODE = {
    "abs": "Abs",
    "cos": "Cos",
    "div": "Div",
    "elu": "Elu",
    "exp": "Exp",
    "log": "Log",
    "matmul": "MatMul",
    "sin": "Sin",
    "sqrt": "Sqrt",
}
"""Kind -> the node that computes it."""


COMPOSITE = frozenset({"hard_sigmoid", "hard_swish"})
"""Kinds that a pass writes as integer arithmetic ahead of quantization."""


def float_operands(graph: GraphBuilder, op: Op) -> list[str]:
    """Return the values of an operator's inputs, which must be float like its output.

    Raises:
        UnsupportedOpError: if the operator is quantized.
    """
    if graph.tensor(op.output).quant is not None:
        lower = "run the pass decompose_activations before quantizing"
        leave = "leave the layer in float with float_layers of quantize_static"
        raise UnsupportedOpError(
            f"{op.layer or op.output}: {op.kind} is quantized, expected float32",
            hint=lower if op.kind in COMPOSITE else leave,
        )
    return [graph.real(op, name) for name in op.inputs]


def write_one_node(graph: GraphBuilder, op: Op) -> None:
    """Append the one node of ONE_NODE."""
    graph.store(op, ONE_NODE[op.kind], float_operands(graph, op))


def write_rsqrt(graph: GraphBuilder, op: Op) -> None:
    """Append Sqrt and Reciprocal."""
    graph.store(op, "Reciprocal", [graph.node(op, "Sqrt", float_operands(graph, op))])


def write_sum(graph: GraphBuilder, op: Op) -> None:
    """Append ReduceSum, whose axes are an input since opset 13."""
    axes = graph.constant(f"{op.output}/axes", np.asarray(op.attributes["axes"], np.int64))
    attributes = {"keepdims": int(op.attributes["keepdim"])}
    graph.store(op, "ReduceSum", [*float_operands(graph, op), axes], attributes)


def write_normalize(graph: GraphBuilder, op: Op) -> None:
    """Append (x - mean) / sqrt(mean of its square + eps)."""
    (x,) = float_operands(graph, op)
    shape, axes = graph.tensor(op.inputs[0]).shape, op.attributes["axes"]
    if graph.opset >= 17 and axes == tuple(range(axes[0], len(shape))):
        scale = graph.constant(f"{op.output}/scale", np.ones(shape[axes[0] :], np.float32))
        attributes = {"axis": axes[0] - len(shape), "epsilon": op.attributes["eps"]}
        graph.store(op, "LayerNormalization", [x, scale], attributes)
        return
    apart = graph.node(op, "Sub", [x, _mean(graph, op, x)])
    square = graph.node(op, "Pow", [apart, _number(graph, op, "two", 2.0)])
    variance = graph.node(
        op, "Add", [_mean(graph, op, square), _number(graph, op, "eps", op.attributes["eps"])]
    )
    graph.store(op, "Div", [apart, graph.node(op, "Sqrt", [variance])])


def _mean(graph: GraphBuilder, op: Op, value: str) -> str:
    """Append a mean over axes counted from the end, which says without a shape that they are the last."""
    rank = len(graph.tensor(op.inputs[0]).shape)
    axes = [int(axis) - rank for axis in op.attributes["axes"]]
    if graph.opset < 18:
        return graph.node(op, "ReduceMean", [value], None, {"keepdims": 1, "axes": axes})
    over = graph.constant(f"{op.output}/axes", np.asarray(axes, np.int64))
    return graph.node(op, "ReduceMean", [value, over], None, {"keepdims": 1})


def write_gelu(graph: GraphBuilder, op: Op) -> None:
    """Append x (1 + erf(x / sqrt(2))) / 2, or the form with tanh."""
    (x,) = float_operands(graph, op)
    approximate = bool(op.attributes.get("approximate"))
    if graph.opset >= 20:
        graph.store(op, "Gelu", [x], {"approximate": "tanh" if approximate else "none"})
        return
    if approximate:
        cube = graph.node(op, "Mul", [graph.node(op, "Mul", [x, x]), x])
        small = graph.node(op, "Mul", [cube, _number(graph, op, "cubic", 0.044715)])
        inner = graph.node(op, "Add", [x, small])
        scaled = graph.node(op, "Mul", [inner, _number(graph, op, "factor", math.sqrt(2 / math.pi))])
        gate = graph.node(op, "Tanh", [scaled])
    else:
        gate = graph.node(op, "Erf", [graph.node(op, "Div", [x, _number(graph, op, "root", math.sqrt(2.0))])])
    above = graph.node(op, "Add", [gate, _number(graph, op, "one", 1.0)])
    product = graph.node(op, "Mul", [x, above])
    graph.store(op, "Mul", [product, _number(graph, op, "half", 0.5)])


def write_hard_sigmoid(graph: GraphBuilder, op: Op) -> None:
    """Append HardSigmoid, whose slope is 1/6 here."""
    graph.store(op, "HardSigmoid", float_operands(graph, op), _HARD)


def write_hard_swish(graph: GraphBuilder, op: Op) -> None:
    """Append x * HardSigmoid(x), as fast in ONNX Runtime as the HardSwish of opset 14."""
    (x,) = float_operands(graph, op)
    graph.store(op, "Mul", [x, graph.node(op, "HardSigmoid", [x], None, _HARD)])


_HARD = {"alpha": 1 / 6, "beta": 0.5}


def _number(graph: GraphBuilder, op: Op, name: str, value: float) -> str:
    return graph.constant(f"{op.output}/{name}", np.asarray(value, np.float32))


FLOAT_WRITERS = {
    **dict.fromkeys(ONE_NODE, write_one_node),
    "gelu": write_gelu,
    "hard_sigmoid": write_hard_sigmoid,
    "hard_swish": write_hard_swish,
    "normalize": write_normalize,
    "rsqrt": write_rsqrt,
    "sum": write_sum,
}
