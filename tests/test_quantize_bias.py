"""Bias correction: from batch-norm statistics by hand, and layer by layer in order."""

from __future__ import annotations

import math

import nets
import numpy as np
import pytest
import torch
from torch import nn

from edgecnn.errors import RecipeError
from edgecnn.graph.build import build_program
from edgecnn.pipeline import PassContext
from edgecnn.quantize.bias import Gaussian, batch_norm_means, channel_means, clamped
from edgecnn.quantize.lockstep import layer_pairs
from edgecnn.quantize.static import QuantizeStatic


def normal(mean: float, variance: float) -> Gaussian:
    return Gaussian(torch.tensor([mean]).double(), torch.tensor([variance]).double())


def means_of(net: nn.Module) -> list[list[float]]:
    found = batch_norm_means(nets.prepare(nets.as_model(net.eval())))
    return [np.round(mean, 4).tolist() for mean in found.values()]


def batch_norm(channels: int, beta: float, gamma: float) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        layer.weight.fill_(gamma)
        layer.bias.fill_(beta)
    return layer


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, None), (0.0, 6.0), (-1.0, 1.0), (None, 0.5), (None, None), (2.0, 2.5)]
)
@pytest.mark.parametrize("mean", [-2.0, 0.3, 4.0])
def test_moments_of_a_clamped_normal_are_those_of_samples(
    low: float | None, high: float | None, mean: float
) -> None:
    samples = np.clip(np.random.default_rng(0).normal(mean, 1.5, 400_000), low, high)
    found = clamped(normal(mean, 2.25), low, high)
    assert found.mean.item() == pytest.approx(samples.mean(), abs=0.01)
    assert found.variance.item() == pytest.approx(samples.var(), abs=0.02)


def test_no_spread_is_a_number() -> None:
    found = clamped(normal(3.0, 0.0), 0.0, 2.0)
    assert (found.mean.item(), found.variance.item()) == (2.0, 0.0)


def test_the_mean_input_behind_batch_norm_and_relu() -> None:
    """N(0, 2^2) behind relu has the mean 2 / sqrt(2 pi); the first layer's input is not known."""
    net = nn.Sequential(nn.Conv2d(3, 2, 3), batch_norm(2, 0.0, -2.0), nn.ReLU(), nn.Conv2d(2, 1, 1))
    assert means_of(net) == [[round(2.0 / math.sqrt(2.0 * math.pi), 4)] * 2]


def test_sums_add_and_padded_channels_are_zero() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (
                nn.Sequential(nn.Conv2d(3, 2, 1), batch_norm(2, beta, 0.5)) for beta in (1.0, 3.0)
            )
            self.c = nn.Conv2d(4, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x) + self.b(x)
            return self.c(nn.functional.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))

    assert means_of(Net()) == [[0.0, 4.0, 4.0, 0.0]]


def test_through_a_layer_without_batch_norm() -> None:
    """Means 1 and 1 times (1, 2) plus 0.5 is 3.5, with the variance (1 + 4) / 4."""
    net = nn.Sequential(
        nn.Conv2d(3, 2, 1), batch_norm(2, 1.0, 0.5), nn.Conv2d(2, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 1)
    )
    with torch.no_grad():
        net[2].weight.copy_(torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1))
        net[2].bias.fill_(0.5)
    expected = clamped(normal(3.5, 1.25), 0.0, None).mean.item()
    assert means_of(net) == [[1.0, 1.0], [round(expected, 4)]]


def test_an_unknown_operator_ends_the_walk() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 1), batch_norm(2, 1.0, 0.5), nn.Sigmoid(), nn.Conv2d(2, 1, 1))
    assert means_of(net) == []


@pytest.mark.parametrize("name", nets.NETS)
def test_what_is_known_fits_the_layers(name: str) -> None:
    model = nets.folded(name)
    for node, mean in batch_norm_means(model).items():
        groups = int(node.args[6]) if len(node.args) > 6 else 1
        weight = dict([*model.graph.named_parameters(), *model.graph.named_buffers()])[node.args[1].target]
        assert mean.shape == (weight.shape[1] * groups,)
        assert np.isfinite(mean).all()


def test_batch_norms_know_what_images_would_tell() -> None:
    """The residual net's statistics are of such images: the analytic means are near the measured ones."""
    model = nets.folded("residual")
    found = batch_norm_means(model)
    assert len(found) == 7  # all but the first
    step = QuantizeStatic(weight_bits=7, bias_method="batch_norm")
    bare = nets.as_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval())
    assert "no layer has one ahead, the images told all means" in step.run(bare, nets.context()).warnings[-1]
    with_statistics = step.run(model, nets.context())
    with_images = QuantizeStatic(weight_bits=7).run(model, nets.context())
    x = nets.held_out(64)
    first, second = (nets.outputs_of(m.graph, x)[0] for m in (with_statistics, with_images))
    assert not np.array_equal(first, second)
    assert np.abs(first - second).max() < 0.1 * np.abs(second).max()


def test_in_order_every_layer_keeps_its_mean() -> None:
    """On the calibration images the means of the last layer's outputs are those of the float network."""
    x = nets.images(64, 1)
    expected = nets.outputs_of(nets.module("depthwise"), x)[0].mean(axis=0)

    def error(method: str) -> float:
        step = QuantizeStatic(observer="min_max", weight_bits=7, bias_method=method)
        after = step.run(nets.folded("depthwise"), nets.context())
        build_program(after)
        return float(np.abs(nets.outputs_of(after.graph, x)[0].mean(axis=0) - expected).max())

    in_order = error("in_order")
    assert in_order < 0.5 * error("mean_input")


def test_in_order_leaves_layers_without_bias_and_weights_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, 2, bias=False)).eval()
    model = nets.as_model(net)
    context = PassContext(nets.Images(nets.images(16)), tuple(range(16)))
    plain = QuantizeStatic().run(model, context)
    after = QuantizeStatic(bias_method="in_order").run(model, context)
    for old, new in zip(
        layer_pairs(model.graph, plain.graph), layer_pairs(model.graph, after.graph), strict=True
    ):
        names = (old.node.args[1].args[0].target, new.node.args[1].args[0].target)
        assert torch.equal(plain.graph.get_buffer(names[0]), after.graph.get_buffer(names[1]))
    assert after.graph.graph.nodes


def test_means_weigh_every_image_alike() -> None:
    batches = [torch.full((1, 2, 1, 1), 4.0), torch.zeros(3, 2, 1, 1)]
    assert channel_means(batches, 1).tolist() == [1.0, 1.0]
    assert channel_means([torch.tensor([[1.0, 2.0], [3.0, 4.0]])], -1).tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            QuantizeStatic(bias_method="dfq"),
            r"bias_method is 'dfq', expected one of mean_input, batch_norm, in_",
        ),
        (QuantizeStatic(rounding="up"), r"rounding is 'up', expected one of nearest, adaround, brecq"),
        (QuantizeStatic(iterations=0), r"iterations is 0, expected at least 1"),
    ],
)
def test_parameters_out_of_range(step: QuantizeStatic, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        step.check()
