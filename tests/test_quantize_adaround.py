"""AdaRound and BRECQ: the formulas by hand, and that learned rounding beats rounding to nearest."""

from __future__ import annotations

from typing import Any

import nets
import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from edgecnn.export.onnx import to_onnx
from edgecnn.export.parity import sqnr_db
from edgecnn.graph.build import build_program
from edgecnn.pipeline import PassContext
from edgecnn.quantize.adaround import (
    RoundingOptions,
    SoftWeight,
    annealed_beta,
    inverse_rectified_sigmoid,
    learn_rounding,
    rectified_sigmoid,
    regularizer,
)
from edgecnn.quantize.brecq import find_blocks
from edgecnn.quantize.columns import Columns, sample_columns
from edgecnn.quantize.lockstep import Stepper, affordable_images, clamp_bounds, layer_pairs
from edgecnn.quantize.reference import run_program
from edgecnn.quantize.static import QuantizeStatic

ROUNDINGS = ["adaround", "brecq"]


def layers(graph: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if "conv" in str(n.target) or "linear" in str(n.target)]


def test_h_and_its_inverse() -> None:
    """h = 1.2 sigmoid(V) - 0.1: V = ln((h + 0.1) / (1.1 - h)); it is 1 from V = ln 11 on."""
    h = torch.tensor([0.0, 0.25, 0.9])
    v = inverse_rectified_sigmoid(h)
    np.testing.assert_allclose(v.numpy(), torch.log((h + 0.1) / (1.1 - h)).numpy(), rtol=1e-5)
    np.testing.assert_allclose(rectified_sigmoid(v).numpy(), h.numpy(), atol=1e-6)
    assert rectified_sigmoid(torch.tensor([np.log(11.0) + 1e-4])).item() == 1.0


def test_regularizer_and_beta() -> None:
    assert regularizer(torch.tensor([0.75]), 4.0).item() == 1.0 - 0.5**4
    betas = [annealed_beta(step, 100) for step in (19, 20, 60, 99)]
    assert betas[0] is None
    assert betas[1:3] == [20.0, pytest.approx(11.0)]
    assert betas[3] == pytest.approx(2.0, abs=0.01)


def test_a_soft_weight_starts_at_the_float_one_and_ends_on_the_grid() -> None:
    weight = torch.tensor([[0.30, -0.70], [1.0, -0.10]])
    soft = SoftWeight(weight, torch.tensor([0.1, 1.0 / 7.0]), 4)
    np.testing.assert_allclose(soft.weight(soft.undecided()).detach().numpy(), weight.numpy(), atol=1e-6)
    assert soft.integers().tolist() == [[3, -7], [7, -1]]
    with torch.no_grad():
        soft.v.fill_(5.0)
    assert soft.integers()[1].tolist() == [7, 0], "8 is out of range"


def test_learned_rounding_finds_the_best_of_all_choices() -> None:
    """Two inputs that are always equal: 0.45 + 0.35 is 0.8, so one of the two is rounded up."""
    x = torch.randn(1, 512, 1, generator=torch.Generator().manual_seed(0)).expand(1, 512, 2)
    soft = SoftWeight(torch.tensor([[0.45, 0.35]]), torch.tensor([1.0]), 8)
    assert soft.integers().tolist() == [[0, 0]]
    generator = torch.Generator().manual_seed(0)
    learn_rounding(soft, torch.zeros(1), Columns(x, 0.8 * x[:, :, :1]), (None, None), 100, generator)
    assert soft.integers().tolist() == [[1, 0]]


