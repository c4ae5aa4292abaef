"""Activations quantized at run time, in the NumPy reference.

    s = (max(x, 0) - min(x, 0)) / 255          z = round(-128 - min(x, 0) / s)
    x_q = clamp(round(x / s) + z, -128, 127)   x~ = s (x_q - z)

over each image, row or pixel. Of -128 - min / s and 127 - max / s the one nearer to its end of the range is
rounded, as XNNPACK does; ONNX Runtime's DynamicQuantizeLinear rounds the first, with zero points 128 higher.

Source: XNNPACK, xnn_f32_qd8_asymmetric_quantization_params; ONNX, DynamicQuantizeLinear (opset 11).
"""

from __future__ import annotations

import numpy as np

from edgecnn.graph.program import Array

LOWEST, HIGHEST = np.float32(-128), np.float32(127)


def held_at_run_time(x: Array, over: str) -> Array:
    """Return what is left of float32 activations once the runtime has quantized them.

    Args:
        x: float32, batch first.
        over: "image" for one scale per index of dimension 0, "row" for one per row of the last dimension,
            "pixel" for one per position of an image, over its channels.

    Returns:
        float32 of x's shape.

    Example: 0 to 255 in steps of 1.
        >>> held_at_run_time(np.float32([[0.0, 1.4, 255.0]]), "row").tolist()
        [[0.0, 1.0, 255.0]]
    """
    axes = {"image": tuple(range(1, x.ndim)), "row": (x.ndim - 1,), "pixel": (1,)}[over]
    low = np.minimum(x.min(axis=axes, keepdims=True), np.float32(0))
    high = np.maximum(x.max(axis=axes, keepdims=True), np.float32(0))
    width = np.where(high > low, high - low, np.float32(1))
    inverse = np.where(high > low, (HIGHEST - LOWEST) / width, np.float32(1)).astype(np.float32)
    from_low, from_high = LOWEST - low * inverse, HIGHEST - high * inverse
    nearer_low = (LOWEST + low * inverse) + (HIGHEST + high * inverse) > 0
    zero_point = np.rint(np.clip(np.where(nearer_low, from_low, from_high), LOWEST, HIGHEST))
    q = np.clip(np.rint(x * inverse) + zero_point, LOWEST, HIGHEST)
    held: Array = ((q - zero_point) * (np.float32(1) / inverse)).astype(np.float32)
    return held
