"""How many channels go where: from scores to the set of channels to remove.

Every allocation is an order in which channels go; the cut is as much of it as the target asks for.

    uniform      every group loses the same share: step j of n has key j / n
    global       the lowest score anywhere goes first
    cost_aware   the lowest score per MAC (or weight) saved goes first, savings counted as the cut proceeds
    sensitivity  as cost_aware, with the measured damage per group in place of the scores (`sensitivity`)

Within a group the order is always that of the scores. With `round_to` channels go in blocks, such that the
group's width stays a multiple of it. A channel whose going would leave a layer below its floor stays.

Source: for cost_aware, the knapsack view of Shen et al. 2022 (HALP), arXiv:2110.10811, equation 4, solved
greedily; for uniform and global, Li et al. 2017, arXiv:1608.08710, and Liu et al. 2017, arXiv:1708.06519.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np

from edgecnn.errors import PassError
from edgecnn.graph.channels import Coupling, Group, macs_and_params
from edgecnn.prune.cost import CutCost, Resource
from edgecnn.prune.groups import cuttable, emptiable_values, nothing_prunable
from edgecnn.prune.importance import FloatArray, Scores

Allocation = Literal["uniform", "global", "cost_aware", "sensitivity"]
Kind = Literal["ratio", "macs_left", "params_left", "size_mb"]

FILE_BYTES_PER_NODE = 300
"""What a file holds per operator besides weights (names, shapes, ranges of activations)."""

INT8_BYTES_PER_CHANNEL = 30
"""What an int8 file holds per output channel of a layer besides weights: scales and zero points of weights
and bias, and a bias of 4 bytes. With the two, ResNet-20 (269,722 params) is 0.307 MB, in truth 0.304 (ONNX)
and 0.302 (TFLite); LeNet-5 (61,706) is 0.072, in truth 0.070 and 0.072."""

MAX_GIVE_BACK = 64
"""Steps that are tried to be put back, once the budget is met."""


@dataclass(frozen=True)
class Target:
    """How much is to go.

    Attributes:
        kind: "ratio" (share of the channels to remove), "macs_left", "params_left" (shares that may remain)
            or "size_mb" (of the file, 1 MB = 1,000,000 bytes).
        value: of it.
        bytes_per_weight: in the file, for size_mb: 1 for int8, 4 for float32.
        num_nodes: operators in the file, for size_mb.
    """

    kind: Kind
    value: float
    bytes_per_weight: float = 1.0
    num_nodes: int = 0

    def amount(self, macs: int, params: int, channels: int = 0) -> float:
        """Return the quantity that the target bounds, in its own unit before normalisation.

        Args:
            macs: multiply-accumulates.
            params: parameters.
            channels: output channels of all layers, for size_mb.
        """
        if self.kind == "macs_left":
            return float(macs)
        if self.kind == "params_left":
            return float(params)
        per_channel = INT8_BYTES_PER_CHANNEL if self.bytes_per_weight <= 1 else 0
        rest = channels * per_channel + self.num_nodes * FILE_BYTES_PER_NODE
        return (params * self.bytes_per_weight + rest) / 1e6

    def spent(self, coupling: Coupling, removed: frozenset[int] = frozenset()) -> float:
        """Return that quantity of a network without some of its channels."""
        made = (channel for layer in coupling.layers for channel in layer.output_channels)
        channels = sum(channel not in removed for channel in made)
        return self.amount(*macs_and_params(coupling, removed), channels)


@dataclass(frozen=True)
class Limits:
    """What a cut keeps to.

    Attributes:
        floor: share of every layer's channels that stays at least; one channel always does.
        round_to: each group's remaining width is a multiple of this, where it can be.
        largest_share: of a group's width that goes at a time; round_to is halved until it is no more. Below 1
            rounding is a wish, which gives way to a target that is out of reach otherwise.
    """

    floor: float = 0.0
    round_to: int = 1
    largest_share: float = math.inf


@dataclass(frozen=True)
class _Step:
    """Channels that go together, and the score they go at."""

    group: int
    channels: tuple[int, ...]
    score: float
    share: float  # of its group that is gone with it


def choose_channels(
    coupling: Coupling,
    scores: Scores,
    target: Target,
    allocation: Allocation = "uniform",
    limits: Limits = Limits(),
) -> frozenset[int]:
    """Return the ids of the channels to remove.

    Args:
        coupling: of the network.
        scores: group index -> score per channel; groups without scores stay whole.
        target: how much is to go. For a budget the cut is the smallest in its order that meets it.
        allocation: the order; "sensitivity" expects the scores that `measure_sensitivity` gives.
        limits: floors and rounding.

    Raises:
        PassError: if nothing can be cut, or the target is out of reach; it says the least that can be had.

    Where `limits.largest_share` makes rounding a wish, round_to is halved until the target is in reach.
    """
    if limits.largest_share < 1 and limits.round_to > 1:
        narrower = replace(limits, round_to=limits.round_to // 2)
        try:
            chosen = _choose(coupling, scores, target, allocation, limits)
        except _OutOfReachError:
            return choose_channels(coupling, scores, target, allocation, narrower)
        return chosen or choose_channels(coupling, scores, target, allocation, narrower)
    return _choose(coupling, scores, target, allocation, limits)


def _choose(
    coupling: Coupling, scores: Scores, target: Target, allocation: Allocation, limits: Limits
) -> frozenset[int]:
    """Return the ids of the channels to remove, in blocks of one size for each group."""
    groups = {g.index: g for g in cuttable(coupling) if g.index in scores}
    if not groups:
        raise nothing_prunable(coupling)
    if target.kind == "ratio" and allocation == "uniform" and limits.largest_share < 1:
        limits = replace(limits, largest_share=min(limits.largest_share, max(target.value, 1e-9)))
    steps = {i: _steps(group, scores[i], limits) for i, group in groups.items()}
    guard = _Floors(coupling, limits.floor)
    total = sum(len(group.channels) for group in groups.values())
    if target.kind == "ratio" and allocation == "uniform":
        order = _ordered(steps, guard, lambda step: step.share)
        return frozenset(c for step in order if step.share <= target.value + 1e-9 for c in step.channels)
    if allocation == "uniform":
        order = _ordered(steps, guard, lambda step: step.share)
    elif allocation == "global":
        order = _ordered(steps, guard, lambda step: step.score)
    else:
        resource: Resource = "params" if target.kind in ("params_left", "size_mb") else "macs"
        order = _cost_aware(steps, guard, CutCost(coupling, resource))
    if target.kind == "ratio":
        return _by_count(order, target.value, total)
    return _by_budget(coupling, order, target)


def _steps(group: Group, scores: FloatArray, limits: Limits) -> list[_Step]:
    """Return a group's channels in the order they go, in blocks that keep the width a multiple."""
    order = np.argsort(scores, kind="stable")
    size = len(order)
    block = block_size(group, limits)
    first = size % block or block  # brings an odd width down to a multiple
    if size <= block and limits.round_to > 1:
        return []
    bounds = [0, *range(first, size + 1, block)]
    steps, worst = [], -math.inf
    for start, stop in pairwise(bounds):
        chosen = order[start:stop]
        worst = max(worst, float(scores[chosen].mean()))  # a later block never goes before an earlier
        steps.append(_Step(group.index, tuple(group.channels[i] for i in chosen), worst, stop / size))
    return steps


