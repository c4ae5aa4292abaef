"""Ranges of every value per channel, before calibration: from a few images, or from BatchNorm statistics.

A BatchNorm's output of channel c has mean beta_c and standard deviation |gamma_c| over the training set, so
without data its range is taken as

    [beta_c - 4 |gamma_c|, beta_c + 4 |gamma_c|]

and followed through activations, pools, additions and concats; what cannot be followed has no range.

Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2 (statistics without data).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from edgecnn.graph.folding import STATISTICS
from edgecnn.graph.nodes import aten
from edgecnn.model import Model

SIGMAS = 4.0

_PASSES = frozenset(
    {
        aten.max_pool2d.default,
        aten.avg_pool2d.default,
        aten.adaptive_avg_pool2d.default,
        aten.mean.dim,
        aten.dropout.default,
        aten.upsample_nearest2d.vec,
        aten.upsample_bilinear2d.vec,
    }
)
_BOUNDS: dict[Any, tuple[float, float]] = {
    aten.relu.default: (0.0, np.inf),
    aten.relu6.default: (0.0, 6.0),
    aten.hardswish.default: (-0.375, np.inf),
    aten.silu.default: (-0.28, np.inf),
}
"""What the operator does to a range: bounds of max(x, low) and min(x, high)."""

_FIXED: dict[Any, tuple[float, float]] = {
    aten.sigmoid.default: (0.0, 1.0),
    aten.hardsigmoid.default: (0.0, 1.0),
    aten.tanh.default: (-1.0, 1.0),
    aten.softmax.int: (0.0, 1.0),
}

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Range:
    """Lowest and highest value per channel, float64 (c,) each."""

    low: Vector
    high: Vector

    @property
    def width(self) -> Vector:
        """Largest magnitude per channel, (c,)."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    @property
    def extent(self) -> float:
        """Length of the range of the whole tensor, 0 included, as int8 holds it."""
        return float(max(self.high.max(), 0.0) - min(self.low.min(), 0.0))


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the range of every value with channels in dimension 1."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.ranges: dict[fx.Node, Range] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "get_attr" and isinstance(value, torch.Tensor) and value.dim() in (2, 4):
            dims = [d for d in range(value.dim()) if d != 1]
            low, high = value.amin(dims).double().numpy(), value.amax(dims).double().numpy()
            self.ranges[n] = Range(low, high)
        return value


def measure_ranges(folded: Model, inputs: npt.NDArray[np.float32]) -> dict[fx.Node, Range]:
    """Return what a few images give.

    Args:
        folded: float, after `fold_batch_norm`.
        inputs: float32 (n, c, h, w), preprocessed.
    """
    recorder = _Recorder(folded.graph)
    with torch.no_grad():
        recorder.run(torch.from_numpy(np.ascontiguousarray(inputs)))
    return recorder.ranges


def estimate_ranges(folded: Model, shapes: dict[str, Any]) -> dict[fx.Node, Range]:
    """Return what follows from BatchNorm statistics.

    Args:
        folded: float, after `fold_batch_norm`, which leaves the statistics in the layers' `meta`.
        shapes: of its values.
    """
    ranges: dict[fx.Node, Range] = {}
    for node in folded.graph.graph.nodes:
        found = _follow(node, ranges) if node.op == "call_function" else None
        shape = shapes.get(node.name)
        if found is not None and isinstance(shape, tuple) and len(shape) > 1 and len(found.low) == shape[1]:
            ranges[node] = found
    return ranges


def _follow(node: fx.Node, ranges: dict[fx.Node, Range]) -> Range | None:
    if STATISTICS in node.meta:
        mean, std = (np.asarray(v.double().numpy()) for v in node.meta[STATISTICS])
        return Range(mean - SIGMAS * std, mean + SIGMAS * std)
    if node.target is aten.cat.default:
        parts: Any = node.args[0]
        if all(n in ranges for n in parts) and (node.args[1:] or (0,))[0] == 1:
            joined = [ranges[n] for n in parts]
            return Range(np.concatenate([r.low for r in joined]), np.concatenate([r.high for r in joined]))
        return None
    source = node.args[0] if node.args else None
    x = ranges.get(source) if isinstance(source, fx.Node) else None
    if x is None:
        return None
    if node.target in _PASSES:
        return x
    if node.target in _BOUNDS:
        low, high = _BOUNDS[node.target]
        return Range(np.clip(x.low, low, high), np.clip(x.high, low, high))
    if node.target in _FIXED:
        low, high = _FIXED[node.target]
        return Range(np.full_like(x.low, low), np.full_like(x.high, high))
    if node.target is aten.add.Tensor and len(node.args) > 1:
        other = ranges.get(node.args[1]) if isinstance(node.args[1], fx.Node) else None
        if other is not None and len(other.low) == len(x.low):
            return Range(x.low + other.low, x.high + other.high)
    return None
