"""Which layers of a dynamic network each runtime quantizes at run time, and over which values.

LiteRT: every convolution without groups over the whole image, one of 1x1 with stride 1 over each pixel
(XNNPACK computes it as a linear layer; TFLite's own kernel takes the image), a linear layer over each row.
Quantizing a pixel or row takes some 40 ns, the time of 2,500 float multiplications: where they are many,
layers of less than WIDE weights compute in float. So do depthwise convolutions, whose dynamic kernel is
outside XNNPACK: MobileNetV2 takes 2.4 times the time with it.

ONNX Runtime: linear layers of LARGE weights and more, over all of the batch. With its ConvInteger ResNet-20
takes 2.5 times the latency of float and MobileNetV2 1.4 times (with uint8 weights; with int8 ones 18 and 5
times), so that convolutions compute in float with int8 weights, and smaller linear layers too, where
quantizing takes as long as it saves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType

from edgecnn.graph.program import Op, Program

LARGE = 1 << 16
"""Weights from which a linear layer gains in ONNX Runtime: 512 x 1000 take 0.58 of float's time, 120 x 84
1.13."""

WIDE = 1 << 12
"""Weights from which quantizing pixel by pixel, or a sequence row by row, is worth it in XNNPACK: a 1x1 of 32
to 32 channels takes 2.1 of float's time, 48 to 48 1.2, 64 to 64 0.7."""

WHY = {
    "onnx": "ONNX Runtime's dynamic convolutions are slower than float ones",
    "tflite": "dynamic depthwise and narrow 1x1 convolutions are slower than float ones in LiteRT, grouped "
    "and transposed ones are left with them",
}


def as_computed(program: Program, format: str) -> Program:  # noqa: A002
    """Return the Program that the runtime of a format computes: `dynamic` says over what, or is gone.

    Args:
        program: any; one without dynamic layers is returned as it is.
        format: "onnx" or "tflite".
    """
    if not program.is_dynamic:
        return program
    over = _over_onnx if format == "onnx" else _over_tflite
    ops = [_with_values(op, over(program, op)) if op.attributes.get("dynamic") else op for op in program.ops]
    return replace(program, ops=tuple(ops))


def float_layers(program: Program, formats: Sequence[str]) -> list[str]:
    """Say, for each format, how many layers of a dynamic network compute in float there, and why.

    Args:
        program: as `build_program` returns it.
        formats: those written.
    """
    if not program.is_dynamic:
        return []
    found = []
    for name in formats:
        computed = as_computed(program, name)
        layers = [op for op in computed.ops if op.kind in ("conv2d", "conv_transpose2d", "linear")]
        left = [op for op in layers if not op.attributes.get("dynamic")]
        if left:
            found.append(
                f"{name}: {len(left)} of {len(layers)} layers compute in float with int8 weights, first "
                f"{left[0].layer}: {WHY[name]}"
            )
    return found


def _over_onnx(program: Program, op: Op) -> str | None:
    weight = program.tensors[op.inputs[1]].data
    return "image" if op.kind == "linear" and weight is not None and weight.size >= LARGE else None


def _over_tflite(program: Program, op: Op) -> str | None:
    weight = program.tensors[op.inputs[1]]
    is_wide = math.prod(weight.shape) >= WIDE
    if op.kind == "linear":
        return "row" if is_wide or len(program.tensors[op.inputs[0]].shape) == 2 else None
    kernel, stride = weight.shape[2:], tuple(op.attributes["stride"])
    is_pointwise = kernel == stride == (1, 1)
    if is_pointwise:
        return "pixel" if is_wide else None
    return "image"


def _with_values(op: Op, over: str | None) -> Op:
    """Return a dynamic layer that takes its range over these values, or computes in float."""
    attributes = {key: value for key, value in op.attributes.items() if key != "dynamic"}
    return replace(op, attributes=MappingProxyType(attributes | ({"dynamic": over} if over else {})))
