"""What a channel is worth: one score per channel of each group, float64, high = keep.

A channel of a group is every slice of every tensor that goes when it goes: the filters that make it
(`out`), the weights that read it (`in`), its batch-norm scale (`norm`). With W_k all of them together,

    l1        sum |W_k|                                    Li et al. 2017, arXiv:1608.08710, section 3.1
    l2        sqrt(sum W_k^2)                              Li et al. 2017, section 3.1 (the other norm)
    bn_scale  sum |gamma_k|                                Liu et al. 2017, arXiv:1708.06519, section 3
    fpgm      sum_j ||W_k - W_j||                          He et al. 2019, arXiv:1811.00250, equation 4
    lamp      W_k^2 / sum_{j: W_j^2 >= W_k^2} W_j^2        Lee et al. 2021, arXiv:2010.07611, equation 4
    taylor    mean over images of (dL_n/dz_k)^2            Molchanov et al. 2019, arXiv:1906.10771, equation 8
    obd       1/2 sum E[g^2] w^2 over w in W_k             LeCun et al. 1989 (OBD), with the diagonal Fisher
                                                           of Theis et al. 2018, arXiv:1801.05787, equation 6
    activation  mean |x_k| where the channel is read       Hu et al. 2016, arXiv:1607.03250 (there: zeros)
    random    uniform in [0, 1)

where z_k = 1 multiplies the channel wherever it is read. The sum over all slices of a channel is the group
importance of Fang et al. 2023 (DepGraph), arXiv:2301.12900, section 3.3. Biases and statistics do not count.

Scores of different groups are compared by `global` and `cost_aware` allocation only, after `normalize`:

    none    as they are (taylor and obd: changes of one loss; lamp and bn_scale: comparable as published)
    mean    divided by the group's mean: a channel's worth is relative to its own group (Fang et al. 2023)
    max     divided by the group's largest
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from edgecnn.errors import PassError
from edgecnn.graph.channels import Coupling, Member
from edgecnn.model import Model
from edgecnn.prune.gradients import mean_activations, squared_gate_gradients, squared_gradients
from edgecnn.prune.groups import cuttable, nothing_prunable, tensor_of, weight_members
from edgecnn.prune.samples import Samples, affordable

FloatArray = npt.NDArray[np.float64]
Scores = Mapping[int, FloatArray]
"""Group index -> score per channel, in the order of `Group.channels`."""

BACKWARD = 3
"""Forward passes that a forward and a backward pass cost."""

MIN_IMAGES = 32
"""Images that scores come from at least, where there are so many."""

Normalization = Literal["auto", "none", "mean", "max"]

DEFAULT_NORMALIZATION = MappingProxyType({"l1": "mean", "l2": "mean", "fpgm": "mean", "activation": "mean"})
"""What "auto" means, by importance; "none" for the others."""


@dataclass(frozen=True)
class Question:
    """What an importance is given.

    Attributes:
        model: the network as it is.
        coupling: its groups.
        samples: images, for the importances of DATA_DRIVEN.
        seed: of `random`.
    """

    model: Model
    coupling: Coupling
    samples: Samples | None = None
    seed: int = 0


def score_channels(question: Question, importance: str, normalization: Normalization = "auto") -> Scores:
    """Return the scores of every group that can be cut.

    Args:
        question: the network, its groups and the images.
        importance: a name in IMPORTANCES.
        normalization: how groups are made comparable, see the module.

    Returns:
        Group index -> float64 (channels,). A group that the importance cannot score (bn_scale without a
        batch norm) is left out.

    Raises:
        PassError: if no group can be scored, images are missing, or a score is not finite.
    """
    if importance in DATA_DRIVEN and question.samples is None:
        raise PassError(f"importance {importance!r} needs images, found none", hint="give some with --data")
    if not cuttable(question.coupling):
        raise nothing_prunable(question.coupling)
    scores = IMPORTANCES[importance](question)
    if not scores:
        raise PassError(
            f"importance {importance!r} can score none of the {len(cuttable(question.coupling))} groups",
            hint="bn_scale needs batch norms; use l2" if importance == "bn_scale" else None,
        )
    names = {group.index: group.name for group in question.coupling.groups}
    for index, values in scores.items():
        if not np.isfinite(values).all():
            raise PassError(
                f"importance {importance!r} of group {names[index]} is not finite",
                hint="check the weights, and the preprocess of the images",
            )
    if normalization == "auto":
        normalization = DEFAULT_NORMALIZATION.get(importance, "none")  # type: ignore[assignment]
    return {index: normalize(values, normalization) for index, values in scores.items()}


def normalize(values: FloatArray, how: str) -> FloatArray:
    """Return scores of one group made comparable to those of others.

    Example:
        >>> normalize(np.array([1.0, 3.0]), "mean").tolist(), normalize(np.array([1.0, 4.0]), "max").tolist()
        ([0.5, 1.5], [0.25, 1.0])
    """
    divisor = {"none": 1.0, "mean": float(values.mean()), "max": float(values.max())}[how]
    return values / divisor if divisor > 0 else values


def channel_sums(member: Member, values: torch.Tensor) -> FloatArray:
    """Return the sum of `values` (shaped like the member's tensor) over each channel's slices.

    Example: values [[1, 2], [3, 4]] along dim 0 with positions ((0,), (1,)) give [3, 7].
    """
    others = [d for d in range(values.dim()) if d != member.dim]
    per_index = values.double().sum(dim=others) if others else values.double()
    flat = per_index.numpy()
    return np.array([flat[list(indices)].sum() for indices in member.positions], np.float64)


def _sum_over_members(
    question: Question, value: Callable[[str, torch.Tensor], torch.Tensor], roles: tuple[str, ...]
) -> dict[int, FloatArray]:
    """Return per group the sum over its members of value(tensor name, tensor), per channel."""
    graph = question.model.graph
    scores: dict[int, FloatArray] = {}
    for group in cuttable(question.coupling):
        members = [m for m in weight_members(graph, question.coupling, group) if m.role in roles]
        parts = [channel_sums(m, value(m.tensor, tensor_of(graph, m.tensor))) for m in members]
        if parts:
            scores[group.index] = np.sum(parts, axis=0)
    return scores


_ALL = ("out", "in", "norm")


def l1(question: Question) -> Scores:
    """Sum of |w| over all slices of a channel.

    Source: Li et al. 2017, arXiv:1608.08710, section 3.1; over the group, arXiv:2301.12900.
    """
    return _sum_over_members(question, lambda _, w: w.abs(), _ALL)


def l2(question: Question) -> Scores:
    """Euclidean norm of all slices of a channel together.

    Source: Li et al. 2017, arXiv:1608.08710, section 3.1; over the group, arXiv:2301.12900.
    """
    squares = _sum_over_members(question, lambda _, w: w.square(), _ALL)
    return {index: np.sqrt(values) for index, values in squares.items()}


def bn_scale(question: Question) -> Scores:
    """Sum of |gamma| over the norms that scale a channel; groups without a norm are left out.

    Source: Liu et al. 2017, arXiv:1708.06519, section 3.
    """
    return _sum_over_members(question, lambda _, w: w.abs(), ("norm",))


def lamp(question: Question) -> Scores:
    """Layer-adaptive magnitude: the share of a channel's energy in what is left once the smaller are gone.

    score_k = W_k^2 / sum_{j: W_j^2 >= W_k^2} W_j^2, so the largest channel of every group has score 1.

    Source: Lee et al. 2021, arXiv:2010.07611, equation 4, with channels in place of single weights.
    """
    squares = _sum_over_members(question, lambda _, w: w.square(), _ALL)
    return {index: lamp_scores(values) for index, values in squares.items()}


def lamp_scores(energies: FloatArray) -> FloatArray:
    """Return LAMP scores of energies W_k^2; equal energies are ordered by index.

    Example:
        >>> lamp_scores(np.array([1.0, 4.0, 5.0])).round(3).tolist()
        [0.1, 0.444, 1.0]
    """
    order = np.argsort(energies, kind="stable")
    left = np.cumsum(energies[order][::-1])[::-1]
    scores = np.empty_like(energies)
    scores[order] = energies[order] / np.maximum(left, np.finfo(np.float64).tiny)
    return scores


def fpgm(question: Question) -> Scores:
    """Sum of distances to the other channels of the group: near the geometric median is replaceable.

    Source: He et al. 2019, arXiv:1811.00250, equation 4, over all slices of a channel.
    """
    graph = question.model.graph
    scores: dict[int, FloatArray] = {}
    for group in cuttable(question.coupling):
        squared = np.zeros((len(group.channels), len(group.channels)))
        members = weight_members(graph, question.coupling, group)
        for member in members:
            squared += _squared_distances(member, tensor_of(graph, member.tensor))
        if members:
            scores[group.index] = np.sqrt(np.maximum(squared, 0.0)).sum(axis=1)
    return scores


def _squared_distances(member: Member, tensor: torch.Tensor) -> FloatArray:
    """Return ||a_i - a_j||^2 between the slices of all pairs of channels, (channels, channels)."""
    rows = tensor.movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1).double()
    lengths = {len(indices) for indices in member.positions}
    if len(lengths) == 1:
        index = torch.tensor(member.positions)  # (channels, positions)
        slices = rows[index].reshape(len(member.positions), -1)
    else:
        slices = torch.stack([rows[list(indices)].mean(dim=0) for indices in member.positions])
    return torch.cdist(slices, slices, compute_mode="donot_use_mm_for_euclid_dist").square().numpy()


def taylor(question: Question) -> Scores:
    """Squared first-order change of the loss when a channel is taken away, averaged over images.

    With a gate z_k = 1 wherever channel k is read, (dL/dz_k)^2 = (sum of g w over all weights that read
    it)^2: the joint form of the paper's group criterion, with the gate it recommends and batches of one
    image. With labels drawn from the network's own answers it is the Fisher information of the gate.

    Source: Molchanov et al. 2019, arXiv:1906.10771, equation 8 and section 3.2; by image, Liu et al. 2021,
    arXiv:2108.00708, equation 5.
    """
    squares = squared_gate_gradients(question.model, question.coupling, _samples(question))
    return _by_group(question, squares)


def obd(question: Question) -> Scores:
    """Optimal brain damage with the diagonal of the Fisher information in place of the Hessian's.

    score_k = 1/2 sum over w in W_k of E[(dL/dw)^2] w^2, with labels drawn from the network's own
    answers (the true Fisher information), whatever labels there are.

    Source: LeCun et al. 1989, "Optimal Brain Damage"; Theis et al. 2018, arXiv:1801.05787, equation 6.
    """
    names = {
        member.tensor
        for group in cuttable(question.coupling)
        for member in weight_members(question.model.graph, question.coupling, group)
    }
    fisher = squared_gradients(question.model, names, _samples(question))
    return _sum_over_members(question, lambda name, w: 0.5 * fisher[name] * w.double().square(), _ALL)


def activation(question: Question) -> Scores:
    """Mean magnitude of a channel's values where layers read them.

    Source: Hu et al. 2016, arXiv:1607.03250, section 2 (there by the share of zeros).
    """
    return _by_group(question, mean_activations(question.model, question.coupling, _samples(question)))


def random(question: Question) -> Scores:
    """Uniform draws: the baseline.

    Source: Mittal et al. 2018, arXiv:1801.10447 (random pruning as the baseline to beat).
    """
    rng = np.random.default_rng(question.seed)
    return {group.index: rng.random(len(group.channels)) for group in cuttable(question.coupling)}


def _samples(question: Question) -> Samples:
    """Return the images to score by, fewer where the network is large."""
    if question.samples is None:
        raise PassError("this importance needs images, found none")
    macs = sum(layer.macs for layer in question.coupling.layers)
    return affordable(question.samples, BACKWARD * macs, MIN_IMAGES)


def _by_group(question: Question, by_channel: Mapping[int, float]) -> dict[int, FloatArray]:
    """Return scores by group; a group of which no layer reads a channel is left out."""
    scores = {}
    for group in cuttable(question.coupling):
        if any(channel in by_channel for channel in group.channels):
            scores[group.index] = np.array([by_channel.get(c, 0.0) for c in group.channels], np.float64)
    return scores


IMPORTANCES: Mapping[str, Callable[[Question], Scores]] = MappingProxyType(
    {f.__name__: f for f in (l1, l2, bn_scale, taylor, fpgm, lamp, obd, activation, random)}
)
"""Every importance by name."""

DATA_DRIVEN = frozenset({"taylor", "obd", "activation"})
"""Importances that look at images."""
