"""Resize in ONNX, for a batch size not known now.

The operator takes sizes of all dimensions or factors of all dimensions; with a symbolic batch only factors
can be constants (before opset 18 brought `axes`). The size is then floor(in * factor), in float32 or float64
depending on who computes it, so the factor is rounded up where either product would fall short.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from edgecnn.errors import UnsupportedOpError
from edgecnn.export.onnx_graph import UINT8_SHIFT, GraphBuilder, same_params
from edgecnn.graph.program import Array, Op, QuantParams


def write_resize(graph: GraphBuilder, op: Op) -> None:
    """Append Resize; nearest by a factor that is no integer gathers rows and columns instead.

    Raises:
        UnsupportedOpError: the mode is neither "nearest" nor "bilinear".
    """
    mode = op.attributes["mode"]
    if mode == "nearest":
        _write_nearest(graph, op)
    elif mode == "bilinear":
        coordinates = "align_corners" if op.attributes["align_corners"] else "half_pixel"
        attributes = {"mode": "linear", "coordinate_transformation_mode": coordinates}
        _write_bilinear(graph, op, attributes)
    else:
        raise UnsupportedOpError(
            f"{op.layer or op.output}: resize mode is {mode!r}, expected 'nearest' or 'bilinear'"
        )


def _write_bilinear(graph: GraphBuilder, op: Op, attributes: dict[str, Any]) -> None:
    """Append Resize of the integers as floats, since the parameters stay the same and halves stay exact.

    A runtime may take DequantizeLinear, Resize, QuantizeLinear for an integer Resize, which truncates; with
    Cast it does not.
    """
    x, y = graph.tensor(op.inputs[0]), graph.tensor(op.output)
    if x.quant is None or y.quant is None or not same_params(x.quant, y.quant):
        graph.store(op, "Resize", [graph.real(op, x.name), *_target(graph, op)], attributes)
        return
    real = graph.node(op, "Cast", [graph.integers(x.name)], None, {"to": int(onnx.TensorProto.FLOAT)})
    resized = graph.node(op, "Resize", [real, *_target(graph, op)], None, attributes)
    offset = -UINT8_SHIFT if graph.activation_dtype == "uint8" else 0  # zero point 0 in either dtype
    graph.store_quantized(op, resized, QuantParams(np.asarray(1, np.float32), offset))


def _write_nearest(graph: GraphBuilder, op: Op) -> None:
    size_in, size_out = graph.tensor(op.inputs[0]).shape[2:], op.attributes["size"]
    value = graph.integers(op.inputs[0])
    if all(out % in_ == 0 for in_, out in zip(size_in, size_out, strict=True)):
        attributes = {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        }
        graph.node(op, "Resize", [value, *_target(graph, op)], graph.value(op.output), attributes)
        return
    for axis in (2, 3):
        picked = nearest_indices(size_in[axis - 2], size_out[axis - 2])
        indices = graph.constant(f"{op.output}/indices_{axis}", picked)
        final = graph.value(op.output) if axis == 3 else None
        value = graph.node(op, "Gather", [value, indices], final, {"axis": axis})


def nearest_indices(size_in: int, size_out: int) -> Array:
    """Return floor(i * size_in / size_out), the input position "nearest" takes for output i.

    Returns:
        int64 (size_out,).

    Example:
        >>> nearest_indices(6, 4).tolist()
        [0, 1, 3, 4]
    """
    return np.arange(size_out, dtype=np.int64) * size_in // size_out


def _target(graph: GraphBuilder, op: Op) -> list[str]:
    """Return the inputs roi (absent) and scales that reach the wanted size."""
    shape_in = graph.tensor(op.inputs[0]).shape[2:]
    factors = [_factor(in_, out) for in_, out in zip(shape_in, op.attributes["size"], strict=True)]
    return ["", graph.constant(f"{op.output}/factors", np.asarray([1, 1, *factors], np.float32))]


def _factor(size_in: int, size_out: int) -> np.float32:
    factor: np.float32 = np.float32(size_out) / np.float32(size_in)
    while min(int(np.float32(size_in) * factor), int(size_in * float(factor))) < size_out:
        factor = np.nextafter(factor, np.float32(np.inf))
    return factor
