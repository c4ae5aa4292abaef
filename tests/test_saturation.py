"""u8 * s8 on x86 without VNNI: sums of an emulated processor, by hand, foreseen, and what the report says."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import nets
import numpy as np
import pytest
from reports import REPORT
from rich.console import Console

from edgecnn import contract
from edgecnn.contract import prove_parity
from edgecnn.errors import ParityError
from edgecnn.export.files import FileOptions, write_model
from edgecnn.graph.build import build_program
from edgecnn.graph.program import Array, Op, Program, QuantParams, Tensor
from edgecnn.judgement import stage_file
from edgecnn.pipeline import SilentProgress
from edgecnn.proof import Candidate
from edgecnn.quantize.reference import run_op, run_program
from edgecnn.quantize.saturation import lost_by_saturation, may_saturate
from edgecnn.quantize.static import QuantizeStatic
from edgecnn.report.html import render_compress_html
from edgecnn.report.saturation import saturation_text
from edgecnn.report.terminal import print_report
from edgecnn.runner.environment import local_isa
from edgecnn.saturation import foresee_saturation

HASWELL: dict[str, tuple[tuple[int, int, int, int, int], list[Any]]] = {
    "3x3 on 3 channels": (
        (3, 4, 3, 1, 3),
        [
            [[74, 105, 87], [124, 127, 127], [72, 127, 104]],
            [[-3, -2, 31], [-48, -6, 32], [46, -54, -48]],
            [[85, 123, 59], [127, 127, 123], [102, 80, 87]],
            [[105, 127, 67], [81, 127, 111], [46, 33, -19]],
        ],
    ),
    "1x1": ((5, 3, 1, 1, 2), [[[44, 69], [6, 21]], [[62, 46], [52, 9]], [[9, -5], [44, 39]]]),
    "3x3 in 2 groups": (
        (4, 4, 3, 2, 2),
        [[[31, 7], [19, -36]], [[21, -2], [1, -70]], [[48, 17], [38, 55]], [[-1, 60], [53, 64]]],
    ),
    "depthwise": (
        (4, 4, 3, 4, 3),
        [
            [[-3, 43, 76], [-9, 24, 30], [-9, 11, -17]],
            [[78, 49, -34], [71, 98, 10], [15, 78, 65]],
            [[37, -14, 61], [27, 42, 5], [18, 84, 33]],
            [[41, 69, 18], [61, 36, 79], [42, 68, 35]],
        ],
    ),
    "two outputs for each channel": (
        (2, 4, 3, 2, 2),
        [[[64, 24], [49, 11]], [[28, -9], [22, -3]], [[28, -8], [22, 19]], [[27, 21], [28, 16]]],
    ),
}
"""(c_in, c_out, kernel, groups, side) and what QLinearConv of ONNX Runtime 1.31 gives with AVX2 and no VNNI.

