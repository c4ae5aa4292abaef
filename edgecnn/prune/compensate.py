"""Win back, without labels or training, some of what a cut takes away.

A layer y = W x + b that loses the channels R of its input x keeps K. With the mean mu and covariance S of x
over images and positions,

    mean          x_R is taken for its mean:       b += W_R mu_R
    reconstruct   x_R is taken for its best linear guess from what is kept, x_R ~ mu_R + B (x_K - mu_K):
                  B = S_RK (S_KK + ridge I)^-1     W_K += W_R B     b += W_R (mu_R - B mu_K)

per pixel, for every tap of a convolution alike. Where a layer has no bias, a batch norm behind it takes the
constant off its running mean; else the constant is dropped. Batch-norm statistics are then counted again on
the cut network (`reestimate`), which takes care of what the linear guess leaves out.

Source: He et al. 2017, arXiv:1707.06168, section 3.1 (least-squares reconstruction of a layer from the
channels kept); Nagel et al. 2019, arXiv:1906.04721, section 4.2 (means into biases).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import fx

from edgecnn.graph.channels import Coupling, WeightedLayer
from edgecnn.graph.modes import reestimate_batch_norm
from edgecnn.graph.nodes import argument, aten, copy_graph
from edgecnn.model import Model
from edgecnn.prune.gradients import channel_axis, frozen_copy, readers
from edgecnn.prune.samples import Samples, batches

Compensation = Literal["none", "mean", "reconstruct"]

RIDGE = 1e-3
"""Ridge of the regression, as a share of the mean variance of the channels kept, where pixels are many; a
share of channels / pixels is added, so that a few images do not let it learn their noise."""

MAX_CHANNELS = 4096
"""A layer with more input channels (a linear one behind a flatten) is compensated by means alone."""

MAX_ROWS = 4096
"""Pixels of a batch that the covariance is taken over, at most; strided, so that it repeats itself."""

STATISTICS_BATCH = 64
"""Images in a batch that batch-norm statistics are counted over."""


@dataclass(frozen=True)
class Moments:
    """First and second moments of what a layer reads.

    Attributes:
        mean: float64 (c_in,).
        covariance: float64 (c_in, c_in), or None where it was too large.
        count: pixels they were taken over.
    """

    mean: torch.Tensor
    covariance: torch.Tensor | None
    count: int


class _Moments(fx.Interpreter):
    """Runs the graph and sums x and x x^T of each layer's input over rows of channels."""

    def __init__(self, graph: fx.GraphModule, layers: Mapping[str, WeightedLayer], second: bool) -> None:
        super().__init__(graph)
        self.layers = layers
        self.second = second
        self.sums: dict[str, torch.Tensor] = {}
        self.squares: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self._seen: dict[tuple[fx.Node, int], str] = {}

    def run_node(self, n: fx.Node) -> Any:
        layer = self.layers.get(n.name)
        if layer is not None:
            x = self.env[n.args[0]]  # type: ignore[index]
            rows = x.movedim(channel_axis(layer, x.dim()), -1).reshape(-1, len(layer.input_channels))
            rows = rows[:: max(len(rows) // MAX_ROWS, 1)]  # (rows, c_in)
            self.counts[n.name] = self.counts.get(n.name, 0) + len(rows)
            self.sums[n.name] = self.sums.get(n.name, 0.0) + rows.double().sum(dim=0)
            if self.second and rows.shape[1] <= MAX_CHANNELS:
                self.squares[n.name] = self.squares.get(n.name, 0.0) + (rows.T @ rows).double()
        return super().run_node(n)


def gather_moments(model: Model, coupling: Coupling, samples: Samples, *, second: bool) -> dict[str, Moments]:
    """Return the moments of every reader's input by node name, in one pass over the images.

    Args:
        model: the uncut network.
        coupling: its layers.
        samples: images.
        second: covariances too.
    """
    layers = {layer.node: layer for layer in readers(coupling)}
    interpreter = _Moments(frozen_copy(model), layers, second)
    with torch.inference_mode():
        for images, _ in batches(model, samples):
            interpreter.run(images)
    found = {}
    for name, count in interpreter.counts.items():
        mean = interpreter.sums[name] / count
        square = interpreter.squares.get(name)
        covariance = None if square is None else square.clone() / count - torch.outer(mean, mean)
        found[name] = Moments(mean.clone(), covariance, count)
    return found


def compensate(
    model: Model, coupling: Coupling, removed: Collection[int], moments: Mapping[str, Moments]
) -> Model:
    """Return the uncut network with its weights and biases ready to lose the channels.

    Args:
        model: the uncut network, left as it is.
        coupling: of it.
        removed: channel ids about to be cut.
        moments: from `gather_moments`; a layer without covariance is compensated by means.
    """
    graph = copy_graph(model.graph)
    nodes = {node.name: node for node in graph.graph.nodes}
    gone = set(removed)
    shared = _shared_weights(coupling)
    with torch.no_grad():
        for layer in readers(coupling):
            lost = [i for i, channel in enumerate(layer.input_channels) if channel in gone]
            if lost and layer.node in moments and layer.weight not in shared:
                _compensate_layer(graph, nodes[layer.node], layer, lost, moments[layer.node])
    return model.with_graph(graph)


def _shared_weights(coupling: Coupling) -> set[str]:
    """Return weights that more than one layer reads: what helps one would harm the other."""
    names = [layer.weight for layer in coupling.layers]
    return {name for name in names if names.count(name) > 1}


def _compensate_layer(
    graph: fx.GraphModule, node: fx.Node, layer: WeightedLayer, lost: list[int], moments: Moments
) -> None:
    tensors = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    kept = sorted(set(range(len(layer.input_channels))) - set(lost))
    constant = moments.mean[lost]  # (lost,)
    weight = tensors[layer.weight]
    if moments.covariance is not None and layer.groups == 1 and kept:
        guess = regress(moments, kept, lost)  # (lost, kept)
        constant = constant - guess @ moments.mean[kept]
        axis = 0 if layer.kind == "conv_transpose2d" else 1
        by_input = weight.movedim(axis, 0).double()  # (c_in, ...)
        change = torch.tensordot(guess, by_input[lost], dims=([0], [0]))  # (kept, ...)
        target = weight.movedim(axis, 0)
        target[kept] += change.to(weight.dtype)
    _add_constant(node, layer, _constant_output(layer, weight, lost, constant), tensors)


def regress(moments: Moments, kept: list[int], lost: list[int]) -> torch.Tensor:
    """Return B = S_RK (S_KK + ridge I)^-1, float64 (lost, kept).

    Example: of two equal channels over many pixels, S = [[1, 1], [1, 1]], the second is guessed as 0.999
        times the first.
    """
    covariance = moments.covariance
    if covariance is None:
        return moments.mean.new_zeros(len(lost), len(kept))
    within = covariance[kept][:, kept]
    share = RIDGE + len(kept) / max(moments.count, 1)
    ridge = share * float(within.diagonal().mean()) + 1e-12
    across = covariance[kept][:, lost]  # (kept, lost)
    solved: torch.Tensor = torch.linalg.solve(
        within + ridge * torch.eye(len(kept), dtype=within.dtype), across
    )
    return solved.T


def _constant_output(
    layer: WeightedLayer, weight: torch.Tensor, lost: list[int], constant: torch.Tensor
) -> torch.Tensor:
    """Return what the lost channels add to each output if they hold `constant`, float64 (c_out,)."""
    c_in, c_out = len(layer.input_channels), len(layer.output_channels)
    values = torch.zeros(c_in, dtype=torch.float64)
    values[lost] = constant
    w = weight.double()
    if layer.kind == "conv_transpose2d":  # (c_in, c_out/groups, ...); each output pixel sees some taps only
        return torch.zeros(c_out, dtype=torch.float64)
    taps = w.reshape(*w.shape[:2], prod(w.shape[2:])).sum(dim=2)  # (c_out, c_in/groups)
    per_group = values.reshape(layer.groups, -1)  # (groups, c_in/groups)
    by_group = taps.reshape(layer.groups, -1, taps.shape[1])  # (groups, c_out/groups, c_in/groups)
    return torch.einsum("goi,gi->go", by_group, per_group).reshape(-1)


def _add_constant(
    node: fx.Node,
    layer: WeightedLayer,
    constant: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Add a constant per output channel to the layer's bias, or take it off the norm behind it."""
    if layer.bias is not None:
        tensors[layer.bias].add_(constant.to(tensors[layer.bias].dtype))
        return
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten.batch_norm.default:
        mean = argument(users[0], 3, "running_mean")
        if isinstance(mean, fx.Node) and len(mean.users) == 1:
            buffer = tensors[str(mean.target)]
            buffer.sub_(constant.to(buffer.dtype))


def reestimate(model: Model, samples: Samples) -> Model:
    """Return the network with batch-norm statistics counted again over the images, at least two of them."""
    graph = copy_graph(model.graph)
    images = [batch for batch, _ in batches(model, samples, STATISTICS_BATCH)]
    if model.fixed_batch is None and len(images) > 1 and len(images[-1]) < 2:
        images = [*images[:-2], torch.cat(images[-2:])]  # one image alone may have no variance
    if len(images[0]) > 1:
        reestimate_batch_norm(graph, images)
    return model.with_graph(graph)
