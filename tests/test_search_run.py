"""The search on real files: LeNet-5 with weights of 2 bits, which lose most digits, is brought back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")

import numpy as np
import small_networks
from sklearn.datasets import load_digits

import edgecnn
from edgecnn.compress import CompressOptions, CompressResult
from edgecnn.errors import BudgetError
from edgecnn.load import LoadOptions
from edgecnn.making import Plan
from edgecnn.recipe import Recipe
from edgecnn.report.html import render_compress_html
from edgecnn.search.cures import Cure, training

SHORT: dict[str, Any] = {"weight_observer": "mse", "epochs": 1.0, "learning_rate": 0.002, "num_samples": 32}
OPTIONS = CompressOptions(measure=False, formats=("onnx",))


def with_two_bits() -> Recipe:
    shipped = Recipe.load("static_wi8_ai8")
    narrow: Any = {"weight_bits": 2, "num_samples": 32, "iterations": 30}
    steps = [replace(s, **narrow) if s.name == "quantize_static" else s for s in shipped.passes]  # type: ignore[type-var]
    return Recipe("two_bits", tuple(steps))


def compress(examples: Path, out: Path, recipe: Recipe, **changes: Any) -> CompressResult:
    model = examples / "lenet5_digits.pt2"
    return edgecnn.compress(model, recipe=recipe, data="digits", out=out, options=replace(OPTIONS, **changes))


@pytest.mark.slow
def test_the_guard_ends_within_the_budget_and_its_recipe_makes_the_same_files(
    examples_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match=r"accuracy drops by \d+(\.\d+)? points, the budget is 5"):
        compress(examples_dir, tmp_path / "a", with_two_bits(), max_drop=5.0, search=False)
    found = compress(examples_dir, tmp_path / "b", with_two_bits(), max_drop=5.0)
    assert found.report.accuracy is not None and found.report.accuracy.drop_points <= 5.0
    (search,) = [detail for detail in found.report.details if detail["kind"] == "search"]
    assert (
        search["goal"] == "accuracy" and search["is_met"] and "cross-layer equalization" in search["changes"]
    )
    assert [trial["change"] for trial in search["trials"] if trial["kept"]][1:] == search["changes"]
    assert found.report.parity["onnx_vs_reference"].max_lsb == 0
    page = render_compress_html(found.report)
    assert "Search: accuracy" in page and "cross-layer equalization" in page

    again = Recipe.from_toml(replace_bits(found.report.recipe_toml))
    steps = [replace(s, weight_bits=2) if s.name == "quantize_static" else s for s in again.passes]  # type: ignore[type-var, call-arg]
    repeated = compress(examples_dir, tmp_path / "c", Recipe(again.name, tuple(steps)), search=False)
    assert repeated.artifacts["onnx"].sha256 == found.artifacts["onnx"].sha256


def replace_bits(text: str) -> str:
    """A recipe file may not ask for 2 bits, which are there to lose accuracy fast."""
    return text.replace("weight_bits = 2", "weight_bits = 8")


@pytest.fixture
def float_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every file take twice float's time, whatever it really takes."""

    def slow(*arguments: Any) -> tuple[Any, dict[str, Any]]:
        comparison = {"speedup": 0.5, "interval": (0.45, 0.55)}
        figures = {"median_ms": 2.0, "p90_ms": None, "p99_ms": None, "num_samples": 64}
        latency = {
            "artifacts": {"float_onnx": {**figures, "median_ms": 1.0}, "onnx": figures},
            "speedup": {"onnx": comparison},
            "environment": {},
            "warnings": [],
        }
        return SimpleNamespace(comparisons={}, warnings=(), latency=None), latency

    monkeypatch.setattr("edgecnn.judgement.time_files", slow)
    monkeypatch.setattr("edgecnn.search.workbench.time_files", slow)


def searches(report: Any) -> list[dict[str, Any]]:
    return [detail for detail in report.details if detail["kind"] == "search"]


