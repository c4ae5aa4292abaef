"""Bias correction: two ways to know the mean error that a quantized layer makes.

In order, with images: each layer's mean output is set to the float network's, with all layers ahead of it
quantized and corrected.

    b~ = b - (mean(W~ x~ + b~) - mean(W x + b))

From batch norms, without images: the mean error is sum (W~ - W) E[x], and E[x] follows from the statistics
that the batch norm ahead kept in training, N(beta, gamma^2) per channel, through the operators between. A
clamp to [a, b] makes of N(mu, sigma^2), with alpha = (a - mu) / sigma and beta = (b - mu) / sigma,

    E = mu (Phi(beta) - Phi(alpha)) + sigma (phi(alpha) - phi(beta)) + a Phi(alpha) + b (1 - Phi(beta))

Sums add means and variances, as if they were independent; other operators end the walk, and the layers
behind them keep the mean that calibration saw.

Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2 and appendices B and C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from edgecnn.graph.folding import STATISTICS
from edgecnn.graph.nodes import argument, aten, copy_graph, fetch
from edgecnn.graph.shapes import infer_shapes
from edgecnn.model import Model
from edgecnn.pipeline import Progress
from edgecnn.quantize.columns import is_columnar, layer_groups
from edgecnn.quantize.lockstep import Stepper, clamp_bounds, layer_pairs
from edgecnn.quantize.parameters import quantize_bias

_ALIKE = frozenset(
    {
        aten.avg_pool2d.default,
        aten.adaptive_avg_pool2d.default,
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.upsample_nearest2d.vec,
        aten.upsample_bilinear2d.vec,
        aten.mean.dim,
        aten.flatten.using_ints,
        aten.view.default,
        aten.reshape.default,
        aten.slice.Tensor,
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
    }
)
"""What leaves the mean of each channel as it is, or nearly, where the channels stay as they are."""


@dataclass(frozen=True)
class Gaussian:
    """What is believed of a value: mean and variance per channel, float64 (c,)."""

    mean: torch.Tensor
    variance: torch.Tensor


def clamped(x: Gaussian, low: float | None, high: float | None) -> Gaussian:
    """Return mean and variance of a clamped normal variable.

    Args:
        x: before the clamp.
        low: lower bound or None.
        high: upper bound or None.

    Example: relu of N(0, 1) has the mean 1 / sqrt(2 pi) and the variance 1/2 - 1 / (2 pi).
        >>> y = clamped(Gaussian(torch.zeros(1), torch.ones(1)), 0.0, None)
        >>> round(y.mean.item(), 4), round(y.variance.item(), 4)
        (0.3989, 0.3408)
    """
    mean, std = x.mean.double(), torch.sqrt(x.variance.double().clamp(min=1e-24))
    below, alpha, low_value = _bound(low, mean, std, 0.0)
    under, beta, high_value = _bound(high, mean, std, 1.0)
    inside = under - below
    density = alpha - beta
    first = mean * inside + std * density + low_value * below + high_value * (1.0 - under)
    second = (mean**2 + std**2) * inside + low_value**2 * below + high_value**2 * (1.0 - under)
    edges = std * ((mean + low_value) * alpha - (mean + high_value) * beta)
    return Gaussian(first, torch.clamp(second + edges - first**2, min=0.0))


def _bound(
    bound: float | None, mean: torch.Tensor, std: torch.Tensor, absent: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return (Phi, phi, value) at a bound; `absent` is Phi where there is none."""
    if bound is None:
        return torch.full_like(mean, absent), torch.zeros_like(mean), 0.0
    z = (bound - mean) / std
    phi = torch.exp(-0.5 * z**2) / sqrt(2.0 * torch.pi)
    return 0.5 * (1.0 + torch.erf(z / sqrt(2.0))), phi, bound


def batch_norm_means(model: Model) -> dict[fx.Node, npt.NDArray[np.float64]]:
    """Return the mean input per channel of each layer that follows from batch-norm statistics.

    Args:
        model: float, folded by `fold_batch_norm`, which leaves the statistics in the layers' `meta`.

    Returns:
        Layer node -> float64 (c_in,); layers whose input cannot be followed are left out.
    """
    shapes = infer_shapes(model)
    known: dict[fx.Node, Gaussian] = {}
    means = {}
    for node in model.graph.graph.nodes:
        if node.op != "call_function":
            continue
        source = node.args[0] if node.args else None
        if is_columnar(node) and source in known:
            means[node] = known[source].mean.numpy()
        found = _follow(node, known, model.graph, shapes)
        if found is not None and len(found.mean) == _channels(shapes.get(node.name)):
            known[node] = found
    return means


def _channels(shape: Any) -> int:
    return int(shape[1]) if isinstance(shape, tuple) and len(shape) > 1 else -1