def block_size(group: Group, limits: Limits) -> int:
    """Return how many channels go at a time such that the width stays a multiple of `round_to`.

    Example: one channel id that takes 4 output channels of a grouped convolution needs 2 for round_to 8.
    With largest_share 1/8, a group of 64 channels has blocks of 8 for any round_to of 8, 16, 32 and 64.
    """
    widths = [len(m.positions[0]) for m in group.members if m.role == "out" and m.positions]
    per_channel = min(widths, default=1)
    multiple = limits.round_to
    while multiple > 1 and multiple > limits.largest_share * per_channel * len(group.channels):
        multiple = multiple // 2 or 1
    return multiple // math.gcd(per_channel, multiple)


_Place = tuple[str, str | int]
"""A side of a layer (node name, "out" or "in"), a dimension of a tensor, or a value."""


class _Floors:
    """Counts what is left of every layer's channels, every tensor and every value, and says what may go."""

    def __init__(self, coupling: Coupling, floor: float) -> None:
        self._places: dict[int, dict[_Place, int]] = {}
        self._left: dict[_Place, int] = {}
        for layer in coupling.layers:
            self._add((layer.node, "out"), layer.output_channels)
            self._add((layer.node, "in"), layer.input_channels)
        self._least = {place: max(1, math.ceil(floor * n - 1e-9)) for place, n in self._left.items()}
        for name, info in coupling.tensors.items():
            for dim, channels in info.channels.items():
                self._add((name, dim), [int(channel) for channel in channels])
                self._least[name, dim] = min(1, len(channels))
        for together in set(emptiable_values(coupling).values()):
            place = (f"value {min(together)}", len(self._left))
            self._add(place, sorted(together))
            self._least[place] = 1

    def _add(self, place: _Place, channels: Sequence[int]) -> None:
        self._left[place] = len(channels)
        for channel in channels:
            places = self._places.setdefault(channel, {})
            places[place] = places.get(place, 0) + 1

    def take(self, channels: Sequence[int]) -> bool:
        """Take channels away if every layer keeps its floor; return whether they were."""
        loss: dict[_Place, int] = {}
        for channel in channels:
            for place, count in self._places.get(channel, {}).items():
                loss[place] = loss.get(place, 0) + count
        if any(self._left[place] - count < self._least[place] for place, count in loss.items()):
            return False
        for place, count in loss.items():
            self._left[place] -= count
        return True


