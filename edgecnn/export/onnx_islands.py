"""The way back from float layers into int8 ones, and what keeps ONNX Runtime from undoing them.

    DequantizeLinear -> Conv (float weights) [-> Relu | Clip] -> QuantizeLinear

is what the runtime (`WeightBiasQuantization`, in 1.31) takes for a layer whose weights somebody forgot to
quantize: it rounds them to int8 with one scale for the whole tensor and fuses the layer into an integer
kernel. On ResNet-20 with one such layer only 96 % of the outputs were within 1 LSB of what they should be.

It also moves QuantizeLinear ahead of operators that only move values, which makes of a float max pool one of
uint8 in NCHW order, 30 times as slow (ResNet-18: 11 ms of 66).

A Sum of one value ahead of QuantizeLinear does nothing, and neither pattern fits any more; it costs a copy.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgecnn.graph.program import Op, Program

_LAYERS = frozenset({"conv2d", "conv_transpose2d", "linear"})
_MOVERS = frozenset(
    {"max_pool2d", "amax", "concat", "slice", "gather", "pad", "reshape", "transpose", "resize", "clamp"}
)


def borders_to_shield(program: Program) -> frozenset[str]:
    """Return the outputs of those quantize operators that ONNX Runtime would move or fuse.

    Example:
        >>> borders_to_shield(Program("empty", (), (), {}, ()))
        frozenset()
    """
    producers = {op.output: op for op in program.ops}
    return frozenset(
        op.output for op in program.ops if op.kind == "quantize" and _would_change(op.inputs[0], producers)
    )


def _would_change(name: str, producers: Mapping[str, Op]) -> bool:
    """Whether what makes a value moves it, or is a layer that reads a dequantized value."""
    op = producers.get(name)
    if op is None:
        return False
    return op.kind in _MOVERS or (op.kind in _LAYERS and _comes_from_int8(op.inputs[0], producers))


def _comes_from_int8(name: str, producers: Mapping[str, Op]) -> bool:
    op = producers.get(name)
    if op is None or op.kind == "dequantize":
        return op is not None
    return op.kind in _MOVERS and any(_comes_from_int8(source, producers) for source in op.inputs)
