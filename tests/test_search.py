"""The search for better files: what is tried in which order, what is kept, and when it ends. The figures come
from a script here, so that every decision is known; tests/test_search_run.py makes real files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from reports import REPORT

from edgecnn.making import Plan
from edgecnn.recipe import Recipe
from edgecnn.report.misses import budget_misses
from edgecnn.report.results import AccuracyFigures, SpeedupFigures
from edgecnn.search import guard as guard_module
from edgecnn.search import speed as speed_module
from edgecnn.search.cures import quantizer_of, to_be_timed, training, with_float_layers, with_quantizer
from edgecnn.search.guard import Guard
from edgecnn.search.improve import may_miss_accuracy, misses_accuracy
from edgecnn.search.speed import LayerTime, hasten
from edgecnn.search.workbench import Trial

PLAN = Plan(Recipe.load("static_wi8_ai8").passes)
SLOW, EVEN, FAST = (SpeedupFigures(r, 0.9 * r, 1.05 * r) for r in (0.5, 1.0, 2.0))


class Bench:
    """Answers with scripted figures: first word of a change -> drop in points, an error, or a speed."""

    def __init__(self, *, can_train: bool = False, factor: Any = "refused", **script: Any) -> None:
        self.script, self.can_train, self.may_widen = script, can_train, factor != "refused"
        self.factor = factor
        self.trials: list[Trial] = []
        self.plans: dict[str, Plan] = {}

    def try_accuracy(self, change: str, plan: Plan) -> tuple[Trial, Any]:
        drop = self.script.get(change.split(" ")[0], self.script["otherwise"])
        error = drop if isinstance(drop, str) else ""
        drop, spread = drop if isinstance(drop, tuple) else (drop, None)
        trial = Trial(change, error=error)
        if not error:
            trial = Trial(change, drop, 1 - drop / 50, drop_error=spread, num_samples=2000)
        self.trials.append(trial)
        self.plans[change] = plan
        return trial, None if error else SimpleNamespace(program=None)

    def try_speed(self, change: str, plan: Plan, formats: Sequence[str]) -> tuple[Trial, Any]:
        figures = self.script.get(change.split(" ")[0], self.script["otherwise"])
        trial = Trial(change, speedup=dict.fromkeys(formats, figures))
        self.trials.append(trial)
        self.plans[change] = plan
        return trial, SimpleNamespace()

    def times_slower(self, change: str, plan: Plan) -> float | None:
        assert change == "int16 activations" and plan == self.plans[change]
        return self.factor  # type: ignore[no-any-return]

    def keep(self, trial: Trial) -> Trial:
        return trial

    @property
    def tried(self) -> list[str]:
        return [trial.change for trial in self.trials]


def run_guard(monkeypatch: pytest.MonkeyPatch, max_drop: float, **script: Any) -> tuple[Any, Bench]:
    bench = Bench(**script)
    points = [
        ([SimpleNamespace(name=f"n{i}", layer=f"l{i} (op)") for i in range(k)], k / 10) for k in (1, 2, 8)
    ]
    monkeypatch.setattr(Guard, "_points", lambda self: points)
    return Guard(bench, PLAN, max_drop).run(), bench  # type: ignore[arg-type]


def test_the_first_cheap_cure_within_the_budget_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    found, bench = run_guard(monkeypatch, 0.5, otherwise=2.0, observer=0.4)
    assert bench.tried == ["as the recipe says", "observer percentile"]
    assert found.is_met and found.changes == ["observer percentile"]
    assert quantizer_of(found.plan).observer == "percentile"


def test_cures_are_tried_from_the_cheapest_to_the_dearest(monkeypatch: pytest.MonkeyPatch) -> None:
    found, bench = run_guard(monkeypatch, 0.1, otherwise=2.0)
    assert bench.tried == [
        "as the recipe says",
        "observer percentile",
        "observer min_max",
        "observer entropy",
        "weight observer mse",
        "cross-layer equalization",
        "bias correction in order",
        "AdaRound",
        "BRECQ",
        "1 layer in float: l0",
        "2 layers in float: l0, l1",
    ]
    assert not found.is_met and found.changes == [] and found.plan == PLAN
    assert found.advice.startswith("the best of 11 tries loses 2 points")


def test_a_drop_within_the_budget_by_less_than_its_error_has_cheap_cures_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """0.25 +- 0.4 does not show 0.3; AdaRound's 0.1 +- 0.3 neither, and is the best."""
    script = {"otherwise": (0.25, 0.4), "as": (0.25, 0.4), "observer": (0.25, 0.4), "AdaRound": (0.1, 0.3)}
    found, bench = run_guard(monkeypatch, 0.3, can_train=True, **script)
    assert bench.tried[-1] == "BRECQ" and len(bench.tried) == 9, "no layers in float, no training"
    assert found.is_met and found.changes == ["AdaRound"]
    expected = "measured 0.10 +- 0.30 points on 2,000 images: some 4,500 would be needed to show it"
    assert found.note == expected


