"""What a network says of images made up for it: whether they look like what it was trained on.

Two objectives, both differentiable in the images x:

BatchNorm statistics. A trained network remembers in each BatchNorm layer l the mean m_l and variance v_l
(per channel) of what came in during training:

    loss(x) = sum_l (|mean(a_l(x)) - m_l|^2 + |std(a_l(x)) - sqrt(v_l)|^2) / sum(v_l)

with a_l(x) the input of layer l, mean and std over (n, h, w). Dividing by sum(v_l) makes each layer count
alike.

Classes. A classifier without BatchNorm still says which images it is sure of: each image gets a class k drawn
at random, and

    loss(x) = mean over images of -log p_k(x)

with p_k the probability that the network gives that class. Late layers answer to noise far more weakly than
to photographs (SqueezeNet 1.1: a third at the last convolution); an image of a class wakes them.

**Source**: Y. Cai et al., ZeroQ: A Novel Zero Shot Quantization Framework, CVPR 2020, arXiv:2001.00281,
equation 3; for classes K. Simonyan et al., Deep Inside Convolutional Networks, 2013, arXiv:1312.6034, with
the cross-entropy of H. Yin et al., Dreaming to Distill, CVPR 2020, arXiv:1912.08795.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import fx
from torch.nn import functional

from edgecnn.errors import DataError
from edgecnn.model import Model

MAX_STEPS, MAX_BATCH = 50, 32

_WORK_PER_ACTIVATION = 200
_BATCH_NORM = torch.ops.aten.batch_norm.default
_CONVS = (torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default)
_SMALLEST = 1e-12

Loss = Callable[[torch.Tensor], torch.Tensor]


class Objective(Protocol):
    """How far a batch of images is from what a network was trained on.

    Attributes:
        max_steps: of Adam, after which the objective is as good as reached.
        min_batch: how many images it takes to judge one.
    """

    max_steps: int
    min_batch: int

    def loss_of(self, images: slice) -> Loss:
        """Return what takes inputs (n, c, h, w), the images of these numbers among all, to a scalar."""
        ...

    def work(self, inputs: torch.Tensor) -> float:
        """Return the work of a forward pass: 1 per multiply-accumulate, 200 per activation."""
        ...


@dataclass(frozen=True)
class _LayerStatistics:
    """What one BatchNorm layer saw, and what it should have seen: per channel, differentiable."""

    input: torch.Tensor  # (n, c, ...)
    running_mean: torch.Tensor  # (c,)
    running_var: torch.Tensor  # (c,)

    def loss(self) -> torch.Tensor:
        """Return the squared distance of mean and std, relative to the layer's variance."""
        dims = [0, *range(2, self.input.dim())]
        var, mean = torch.var_mean(self.input, dims, correction=0)
        std = torch.sqrt(var + 1e-8)
        distance = (mean - self.running_mean).square().sum() + (std - self.running_var.sqrt()).square().sum()
        return distance / (self.running_var.sum() + 1e-8)

    @property
    def is_trained(self) -> bool:
        """Whether the statistics are other than those of a new layer."""
        return bool((self.running_mean != 0).any() or (self.running_var != 1).any())


class _Finished(Exception):  # noqa: N818
    """The last node that is asked for is reached; what follows is not needed."""


