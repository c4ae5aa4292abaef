"""What x86 without VNNI makes of sums of products: `vpmaddubsw` adds pairs in int16 and saturates.

    u = q_x + 128                                                   uint8, what an ONNX file for x86 holds
    pair_j = u_{2j} w_{2j} + u_{2j+1} w_{2j+1}                      exact
    acc~   = sum_j clamp(pair_j, -2^15, 2^15 - 1) - z_u sum_k w_k   instead of sum_j pair_j - ...

so a sum loses what its pairs have beyond int16. Neighbours are those of the order in which ONNX Runtime lays
columns out: kernel row, kernel column, input channel, group by group; the last of an odd number stands alone.
A pair can saturate only if its two weights have one sign and add up to 129 or more (255 * 128 = 32640 fits):
those of 7 bits never do.

A depthwise convolution has a kernel of its own and is exact; so are files with int8 activations, and LiteRT.
All of it was read off ONNX Runtime 1.31 itself, run on an emulated processor with AVX2 and without VNNI:
eight convolutions, two linear layers and the whole of ResNet-20, every output equal.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, VPMADDUBSW.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from edgecnn.graph.program import Array, Op, Program

LOW, HIGH = -(1 << 15), (1 << 15) - 1
LARGEST = 255
"""Of an activation as uint8."""

Integers = npt.NDArray[np.integer]


def lost_by_saturation(columns: Integers, rows: Integers) -> npt.NDArray[np.int64]:
    """Return by how much pairs of products exceed int16, summed: exact minus saturating sums.

    Args:
        columns: activations as uint8 values 0..255, (k, positions), in the order of the runtime.
        rows: int8 weights (c_out, k), in the same order.

    Returns:
        int64 (c_out, positions).

    Example: 255 * 127 * 2 = 64770 is 32003 above 32767; the third product is a pair of its own.
        >>> lost_by_saturation(np.array([[255], [255], [255]]), np.array([[127, 127, 127]])).tolist()
        [[32003]]
    """
    lost = np.zeros((len(rows), columns.shape[1]), np.int64)
    for channel, first in _risky_pairs(rows):
        pairs = columns[first].astype(np.int32) * np.int32(rows[channel, first])
        pairs += columns[first + 1].astype(np.int32) * np.int32(rows[channel, first + 1])
        lost[channel] += pairs - np.clip(pairs, LOW, HIGH)
    return lost


def _risky_pairs(rows: Integers) -> Iterator[tuple[int, int]]:
    """Yield (output channel, first of two weights) where the two can saturate with some activation."""
    even = rows.shape[1] // 2 * 2
    first, second = rows[:, 0:even:2].astype(np.int32), rows[:, 1:even:2].astype(np.int32)
    highest = LARGEST * (np.maximum(first, 0) + np.maximum(second, 0))
    lowest = LARGEST * (np.minimum(first, 0) + np.minimum(second, 0))
    for channel, pair in np.argwhere((highest > HIGH) | (lowest < LOW)):
        yield int(channel), 2 * int(pair)


def can_saturate(rows: Integers) -> bool:
    """Whether any activations make a sum of these weights saturate.

    Args:
        rows: int8 weights (c_out, k), in the order of the runtime.

    Example: 64 + 64 fits, 64 + 65 does not, and neighbours of other signs never meet the bound.
        >>> [can_saturate(np.array([row])) for row in ([64, 64], [64, 65], [127, -127])]
        [False, True, False]
    """
    return next(_risky_pairs(rows), None) is not None


def in_runtime_order(weight: Array) -> Array:
    """Return a weight (c_out, c_in/groups, k_h, k_w) as rows (c_out, k_h * k_w * c_in/groups)."""
    rows: Array = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)
    return rows


def is_depthwise(weight: Array, groups: int) -> bool:
    """Whether each channel of the input makes one of the output: (c, 1, k_h, k_w) in c groups."""
    return groups > 1 and weight.shape[:2] == (groups, 1)


def may_saturate(program: Program) -> bool:
    """Whether x86 without VNNI can give other integers than the program's for some image.

    Args:
        program: as it is written into the ONNX file, with uint8 activations.
    """
    if program.activation_bits != 8 or program.computes_in_float or program.is_dynamic:
        return False
    return any(can_saturate(rows) for op in program.ops if (rows := _rows(program, op)) is not None)


def _rows(program: Program, op: Op) -> Array | None:
    """Return a layer's weights in the order of the runtime, None for what cannot saturate."""
    if op.kind not in ("conv2d", "linear") or program.tensors[op.output].quant is None:
        return None
    weight = program.tensors[op.inputs[1]].data
    if weight is None or op.kind == "linear":
        return weight
    return None if is_depthwise(weight, op.attributes.get("groups", 1)) else in_runtime_order(weight)
