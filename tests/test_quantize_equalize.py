"""Cross-layer equalization: the formula by hand, what it may touch, and that the function stays."""

from __future__ import annotations

from typing import Any

import nets
import numpy as np
import pytest
import torch
from torch import nn

from edgecnn.errors import PassError
from edgecnn.export.parity import sqnr_db
from edgecnn.graph.folding import STATISTICS, FoldBatchNorm
from edgecnn.model import Model
from edgecnn.pipeline import PassContext
from edgecnn.quantize.equalize import Equalize, balance, find_pairs, input_reach, scale_inputs
from edgecnn.quantize.static import QuantizeStatic


def chain(*layers: nn.Module) -> Model:
    torch.manual_seed(0)
    return nets.prepare(nets.as_model(nets.settle(nn.Sequential(*layers))))


def weights(model: Model) -> list[torch.Tensor]:
    graph = model.graph
    tensors = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    return [tensors[n.args[1].target].detach() for n in layers(model)]


def layers(model: Model) -> list[Any]:
    calls = [n for n in model.graph.graph.nodes if n.op == "call_function"]
    return [n for n in calls if "conv2d" in str(n.target) or "linear" in str(n.target)]


def run(model: Model, **options: Any) -> Model:
    step = Equalize(**options)
    step.requires(model)
    after = step.run(model, PassContext())
    step.ensures(model, after)
    return after


def test_by_hand() -> None:
    """Channel 0: 8 in, 2 out, s = 2; channel 1: 1 in, 16 out, s = 1/4."""
    s = balance(torch.tensor([8.0, 1.0]), torch.tensor([2.0, 16.0]))
    assert s.tolist() == [2.0, 0.25]
    weight = torch.tensor([[2.0, -16.0], [1.0, 4.0]])
    assert input_reach(weight, 1).tolist() == [2.0, 16.0]
    assert scale_inputs(weight, s, 1).tolist() == [[4.0, -4.0], [2.0, 1.0]]


def test_groups_by_hand() -> None:
    """Two groups of two inputs and one output each: the rows read inputs 0, 1 and 2, 3."""
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]]).reshape(2, 2, 1, 1)
    assert input_reach(weight, 2).tolist() == [1.0, 2.0, 3.0, 4.0]
    scaled = scale_inputs(weight, torch.tensor([10.0, 20.0, 30.0, 40.0]), 2)
    assert scaled.flatten().tolist() == [10.0, -40.0, 90.0, 160.0]


def test_both_sides_reach_as_far_afterwards() -> None:
    model = chain(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))
    before, after = weights(model), weights(run(model))
    r1, r2 = before[0].abs().amax((1, 2, 3)), before[1].abs().amax((0, 2, 3))
    expected = torch.sqrt(r1 * r2)
    torch.testing.assert_close(after[0].abs().amax((1, 2, 3)), expected)
    torch.testing.assert_close(after[1].abs().amax((0, 2, 3)), expected)


