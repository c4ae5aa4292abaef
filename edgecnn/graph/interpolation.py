"""Where bilinear resizing takes its values from: the one place that the reference and the writers share.

Output position i lies at source(i) of the input, between first = floor(source) and first + 1:

    source(i) = (i + 1/2) * size_in / size_out - 1/2, not below 0
    source(i) = i * (size_in - 1) / (size_out - 1)                       with align_corners
    y[i] = x[first] * (1 - weight) + x[first + 1] * weight               weight = source - first

Integers are resized with weights rounded to 11 bits and the result rounded half up, which is what XNNPACK
computes:

    q_y = floor(sum_jk q_x[j, k] * weight_j * weight_k + 1/2)
"""

from __future__ import annotations

import numpy as np

from edgecnn.graph.program import Array

WEIGHT_BITS = 11
"""Fraction bits of the weights that integers are resized with."""


def interpolation(size_in: int, size_out: int, align_corners: bool) -> tuple[Array, Array, Array]:
    """Return for each output position its two source positions and the weight of the second.

    Args:
        size_in: rows or columns of the input.
        size_out: of the output.
        align_corners: whether the centres of the corner pixels stay where they are.

    Returns:
        int64, int64 and float32, each (size_out,).

    Example:
        >>> first, second, weight = interpolation(2, 4, align_corners=False)
        >>> first.tolist(), second.tolist(), weight.tolist()
        ([0, 0, 0, 1], [1, 1, 1, 1], [0.0, 0.25, 0.75, 0.25])
    """
    position = np.arange(size_out, dtype=np.float32)
    if align_corners:
        source = position * np.float32((size_in - 1) / max(size_out - 1, 1))
    else:
        source = np.maximum(
            (position + np.float32(0.5)) * np.float32(size_in / size_out) - np.float32(0.5), 0
        )
    first = np.minimum(source.astype(np.int64), size_in - 1)
    return first, np.minimum(first + 1, size_in - 1), (source - first).astype(np.float32)


def integer_weights(weight: Array) -> Array:
    """Return float32 weights in units of 2^-11, rounded: int32 of the same shape.

    Example:
        >>> integer_weights(np.float32([0.25, 1 / 3])).tolist()
        [512, 683]
    """
    return np.asarray(np.rint(weight * np.float32(1 << WEIGHT_BITS)), np.int32)


def interpolation_matrix(size_in: int, size_out: int, align_corners: bool) -> Array:
    """Return what resizes integers along one dimension: float32 (size_out, size_in), in whole 2^-11.

    Example:
        >>> interpolation_matrix(2, 4, align_corners=False).tolist()
        [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    first, second, weight = interpolation(size_in, size_out, align_corners)
    upper = integer_weights(weight)
    matrix = np.zeros((size_out, size_in), np.float32)
    rows = np.arange(size_out)
    matrix[rows, first] += ((1 << WEIGHT_BITS) - upper) / np.float32(1 << WEIGHT_BITS)
    matrix[rows, second] += upper / np.float32(1 << WEIGHT_BITS)
    return matrix


def has_exact_weights(size_in: int, size_out: int, align_corners: bool) -> bool:
    """Whether 11 bits hold the weights, as they do for every factor that is a power of two.

    Example:
        >>> has_exact_weights(14, 224, align_corners=False), has_exact_weights(14, 20, align_corners=False)
        (True, False)
    """
    weight = interpolation(size_in, size_out, align_corners)[2] * np.float32(1 << WEIGHT_BITS)
    return bool(np.all(weight == np.rint(weight)))
