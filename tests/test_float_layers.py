"""Layers left in float in an int8 network: what follows from a name, and both files with their reference."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import onnx_session
import pytest
import running
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tflite_session import TfliteSession
from torch import Tensor, nn

from edgecnn.errors import ExportError, RecipeError
from edgecnn.export import onnx_graph
from edgecnn.export.onnx import OnnxOptions, to_onnx
from edgecnn.export.parity import compare, first_difference, output_scales, sqnr_db
from edgecnn.export.tflite import TfliteOptions, to_tflite
from edgecnn.export.trace import trace_onnx, trace_tflite
from edgecnn.graph.build import build_program, float_islands
from edgecnn.graph.program import Array, Op, Program
from edgecnn.model import Model
from edgecnn.pipeline import PassContext
from edgecnn.quantize.float_layers import layer_names, match_layers, plan_float
from edgecnn.quantize.reference import run_op, run_program
from edgecnn.quantize.static import QuantizeStatic

PLAIN = QuantizeStatic(observer="min_max", bias_correction=False)


def leave(model: Model, *names: str, step: QuantizeStatic = nets.STEP) -> Model:
    """Return the network in int8 but for what is named, checked as a recipe's pass is."""
    step = dataclasses.replace(step, float_layers=tuple(name.replace("[", "[[]") for name in names))
    step.check()
    step.requires(model)
    after = step.run(model, nets.context())
    step.ensures(model, after)
    return after


def mixed(name: str, *names: str) -> Program:
    return build_program(leave(nets.folded(name), *names))


def kinds(program: Program) -> list[str]:
    """Return the operators in order, those in float in capitals."""
    found = []
    for op in program.ops:
        is_border = op.kind in ("quantize", "dequantize")
        in_float = program.tensors[op.output].quant is None and not is_border
        found.append(op.kind.upper() if in_float else op.kind)
    return found


def layer_op(program: Program, layer: str) -> Op:
    """Return the convolution or linear operator of a layer."""
    return next(op for op in program.ops if op.layer.startswith(f"{layer} ") and len(op.inputs) == 3)


def check_files(program: Program, x: Array, dtype: str = "uint8") -> None:
    """Both files give what the reference gives, within the contract, and operator by operator."""
    feeds = {program.inputs[0]: x}
    expected, scales = run_program(program, feeds), output_scales(program)
    found = {
        "onnx": onnx_session.run(to_onnx(program, OnnxOptions(activation_dtype=dtype)), feeds),
        "tflite": TfliteSession(to_tflite(program)).run(feeds),
    }
    for runtime, values in found.items():
        comparison = compare(expected, values, scales)
        assert comparison.max_lsb <= 2, runtime
        assert comparison.fraction_within_1_lsb >= 0.999, runtime
    assert first_difference(program, trace_onnx(program, feeds, dtype), feeds, run_op) is None
    assert first_difference(program, trace_tflite(program, feeds), feeds, run_op) is None


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


def net(function: Any, **layers: nn.Module) -> Model:
    torch.manual_seed(0)
    return nets.as_model(nets.Net({"stem": nn.Conv2d(3, 4, 3), **layers}, function).eval())


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


@pytest.mark.parametrize("layer", ["stem.0", "last.2"])
def test_integers_at_a_float_end_are_refused(layer: str) -> None:
    program = mixed("residual", layer)
    for write in (
        lambda: to_onnx(program, OnnxOptions(io="int8")),
        lambda: to_tflite(program, TfliteOptions("int8")),
    ):
        with pytest.raises(
            ExportError, match=r"(input 'x'|output 'output').* or leave the layer there in int8"
        ):
            write()


@pytest.mark.parametrize("io", ["int8", "uint8"])
def test_integers_at_both_ends_of_a_network_with_a_float_layer(io: Any) -> None:
    program = mixed("residual", "a1.0")
    feeds = {program.inputs[0]: nets.held_out(4)}
    quantized = program.tensors[program.ops[0].output].quant
    assert quantized is not None
    shift = 128 if io == "uint8" else 0
    q = (quantized.quantize(feeds["x"]).astype(np.int16) + shift).astype(io)
    expected = next(iter(run_program(program, feeds).values()))
    scale = next(iter(output_scales(program).values()))
    for found in (
        onnx_session.run(to_onnx(program, OnnxOptions(io=io)), {"x": q}),
        TfliteSession(to_tflite(program, TfliteOptions(io))).run({"x": q}),
    ):
        y = next(iter(found.values()))
        last = program.tensors[program.ops[-1].inputs[0]].quant
        real = (y.astype(np.float32) - shift - last.zero_point) * scale
        assert np.abs(real - expected).max() <= 1.01 * scale


def optimized(program: Program, folder: Path) -> list[onnx.NodeProto]:
    """Return the nodes that ONNX Runtime really runs."""
    path = folder / "optimized.onnx"
    onnx_session.open_session(to_onnx(program), path)
    return list(onnx.load(path).graph.node)


@pytest.mark.parametrize("layer", ["a1.0", "b2.0", "stem.0", "last.2"])
def test_onnx_runtime_leaves_that_layer_in_float_and_all_else_in_integers(layer: str, tmp_path: Path) -> None:
    nodes = optimized(mixed("residual", layer), tmp_path)
    real = [n for n in nodes if n.op_type in ("Conv", "FusedConv", "Gemm", "FusedGemm")]
    program = mixed("residual", layer)
    made = layer_op(program, layer).output
    assert [n.name.split("/")[0].removesuffix("_nchwc") for n in real] in ([made], [layer])
    integer = [n.op_type for n in nodes if n.op_type.startswith("Q") and n.op_type != "QuantizeLinear"]
    all_int8 = [
        n.op_type
        for n in optimized(nets.quantized_program("residual"), tmp_path)
        if n.op_type.startswith("Q") and n.op_type != "QuantizeLinear"
    ]
    assert len(integer) == len(all_int8) - 1, "its neighbours keep their kernels"