@pytest.mark.usefixtures("float_is_faster")
def test_a_file_that_must_be_faster_and_is_not_ends_with_exit_code_3(
    examples_dir: Path, tmp_path: Path
) -> None:
    recipe = Recipe.load("static_wi8_ai8")
    with pytest.raises(BudgetError, match=r"onnx is slower than float \(0\.50 times its speed") as caught:
        compress(examples_dir, tmp_path, recipe, measure=True, must_be_faster=True, num_samples=16)
    assert caught.value.exit_code == 3
    report = caught.value.result.report  # type: ignore[attr-defined]
    (search,) = searches(report)
    assert search["goal"] == "speed" and not search["is_met"] and search["changes"] == []
    assert {time["layer"] for time in search["slow_layers"]} & {"features.0", "features.3"}
    assert len(search["trials"]) >= 3 and all(trial["onnx_speedup"] == 0.5 for trial in search["trials"])
    assert "the onnx file is slower than float on this machine, 2.00 times its latency" in report.warnings


@pytest.mark.usefixtures("float_is_faster")
def test_times_of_another_machine_start_no_search(examples_dir: Path, tmp_path: Path) -> None:
    recipe = Recipe.load("static_wi8_ai8")
    changes: dict[str, Any] = {"measure": True, "num_samples": 16, "target": "raspberrypi4"}
    assert searches(compress(examples_dir, tmp_path, recipe, **changes).report) == []


def test_the_guard_may_end_with_training(
    examples_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = load_digits()
    pixels = np.kron(digits.images[:600] * 15.9, np.ones((4, 4))).astype(np.uint8)[..., None]
    np.savez(tmp_path / "train.npz", images=pixels, labels=digits.target[:600])

    def train_shortly(plan: Plan) -> list[Cure]:
        ((words, found),) = training(plan)
        *others, step = found.passes
        return [(words, replace(found, passes=(*others, replace(step, **SHORT))))]  # type: ignore[type-var]

    monkeypatch.setattr("edgecnn.search.guard.CHEAP", ())
    monkeypatch.setattr("edgecnn.search.guard.Guard._leave_in_float", lambda guard: None)
    monkeypatch.setattr("edgecnn.search.guard.training", train_shortly)
    changes: dict[str, Any] = {"max_drop": 50.0, "train_data": str(tmp_path / "train.npz")}
    found = compress(examples_dir, tmp_path / "out", with_two_bits(), **changes)
    (search,) = searches(found.report)
    assert search["changes"] == ["quantization-aware training"] and search["is_met"]
    assert found.report.passes[-1].name == "quantize_aware_training"
    assert found.report.accuracy is not None and found.report.accuracy.drop_points <= 50.0


def test_the_guard_trains_a_network_of_which_parts_compute_in_float(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attention and a norm stay in float by themselves, the first layer because the recipe says so."""
    monkeypatch.setattr("edgecnn.search.guard.CHEAP", ())
    monkeypatch.setattr("edgecnn.search.guard.Guard._leave_in_float", lambda guard: None)
    *others, last = with_two_bits().passes
    named: Any = replace(last, float_layers=("stem",))  # type: ignore[type-var, call-arg]
    options = replace(OPTIONS, max_drop=0.0, train_data=small_networks.unlabelled())
    options = replace(options, load=LoadOptions(input_shape=small_networks.SIZE), formats=("onnx", "tflite"))
    found = edgecnn.compress(
        small_networks.Transformer().eval(),
        recipe=Recipe("two_bits", (*others, named)),
        data=small_networks.unlabelled(),
        out=tmp_path / "out",
        options=options,
    )
    (search,) = searches(found.report)
    start, trained, wide = search["trials"]
    assert trained["change"] == "quantization-aware training, 1 layer in float: stem"
    assert start["agreement"] < 1.0 and trained["error"] == "" and trained["agreement"] is not None
    assert search["changes"] == [wide["change"]] == ["int16 activations"], "of 8-bit weights, and not timed"
    assert found.report.passes[-1].name == "widen_activations"
