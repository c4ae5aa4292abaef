"""What images say about channels: gradients of the loss by channel and by weight, and activations.

Each quantity takes one pass over the images, batch by batch, for all channels at once.

    g_k = dL/dz_k, z_k = 1 multiplying channel k where each layer reads it
        = sum over readers, images, positions of x_k dL/dx_k

A depthwise convolution hands its input's channels on, so it counts as no reader.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from edgecnn.graph.channels import Coupling, WeightedLayer
from edgecnn.graph.nodes import copy_graph
from edgecnn.model import Model
from edgecnn.prune.samples import Samples, batches, output_loss

FloatArray = npt.NDArray[np.float64]

FISHER_BATCH = 4
"""Images whose gradients are squared together: the fewer, the less the square of their sum scatters."""


def readers(coupling: Coupling) -> list[WeightedLayer]:
    """Return the layers that read channels and make others: all but depthwise convolutions."""
    return [
        layer
        for layer in coupling.layers
        if not (layer.groups > 1 and layer.groups == len(layer.input_channels))
        and any(channel >= 0 for channel in layer.input_channels)
    ]


def channel_axis(layer: WeightedLayer, rank: int) -> int:
    """Return the axis of a layer's input along which its channels lie."""
    return rank - 1 if layer.kind == "linear" else 1


def unread(coupling: Coupling) -> list[WeightedLayer]:
    """Return the layers that make channels which no layer reads (queries and keys of attention)."""
    known = {c for layer in readers(coupling) for c in layer.input_channels}
    free = {c for group in coupling.groups if group.frozen is None for c in group.channels} - known
    return [layer for layer in coupling.layers if free.intersection(layer.output_channels)]


Place = tuple[str, bool]
"""A gate's place: node name, and whether it stands behind the layer (True) or ahead of it."""


