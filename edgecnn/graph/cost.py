"""What a network costs, layer by layer.

    macs(conv2d) = n_out h_out w_out (c_in / groups) k_h k_w        macs(linear) = n_in n_out (per position)

1 MAC is one multiply-accumulate, 2 FLOPs. A product of two activations (matmul) counts like a linear layer;
element-wise operators, pools and movement count as none.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from edgecnn.graph.program import Op, Program


@dataclass(frozen=True)
class LayerCost:
    """One operator's share.

    Attributes:
        layer: where in the network ("features.0 (aten.conv2d.default)").
        kind: of operator.
        output_shape: dimension 0 is the batch, -1.
        params: weights and biases it reads, not plain numbers (x * 2).
        macs: for one image.
    """

    layer: str
    kind: str
    output_shape: tuple[int, ...]
    params: int
    macs: int


def layer_costs(program: Program) -> list[LayerCost]:
    """Return the cost of every operator, in execution order."""
    return [
        LayerCost(
            op.layer,
            op.kind,
            program.tensors[op.output].shape,
            sum(
                prod(program.tensors[n].shape)
                for n in op.inputs
                if program.tensors[n].is_constant and program.tensors[n].shape
            ),
            macs(program, op),
        )
        for op in program.ops
    ]


def macs(program: Program, op: Op) -> int:
    """Return the multiply-accumulates of one operator on one image.

    Example: a 3x3 convolution from 3 to 16 channels on 32x32 pixels takes 3 * 9 * 16 * 1024 = 442,368.
    """
    if op.kind not in ("conv2d", "conv_transpose2d", "linear", "matmul"):
        return 0
    x, weight = program.tensors[op.inputs[0]].shape, program.tensors[op.inputs[1]].shape
    output = program.tensors[op.output].shape
    if op.kind == "matmul":
        return prod(output[1:]) * x[-1]
    if op.kind == "linear":
        return prod(output[1:]) * weight[1]
    if op.kind == "conv2d":
        return prod(output[1:]) * prod(weight[1:])
    return prod(x[1:]) * prod(weight[1:])


@dataclass(frozen=True)
class FloatCost:
    """What the part of a quantized network that computes in float costs.

    Attributes:
        macs_share: its share of the multiply-accumulates.
        conversions: quantize and dequantize operators that lie inside the network.
        values: that they convert, for one image.
    """

    macs_share: float
    conversions: int
    values: int


def float_cost(program: Program) -> FloatCost:
    """Return what computing partly in float costs; conversions of the inputs and outputs do not count.

    Example: docs/int8.md says what it comes to in time.
    """
    ends = {*program.inputs, *(name for _, name in program.outputs)}
    inner = [
        op
        for op in program.ops
        if op.kind in ("quantize", "dequantize") and op.inputs[0] not in ends and op.output not in ends
    ]
    in_float = sum(macs(program, op) for op in program.ops if program.tensors[op.output].quant is None)
    whole = sum(macs(program, op) for op in program.ops)
    values = sum(abs(prod(program.tensors[op.output].shape)) for op in inner)
    return FloatCost(in_float / max(whole, 1), len(inner), values)
