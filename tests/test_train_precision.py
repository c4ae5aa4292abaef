"""Which networks train in bfloat16, and how that is told from their graph."""

from __future__ import annotations

import nets
import pytest
import torch
from torch import nn

from edgecnn.train.precision import choose_precision, depthwise_share

CPU = torch.device("cpu")


def separable(channels: int) -> nn.Sequential:
    """Depthwise 3x3, then pointwise: 9 * channels and channels ** 2 multiply-accumulates a position."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 1),
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        nn.Conv2d(channels, channels, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 4, bias=False),
    )


def test_the_share_of_depthwise_convolutions() -> None:
    net = nets.as_model(separable(16).eval(), (3, 8, 8))
    positions = 8 * 8
    total = positions * (3 * 16 + 9 * 16 + 16 * 16) + 16 * 4
    assert depthwise_share(net) == pytest.approx(positions * 9 * 16 / total)


def test_grouped_convolutions_are_not_depthwise() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2)).eval()
    assert depthwise_share(nets.as_model(net, (3, 8, 8))) == 0.0


@pytest.mark.parametrize("computes", [True, False])
def test_a_cpu_trains_depthwise_networks_in_float32(monkeypatch: pytest.MonkeyPatch, computes: bool) -> None:
    monkeypatch.setattr("edgecnn.train.precision._computes_bfloat16", lambda device: computes)
    deep = nets.as_model(separable(16).eval(), (3, 8, 8))
    plain = nets.as_model(nn.Conv2d(3, 8, 3).eval(), (3, 8, 8))
    assert choose_precision("auto", CPU, deep) is torch.float32
    assert choose_precision("auto", CPU, plain) is (torch.bfloat16 if computes else torch.float32)
    assert choose_precision("bfloat16", CPU, deep) is torch.bfloat16