def test_a_drop_that_is_shown_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    found, bench = run_guard(monkeypatch, 0.3, otherwise=(0.25, 0.4), AdaRound=(0.1, 0.2))
    assert bench.tried[-1] == "AdaRound" and found.is_met and found.note == ""


def test_where_nothing_has_a_smaller_drop_the_recipe_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = run_guard(monkeypatch, 0.3, otherwise=(0.28, 0.01), **{"as": (0.2, 0.4)})
    assert found.is_met and found.changes == [] and found.plan == PLAN


def test_of_equal_drops_the_one_that_agrees_more_with_float_is_kept() -> None:
    guard = Guard(Bench(otherwise=0.0), PLAN, 0.3)  # type: ignore[arg-type]
    first, second = Trial("", 0.2, 0.95), Trial("", 0.2, 0.97)
    assert guard._rank(second) < guard._rank(first) < guard._rank(Trial("", 0.25, 0.99))


def test_a_search_starts_where_the_error_reaches_over_the_budget() -> None:
    def with_drop(drop: float, error: float | None) -> Any:
        figures = AccuracyFigures(0.9, 0.9 - drop / 100, None, drop, 2000, error)
        return replace(REPORT, accuracy=figures)

    fp16 = Plan(Recipe.load("fp16").passes)
    assert may_miss_accuracy(with_drop(0.25, 0.4), PLAN, 0.3)
    assert not misses_accuracy(with_drop(0.25, 0.4), 0.3), "the exit code is that of the measured drop"
    assert not may_miss_accuracy(with_drop(0.25, 0.05), PLAN, 0.3)
    assert not may_miss_accuracy(with_drop(0.25, None), PLAN, 0.3)
    assert not may_miss_accuracy(with_drop(0.25, 0.4), fp16, 0.3), "nothing to search"
    assert may_miss_accuracy(with_drop(0.4, 0.1), fp16, 0.3)
    assert not may_miss_accuracy(with_drop(0.4, 0.1), PLAN, None)
    said = budget_misses(with_drop(0.4, 0.1), 0.3, None, None)
    assert said == ["accuracy drops by 0.4 points, the budget is 0.3 (0.40 +- 0.10 points on 2,000 images)"]


def test_a_cure_that_helps_is_built_on_and_one_that_does_not_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, bench = run_guard(monkeypatch, 0.1, otherwise=2.0, AdaRound=0.05, **{"cross-layer": 1.0})
    assert found.is_met and found.changes == ["cross-layer equalization", "AdaRound"]
    names = [step.name for step in found.plan.passes]
    assert names.index("equalize") == names.index("fold_batch_norm") + 1
    assert quantizer_of(found.plan).rounding == "adaround" and quantizer_of(found.plan).observer == "mse"
    assert "BRECQ" not in bench.tried


def test_more_layers_in_float_take_the_place_of_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    script = {"1": 1.5, "2": 0.2}
    found, _ = run_guard(monkeypatch, 0.3, otherwise=2.0, **script)
    assert found.is_met and found.changes == ["2 layers in float: l0, l1"]
    assert quantizer_of(found.plan).float_layers == ("n0", "n1")


def test_training_comes_last_and_takes_the_place_of_layers_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    script = {"otherwise": 2.0, "cross-layer": 1.5, "1": 1.0, "quantization-aware": 0.1}
    found, bench = run_guard(monkeypatch, 0.3, can_train=True, **script)
    assert bench.tried[-1] == "quantization-aware training" and found.is_met
    step = found.plan.passes[-1]
    assert (step.name, step.observer) == ("quantize_aware_training", "mse")
    assert found.changes == ["cross-layer equalization", "quantization-aware training"]