class _Gated(fx.Interpreter):
    """Runs the graph with a gate of ones per image and channel ahead of readers and behind makers."""

    def __init__(
        self, graph: fx.GraphModule, ahead: Mapping[str, WeightedLayer], behind: Mapping[str, WeightedLayer]
    ) -> None:
        super().__init__(graph)
        self.ahead = ahead
        self.behind = behind
        self.gates: dict[Place, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self.ahead and n.name not in self.behind:
            return super().run_node(n)
        arguments, keywords = self.fetch_args_kwargs_from_env(n)
        x = arguments[0]
        if n.name in self.ahead:
            x = self._gate((n.name, False), x, self.ahead[n.name])
        y = n.target(x, *arguments[1:], **keywords)  # type: ignore[operator]
        return self._gate((n.name, True), y, self.behind[n.name]) if n.name in self.behind else y

    def _gate(self, place: Place, x: torch.Tensor, layer: WeightedLayer) -> torch.Tensor:
        axis = channel_axis(layer, x.dim())
        shape = [1] * x.dim()
        shape[0], shape[axis] = x.shape[0], x.shape[axis]
        gate = torch.ones(shape, requires_grad=True)
        self.gates[place] = gate
        return x * gate


class _Mean(fx.Interpreter):
    """Runs the graph and sums |x| per input channel of each reader."""

    def __init__(self, graph: fx.GraphModule, layers: Mapping[str, WeightedLayer]) -> None:
        super().__init__(graph)
        self.layers = layers
        self.sums: dict[str, FloatArray] = {}

    def run_node(self, n: fx.Node) -> Any:
        layer = self.layers.get(n.name)
        if layer is not None:
            x = self.env[n.args[0]]  # type: ignore[index]
            axis = channel_axis(layer, x.dim())
            mean = x.abs().mean(dim=[d for d in range(x.dim()) if d != axis]).double().numpy() * len(x)
            self.sums[n.name] = self.sums.get(n.name, 0.0) + mean
        return super().run_node(n)


def frozen_copy(model: Model) -> fx.GraphModule:
    """Return a copy of the graph whose parameters ask for no gradient."""
    graph = copy_graph(model.graph)
    for parameter in graph.parameters():
        parameter.requires_grad_(False)
    return graph


def squared_gate_gradients(model: Model, coupling: Coupling, samples: Samples) -> dict[int, float]:
    """Return channel id -> mean over images of (dL_n/dz_k)^2, in one pass over the images.

    Source: Molchanov et al. 2019, arXiv:1906.10771, section 3.2 (gates); Liu et al. 2021, arXiv:2108.00708,
    equation 5 (squared image by image: the Fisher information of the gate).
    """
    ahead = {layer.node: layer for layer in readers(coupling)}
    behind = {layer.node: layer for layer in unread(coupling)}
    index_of = _dense_ids(ahead.values(), behind.values())
    num_channels = len(index_of)
    interpreter = _Gated(frozen_copy(model), ahead, behind)
    generator = torch.Generator().manual_seed(samples.seed)
    squares, num_images = np.zeros(num_channels), 0
    for images, labels in batches(model, samples):
        interpreter.gates = {}
        loss = output_loss(interpreter.run(images), labels, model.spec.task, generator)
        places = list(interpreter.gates)
        found = torch.autograd.grad(loss, [interpreter.gates[p] for p in places], allow_unused=True)
        totals = np.zeros((len(images), num_channels))
        for (name, after), gradient in zip(places, found, strict=True):
            if gradient is not None:
                channels = behind[name].output_channels if after else ahead[name].input_channels
                _scatter(totals, channels, gradient, index_of)
        squares += (totals**2).sum(axis=0)
        num_images += len(images)
    return {channel: float(squares[i] / num_images) for channel, i in index_of.items()}


def _dense_ids(ahead: Collection[WeightedLayer], behind: Collection[WeightedLayer]) -> dict[int, int]:
    """Return channel id -> 0, 1, 2 ... over the channels that are read, then those that are only made."""
    read = sorted({c for layer in ahead for c in layer.input_channels if c >= 0})
    made = sorted({c for layer in behind for c in layer.output_channels if c >= 0} - set(read))
    return {channel: i for i, channel in enumerate([*read, *made])}


def _scatter(
    totals: FloatArray, channels: Sequence[int], gradient: torch.Tensor, index_of: Mapping[int, int]
) -> None:
    """Add a gate's gradient (images x channels of the layer) to its channels' columns of `totals`."""
    values = gradient.reshape(len(gradient), -1).double().numpy()
    columns = np.array([index_of.get(c, -1) for c in channels])
    known = np.flatnonzero(columns >= 0)
    np.add.at(totals.T, columns[known], values[:, known].T)


def squared_gradients(model: Model, names: Collection[str], samples: Samples) -> dict[str, torch.Tensor]:
    """Return E[(d log p(t | x) / dw)^2] by tensor name, t drawn from the network's own answers.

    The draw makes gradients of different images independent with mean 0, so that the square of a batch's
    summed gradient has the expectation of the sum of squares: a batch costs one backward pass.

    Source: Theis et al. 2018, arXiv:1801.05787, equation 6.
    """
    graph = copy_graph(model.graph)
    wanted = {name: parameter for name, parameter in graph.named_parameters() if name in names}
    for name, parameter in graph.named_parameters():
        parameter.requires_grad_(name in wanted)
    sums = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in wanted.items()}
    sums.update({n: torch.zeros_like(b, dtype=torch.float64) for n, b in graph.named_buffers() if n in names})
    generator = torch.Generator().manual_seed(samples.seed)
    num_images = 0
    for images, _ in batches(model, samples, FISHER_BATCH):
        loss = output_loss(graph(images), None, model.spec.task, generator)
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        for name, gradient in zip(wanted, found, strict=True):
            if gradient is not None:
                sums[name] += gradient.double().square()
        num_images += len(images)
    return {name: total / num_images for name, total in sums.items()}


def mean_activations(model: Model, coupling: Coupling, samples: Samples) -> dict[int, float]:
    """Return channel id -> mean |x| over images, positions and the layers that read the channel."""
    layers = {layer.node: layer for layer in readers(coupling)}
    interpreter = _Mean(frozen_copy(model), layers)
    num_images = 0
    with torch.inference_mode():
        for images, _ in batches(model, samples):
            interpreter.run(images)
            num_images += len(images)
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    for name, values in interpreter.sums.items():
        for channel, value in zip(layers[name].input_channels, values, strict=True):
            if channel >= 0:
                sums[channel] = sums.get(channel, 0.0) + float(value) / num_images
                counts[channel] = counts.get(channel, 0) + 1
    return {channel: total / counts[channel] for channel, total in sums.items()}
