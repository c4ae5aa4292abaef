"""Pools behind a pad: minus infinity becomes the pool's own padding, zeros stay zeros in every runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx_session
import pytest
import torch
import torch.nn.functional as F
from channel_nets import Lambda, conv
from channel_nets import model as pruning_model
from hypothesis import given, settings
from hypothesis import strategies as st
from mixing import check_files, kinds
from test_surgery import choose
from tflite_session import TfliteSession
from torch import Tensor, nn

from edgecnn.cli.main import main
from edgecnn.errors import UnsupportedOpError
from edgecnn.export.onnx import OnnxOptions, to_onnx
from edgecnn.export.parity import relative_error
from edgecnn.export.tflite import to_tflite
from edgecnn.graph.build import build_program
from edgecnn.graph.channels import couple_channels
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.graph.inference_form import to_inference_form
from edgecnn.graph.program import BATCH, Op, Program, QuantParams
from edgecnn.graph.program import Tensor as ProgramTensor
from edgecnn.graph.windows import Windows
from edgecnn.load import save_pt2
from edgecnn.model import Model
from edgecnn.prune.surgery import cut_channels
from edgecnn.quantize.reference import run_program

LOWEST, NEAR = float("-inf"), torch.finfo(torch.float32).min
Function = Callable[[Any, Tensor], Any]


def alone(function: Function) -> Model:
    """A network without weights, for hand-worked numbers."""
    return nets.as_model(nets.Net({}, function).eval(), (1, 4, 4))


def model_of(function: Function) -> tuple[nn.Module, Model]:
    torch.manual_seed(0)
    net = nets.Net({"stem": nn.Conv2d(3, 8, 3), "last": nn.Conv2d(8, 4, 1)}, function).eval()
    return net, nets.as_model(net)


def operators(model: Model) -> list[str]:
    nodes = model.graph.graph.nodes
    return [str(n.target).split(".")[1] for n in nodes if n.op == "call_function"]


def runtimes(program: Program, x: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """What the reference and both files give, by runtime."""
    feeds = {program.inputs[0]: x}
    found = {
        "reference": run_program(program, feeds),
        "onnx": onnx_session.run(to_onnx(program), feeds),
        "opset 18": onnx_session.run(to_onnx(program, OnnxOptions(opset=18)), feeds),
        "tflite": TfliteSession(to_tflite(program)).run(feeds),
    }
    (output,) = (public for public, _ in program.outputs)
    return {name: values[output] for name, values in found.items()}


IMAGE = -np.asarray([[9, 8, 7, 6], [5, 4, 3, 2], [1, 2, 3, 4], [5, 6, 7, 8]], np.float32)[None, None]
BY_HAND: dict[str, tuple[Function, list[list[int]]]] = {
    # windows of rows and columns 0-2 and 2-4, of which the last is padding
    "same": (
        lambda net, x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=LOWEST), 3, 2),
        [[-1, -2], [-1, -3]],
    ),
    "same, of whole windows": (
        lambda net, x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=LOWEST), 2, 2),
        [[-9, -7, -6], [-1, -2, -2], [-5, -6, -8]],
    ),
    "same, stride 1": (
        lambda net, x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=LOWEST), 2, 1),
        [[-4, -3, -2, -2], [-1, -2, -2, -2], [-1, -2, -3, -4], [-5, -6, -7, -8]],
    ),
    "one side": (
        lambda net, x: F.max_pool2d(F.pad(x, (0, 2), value=LOWEST), (4, 3), (4, 3)),
        [[-1, -2]],
    ),
    "zeros": (lambda net, x: F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 3, 2), [[-1, 0], [0, 0]]),
    "zeros and its own": (
        lambda net, x: F.max_pool2d(F.pad(x, (0, 0, 2, 0)), 2, 2, 1),
        [[0, 0, 0], [0, 0, 0], [-1, -2, -2], [-5, -6, -8]],
    ),
    "zeros ahead of single values": (
        lambda net, x: F.avg_pool2d(F.pad(x, (-1, 1, -1, 1)), 1, 2, count_include_pad=False),
        [[-4, -2], [-6, -8]],
    ),
    "zeros for the last single value": (
        lambda net, x: F.max_pool2d(F.pad(x, (1, 0, 1, 0)), 1, 2),
        [[0, 0, 0], [0, -4, -2], [0, -6, -8]],
    ),
    "zeros ahead of an average": (
        lambda net, x: F.avg_pool2d(F.pad(x, (0, 0, 0, 2)), (2, 4), 2, count_include_pad=False),
        [[-5.5], [-4.5], [0]],
    ),
    "zeros ahead of an average that counts its own": (
        lambda net, x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 2, 2, 1),
        [[0, 0, 0, 0], [0, -6.5, -4.5, 0], [0, -3.5, -5.5, 0], [0, 0, 0, 0]],
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    function, expected = BY_HAND[name]
    for form in (lambda model: model, to_inference_form):  # a pruned network is not brought into that form
        program = build_program(form(alone(function)))
        for runtime, values in runtimes(program, IMAGE).items():
            assert values.tolist() == [[expected]], runtime


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("same", ["max_pool2d"]),
        ("same, of whole windows", ["max_pool2d"]),
        ("same, stride 1", ["max_pool2d", "slice", "slice"]),
        ("one side", ["max_pool2d"]),
        ("zeros", ["pad", "max_pool2d"]),
    ],
)
def test_minus_infinity_becomes_padding_of_the_pool(name: str, expected: list[str]) -> None:
    model = alone(BY_HAND[name][0])
    assert operators(to_inference_form(model)) == expected
    assert operators(model)[0] == "pad", "the network that was given stays as it is"


PADDED: dict[str, Function] = {
    "same": lambda net, x: F.max_pool2d(F.pad(net.stem(x), (0, 1, 0, 1), value=LOWEST), 3, 2),
    "same, stride 1": lambda net, x: F.max_pool2d(F.pad(net.stem(x), (1, 2, 1, 2), value=LOWEST), 4, 1),
    "lowest number": lambda net, x: F.max_pool2d(F.pad(net.stem(x), (1, 0), value=NEAR), 2, 2),
    "zeros": lambda net, x: F.max_pool2d(F.pad(net.stem(x) - 3.0, (1, 1, 1, 1)), 3, 2, 1),
    "zeros, single values": lambda net, x: F.avg_pool2d(F.pad(net.stem(x), (-1, 1, -1, 1)), 1, 2),
    "zeros, single maxima": lambda net, x: F.max_pool2d(F.pad(net.stem(x).relu(), (-1, 2, -1, 2)), 1, 2),
    "zeros, an average": lambda net, x: F.avg_pool2d(
        F.pad(net.stem(x), (0, 1, 0, 1)), 3, 2, count_include_pad=False
    ),
    "zeros, an average that leaves its own out": lambda net, x: F.avg_pool2d(
        F.pad(net.stem(x), (0, 1, 0, 1)), 3, 1, 1, count_include_pad=False
    ),
}


@pytest.mark.parametrize("name", PADDED)
def test_float_files(name: str) -> None:
    net, model = model_of(PADDED[name])
    x = nets.held_out(3)
    (expected,) = nets.outputs_of(net, x)
    for given_model in (model, FoldBatchNorm().run(model, nets.context())):
        for runtime, values in runtimes(build_program(given_model), x).items():
            assert relative_error({"y": expected}, {"y": values}) < 1e-5, runtime


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("name", PADDED)
def test_int8_files(name: str, dtype: str) -> None:
    program = build_program(nets.STEP.run(nets.prepare(model_of(PADDED[name])[1]), nets.context(16)))
    assert not [kind for kind in kinds(program) if kind.isupper()], "nothing is left in float"
    check_files(program, nets.held_out(3), dtype)


OTHERS: dict[str, Function] = {
    "more than half of the window": lambda net, x: F.max_pool2d(
        F.pad(net.stem(x), (2, 2, 2, 2), value=LOWEST), 3, 1
    ),
    "another reader": lambda net, x: F.relu(F.pad(net.stem(x), (1, 0), value=LOWEST)),
    # 100 values to convert ahead of the pool and 90 behind it, which costs more with the pool in float
    "hardly fewer values behind the pool": lambda net, x: net.last(
        F.max_pool2d(F.pad(net.stem(x), (-1, 1), value=LOWEST), (1, 2), 1)
    ),
    "cropped too": lambda net, x: F.max_pool2d(F.pad(net.stem(x), (-1, 1, -1, 1), value=LOWEST), 2, 2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_no_pool_can_pad_computes_in_float(name: str) -> None:
    net, model = model_of(OTHERS[name])
    program = build_program(nets.STEP.run(nets.prepare(model), nets.context(16)))
    assert "PAD" in kinds(program)
    assert "pad" not in kinds(program)
    check_files(program, nets.held_out(3))
    (expected,) = nets.outputs_of(net, nets.held_out(3))
    for runtime, values in runtimes(build_program(model), nets.held_out(3)).items():
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5, err_msg=runtime)


sizes, small = st.integers(1, 12), st.integers(1, 5)


@settings(max_examples=300, deadline=None)
@given(size=sizes, kernel=small, stride=small, pads=st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_windows_of_any_padding(size: int, kernel: int, stride: int, pads: tuple[int, int]) -> None:
    before, after = pads
    if size + before + after < kernel:
        return
    x = torch.randn(1, 1, 1, size, generator=torch.Generator().manual_seed(size))
    expected = F.max_pool2d(F.pad(x, (before, after), value=LOWEST), (1, kernel), (1, stride))
    windows = Windows(size, expected.shape[3], kernel, stride, before)
    assert windows.hold_padding_alone() == bool(expected.isinf().any())
    found = windows.padded_alike()
    if found is None:
        assert before > kernel // 2 or after > kernel // 2
        return
    up = found.count < found.skipped + windows.count
    pool = F.max_pool2d(x, (1, kernel), (1, stride), (0, found.padding), 1, up)
    assert pool.shape[3] == (found.count_up if up else found.count)
    assert torch.equal(pool[..., found.skipped : found.skipped + windows.count], expected)


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(3, 9), kernel=small, stride=st.integers(1, 3), pads=st.tuples(*[st.integers(0, 3)] * 4)
)
def test_files_of_any_padding(size: int, kernel: int, stride: int, pads: tuple[int, ...]) -> None:
    """Float files of a pool behind minus infinity, or behind zeros, are what PyTorch computes."""
    if kernel > size:
        return
    shape, x = (1, size, size), torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(kernel))
    for value in (0.0, LOWEST):
        net = nets.Net({}, lambda net, x, v=value: F.max_pool2d(F.pad(x, pads, value=v), kernel, stride))
        expected = net(x)
        model = nets.as_model(net.eval(), shape)
        if expected.isinf().any():
            with pytest.raises(UnsupportedOpError, match="a window that holds padding alone"):
                to_inference_form(model)
            continue
        for runtime, values in runtimes(build_program(to_inference_form(model)), x.numpy()).items():
            np.testing.assert_array_equal(values, expected.numpy(), err_msg=runtime)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int8", "int16"])
def test_padding_as_large_as_the_window(dtype: str) -> None:
    """A dilated pool with ceil_mode: the third window of the width reads 4 columns on, behind the input."""
    window = {"kernel": (2, 2), "stride": (2, 2), "padding": (1, 0, 2, 3), "dilation": (3, 3)}
    params = QuantParams(np.float32(0.05), -20, num_bits=8)
    if dtype == "int16":
        params = QuantParams(np.float32(0.001), 0, num_bits=16)
    shapes, held = {"x_q": (BATCH, 2, 5, 6), "y": (BATCH, 2, 3, 3)}, "int16" if dtype == "int16" else "int8"
    tensors = {name: ProgramTensor(name, shape, held, params) for name, shape in shapes.items()}
    tensors["x"] = ProgramTensor("x", shapes["x_q"])
    tensors["z"] = ProgramTensor("z", shapes["y"])
    ops = (
        Op("quantize", ("x",), "x_q"),
        Op("max_pool2d", ("x_q",), "y", window),
        Op("dequantize", ("y",), "z"),
    )
    if dtype == "float32":
        tensors, ops = {n: tensors[n] for n in ("x", "z")}, (Op("max_pool2d", ("x",), "z", window),)
    program = Program("one", ("x",), (("z", "z"),), tensors, ops)
    x = np.random.default_rng(0).normal(-3.0, 1.0, (3, 2, 5, 6)).astype(np.float32)
    options = OnnxOptions(activation_dtype="int8" if dtype == "int8" else "uint8")
    got = onnx_session.run(to_onnx(program, options), {"x": x})["z"]
    np.testing.assert_array_equal(got, run_program(program, {"x": x})["z"])
    # the window at (-1, 0) takes rows -1, 2 and columns 0, 3; the last rows 3, 6 and columns 4, 7
    corners = np.stack([x[:, :, 2, [0, 3]].max(2), x[:, :, 3, 4]], 2)
    step = 0.0 if dtype == "float32" else float(params.scale)
    np.testing.assert_allclose(got[:, :, [0, 2], [0, 2]], corners, rtol=0, atol=step)


def test_a_window_of_padding_alone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    function = BY_HAND["same"][0]
    assert operators(to_inference_form(alone(function))) == ["max_pool2d"]
    beyond = alone(lambda net, x: F.max_pool2d(F.pad(x, (0, 2), value=LOWEST), (4, 2), 2))
    text = r"a window that holds padding alone, .* expected a value of the input in each"
    with pytest.raises(UnsupportedOpError, match=text):
        to_inference_form(beyond)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 4), nn.MaxPool2d(2, 1, 1, dilation=2))  # taps 1 ahead and 1 behind
    with pytest.raises(UnsupportedOpError, match=text):
        build_program(nets.as_model(net.eval(), (1, 4, 4)))
    save_pt2(beyond, tmp_path / "beyond.pt2")
    code = main(["compress", str(tmp_path / "beyond.pt2"), "--int8", "-o", str(tmp_path / "out")])
    assert code == 1
    error = capsys.readouterr().err
    assert "holds padding alone" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def reduction(net: Any, x: Tensor) -> Tensor:
    """A reduction cell of NASNet, of images of 8 x 8."""
    x = net.a(x)
    y = F.relu(x)
    found = [
        F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=LOWEST), 3, 2),
        F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 3, 2, count_include_pad=False),
        net.path_1(F.avg_pool2d(y, 1, 2, count_include_pad=False)),
        net.path_2(F.avg_pool2d(F.pad(y, (-1, 1, -1, 1)), 1, 2, count_include_pad=False)),
    ]
    return net.b(torch.cat(found, 1))


def test_a_pruned_reduction() -> None:
    torch.manual_seed(0)
    net = Lambda(reduction, a=conv(8, 8), path_1=conv(8, 4, 1), path_2=conv(8, 4, 1), b=conv(24, 6, 1))
    model = pruning_model(net)
    coupling = couple_channels(model)
    removed = choose(coupling)
    cut = cut_channels(model, coupling, removed)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = cut.graph(x).numpy()
    assert removed
    for runtime, values in runtimes(build_program(cut), x.numpy()).items():
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5, err_msg=runtime)
