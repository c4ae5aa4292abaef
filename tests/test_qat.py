"""Quantization-aware training: the paper's gradients, and files that compute what was trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import nets
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from test_distill import Breaking, Stopped, context, shaken, weights

from edgecnn.errors import PassError
from edgecnn.export.onnx import OnnxOptions, to_onnx
from edgecnn.export.parity import compare, output_scales
from edgecnn.export.tflite import to_tflite
from edgecnn.graph.build import build_program
from edgecnn.model import Model
from edgecnn.pipeline import PassContext, run_passes
from edgecnn.qat.fake_quantize import fake_quantize, fake_quantize_bias, gradient_scale
from edgecnn.qat.network import FakeQuantized, make_fake_quantized
from edgecnn.qat.quantize_aware_training import QuantizeAwareTraining
from edgecnn.quantize.reference import run_program
from edgecnn.quantize.static import QuantizeStatic
from edgecnn.train.checkpoint import Checkpoints
from edgecnn.train.failures import DivergedError

QUICK: dict[str, Any] = {
    "epochs": 4.0,
    "batch_size": 16,
    "learning_rate": 0.005,
    "augment": (),
    "num_samples": 64,
    "weight_bits": nets.STEP.weight_bits,
}
NET = "residual"


def whole_context(net: str = NET, labelled: bool = True, **changes: Any) -> PassContext:
    """Return images to calibrate and to train on, and the float network as the teacher."""
    images = nets.context()
    found = context(nets.model(net), labelled, calibration=images.calibration)
    return dataclasses.replace(found, calibration_indices=images.calibration_indices, **changes)


def quantized_layers(model: Model) -> dict[str, tuple[bytes, bytes]]:
    """Return the integers and the scales of every layer's weight, by the layer's name."""
    found = {}
    for node in model.graph.graph.nodes:
        if node.op == "call_function" and "dequantize_per_channel" in str(node.target):
            integers, scales = (getattr(model.graph, str(node.args[i].target)) for i in (0, 1))
            found[str(node.args[0].target)] = (integers.numpy().tobytes(), scales.numpy().tobytes())
    return found


def held_parameters(model: Model) -> list[tuple[Any, ...]]:
    """Return (scale, zero_point) of every quantize node in order."""
    return [
        tuple(node.args[1:3])
        for node in model.graph.graph.nodes
        if "quantize_per_tensor" in str(node.target) and "dequantize" not in str(node.target)
    ]


# --- the paper's equations


def test_values_by_hand() -> None:
    """Steps of 0.5 from -4 to 3; round half to even, as the runtimes do."""
    x = torch.tensor([0.6, -0.3, 2.0, -3.0, 0.25, 0.75])
    found = fake_quantize(x, torch.tensor([0.5]), -4, 3)
    assert found.tolist() == [0.5, -0.5, 1.5, -2.0, 0.0, 1.0]


def test_gradients_by_hand() -> None:
    """v / s = 1.2, -0.6, 4, -6, 3: the last is on the edge, where the paper takes the clipped branch.

    dv^/ds = 1 - 1.2, -1 + 0.6, 3, -4, 3, weighed 1, 2, 3, 4, 5: -0.2 - 0.8 + 9 - 16 + 15 = 7, times g = 1/4.
    """
    x = torch.tensor([0.6, -0.3, 2.0, -3.0, 1.5], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    (fake_quantize(x, scale, -4, 3, gradient_scale=0.25) * upstream).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 0.0, 0.0, 0.0]
    assert scale.grad.item() == pytest.approx(0.25 * 7.0, rel=1e-6)


def test_gradients_are_the_formula_per_channel() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, generator=generator).requires_grad_()
    scale = torch.tensor([0.1, 0.3, 0.9]).reshape(3, 1).requires_grad_()
    upstream = torch.randn(4, 3, 5, generator=generator)
    (fake_quantize(x, scale, -7, 7, 0.5) * upstream).sum().backward()
    ratio = (x / scale).detach().double()
    inside = (ratio > -7) & (ratio < 7)
    to_scale = torch.where(inside, ratio.round() - ratio, ratio.clamp(-7, 7).round())
    assert x.grad is not None
    assert scale.grad is not None
    assert torch.equal(x.grad, upstream * inside)
    expected = 0.5 * (to_scale * upstream).sum((0, 2))
    np.testing.assert_allclose(scale.grad.flatten(), expected, rtol=1e-4)


def test_gradient_scale_by_hand() -> None:
    assert gradient_scale(9, 4.0) == 1 / 6


def test_a_step_size_below_the_smallest_counts_as_it_and_can_grow_again() -> None:
    scale = torch.tensor([-0.5], requires_grad=True)
    y = fake_quantize(torch.tensor([3.0]), scale, -4, 3, smallest=0.25)
    y.sum().backward()
    assert y.item() == 0.75
    assert scale.grad is not None
    assert scale.grad.item() == 3.0


def test_a_bias_lies_on_the_grid_of_its_products() -> None:
    """Steps of 0.5 * 0.25 and 0.5 * 0.1; the gradient goes through, the steps get none."""
    bias = torch.tensor([0.2, 0.2], requires_grad=True)
    x_scale = torch.tensor([0.5], requires_grad=True)
    y = fake_quantize_bias(bias, x_scale, torch.tensor([0.25, 0.1]))
    y.sum().backward()
    np.testing.assert_allclose(y.detach(), [0.25, 0.2], rtol=1e-6)
    assert bias.grad is not None
    assert bias.grad.tolist() == [1.0, 1.0]
    assert x_scale.grad is None


@pytest.mark.parametrize("start", [0.07, 0.13])
def test_the_best_step_size_is_found(start: float) -> None:
    """Values at -7 ... 7 times 0.1 have no error in steps of 0.1, whichever side it starts from."""
    values = torch.arange(-7, 8) * 0.1
    scale = torch.tensor([start], requires_grad=True)
    optimizer = torch.optim.SGD([scale], lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        error = fake_quantize(values, scale, -7, 7, gradient_scale(15, 7)) - values
        error.square().sum().backward()
        optimizer.step()
    assert scale.item() == pytest.approx(0.1, abs=1e-3)


# --- the network that is trained


def fake_quantized(net: str) -> FakeQuantized:
    step = QuantizeStatic(bias_correction=False)
    calibrated = step.calibrated(nets.folded(net), nets.context())
    return make_fake_quantized(calibrated, step, learn_scales=True)


INEXACT = ("bilinear", "bilinear_aligned", "cbam", "pools", "ceil_pools")
"""Networks whose averages and resizes the runtimes round in their own ways."""


@pytest.mark.parametrize("net", nets.NETS)
def test_it_computes_what_the_integers_will(net: str) -> None:
    x = nets.held_out(8)
    found = nets.outputs_of(fake_quantized(net).model.graph, x)
    quantized = QuantizeStatic(bias_correction=False).run(nets.folded(net), nets.context())
    program = build_program(quantized)
    expected = run_program(program, {program.inputs[0]: x})
    named = {public: values for (public, _), values in zip(program.outputs, found, strict=True)}
    comparison = compare(expected, named, output_scales(program))
    assert comparison.max_lsb <= (2 if net in INEXACT else 0)


def test_scales_that_an_operator_prescribes_are_not_trained() -> None:
    made = fake_quantized("softmax")
    trained = dict(made.model.graph.named_parameters())
    fixed = {made.calibrated.slots.root(node) for node in made.calibrated.slots.fixed}
    assert fixed
    for root, name in made.slot_scales.items():
        assert (name in trained) is (root not in fixed)


def test_averages_keep_their_weights() -> None:
    """An average pool, as a convolution with equal weights, stays an average."""
    made = fake_quantized("pools")
    trained = dict(made.model.graph.named_parameters())
    weights_of = {
        str(node.target): next(iter(node.users)) for node in made.model.graph.graph.find_nodes(op="get_attr")
    }
    averages = [name for name in weights_of if "pool" in name]
    assert averages
    assert not set(averages) & set(trained)


# --- the pass


@pytest.mark.parametrize("method", ["lsq", "fake_quant"])
def test_the_loss_falls(method: Any) -> None:
    """4 bits, so that there is something to win back."""
    run = whole_context()
    step = QuantizeAwareTraining(**{**QUICK, "weight_bits": 4, "epochs": 12.0}, method=method)
    model = nets.folded(NET)
    before = weights(model)
    after = step.run(model, run)
    step.ensures(model, after)
    told, curves, moved = run.records[:3]
    loss = curves["loss"]
    assert np.mean(loss[-10:]) < 0.8 * np.mean(loss[:5])
    assert weights(model) == before
    assert [record["pass"] for record in run.records] == ["quantize_aware_training"] * len(run.records)
    assert (told["kind"], curves["kind"]) == ("distillation", "training_curves")
    assert (moved["kind"], moved["method"]) == ("quantize_aware_training", method)


@pytest.mark.parametrize("net", ["residual", "se_linear", "hard_swish", "mixed_concat", "grouped", "unet"])
def test_the_files_compute_the_same_integers(net: str) -> None:
    """In ONNX Runtime bit for bit, in LiteRT too where its reference is exact, and what was trained."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("ai_edge_litert")
    from onnx_session import run as run_onnx
    from tflite_session import TfliteSession

    step = QuantizeAwareTraining(**{**QUICK, "epochs": 1.0})
    after = step.run(nets.folded(net), whole_context(net, labelled=False))
    program = build_program(after)
    x = nets.held_out(8)
    expected = run_program(program, {program.inputs[0]: x})
    scales = output_scales(program)
    for name, values in run_onnx(to_onnx(program, OnnxOptions()), {program.inputs[0]: x}).items():
        assert compare({name: expected[name]}, {name: values}, scales).max_lsb == 0
    found = TfliteSession(to_tflite(program)).run({program.inputs[0]: x})
    assert compare(expected, found, scales).max_lsb == 0


