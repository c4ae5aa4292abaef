"""What an instruction set and a runtime version allow an int8 file to be.

x86 kernels multiply uint8 activations with int8 weights. Without VNNI they do so with `vpmaddubsw`, which
adds pairs of products in int16 and saturates:

    |a_0 w_0 + a_1 w_1| <= 2 * 255 * 127 = 64770 > 32767        with 7-bit weights 2 * 255 * 63 = 32130

**Source** Intel 64 and IA-32 Architectures Software Developer's Manual, VPMADDUBSW; the ONNX Runtime
documentation, pages "Quantize ONNX models" (reduce_range) and "Compatibility" (opsets up to 1.20; those of
1.31 were read off the runtime itself).
"""

from __future__ import annotations

import re

from edgecnn.errors import DeviceError

ACTIVATION_DTYPES = {
    "x86-64": "uint8",
    "x86-64-vnni": "uint8",
    "aarch64": "int8",
    "aarch64-dotprod": "int8",
    "armv7l": "int8",
}

ONNX_LIMITS: tuple[tuple[tuple[int, int], int, int], ...] = (
    ((1, 10), 15, 8),
    ((1, 11), 16, 8),
    ((1, 12), 17, 8),
    ((1, 14), 18, 8),
    ((1, 15), 19, 8),
    ((1, 16), 19, 9),
    ((1, 17), 20, 9),
    ((1, 18), 21, 10),
    ((1, 31), 26, 13),
)
"""(first onnxruntime version, newest opset, newest IR version); between rows the lower row holds."""


def activation_dtype_for(isa: str) -> str:
    """Return the activation type whose int8 kernels are fast: "uint8" on x86, "int8" on ARM.

    Raises:
        DeviceError: for an unknown instruction set.

    Example:
        >>> activation_dtype_for("x86-64"), activation_dtype_for("aarch64")
        ('uint8', 'int8')
    """
    if isa not in ACTIVATION_DTYPES:
        raise DeviceError(f"isa is {isa!r}, expected one of {', '.join(ACTIVATION_DTYPES)}")
    return ACTIVATION_DTYPES[isa]


def weight_bits_for(isa: str) -> int:
    """Return the weight bits that cannot saturate: 7 on x86 without VNNI, else 8.

    Raises:
        DeviceError: for an unknown instruction set.

    Example:
        >>> weight_bits_for("x86-64"), weight_bits_for("x86-64-vnni")
        (7, 8)
    """
    activation_dtype_for(isa)
    return 7 if isa == "x86-64" else 8


def max_opset_for(runtime_version: str) -> int:
    """Return the newest ONNX opset that an onnxruntime version reads.

    Raises:
        DeviceError: if the version cannot be read or is older than 1.10.

    Example:
        >>> max_opset_for("1.17.3"), max_opset_for("1.20.0"), max_opset_for("1.31.1")
        (20, 21, 26)
    """
    return _limits(runtime_version)[0]


def max_ir_version_for(runtime_version: str) -> int:
    """Return the newest ONNX IR version that an onnxruntime version reads.

    Raises:
        DeviceError: if the version cannot be read or is older than 1.10.

    Example:
        >>> max_ir_version_for("1.17.3"), max_ir_version_for("1.20.0")
        (9, 10)
    """
    return _limits(runtime_version)[1]


def _limits(runtime_version: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", runtime_version)
    if match is None:
        raise DeviceError(f"onnxruntime version is {runtime_version!r}, expected something like '1.20.0'")
    version = (int(match.group(1)), int(match.group(2)))
    rows = [(opset, ir_version) for first, opset, ir_version in ONNX_LIMITS if first <= version]
    if not rows:
        raise DeviceError(
            f"onnxruntime {runtime_version} is older than 1.10, the oldest edgecnn writes files for",
            hint="update onnxruntime on the device",
        )
    return rows[-1]
