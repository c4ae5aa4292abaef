"""Batch norms folded away: the same outputs, the input model untouched."""

from __future__ import annotations

from dataclasses import replace

import nets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgecnn.errors import PassError
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.graph.nodes import aten, copy_graph
from edgecnn.model import Model


def fold(net: nn.Module) -> tuple[Model, list[str], float]:
    """Return the folded model, its operators, and its largest difference from the module."""
    torch.manual_seed(0)
    model = nets.as_model(nets.settle(net))
    step = FoldBatchNorm()
    step.requires(model)
    folded = step.run(model, nets.context())
    step.ensures(model, folded)
    x = nets.held_out(4)
    pairs = zip(nets.outputs_of(net, x), nets.outputs_of(folded.graph, x), strict=True)
    operators = [str(n.target).split(".")[1] for n in folded.graph.graph.nodes if n.op == "call_function"]
    return folded, operators, max(float(np.abs(a - b).max()) for a, b in pairs)


def test_by_hand() -> None:
    """g = 2 / sqrt(3 + 1) = 1: W' = W g, b' = (b - mean) g + beta = (5 - 1) + 10."""
    net = nn.Sequential(nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1, eps=1.0)).eval()
    with torch.no_grad():
        net[0].weight.fill_(0.5)
        net[0].bias.fill_(5.0)
        net[1].weight.fill_(2.0)
        net[1].bias.fill_(10.0)
        net[1].running_mean.fill_(1.0)
        net[1].running_var.fill_(3.0)
    graph = FoldBatchNorm().run(nets.as_model(net), nets.context()).graph
    values = sorted(value.flatten().tolist() for value in graph.state_dict().values())
    assert values == [[0.5, 0.5, 0.5], [14.0]]


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), ["conv2d"]),
        (nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), ["conv2d"]),
        (nn.Sequential(nn.Conv2d(3, 6, 3, padding="same"), nn.BatchNorm2d(6)), ["conv2d"]),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.BatchNorm2d(4)), ["conv_transpose2d"]),
        (
            nn.Sequential(nn.ConvTranspose2d(3, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6)),
            ["conv_transpose2d"],
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(432, 5), nn.BatchNorm1d(5)), ["flatten", "linear"]),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), ["conv2d", "relu"]),
        (nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 2, 1)), ["conv2d", "conv2d"]),
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(432)), ["flatten", "mul", "add"]),
        (nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(3)), ["flatten", "mul", "add"]),
        (
            nn.Sequential(nn.Flatten(2), nn.Linear(144, 3), nn.BatchNorm1d(3)),
            ["flatten", "linear", "mul", "add"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_same_outputs(net: nn.Module, expected: list[str]) -> None:
    _, operators, difference = fold(net)
    assert operators == expected
    assert difference < 1e-5


def test_a_convolution_with_another_reader_keeps_its_values() -> None:
    def forward(net: nets.Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        return net.bn(y) + y

    _, operators, difference = fold(nets.Net({"conv": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4)}, forward))
    assert operators == ["conv2d", "conv2d", "add"]
    assert difference < 1e-5


def test_one_convolution_called_twice_with_two_batch_norms() -> None:
    def forward(net: nets.Net, x: Tensor) -> Tensor:
        return net.a(net.conv(x)) + net.b(net.conv(x * 2.0))

    layers = {"conv": nn.Conv2d(3, 4, 3, bias=False), "a": nn.BatchNorm2d(4), "b": nn.BatchNorm2d(4)}
    _, operators, difference = fold(nets.Net(layers, forward))
    assert operators.count("conv2d") == 2
    assert difference < 1e-5


@pytest.mark.parametrize("name", ["residual", "dense", "transposed", "mlp"])
def test_input_is_left_as_it_was_and_the_statistics_are_gone(name: str) -> None:
    model = nets.model(name)
    code, state = model.graph.code, {k: v.clone() for k, v in model.graph.state_dict().items()}
    folded = FoldBatchNorm().run(model, nets.context())
    assert model.graph.code == code
    assert all(torch.equal(v, state[k]) for k, v in model.graph.state_dict().items())
    assert not [key for key in folded.graph.state_dict() if "running" in key]


def test_training_mode_is_refused() -> None:
    model = nets.model("residual")
    graph = copy_graph(model.graph)
    node = next(n for n in graph.graph.nodes if n.target is aten.batch_norm.default)
    node.args = (*node.args[:5], True, *node.args[6:])
    with pytest.raises(
        PassError, match=r"stem\.1 \(aten\.batch_norm\.default\) is in training mode.*\.eval\(\)"
    ):
        FoldBatchNorm().requires(replace(model, graph=graph))


def test_batch_statistics_are_refused() -> None:
    graph = copy_graph(nets.model("residual").graph)
    node = next(n for n in graph.graph.nodes if n.target is aten.batch_norm.default)
    node.args = (*node.args[:3], None, None, *node.args[5:])
    with pytest.raises(PassError, match=r"stem\.1.*no running statistics.*track_running_stats=True"):
        FoldBatchNorm().requires(replace(nets.model("residual"), graph=graph))


def test_a_batch_norm_left_is_noticed() -> None:
    model = nets.model("residual")
    with pytest.raises(PassError, match=r"7 batch_norm nodes are left, first stem\.1"):
        FoldBatchNorm().ensures(model, model)