@pytest.mark.parametrize("net", ["residual", "mixed_concat", "hard_swish", "dense", "transposed"])
def test_what_was_trained_is_what_the_integers_compute(net: str) -> None:
    """The last steps are taken with step sizes that nothing changes afterwards."""
    run = whole_context(net, labelled=False)
    step = QuantizeAwareTraining(**QUICK)
    assert differing_lsb(step, net, run) == 0
    assert 0 < run.records[2]["largest_scale_change"] < 0.5
    assert run.records[2]["largest_change_against_ties"] < 0.02


def test_without_settling_the_step_sizes_change_once_more() -> None:
    """They move to where nothing ties, by a hundredth or two, and the outputs by a step or two."""
    assert 0 < differing_lsb(QuantizeAwareTraining(**QUICK, settle=0.0), NET, whole_context()) <= 3


def differing_lsb(step: QuantizeAwareTraining, net: str, run: PassContext) -> int:
    """Return how far the network that was trained is from its integers."""
    made, trained = step.trained(nets.folded(net), run)
    program = build_program(step.written(made, trained, run))
    x = nets.held_out(32)
    expected = run_program(program, {program.inputs[0]: x})
    found = nets.outputs_of(trained.graph, x)
    named = {public: values for (public, _), values in zip(program.outputs, found, strict=True)}
    return compare(expected, named, output_scales(program)).max_lsb


