"""Layers left in float in an int8 network: what follows from a name, and both files with their reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import nets
import numpy as np
import onnx_session
import pytest
import torch
import torch.nn.functional as F
from mixing import check_files, kinds, layer_op, leave, mixed, net
from tflite_session import TfliteSession
from torch import Tensor, nn

from edgecnn.errors import RecipeError
from edgecnn.export.onnx import to_onnx
from edgecnn.export.parity import sqnr_db
from edgecnn.export.tflite import to_tflite
from edgecnn.graph.build import build_program, float_islands
from edgecnn.model import Model
from edgecnn.pipeline import PassContext
from edgecnn.quantize.float_layers import layer_names, match_layers, plan_float
from edgecnn.quantize.reference import run_program
from edgecnn.quantize.static import QuantizeStatic

PLAIN = QuantizeStatic(observer="min_max", bias_correction=False)


def two_layers() -> tuple[Model, PassContext]:
    """y = 127 (2 x), and images whose least and largest value are -0.64 and 0.635."""
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)).eval()
    with torch.no_grad():
        net[0].weight.fill_(2.0)
        net[1].weight.fill_(127.0)
    images = np.linspace(-0.64, 0.635, 256, dtype=np.float32).reshape(16, 1, 4, 4)
    return nets.as_model(net, (1, 4, 4)), PassContext(nets.Images(images), tuple(range(16)))


@pytest.mark.parametrize(
    ("name", "operators", "expected"),
    [
        # 0.1226 = 24.52 steps of 0.005: 25; 2 x = 25 steps of 0.01; 127 of it = 25 steps of 1.27
        ("", ["quantize", "conv2d", "conv2d", "dequantize"], 31.75),
        # 0.2452 in float, 24.52 steps of 0.01: 25
        ("0", ["CONV2D", "quantize", "conv2d", "dequantize"], 31.75),
        # 25 steps of 0.01, times 127 in float
        ("1", ["quantize", "conv2d", "dequantize", "CONV2D"], 31.75),
        ("[01]", ["CONV2D", "CONV2D"], 31.1404),
    ],
)
def test_two_layers_by_hand(name: str, operators: list[str], expected: float) -> None:
    model, context = two_layers()
    step = dataclasses.replace(PLAIN, float_layers=(name,) if name else ())
    program = build_program(step.run(model, context))
    assert kinds(program) == operators
    scales = [round(float(t.quant.scale), 6) for t in program.tensors.values() if t.quant and t.data is None]
    wanted = {"": [0.005, 0.01, 1.27], "0": [0.01, 1.27], "1": [0.005, 0.01], "[01]": []}
    assert scales == wanted[name]
    x = np.full((1, 1, 4, 4), 0.1226, np.float32)
    feeds = {program.inputs[0]: x}
    for found in (
        run_program(program, feeds),
        onnx_session.run(to_onnx(program), feeds),
        TfliteSession(to_tflite(program)).run(feeds),
    ):
        np.testing.assert_allclose(next(iter(found.values())), expected, rtol=1e-5)


def test_weights_stay_as_they_are() -> None:
    model = nets.folded("residual")
    after = leave(model, "a1.0")
    program = build_program(after)
    op = layer_op(program, "a1.0")
    weight = program.tensors[op.inputs[1]]
    assert weight.dtype == "float32"
    assert np.array_equal(weight.data, model.graph.get_buffer("a1_0_weight").numpy())
    layers = [op for op in program.ops if op.kind in ("conv2d", "linear")]
    assert [program.tensors[op.inputs[1]].dtype for op in layers].count("int8") == len(layers) - 1


PLACES = {
    "first layer": ("residual", ("stem.0",), 1),
    "last layer": ("residual", ("last.2",), 1),
    "inside a residual block": ("residual", ("a1.0",), 1),
    "an addition and what it reads": ("residual", ("a1.0", "b1.0", "add_1 *"), 3),
    "a gate": ("se_conv", ("mean", "down", "up", "sigmoid*"), 4),
    "an input of a concat": ("inception", ("b.0",), 1),
    "two inputs of a concat": ("inception", ("a.0", "c.1"), 2),
    "one of two outputs": ("multi_output", ("*",), 0),
    "all layers": ("residual", ("*",), 0),
}


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("place", PLACES)
def test_places(place: str, dtype: str) -> None:
    name, layers, least = PLACES[place]
    program = mixed(name, *layers)
    assert len(float_islands(program)) >= least
    check_files(program, nets.held_out(16), dtype)
    assert TfliteSession(to_tflite(program)).num_delegates() == 1
    expected = nets.outputs_of(nets.folded(name).graph, nets.held_out(16))[0]
    found = next(iter(run_program(program, {program.inputs[0]: nets.held_out(16)}).values()))
    assert (sqnr_db(expected, found) or 0.0) > (120.0 if not least else 25.0)


def test_what_only_moves_values_stays_in_float_between_float_layers() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.relu(net.stem(x)), 2)
        return net.last(y.flatten(1))

    model = net(forward, last=nn.Linear(100, 5))
    assert kinds(build_program(leave(model, "stem", "last"))) == ["CONV2D", "MAX_POOL2D", "RESHAPE", "LINEAR"]
    first = kinds(build_program(leave(model, "stem")))
    assert first == ["CONV2D", "MAX_POOL2D", "quantize", "reshape", "linear", "dequantize"], (
        "fewer to quantize"
    )
    moved = kinds(build_program(leave(model, "stem", "flatten*")))
    assert moved == ["CONV2D", "MAX_POOL2D", "RESHAPE", "quantize", "linear", "dequantize"]
    last = kinds(build_program(leave(model, "last")))
    assert last == ["quantize", "conv2d", "max_pool2d", "reshape", "dequantize", "LINEAR"]


def test_a_value_read_in_int8_and_in_float() -> None:
    """The float layer gives it as it is to its float reader and quantized to the other."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.stem(x)
        return net.a(y) + net.b(y)

    program = build_program(leave(net(forward, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1)), "stem", "a"))
    assert kinds(program) == ["CONV2D", "quantize", "CONV2D", "quantize", "conv2d", "add", "dequantize"]
    a = layer_op(program, "a")
    assert program.tensors[a.inputs[0]].quant is None
    check_files(program, nets.held_out(8))


