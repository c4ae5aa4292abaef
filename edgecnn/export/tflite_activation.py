"""Clamps of an op's output: fused into the operator where TFLite can, a MINIMUM or MAXIMUM where it cannot.

TFLite fuses RELU [0, inf), RELU6 [0, 6] and RELU_N1_TO_1 [-1, 1]. An int8 output is bounded by [-128, 127]
anyway, so its clamp is met by any of them (or none) that gives the same levels

    q_lo = round(lo / scale) + zero_point,    q_hi = round(hi / scale) + zero_point    within [-128, 127].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgecnn.graph.program import Array, QuantParams

Bounds = tuple[float | None, float | None]

_FUSED: dict[str, Bounds] = {
    "NONE": (None, None),
    "RELU": (0.0, None),
    "RELU6": (0.0, 6.0),
    "RELU_N1_TO_1": (-1.0, 1.0),
}
FUSED_CODES = {"NONE": 0, "RELU": 1, "RELU_N1_TO_1": 2, "RELU6": 3}
"""Values of the schema's ActivationFunctionType."""


@dataclass(frozen=True)
class Activation:
    """A fused activation and the bounds that are left for a MAXIMUM and a MINIMUM after it.

    Attributes:
        fused: key of FUSED_CODES.
        low: bound for a MAXIMUM, in the tensor's own dtype, or None.
        high: bound for a MINIMUM, likewise.
    """

    fused: str
    low: Array | None = None
    high: Array | None = None

    @property
    def is_fused(self) -> bool:
        """Whether nothing is left to do after the operator."""
        return self.low is None and self.high is None


def quantized_levels(clamp: Bounds, quant: QuantParams) -> tuple[int, int]:
    """Return (q_lo, q_hi) of real bounds.

    Example:
        >>> quantized_levels((0.0, 6.0), QuantParams(np.float32(0.05), zero_point=-100))
        (-100, 20)
    """
    low, high = (
        None if bound is None else int(quant.quantize(np.full(1, bound, np.float32))[0]) for bound in clamp
    )
    return quant.low if low is None else low, quant.high if high is None else high


def choose_activation(clamp: Bounds | None, quant: QuantParams | None) -> Activation:
    """Return how to bound an output.

    Args:
        clamp: (lo, hi) in real units.
        quant: parameters of the output, None for float32.

    Example:
        >>> choose_activation((0.0, 6.0), None).fused
        'RELU6'
        >>> choose_activation((0.0, 1.0), QuantParams(np.float32(1 / 255), -128)).fused
        'NONE'
    """
    low, high = clamp or (None, None)
    if quant is None:
        return _choose_float((low, high))
    wanted = quantized_levels((low, high), quant)
    levels = {name: quantized_levels(bounds, quant) for name, bounds in _FUSED.items()}
    for name, reached in levels.items():
        if reached == wanted:
            return Activation(name)
    fused = "RELU" if levels["RELU"][0] == wanted[0] else "NONE"
    reached = levels[fused]
    return Activation(
        fused,
        np.full(1, wanted[0], quant.dtype) if wanted[0] > reached[0] else None,
        np.full(1, wanted[1], quant.dtype) if wanted[1] < reached[1] else None,
    )


def _choose_float(clamp: Bounds) -> Activation:
    for name, bounds in _FUSED.items():
        if bounds == clamp:
            return Activation(name)
    low, high = clamp
    fused = "RELU" if low == 0.0 else "NONE"
    return Activation(
        fused,
        np.full(1, low, np.float32) if low is not None and fused == "NONE" else None,
        np.full(1, high, np.float32) if high is not None else None,
    )
