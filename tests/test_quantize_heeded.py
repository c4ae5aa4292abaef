"""Values are calibrated on the part of their range that their readers tell apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgecnn.data import open_dataset
from edgecnn.load import LoadOptions, load_model
from edgecnn.lower.activations import DecomposeActivations
from edgecnn.model import Model
from edgecnn.pipeline import PassContext, run_passes
from edgecnn.quantize.heeded import EVERYTHING, heeded_range, heeded_ranges
from edgecnn.quantize.static import QuantizeStatic
from edgecnn.runner.preprocess import Preprocess

INF = math.inf


class Function(nn.Module):
    """Apply a function."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def written_out(net: nn.Module) -> Model:
    loaded = load_model(net.eval(), LoadOptions(input_shape=(3, 4, 4)))
    return DecomposeActivations().run(loaded, PassContext())


CASES = {
    "hard_sigmoid": (functional.hardsigmoid, (-3.0, 3.0)),
    "hard_swish": (functional.hardswish, (-3.0, INF)),
    "by hand": (lambda x: (2.0 * x + 1.0).clamp(0.0, 4.0), (-0.5, 1.5)),
    "two readers": (lambda x: x.clamp(-1.0, 2.0) + functional.relu6(x), (-1.0, 6.0)),
    "relu": (functional.relu, (0.0, INF)),
    "one side": (lambda x: x.clamp(max=2.5), (-INF, 2.5)),
    "read as it is": (lambda x: x + functional.hardsigmoid(x), EVERYTHING),
    "another gate": (lambda x: x * functional.relu6(x.flip(3) + 3.0), EVERYTHING),
    "falls": (lambda x: (3.0 - x).clamp(0.0, 6.0), EVERYTHING),
    "scaled sum": (lambda x: torch.add(x, 3.0, alpha=2).clamp(0.0, 6.0), EVERYTHING),
}


@pytest.mark.parametrize("name", CASES)
def test_the_heeded_range_and_nothing_else_counts(name: str) -> None:
    function, expected = CASES[name]
    model = written_out(Function(function))
    x = next(node for node in model.graph.graph.nodes if node.op == "placeholder")
    assert heeded_range(x) == expected
    assert (x in heeded_ranges([x])) == (expected != EVERYTHING)
    values = 20.0 * torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.graph(values.clamp(*expected)), model.graph(values))
    if math.isfinite(expected[0]):  # a narrower range would count
        narrower = values.clamp(expected[0] + 0.1)
        assert not torch.equal(model.graph(narrower), model.graph(values))


def test_the_output_of_a_network_is_heeded_whole() -> None:
    model = written_out(nn.Sequential(nn.Conv2d(3, 4, 1)))
    conv = next(node for node in model.graph.graph.nodes if "conv2d" in str(node.target))
    assert heeded_range(conv) == EVERYTHING


@pytest.mark.parametrize("observer", ["min_max", "mse"])
def test_levels_are_not_spent_where_a_gate_saturates(observer: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 1)
    with torch.no_grad():
        conv.weight.mul_(20.0)
    net = nn.Sequential(conv, nn.Hardsigmoid(), nn.Conv2d(8, 4, 1))
    images = np.random.default_rng(0).normal(size=(64, 3, 4, 4)).astype(np.float32)
    with torch.no_grad():
        gate_input = conv(torch.from_numpy(images))
        exact = net(torch.from_numpy(images))
    assert gate_input.abs().max() > 15.0
    dataset = open_dataset(images, Preprocess((4, 4)))
    quantize = QuantizeStatic(observer=observer, bias_correction=False)
    model = load_model(net.eval(), LoadOptions(input_shape=(3, 4, 4)))
    passes = [DecomposeActivations(), quantize]
    quantized = run_passes(model, passes, PassContext(dataset, range(64)), lambda _: {})
    node = next(n for n in quantized.graph.graph.nodes if n.target is torch.ops.aten.conv2d.default)
    scale = float(next(iter(node.users)).args[1])  # type: ignore[arg-type]
    assert scale == pytest.approx(6.0 / 255.0, rel=0.02)
    noise = quantized.graph(torch.from_numpy(images)) - exact
    assert float(exact.square().sum() / noise.square().sum()) > 10.0**3.5  # 35 dB
