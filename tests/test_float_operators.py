"""Operators that compute in float alone: NumPy reference, ONNX Runtime and LiteRT against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nets
import numpy as np
import onnx_session
import pytest
import torch
import torch.nn.functional as F
from tflite_session import TfliteSession
from torch import Tensor, nn

from edgecnn.errors import UnsupportedOpError
from edgecnn.export.onnx import OnnxOptions, to_onnx
from edgecnn.export.parity import MAX_RELATIVE_ERROR, relative_error
from edgecnn.export.tflite import to_tflite
from edgecnn.graph.build import build_program
from edgecnn.graph.einsum import parse_product
from edgecnn.graph.program import BATCH, Op, Program
from edgecnn.graph.program import Tensor as ProgramTensor
from edgecnn.quantize.reference import run_program
from edgecnn.quantize.static import QuantizeStatic

Function = Callable[[Any, Tensor], Any]


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


OPERATORS: dict[str, tuple[Function, dict[str, nn.Module]]] = {
    "layer_norm of tokens": (lambda net, x: net.norm(tokens(net.stem(x))), {"norm": nn.LayerNorm(8)}),
    "layer_norm of channels": (
        lambda net, x: net.norm(net.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        {"norm": nn.LayerNorm(8)},
    ),
    "layer_norm without weights": (lambda net, x: F.layer_norm(net.stem(x), (8, 10, 10)), {}),
    "group_norm": (lambda net, x: net.norm(net.stem(x)), {"norm": nn.GroupNorm(4, 8)}),
    "group_norm of one group": (lambda net, x: net.norm(net.stem(x)), {"norm": nn.GroupNorm(1, 8)}),
    "instance_norm": (lambda net, x: F.instance_norm(net.stem(x)), {}),
    "gelu": (lambda net, x: F.gelu(net.stem(x)), {}),
    "gelu by tanh": (lambda net, x: F.gelu(net.stem(x), approximate="tanh"), {}),
    "elu": (lambda net, x: F.elu(net.stem(x)), {}),
    "mish": (lambda net, x: F.mish(net.stem(x)), {}),
    "softplus": (lambda net, x: F.softplus(20.0 * net.stem(x)), {}),
    "prelu": (lambda net, x: net.slope(net.stem(x)), {"slope": nn.PReLU(8)}),
    "exp, abs, sqrt, log": (lambda net, x: (torch.exp(net.stem(x)).abs().sqrt() + 1.0).log(), {}),
    "rsqrt, sin, cos": (lambda net, x: torch.rsqrt(net.stem(x).sin().cos() + 2.0), {}),
    "powers": (lambda net, x: net.stem(x) ** 2 + net.stem(x) ** 3 + (net.stem(x).abs() + 1) ** -0.5, {}),
    "a quotient": (lambda net, x: net.stem(x) / (net.stem(x).abs() + 1.0), {}),
    "normalized": (lambda net, x: F.normalize(tokens(net.stem(x)), dim=-1), {}),
    "matmul": (lambda net, x: tokens(net.stem(x)) @ net.stem(x).flatten(2), {}),
    "matmul of heads": (
        lambda net, x: net.stem(x).view(-1, 2, 4, 100).transpose(2, 3) @ net.stem(x).view(-1, 2, 4, 100),
        {},
    ),
    "bmm": (lambda net, x: torch.bmm(tokens(net.stem(x)), net.stem(x).flatten(2)), {}),
    "attention": (
        lambda net, x: F.scaled_dot_product_attention(*net.qkv(tokens(net.stem(x))).chunk(3, 2)),
        {"qkv": nn.Linear(8, 24)},
    ),
    "attention with a mask": (
        lambda net, x: F.scaled_dot_product_attention(
            *net.qkv(tokens(net.stem(x))).chunk(3, 2), attn_mask=torch.ones(100, 100).tril().bool()
        ),
        {"qkv": nn.Linear(8, 24)},
    ),
    "einsum of two activations": (
        lambda net, x: torch.einsum("bchw,bdhw->bcd", net.stem(x), net.stem(x)),
        {},
    ),
    "roll": (lambda net, x: torch.roll(net.stem(x), (1, -3), (2, 3)), {}),
    "reflected padding": (lambda net, x: F.pad(net.stem(x), (1, 2, 3, 0), mode="reflect"), {}),
    "windows": (lambda net, x: net.stem(x).unfold(2, 4, 3).unfold(3, 4, 3).amax((4, 5)), {}),
    "stack and sum": (
        lambda net, x: torch.stack([net.stem(x), x[:, :1, 1:-1, 1:-1] * net.stem(x)], 1).sum(1),
        {},
    ),
    "a convolution of channels": (
        lambda net, x: net.line(net.stem(x).mean((2, 3)).unsqueeze(1)),
        {"line": nn.Conv1d(1, 2, 3, padding=1)},
    ),
    "a pool of channels": (lambda net, x: F.avg_pool1d(net.stem(x).mean(3), 2), {}),
    "a convolution of depth 1": (
        lambda net, x: net.cube(net.stem(x).permute(0, 2, 3, 1).unsqueeze(1)),
        {"cube": nn.Conv3d(1, 3, (3, 3, 1), padding=(1, 1, 0))},
    ),
    "copies": (
        lambda net, x: net.stem(x)[:, :, None].expand(-1, -1, 3, -1, -1).reshape(-1, 24, 10, 10),
        {},
    ),
    "cropped and padded": (lambda net, x: F.pad(net.stem(x), (-1, 1, -2, 0)), {}),
    "picked channels": (lambda net, x: net.stem(x)[:, torch.tensor([3, 0, 0, 7])], {}),
    "addcmul": (lambda net, x: torch.addcmul(net.stem(x), net.stem(x), torch.tensor(0.5)), {}),
}


def model_of(function: Function, **layers: nn.Module) -> Any:
    torch.manual_seed(0)
    net = nets.Net({"stem": nn.Conv2d(3, 8, 3), **layers}, function).eval()
    return net, nets.prepare(nets.as_model(net))


@pytest.mark.parametrize("name", OPERATORS)
def test_float_files(name: str) -> None:
    net, model = model_of(OPERATORS[name][0], **OPERATORS[name][1])
    program, x = build_program(model), nets.held_out(3)
    feeds = {program.inputs[0]: x}
    expected = dict(zip((public for public, _ in program.outputs), nets.outputs_of(net, x), strict=True))
    for found in (
        run_program(program, feeds),
        onnx_session.run(to_onnx(program), feeds),
        onnx_session.run(to_onnx(program, OnnxOptions(opset=13)), feeds),
        onnx_session.run(to_onnx(program, OnnxOptions(opset=18)), feeds),
        TfliteSession(to_tflite(program)).run(feeds),
    ):
        assert relative_error(expected, found) < 1e-4


@pytest.mark.parametrize("groups", [1, 3])
def test_variance_is_taken_around_the_mean_everywhere(groups: int) -> None:
    """1000 +- 1: the mean of squares less the squared mean is 1e6 less 1e6, in steps of 1/16 in float32."""
    net = nets.Net({"norm": nn.GroupNorm(groups, 3)}, lambda net, x: net.norm(x)).eval()
    program, x = build_program(nets.as_model(net, (3, 32, 32))), np.random.default_rng(0)
    given = (1000.0 + x.standard_normal((2, 3, 32, 32))).astype(np.float32)
    rows = given.astype(np.float64).reshape(2, groups, -1)
    apart = rows - rows.mean(2, keepdims=True)
    expected = (apart / np.sqrt(np.square(apart).mean(2, keepdims=True) + 1e-5)).reshape(given.shape)
    single = rows.astype(np.float32)
    short = np.square(single).mean(2, keepdims=True) - np.square(single.mean(2, keepdims=True))
    other = (apart / np.sqrt(np.abs(short))).reshape(given.shape)
    assert relative_error({"y": expected}, {"y": other}) > 3 * MAX_RELATIVE_ERROR, "it would be seen"
    feeds = {program.inputs[0]: given}
    for found in (
        run_program(program, feeds),
        onnx_session.run(to_onnx(program), feeds),
        onnx_session.run(to_onnx(program, OnnxOptions(opset=13)), feeds),
        TfliteSession(to_tflite(program)).run(feeds),
    ):
        assert relative_error({"y": expected}, {"y": next(iter(found.values()))}) < MAX_RELATIVE_ERROR


@pytest.mark.parametrize("name", OPERATORS)
def test_int8_files(name: str) -> None:
    from mixing import check_files

    _, model = model_of(OPERATORS[name][0], **OPERATORS[name][1])
    step = QuantizeStatic(observer="min_max", bias_correction=False, weight_bits=nets.STEP.weight_bits)
    check_files(build_program(step.run(model, nets.context(16))), nets.held_out(3))


def one(kind: str, x: Any, **attributes: Any) -> list[float]:
    """Run one operator of one input in the reference."""
    given = np.float32(x)
    shape = (BATCH, *given.shape[1:])
    tensors = {name: ProgramTensor(name, shape) for name in ("x", "y")}
    program = Program("p", ("x",), (("y", "y"),), tensors, (Op(kind, ("x",), "y", attributes),))
    return [round(float(v), 4) for v in run_program(program, {"x": given})["y"].reshape(-1)]


def test_numbers_by_hand() -> None:
    # mean 2.5, variance 1.25: (x - 2.5) / sqrt(1.25 + 0.31) = (x - 2.5) / 1.249
    assert one("normalize", [[1, 2, 3, 4]], axes=(1,), eps=0.31) == [-1.201, -0.4003, 0.4003, 1.201]
    assert one("gelu", [[-1.0, 0.0, 1.0]], approximate=False) == [-0.1587, 0.0, 0.8413]
    assert one("gelu", [[1.0]], approximate=True) == [0.8412]
    assert one("elu", [[-1.0, 2.0]]) == [-0.6321, 2.0]
    assert one("rsqrt", [[4.0, 0.25]]) == [0.5, 2.0]


def normed() -> Any:
    net = {"norm": nn.LayerNorm(8), "up": nn.Linear(8, 8)}
    return model_of(lambda net, x: F.gelu(net.up(net.norm(tokens(net.stem(x))))), **net)[1]


def test_layer_norm_and_gelu_are_nodes_of_opset_20() -> None:
    model = to_onnx(build_program(normed()))
    kinds = [node.op_type for node in model.graph.node]
    assert model.opset_import[0].version == 20
    assert (kinds.count("LayerNormalization"), kinds.count("Gelu"), kinds.count("Erf")) == (1, 1, 0)


def test_a_target_with_an_older_runtime_gets_the_parts() -> None:
    program = build_program(normed())
    for newest, opset in ((19, 13), (20, 20), (26, 20)):
        assert to_onnx(program, OnnxOptions(max_opset=newest)).opset_import[0].version == opset


def test_layer_norm_of_opset_13_is_fused_in_onnx_runtime(tmp_path: Any) -> None:
    """The nodes written for opset 13 are those that the runtime knows (1.31: all but the mean), GELU too."""
    program = build_program(normed())
    executed = onnx_session.executed(to_onnx(program, OnnxOptions(opset=13)), tmp_path)
    assert executed["LayerNormalization"] + executed["SimplifiedLayerNormalization"] == 1
    assert executed["Gelu"] + executed["BiasGelu"] == 1
    assert (executed["Erf"], executed["Sqrt"], executed["ReduceMean"]) in ((0, 0, 0), (0, 0, 1))


def test_islands_are_single_nodes_between_integers(tmp_path: Any) -> None:
    step = QuantizeStatic(observer="min_max", bias_correction=False, weight_bits=nets.STEP.weight_bits)
    program = build_program(step.run(normed(), nets.context(16)))
    executed = onnx_session.executed(to_onnx(program), tmp_path)
    assert (executed["LayerNormalization"], executed["Gelu"]) == (1, 1)
    assert executed["QLinearConv"] + executed["QGemm"] == 2
    assert executed["Erf"] == executed["ReduceMean"] == executed["Sqrt"] == 0


def test_lite_rt_keeps_an_attention_in_its_delegate() -> None:
    function, layers = OPERATORS["attention"]
    _, model = model_of(function, **layers)
    session = TfliteSession(to_tflite(build_program(model)))
    assert session.operators().count("BATCH_MATMUL") == 2
    assert session.num_delegates() == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda net, x: F.elu(net.stem(x), 0.5), r"elu.*slopes \[0\.5, 1\.0\], expected 1"),
        (lambda net, x: net.stem(x).abs() ** 1.5, r"pow.*exponent 1\.5, expected 2, 3, 0\.5 or -0\.5"),
        (lambda net, x: torch.roll(net.stem(x), 3), r"roll.*rolls the batch or all dimensions"),
        (lambda net, x: F.softplus(net.stem(x), 2.0), r"softplus.*another beta"),
        (
            lambda net, x: F.scaled_dot_product_attention(*[tokens(net.stem(x))] * 3, is_causal=True),
            r"attention.*is causal or grouped",
        ),
    ],
)
def test_what_has_no_float_form_either(function: Function, message: str) -> None:
    with pytest.raises(UnsupportedOpError, match=message):
        build_program(model_of(function)[1])


@pytest.mark.parametrize(
    ("equation", "first", "second"),
    [
        ("bnc,bmc->bnm", (2, 5, 4), (2, 6, 4)),
        ("bchw,bdhw->bdc", (2, 3, 4, 5), (2, 6, 4, 5)),
        ("bijk,bkl->bijl", (2, 3, 4, 5), (2, 5, 6)),
        ("bhid,hdj->bihj", (2, 3, 4, 5), (3, 5, 6)),
        ("nctkv,kvw->nctw", (2, 3, 4, 5, 6), (5, 6, 7)),
    ],
)
def test_products_by_letters(equation: str, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    """The plan's transposes, reshapes and one matmul give what NumPy's einsum gives."""
    rng = np.random.default_rng(0)
    given = [rng.standard_normal(shape) for shape in (first, second)]
    shapes = [
        (BATCH, *shape[1:]) if "b" in term[:1] or "n" in term[:1] else shape
        for shape, term in zip((first, second), equation.split("->")[0].split(","), strict=True)
    ]
    plan = parse_product(equation, shapes)
    if plan is None:
        assert equation == "bhid,hdj->bihj", "a batch beside dimensions kept apart has no plan"
        return
    factors = [
        value.transpose(side.perm).reshape(side.shape) for value, side in zip(given, plan.sides, strict=True)
    ]
    found = np.matmul(*factors).reshape(plan.split_shape).transpose(plan.perm)
    np.testing.assert_allclose(found, np.einsum(equation, *given))


def test_no_product() -> None:
    assert parse_product("bii->b", [(BATCH, 3, 3)]) is None
    assert parse_product("bn,bm->b", [(BATCH, 3), (BATCH, 4)]) is None
