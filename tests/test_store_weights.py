"""float16 and int8 weights in float arithmetic: both files compute it, as fast as float, or say why not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nets
import numpy as np
import onnx_session
import pytest
import torch
from tflite_session import TfliteSession
from torch import nn

from edgecnn.errors import PassError, RecipeError
from edgecnn.export.onnx import to_onnx
from edgecnn.export.parity import relative_error
from edgecnn.export.tflite import to_tflite
from edgecnn.graph.build import build_program, float_islands
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.graph.program import Program
from edgecnn.model import Model
from edgecnn.quantize.reference import run_program
from edgecnn.quantize.weights import StoreWeights
from edgecnn.recipe import Recipe

RECIPES = {"float16": "fp16", "int8": "weight_only_wi8_afp32"}
LEAST_SQNR_DB = {"float16": 60.0, "int8": 30.0}


def folded(model: Model) -> Model:
    return FoldBatchNorm().run(model, nets.context())


def stored(name: str, dtype: str) -> Program:
    return build_program(StoreWeights(dtype).run(folded(nets.model(name)), nets.context()))


def network(*layers: nn.Module) -> Model:
    return nets.as_model(nn.Sequential(*layers).eval(), (3, 6, 6))


def constant_layer(*weights: float) -> Model:
    layer = nn.Conv2d(3, 1, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weights).reshape(1, 3, 1, 1))
    return network(layer)


@pytest.mark.parametrize("dtype", RECIPES)
@pytest.mark.parametrize("name", nets.NETS)
def test_both_files_compute_the_reference(name: str, dtype: str) -> None:
    program, x = stored(name, dtype), nets.held_out(4)
    feeds = {program.inputs[0]: x}
    expected = run_program(program, feeds)
    assert program.computes_in_float
    assert float_islands(program) == []
    assert relative_error(expected, onnx_session.run(to_onnx(program), feeds)) < 1e-5
    assert relative_error(expected, TfliteSession(to_tflite(program)).run(feeds)) < 1e-5
    given = run_program(build_program(folded(nets.model(name))), feeds)
    for public, values in given.items():
        noise = float(((values - expected[public]) ** 2).sum()) + 1e-30
        assert 10 * np.log10(float((values**2).sum()) / noise) > LEAST_SQNR_DB[dtype]


@pytest.mark.parametrize("dtype", RECIPES)
@pytest.mark.parametrize("name", ["residual", "depthwise", "transposed"])
def test_pytorch_computes_the_reference_too(name: str, dtype: str) -> None:
    model, x = StoreWeights(dtype).run(folded(nets.model(name)), nets.context()), nets.held_out(2)
    program = build_program(model)
    expected = run_program(program, {program.inputs[0]: x})
    simulated = nets.outputs_of(model.graph, x)
    for values, found in zip(expected.values(), simulated, strict=True):
        np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", RECIPES)
def test_the_runtimes_convert_when_they_load_and_not_for_every_image(dtype: str, tmp_path: Path) -> None:
    float_program = build_program(folded(nets.model("residual")))
    program = stored("residual", dtype)
    assert onnx_session.executed(to_onnx(program), tmp_path) == onnx_session.executed(
        to_onnx(float_program), tmp_path
    )
    plain, narrow = TfliteSession(to_tflite(float_program)), TfliteSession(to_tflite(program))
    assert narrow.num_delegates() == plain.num_delegates() == 1
    assert narrow.operators().count("DEQUANTIZE") == sum(
        op.kind in ("conv2d", "linear") for op in program.ops
    )


def test_weights_too_small_for_float16_are_named() -> None:
    """1e-6 has 5 digits left of float16's 11, 1e-9 none; 1e-4 has all of them."""
    for weight, lost in ((1e-4, False), (1e-6, True), (1e-9, True)):
        warnings = StoreWeights("float16").run(constant_layer(weight, -weight, 0), nets.context()).warnings
        assert any("weights too small for float16 in" in text for text in warnings) == lost
    assert StoreWeights("int8").run(constant_layer(1e-9, 1e-9, 0), nets.context()).warnings == ()


