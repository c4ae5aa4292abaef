"""Max and average pools as ONNX nodes that ONNX Runtime loads, and computes as they stand.

The runtime refuses a pool that pads by as much as its window, and its optimizer (PadFusion) adds a Pad with
zeros to the padding of the pool behind it, whatever comes of that:

    Pad by 1, AveragePool of 1 x 1      is refused
    Pad with 0, MaxPool of -1           is -1, since the padding of a MaxPool never wins, in place of 0

It leaves a pool with auto_pad = VALID alone. So a pool behind a Pad has that, and its own padding, where it
has any, in a Pad too. Only an average that does not count its own padding keeps it; that one ONNX Runtime
fuses with no Pad since 1.21.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgecnn.export.onnx_graph import GraphBuilder, same_params
from edgecnn.graph.program import Array, Op, QuantParams
from edgecnn.graph.windows import leaves_padding_out


def write_max_pool(graph: GraphBuilder, op: Op) -> None:
    """Append a MaxPool, of the integers where there are any; padding never wins."""
    attributes = _window(op) | {"dilations": _ints(op.attributes["dilation"])}
    if not _needs_pad(graph, op):
        graph.move(op, "MaxPool", (), attributes | {"pads": _ints(op.attributes["padding"])})
        return
    quant, valid = graph.tensor(op.inputs[0]).quant, attributes | {"auto_pad": "VALID"}
    if quant is None or graph.moves_floats("MaxPool"):
        real = _padded(graph, op, graph.real(op, op.inputs[0]), np.asarray(-np.inf, np.float32))
        graph.store(op, "MaxPool", [real], valid)
        return
    lowest = graph.shift(np.asarray(quant.low, np.int8))
    levels = _padded(graph, op, graph.integers(op.inputs[0]), lowest)
    graph.node(op, "MaxPool", [levels], graph.value(op.output), valid)


def write_average_pool(graph: GraphBuilder, op: Op) -> None:
    """Append an AveragePool with scale 1: parameters that stay cancel, and a mean that ends in .5 is exact.

    Where windows leave padding out, the levels are averaged, and the output's scale is a little less than 1:
    that takes halves away from level 0 (see `leaves_padding_out`). 2^-14 moves 0.5 by more than float32
    resolves beside a zero point of 128, and 127.5 by less than what is between means of up to 63 levels.
    """
    counts = bool(op.attributes["count_include_pad"])
    attributes: dict[str, Any] = _window(op) | {"count_include_pad": int(counts)}
    x, y = graph.tensor(op.inputs[0]), graph.tensor(op.output)
    if x.quant is None or y.quant is None or not same_params(x.quant, y.quant):
        real = graph.real(op, x.name)
        if _needs_pad(graph, op) and (counts or not any(op.attributes["padding"])):
            real = _padded(graph, op, real, np.asarray(0, np.float32))
            attributes["auto_pad"] = "VALID"
        else:
            attributes["pads"] = _ints(op.attributes["padding"])
        graph.store(op, "AveragePool", [real], attributes)
        return
    attributes["pads"] = _ints(op.attributes["padding"])
    levels = x.dtype == "int8" and leaves_padding_out(op, x.shape[2:], y.shape[2:])
    zero_point = 0 if levels else x.quant.zero_point
    unit = QuantParams(np.asarray(1, np.float32), zero_point)
    written = QuantParams(np.asarray(1 - 2.0**-14 if levels else 1, np.float32), zero_point)
    real = graph.dequantize(op, graph.integers(x.name), unit)
    graph.store_quantized(op, graph.node(op, "AveragePool", [real], None, attributes), written)


def _needs_pad(graph: GraphBuilder, op: Op) -> bool:
    """Whether a pool's own padding must be a Pad: there is one ahead of it, or it is as large as a window."""
    producer, padding = graph.producers.get(op.inputs[0]), op.attributes["padding"]
    too_large = any(amount >= op.attributes["kernel"][i % 2] for i, amount in enumerate(padding))
    return too_large or (producer is not None and producer.kind == "pad")


def _padded(graph: GraphBuilder, op: Op, value: str, fill: Array) -> str:
    """Append a Pad of a value (n, c, h, w) by a pool's padding, if it has any, and return its output."""
    top, left, bottom, right = _ints(op.attributes["padding"])
    if not any((top, left, bottom, right)):
        return value
    amounts = np.asarray((0, 0, top, left, 0, 0, bottom, right), np.int64)
    extra = [
        graph.constant(f"{op.output}/pads", amounts),
        graph.constant(f"{op.output}/pad_value", fill),
    ]
    return graph.node(op, "Pad", [value, *extra])


def _window(op: Op) -> dict[str, Any]:
    return {"kernel_shape": _ints(op.attributes["kernel"]), "strides": _ints(op.attributes["stride"])}


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]
