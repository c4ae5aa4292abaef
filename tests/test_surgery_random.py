"""Random small networks of the structures that tie channels: the cut network computes what the zeroed one
does.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from channel_nets import conv, model
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_surgery import choose, largest_difference
from torch import Tensor, nn

from edgecnn.graph.channels import couple_channels, macs_and_params
from edgecnn.prune.surgery import EXACT, cut_channels, inexact_reasons, verify_cut

OPS = (
    "conv",
    "add",
    "concat",
    "split",
    "shuffle",
    "depthwise",
    "grouped",
    "gate",
    "pad",
    "slice",
    "norm",
    "multiply",
)


@dataclass(frozen=True)
class Step:
    """One operator: what it does, which earlier values it reads, a width, and a detail."""

    op: str
    first: int
    second: int
    width: int


class Random(nn.Module):
    """A list of values, each made by a step from earlier ones; the last three are read by the head."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.stem = conv(3, 6, 3)
        self.steps = steps
        self.layers = nn.ModuleList()
        widths = [6]
        for step in steps:
            a, b = widths[step.first % len(widths)], widths[step.second % len(widths)]
            layer, width = self._layer(step, a, b)
            self.layers.append(layer)
            widths.append(width)
        self.head = nn.Linear(sum(widths[-3:]), 4)

    @staticmethod
    def _layer(step: Step, a: int, b: int) -> tuple[nn.Module, int]:
        even = a - a % 2
        made: dict[str, tuple[nn.Module, int]] = {
            "conv": (conv(a, step.width, 3), step.width),
            "add": (nn.Identity() if a == b else conv(b, a), a),
            "concat": (nn.Identity(), a + b),
            "split": (conv(a - a // 2, step.width), step.width + a // 2),
            "shuffle": (nn.Identity(), even),
            "depthwise": (conv(a, a, 3, groups=a), a),
            "grouped": (conv(even, 2 * step.width, 3, groups=2), 2 * step.width),
            "gate": (conv(b, a), a),
            "pad": (nn.Identity(), a + 3),
            "slice": (nn.Identity(), max(a - 2, 1)),
            "norm": (nn.BatchNorm2d(a), a),
            "multiply": (conv(a, 2 * a, groups=a), 2 * a),
        }
        return made[step.op]

    @staticmethod
    def _apply(step: Step, layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        if step.op == "add":
            return F.relu(a + layer(b))
        if step.op == "concat":
            return torch.cat([a, b], 1)
        if step.op == "split":
            one, two = torch.split(a, [a.shape[1] // 2, a.shape[1] - a.shape[1] // 2], 1)
            return torch.cat([F.relu(layer(two)), one], 1)
        if step.op == "shuffle":
            n, c, h, w = a.shape
            return a[:, : c - c % 2].reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c - c % 2, h, w)
        if step.op == "grouped":
            return F.relu(layer(a[:, : a.shape[1] - a.shape[1] % 2]))
        if step.op == "gate":
            return a * torch.sigmoid(layer(b.mean((2, 3), keepdim=True)))
        if step.op == "pad":
            return F.pad(a, (0, 0, 0, 0, 1, 2))
        if step.op == "slice":
            return a[:, 1:-1] if a.shape[1] > 2 else a[:, :1]
        return F.relu(layer(a))

    def forward(self, x: Tensor) -> Tensor:
        values = [F.relu(self.stem(x))]
        for step, layer in zip(self.steps, self.layers, strict=True):
            a, b = values[step.first % len(values)], values[step.second % len(values)]
            values.append(self._apply(step, layer, a, b))
        return self.head(torch.cat(values[-3:], 1).mean((2, 3)))


STEPS = st.lists(
    st.builds(
        Step, st.sampled_from(OPS), st.integers(0, 9), st.integers(0, 9), st.sampled_from([2, 3, 4, 6])
    ),
    min_size=2,
    max_size=9,
)
QUIET = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.explicit, Phase.generate),
}


def check(steps: list[Step], ratio: float, seed: int) -> None:
    torch.manual_seed(seed)
    net = model(Random(steps))
    coupling = couple_channels(net)
    removed = choose(coupling, ratio, seed)
    cut = cut_channels(net, coupling, removed)
    assert not inexact_reasons(coupling, removed)
    assert verify_cut(net, coupling, removed, cut) <= EXACT
    assert largest_difference(net, coupling, removed, cut) <= 1e-4
    assert macs_and_params(couple_channels(cut), ()) == macs_and_params(coupling, removed)


@settings(max_examples=8, derandomize=True, **QUIET)
@given(STEPS, st.sampled_from([0.3, 0.6]), st.integers(0, 3))
def test_random_networks(steps: list[Step], ratio: float, seed: int) -> None:
    check(steps, ratio, seed)


@pytest.mark.slow
@settings(max_examples=150, derandomize=True, **QUIET)
@given(STEPS, st.sampled_from([0.2, 0.5, 0.9]), st.integers(0, 9))
def test_many_random_networks(steps: list[Step], ratio: float, seed: int) -> None:
    check(steps, ratio, seed)