def test_frozen_ranges() -> None:
    """fake_quant trains weights in the ranges that quantize_static chose."""
    static = QuantizeStatic(bias_correction=False, num_samples=64, weight_bits=QUICK["weight_bits"])
    start = static.run(nets.folded(NET), nets.context())
    after = QuantizeAwareTraining(**QUICK, method="fake_quant").run(nets.folded(NET), whole_context())
    assert held_parameters(after) == held_parameters(start)
    first, second = quantized_layers(start), quantized_layers(after)
    assert first.keys() == second.keys()
    weight_names = [name for name in first if "bias" not in name]
    assert all(first[name][1] == second[name][1] for name in weight_names)
    assert any(first[name][0] != second[name][0] for name in weight_names)


def test_learned_step_sizes_move() -> None:
    static = QuantizeStatic(bias_correction=False, num_samples=64, weight_bits=QUICK["weight_bits"])
    start = static.run(nets.folded(NET), nets.context())
    after = QuantizeAwareTraining(**QUICK).run(nets.folded(NET), whole_context())
    assert held_parameters(after) != held_parameters(start)
    assert [zero for _, zero in held_parameters(after)] == [zero for _, zero in held_parameters(start)]


def test_labels_are_not_needed() -> None:
    run = whole_context(labelled=False)
    QuantizeAwareTraining(**QUICK).run(nets.folded(NET), run)
    assert (run.records[0]["labels"], run.records[0]["alpha"]) == (False, 1.0)


