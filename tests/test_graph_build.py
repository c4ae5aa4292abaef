"""Graph -> Program: what it computes is what the module computes, and what has no lowering is named."""

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
from edgecnn.export.onnx import to_onnx
from edgecnn.export.tflite import to_tflite
from edgecnn.graph.build import build_program, float_islands
from edgecnn.graph.program import Array, Program
from edgecnn.model import Model
from edgecnn.quantize.reference import run_program

TOLERANCE = 1e-4


def close(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name].shape == values.shape
        np.testing.assert_allclose(found[name], values, rtol=TOLERANCE, atol=TOLERANCE)


def expected_outputs(model: Model, net: nn.Module, x: Array) -> dict[str, Array]:
    return dict(zip((o.name for o in model.spec.outputs), nets.outputs_of(net, x), strict=True))


def function_net(function: Callable[[Any, Tensor], Any], **layers: nn.Module) -> Model:
    torch.manual_seed(0)
    return nets.as_model(nets.Net({"stem": nn.Conv2d(3, 4, 3), **layers}, function).eval())


def op_kinds(program: Program) -> list[str]:
    return [op.kind for op in program.ops]


@pytest.mark.parametrize("prepared", [False, True], ids=["exported", "prepared"])
@pytest.mark.parametrize("name", nets.NETS)
def test_float_program_is_the_module_in_every_executor(name: str, prepared: bool) -> None:
    model = nets.folded(name) if prepared else nets.model(name)
    program = build_program(model)
    x = nets.held_out(3)
    feeds = {program.inputs[0]: x}
    expected = expected_outputs(model, nets.module(name), x)
    close(run_program(program, feeds), expected)
    close(onnx_session.run(to_onnx(program), feeds), expected)
    close(TfliteSession(to_tflite(program)).run(feeds), expected)
    assert float_islands(program) == []
    assert not any(tensor.quant for tensor in program.tensors.values())


def test_names_and_order_of_outputs_are_the_modules() -> None:
    program = build_program(nets.model("multi_output"))
    assert [public for public, _ in program.outputs] == ["mask", "logits", "features"]
    assert program.inputs == (nets.model("multi_output").spec.inputs[0].name,)


def test_same_model_same_program() -> None:
    first, second = (build_program(nets.model("inception")) for _ in range(2))
    assert to_onnx(first).SerializeToString() == to_onnx(second).SerializeToString()
    assert to_tflite(first).data == to_tflite(second).data


def test_clamp_joins_the_operator_that_it_alone_reads() -> None:
    program = build_program(nets.folded("residual"))
    assert "clamp" not in op_kinds(program)
    stem = program.ops[0]
    assert (stem.kind, stem.attributes["clamp"]) == ("conv2d", (0.0, None))
    assert next(op for op in program.ops if op.kind == "add").attributes["clamp"] == (0.0, None)


def test_clamp_stays_apart_where_a_copy_has_another_reader() -> None:
    """contiguous() and view(x.shape) give the convolution's own tensor, which the concat reads unclamped."""
    program = build_program(nets.model("repeated_reader"))
    assert op_kinds(program) == ["conv2d", "clamp", "concat", "conv2d"]
    assert "clamp" not in program.ops[0].attributes


def test_padding_says_what_windows_read() -> None:
    """12 pixels, kernel 3, stride 2, padding 1: six windows read 1 ahead and none behind."""
    program = build_program(nets.folded("conv_bn_relu"))
    assert program.ops[0].attributes["padding"] == (1, 1, 0, 0)


def test_same_padding_of_an_even_kernel_is_behind() -> None:
    model = function_net(lambda net, x: net.even(net.stem(x)), even=nn.Conv2d(4, 2, 2, padding="same"))
    program = build_program(model)
    assert program.ops[1].attributes["padding"] == (0, 0, 1, 1)
    x = nets.held_out(2)
    close(run_program(program, {program.inputs[0]: x}), expected_outputs(model, model.graph, x))


def test_batch_norm_without_weights() -> None:
    bare = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm1d(12, affine=False, eps=0.5)).eval()
    bare[0].running_mean += 1.0
    model = nets.as_model(nets.Net({"a": bare[0], "b": bare[1]}, lambda net, x: net.b(net.a(x)[:, 0])).eval())
    program = build_program(model)
    assert op_kinds(program) == ["conv2d", "slice", "reshape", "mul", "add"]
    x = nets.held_out(2)
    close(run_program(program, {program.inputs[0]: x}), expected_outputs(model, model.graph, x))


