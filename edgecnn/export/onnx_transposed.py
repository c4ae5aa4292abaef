"""Quantized transposed convolution as Conv and DepthToSpace; see `transposed` for why the sums are the same.

ONNX Runtime has no integer ConvTranspose and runs it in float, with sums that round now and then. As Conv
they are exact, in 0.4 to 1.0 of the time (u8, 2x2 to 4x4 kernels with stride 2, one thread of an x86 with
VNNI).

DepthToSpace stands between DequantizeLinear and QuantizeLinear with the same parameters, which changes no
value: runtimes that can move integers drop the two (ONNX Runtime 1.21 for uint8), others move floats. With
int8 activations it is spelt as Reshape, Transpose and Reshape of the integers: ONNX Runtime 1.23 drops the
two there as well, and then has no int8 DepthToSpace to run.
"""

from __future__ import annotations

import numpy as np

from edgecnn.export.onnx_graph import GraphBuilder
from edgecnn.export.transposed import PhaseConvolution, phase_convolution
from edgecnn.graph.program import Array, Op, QuantParams


def write_phases(graph: GraphBuilder, op: Op, kernel: Array) -> None:
    """Append the nodes of a quantized conv_transpose2d: Conv, DepthToSpace and, where sizes ask for it, a
    Slice.

    Args:
        graph: where the nodes go.
        op: the conv_transpose2d; its input and output are quantized.
        kernel: its weight, int8 (c_in, c_out/groups, k_h, k_w).
    """
    x, y = graph.tensor(op.inputs[0]), graph.tensor(op.output)
    phases = phase_convolution(op, kernel, x.shape[2:], y.shape[2:])
    size = (phases.counts[0] * phases.stride[0], phases.counts[1] * phases.stride[1])
    is_cropped, is_spread = size != y.shape[2:], phases.copies > 1
    final = graph.value(op.output)
    if is_cropped or is_spread:
        graph.value_names[op.output] = graph.unique(f"{op.output}/phases")
    _store_conv(graph, op, phases)
    value = graph.value(op.output)
    graph.value_names[op.output] = final
    if is_spread:
        value = _spread(
            graph, op, phases, value, graph.unique(f"{op.output}/spread") if is_cropped else final
        )
    if is_cropped:
        bounds = [("start", (0, 0)), ("stop", y.shape[2:]), ("axes", (2, 3))]
        limits = [graph.constant(f"{op.output}/{n}", np.asarray(v, np.int64)) for n, v in bounds]
        graph.node(op, "Slice", [value, *limits], final)


def _store_conv(graph: GraphBuilder, op: Op, phases: PhaseConvolution) -> None:
    """Append the Conv of all phases, whose channels count (c_out, s_h, s_w)."""
    groups = int(op.attributes["groups"])
    c_in, per_group, s_h, reach_h, s_w, reach_w = phases.taps.shape
    taps = phases.taps.reshape(groups, c_in // groups, per_group, s_h, reach_h, s_w, reach_w)
    taps = taps.transpose(
        0, 2, 3, 5, 1, 4, 6
    )  # (groups, c_out/groups, s_h, s_w, c_in/groups, reach_h, reach_w)
    weight = taps.reshape(groups * per_group * phases.copies, c_in // groups, reach_h, reach_w)
    c_out = groups * per_group
    inputs = [graph.real(op, op.inputs[0])]
    for place, name in enumerate(op.inputs[1:]):
        tensor = graph.tensor(name)
        data = np.repeat(np.asarray(tensor.data), phases.copies) if place else weight
        inputs.append(_real_constant(graph, op, name, data, _repeated(tensor.quant, c_out, phases.copies)))
    attributes = {"kernel_shape": [reach_h, reach_w], "pads": list(phases.padding), "group": groups}
    graph.store(op, "Conv", inputs, attributes)


def _repeated(quant: QuantParams | None, c_out: int, copies: int) -> QuantParams | None:
    """Return parameters of (c_out,) channels, or of those of one group, for all phases of each channel."""
    if quant is None or quant.axis is None:
        return quant
    each = np.tile(quant.scale, c_out // len(quant.scale))
    return QuantParams(np.repeat(each, copies), 0, 0)


def _real_constant(graph: GraphBuilder, op: Op, name: str, data: Array, quant: QuantParams | None) -> str:
    """Return the float value of a rearranged weight or bias."""
    stored = graph.constant(f"{name}/phases", data)
    if quant is None:
        return stored
    scale = np.asarray(quant.scale, np.float32)
    inputs = [stored, graph.constant(f"{stored}/scale", scale)]
    if data.dtype == np.int8:
        inputs.append(graph.constant(f"{stored}/zero_point", np.full(scale.shape, quant.zero_point, np.int8)))
    attributes = {} if quant.axis is None else {"axis": 0}
    return graph.node(op, "DequantizeLinear", inputs, graph.unique(f"{stored}/real"), attributes)


def _spread(graph: GraphBuilder, op: Op, phases: PhaseConvolution, value: str, output: str) -> str:
    """Append what moves (n, c_out * s_h * s_w, h, w) to (n, c_out, h * s_h, w * s_w) and return `output`."""
    y, (s_h, s_w), (height, width) = graph.tensor(op.output), phases.stride, phases.counts
    if s_h == s_w and y.quant is not None and graph.activation_dtype == "uint8":
        attributes = {"blocksize": s_h, "mode": "CRD"}
        real = graph.node(op, "DepthToSpace", [graph.dequantize(op, value, y.quant)], None, attributes)
        return graph.quantize(op, real, y.quant, output)
    factors = np.asarray((0, y.shape[1], s_h, s_w, height, width), np.int64)
    shape = np.asarray((0, y.shape[1], height * s_h, width * s_w), np.int64)
    split = graph.node(op, "Reshape", [value, graph.constant(f"{op.output}/factors", factors)])
    moved = graph.node(op, "Transpose", [split], None, {"perm": [0, 1, 4, 2, 5, 3]})
    return graph.node(op, "Reshape", [moved, graph.constant(f"{op.output}/spread_shape", shape)], output)
