"""Int8 networks of which some layers compute in float, for tests: made, described and run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import nets
import onnx
import onnx_session
import torch
from tflite_session import TfliteSession
from torch import nn

from edgecnn.export.onnx import OnnxOptions, to_onnx
from edgecnn.export.parity import compare, first_difference, output_scales
from edgecnn.export.tflite import to_tflite
from edgecnn.export.trace import trace_onnx, trace_tflite
from edgecnn.graph.build import build_program
from edgecnn.graph.program import Array, Op, Program
from edgecnn.model import Model
from edgecnn.quantize.reference import run_op, run_program
from edgecnn.quantize.static import QuantizeStatic


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


def net(function: Any, **layers: nn.Module) -> Model:
    torch.manual_seed(0)
    return nets.as_model(nets.Net({"stem": nn.Conv2d(3, 4, 3), **layers}, function).eval())


def optimized(program: Program, folder: Path) -> list[onnx.NodeProto]:
    """Return the nodes that ONNX Runtime really runs."""
    path = folder / "optimized.onnx"
    onnx_session.open_session(to_onnx(program), path)
    return list(onnx.load(path).graph.node)