def test_a_depthwise_chain_settles() -> None:
    """Three layers in a row: afterwards both pairs are balanced at once."""
    model = chain(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    first, depthwise, last = weights(run(model))
    reach = [first.abs().amax((1, 2, 3)), depthwise.abs().amax((1, 2, 3)), last.abs().amax((0, 2, 3))]
    torch.testing.assert_close(reach[0], reach[1], rtol=0.01, atol=0.0)
    torch.testing.assert_close(reach[1], reach[2], rtol=0.01, atol=0.0)


@pytest.mark.parametrize("name", nets.NETS)
def test_the_function_stays(name: str) -> None:
    before = nets.folded(name)
    after = run(before)
    x = nets.held_out(4)
    for old, new in zip(nets.outputs_of(before.graph, x), nets.outputs_of(after.graph, x), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-4 * float(np.abs(old).max()))


@pytest.mark.parametrize(
    ("between", "found"),
    [
        ([], 1),
        ([nn.ReLU()], 1),
        ([nn.LeakyReLU(0.1)], 1),
        ([nn.ReLU(), nn.MaxPool2d(2)], 1),
        ([nn.Dropout(), nn.Upsample(scale_factor=2)], 1),
        ([nn.Sigmoid()], 0),
        ([nn.Hardswish()], 0),
        ([nn.Hardtanh(-1.0, 2.0)], 0),
    ],
)
def test_what_may_stand_between_two_layers(between: list[nn.Module], found: int) -> None:
    assert len(find_pairs(chain(nn.Conv2d(3, 6, 3), *between, nn.Conv2d(6, 4, 1)))) == found


def test_a_value_read_by_an_addition_is_left_alone() -> None:
    """Of the residual net only the first layer of each block is read by layers alone."""
    pairs = find_pairs(nets.folded("residual"))
    assert [pair.first.name for pair in pairs] == ["conv2d_1", "conv2d_3", "conv2d_5"]


def test_several_readers_share_one_scale() -> None:
    pairs = find_pairs(nets.folded("inception"))
    assert len(pairs[0].readers) == 3


def test_relu6_is_left_alone_or_becomes_relu() -> None:
    model = chain(nn.Conv2d(3, 6, 3), nn.ReLU6(), nn.Conv2d(6, 4, 1))
    kept = run(model)
    assert len(kept.warnings) == 1
    assert "left 1 of 1 pairs of layers alone: a clamp at 6" in kept.warnings[0]
    assert 'relu6 = "relu" makes it a relu' in kept.warnings[0]
    for old, new in zip(weights(model), weights(kept), strict=True):
        assert torch.equal(old, new)
    changed = run(model, relu6="relu")
    assert changed.warnings == ()
    assert any("relu.default" in str(n.target) for n in changed.graph.graph.nodes)
    x = 0.1 * nets.held_out(4)  # nothing reaches 6
    np.testing.assert_allclose(
        nets.outputs_of(changed.graph, x)[0], nets.outputs_of(model.graph, x)[0], atol=1e-5
    )


def offset_net(padding: int) -> Model:
    """conv -> batch norm of mean 5 and std 1 -> relu -> conv."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=padding)
    )
    nets.settle(net)
    with torch.no_grad():
        net[1].weight.fill_(1.0)
        net[1].bias.fill_(5.0)
    return nets.prepare(nets.as_model(net))


def test_absorption_takes_the_offset_out_of_the_activation() -> None:
    """beta - 3 gamma = 2 of what all channels reach is moved, in units of each channel's scale."""
    model = offset_net(0)
    plain, absorbed = run(model), run(model, absorb=True)
    first = next(n for n in absorbed.graph.graph.nodes if STATISTICS in n.meta)
    mean, std = first.meta[STATISTICS]
    torch.testing.assert_close(mean, 3.0 * std)

    def bias(after: Model, index: int) -> torch.Tensor:
        return after.graph.get_buffer(layers(after)[index].args[2].target)

    torch.testing.assert_close(bias(plain, 0) - bias(absorbed, 0), (2.0 * std).float())
    moved = (weights(plain)[1].double() * (2.0 * std).reshape(1, -1, 1, 1)).sum((1, 2, 3)).float()
    torch.testing.assert_close(bias(absorbed, 1) - bias(plain, 1), moved)
    x = nets.images(32)  # what the batch norm's statistics are of
    old, new = (nets.outputs_of(m.graph, x)[0] for m in (model, absorbed))
    assert (sqnr_db(old, new) or 0.0) > 40.0


def test_absorbing_nothing_is_said() -> None:
    plain = nets.as_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval())
    (warning,) = run(plain, absorb=True).warnings
    assert warning.startswith("equalize absorbed no offset in 1 pairs of layers: that takes a batch norm")
    assert run(plain).warnings == ()


def test_nothing_is_absorbed_by_a_layer_that_pads() -> None:
    model = offset_net(1)
    for old, new in zip(weights(run(model)), weights(run(model, absorb=True)), strict=True):
        assert torch.equal(old, new)
    x = nets.held_out(4)
    old, new = (nets.outputs_of(m.graph, x)[0] for m in (model, run(model, absorb=True)))
    np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-4)


def test_channels_far_apart_quantize_better_afterwards() -> None:
    """One scale for all channels of an activation: those a hundred times smaller drown, until equalized."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)).eval()
    with torch.no_grad():
        spread = torch.logspace(-1.5, 1.5, 8)
        net[0].weight.mul_(spread[:, None, None, None])
        net[0].bias.mul_(spread)
        net[2].weight.div_(spread[None, :, None, None])
    model = nets.as_model(net)
    expected = nets.outputs_of(net, nets.held_out(32))[0]

    def ratio(before: Model) -> float:
        after = QuantizeStatic().run(before, nets.context())
        return sqnr_db(expected, nets.outputs_of(after.graph, nets.held_out(32))[0]) or 0.0

    assert ratio(run(model)) > ratio(model) + 10.0


def test_what_it_refuses() -> None:
    with pytest.raises(PassError, match=r"stem\.1 .* is not folded.*put fold_batch_norm ahead of equalize"):
        Equalize().requires(nets.model("residual"))
    with pytest.raises(PassError, match=r"quantized already.*put equalize ahead of quantize_static"):
        Equalize().requires(nets.quantized("residual"))
    other = FoldBatchNorm().run(nets.as_model(nets.settle(nets.NETS["residual"]())), PassContext())
    with pytest.raises(PassError, match=r"equalize changed an output by .* where it reaches"):
        Equalize().ensures(nets.folded("residual"), other)