def _follow(
    node: fx.Node, known: dict[fx.Node, Gaussian], graph: fx.GraphModule, shapes: dict[str, Any]
) -> Gaussian | None:
    """Return what is known of a node's output, None for nothing."""
    if STATISTICS in node.meta:
        mean, std = node.meta[STATISTICS]
        return Gaussian(mean.double(), std.double() ** 2)
    source = node.args[0] if node.args else None
    x = known.get(source) if isinstance(source, fx.Node) else None
    if node.target is aten.cat.default:
        parts = [known.get(part) for part in node.args[0]]  # type: ignore[union-attr,arg-type]
        if argument(node, 1, "dim", 0) != 1 or any(part is None for part in parts):
            return None
        return _joined([part for part in parts if part is not None])
    if x is None:
        return None
    if is_columnar(node):
        return _through_layer(x, node, graph)
    if clamp_bounds(node) != (None, None):
        return clamped(x, *clamp_bounds(node))
    if node.target is aten.add.Tensor and isinstance(node.args[1], fx.Node):
        other = known.get(node.args[1])
        return None if other is None else Gaussian(x.mean + other.mean, x.variance + other.variance)
    if node.target in (aten.pad.default, aten.constant_pad_nd.default):
        return _padded(x, node)
    before, after = shapes.get(str(source)), shapes.get(node.name)
    return x if node.target in _ALIKE and _channels(before) == _channels(after) else None


def _joined(parts: Sequence[Gaussian]) -> Gaussian:
    return Gaussian(torch.cat([p.mean for p in parts]), torch.cat([p.variance for p in parts]))


def _padded(x: Gaussian, node: fx.Node) -> Gaussian:
    """Return zeros for the channels that a pad adds; its border pixels are not counted."""
    sides = [int(side) for side in node.args[1]]  # type: ignore[union-attr,arg-type]
    before, after = (sides[4], sides[5]) if len(sides) > 5 else (0, 0)
    zeros = [torch.zeros(n, dtype=torch.float64) for n in (before, after)]
    return _joined([Gaussian(zeros[0], zeros[0]), x, Gaussian(zeros[1], zeros[1])])


def _through_layer(x: Gaussian, node: fx.Node, graph: fx.GraphModule) -> Gaussian:
    """Return what a layer without a batch norm makes of independent inputs."""
    weight, bias = fetch(graph, argument(node, 1, "weight")).double(), argument(node, 2, "bias")
    groups = layer_groups(node)
    by_group = weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel())  # (g, c_out/g, c_in/g, k)

    def weighted(values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        return (factors.sum(3) * values.reshape(groups, 1, -1)).sum(2).reshape(-1)

    mean = weighted(x.mean, by_group)
    if bias is not None:
        mean = mean + fetch(graph, bias).double()
    return Gaussian(mean, weighted(x.variance, by_group**2))


def correct_in_order(
    float_model: Model, quantized: Model, batches: Sequence[torch.Tensor], progress: Progress
) -> Model:
    """Return the quantized network with every layer's mean output set to the float network's.

    Args:
        float_model: what was quantized, its node names unchanged.
        quantized: by `quantize_static`; its layers have biases.
        batches: calibration images, float32 (n, c, h, w) each.
        progress: told about every layer.
    """
    after = quantized.with_graph(copy_graph(quantized.graph))
    float_side, side = Stepper(float_model.graph, batches), Stepper(after.graph, batches)
    pairs = layer_pairs(float_model.graph, after.graph)
    progress.start("correct biases in order, layers", len(pairs))
    for pair in pairs:
        side.run_until(pair.node)
        bias_node: Any = argument(pair.node, 2, "bias")
        if bias_node is not None:
            axis = -1 if pair.node.target is aten.linear.default else 1
            wanted = channel_means(float_side.run_through(pair.float_node), axis)
            found = channel_means(_preview(side, pair.node), axis)
            stored, scale = (fetch(after.graph, bias_node.args[i]) for i in (0, 1))
            bias = stored.double() * scale.double() - (found - wanted)
            stored.copy_(torch.from_numpy(quantize_bias(bias.float().numpy(), scale.numpy())))
        progress.advance()
    progress.finish()
    return after


def _preview(side: Stepper, node: fx.Node) -> list[torch.Tensor]:
    """Return what the next layer of a stepper gives, without moving it on."""
    compute: Callable[..., torch.Tensor] = node.target  # type: ignore[assignment]
    constants = [side.constant(n) if isinstance(n, fx.Node) else n for n in node.args[1:]]
    with torch.no_grad():
        return [compute(x, *constants, **node.kwargs) for x in side.value(node.all_input_nodes[0])]


def channel_means(batches: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """Return the mean over all images and positions, float64 (c,).

    Example:
        >>> channel_means([torch.zeros(1, 2, 1, 1), torch.ones(3, 2, 1, 1)], 1).tolist()
        [0.75, 0.75]
    """
    sums = [batch.movedim(axis, 0).flatten(1).double().sum(1) for batch in batches]
    count = sum(batch.numel() // batch.shape[axis] for batch in batches)
    return torch.stack(sums).sum(0) / count
