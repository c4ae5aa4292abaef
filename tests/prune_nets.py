"""Networks small enough to score by hand, and couplings written down by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import nets
import numpy as np
import torch
from torch import nn

from edgecnn.graph.channels import Coupling, Group, Member, TensorInfo, WeightedLayer
from edgecnn.model import Model
from edgecnn.prune.samples import Samples


class Labelled(nets.Images):
    """Inputs with labels."""

    def __init__(self, inputs: np.ndarray, labels: Sequence[int] | None) -> None:
        super().__init__(np.asarray(inputs, np.float32))
        self.labels = None if labels is None else np.asarray(labels, np.int64)


def samples(inputs: Sequence[float], labels: Sequence[int] | None = None, seed: int = 0) -> Samples:
    """Images of one pixel."""
    x = np.asarray(inputs, np.float32).reshape(-1, 1, 1, 1)
    return Samples(Labelled(x, labels), tuple(range(len(x))), labels is not None, seed)


def two_layers(
    first: Sequence[float], second: Sequence[Sequence[float]], scale: Sequence[float] = ()
) -> Model:
    """x (n, 1, 1, 1) -> 1x1 convolution [-> batch norm with gamma `scale`] -> 1x1 convolution -> scores."""
    w1, w2 = torch.tensor(first).reshape(-1, 1, 1, 1), torch.tensor(second)[..., None, None]
    conv1 = nn.Conv2d(1, len(first), 1, bias=False)
    conv2 = nn.Conv2d(len(first), len(second), 1, bias=False)
    norm = nn.BatchNorm2d(len(first), eps=0.0)
    with torch.no_grad():
        conv1.weight.copy_(w1)
        conv2.weight.copy_(w2)
        if scale:
            norm.weight.copy_(torch.tensor(scale))
    middle = [norm] if scale else []
    return nets.as_model(nn.Sequential(conv1, *middle, conv2, nn.Flatten()).eval(), (1, 1, 1))


def chain(widths: Sequence[int], macs: Sequence[int]) -> Coupling:
    """Linear layers in a row: layer i reads widths[i] channels and makes widths[i + 1].

    The network's input and output cannot be cut; group i holds the channels between layers i and i + 1,
    numbered on from those before.
    """
    starts = np.cumsum([0, *widths[1:-1]]).tolist()
    inner = [tuple(range(a, b)) for a, b in pairwise(starts)]
    ids = [(-1,) * widths[0], *inner, (-1,) * widths[-1]]
    layers, tensors = [], {}
    for i, cost in enumerate(macs):
        shape = (widths[i + 1], widths[i])
        layers.append(
            WeightedLayer(
                f"n{i}", f"l{i}", "linear", f"w{i}", None, ids[i + 1], ids[i], 1, cost, shape[0] * shape[1]
            )
        )
        carried = {d: np.array(ids[i + 1 - d]) for d in (0, 1) if ids[i + 1 - d][0] >= 0}
        tensors[f"w{i}"] = TensorInfo(shape, True, carried)
    groups = []
    for i, channels in enumerate(inner):
        own = tuple((k,) for k in range(len(channels)))
        members = (
            Member(f"w{i}", 0, "out", f"n{i}", f"l{i}", own),
            Member(f"w{i + 1}", 1, "in", f"n{i + 1}", f"l{i + 1}", own),
        )
        groups.append(Group(i, channels, members, None))
    params = sum(layer.params for layer in layers)
    return Coupling(
        groups=tuple(groups),
        layers=tuple(layers),
        values={},
        shapes={},
        tensors=tensors,
        constants={},
        inexact=(),
        prunable_params=params,
        params=params,
        frozen_reasons={},
    )