def test_outputs_that_the_clamp_hides_do_not_count() -> None:
    """Where the float layer gives 0 after relu, -5 is as good as -0.1: the positive half decides."""
    x = torch.randn(1, 2048, 1, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, -x.clamp(max=0.0)], 2)  # the second input is there for negative ones only
    soft = SoftWeight(torch.tensor([[1.0, 0.4]]), torch.tensor([1.0]), 8)
    wanted = torch.relu(x @ torch.tensor([[1.0], [0.4]]))
    learned = learn_rounding(
        soft, torch.zeros(1), Columns(x, wanted), (0.0, None), 200, torch.Generator().manual_seed(0)
    )
    assert soft.integers()[0, 0] == 1
    assert float((torch.relu(x @ soft.integers().float().T + learned) - wanted).square().mean()) < 1e-3


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 9, 9)),
        (nn.Conv2d(4, 8, (3, 2), padding="same", dilation=2, groups=4), (3, 4, 8, 8)),
        (nn.Conv2d(4, 4, 3, groups=4), (3, 4, 7, 7)),
        (nn.Linear(5, 3), (3, 5)),
        (nn.Linear(5, 3), (3, 2, 5)),
    ],
)
def test_columns_are_what_the_layer_sees(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    graph = torch.export.export(layer, (torch.zeros(shape),)).module()
    node = layers(graph)[0]
    x = torch.randn(shape)
    y = layer(x).detach()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    columns = sample_columns(node, weight, [x[:1], x[1:]], [y[:1], y[1:]], 30, torch.Generator())
    groups, samples, k = columns.x.shape
    assert 3 <= samples <= 30
    rows = weight.reshape(groups, -1, k)
    found = columns.x @ rows.transpose(1, 2) + bias.reshape(groups, 1, -1)
    torch.testing.assert_close(found, columns.y)


def test_stepping_through_a_graph_gives_what_running_it_gives() -> None:
    model = nets.folded("inception")
    x = torch.from_numpy(nets.images(8))
    stepper = Stepper(model.graph, [x[:5], x[5:]])
    last = layers(model.graph)[-1]
    stepper.run_until(last)
    assert [len(part) for part in stepper.value(last.args[0])] == [5, 3]
    found = torch.cat(stepper.run_through(last))
    np.testing.assert_allclose(
        found.numpy(), nets.outputs_of(model.graph, nets.images(8))[0], rtol=1e-4, atol=1e-5
    )
    assert affordable_images(model, 7) == 7


def test_bounds_of_clamps() -> None:
    def found(function: Any) -> tuple[float | None, float | None]:
        class Clamp(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return function(x)

        graph = torch.export.export(Clamp(), (torch.zeros(2, 3),)).module()
        return clamp_bounds(next(n for n in graph.graph.nodes if n.op == "call_function" and n.users))

    assert found(F.relu) == (0.0, None)
    assert found(F.relu6) == (0.0, 6.0)
    assert found(lambda x: F.hardtanh(x, -0.5, 2.0)) == (-0.5, 2.0)
    assert found(lambda x: x.clamp(max=1)) == (None, 1.0)
    assert found(lambda x: x.clamp(min=-1)) == (-1.0, None)
    assert found(torch.sigmoid) == (None, None)


def test_blocks_end_where_one_value_carries_everything() -> None:
    """Stem, three residual blocks of two layers, head; the pool is the head's, not the last block's."""
    float_model = nets.folded("residual")
    quantized = nets.quantized("residual")
    blocks = find_blocks(quantized.graph, layer_pairs(float_model.graph, quantized.graph))
    assert [len(block.pairs) for block in blocks] == [1, 2, 2, 2, 1]
    ends = [str(block.end.target) for block in blocks[:4]]
    assert ends == ["aten.relu.default"] * 4
    assert str(blocks[4].end.target) == "aten.linear.default"
    counted = [node for block in blocks for node in block.nodes]
    assert len(counted) == len(set(counted))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_four_bits_learned_beat_four_bits_to_nearest(rounding: str) -> None:
    context = nets.context(64)
    expected = nets.outputs_of(nets.module("residual"), nets.held_out(64))[0]

    def ratio(**options: Any) -> float:
        step = QuantizeStatic(weight_bits=4, iterations=200, **options)
        after = step.run(nets.folded("residual"), context)
        return sqnr_db(expected, nets.outputs_of(after.graph, nets.held_out(64))[0]) or 0.0

    assert ratio(rounding=rounding) > ratio() + 3.0


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", ["depthwise", "grouped", "dense", "transposed", "mlp", "multi_output"])
def test_every_structure_stays_one_step_from_the_float_weight(name: str, rounding: str) -> None:
    """The files can be written, and no weight moves by a whole step."""
    context = nets.context(16)
    step = QuantizeStatic(weight_bits=7, rounding=rounding, iterations=20)
    after = step.run(nets.folded(name), context)
    for pair in layer_pairs(nets.folded(name).graph, after.graph):
        weight, _ = (pair.node.args[i] for i in (1, 2))
        learned = weight.target(*(_value(after.graph, a) for a in weight.args))
        original = _value(nets.folded(name).graph, pair.float_node.args[1])
        scale = _value(after.graph, weight.args[1]).max()
        assert float((learned - original).abs().max()) <= 1.001 * float(scale)
    x = nets.held_out(4)
    program = build_program(after)
    found = run_program(program, {program.inputs[0]: x})
    for (public, _), simulated in zip(program.outputs, nets.outputs_of(after.graph, x), strict=True):
        assert (sqnr_db(simulated, found[public]) or 0.0) > 30.0
    again = step.run(nets.folded(name), context)
    assert (
        to_onnx(build_program(again)).SerializeToString() == to_onnx(build_program(after)).SerializeToString()
    )


def _value(graph: fx.GraphModule, node: Any) -> Any:
    return graph.get_buffer(node.target) if _is_buffer(graph, node) else _parameter(graph, node)


def _is_buffer(graph: fx.GraphModule, node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in dict(graph.named_buffers())


def _parameter(graph: fx.GraphModule, node: Any) -> Any:
    return graph.get_parameter(node.target).detach() if isinstance(node, fx.Node) else node


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_linear_layer_with_more_inputs_than_images_stays_as_it_is(rounding: str) -> None:
    """The first of mlp has 64 inputs: 63 images do not teach it, 64 may."""

    def changed(num_images: int) -> bool:
        context = nets.context(num_images)
        nearest = QuantizeStatic(weight_bits=4).run(nets.folded("mlp"), context)
        learned = QuantizeStatic(weight_bits=4, rounding=rounding, iterations=20).run(
            nets.folded("mlp"), context
        )
        first, second = (
            next(b for n, b in after.graph.named_buffers() if b.dtype == torch.int8 and b.shape == (16, 64))
            for after in (nearest, learned)
        )
        return not torch.equal(first, second)

    assert not changed(63)
    assert changed(64)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_layer_without_bias_is_learned_too(rounding: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False)).eval()
    step = QuantizeStatic(rounding=rounding, bias_correction=False, iterations=10)
    after = step.run(nets.as_model(net), nets.context(16))
    assert [node.args[2] for node in layers(after.graph) if "conv" in str(node.target)] == [None, None]


def test_the_seed_decides() -> None:
    step = QuantizeStatic(weight_bits=4, rounding="adaround", iterations=20)

    def weights(seed: int) -> list[bytes]:
        images = nets.context(16)
        context = PassContext(images.calibration, images.calibration_indices, seed=seed)
        after = step.run(nets.folded("conv_bn_relu"), context)
        return [b.numpy().tobytes() for b in after.graph.buffers() if b.dtype == torch.int8]

    assert weights(1) == weights(1)
    assert weights(1) != weights(2)
    assert RoundingOptions().num_bits == 8
