"""How much each group of channels matters: the damage of cutting it alone, against the share cut.

    D_g(r) = mean over outputs of  sum (y - y_cut)^2 / sum y^2        (1 / SQNR)
    or, with labels, the rise of the cross-entropy

for the shares r of SHARES, the channels with the lowest scores first. Damages of different groups are taken
to add up, so the best cut takes next whatever has the least slope: the lower convex hull of each curve gives
every channel a score, dD_g / dr at its place, which never falls along the group.

The channels are cut by zeroing the weights that read them, which is what a cut does to a convolution.

Source: Li et al. 2017, arXiv:1608.08710, section 3.2 (sensitivity of single layers); Yang et al. 2018,
arXiv:1804.03230 (NetAdapt: measure, then cut greedily).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.nn import functional
from torch.utils import _pytree as pytree

from edgecnn.graph.channels import Coupling, Group
from edgecnn.graph.nodes import copy_graph
from edgecnn.model import Model
from edgecnn.prune.groups import cuttable
from edgecnn.prune.importance import FloatArray, Scores
from edgecnn.prune.samples import Samples, affordable, batches

SHARES = (0.25, 0.5, 0.75)
"""Shares of a group that are cut on trial."""

MIN_IMAGES, MAX_IMAGES = 8, 64
"""Images that every trial looks at; between the two as many as can be afforded."""


@dataclass(frozen=True)
class Curve:
    """What cutting one group alone does.

    Attributes:
        group: its index.
        name: of its first layer.
        shares: of the group's channels that were cut, ascending.
        damage: relative output noise power, or rise of the loss, at each share.
    """

    group: int
    name: str
    shares: tuple[float, ...]
    damage: tuple[float, ...]


def measure_sensitivity(
    model: Model, coupling: Coupling, scores: Scores, samples: Samples, shares: Sequence[float] = SHARES
) -> list[Curve]:
    """Cut every group on trial, each alone, and measure the damage.

    Args:
        model: the network, left as it is.
        coupling: its groups.
        scores: which channels of a group go first; groups without scores are left out.
        samples: images; their number is bounded.
        shares: of a group's channels to cut.

    Returns:
        A curve per group, in the order of the groups.
    """
    groups = [group for group in cuttable(coupling) if group.index in scores]
    macs = sum(layer.macs for layer in coupling.layers)
    first = replace(samples, indices=samples.indices[:MAX_IMAGES])
    samples = affordable(first, macs * len(groups) * len(shares), MIN_IMAGES)
    held = list(batches(model, samples))
    graph = copy_graph(model.graph)
    judge = _judge(graph, held, model.spec.task)
    samples.progress.start("sensitivity, groups", len(groups))
    curves = []
    for group in groups:
        order = np.argsort(scores[group.index], kind="stable")
        counts = sorted({min(max(round(s * len(order)), 1), len(order)) for s in shares})
        damage = []
        for count in counts:
            with silenced(graph, group, [int(i) for i in order[:count]]):
                damage.append(judge())
        reached = tuple(count / len(order) for count in counts)
        curves.append(Curve(group.index, group.name, reached, tuple(damage)))
        samples.progress.advance()
    samples.progress.finish()
    return curves


def _judge(
    graph: fx.GraphModule, held: list[tuple[torch.Tensor, torch.Tensor | None]], task: str
) -> Callable[[], float]:
    """Return a function that gives the damage in the graph's present state."""

    def run() -> list[list[torch.Tensor]]:
        with torch.inference_mode():
            return [_tensors(graph(images)) for images, _ in held]

    whole = run()
    labels = [given for _, given in held if given is not None]
    if labels and task == "classification":
        start = _cross_entropy(whole, labels)
        return lambda: max(_cross_entropy(run(), labels) - start, 0.0)
    return lambda: _noise(whole, run())


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [value for value in pytree.tree_leaves(outputs) if isinstance(value, torch.Tensor)]


def _cross_entropy(outputs: list[list[torch.Tensor]], labels: list[torch.Tensor]) -> float:
    losses = [
        functional.cross_entropy(batch[0], given, reduction="none")
        for batch, given in zip(outputs, labels, strict=True)
    ]
    return float(torch.cat(losses).double().mean())


def _noise(whole: list[list[torch.Tensor]], cut: list[list[torch.Tensor]]) -> float:
    """Return the relative noise power, averaged over the network's outputs."""
    ratios = []
    for index in range(len(whole[0])):
        noise = sum(
            float((a[index] - b[index]).double().square().sum()) for a, b in zip(whole, cut, strict=True)
        )
        signal = sum(float(a[index].double().square().sum()) for a in whole)
        ratios.append(noise / max(signal, 1e-30))
    return sum(ratios) / len(ratios)


@contextmanager
def silenced(graph: fx.GraphModule, group: Group, positions: Sequence[int]) -> Iterator[None]:
    """Let nothing read some channels of a group, for as long as the context lasts.

    Args:
        graph: changed in place, and put back.
        group: the channels' group.
        positions: of the channels in `group.channels`.
    """
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    tensors = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    with torch.no_grad():
        for member in group.members:
            if member.role != "in":
                continue
            tensor = tensors[member.tensor]
            saved.append((tensor, tensor.detach().clone()))
            index = torch.tensor([i for p in positions for i in member.positions[p]], dtype=torch.long)
            tensor.index_fill_(member.dim, index, 0.0)
        try:
            yield
        finally:
            for tensor, before in reversed(saved):
                tensor.copy_(before)


def hull(curve: Curve) -> tuple[FloatArray, FloatArray]:
    """Return the corners (shares, damage) of the lower convex hull, (0, 0) first and share 1 last.

    Beyond the last trial the curve goes on at its last slope.

    Example:
        >>> shares, damage = hull(Curve(0, "conv1", (0.25, 0.5, 1.0), (0.1, 0.05, 0.4)))
        >>> shares.tolist(), damage.tolist()
        ([0.0, 0.5, 1.0], [0.0, 0.05, 0.4])
    """
    points = [(0.0, 0.0), *zip(curve.shares, curve.damage, strict=True)]
    if points[-1][0] < 1.0:
        (x0, y0), (x1, y1) = points[-2:]
        points.append((1.0, y1 + (y1 - y0) / (x1 - x0) * (1.0 - x1)))
    corners: list[tuple[float, float]] = []
    for point in points:
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-2], point):
            corners.pop()
        corners.append(point)
    return np.array([x for x, _ in corners]), np.array([y for _, y in corners])


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def sensitivity_scores(curves: Sequence[Curve], scores: Scores) -> dict[int, FloatArray]:
    """Return a score per channel: the damage of its going, by its place in the order of `scores`.

    Example: a group of 4 whose damage is 0.2 at half and 1.0 at all scores 0.1, 0.1, 0.4, 0.4.
    """
    found: dict[int, FloatArray] = {}
    for curve in curves:
        values = scores[curve.group]
        size = len(values)
        shares, damage = hull(curve)
        steps = np.diff(np.interp(np.arange(size + 1) / size, shares, damage))
        result = np.empty(size)
        result[np.argsort(values, kind="stable")] = np.maximum(steps, 0.0)
        found[curve.group] = result + _tie_break(values)
    return found


def _tie_break(values: FloatArray) -> FloatArray:
    """Return numbers too small to matter that keep the order of `values` among equal slopes."""
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return ranks.astype(np.float64) * math.ulp(1.0)
