"""Layers left in float between int8 ones, and what keeps ONNX Runtime from quantizing them after all.

    DequantizeLinear -> Conv (float weights) [-> Relu | Clip] -> QuantizeLinear

is what the runtime (`WeightBiasQuantization`, in 1.31) takes for a layer whose weights somebody forgot to
quantize: it rounds them to int8 with one scale for the whole tensor and fuses the layer into an integer
kernel. On ResNet-20 with one such layer only 96 % of the outputs were within 1 LSB of what they should be. A
Sum of one value ahead of the layer does nothing, and the pattern no longer fits; it costs a copy of the
input.

Operators that only move values do not keep the pattern from fitting: the runtime moves DequantizeLinear and
QuantizeLinear past them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgecnn.graph.program import Op, Program

_LAYERS = frozenset({"conv2d", "conv_transpose2d", "linear"})
_MOVERS = frozenset(
    {"max_pool2d", "amax", "concat", "slice", "pad", "reshape", "transpose", "resize", "clamp"}
)


def layers_to_shield(program: Program) -> frozenset[str]:
    """Return the outputs of float layers that read a dequantized value and whose own is quantized.

    Example:
        >>> layers_to_shield(Program("empty", (), (), {}, ()))
        frozenset()
    """
    producers = {op.output: op for op in program.ops}
    consumers = program.consumers()
    return frozenset(
        op.output
        for op in program.ops
        if op.kind in _LAYERS
        and program.tensors[op.output].quant is None
        and _comes_from_int8(op.inputs[0], producers)
        and _goes_to_int8(op.output, consumers)
    )


def _comes_from_int8(name: str, producers: Mapping[str, Op]) -> bool:
    op = producers.get(name)
    if op is None or op.kind == "dequantize":
        return op is not None
    return op.kind in _MOVERS and any(_comes_from_int8(source, producers) for source in op.inputs)


def _goes_to_int8(name: str, consumers: Mapping[str, Sequence[Op]]) -> bool:
    readers = consumers[name]
    return any(
        op.kind == "quantize" or (op.kind in _MOVERS and _goes_to_int8(op.output, consumers))
        for op in readers
    )