class _Capture(fx.Interpreter):
    """Run a graph as far as its last BatchNorm of some, or to its end, and keep what each of them sees.

    Parameters are detached, so that no gradients are computed for them.
    """

    def __init__(self, graph: fx.GraphModule, watched: Sequence[fx.Node] = ()) -> None:
        super().__init__(graph)
        self._watched = set(watched)
        self._last = watched[-1] if watched else None
        self._layers: list[_LayerStatistics] = []
        self.work = 0.0

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, noting statistics and work."""
        if n in self._watched:
            args, _ = self.fetch_args_kwargs_from_env(n)
            self._layers.append(_LayerStatistics(args[0], args[3], args[4]))
            if n is self._last:
                raise _Finished
        result = super().run_node(n)
        if n.op == "get_attr" and isinstance(result, torch.Tensor):
            return result.detach()
        if isinstance(result, torch.Tensor):
            self.work += result.numel() * (_WORK_PER_ACTIVATION + self._macs_per_value(n))
        return result

    def _macs_per_value(self, n: fx.Node) -> int:
        if n.target not in _CONVS:
            return 0
        args, _ = self.fetch_args_kwargs_from_env(n)
        return int(args[1].shape[1:].numel())

    def layers(self, x: torch.Tensor) -> list[_LayerStatistics]:
        """Return what every BatchNorm sees for x (n, c, h, w)."""
        self._layers, self.work = [], 0.0
        try:
            self.run(x)
        except _Finished:
            self.env = {}
        return self._layers

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return the first output for x (n, c, h, w)."""
        self.work = 0.0
        found = self.run(x)
        first: torch.Tensor = found[0] if isinstance(found, (tuple, list)) else found
        return first


class BatchNormStatistics:
    """Distance of the statistics that BatchNorm sees from those it remembers.

    Args:
        model: a network with BatchNorm.

    Raises:
        DataError: if it has none.
    """

    max_steps, min_batch = MAX_STEPS, MAX_BATCH

    def __init__(self, model: Model) -> None:
        nodes = _batch_norm_nodes(model.graph)
        if not nodes:
            raise DataError(f"{model.spec.name}: the network has no BatchNorm layer, expected at least one")
        self._capture = _Capture(model.graph, nodes)
        self.is_trained = True

    def losses(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the loss of each layer (layers,) for inputs (n, c, h, w)."""
        return torch.stack([layer.loss() for layer in self._capture.layers(inputs)])

    def loss_of(self, _: slice) -> Loss:
        """Return the sum over layers, whichever images they are."""
        return lambda inputs: self.losses(inputs).sum()

    def work(self, inputs: torch.Tensor) -> float:
        """Return the work up to the last BatchNorm."""
        layers = self._capture.layers(inputs)
        self.is_trained = any(layer.is_trained for layer in layers)
        return self._capture.work


class ClassConfidence:
    """How unsure a classifier is that each image shows the class drawn for it.

    Args:
        model: a classifier, of logits or of probabilities.
        num_images: how many classes to draw; further images get them again.
        seed: of the classes.
    """

    max_steps = 20  # the network is sure by then, and more images do better than surer ones
    min_batch = 1

    def __init__(self, model: Model, num_images: int, seed: int) -> None:
        self._capture = _Capture(model.graph)
        classes = _num_classes(model)
        rng = np.random.default_rng(seed)
        rounds = [rng.permutation(classes) for _ in range(-(-num_images // classes))]
        self._classes = torch.from_numpy(np.concatenate(rounds)[:num_images])

    def loss_of(self, images: slice) -> Loss:
        """Return the mean cross-entropy with the classes drawn for these images."""
        classes = self._classes[torch.arange(images.start, images.stop) % len(self._classes)]

        def loss(inputs: torch.Tensor) -> torch.Tensor:
            outputs = self._capture.outputs(inputs)
            if _are_probabilities(outputs):
                return functional.nll_loss(outputs.clamp_min(_SMALLEST).log(), classes)
            return functional.cross_entropy(outputs, classes)

        return loss

    def work(self, inputs: torch.Tensor) -> float:
        """Return the work of the whole network."""
        self._capture.outputs(inputs)
        return self._capture.work


def has_batch_norm(model: Model) -> bool:
    """Return whether a network remembers statistics."""
    return bool(_batch_norm_nodes(model.graph))


def has_classes(model: Model) -> bool:
    """Return whether a network tells classes apart, two at least."""
    return model.spec.task == "classification" and _num_classes(model) > 1


def _num_classes(model: Model) -> int:
    return model.spec.outputs[0].shape[1] or 0


def _batch_norm_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "call_function" and node.target is _BATCH_NORM]


def _are_probabilities(outputs: torch.Tensor) -> bool:
    sums = outputs.detach().sum(1)
    return bool((outputs >= 0).all() and ((sums - 1.0).abs() < 1e-4).all())
