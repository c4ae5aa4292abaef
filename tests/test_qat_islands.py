"""Quantization-aware training where parts compute in float: by themselves, or because a recipe says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import nets
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")

import torch
import torch.nn.functional as F
from mixing import check_files, kinds
from test_distill import context
from torch import Tensor, nn

from edgecnn.errors import RecipeError, UnsupportedOpError
from edgecnn.export.parity import compare, output_scales
from edgecnn.graph.build import build_program
from edgecnn.graph.program import Array, Program
from edgecnn.model import Model
from edgecnn.pipeline import PassContext
from edgecnn.qat.network import make_fake_quantized
from edgecnn.qat.quantize_aware_training import QuantizeAwareTraining
from edgecnn.quantize.reference import run_program
from edgecnn.quantize.static import QuantizeStatic

STATIC = QuantizeStatic(bias_correction=False, weight_bits=nets.STEP.weight_bits)
QUICK: dict[str, Any] = {
    "epochs": 1.0,
    "batch_size": 16,
    "learning_rate": 0.005,
    "augment": (),
    "num_samples": 32,
    "weight_bits": nets.STEP.weight_bits,
}


def norm_block(net: Any, x: Tensor) -> Tensor:
    y = net.stem(x)
    z = net.norm(net.depthwise(y).permute(0, 2, 3, 1))
    z = net.down(F.gelu(net.up(z))).permute(0, 3, 1, 2)
    return net.head((y + net.scale * z).mean((2, 3)))


def attention(net: Any, x: Tensor) -> Tensor:
    q, k, v = net.qkv(net.stem(x).flatten(2).transpose(1, 2)).chunk(3, 2)
    scores = torch.softmax(q @ k.transpose(1, 2) * 0.5 + 1.0, 2)
    return net.head((scores @ v).mean(1))


def shared_constant(net: Any, x: Tensor) -> Tensor:
    """What is added in int8 is added in float too."""
    y = F.gelu(net.middle(net.stem(x) + net.scale)) + net.scale
    return net.head(y.mean((2, 3)))


def two_ranges(net: Any, x: Tensor) -> Tensor:
    y = net.stem(x).mean((2, 3))
    return torch.cat([net.head(y), 100.0 * net.other(y)], 1)


class Scaled(nets.Net):
    """A network with a parameter of its own."""

    def __init__(self, layers: Mapping[str, nn.Module], function: Any) -> None:
        super().__init__(dict(layers), function)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8).reshape(8, 1, 1))


def make(name: str) -> tuple[Model, Model]:
    """Return a network as it was given, and folded."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {"stem": nn.Conv2d(3, 8, 3), "head": nn.Linear(8, 4)}
    if name == "norm_block":
        layers |= {"depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8), "norm": nn.LayerNorm(8)}
        layers |= {"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}
    elif name == "attention":
        layers |= {"qkv": nn.Linear(8, 24)}
    elif name == "shared_constant":
        layers |= {"middle": nn.Conv2d(8, 8, 1)}
    elif name == "two_ranges":
        layers |= {"other": nn.Linear(8, 4)}
    given = nets.as_model(Scaled(layers, FUNCTIONS[name]).eval())
    return given, nets.prepare(given)


FUNCTIONS = {f.__name__: f for f in (norm_block, attention, shared_constant, two_ranges)}
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "layer_norm and gelu": ("norm_block", ()),
    "attention": ("attention", ()),
    "a convolution by name": ("residual", ("a1.0",)),
    "the first layer": ("residual", ("stem.0",)),
    "the last layer": ("residual", ("last.2",)),
    "a gate": ("se_conv", ("mean", "down", "up", "sigmoid*")),
    "an input of a concat": ("inception", ("b.0",)),
    "both": ("norm_block", ("up",)),
    "a constant read twice": ("shared_constant", ()),
    "a concat joined in float": ("two_ranges", ()),
    "all layers": ("norm_block", ("*",)),
}


def networks(name: str) -> tuple[Model, Model]:
    return make(name) if name in FUNCTIONS else (nets.model(name), nets.folded(name))


def run_context(teacher: Model, **changes: Any) -> PassContext:
    images = nets.context()
    found = context(teacher, False, calibration=images.calibration)
    return dataclasses.replace(found, calibration_indices=images.calibration_indices, **changes)


def step_for(case: str, **changes: Any) -> QuantizeAwareTraining:
    return QuantizeAwareTraining(**{**QUICK, "float_layers": CASES[case][1], **changes})


def check_alike(program: Program, found: list[Array], x: Array) -> None:
    """Float sums differ in their last bits, which moves a value across a border now and then, by a step."""
    expected = run_program(program, {program.inputs[0]: x})
    named = {public: values for (public, _), values in zip(program.outputs, found, strict=True)}
    comparison = compare(expected, named, output_scales(program))
    assert comparison.max_lsb <= 1
    for name, values in named.items():
        assert np.isclose(expected[name], values, atol=1e-5).mean() >= 0.97


@pytest.mark.parametrize("case", CASES)
def test_before_training_it_computes_what_the_files_will(case: str) -> None:
    _, folded = networks(CASES[case][0])
    step = dataclasses.replace(STATIC, float_layers=CASES[case][1])
    x = nets.held_out(16)
    made = make_fake_quantized(step.calibrated(folded, nets.context()), step, learn_scales=True)
    found = nets.outputs_of(made.model.graph, x)
    check_alike(build_program(step.run(folded, nets.context())), found, x)


@pytest.mark.parametrize("method", ["lsq", "fake_quant"])
@pytest.mark.parametrize("case", CASES)
def test_the_files_compute_what_was_trained(case: str, method: Any) -> None:
    given, folded = networks(CASES[case][0])
    run, step, x = run_context(given), step_for(case, method=method), nets.held_out(16)
    step.check()
    step.requires(folded)
    made, trained = step.trained(folded, run)
    after = step.written(made, trained, run)
    step.ensures(folded, after)
    program = build_program(after)
    check_files(program, x)
    check_alike(program, nets.outputs_of(trained.graph, x), x)
    static = dataclasses.replace(STATIC, float_layers=CASES[case][1])
    assert kinds(program) == kinds(build_program(static.run(folded, nets.context())))
    assert {record["pass"] for record in run.records} == {"quantize_aware_training"}


def test_what_computes_in_float_learns_too() -> None:
    """The norm, a layer in float by name and the factors of a product in float."""
    given, folded = make("norm_block")
    step = step_for("both", learning_rate=0.01)
    before, after = build_program(folded), build_program(step.run(folded, run_context(given)))
    float_values = {
        name: {t.data.tobytes() for t in program.tensors.values() if t.data is not None and t.dtype == dtype}
        for name, program, dtype in (("before", before, "float32"), ("after", after, "float32"))
    }
    assert not {v for v in float_values["after"] if len(v) >= 32} & float_values["before"]


def test_an_average_in_float_stays_an_average() -> None:
    given, folded = networks("pools")
    step = QuantizeAwareTraining(**QUICK, float_layers=("*pool*",))
    made, trained = step.trained(folded, run_context(given))
    names = {name for name, _ in trained.graph.named_parameters()}
    assert made.calibrated.slots.floats.nodes
    assert not any("pool" in name and "weight" in name for name in names)


def test_a_constant_that_int8_reads_is_not_trained() -> None:
    """In int8 it is an integer, so what adds it in float must not go on with another one."""
    _, folded = make("shared_constant")
    assert "scale" in dict(folded.graph.named_parameters())
    made = make_fake_quantized(STATIC.calibrated(folded, nets.context()), STATIC, learn_scales=False)
    assert "scale" not in dict(made.model.graph.named_parameters())
    assert "scale" in dict(made.model.graph.named_buffers())


def test_the_loss_falls() -> None:
    """4 bits, so that there is something to win back."""
    given, folded = make("norm_block")
    run = run_context(given)
    QuantizeAwareTraining(**{**QUICK, "weight_bits": 4, "epochs": 12.0}).run(folded, run)
    islands, _, curves = run.records[:3]
    assert (islands["kind"], curves["kind"]) == ("float_islands", "training_curves")
    assert np.mean(curves["loss"][-10:]) < 0.8 * np.mean(curves["loss"][:5])


def test_what_is_refused() -> None:
    given, folded = make("norm_block")
    with pytest.raises(UnsupportedOpError, match=r"2 operators have no int8 form, first norm .*'error'"):
        step_for("layer_norm and gelu", unsupported="error").run(folded, run_context(given))
    with pytest.raises(RecipeError, match=r"float_layers names 'stam', and the network has no such layer"):
        QuantizeAwareTraining(float_layers=("stam",)).requires(folded)
    with pytest.raises(RecipeError, match=r"unsupported is 'int16', expected one of float, error"):
        QuantizeAwareTraining(unsupported="int16").check()
