"""What every kernel of the NumPy reference shares: one op with its tensors and raw values, and the
one place where an exact sum becomes an int8 or int16 value.

    q_y = clamp(round_half_even(acc * multiplier) + zero_point_y, q_lo, q_hi)        all in float32
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.program import Array, Op, QuantParams, Tensor


@dataclass(frozen=True)
class Call:
    """One op about to be computed.

    Attributes:
        op: what to compute.
        tensors: descriptions of the op's inputs, in order.
        output: description of what it makes.
        arrays: raw values of the inputs (int8 and int32 where quantized, else float32), in order.
        saturates: whether sums are those of x86 without VNNI (`saturation`).
    """

    op: Op
    tensors: tuple[Tensor, ...]
    output: Tensor
    arrays: tuple[Array, ...]
    saturates: bool = False

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute of the op, or `default` if the op does not set it."""
        return self.op.attributes.get(name, default)

    @property
    def is_quantized(self) -> bool:
        """Whether the output, and therefore the arithmetic, is integer."""
        return self.output.quant is not None

    def quant(self, index: int) -> QuantParams:
        """Return the quantization parameters of input `index`.

        Raises:
            UnsupportedOpError: if that input is float.
        """
        return required_quant(self.tensors[index], self.op)

    @property
    def output_quant(self) -> QuantParams:
        """The quantization parameters of the output.

        Raises:
            UnsupportedOpError: if the output is float.
        """
        return required_quant(self.output, self.op)


def required_quant(tensor: Tensor, op: Op) -> QuantParams:
    """Return `tensor.quant`, which an integer `op` needs.

    Raises:
        UnsupportedOpError: if the tensor is float.
    """
    if tensor.quant is None:
        raise UnsupportedOpError(
            f"{op.layer or op.output} ({op.kind}): tensor '{tensor.name}' is float32, "
            "expected a quantized tensor beside the op's other quantized tensors",
            hint="put a quantize or dequantize op between them",
        )
    return tensor.quant


def float_scale(quant: QuantParams) -> np.float32:
    """Return the scale of a per_tensor parameter set."""
    scale: np.float32 = np.float32(quant.scale)
    return scale


def scale_ratio(numerator: QuantParams, denominator: QuantParams) -> np.float32:
    """Return float32(scale_numerator / scale_denominator) of two per_tensor parameter sets."""
    ratio: np.float32 = float_scale(numerator) / float_scale(denominator)
    return ratio


def clamp_levels(clamp: tuple[float | None, float | None] | None, quant: QuantParams) -> tuple[int, int]:
    """Return (q_lo, q_hi): real clamp bounds as levels.

    Args:
        clamp: (lo, hi) in real units; either may be None, and so may the pair.
        quant: parameters of the output.

    Example:
        >>> clamp_levels((0.0, 6.0), QuantParams(np.float32(0.05), zero_point=-100))
        (-100, 20)
    """
    low, high = clamp or (None, None)

    def level(bound: float) -> int:
        real = np.float32(bound) / float_scale(quant)
        return int(np.clip(np.rint(real) + quant.zero_point, quant.low, quant.high))

    return (quant.low if low is None else level(low)), (quant.high if high is None else level(high))


def clamp_real(y: Array, clamp: tuple[float | None, float | None] | None) -> Array:
    """Return float32 `y` bounded by (lo, hi), either of which may be None; same shape."""
    low, high = clamp or (None, None)
    if low is None and high is None:
        return y
    return np.clip(y, None if low is None else np.float32(low), None if high is None else np.float32(high))


def to_levels(
    scaled: Array, quant: QuantParams, clamp: tuple[float | None, float | None] | None = None
) -> Array:
    """Round and saturate values that are already in units of the output's scale.

    Args:
        scaled: float32, any shape; real value / scale_y. Overwritten.
        quant: parameters of the output.
        clamp: bounds in real units.

    Returns:
        int8 or int16, the same shape.

    Example:
        >>> to_levels(np.float32([0.5, 1.5, -0.5, 300]), QuantParams(np.float32(1), 10)).tolist()
        [10, 12, 10, 127]
    """
    low, high = clamp_levels(clamp, quant)
    scaled = np.asarray(scaled, np.float32)
    np.rint(scaled, out=scaled)
    scaled += np.float32(quant.zero_point)
    np.clip(scaled, np.float32(low), np.float32(high), out=scaled)
    return scaled.astype(quant.dtype)


def centered(q: Array, quant: QuantParams) -> Array:
    """Return q - zero_point, exact in float32, with q's shape."""
    return np.asarray(np.subtract(q, np.float32(quant.zero_point), dtype=np.float32))