Run in an emulator (Haswell); inputs and weights are those of `seeded`, zero points 100 and 128, scales 1,
2^-9 and 1.
"""

EXACT_HERE = local_isa() != "x86-64"


def seeded() -> dict[str, tuple[Array, Array]]:
    """Return uint8 inputs and int8 weights, two of five of which are 127, by case."""
    rng, found = np.random.default_rng(0), {}
    for name, ((c_in, c_out, k, groups, side), _) in HASWELL.items():
        w = rng.integers(-127, 128, (c_out, c_in // groups, k, k)).astype(np.int8)
        w = np.where(rng.random(w.shape) < 0.4, np.int8(127), w)
        found[name] = rng.integers(60, 256, (1, c_in, side, side)).astype(np.uint8), w
    return found


def compute(kind: str, x: Array, w: Array, *, scale: float, saturates: bool, **attributes: Any) -> Array:
    """Run one layer of uint8 inputs with the zero point 100; steps of 1 and 1, weights of `scale`."""
    x_quant = QuantParams(np.asarray(1.0, np.float32), 100 - 128)
    w_quant = QuantParams(np.full(len(w), scale, np.float32), 0, 0)
    raw = (x.astype(np.int16) - 128).astype(np.int8)
    y = Tensor("y", (), "int8", QuantParams(np.asarray(1.0, np.float32), 0))
    tensors = {"x": Tensor("x", x.shape, "int8", x_quant), "w": Tensor("w", w.shape, "int8", w_quant), "y": y}
    op = Op(kind, ("x", "w"), "y", attributes)
    return run_op(Program("one", (), (), tensors, (op,)), op, [raw, w], saturates=saturates)


@pytest.mark.parametrize("name", HASWELL)
def test_sums_are_those_of_a_processor_without_vnni(name: str) -> None:
    (_, _, k, groups, _), expected = HASWELL[name]
    x, w = seeded()[name]
    given = {"padding": (k // 2,) * 4, "groups": groups, "scale": 2.0**-9}
    found = compute("conv2d", x, w, saturates=True, **given)
    assert found[0].tolist() == expected
    exact = compute("conv2d", x, w, saturates=False, **given)
    assert (found == exact).all() == (name == "depthwise"), "a depthwise kernel alone is exact"


def test_a_linear_layer_by_hand() -> None:
    """Inputs 255, 255 | 200, 10 | 255 by weights 127, 127 | -127, 100 | 127, less 100 times their sum 354.

    Exact: 64770 - 24400 + 32385 - 35400 = 37355; the first pair saturates at 32767: 5352. In steps of 1/512:
    72.96 and 10.45.
    """
    x, w = np.array([[255, 255, 200, 10, 255]], np.uint8), np.array([[127, 127, -127, 100, 127]], np.int8)
    assert compute("linear", x, w, scale=1 / 512, saturates=False).tolist() == [[73]]
    assert compute("linear", x, w, scale=1 / 512, saturates=True).tolist() == [[10]]


def test_negative_pairs_saturate_too() -> None:
    columns, rows = np.array([[255], [200]]), np.array([[-127, -127], [127, -127]])
    assert lost_by_saturation(columns, rows).tolist() == [[-255 * 127 - 200 * 127 + 32768], [0]]


def test_seven_bits_never_saturate() -> None:
    for bits, possible in ((7, False), (8, True)):
        program = build_program(QuantizeStatic(weight_bits=bits).run(nets.folded("residual"), nets.context()))
        assert may_saturate(program) == possible


def saturating() -> Program:
    """Return a network whose first layer has weights as large as they get, all of one sign."""
    program = nets.quantized_program("residual")
    op = next(op for op in program.ops if op.kind == "conv2d")
    weight = program.tensors[op.inputs[1]]
    assert weight.data is not None
    wrong = replace(weight, data=np.full_like(weight.data, 127))
    return replace(program, tensors=MappingProxyType({**program.tensors, weight.name: wrong}))


def test_what_would_happen_is_foreseen() -> None:
    program, images = saturating(), nets.held_out(16)
    found = foresee_saturation(program, images)
    assert found is not None
    assert found.possible
    assert found.num_samples == 8
    first = next(op for op in program.ops if op.kind == "conv2d")
    assert first.layer in dict(found.layers)
    feeds = {program.inputs[0]: images[:8]}
    name = program.outputs[0][0]
    exact, other = (run_program(program, feeds, saturates=s)[name] for s in (False, True))
    noise = 10 * np.log10((exact.astype(float) ** 2).sum() / ((other.astype(float) - exact) ** 2).sum())
    assert found.sqnr_db == pytest.approx(noise)
    assert found.agreement == (exact.argmax(1) == other.argmax(1)).mean()


def test_floats_have_nothing_to_saturate() -> None:
    assert foresee_saturation(build_program(nets.folded("residual")), nets.held_out(2)) is None


def text_of(detail: dict[str, Any]) -> str:
    stream = io.StringIO()
    report = replace(REPORT, details=(detail,))
    print_report(report, Console(file=stream, width=400, color_system=None))
    return stream.getvalue()


def test_the_report_says_it_before_anyone_deploys() -> None:
    detail = {"pass": "target", "kind": "saturation", "possible": True, "num_layers": 1, "num_samples": 8}
    layers = [{"layer": "stem (aten.conv2d)", "changed": 0.25}]
    detail |= {"layers": layers, "sqnr_db": 15.34, "agreement": 0.75}
    text = saturation_text(detail)
    assert "saturates in 1 layer of the ONNX file, most in stem (25.0 % of its values); 15.3 dB" in text
    assert "15.3 dB against exact sums, 2 of 8 answers change (predicted)" in text
    assert "--target of isa x86-64" in text
    assert text in text_of(detail)
    assert "stem (aten.conv2d)" in render_compress_html(replace(REPORT, details=(detail,)))
    assert "the output stays what it is, 0 of 8 answers change" in saturation_text(
        {**detail, "sqnr_db": 200.0, "agreement": 1.0}
    )
    assert "exactly too" in saturation_text({**detail, "possible": False})
    assert "never does" in saturation_text({**detail, "num_layers": 0, "layers": []})


def test_the_proof_saturates_where_the_machine_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is exact, one that is taken for another is told from it."""
    program, model = saturating(), nets.quantized("residual")
    file = write_model(program, "onnx", model.spec, FileOptions("float32", "uint8"))
    candidates = [Candidate("onnx", stage_file(file, tmp_path, model, "test"))]
    images = nets.held_out(4)
    found = prove_parity(program, candidates, images, "uint8", SilentProgress())
    assert found.comparisons["onnx_vs_reference"].max_lsb == 0
    assert (contract.SATURATES_HERE in found.warnings) == (not EXACT_HERE)
    monkeypatch.setattr(contract, "local_isa", lambda: "x86-64" if EXACT_HERE else "x86-64-vnni")
    with pytest.raises(ParityError, match="does not compute the contract's integers"):
        prove_parity(program, candidates, images, "uint8", SilentProgress())
