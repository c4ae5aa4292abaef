"""TFLite forms of the operators that exist in float alone, nearly all of them in XNNPACK's delegate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgecnn.export.tflite_elementwise import binary
from edgecnn.export.tflite_layout import Order, plain_order, stored_shape
from edgecnn.export.tflite_lowering import Lowering
from edgecnn.export.tflite_pooling import reduce_axes
from edgecnn.graph.program import BATCH, Op

FUNCTIONS = {
    "abs": "ABS",
    "cos": "COS",
    "elu": "ELU",
    "exp": "EXP",
    "log": "LOG",
    "rsqrt": "RSQRT",
    "sin": "SIN",
    "sqrt": "SQRT",
}
"""Kind -> the operator that computes it of each value."""


def _check_float(lowering: Lowering, op: Op) -> None:
    if lowering.tensor(op.output).quant is not None:
        hint = "leave the layer in float with float_layers of quantize_static"
        raise lowering.unsupported(op, "it is quantized, expected float32", hint=hint)


def function(lowering: Lowering, op: Op) -> None:
    """Write one of FUNCTIONS."""
    _each_value(lowering, op, FUNCTIONS[op.kind], {})


def gelu(lowering: Lowering, op: Op) -> None:
    """Write a GELU."""
    _each_value(lowering, op, "GELU", {"approximate": bool(op.attributes.get("approximate"))})


def _each_value(lowering: Lowering, op: Op, operator: str, options: dict[str, Any]) -> None:
    _check_float(lowering, op)
    index = lowering.read(op.inputs[0])
    lowering.write(op.output, lowering.order(op.inputs[0]), operator, (index,), options)


def divide(lowering: Lowering, op: Op) -> None:
    """Write a DIV."""
    _check_float(lowering, op)
    binary(lowering, op)


def total(lowering: Lowering, op: Op) -> None:
    """Write a SUM."""
    _check_float(lowering, op)
    reduce_axes(lowering, op, "SUM")


def normalize(lowering: Lowering, op: Op) -> None:
    """Write (x - mean) * rsqrt(mean of (x - mean)^2 + eps), over the dimensions wherever they are stored."""
    _check_float(lowering, op)
    x = lowering.tensor(op.inputs[0])
    index, order = lowering.read(x.name), lowering.order(x.name)
    axes = tuple(op.attributes["axes"])
    shape = stored_shape(tuple(1 if i in axes else size for i, size in enumerate(x.shape)), order)
    stored = sorted(order.index(axis) for axis in axes)
    over = lowering.integers("axes/" + "_".join(map(str, stored)), stored)
    graph, name = lowering.graph, op.output
    eps = lowering.constant(f"{name}/eps", np.full((1,) * len(order), op.attributes["eps"], np.float32))

    def step(
        operator: str, inputs: tuple[int, ...], suffix: str, *, whole: bool = False, **options: Any
    ) -> int:
        size = stored_shape(x.shape, order) if whole else shape
        return graph.add_operator(
            operator, inputs, graph.add_tensor(name + suffix, size, "float32", None), options
        )

    mean = step("MEAN", (index, over), "/mean", keepDims=True)
    apart = step("SUB", (index, mean), "/apart", whole=True)
    square = step("MUL", (apart, apart), "/square", whole=True)
    variance = step("MEAN", (square, over), "/variance", keepDims=True)
    factor = step("RSQRT", (step("ADD", (variance, eps), "/above_zero"),), "/factor")
    lowering.write(name, order, "MUL", (apart, factor))


def matmul(lowering: Lowering, op: Op) -> None:
    """Write a BATCH_MATMUL, which reads a factor transposed where it is stored so."""
    _check_float(lowering, op)
    rank = len(lowering.tensor(op.output).shape)
    if rank > _MAX_DIMS:
        _matmul_in_fewer(lowering, op)
        return
    flags, inputs = {}, []
    for flag, name in zip(("adjX", "adjY"), op.inputs, strict=True):
        index, turned = _factor(lowering, name)
        inputs.append(index)
        flags[flag] = turned
    lowering.write(op.output, plain_order(rank), "BATCH_MATMUL", inputs, flags)


_MAX_DIMS = 5


def _factor(lowering: Lowering, name: str) -> tuple[int, bool]:
    """Return a factor as it is stored, and whether that is transposed."""
    rank = len(lowering.tensor(name).shape)
    plain = plain_order(rank)
    turned: Order = (*plain[:-2], plain[-1], plain[-2])
    if not lowering.tensor(name).is_constant and lowering.order(name) == turned:
        return lowering.read(name, turned), True
    return lowering.read(name, plain), False


def _matmul_in_fewer(lowering: Lowering, op: Op) -> None:
    """Write a BATCH_MATMUL of more dimensions than it takes, the outer ones joined."""
    y = lowering.tensor(op.output)
    inputs = []
    for name in op.inputs:
        x = lowering.tensor(name)
        if x.shape[:-2] != y.shape[:-2]:
            raise lowering.unsupported(
                op, f"'{name}' is {x.shape}, to be broadcast in {len(x.shape)} dimensions"
            )
        index = lowering.read(name, plain_order(len(x.shape)))
        inputs.append(lowering.reshape(index, (BATCH, _outer(x.shape), *x.shape[-2:]), "/joined"))
    joined = lowering.graph.add_tensor(
        f"{op.output}/joined", (BATCH, _outer(y.shape), *y.shape[-2:]), "float32", None
    )
    lowering.graph.add_operator("BATCH_MATMUL", inputs, joined, {"adjX": False, "adjY": False})
    order = plain_order(len(y.shape))
    lowering.place(y.name, lowering.write_reshape(joined, lowering.new_tensor(y.name, order)), order)


def _outer(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape[1:-2]))


FLOAT_LOWERINGS: dict[str, Callable[[Lowering, Op], None]] = {
    **dict.fromkeys(FUNCTIONS, function),
    "div": divide,
    "gelu": gelu,
    "matmul": matmul,
    "normalize": normalize,
    "sum": total,
}
