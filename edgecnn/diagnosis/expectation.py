"""What int8 can be expected to bring: bytes counted, and a class of speed-up from docs/benchmarks.md.

    plain convolutions      ResNet-18, SqueezeNet 1.1, DenseNet-121         ONNX 2.7 to 3.4, TFLite 3.1 to 3.5
    depthwise convolutions  MobileNetV2, MnasNet, ShuffleNetV2              ONNX 2.1 to 2.6, TFLite 2.1 to 2.4
    swish or gates          MobileNetV3, EfficientNet-B0, GhostNet, RegNetY ONNX 1.2 to 1.8, TFLite 1.7 to 3
    partly in float         ConvNeXt-tiny                                   ONNX 2.4, TFLite 1.3

One thread, 224x224, x86 with VNNI; nothing of the kind is measured for other instruction sets.
"""

from __future__ import annotations

from math import prod
from typing import Any

from edgecnn.devices.kernels import kernels_for
from edgecnn.graph.program import Program

MEASURED: dict[str, dict[str, Any]] = {
    "plain": {
        "class": "plain convolutions",
        "like": "ResNet-18, SqueezeNet 1.1, DenseNet-121",
        "onnx": (2.7, 3.4),
        "tflite": (3.1, 3.5),
    },
    "depthwise": {
        "class": "depthwise convolutions",
        "like": "MobileNetV2, MnasNet, ShuffleNetV2",
        "onnx": (2.1, 2.6),
        "tflite": (2.1, 2.4),
    },
    "gated": {
        "class": "swish or gates",
        "like": "MobileNetV3, EfficientNet-B0, GhostNet, RegNetY",
        "onnx": (1.2, 1.8),
        "tflite": (1.7, 3.0),
    },
    "islands": {
        "class": "parts without an int8 form",
        "like": "ConvNeXt-tiny, the one that was measured",
        "onnx": (2.4, 2.4),
        "tflite": (1.3, 1.3),
    },
}
"""Speed-up over float by class of network, docs/benchmarks.md."""

WHERE = "docs/benchmarks.md: one thread, 224x224, x86 with VNNI"
SMALL_MACS = 5_000_000
"""Below, the time goes into calling operators rather than multiplying, and ratios say little."""


def expect_size(program: Program) -> dict[str, int]:
    """Return bytes of weights and biases in float and in int8, without the description of the graph.

    Example: a 3x3 convolution from 3 to 16 channels with bias has 4 * (432 + 16) bytes in float and
    432 + 4 * 16 + 4 * 16 in int8 (weights, biases, scales).
    """
    before = after = 0
    for op in program.ops:
        has_weights = op.kind in ("conv2d", "conv_transpose2d", "linear")
        for position, name in enumerate(op.inputs):
            tensor = program.tensors[name]
            if not tensor.is_constant:
                continue
            size = prod(tensor.shape)
            before += 4 * size
            if has_weights and position == 2:
                after += 8 * size  # int32, and the scale of the channel
            else:
                after += size
    return {"float_bytes": before, "int8_bytes": after}


def expect_speedup(kind: str, isa: str, macs: int) -> dict[str, Any]:
    """Return the class of the network and what was measured for it.

    Args:
        kind: "plain", "depthwise", "gated" (swish activations or squeeze-and-excitation) or "islands"
            (operators that stay in float).
        isa: of the target.
        macs: of one image.
    """
    found = MEASURED[kind]
    notes = []
    if isa != "x86-64-vnni":
        notes.append(f"not measured on {isa}: the figures are those of x86 with VNNI")
        if not kernels_for(isa).is_dot_product:
            notes.append("expect less, as the target has no int8 dot product")
    if macs < SMALL_MACS:
        notes.append("a network this small spends its time between operators: measure rather than expect")
    return {
        "class": found["class"],
        "like": found["like"],
        "onnx": list(found["onnx"]),
        "tflite": list(found["tflite"]),
        "measured": WHERE,
        "notes": notes,
    }