def test_what_is_stored_by_hand() -> None:
    """1/3 in float16 is 0.33325195; the row (0.5, -1, 0) in int8 has the scale 1/127: 64, -127, 0."""
    half = build_program(StoreWeights("float16").run(constant_layer(1 / 3, -1, 0), nets.context()))
    weight = half.tensors[half.ops[0].inputs[1]]
    assert (weight.dtype, weight.quant) == ("float16", None)
    assert weight.data is not None
    assert weight.data.ravel().astype(np.float64).tolist() == [0.333251953125, -1.0, 0.0]
    narrow = build_program(StoreWeights("int8").run(constant_layer(0.5, -1, 0), nets.context()))
    weight = narrow.tensors[narrow.ops[0].inputs[1]]
    assert weight.data is not None
    assert weight.quant is not None
    assert weight.data.ravel().tolist() == [64, -127, 0]
    assert weight.quant.scale.tolist() == [np.float32(1 / 127)]
    bias = narrow.tensors[narrow.ops[0].inputs[2]]
    assert (bias.dtype, bias.quant) == ("float32", None)


@pytest.mark.parametrize(("dtype", "most"), [("float16", 0.52), ("int8", 0.27)])
def test_the_files_are_as_much_smaller(dtype: str, most: float) -> None:
    model = network(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 128, 3))
    plain, narrow = build_program(model), build_program(StoreWeights(dtype).run(model, nets.context()))
    assert len(to_tflite(narrow).data) < most * len(to_tflite(plain).data)
    assert to_onnx(narrow).ByteSize() < most * to_onnx(plain).ByteSize()


class _Twice(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.relu(self.layer(x)))


@pytest.mark.parametrize("dtype", RECIPES)
def test_a_weight_that_two_layers_share_is_stored_once(dtype: str) -> None:
    model = StoreWeights(dtype).run(nets.as_model(_Twice().eval()), nets.context())
    program = build_program(model)
    weights = [t for t in program.constants() if len(t.shape) == 4]
    assert len(weights) == 1
    feeds = {program.inputs[0]: nets.held_out(1)}
    expected = run_program(program, feeds)
    assert relative_error(expected, onnx_session.run(to_onnx(program), feeds)) < 1e-5
    assert relative_error(expected, TfliteSession(to_tflite(program)).run(feeds)) < 1e-5


def test_the_given_model_stays_as_it_was() -> None:
    model = folded(nets.model("residual"))
    before = {name: value.clone() for name, value in model.graph.state_dict().items()}
    StoreWeights("int8").run(model, nets.context())
    assert all(torch.equal(value, before[name]) for name, value in model.graph.state_dict().items())


def test_a_weight_too_large_for_float16_is_refused() -> None:
    model = constant_layer(1.0, -70000.0, 0.0)
    with pytest.raises(
        PassError, match=r"0 \(aten.conv2d.default\) has a weight of 7e\+04, expected at most"
    ):
        StoreWeights("float16").run(model, nets.context())
    assert StoreWeights("int8").run(model, nets.context())


@pytest.mark.parametrize(
    ("dtype", "hint"),
    [("int4", "no runtime here computes convolutions with int4 weights any faster"), ("bfloat16", None)],
)
def test_other_dtypes_are_refused_with_the_reason(dtype: str, hint: str | None) -> None:
    with pytest.raises(RecipeError, match=f"dtype is '{dtype}', expected one of float16, int8") as found:
        StoreWeights(dtype).check()
    assert (hint is None) == (found.value.hint is None)
    assert hint is None or hint in str(found.value.hint)


def test_batch_norms_must_be_folded_first_and_weights_narrowed_once() -> None:
    with pytest.raises(PassError, match="is not folded"):
        StoreWeights().requires(nets.model("residual"))
    narrow = StoreWeights("int8").run(folded(nets.model("residual")), nets.context())
    with pytest.raises(PassError, match="quantized already"):
        StoreWeights().requires(narrow)


@pytest.mark.parametrize("dtype", RECIPES)
def test_the_recipes(dtype: str) -> None:
    recipe = Recipe.load(RECIPES[dtype])
    assert recipe.name == RECIPES[dtype]
    assert recipe.passes == (FoldBatchNorm(), StoreWeights(dtype))
    changed = replace(recipe, passes=(*recipe.passes[:1], StoreWeights("int4")))
    with pytest.raises(RecipeError, match=r"pass 2 \(store_weights\): dtype is 'int4'"):
        changed.check()
