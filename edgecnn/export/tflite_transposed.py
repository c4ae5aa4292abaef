"""Transposed convolution as CONV_2D and DEPTH_TO_SPACE; see `transposed` for why the sums stay the same.

TFLite's own TRANSPOSE_CONV is not used: its output shape is a constant with the batch in it, and run with
another batch it is refused by TFLite's kernel and gives wrong numbers, silently, in XNNPACK (seen with
ai-edge-litert 2.3.0). Against it a 2x2 kernel with stride 2 takes 0.6 of the time, 3x3 the same and 4x4 1.3
times.
"""

from __future__ import annotations

import numpy as np

from edgecnn.export.tflite_activation import FUSED_CODES, choose_activation
from edgecnn.export.tflite_convolution import (
    PADDING_CODES,
    bias_parameters,
    pad_nhwc,
    stored_weight,
    weight_tensor,
)
from edgecnn.export.tflite_layout import Order
from edgecnn.export.tflite_lowering import Lowering
from edgecnn.export.transposed import phase_convolution
from edgecnn.graph.program import BATCH, Array, Op, QuantParams

_NHWC: Order = (0, 2, 3, 1)


def conv_transpose2d(lowering: Lowering, op: Op) -> None:
    """Write a transposed convolution: CONV_2D, DEPTH_TO_SPACE and, where sizes are no multiples, a crop."""
    x, y, w = lowering.tensor(op.inputs[0]), lowering.tensor(op.output), weight_tensor(lowering, op)
    if x.quant is not None and x.quant.num_bits == 16:
        hint = "take the ONNX file alone with --format onnx, or the recipe static_wi8_ai8"
        raise lowering.unsupported(op, "TFLite's DEPTH_TO_SPACE has no 16-bit kernel", hint=hint)
    groups = op.attributes.get("groups", 1)
    kernel = np.asarray(w.data)
    is_depthwise = groups == x.shape[1] and w.shape[1] == 1 and groups > 1
    if groups > 1 and not is_depthwise:
        kernel = _ungrouped(kernel, groups)
    phases = phase_convolution(op, kernel, x.shape[2:], y.shape[2:])
    source = pad_nhwc(lowering, lowering.read(x.name, _NHWC), phases.padding)
    inputs = (source, *_constants(lowering, op, phases.taps, is_depthwise))
    activation = choose_activation(op.attributes.get("clamp"), y.quant)
    options = {
        "padding": PADDING_CODES["VALID"],
        "strideH": 1,
        "strideW": 1,
        "fusedActivationFunction": FUSED_CODES[activation.fused],
    }
    if is_depthwise:
        options["depthMultiplier"] = phases.copies
    shape = (BATCH, *phases.counts, phases.copies * y.shape[1])
    index = lowering.graph.add_tensor(y.name + "/phases", shape, y.dtype, y.quant)
    lowering.graph.add_operator("DEPTHWISE_CONV_2D" if is_depthwise else "CONV_2D", inputs, index, options)
    index = _spread(lowering, index, phases.stride, is_depthwise)
    index = _cropped(lowering, index, (y.shape[2], y.shape[3]))
    if activation.is_fused:
        lowering.adopt(y.name, index, _NHWC)
    else:
        lowering.write_bounds(y.name, _NHWC, index, activation)


def _constants(lowering: Lowering, op: Op, taps: Array, is_depthwise: bool) -> tuple[int, int]:
    """Add weight and bias of all phases and return their indices.

    A dense convolution counts its channels (s_h, s_w, c_out), as DEPTH_TO_SPACE wants them, a depthwise one
    must count them (c, s_h, s_w).
    """
    w, y = weight_tensor(lowering, op), lowering.tensor(op.output)
    copies, c_out = taps.shape[2] * taps.shape[4], y.shape[1]
    if is_depthwise:
        taps = taps[:, 0].transpose(2, 4, 0, 1, 3)  # (reach_h, reach_w, c, s_h, s_w)
        weight = taps.reshape(1, *taps.shape[:2], c_out * copies)
    else:
        taps = taps.transpose(2, 4, 1, 3, 5, 0)  # (s_h, s_w, c_out, reach_h, reach_w, c_in)
        weight = taps.reshape(copies * c_out, *taps.shape[3:])

    def for_phases(values: Array) -> Array:
        each = np.tile(values, c_out // len(values))  # grouped weights share their scales
        return np.repeat(each, copies) if is_depthwise else np.tile(each, copies)

    def quant_for_phases(quant: QuantParams | None, axis: int) -> QuantParams | None:
        if quant is None or quant.axis is None:
            return quant
        return QuantParams(for_phases(quant.scale), 0, axis)

    bias, bias_quant = bias_parameters(lowering, op, c_out)
    return (
        stored_weight(lowering, op, weight, quant_for_phases(w.quant, 3 if is_depthwise else 0)),
        lowering.constant(f"{y.name}/bias", for_phases(bias), quant_for_phases(bias_quant, 0)),
    )


def _spread(lowering: Lowering, index: int, stride: tuple[int, int], is_depthwise: bool) -> int:
    """Move the phases of (n, h, w, s_h * s_w * c) to (n, h * s_h, w * s_w, c)."""
    if stride == (1, 1):
        return index
    n, height, width, channels = lowering.graph.tensors[index].shape
    c_out = channels // (stride[0] * stride[1])
    shape = (n, height * stride[0], width * stride[1], c_out)
    if stride[0] == stride[1] and not is_depthwise:
        output = lowering.like(index, shape, "/spread")
        return lowering.graph.add_operator("DEPTH_TO_SPACE", (index,), output, {"blockSize": stride[0]})
    if is_depthwise:
        factors, perm = (n, height, width, c_out, *stride), (0, 1, 4, 2, 5, 3)
    else:
        factors, perm = (n, height, width, *stride, c_out), (0, 1, 3, 2, 4, 5)
    return lowering.reshape(lowering.transpose(lowering.reshape(index, factors), perm), shape)


def _cropped(lowering: Lowering, index: int, size: tuple[int, int]) -> int:
    """Cut the end of (n, h, w, c) down to `size`."""
    n, height, width, channels = lowering.graph.tensors[index].shape
    if (height, width) == size:
        return index
    output = lowering.like(index, (n, *size, channels), "/cropped")
    return lowering.strided_slice(index, output, (0, 0, 0, 0), (1, 1, 1, 1))


def _ungrouped(kernel: Array, groups: int) -> Array:
    """Return a grouped kernel (c_in, c_out/groups, k_h, k_w) as a dense one, zero between groups."""
    c_in, per_group = kernel.shape[:2]
    dense = np.zeros((c_in, groups * per_group, *kernel.shape[2:]), kernel.dtype)
    for group in range(groups):
        inputs = slice(group * c_in // groups, (group + 1) * c_in // groups)
        dense[inputs, group * per_group : (group + 1) * per_group] = kernel[inputs]
    return dense