def test_pieces_of_a_split() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        a, b = net.stem(x).chunk(2, 1)
        return torch.cat([net.a(a), net.b(b)], 1)

    model = net(forward, a=nn.Conv2d(2, 2, 1), b=nn.Conv2d(2, 2, 1))
    for names in (["stem"], ["stem", "a"], ["a"], ["stem", "a", "b"], ["a", "cat*"]):
        check_files(build_program(leave(model, *names)), nets.held_out(8))


def test_an_operator_alone_between_int8_stays_an_integer_operator_and_says_so() -> None:
    model = nets.folded("residual")
    after = leave(model, "add_1 *")
    assert any(
        w.startswith("float_layers names add_1 (aten.add.Tensor), without weights") for w in after.warnings
    )
    assert float_islands(build_program(after)) == []


def test_all_layers_say_so() -> None:
    after = leave(nets.folded("residual"), "*")
    assert build_program(after).computes_in_float
    assert any("names every layer with weights" in w for w in after.warnings)


def test_names() -> None:
    model = nets.folded("residual")
    names = layer_names(model)
    assert names[0] == "stem.0 (aten.conv2d.default)"
    assert names[-1] == "last.2 (aten.linear.default)"
    assert "add (aten.add.Tensor)" in names
    assert not any("relu" in name or "flatten" in name for name in names), "they follow"
    graph = model.graph
    by_path = {n.name for n in match_layers(graph, ("a1.0",))}
    assert by_path == {n.name for n in match_layers(graph, ("a1.0 (aten.conv2d.default)",))}
    conv, relu = sorted(by_path)
    assert {n.name for n in match_layers(graph, (conv,))} == by_path
    assert {n.name for n in match_layers(graph, (relu,))} == by_path, "a clamp stands for its layer"
    assert len(match_layers(graph, ("?1.0",))) == 3
    for name in names:
        assert match_layers(graph, (name,))
    assert plan_float(graph, frozenset()).nodes == frozenset()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "a1.1",
            r"float_layers names 'a1\.1', and the network has no such layer.*mean 'a1\.2' or 'a1\.0' or '",
        ),
        ("stem", r"no such layer.*2 layers lie inside it: 'stem\.\*' names them all"),
        ("features.99.conv", r"no such layer.*edgecnn inspect MODEL"),
    ],
)
def test_names_of_nothing(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantizeStatic(float_layers=(name,)).requires(nets.folded("residual"))


def test_no_name() -> None:
    with pytest.raises(RecipeError, match=r"float_layers is \('',\), expected names of layers"):
        QuantizeStatic(float_layers=("",)).check()


@pytest.mark.parametrize("step", [
    QuantizeStatic(rounding="adaround", iterations=10),
    QuantizeStatic(rounding="brecq", iterations=10),
    QuantizeStatic(bias_method="in_order"),
    QuantizeStatic(bias_method="batch_norm"),
    QuantizeStatic(weight_bits=7, weight_observer="mse", observer="percentile"),
], ids=lambda step: f"{step.rounding}-{step.bias_method}-{step.weight_bits}")  # fmt: skip
@pytest.mark.parametrize("layers", [("stem.0",), ("a1.0", "last.2"), ("*",)])
def test_every_algorithm_leaves_them_alone(step: QuantizeStatic, layers: Sequence[str]) -> None:
    model = nets.folded("residual")
    after = leave(model, *layers, step=step)
    for name in ("stem.0", "a1.0", "last.2"):
        if name in layers or layers == ("*",):
            weight = build_program(after).tensors[layer_op(build_program(after), name).inputs[1]].data
            kept = build_program(model).tensors[layer_op(build_program(model), name).inputs[1]].data
            assert np.array_equal(weight, kept)
    expected = nets.outputs_of(model.graph, nets.held_out(32))[0]
    assert (sqnr_db(expected, nets.outputs_of(after.graph, nets.held_out(32))[0]) or 0.0) > 25.0


def test_float_layers_bring_the_network_nearer_to_float() -> None:
    model, x = nets.folded("residual"), nets.held_out(64)
    expected = nets.outputs_of(model.graph, x)[0]
    noise = [
        sqnr_db(expected, nets.outputs_of(leave(model, *names).graph, x)[0]) or 0.0
        for names in ((), tuple(layer_names(model)[6:]), ("*",))
    ]
    assert noise[0] + 1.0 < noise[1] < noise[2]