UNSUPPORTED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "fft": (lambda net, x: torch.fft.rfft2(net.stem(x)).abs(), r"fft_rfft2"),
    "stft": (
        lambda net, x: torch.stft(
            net.stem(x).flatten(1), 16, return_complex=True, window=torch.ones(16)
        ).abs(),
        r"aten\.\w*(stft|pad|unfold|fft)",
    ),
    "grid_sample": (
        lambda net, x: F.grid_sample(x, net.stem(x)[:, :2].permute(0, 2, 3, 1), align_corners=False),
        r"aten\.grid_sampler",
    ),
    "divides_by_activation": (lambda net, x: 1.0 / net.stem(x), r"aten\.(reciprocal|div)"),
    "logarithm": (lambda net, x: torch.log_softmax(net.stem(x), 1), r"aten\.log_softmax"),
    "cumsum": (lambda net, x: net.stem(x).cumsum(1), r"aten\.cumsum"),
    "mean_over_all": (lambda net, x: net.stem(x) - net.stem(x).mean(), r"aten\.mean"),
    "replicate": (
        lambda net, x: F.pad(net.stem(x), (1, 1, 1, 1), "replicate"),
        r"aten\.(pad|replication_pad2d)",
    ),
    "cropping": (lambda net, x: F.pad(net.stem(x), (-1, 1, 0, 0), "reflect"), r"the latter without cropping"),
    "uneven": (
        lambda net, x: F.adaptive_avg_pool2d(net.stem(x), 3),
        r"windows of unequal size.*--input-shape",
    ),
    "divisor": (
        lambda net, x: F.avg_pool2d(net.stem(x), 2, divisor_override=3),
        r"divisor_override=3, expected the window's size",
    ),
    "ceil_counting": (
        lambda net, x: F.avg_pool2d(net.stem(x), 3, 2, 1, ceil_mode=True),
        r"ceil_mode with count_include_pad.*count_include_pad=False",
    ),
    "alpha": (lambda net, x: torch.add(x, x, alpha=2), r"alpha=2, expected 1"),
    "indices": (lambda net, x: net.stem(x).max(dim=1)[1].float(), r"output 1 has no lowering|no lowering"),
    "fraction": (
        lambda net, x: F.interpolate(net.stem(x), scale_factor=1.25),
        r"enlarges 10 by 1\.25 to 12, expected a whole number.*recompute_scale_factor",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_names_layer_and_operator(case: str) -> None:
    function, message = UNSUPPORTED[case]
    with pytest.raises(UnsupportedOpError, match=message) as caught:
        build_program(function_net(function))
    assert "aten." in str(caught.value)


def test_unsupported_operator_inside_a_layer_is_located() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.LogSigmoid()))
    with pytest.raises(
        UnsupportedOpError, match=r"^1\.1 \(aten\.log_sigmoid\.default\) has no lowering.*inspect MODEL"
    ):
        build_program(nets.as_model(net))


def test_custom_operator_is_named() -> None:
    library = torch.library.Library("edgecnn_tests", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    with pytest.raises(UnsupportedOpError, match=r"edgecnn_tests\.twice\.default"):
        build_program(function_net(lambda net, x: torch.ops.edgecnn_tests.twice(net.stem(x))))


def test_weight_computed_from_the_input_is_refused() -> None:
    def dynamic(net: Any, x: Tensor) -> Tensor:
        y = net.stem(x)
        return F.conv2d(y, net.other.weight * y.sum())

    def of_batch(net: Any, x: Tensor) -> Tensor:
        y = net.stem(x).flatten(1)
        return F.linear(y, y)

    with pytest.raises(UnsupportedOpError, match=r"aten\.sum\.default\) has no lowering"):
        build_program(function_net(dynamic, other=nn.Conv2d(4, 2, 1)))
    with pytest.raises(UnsupportedOpError, match=r"linear.*expected the batch"):
        build_program(function_net(of_batch))


def test_constants_are_folded() -> None:
    """A weight computed from parameters alone is a parameter."""

    class Standardized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            w = self.conv.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.amax((1, 2, 3), keepdim=True) + 0.1)
            return F.conv2d(x, w, self.conv.bias)

    torch.manual_seed(0)
    model = nets.as_model(Standardized().eval())
    program = build_program(model)
    assert op_kinds(program) == ["conv2d"]
    x = nets.held_out(2)
    close(run_program(program, {program.inputs[0]: x}), expected_outputs(model, model.graph, x))
