"""What a cut can win back without labels or training."""

from __future__ import annotations

import nets
import numpy as np
import prune_nets
import pytest
import torch
from torch import nn

from edgecnn.export.parity import sqnr_db
from edgecnn.graph.channels import couple_channels
from edgecnn.prune.allocate import Target, choose_channels
from edgecnn.prune.compensate import Moments, compensate, gather_moments, reestimate, regress
from edgecnn.prune.groups import cuttable
from edgecnn.prune.importance import Question, score_channels
from edgecnn.prune.samples import Samples
from edgecnn.prune.surgery import cut_channels


def calibration(num_images: int = 64) -> Samples:
    context = nets.context(num_images)
    return Samples(context.calibration, context.calibration_indices)


def test_moments_are_those_of_what_is_read() -> None:
    """Channels 2 x and -x of the pixels 1 and 3: means 4 and -2, covariance 1 of x times their factors."""
    model = prune_nets.two_layers([2.0, -1.0], [[1.0, 1.0]] * 2)
    coupling = couple_channels(model)
    found = gather_moments(model, coupling, prune_nets.samples([1.0, 3.0]), second=True)
    moments = found[coupling.layers[1].node]
    np.testing.assert_allclose(moments.mean, [4.0, -2.0])
    np.testing.assert_allclose(moments.covariance, [[4.0, -2.0], [-2.0, 1.0]], rtol=1e-6)
    first_only = gather_moments(model, coupling, prune_nets.samples([1.0, 3.0]), second=False)
    assert first_only[coupling.layers[1].node].covariance is None


def test_regression_is_the_least_squares_solution() -> None:
    covariance = torch.tensor([[4.0, -2.0], [-2.0, 1.0]], dtype=torch.float64)
    many = Moments(torch.zeros(2), covariance, 1_000_000)
    assert regress(many, [0], [1]).item() == pytest.approx(-0.5 / 1.001, rel=1e-4)
    assert regress(many, [1], [0]).item() == pytest.approx(-2.0 / 1.001, rel=1e-4)
    few = Moments(torch.zeros(2), covariance, 4)  # the guess is drawn to the mean
    assert regress(few, [0], [1]).item() == pytest.approx(-0.5 / 1.251, rel=1e-4)


def test_a_channel_that_follows_from_others_goes_without_loss() -> None:
    """Channel 1 is -1/2 of channel 0, so its readers can be told to read channel 0."""
    model = prune_nets.two_layers([2.0, -1.0], [[1.0, 3.0], [0.0, 1.0]])
    coupling = couple_channels(model)
    (group,) = cuttable(coupling)
    images = prune_nets.samples([1.0, 3.0, -2.0] * 400)
    moments = gather_moments(model, coupling, images, second=True)
    removed = [group.channels[1]]
    cut = cut_channels(compensate(model, coupling, removed, moments), coupling, removed)
    x = images.dataset.inputs(images.indices)
    expected, found = (nets.outputs_of(m.graph, x)[0] for m in (model, cut))
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=1e-2)
    bare = nets.outputs_of(cut_channels(model, coupling, removed).graph, x)[0]
    assert np.abs(bare - expected).max() > 1.0


def with_bias() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()


def test_means_go_into_the_bias() -> None:
    """Of the 1x1 convolution: b + W_R mu_R."""
    model = nets.as_model(with_bias())
    coupling = couple_channels(model)
    group = cuttable(coupling)[0]
    layer = next(layer for layer in coupling.layers if group.channels[2] in layer.input_channels)
    moments = gather_moments(model, coupling, calibration(), second=False)
    changed = compensate(model, coupling, [group.channels[2]], moments)
    before, after = (dict(m.graph.named_parameters()) for m in (model, changed))
    expected = before[layer.bias] + before[layer.weight][:, 2, 0, 0] * float(moments[layer.node].mean[2])
    np.testing.assert_allclose(after[layer.bias].detach(), expected.detach(), rtol=1e-5)
    np.testing.assert_array_equal(after[layer.weight].detach(), before[layer.weight].detach())


@pytest.mark.parametrize(
    "name", ["residual", "depthwise", "inception", "se_conv", "grouped", "option_a", "mlp"]
)
def test_compensation_brings_the_outputs_closer(name: str) -> None:
    """Without training and labels, on images that nothing was measured on."""
    model = nets.model(name)
    coupling = couple_channels(model)
    values = score_channels(Question(model, coupling, calibration()), "activation")
    removed = choose_channels(coupling, values, Target("ratio", 0.4), "uniform")
    moments = gather_moments(model, coupling, calibration(), second=True)
    means = {node: Moments(m.mean, None, m.count) for node, m in moments.items()}
    x = nets.held_out(32)
    expected = nets.outputs_of(model.graph, x)[0]

    def quality(prepared) -> float:
        cut = reestimate(cut_channels(prepared, coupling, removed), calibration())
        return sqnr_db(expected, nets.outputs_of(cut.graph, x)[0]) or 99.0

    bare = quality(model)
    assert quality(compensate(model, coupling, removed, moments)) > bare
    assert quality(compensate(model, coupling, removed, means)) > bare - 1.0


def test_the_network_given_stays_as_it_was() -> None:
    model = nets.model("residual")
    coupling = couple_channels(model)
    before = {name: value.clone() for name, value in model.graph.state_dict().items()}
    moments = gather_moments(model, coupling, calibration(), second=True)
    removed = [cuttable(coupling)[0].channels[0]]
    compensate(model, coupling, removed, moments)
    reestimate(model, calibration())
    for name, value in model.graph.state_dict().items():
        assert torch.equal(value, before[name])


def test_statistics_of_the_calibration_images() -> None:
    """The mean of the pixels 1, 3, -1, 5 through a weight of 2 is 4."""
    model = prune_nets.two_layers([2.0, 1.0], [[1.0, 0.0]] * 2, [1.0, 1.0])
    after = reestimate(model, prune_nets.samples([1.0, 3.0, -1.0, 5.0]))
    assert after.graph.get_buffer("1.running_mean").tolist() == pytest.approx([4.0, 2.0])


def test_one_image_cannot_give_statistics() -> None:
    model = prune_nets.two_layers([2.0, 1.0], [[1.0, 0.0]] * 2, [1.0, 1.0])
    after = reestimate(model, prune_nets.samples([5.0]))
    assert after.graph.get_buffer("1.running_mean").tolist() == [0.0, 0.0]
