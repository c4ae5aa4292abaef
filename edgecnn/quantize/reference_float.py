"""Operators of the NumPy reference that exist in float32 alone.

    normalize    y = (x - mean(x)) / sqrt(var(x) + eps)        over the dimensions `axes`
    gelu         y = x Phi(x),  by tanh: x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2
    matmul       y = a b        over the last two dimensions, the others broadcast

Source: Ba et al. 2016, arXiv:1607.06450, equation 3; Hendrycks and Gimpel 2016, arXiv:1606.08415.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from edgecnn.graph.program import Array
from edgecnn.quantize.reference_call import Call

FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "abs": np.abs,
    "cos": np.cos,
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "exp": np.exp,
    "log": np.log,
    "rsqrt": lambda x: np.float32(1) / np.sqrt(x),
    "sin": np.sin,
    "sqrt": np.sqrt,
}
"""Kinds that compute one value of each value."""


def function(call: Call) -> Array:
    """Compute one of FUNCTIONS."""
    return np.asarray(FUNCTIONS[call.op.kind](call.arrays[0]), np.float32)


def normalize(call: Call) -> Array:
    """Compute (x - mean) / sqrt(var + eps) over `axes`, in the order in which the runtimes do."""
    (x,) = call.arrays
    axes = tuple(call.attribute("axes"))
    apart = x - x.mean(axis=axes, keepdims=True, dtype=np.float32)
    variance = np.square(apart).mean(axis=axes, keepdims=True, dtype=np.float32)
    return np.asarray(apart / np.sqrt(variance + np.float32(call.attribute("eps"))), np.float32)


def gelu(call: Call) -> Array:
    """Compute x times the normal distribution function of x."""
    (x,) = call.arrays
    half = np.float32(0.5) * x
    if call.attribute("approximate", False):
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
        return np.asarray(half * (np.float32(1) + np.tanh(inner)), np.float32)
    error = torch.erf(torch.from_numpy(np.ascontiguousarray(x)) * math.sqrt(0.5)).numpy()
    return np.asarray(half * (np.float32(1) + error), np.float32)


def matmul(call: Call) -> Array:
    """Compute a b over the last two dimensions."""
    return np.asarray(np.matmul(call.arrays[0], call.arrays[1]), np.float32)


def div(call: Call) -> Array:
    """Compute a / b, broadcast as in NumPy."""
    return np.asarray(call.arrays[0] / call.arrays[1], np.float32)


def total(call: Call) -> Array:
    """Compute the sum over `axes`."""
    axes, keepdim = tuple(call.attribute("axes")), bool(call.attribute("keepdim", False))
    return np.asarray(call.arrays[0].sum(axis=axes, keepdims=keepdim, dtype=np.float32))