def _ordered(steps: Mapping[int, list[_Step]], guard: _Floors, key: Callable[[_Step], float]) -> list[_Step]:
    """Return the steps that the floors allow, lowest key first; a group that hits a floor stops there."""
    flat = [(key(s), s.score, s.group, i, s) for group in steps.values() for i, s in enumerate(group)]
    order, stopped = [], set()
    for _, _, group, _, step in sorted(flat, key=lambda item: item[:4]):
        if group in stopped:
            continue
        if guard.take(step.channels):
            order.append(step)
        else:
            stopped.add(group)
    return order


def _cost_aware(steps: Mapping[int, list[_Step]], guard: _Floors, cost: CutCost) -> list[_Step]:
    """Return the steps that the floors allow, least score per saving first.

    Savings only shrink as the cut proceeds, so keys only grow: a key that is still the least when it is
    looked at again is the least of all (lazy greedy).
    """

    def key(step: _Step) -> float:
        saved = sum(cost.saving(channel) for channel in step.channels)
        return step.score * len(step.channels) / saved if saved > 0 else math.inf

    heap = [(key(group[0]), index, 0) for index, group in steps.items() if group]
    heapq.heapify(heap)
    order = []
    while heap:
        _, index, position = heapq.heappop(heap)
        step = steps[index][position]
        present = key(step)
        if heap and present > heap[0][0] * (1 + 1e-12):
            heapq.heappush(heap, (present, index, position))
            continue
        if not guard.take(step.channels):
            continue
        order.append(step)
        for channel in step.channels:
            cost.remove(channel)
        if position + 1 < len(steps[index]):
            heapq.heappush(heap, (key(steps[index][position + 1]), index, position + 1))
    return order


def _by_count(order: Sequence[_Step], ratio: float, total: int) -> frozenset[int]:
    """Return as many channels as the ratio of all that can be cut, never more."""
    wanted, removed = math.floor(ratio * total + 1e-9), list[int]()
    reachable = sum(len(step.channels) for step in order)
    if wanted > reachable:
        raise _OutOfReachError(
            f"a ratio of {ratio:g} removes {wanted} of {total} channels, but floors and rounding let only "
            f"{reachable} go",
            hint=f"the largest ratio in reach is {math.floor(1000 * reachable / total) / 1000:g}",
        )
    for step in order:
        if len(removed) + len(step.channels) > wanted:
            break
        removed.extend(step.channels)
    return frozenset(removed)


def _by_budget(coupling: Coupling, order: Sequence[_Step], target: Target) -> frozenset[int]:
    """Return the shortest beginning of the order that meets the budget."""

    def amount(count: int) -> float:
        return target.spent(coupling, _channels(order[:count]))

    whole = amount(0)
    budget = target.value if target.kind == "size_mb" else target.value * whole
    least = amount(len(order))
    if least > budget:
        raise _out_of_reach(target, whole, least)
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if amount(middle) <= budget:
            high = middle
        else:
            low = middle + 1
    kept = list(order[:low])
    _give_back(kept, lambda steps: target.spent(coupling, _channels(steps)) <= budget)
    return _channels(kept)


def _channels(steps: Sequence[_Step]) -> frozenset[int]:
    return frozenset(channel for step in steps for channel in step.channels)


def _give_back(kept: list[_Step], fits: Callable[[Sequence[_Step]], bool]) -> None:
    """Put back, last first, what the budget does not need: the last step may have overshot it by much."""
    needed: set[int] = set()  # groups whose last step has to go, so that earlier ones have to as well
    tries = 0
    for position in range(len(kept) - 1, -1, -1):
        step = kept[position]
        if step.group in needed or tries == MAX_GIVE_BACK:
            continue
        tries += 1
        without = kept[:position] + kept[position + 1 :]
        if fits(without):
            kept[:] = without
        else:
            needed.add(step.group)


class _OutOfReachError(PassError):
    """Not enough channels can go."""


def _out_of_reach(target: Target, whole: float, least: float) -> PassError:
    if target.kind == "size_mb":
        message = f"size_mb {target.value:g} cannot be met: the least in reach is {least:.3f} MB"
        wanted = math.ceil(1000 * least) / 1000
        hint = f"the uncut network is about {whole:.3f} MB; ask for {wanted:g} or more"
    else:
        share = least / whole
        unit = "MACs" if target.kind == "macs_left" else "params"
        message = (
            f"{target.kind} {target.value:g} cannot be met: the least in reach is {share:.4f} "
            f"({least:,.0f} of {whole:,.0f} {unit})"
        )
        left = math.ceil(1000 * share) / 1000
        hint = f"ask for {target.kind} = {left:g} or more (--prune-{unit.lower()} {1 - left:.3g} or less)"
    return _OutOfReachError(message, hint=f"{hint}, or lower floor and round_to")
