"""`edgecnn.compress` to float16 and int8 weights, from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")

import torch
from running import RESULTS, names, run_onnx, run_tflite

import edgecnn
from edgecnn.compress import CompressOptions
from edgecnn.data import open_dataset
from edgecnn.errors import ExportError, LoadError, PassError
from edgecnn.load import load_model
from edgecnn.recipe import list_recipes
from edgecnn.report.terminal import print_report

MODEL = "lenet5_digits.pt2"
SMALLER = {"fp16": 1.9, "weight_only_wi8_afp32": 3.5}
LEAST_SQNR_DB = {"fp16": 60.0, "weight_only_wi8_afp32": 35.0}


@pytest.fixture(scope="module", params=SMALLER)
def compressed(request: Any, tmp_path_factory: Any, examples_dir: Path) -> tuple[str, Any, Path]:
    out = tmp_path_factory.mktemp(request.param)
    result = edgecnn.compress(
        examples_dir / MODEL,
        recipe=request.param,
        data="digits",
        out=out,
        options=CompressOptions(measure=False),
    )
    return request.param, result, out


def test_the_report_says_what_was_done(
    compressed: tuple[str, Any, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, result, out = compressed
    report = result.report
    assert names(out) == RESULTS
    assert report.recipe == recipe
    assert [step.name for step in report.passes] == ["fold_batch_norm", "store_weights"]
    for size in report.sizes.values():
        assert size.float_size_bytes > SMALLER[recipe] * size.size_bytes
    for parity in report.parity.values():
        assert parity.max_relative_error is not None
        assert parity.max_relative_error < 1e-5
    assert all(value > LEAST_SQNR_DB[recipe] for value in report.sqnr_db.values())
    assert report.accuracy.drop_points < 0.2
    assert not any("left in float" in text for text in report.warnings)
    print_report(report)
    text = capsys.readouterr().out
    assert "of range" in text
    assert "nothing was calibrated" in text
    assert "nothing was calibrated" in (out / "report.html").read_text()


def test_the_files_take_and_give_float32_and_pytorch_gives_the_same(
    compressed: tuple[str, Any, Path],
) -> None:
    _, result, out = compressed
    model = load_model(out / "model.pt2")
    x = open_dataset("digits", model.spec.preprocess).inputs(range(20))
    assert x.dtype == np.float32
    with torch.no_grad():
        expected = model.graph(torch.from_numpy(x)).numpy()
    for y in (run_onnx(out / "model.onnx", x), run_tflite(out / "model.tflite", x.transpose(0, 2, 3, 1))):
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, expected, atol=1e-4)
    for artifact in result.artifacts.values():
        assert {tensor.dtype for tensor in (*artifact.inputs, *artifact.outputs)} == {"float32"}


def test_integers_at_the_boundary_are_refused(tmp_path: Path, examples_dir: Path) -> None:
    with pytest.raises(ExportError, match="io is 'int8', but the recipe fp16 does not quantize"):
        edgecnn.compress(
            examples_dir / MODEL, recipe="fp16", out=tmp_path / "o", options=CompressOptions(io="int8")
        )


INTEGER_INPUTS = {
    "dynamic_wi8_ai8": "takes scales from each image when it runs",
    "static_wi8_ai16": "has int16 activations",
    "fp16": "does not quantize",
    "weight_only_wi8_afp32": "does not quantize",
    "prune50": "does not quantize",
}
"""Recipes whose files cannot have integer inputs, and what is said."""


@pytest.mark.parametrize("recipe", sorted(list_recipes()))
def test_integers_at_the_boundary_of_every_recipe(recipe: str, tmp_path: Path) -> None:
    """Said before anything is loaded; where it can be done the missing network is what is missed."""
    reason = INTEGER_INPUTS.get(recipe)
    with pytest.raises(ExportError if reason else LoadError, match=reason or "no such file") as found:
        edgecnn.compress(
            tmp_path / "none.pt2", recipe=recipe, out=tmp_path / "o", options=CompressOptions(io="uint8")
        )
    assert found.value.hint


def test_what_is_narrow_already_is_not_compressed_again(
    compressed: tuple[str, Any, Path], tmp_path: Path
) -> None:
    _, _, out = compressed
    with pytest.raises(PassError, match="already, expected a float network"):
        edgecnn.compress(out / "model.pt2", data="digits", out=tmp_path / "o")