def test_training_keeps_layers_in_float_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers in int8 are tried first; what the recipe leaves in float stays there."""
    script = {"otherwise": 2.0, "2": 1.0, "quantization-aware": 1.5}
    found, bench = run_guard(monkeypatch, 0.3, can_train=True, **script)
    assert bench.tried[-2:] == [
        "quantization-aware training",
        "quantization-aware training, 2 layers in float: n0, n1",
    ]
    assert [quantizer_of(bench.plans[change]).float_layers for change in bench.tried[-2:]] == [
        (),
        ("n0", "n1"),
    ]
    assert found.changes == ["2 layers in float: l0, l1"] and not found.is_met


def test_training_takes_the_scheme_over() -> None:
    changes = {"float_layers": ("stem",), "split_concats": False, "unsupported": "error", "weight_bits": 7}
    ((words, plan),) = training(with_quantizer(PLAN, changes))
    assert words == "quantization-aware training, 1 layer in float: stem"
    assert {name: getattr(quantizer_of(plan), name) for name in changes} == changes
    assert quantizer_of(to_be_timed(plan)).name == "quantize_static"
    assert {name: getattr(quantizer_of(to_be_timed(plan)), name) for name in changes} == changes


@pytest.mark.parametrize("factor", [None, 1.0])
def test_int16_activations_come_last(monkeypatch: pytest.MonkeyPatch, factor: float | None) -> None:
    """Kept where nothing is timed, or no file is slower than float."""
    script = {"otherwise": 2.0, "2": 1.0, "int16": 0.1}
    found, bench = run_guard(monkeypatch, 0.3, can_train=True, factor=factor, **script)
    assert bench.tried[-1] == "int16 activations" and found.is_met
    assert found.changes == ["int16 activations"], "in place of layers in float"
    assert [step.name for step in found.plan.passes][-2:] == ["quantize_static", "widen_activations"]
    wide = quantizer_of(found.plan)
    assert (wide.observer, wide.weight_bits, wide.float_layers) == ("min_max", 8, ())


def test_int16_activations_that_are_slower_than_float_are_named_and_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, _ = run_guard(monkeypatch, 0.3, otherwise=2.0, int16=0.1, factor=83.0)
    assert not found.is_met and found.plan == PLAN
    assert found.advice.endswith("; int16 activations lose 0.1 points, at a latency 83 times float's")
    found, bench = run_guard(monkeypatch, 0.3, otherwise=2.0, int16=1.0, factor=83.0)
    assert "int16" not in found.advice and bench.tried[-1] == "int16 activations"
    found, bench = run_guard(monkeypatch, 0.3, otherwise=2.0, int16=0.1)
    assert "int16 activations" not in bench.tried, "a latency is asked for"


def test_a_cure_that_cannot_be_applied_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    found, bench = run_guard(monkeypatch, 0.3, otherwise=2.0, AdaRound=0.1, **{"cross-layer": "no pairs"})
    assert found.is_met and found.changes == ["AdaRound"]
    assert next(t for t in bench.trials if t.change.startswith("cross")).error == "no pairs"


def test_without_labels_disagreement_bounds_the_drop() -> None:
    assert guard_module.loss_of(Trial("", None, 0.97)) == pytest.approx(3.0)
    assert guard_module.loss_of(Trial("", 0.5, 0.97)) == 0.5
    assert guard_module.loss_of(Trial("", error="failed")) == float("inf")


def test_a_recipe_that_does_not_quantize_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(Recipe.load("fp16").passes)
    found = Guard(Bench(otherwise=1.0), plan, 0.1).run()  # type: ignore[arg-type]
    assert found.plan == plan and not found.is_met and "quantize statically" in found.advice


def run_hasten(
    monkeypatch: pytest.MonkeyPatch,
    slow: int = 3,
    plan: Plan = PLAN,
    *,
    must_be_faster: bool = False,
    **script: Any,
) -> tuple[Any, Bench]:
    bench = Bench(**script)
    times = [LayerTime(f"l{i}", 0.2, 0.1) for i in range(slow)]
    times += [LayerTime("(runtime)", 0.1, 0.0), LayerTime("quick", 0.1, 0.3)]
    monkeypatch.setattr(speed_module, "layer_times", lambda bench, made, name: times)
    monkeypatch.setattr(
        speed_module, "layer_names", lambda model: ["l0 (a)", "l1 (b)", "l2 (c)", "quick (d)"]
    )
    made = SimpleNamespace(activation_dtype="uint8", files={"onnx": b"", "tflite": b""}, loaded=None)
    speedup = {"onnx": SLOW, "tflite": FAST}
    return hasten(bench, plan, made, speedup, must_be_faster=must_be_faster), bench  # type: ignore[arg-type]


def test_the_layer_that_loses_most_is_left_in_float_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found, bench = run_hasten(monkeypatch, otherwise=SLOW, **{"2": SpeedupFigures(1.3, 1.2, 1.4)})
    assert bench.tried[1:] == [
        "ONNX channels left as narrow as they are",
        "1 layer in float: l0",
        "2 layers in float: l0, l1",
    ]
    assert found.is_met and quantizer_of(found.plan).float_layers == ("l0", "l1")
    assert [time.layer for time in found.slow_layers["onnx"]] == ["l0", "l1", "l2", "(runtime)"]
    assert list(found.slow_layers) == ["onnx"], "of the slow file"


def test_a_slow_file_that_was_trained_is_trained_again_with_layers_in_float(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = Plan(Recipe.load("qat_wi8_ai8").passes)
    script = {"otherwise": SLOW, "1": SpeedupFigures(1.3, 1.2, 1.4)}
    found, _ = run_hasten(monkeypatch, plan=trained, **script)
    step = found.plan.passes[-1]
    assert found.is_met and (step.name, step.float_layers) == ("quantize_aware_training", ("l0",))
    timed = quantizer_of(to_be_timed(found.plan))
    assert (timed.name, timed.float_layers, timed.num_samples) == ("quantize_static", ("l0",), 16)


def test_where_nothing_helps_the_recipe_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    slower = SpeedupFigures(0.3, 0.29, 0.31)
    found, bench = run_hasten(monkeypatch, otherwise=slower)
    assert not found.is_met and found.changes == [] and found.plan == PLAN
    assert bench.tried[-1] == "3 layers in float: l0, l1, l2"


def test_a_change_that_makes_the_other_file_slow_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    both = SpeedupFigures(0.8, 0.75, 0.85)  # of the two files the other one was twice as fast as float
    found, _ = run_hasten(monkeypatch, otherwise=SLOW, **{"1": both})
    assert not found.is_met and found.plan == PLAN


def test_as_fast_as_float_is_not_enough_where_it_must_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer in float makes it as fast as float, as far as can be told; a second one makes it faster."""
    as_fast, faster = SpeedupFigures(1.15, 0.98, 1.2), SpeedupFigures(1.3, 1.2, 1.4)
    script = {"otherwise": SLOW, "1": as_fast, "2": faster}
    found, _ = run_hasten(monkeypatch, **script)
    assert found.is_met and quantizer_of(found.plan).float_layers == ("l0",)
    found, _ = run_hasten(monkeypatch, must_be_faster=True, **script)
    assert found.is_met and quantizer_of(found.plan).float_layers == ("l0", "l1")


