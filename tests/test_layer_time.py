"""Which layers eat the time: each layer of a TFLite file as a file of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import nets
import numpy as np
import pytest
from tflite_session import TfliteSession

from edgecnn.errors import UnsupportedOpError
from edgecnn.export.tflite import TfliteOptions, to_tflite
from edgecnn.graph.build import build_program
from edgecnn.graph.program import Program
from edgecnn.making import Plan
from edgecnn.recipe import Recipe
from edgecnn.report.results import SpeedupFigures
from edgecnn.search import layer_time
from edgecnn.search import speed as speed_module
from edgecnn.search.layer_time import RUNTIME, LayerTime, layer_programs, layer_times
from edgecnn.search.speed import hasten

QUICK = {"min_runs": 2, "max_seconds": 1.0, "warmup_seconds": 0.01}


def bench() -> Any:
    silent = SimpleNamespace(start=lambda *_: None, finish=lambda: None)
    return SimpleNamespace(
        maker=SimpleNamespace(progress=silent, options=SimpleNamespace(threads=1)), trials=[]
    )


def made(name: str) -> Any:
    program = nets.quantized_program(name)
    return SimpleNamespace(
        float_program=build_program(nets.folded(name)),
        program=program,
        files={"tflite": b""},
        loaded=nets.model(name),
        activation_dtype="uint8",
    )


@pytest.mark.parametrize("name", ["residual", "se_conv", "inception", "multi_output"])
def test_every_operator_is_in_one_piece(name: str) -> None:
    program = nets.quantized_program(name)
    pieces = list(layer_programs(program))
    assert sorted(op.output for _, piece in pieces for op in piece.ops) == sorted(
        o.output for o in program.ops
    )
    paths = [path for path, _ in pieces if path != RUNTIME]
    assert len(paths) == len(set(paths))
    between = [op.kind for path, piece in pieces if path == RUNTIME for op in piece.ops]
    assert set(between) <= {"quantize", "dequantize", "requantize"}


def test_pieces_one_after_another_compute_what_the_file_does() -> None:
    program, x = nets.quantized_program("residual"), nets.held_out(1)
    whole = TfliteSession(to_tflite(program)).run({program.inputs[0]: x})
    values = {program.inputs[0]: x}
    for path, piece in layer_programs(program):
        in_int8 = [piece.tensors[name].quant is not None for name in piece.inputs]
        assert all(in_int8) or path == RUNTIME
        values.update(run_stored(piece, values))
    ((public, name),) = program.outputs
    np.testing.assert_array_equal(values[name], whole[public])


def run_stored(piece: Program, values: dict[str, Any]) -> dict[str, Any]:
    """Run a piece in LiteRT on what the file would hold there, in the file's own layout."""
    file = to_tflite(piece, TfliteOptions())
    session = TfliteSession(file)
    return session.run({name: values[name] for name in piece.inputs})


def test_the_layers_of_both_files_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    run = layer_time._run

    def quick(candidates: Any, threads: int, **limits: Any) -> Any:
        asked.append(len(list(candidates)))
        return run(candidates, threads, **{**limits, **QUICK})

    monkeypatch.setattr(layer_time, "_run", quick)
    times = layer_times(bench(), made("residual"), "tflite")
    assert {"stem.0", "a1.0", "last.2", RUNTIME} <= {time.layer for time in times}
    assert all(time.int8_ms >= 0.0 and time.float_ms >= 0.0 for time in times)
    assert [time.lost_ms for time in times] == sorted((time.lost_ms for time in times), reverse=True)
    assert next(time for time in times if time.layer == RUNTIME).float_ms == 0.0
    pieces = sum(
        len(list(layer_programs(p))) for p in (made("residual").program, made("residual").float_program)
    )
    assert asked[0] < pieces + 1, "layers of one form are timed once"


def test_a_layer_that_has_no_file_of_its_own_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    write = layer_time.to_tflite

    def fussy(program: Program) -> Any:
        if program.name == "stem.0" and program.computes_in_float:
            raise UnsupportedOpError("no such form")
        return write(program)

    monkeypatch.setattr(layer_time, "to_tflite", fussy)
    monkeypatch.setattr(
        layer_time, "_run", lambda found, *_, **__: {c.key: {"median_ms": 1.0} for c in found}
    )
    assert "stem.0" not in {time.layer for time in layer_times(bench(), made("residual"), "tflite")}


def test_a_slow_tflite_file_leads_to_its_own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ONNX file is fast, so neither its layers nor its channels are touched."""
    asked = []

    def times(bench: Any, made: Any, name: str) -> list[LayerTime]:
        asked.append(name)
        return [LayerTime("a1.0", 0.2, 0.1), LayerTime("stem.0", 0.1, 0.3)]

    monkeypatch.setattr(speed_module, "layer_times", times)
    slow, fast = SpeedupFigures(0.5, 0.45, 0.55), SpeedupFigures(2.0, 1.9, 2.1)
    tried = []

    def try_speed(change: str, plan: Plan, formats: Any) -> Any:
        tried.append((change, plan.passes[-1].float_layers))  # type: ignore[attr-defined]
        return SimpleNamespace(error="", size_share=0.3, speedup={"onnx": fast, "tflite": fast}), None

    workbench = bench()
    workbench.try_speed, workbench.keep = try_speed, lambda trial: trial
    plan = Plan(Recipe.load("static_wi8_ai8").passes)
    found = hasten(workbench, plan, made("residual"), {"onnx": fast, "tflite": slow})
    assert asked == ["tflite"]
    assert tried == [("1 layer in float: a1.0", ("a1.0",))]
    assert found.is_met and {n: [t.layer for t in ts] for n, ts in found.slow_layers.items()} == {
        "tflite": ["a1.0"]
    }


def test_a_profile_that_fails_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise UnsupportedOpError("nothing can be timed")

    monkeypatch.setattr(speed_module, "layer_times", fails)
    workbench, slow = bench(), SpeedupFigures(0.5, 0.45, 0.55)
    plan = Plan(Recipe.load("static_wi8_ai8").passes)
    found = hasten(workbench, plan, made("residual"), {"tflite": slow})
    assert not found.is_met and found.plan == plan
    assert workbench.trials[-1].error == "nothing can be timed"
