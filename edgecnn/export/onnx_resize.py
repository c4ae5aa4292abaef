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
from edgecnn.graph.interpolation import has_exact_weights, interpolation_matrix
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
    """Append Resize; of integers, in float with the reference's weights, halves rounded up.

    A runtime may take DequantizeLinear, Resize, QuantizeLinear for an integer Resize, which truncates; with
    Cast it does not. Parameters stay the same, so the integers are resized as they are; a little added to
    them before makes QuantizeLinear, which rounds half to even, round half up.
    """
    x, y = graph.tensor(op.inputs[0]), graph.tensor(op.output)
    if x.quant is None or y.quant is None or not same_params(x.quant, y.quant):
        graph.store(op, "Resize", [graph.real(op, x.name), *_target(graph, op)], attributes)
        return
    real = graph.node(op, "Cast", [graph.integers(x.name)], None, {"to": int(onnx.TensorProto.FLOAT)})
    nudge = graph.constant(f"{op.output}/half_up", np.asarray(_HALF_UP, np.float32))
    real = graph.node(op, "Add", [real, nudge])
    if _prefers_products(op, x.shape[2:]):
        resized = _products(graph, op, real, x.shape[2:])
    else:
        resized = graph.node(op, "Resize", [real, *_target(graph, op)], None, attributes)
    offset = -UINT8_SHIFT if graph.activation_dtype == "uint8" else 0  # zero point 0 in either dtype
    graph.store_quantized(op, resized, QuantParams(np.asarray(1, np.float32), offset))


_HALF_UP = 2.0**-14
"""Less than the steps 1 / (4 f_h f_w) of what factors of 32 give, more than float32's error.

With weights that fill the 11 bits, 5 values in 100,000 lie so closely below a half that they are rounded up
too.
"""

_MAX_PRODUCT_SIZE = 32
"""Up to this input size two products take half of ONNX Runtime's time for a Resize; at 112 they take 2.3."""


def _prefers_products(op: Op, size_in: tuple[int, ...]) -> bool:
    """Whether to resize by matrix products: where Resize would have other weights, or be slower."""
    aligned = bool(op.attributes["align_corners"])
    pairs = list(zip(size_in, op.attributes["size"], strict=True))
    is_exact = all(has_exact_weights(in_, out, aligned) for in_, out in pairs)
    return not is_exact or max(size_in) <= _MAX_PRODUCT_SIZE


def _products(graph: GraphBuilder, op: Op, real: str, size_in: tuple[int, ...]) -> str:
    """Append (h_out, h) x (n, c, h, w) x (w, w_out) -> (n, c, h_out, w_out)."""
    aligned = bool(op.attributes["align_corners"])
    rows, columns = (
        interpolation_matrix(in_, out, aligned)
        for in_, out in zip(size_in, op.attributes["size"], strict=True)
    )
    across = graph.node(op, "MatMul", [real, graph.constant(f"{op.output}/columns", columns.T)])
    return graph.node(op, "MatMul", [graph.constant(f"{op.output}/rows", rows), across])


def _write_nearest(graph: GraphBuilder, op: Op) -> None:
    size_in, size_out = graph.tensor(op.inputs[0]).shape[2:], op.attributes["size"]
    value = graph.integers(op.inputs[0])
    is_whole = all(out % in_ == 0 for in_, out in zip(size_in, size_out, strict=True))
    if is_whole and graph.activation_dtype != "int16":  # ONNX Runtime gathers 16 bits, but does not resize
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
