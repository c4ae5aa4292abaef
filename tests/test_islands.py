"""Operators without an int8 form: what stays in float with them, and what the user is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import nets
import pytest
import small_networks
import torch
import torch.nn.functional as F
from mixing import check_files, kinds
from torch import Tensor, nn

import edgecnn
from edgecnn.cli.main import main
from edgecnn.diagnosis.letter import diagnose
from edgecnn.errors import RecipeError, UnsupportedOpError
from edgecnn.graph.build import build_program, float_islands
from edgecnn.graph.cost import float_cost
from edgecnn.graph.program import Program
from edgecnn.graph.shapes import infer_shapes
from edgecnn.load import LoadOptions
from edgecnn.model import Model
from edgecnn.pipeline import PassContext
from edgecnn.quantize.cut import FlowGraph
from edgecnn.quantize.islands import plan_islands, unknown_operators
from edgecnn.quantize.mixed import MixedGraph
from edgecnn.quantize.static import QuantizeStatic

PLAIN = QuantizeStatic(observer="min_max", bias_correction=False, weight_bits=nets.STEP.weight_bits)


def make(function: Any, **layers: nn.Module) -> Model:
    torch.manual_seed(0)
    net = nets.Net({"stem": nn.Conv2d(3, 8, 3), **layers}, function).eval()
    return nets.prepare(nets.as_model(net))


def quantize(model: Model, step: QuantizeStatic = PLAIN) -> tuple[Program, PassContext]:
    context = nets.context()
    step.check()
    step.requires(model)
    after = step.run(model, context)
    step.ensures(model, after)
    return build_program(after), context


def norm_block(net: Any, x: Tensor) -> Tensor:
    y = net.norm(net.stem(x).permute(0, 2, 3, 1))
    return net.down(F.gelu(net.up(y))).permute(0, 3, 1, 2)


BLOCK = {"norm": nn.LayerNorm(8), "up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}


def test_a_convnext_block_keeps_its_layers_in_int8() -> None:
    program, context = quantize(make(norm_block, **BLOCK))
    assert kinds(program) == [
        *("quantize", "conv2d", "transpose", "dequantize", "NORMALIZE", "MUL", "ADD", "quantize"),
        *("linear", "dequantize", "GELU", "quantize", "linear", "transpose", "dequantize"),
    ]
    assert context.records == [
        {
            "pass": "quantize_static",
            "kind": "float_islands",
            "operators": [
                {"layer": "norm (aten.layer_norm.default)", "why": "no int8 form"},
                {"layer": "gelu (aten.gelu.default)", "why": "no int8 form"},
            ],
            "pieces": 2,
        }
    ]
    check_files(program, nets.held_out(8))


def test_what_it_costs_is_counted() -> None:
    program, _ = quantize(make(norm_block, **BLOCK))
    cost = float_cost(program)
    assert (cost.macs_share, cost.conversions) == (0.0, 4)
    assert cost.values == 100 * (8 + 8 + 16 + 16)  # 10 x 10 pixels


def attention(net: Any, x: Tensor) -> Tensor:
    q, k, v = net.qkv(net.stem(x).flatten(2).transpose(1, 2)).chunk(3, 2)
    scores = torch.softmax(q @ k.transpose(1, 2) * 0.5 + 1.0, 2)
    return net.out(scores @ v)


def test_an_attention_is_one_piece() -> None:
    program, context = quantize(make(attention, qkv=nn.Linear(8, 24), out=nn.Linear(8, 4)))
    found = kinds(program)
    assert found[found.index("MATMUL") :].count("quantize") == 1
    assert [k for k in found if k.isupper() and k != "TRANSPOSE"] == [
        *("MATMUL", "MUL", "ADD", "SOFTMAX", "MATMUL"),
    ]
    (record,) = context.records
    assert record["pieces"] == 1
    why = {o["layer"].split(" (")[1]: o["why"] for o in record["operators"]}
    assert why["aten.softmax.int)"] == "spares conversions between int8 and float"
    assert why["aten.matmul.default)"] == "no int8 form"
    check_files(program, nets.held_out(8))


def residual_stream(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x).flatten(2).transpose(1, 2)
    x = x + net.a(net.norm_a(x))
    x = x + net.b(net.norm_b(x))
    return net.head(net.norm_c(x).mean(1))


def test_sums_that_every_norm_reads_stay_in_float() -> None:
    layers = {f"norm_{name}": nn.LayerNorm(8) for name in "abc"}
    layers |= {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "head": nn.Linear(8, 3)}  # type: ignore[dict-item]
    program, _ = quantize(make(residual_stream, **layers))
    found = kinds(program)
    # 'ADD' twice for the sums, three times for the norms' biases; none between integers
    assert (found.count("ADD"), found.count("add")) == (5, 0)
    assert found[-4:] == ["MEAN", "quantize", "linear", "dequantize"], "fewer values behind the mean"
    check_files(program, nets.held_out(8))


def test_what_lies_beside_operators_that_are_all_named_follows_them() -> None:
    layers = {f"norm_{name}": nn.LayerNorm(8) for name in "abc"}
    layers |= {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "head": nn.Linear(8, 3)}  # type: ignore[dict-item]
    step = dataclasses.replace(PLAIN, float_layers=("norm_*",))
    program, context = quantize(make(residual_stream, **layers), step)
    (record,) = context.records
    assert record["kind"] == "float_layers"
    assert {layer for layer in record["layers"] if "norm" not in layer} == {
        "add (aten.add.Tensor)",
        "add_1 (aten.add.Tensor)",
        "mean (aten.mean.dim)",
    }
    assert set(float_islands(program)) <= set(record["layers"])


def test_the_cut_by_hand() -> None:
    """Float a, free x and y, int8 b: a - 5 - x - 2 - y - 5 - b is cut in the middle."""
    graph = FlowGraph()
    for first, second, capacity in (("a", "x", 5), ("x", "y", 2), ("y", "b", 5)):
        graph.connect(first, second, capacity)
    assert graph.far_side("a", "b") == {"y", "b"}


def test_of_two_cuts_the_one_with_more_in_float() -> None:
    graph = FlowGraph()
    for first, second in (("a", "x"), ("x", "b")):
        graph.connect(first, second, 1)
    assert graph.far_side("a", "b") == {"b"}


def test_a_network_the_scheme_knows_is_left_alone() -> None:
    model = nets.folded("residual")
    assert unknown_operators(model.graph) == []
    assert plan_islands(model.graph, frozenset(), infer_shapes(model)).nodes == frozenset()


def test_named_layers_and_islands_together() -> None:
    program, context = quantize(make(norm_block, **BLOCK), dataclasses.replace(PLAIN, float_layers=("up",)))
    assert kinds(program) == [
        *("quantize", "conv2d", "transpose", "dequantize", "NORMALIZE", "MUL", "ADD"),
        *("LINEAR", "GELU", "quantize", "linear", "transpose", "dequantize"),
    ]
    asked, islands = context.records
    assert asked["layers"] == ["up (aten.linear.default)"]
    assert [o["layer"] for o in islands["operators"]] == [
        "norm (aten.layer_norm.default)",
        "gelu (aten.gelu.default)",
    ]
    assert islands["pieces"] == 1
    check_files(program, nets.held_out(8))


def test_islands_can_be_forbidden() -> None:
    model = make(norm_block, **BLOCK)
    step = dataclasses.replace(PLAIN, unsupported="error")
    message = (
        r"^2 operators have no int8 form, first norm \(aten\.layer_norm\.default\), gelu "
        r"\(aten\.gelu\.default\), and unsupported is 'error' \(hint: unsupported = \"float\" leaves them"
    )
    with pytest.raises(UnsupportedOpError, match=message):
        step.run(model, nets.context())
    named = dataclasses.replace(step, float_layers=("norm", "gelu*"))
    assert len(float_islands(quantize(model, named)[0])) == 4
    with pytest.raises(RecipeError, match=r"unsupported is 'int16', expected one of float, error"):
        dataclasses.replace(PLAIN, unsupported="int16").check()


def test_an_operator_without_any_lowering_is_refused_by_name() -> None:
    model = make(lambda net, x: net.out(net.stem(x).cumsum(1).mean((2, 3))), out=nn.Linear(8, 4))
    with pytest.raises(
        UnsupportedOpError, match=r"cumsum.*has no lowering to ONNX and TFLite.*inspect MODEL"
    ):
        build_program(PLAIN.run(model, nets.context()))


def test_a_network_of_nothing_but_float_says_so() -> None:
    after = PLAIN.run(make(lambda net, x: F.gelu(x)), nets.context())
    assert build_program(after).computes_in_float
    assert any("no layer with weights has an int8 form" in w for w in after.warnings)


def test_the_letter_says_it_ahead() -> None:
    torch.manual_seed(0)
    net = nets.Net({"stem": nn.Conv2d(3, 8, 3), **BLOCK}, norm_block).eval()
    found = {f["check"]: f for f in diagnose(net, LoadOptions(input_shape=nets.SHAPE))["findings"]}
    islands = found["float_islands"]
    assert islands["title"] == "2 operators without an int8 form: layer_norm (1), gelu (1)"
    assert (islands["level"], islands["layers"]) == ("warning", ["norm", "gelu"])
    assert 'unsupported = "error"' in islands["action"]
    assert found["swish"]["level"] == "warning"


def test_sensitivity_knows_of_islands() -> None:
    """Each layer alone in int8, in a network of which some operators stay in float anyway."""
    model = make(norm_block, **BLOCK)
    quantized = PLAIN.run(model, nets.context())
    mixed = MixedGraph(quantized.graph, model.graph, infer_shapes(model))
    x = torch.from_numpy(nets.held_out(4))
    mixed.leave(())
    with torch.inference_mode():
        assert torch.equal(mixed.run_batch(x), quantized.graph(x))
    names = [node.name for node in model.graph.graph.nodes if node.op == "call_function"]
    mixed.leave(names)
    with torch.inference_mode():
        torch.testing.assert_close(mixed.run_batch(x), model.graph(x))


def test_a_float_operator_alone_between_integers_is_dequantized() -> None:
    """Its inputs and its output are held in int8, and there is no integer kernel of that kind."""
    program, _ = quantize(make(lambda net, x: net.out(F.gelu(net.stem(x))), out=nn.Conv2d(8, 4, 1)))
    assert kinds(program) == ["quantize", "conv2d", "dequantize", "GELU", "quantize", "conv2d", "dequantize"]
    check_files(program, nets.held_out(8))


def test_a_run_says_what_is_left_in_float_and_what_it_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = LoadOptions(input_shape=small_networks.SIZE, preprocess="unit")
    options = edgecnn.CompressOptions(num_samples=32, measure=False, load=load)
    edgecnn.compress(
        small_networks.Transformer().eval(), data="small_networks:images", out=tmp_path, options=options
    )
    report = json.loads((tmp_path / "report.json").read_text())
    (detail,) = [d for d in report["details"] if d["kind"] == "float_islands"]
    why = {o["layer"]: o["why"] for o in detail["operators"]}
    assert why["norm (aten.layer_norm.default)"] == "no int8 form"
    assert why["attention (aten.scaled_dot_product_attention.default)"] == "no int8 form"
    assert "add (aten.add.Tensor)" not in why, "between two layers in int8"
    # 16 tokens of 8 channels: 2 x 16 x 16 x 8 for scores and weighted values; the layers read 48, 8, 8 values
    layers = 16 * 8 * (48 + 24 + 8) + 8 * 5
    assert detail["macs_share"] == pytest.approx(4096 / (4096 + layers))
    text = "2 operators without an int8 form (1 layer_norm, 1 scaled_dot_product_attention)"
    assert any(text in warning for warning in report["warnings"])
    assert not any("are left in float, first" in warning for warning in report["warnings"])
    page = (tmp_path / "report.html").read_text()
    assert "Operators left in float" in page
    capsys.readouterr()
    assert main(["inspect", "small_networks:Transformer", "--input-shape", "3x16x16", "--int8"]) == 0
    assert "2 operators without an int8 form" in " ".join(capsys.readouterr().out.split())