def test_four_bits_are_simulated_in_int8() -> None:
    after = QuantizeAwareTraining(**{**QUICK, "weight_bits": 4}).run(nets.folded(NET), whole_context())
    largest = [
        int(t.abs().max()) for name, t in after.graph.state_dict().items() if t.dtype == torch.int8 and t.ndim
    ]
    assert max(largest) == 7


@pytest.mark.parametrize("after", [5, 19])
def test_a_resumed_run_ends_with_the_same_bytes(
    after: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off among the 16 steps that train step sizes, or the 4 that settle."""
    step = QuantizeAwareTraining(**QUICK)
    unbroken = step.run(nets.folded(NET), whole_context())
    stages = Checkpoints(tmp_path, {"run": "1"}, interval_seconds=0.0)
    monkeypatch.setattr(Breaking, "left", after)
    monkeypatch.setattr("edgecnn.train.checkpoint.Checkpoint", Breaking)
    with pytest.raises(Stopped):
        step.run(nets.folded(NET), whole_context(checkpoints=stages))
    assert len(list(tmp_path.glob("*.checkpoint"))) == (1 if after == 5 else 2)
    resumed = step.run(nets.folded(NET), whole_context(checkpoints=stages))
    assert weights(resumed) == weights(unbroken)
    assert held_parameters(resumed) == held_parameters(unbroken)


def test_a_network_taught_by_a_better_one() -> None:
    """Any teacher will do whose outputs fit: here the network is a disturbed copy of it."""
    student = nets.prepare(shaken(nets.model(NET)))
    run = whole_context()
    step = QuantizeAwareTraining(**{**QUICK, "epochs": 16.0, "learning_rate": 0.01}, hard_labels=False)
    step.run(student, run)
    loss = run.records[1]["loss"]
    assert np.mean(loss[-5:]) < 0.5 * np.mean(loss[:5])


# --- bad input


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"method": "pact"}, "method is 'pact', expected one of lsq, fake_quant"),
        ({"precision": "bfloat16"}, "precision is bfloat16, expected float32"),
        ({"weight_bits": 4}, "weight_bits is 4, expected 7 or 8"),
        ({"observer": "mean"}, "observer is 'mean', expected one of"),
        ({"num_samples": 0}, "num_samples is 0, expected at least 1"),
        ({"settle": 1.0}, "settle is 1.0, expected 0 <= settle < 1"),
        ({"alpha": 0.0}, "alpha is 0.0, expected 0 < alpha <= 1"),
        ({"epochs": 0.0}, "epochs is 0.0, expected a number above 0"),
    ],
)
def test_a_parameter_out_of_range_is_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        QuantizeAwareTraining(**parameters).check()


def test_auto_precision_is_float32() -> None:
    assert QuantizeAwareTraining(precision="auto")._distillation(1.0).precision == "float32"
    QuantizeAwareTraining(precision="auto").check()


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"teacher": None}, "a teacher network"),
        ({"train_indices": ()}, "training images"),
        ({"calibration": None}, "calibration images"),
    ],
)
def test_what_is_missing_is_named(changes: dict[str, Any], missing: str) -> None:
    run = dataclasses.replace(whole_context(), **changes)
    with pytest.raises(PassError, match=rf"needs {missing}, but this run has none"):
        run_passes(nets.folded(NET), (QuantizeAwareTraining(),), run, lambda model: {})


def test_a_teacher_with_other_outputs_is_refused() -> None:
    run = dataclasses.replace(whole_context(labelled=False), teacher=nets.model("multi_output"))
    with pytest.raises(PassError, match="expected the same outputs"):
        QuantizeAwareTraining(**QUICK).run(nets.folded(NET), run)


def test_batch_norms_must_be_folded() -> None:
    with pytest.raises(PassError, match="is not folded"):
        QuantizeAwareTraining().requires(nets.model(NET))
    with pytest.raises(PassError, match="is quantized already"):
        QuantizeAwareTraining().requires(nets.quantized(NET))


def test_a_loss_that_is_not_finite_says_where(tmp_path: Any) -> None:
    step = QuantizeAwareTraining(**{**QUICK, "learning_rate": 1e12, "warmup_epochs": 0.0})
    stages = Checkpoints(tmp_path, {"run": "1"}, interval_seconds=0.0)
    with pytest.raises(DivergedError, match=r"not finite|the loss is (nan|inf)") as found:
        step.run(nets.folded(NET), whole_context(checkpoints=stages))
    assert "lower the learning rate" in (found.value.hint or "")
