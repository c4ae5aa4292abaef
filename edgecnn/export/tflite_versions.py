"""Versions of the TFLite operators: the lowest that each use needs, and the release that reads it.

A file that asks for a newer operator version than it needs is refused by older runtimes for nothing, so each
operator gets the lowest version that defines what it uses: int8 (mostly 2), half-pixel resizing (3),
grouped convolution (6).

Source: TensorFlow Lite's operator version table (tensorflow/lite/tools/versioning).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OperandType:
    """Element type, rank and parameters of one operand, as far as versions depend on them."""

    dtype: str
    num_dims: int
    scale: float | None = None
    is_per_channel: bool = False


_RUNTIME: dict[str, tuple[str, ...]] = {
    "ABS": ("1.13.0",),
    "ADD": ("1.5.0", "1.14.0", "2.4.0"),
    "AVERAGE_POOL_2D": ("1.5.0", "1.14.0", "2.3.0"),
    "BATCH_MATMUL": ("2.3.0",),
    "CONCATENATION": ("1.5.0", "1.14.0", "2.3.0"),
    "CONV_2D": ("1.5.0", "1.14.0", "1.14.0", "2.3.0", "2.4.0", "2.9.0"),
    "COS": ("1.14.0",),
    "DEPTHWISE_CONV_2D": ("1.5.0", "1.12.0", "1.14.0", "2.2.0", "2.3.0"),
    "DEPTH_TO_SPACE": ("2.1.0", "2.5.0"),
    "DEQUANTIZE": ("1.13.1", "1.14.0", "1.15.0", "2.2.0", "2.7.0"),
    "DIV": ("1.6.0",),
    "ELU": ("1.14.0",),
    "EXP": ("1.7.0",),
    "FULLY_CONNECTED": (
        *("1.5.0", "1.10.0", "1.14.0", "1.14.0", "2.0.0", "2.1.0"),
        *("2.3.0", "2.3.0", "2.3.0", "2.11.0", "2.15.0", "2.17.0"),
    ),
    "GATHER": ("1.6.0", "1.14.0", "1.15.0", "2.4.0"),
    "GELU": ("2.9.0",),
    "HARD_SWISH": ("1.15.0",),
    "LEAKY_RELU": ("1.13.1", "2.3.0"),
    "LOG": ("1.14.0",),
    "LOGISTIC": ("1.14.0", "1.14.0", "2.3.0"),
    "MAXIMUM": ("1.14.0", "1.14.0", "2.3.0", "2.3.0"),
    "MAX_POOL_2D": ("1.5.0", "1.14.0", "2.3.0"),
    "MEAN": ("1.6.0", "1.14.0", "2.4.0"),
    "MINIMUM": ("1.14.0", "1.14.0", "2.3.0", "2.3.0"),
    "MIRROR_PAD": ("1.13.1", "2.3.0"),
    "MUL": ("1.5.0", "1.14.0", "1.15.0", "2.3.0"),
    "PAD": ("1.5.0", "1.14.0", "2.4.0", "2.6.0"),
    "PADV2": ("1.9.0", "1.14.0", "2.4.0", "2.6.0"),
    "QUANTIZE": ("1.14.0", "1.15.0"),
    "REDUCE_MAX": ("1.11.0", "1.14.0", "2.5.0"),
    "RELU": ("1.5.0", "2.1.0", "2.5.0"),
    "RELU6": ("1.5.0", "1.14.0", "2.5.0"),
    "RELU_N1_TO_1": ("1.5.0",),
    "RSQRT": ("1.10.0",),
    "RESHAPE": ("1.5.0",),
    "RESIZE_BILINEAR": ("1.7.0", "1.14.0", "2.2.0", "2.5.0"),
    "RESIZE_NEAREST_NEIGHBOR": ("1.13.1", "1.14.0", "2.3.0", "2.4.0"),
    "SIN": ("1.9.0",),
    "SLICE": ("1.14.0", "1.14.0", "1.14.0", "2.4.0", "2.5.0"),
    "SOFTMAX": ("1.5.0", "1.14.0", "2.3.0"),
    "SQRT": ("1.10.0",),
    "STRIDED_SLICE": ("1.6.0", "1.14.0", "2.1.0", "2.2.0"),
    "SUB": ("1.6.0", "1.14.0", "2.3.0", "2.4.0", "2.4.0"),
    "SUM": ("1.10.0",),
    "TANH": ("1.14.0", "1.14.0", "2.3.0"),
    "TRANSPOSE": ("1.6.0", "1.14.0", "1.15.0", "2.3.0", "2.4.0", "2.12.0"),
    "TRANSPOSE_CONV": ("1.9.0", "2.2.0", "2.3.0", "2.13.0"),
}
"""First TensorFlow Lite release that reads version 1, 2, ... of each operator used here."""

_INT8_IS_2 = frozenset(
    [
        "ADD",
        "AVERAGE_POOL_2D",
        "CONCATENATION",
        "LOGISTIC",
        "MAX_POOL_2D",
        "MEAN",
        "REDUCE_MAX",
        "RELU",
        "RELU6",
        "SOFTMAX",
        "TANH",
    ]
)


_INT16 = {
    **dict.fromkeys(("ADD", "AVERAGE_POOL_2D", "CONCATENATION", "LOGISTIC", "MAX_POOL_2D", "MEAN", "PAD"), 3),
    **dict.fromkeys(("PADV2", "REDUCE_MAX", "RELU", "RELU6", "SOFTMAX", "TANH", "DEQUANTIZE"), 3),
    **dict.fromkeys(("CONV_2D", "MAXIMUM", "MINIMUM", "MUL", "SLICE"), 4),
    **dict.fromkeys(("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR"), 4),
    **dict.fromkeys(("DEPTHWISE_CONV_2D", "SUB", "TRANSPOSE"), 5),
    "FULLY_CONNECTED": 7,
    "GATHER": 4,
    "LEAKY_RELU": 2,
    "QUANTIZE": 2,
}
"""Of int16 activations, beside int8 weights."""

_DYNAMIC = {"CONV_2D": 5, "FULLY_CONNECTED": 12}
"""Of int8 weights per channel beside float32 activations, which the operator quantizes itself."""


def operator_version(operator: str, operands: Sequence[OperandType], options: Mapping[str, Any]) -> int:
    """Return the lowest version of `operator` that defines this use of it.

    Args:
        operator: TFLite's name ("CONV_2D").
        operands: the inputs in order, then the output.
        options: builtin options; `groups` of a CONV_2D counts too.

    Example:
        >>> operator_version("CONV_2D", [OperandType("int8", 4)] * 2, {})
        3
        >>> operator_version("PAD", [OperandType("float32", 5)], {})
        4
    """
    data = operands[0]
    is_int8 = data.dtype in ("int8", "uint8")
    num_dims = max(operand.num_dims for operand in operands)
    broadcasts = len({operand.num_dims for operand in operands}) > 1 and num_dims > 4
    int8_version = 2 if data.dtype == "int8" else 1
    if data.dtype == "int16" or (operator == "QUANTIZE" and operands[-1].dtype == "int16"):
        return _INT16.get(operator, 1)
    if operator in _INT8_IS_2:
        return int8_version
    if operator == "DEQUANTIZE":
        return 3 if data.dtype == "float16" else (5 if data.is_per_channel else int8_version)
    if data.dtype == "float32" and len(operands) > 2 and operands[1].dtype == "int8":
        return _DYNAMIC[operator]
    if operator in ("CONV_2D", "DEPTHWISE_CONV_2D"):
        return _convolution_version(operator, is_int8, options)
    if operator == "FULLY_CONNECTED":
        return 5 if options.get("keepNumDims") else (4 if is_int8 else 1)
    if operator in ("GATHER", "MIRROR_PAD"):
        return int8_version
    if operator in ("PAD", "PADV2"):
        return 4 if num_dims > 4 else int8_version
    if operator == "TRANSPOSE":
        return 6 if data.num_dims > 5 else (4 if data.num_dims > 4 else int8_version)
    if operator == "SLICE":
        return 5 if data.num_dims > 4 else int8_version
    if operator == "STRIDED_SLICE":
        return 4 if data.num_dims > 4 else int8_version
    if operator in ("MAXIMUM", "MINIMUM", "SUB"):
        return 3 if broadcasts else int8_version
    if operator == "MUL":
        return _mul_version(operands, int8_version)
    if operator in ("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR"):
        centered = options.get("halfPixelCenters")
        aligned = options.get("alignCorners") and operator == "RESIZE_NEAREST_NEIGHBOR"
        return 3 if centered or aligned else int8_version
    if operator == "TRANSPOSE_CONV":
        return 4 if options.get("fusedActivationFunction") else 3
    return 1


def _convolution_version(operator: str, is_int8: bool, options: Mapping[str, Any]) -> int:
    """Return the version of a CONV_2D or DEPTHWISE_CONV_2D."""
    if operator == "CONV_2D" and options.get("groups", 1) > 1:
        return 6
    if is_int8:
        return 3
    dilated = options.get("dilationHFactor", 1) != 1 or options.get("dilationWFactor", 1) != 1
    return 2 if operator == "DEPTHWISE_CONV_2D" and dilated else 1


def _mul_version(operands: Sequence[OperandType], int8_version: int) -> int:
    """Return 3 where scale_a * scale_b / scale_y is 1 or more, else the version of the type."""
    a, b, y = operands[0], operands[1], operands[-1]
    if a.scale and b.scale and y.scale and a.scale * b.scale / y.scale >= 1.0:
        return 3
    return int8_version


def minimum_runtime(used: Sequence[tuple[str, int]]) -> str:
    """Return the oldest TensorFlow Lite release that reads all (operator, version) pairs.

    Example:
        >>> minimum_runtime([("CONV_2D", 3), ("RESIZE_BILINEAR", 3)])
        '2.2.0'
    """
    releases = ["1.5.0", *(_RUNTIME[operator][version - 1] for operator, version in used)]
    return max(releases, key=lambda release: tuple(int(part) for part in release.split(".")))
