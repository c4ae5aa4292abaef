"""Rewrites that keep what a network computes: composite activations and averages."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecnn.errors import PassError
from edgecnn.export.files import FileOptions, write_model
from edgecnn.export.parity import sqnr_db
from edgecnn.graph.build import build_program, float_islands
from edgecnn.graph.nodes import aten
from edgecnn.judgement import stage_file
from edgecnn.lower.activations import DecomposeActivations
from edgecnn.lower.averages import AveragesToConvolutions
from edgecnn.model import Model
from edgecnn.proof import Candidate, run_outputs
from edgecnn.quantize.reference import run_program


def operators(model: Model) -> list[str]:
    return [str(n.target).split(".")[1] for n in model.graph.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.SiLU(), ["sigmoid", "mul"]),
        (nn.Hardsigmoid(), ["add", "clamp", "mul"]),
        (nn.Hardswish(), ["add", "clamp", "mul", "mul"]),
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


@pytest.mark.parametrize("step", [DecomposeActivations(), AveragesToConvolutions()])
def test_a_rewrite_that_changes_outputs_is_refused(step: Any) -> None:
    """One layer whose bias is a hundredth larger is told from rounding."""
    model = nets.folded("hard_swish")
    wrong = copy.deepcopy(nets.module("hard_swish"))
    with torch.no_grad():
        next(layer for layer in wrong.modules() if isinstance(layer, nn.Linear)).weight.mul_(1.01)
    other = nets.prepare(nets.as_model(wrong))
    step.ensures(model, model)
    with pytest.raises(PassError, match=rf"{step.name} changed an output by .* where it reaches"):
        step.ensures(model, other)


def test_rounding_that_a_network_amplifies_is_no_change() -> None:
    """sin(10,000 x) turns a relative 2e-6 of its input into two parts in a hundred of its range."""

    class Amplified(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(1e4 * self.factor * x)

    model, rounded = nets.as_model(Amplified(1.0)), nets.as_model(Amplified(1.0 + 2e-6))
    DecomposeActivations().ensures(model, rounded)
    with pytest.raises(PassError, match="changed an output"):
        DecomposeActivations().ensures(nets.as_model(nn.ReLU()), nets.as_model(nn.Softplus()))


class Sloped(nn.Module):
    """A PReLU between two convolutions, and one on the features."""

    def __init__(self, slopes: Tensor) -> None:
        super().__init__()
        self.stem, self.last, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)
        self.act, self.late = nn.PReLU(len(slopes)), nn.PReLU(len(slopes))
        with torch.no_grad():
            self.act.weight.copy_(slopes)
            self.late.weight.copy_(slopes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.act(self.stem(x))).mean((2, 3))
        features: Tensor = self.late(x)
        return self.head(features)


@pytest.mark.parametrize(
    ("slopes", "expected"),
    [
        (torch.tensor([0.25]), ["leaky_relu"]),
        (torch.linspace(-0.5, 1.5, 8), ["relu", "clamp", "mul", "add"]),
        (torch.tensor([-0.5]), ["relu", "clamp", "mul", "add"]),
    ],
)
def test_prelu_becomes_integer_arithmetic(slopes: Tensor, expected: list[str]) -> None:
    torch.manual_seed(0)
    net = Sloped(slopes).eval()
    model = nets.as_model(net)
    after = DecomposeActivations().run(model, nets.context())
    DecomposeActivations().ensures(model, after)
    found = [name for name in operators(after) if name not in ("conv2d", "mean", "linear")]
    assert sorted(found) == sorted(2 * expected)
    x = nets.held_out(4)
    np.testing.assert_allclose(nets.outputs_of(after.graph, x)[0], nets.outputs_of(net, x)[0], atol=2e-6)


def test_a_prelu_leaves_nothing_in_float(tmp_path: Path) -> None:
    """Both files compute the reference's integers, and no operator is in float."""
    torch.manual_seed(0)
    net = Sloped(torch.linspace(-0.5, 1.5, 8)).eval()
    model = nets.STEP.run(nets.prepare(nets.as_model(net)), nets.context())
    program = build_program(model)
    assert float_islands(program) == []
    x = nets.held_out(8)
    expected = run_program(program, {program.inputs[0]: x})
    for file_format in ("onnx", "tflite"):
        file = write_model(program, file_format, model.spec, FileOptions())
        candidate = Candidate(file_format, stage_file(file, tmp_path / file_format, model, "test"))
        found = run_outputs([candidate], x)[file_format]
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)
    assert (sqnr_db(nets.outputs_of(net, x)[0], next(iter(expected.values()))) or 0.0) > 25.0


def test_layer_path_survives() -> None:
    after = DecomposeActivations().run(nets.model("hard_swish"), nets.context())
    node = next(n for n in after.graph.graph.nodes if "clamp" in n.name)
    assert "body" in str(node.meta["nn_module_stack"])


class Excited(nn.Module):
    """Convolution, hard_swish, squeeze-and-excitation with hard_sigmoid, pool, convolution, linear."""

    def __init__(self, own_factor: float = 1.0, tail: nets.Forward | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.last = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 5)
        self.own_factor = own_factor
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        x = F.max_pool2d(x * gate, 2) * self.own_factor
        if self.tail is not None:
            return self.tail(self, x)
        return self.head(F.hardswish(self.last(x)).mean((2, 3)))


def numbers_multiplied(model: Model) -> list[float]:
    return [
        n.args[1] for n in model.graph.graph.nodes if ".mul" in str(n.target) and isinstance(n.args[1], float)
    ]


def lowered(net: nn.Module) -> Model:
    """Return the decomposed network, checked against the module."""
    torch.manual_seed(0)
    net = net.eval()
    after = DecomposeActivations().run(nets.as_model(net), nets.context())
    x = nets.held_out(4)
    np.testing.assert_allclose(
        nets.outputs_of(after.graph, x)[0], nets.outputs_of(net, x)[0], rtol=1e-4, atol=1e-5
    )
    return after


@pytest.mark.parametrize("own_factor", [1.0, 0.5, -3.0])
def test_factors_go_into_the_layers_that_read_them(own_factor: float) -> None:
    after = lowered(Excited(own_factor))
    assert numbers_multiplied(after) == []
    assert operators(after).count("mul") == 3  # two hard_swish, one gate


def test_factor_of_a_square_is_squared() -> None:
    after = lowered(Excited(0.5, lambda net, x: net.last(x * x)))
    assert numbers_multiplied(after) == []


def test_factors_stop_at_additions_and_outputs() -> None:
    after = lowered(Excited(1.0, lambda net, x: x + net.stem(x[:, :3])))
    assert numbers_multiplied(after) == [pytest.approx(1 / 36)]
    assert numbers_multiplied(lowered(nets.Net({}, lambda net, x: F.relu(-2.0 * x)))) == [-2.0]


class GatedResidual(Excited):
    """relu features times their gate, added to the features: no layer reads the product."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return x * gate + x


def test_factor_of_a_gate_stays_there_if_the_gated_image_is_added() -> None:
    after = lowered(GatedResidual())
    (product,) = [n for n in after.graph.graph.nodes if n.target is aten.mul.Tensor and n.args[1] == 1 / 6]
    assert product.args[0].target is aten.clamp.default
    (reader,) = product.users
    assert reader.target is aten.mul.Tensor


def test_a_shared_weight_is_scaled_for_its_reader_alone() -> None:
    after = lowered(Excited(0.25, lambda net, x: net.last(x) + net.last(F.relu(x + 1.0))))
    weights = {n.args[1].target for n in after.graph.graph.nodes if "aten.conv2d" in str(n.target)}
    assert len(weights) == 5


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