def test_a_gain_without_a_loss_is_taken_even_if_float_stays_faster() -> None:
    less_slow = {"onnx": SpeedupFigures(0.8, 0.75, 0.85), "tflite": FAST}
    assert speed_module.is_better(less_slow, {"onnx": SLOW, "tflite": FAST})
    assert not speed_module.is_better({"onnx": EVEN, "tflite": EVEN}, {"onnx": SLOW, "tflite": FAST})
    assert not speed_module.is_better({**less_slow, "tflite": EVEN}, {"onnx": SLOW, "tflite": FAST})


def test_changes_of_the_quantizer_leave_the_rest_of_the_recipe_alone() -> None:
    plan = with_quantizer(PLAN, {"observer": "entropy"})
    assert [s.name for s in plan.passes] == [s.name for s in PLAN.passes]
    assert quantizer_of(plan).observer == "entropy" and quantizer_of(PLAN).observer == "mse"
    twice = with_float_layers(with_float_layers(PLAN, ["a"]), ["a", "b"])
    assert quantizer_of(twice).float_layers == ("a", "b")


def test_files_that_are_only_timed_are_made_from_a_few_images() -> None:
    whole = with_float_layers(with_quantizer(PLAN, {"rounding": "adaround", "weight_bits": 7}), ["stem"])
    timed = quantizer_of(to_be_timed(whole))
    assert (timed.num_samples, timed.rounding) == (16, "nearest")
    assert (timed.float_layers, timed.weight_bits) == (("stem",), 7)
    fewer = with_quantizer(PLAN, {"num_samples": 4})
    assert quantizer_of(to_be_timed(fewer)).num_samples == 4
    unquantized = Plan(Recipe.load("fp16").passes)
    assert to_be_timed(unquantized) == unquantized