def test_a_layer_that_the_runtime_quantizes_after_all_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the shield ONNX Runtime rounds the weights; the outputs alone hardly show it."""
    program = mixed("residual", "b1.0")
    feeds = {program.inputs[0]: nets.held_out(2)}
    assert first_difference(program, trace_onnx(program, feeds, "uint8"), feeds, run_op) is None
    monkeypatch.setattr(onnx_graph, "borders_to_shield", lambda _: frozenset())
    difference = first_difference(program, trace_onnx(program, feeds, "uint8"), feeds, run_op)
    assert difference is not None
    assert difference.op.layer == "b1.0 (aten.conv2d.default)"
    assert difference.fraction > 0.01


def test_a_wrong_float_layer_is_found_by_name() -> None:
    """Its bias 2 % of the range too high: less than the rounding of int8 neighbours adds up to."""
    program = mixed("residual", "last.2", "a1.0")
    for layer, kind in (("a1.0", "quantize"), ("last.2", "linear")):
        wrong = _with_bias(program, layer_op(program, layer), 0.1)
        feeds = {program.inputs[0]: nets.held_out(2)}
        difference = first_difference(program, trace_tflite(wrong, feeds), feeds, run_op)
        assert difference is not None
        assert (difference.op.layer.split(" ")[0], difference.op.kind) == (layer, kind)
        assert str(difference).startswith(layer)


def _with_bias(program: Program, op: Op, offset: float) -> Program:
    bias = program.tensors[op.inputs[2]]
    assert bias.data is not None
    changed = dataclasses.replace(bias, data=bias.data + np.float32(offset))
    return dataclasses.replace(program, tensors={**program.tensors, bias.name: changed})


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


@st.composite
def choices(draw: st.DrawFn) -> tuple[str, tuple[str, ...]]:
    name = draw(st.sampled_from(sorted(nets.NETS)))
    names = layer_names(nets.folded(name))
    return name, tuple(draw(st.lists(st.sampled_from(names), min_size=1, unique=True)))


QUIET: Any = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=12, derandomize=True, **QUIET)
@given(choices())
def test_any_layers_of_any_network(choice: tuple[str, tuple[str, ...]]) -> None:
    check_any(choice)


@pytest.mark.slow
@settings(max_examples=200, derandomize=True, **QUIET)
@given(choices())
def test_many_layers_of_any_network(choice: tuple[str, tuple[str, ...]]) -> None:
    check_any(choice)


def check_any(choice: tuple[str, tuple[str, ...]]) -> None:
    name, layers = choice
    program = build_program(leave(nets.folded(name), *layers))
    check_files(program, nets.held_out(16))


def test_the_pool_behind_a_float_layer_stays_in_float_in_onnx_runtime(tmp_path: Path) -> None:
    """Moved ahead of it, QuantizeLinear would make it a pool of uint8 in NCHW order, 30 times as slow."""
    model = net(lambda net, x: net.last(F.max_pool2d(net.stem(x), 2)), last=nn.Conv2d(4, 4, 3))
    nodes = optimized(build_program(leave(model, "stem")), tmp_path)
    (pool,) = [n for n in nodes if n.op_type == "MaxPool"]
    (quantize,) = [n for n in nodes if n.op_type == "QuantizeLinear"]
    assert nodes.index(pool) < nodes.index(quantize)


RECIPE = """
name = "mixed"
[[passes]]
pass = "fold_batch_norm"
[[passes]]
pass = "quantize_static"
float_layers = ["features.0", "LAYER"]
"""


def compress_example(tmp_path: Path, examples_dir: Path, layer: str) -> subprocess.CompletedProcess[str]:
    recipe = tmp_path / "mixed.toml"
    recipe.write_text(RECIPE.replace("LAYER", layer))
    model, out = examples_dir / "lenet5_digits.pt2", tmp_path / "out"
    return running.run("compress", model, "--recipe", recipe, "--data", "digits", "-o", out)


def test_a_recipe_with_float_layers(tmp_path: Path, examples_dir: Path) -> None:
    done = compress_example(tmp_path, examples_dir, "classifier.*")
    assert done.returncode == 0, done.stderr
    assert "as asked: features.0, features.2" in " ".join(done.stdout.split())
    assert "left in float" not in done.stdout, "a wish is no warning"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (detail,) = [d for d in report["details"] if d["kind"] == "float_layers"]
    assert detail["asked"] == ["features.0", "classifier.*"]
    assert detail["layers"][0] == "features.0 (aten.conv2d.default)"
    assert sum("classifier" in layer for layer in detail["layers"]) >= 3
    assert report["passes"][-1]["parameters"]["float_layers"] == ["features.0", "classifier.*"]
    for pair in report["parity"].values():
        assert pair["max_lsb"] <= 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Layers in float" in page
    sidecar = json.loads((tmp_path / "out" / "model.onnx.json").read_text())
    assert sidecar["history"][-1]["parameters"]["float_layers"] == ["features.0", "classifier.*"]


def test_a_recipe_with_a_misspelt_layer(tmp_path: Path, examples_dir: Path) -> None:
    done = compress_example(tmp_path, examples_dir, "clasifier.1")
    assert done.returncode == 1
    assert "float_layers names 'clasifier.1', and the network has no such layer" in done.stderr
    assert "did you mean 'classifier.1' or 'classifier." in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
