"""Rewrites that keep what a network computes: composite activations and averages."""

from __future__ import annotations

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecnn.errors import PassError
from edgecnn.lower.activations import DecomposeActivations
from edgecnn.lower.averages import AveragesToConvolutions
from edgecnn.model import Model


def operators(model: Model) -> list[str]:
    return [str(n.target).split(".")[1] for n in model.graph.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.SiLU(), ["sigmoid", "mul"]),
        (nn.Hardsigmoid(), ["mul", "add", "clamp"]),
        (nn.Hardswish(), ["mul", "add", "clamp", "mul"]),
    ],
    ids=["silu", "hard_sigmoid", "hard_swish"],
)
def test_composite_activations(layer: nn.Module, expected: list[str]) -> None:
    model = nets.as_model(layer)
    step = DecomposeActivations()
    step.requires(model)
    with pytest.raises(PassError, match=r"1 composite activations are left"):
        step.ensures(model, model)
    after = step.run(model, nets.context())
    step.ensures(model, after)
    assert operators(after) == expected
    x = torch.linspace(-8.0, 8.0, 432).reshape(1, 3, 12, 12).numpy()
    np.testing.assert_allclose(nets.outputs_of(after.graph, x)[0], nets.outputs_of(layer, x)[0], atol=2e-6)


def test_layer_path_survives() -> None:
    after = DecomposeActivations().run(nets.model("hard_swish"), nets.context())
    node = next(n for n in after.graph.graph.nodes if "clamp" in n.name)
    assert "body" in str(node.meta["nn_module_stack"])


def averages(function: nets.Forward) -> tuple[Model, float]:
    net = nets.Net({}, function).eval()
    model = nets.as_model(net)
    after = AveragesToConvolutions().run(model, nets.context())
    x = nets.held_out(2)
    found, expected = nets.outputs_of(after.graph, x)[0], nets.outputs_of(net, x)[0]
    assert found.shape == expected.shape
    return after, float(np.abs(found - expected).max())


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: F.avg_pool2d(x, 2),
        lambda net, x: F.avg_pool2d(x, 3, 2, 1),
        lambda net, x: F.adaptive_avg_pool2d(x, 4),
        lambda net, x: x.mean(1, keepdim=True),
        lambda net, x: F.avg_pool2d(F.avg_pool2d(x, 2), (3, 2)),
    ],
    ids=["pool", "counted_padding", "adaptive", "channels", "pool_of_pool"],
)
def test_averages_become_convolutions(function: nets.Forward) -> None:
    after, difference = averages(function)
    assert set(operators(after)) == {"conv2d"}
    assert difference < 1e-6


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        lambda net, x: F.avg_pool2d(x, 5, 2, ceil_mode=True),
        lambda net, x: F.adaptive_avg_pool2d(x, 1),
        lambda net, x: x.mean((2, 3)),
        lambda net, x: x.mean(1),
    ],
    ids=["padding_left_out", "ceil", "global", "image", "dimension_dropped"],
)
def test_other_averages_stay(function: nets.Forward) -> None:
    after, difference = averages(function)
    assert "conv2d" not in operators(after)
    assert difference == 0.0


def test_global_pool_after_a_pool() -> None:
    """The second asks for the shape of the convolution that has just replaced the first."""
    after, difference = averages(lambda net, x: F.adaptive_avg_pool2d(F.avg_pool2d(x, 2), 1))
    assert operators(after) == ["conv2d", "adaptive_avg_pool2d"]
    assert difference < 1e-6


def test_module_is_not_changed() -> None:
    def forward(net: nets.Net, x: Tensor) -> Tensor:
        return F.hardswish(F.avg_pool2d(x, 2))

    model = nets.as_model(nets.Net({}, forward))
    code = model.graph.code
    DecomposeActivations().run(AveragesToConvolutions().run(model, nets.context()), nets.context())
    assert model.graph.code == code
