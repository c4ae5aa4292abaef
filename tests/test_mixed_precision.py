"""Files with layers in float: integers at the ends, what the runtimes make of them, recipes, sensitivity."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx_session
import pytest
import running
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mixing import check_files, layer_op, leave, mixed, net, optimized
from rich.console import Console
from tflite_session import TfliteSession
from torch import nn
from torch.utils import _pytree as pytree

from edgecnn.errors import ExportError
from edgecnn.export import onnx_graph
from edgecnn.export.onnx import OnnxOptions, to_onnx
from edgecnn.export.parity import Comparison, first_difference, output_scales, sqnr_db
from edgecnn.export.tflite import TfliteOptions, to_tflite
from edgecnn.export.trace import trace_onnx, trace_tflite
from edgecnn.graph.build import build_program
from edgecnn.graph.program import BATCH, Op, Program, QuantParams, Tensor
from edgecnn.load import load_model
from edgecnn.quantize.float_layers import layer_names, match_layers
from edgecnn.quantize.mixed import MixedGraph, mixed_outputs
from edgecnn.quantize.reference import run_op, run_program
from edgecnn.quantize.static import QuantizeStatic
from edgecnn.report.diagnosis import print_precision


def _with_bias(program: Program, op: Op, offset: float) -> Program:
    bias = program.tensors[op.inputs[2]]
    assert bias.data is not None
    changed = dataclasses.replace(bias, data=bias.data + np.float32(offset))
    return dataclasses.replace(program, tensors={**program.tensors, bias.name: changed})


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
    assert difference.fraction > 0.01, "ten times what is allowed"


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


def test_the_pool_behind_a_float_layer_stays_in_float_in_onnx_runtime(tmp_path: Path) -> None:
    """Moved ahead of it, QuantizeLinear would make it a pool of uint8 in NCHW order, 30 times as slow."""
    model = net(lambda net, x: net.last(F.max_pool2d(net.stem(x), 2)), last=nn.Conv2d(4, 4, 3))
    nodes = optimized(build_program(leave(model, "stem")), tmp_path)
    (pool,) = [n for n in nodes if n.op_type == "MaxPool"]
    (quantize,) = [n for n in nodes if n.op_type == "QuantizeLinear"]
    assert nodes.index(pool) < nodes.index(quantize)


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
    assert "by the recipe: features.0, features.2" in " ".join(done.stdout.split())
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


@pytest.mark.parametrize("name", ["residual", "se_conv", "splits", "mixed_concat", "inception", "hard_swish"])
def test_the_simulation_is_what_a_network_quantized_so_gives(name: str) -> None:
    """Its scales too, which follow from what computes in float; a bias in other steps is all that is left."""
    model, full, x = nets.folded(name), nets.quantized(name), nets.held_out(16)
    graph, expected = MixedGraph(full.graph, model.graph), nets.outputs_of(model.graph, x)[0]
    names = layer_names(model)
    for layers in ((names[0],), tuple(names[1::2]), tuple(names[-2:]), tuple(names)):
        step = dataclasses.replace(nets.STEP, float_layers=layers)
        nodes = {node.name for node in match_layers(model.graph, step.float_layers)}
        (predicted,) = mixed_outputs(graph, [torch.from_numpy(x)], nodes)
        first = pytree.tree_leaves(predicted)[0].numpy()
        found = nets.outputs_of(leave(model, *layers).graph, x)[0]
        noise = sqnr_db(expected, found) or 0.0
        if layers == tuple(names):
            np.testing.assert_allclose(first, found, atol=1e-5)
        else:
            assert sqnr_db(expected, first) == pytest.approx(noise, abs=0.1)


def test_inspect_says_which_layers_to_leave(examples_dir: Path) -> None:
    arguments = (examples_dir / "lenet5_digits.pt2", "--int8", "--sensitivity", "--data", "digits")
    done = running.run("inspect", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["sensitivity"]
    noise = [entry["sqnr_db"] for entry in found["layers"]]
    assert noise == sorted(noise)
    points = found["points"]
    assert points[0]["float_layers"] == []
    assert points[-1]["sqnr_db"] == 200.0
    assert [len(p["layers"]) for p in points] == [len(p["float_layers"]) for p in points]
    model = nets.prepare(load_model(examples_dir / "lenet5_digits.pt2"))
    for point in points:
        QuantizeStatic(float_layers=tuple(point["float_layers"])).requires(model)


def test_the_letter_shows_them() -> None:
    layer = {"layer": "stem (aten.conv2d.default)", "sqnr_db": 31.25, "agreement": 0.5, "macs": 1200}
    points = [
        {"layers": [], "float_macs_share": 0.0, "sqnr_db": 30.0, "agreement": None},
        {
            "layers": ["stem (aten.conv2d.default)"],
            "float_macs_share": 0.125,
            "sqnr_db": 36.0,
            "agreement": 1.0,
        },
        {"layers": ["a", "b"], "float_macs_share": 1.0, "sqnr_db": 200.0, "agreement": 1.0},
    ]
    console = Console(width=90, record=True, file=io.StringIO())
    print_precision({"num_samples": 8, "source": "digits", "layers": [layer], "points": points}, console)
    text = " ".join(console.export_text().split())
    assert "Each layer alone in int8, on 8 images of digits" in text
    assert "stem 31.2 dB 50.00 % 1.20 k" in text
    assert "1 12.5 % 36.0 dB 100 % stem" in text
    assert "2 100 % as float 100 % all" in text


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


def test_an_average_in_float_may_round_ties_either_way() -> None:
    check_any(("pools", ("conv2d_default_1 (aten.conv2d.default)",)))


def check_any(choice: tuple[str, tuple[str, ...]]) -> None:
    name, layers = choice
    program = build_program(leave(nets.folded(name), *layers))
    check_files(program, nets.held_out(16))


@pytest.mark.parametrize(
    ("max_lsb", "fraction", "kept"), [(3, 0.99, True), (3, 0.9899, False), (4, 1.0, False), (0, 1.0, True)]
)
def test_the_contract_of_outputs_behind_float_layers(max_lsb: int, fraction: float, kept: bool) -> None:
    assert Comparison(max_lsb, fraction, None, 1).holds_mixed is kept


@pytest.mark.parametrize(("differing", "is_found"), [(6, False), (7, True)])
def test_how_many_values_may_flip(differing: int, is_found: bool) -> None:
    """Of 3,000 values behind a float layer 0.1 % and 3 more: 6."""
    scale = QuantParams(np.asarray(1.0, np.float32))
    tensors = {
        "x": Tensor("x", (BATCH, 3000)),
        "y": Tensor("y", (BATCH, 3000)),
        "q": Tensor("q", (BATCH, 3000), "int8", scale),
    }
    ops = (
        Op("clamp", ("x",), "y", {"clamp": (0.0, None)}, "relu"),
        Op("quantize", ("y",), "q", layer="relu"),
    )
    program = Program("p", ("x",), (("q", "q"),), tensors, ops)
    x = np.full((1, 3000), 2.0, np.float32)
    traced = np.full((1, 3000), 2, np.int8)
    traced[0, :differing] += 1
    assert (first_difference(program, {"q": traced}, {"x": x}, run_op) is not None) is is_found
    traced[0, 0] = 4
    difference = first_difference(program, {"q": traced}, {"x": x}, run_op)
    assert difference is not None, "one value two steps off is too far"
    assert (
        str(difference) == f"relu, quantize: 2 LSB off, {100 * differing / 3000:.3g} % of its values differ"
    )
