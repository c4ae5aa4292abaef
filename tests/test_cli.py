"""The command line: what reaches the functions, what reaches stdout and stderr, and the exit codes.

The work itself is tested elsewhere; here it is replaced by functions that note what they are given.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from reports import REPORT

from edgecnn.cli.main import main
from edgecnn.errors import BudgetError, LoadError
from edgecnn.recipe import Recipe

pytest.importorskip("torch", reason="recipes import their passes")
HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "ai_edge_litert", "rich", "sklearn", "PIL")


class Recorder:
    """Stands for compress, evaluate or inspect_model: notes its arguments, then returns or raises."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.arguments: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.arguments, self.named = arguments, named
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        if "progress" in named:
            named["progress"].start("calibrating", 512)
            named["progress"].advance(512)
            named["progress"].finish()
        return self.outcome


def install(monkeypatch: pytest.MonkeyPatch, name: str, outcome: Any) -> Recorder:
    recorder = Recorder(outcome)
    module = {"evaluate": "edgecnn.evaluation", "inspect_model": "edgecnn.inspection"}.get(
        name, "edgecnn.compress"
    )
    monkeypatch.setattr(importlib.import_module(module), name, recorder)
    return recorder


@pytest.fixture
def compress(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return install(monkeypatch, "compress", SimpleNamespace(report=REPORT))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["compress", "--help"], ["--version"], ["recipes", "list"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; from edgecnn.cli.main import main; code = main(sys.argv[1:]); "
        f"print('loaded:', [name for name in {HEAVY!r} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    allowed = ["numpy"] if arguments[0] == "recipes" else []
    assert done.stdout.splitlines()[-1] == f"loaded: {allowed}"


def test_the_defaults_of_compress(compress: Recorder) -> None:
    assert main(["compress", "model.pt2", "--int8"]) == 0
    assert compress.arguments == ("model.pt2",)
    assert compress.named["recipe"] == Recipe.load("static_wi8_ai8")
    assert compress.named["data"] is None
    assert compress.named["out"] == Path("out")
    options = compress.named["options"]
    assert (options.formats, options.io, options.target) == (("onnx", "tflite"), "float32", "local_cpu")
    assert (options.num_samples, options.seed, options.force, options.threads) == (None, 0, False, 1)
    assert (options.train_data, options.teacher, options.resume) == (None, None, False)
    assert (options.max_drop, options.max_latency_ms, options.max_size_mb) == (None, None, None)


def test_every_option_of_compress_arrives(compress: Recorder) -> None:
    text = (
        "compress net.pth -o here --format tflite --io uint8 --data images --num-samples 64 "
        "--arch timm:resnet18 --weights w.pth --input-shape 3x224x160 --preprocess unit --mean 0.5,0.25,0 "
        "--std 1,1,2 --channel-order bgr --trust --target raspberrypi4 --threads 2 --max-drop 0.5 "
        "--max-latency-ms 3 --max-size-mb 1.5 --seed 7 --force"
    )
    assert main(text.split()) == 0
    options, load = compress.named["options"], compress.named["options"].load
    assert (compress.named["out"], compress.named["data"]) == (Path("here"), "images")
    assert (options.formats, options.io, options.target, options.threads) == (
        ("tflite",),
        "uint8",
        "raspberrypi4",
        2,
    )
    assert (options.max_drop, options.max_latency_ms, options.max_size_mb) == (0.5, 3.0, 1.5)
    assert (options.seed, options.force) == (7, True)
    assert (load.arch, load.weights, load.input_shape) == ("timm:resnet18", "w.pth", (3, 224, 160))
    assert (load.preprocess, load.mean, load.std) == ("unit", (0.5, 0.25, 0.0), (1.0, 1.0, 2.0))
    assert (load.channel_order, load.trust, load.seed) == ("bgr", True, 7)
    assert compress.named["recipe"].seed == 7
    assert compress.named["recipe"].passes[-1].num_samples == 64


def test_formats_are_taken_once_and_in_one_order(compress: Recorder) -> None:
    main(["compress", "m", "--format", "tflite", "--format", "onnx", "--format", "tflite"])
    assert compress.named["options"].formats == ("onnx", "tflite")


def test_the_table_goes_to_stdout_and_progress_to_stderr(
    compress: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", "m"]) == 0
    captured = capsys.readouterr()
    assert "Smaller" in captured.out
    assert "calibrating" not in captured.out
    assert captured.err == "calibrating (512)\n"


def test_json_is_all_there_is_on_stdout(compress: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "m", "--json"]) == 0
    assert capsys.readouterr().out == REPORT.to_json()


def test_a_dry_run_prints_a_recipe_and_does_nothing(
    compress: Recorder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "o"
    assert main(["compress", "m", "--dry-run", "--seed", "3", "--num-samples", "9", "-o", str(out)]) == 0
    text = capsys.readouterr().out
    recipe = Recipe.from_toml(text)
    assert (recipe.seed, recipe.passes[-1].num_samples) == (3, 9)  # type: ignore[attr-defined]
    assert f"#   write        {out}/model.onnx, {out}/model.tflite" in text
    assert compress.arguments == ()
    assert not out.exists()


def test_an_error_is_one_line_and_a_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("EDGECNN_DEBUG", raising=False)
    install(monkeypatch, "compress", LoadError("m: is empty, expected a model", hint="export it again"))
    assert main(["compress", "m"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: m: is empty, expected a model\nhint: export it again\n"
    assert captured.out == ""


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EDGECNN_DEBUG", "1")
    install(monkeypatch, "compress", LoadError("m: is empty"))
    assert main(["compress", "m"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_missed_budget_has_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, "compress", BudgetError("top-1 fell by 1.2 points, at most 0.5 allowed"))
    assert main(["compress", "m", "--max-drop", "0.5"]) == 3
    assert "error: top-1 fell by 1.2 points" in capsys.readouterr().err


def test_ctrl_c_says_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, "compress", KeyboardInterrupt())
    assert main(["compress", "m"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted; no unfinished file is left"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("compress", "Missing argument 'MODEL'"),
        ("compress m --int9", "No such option"),
        ("compress m --int8 --recipe x", "give --int8 or --recipe, not both"),
        ("compress m --input-shape 3x0x3", "'3x0x3' is not a shape, expected CxHxW such as 3x224x224"),
        ("compress m --input-shape 224x224", "'224x224' is not a shape"),
        ("compress m --mean a,b", "'a,b' is not a list of numbers, expected one per channel"),
        ("compress m --mean nan", "'nan' is not a list of numbers"),
        ("compress m --format keras", "'keras' is not one of"),
        ("compress m --seed -1", "-1 is not in the range"),
        ("compress m --num-samples 0", "0 is not in the range"),
        ("evaluate m", "Missing option '--data'"),
        ("compres m", "No such command 'compres'"),
    ],
)
def test_wrong_usage(text: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(text.split()) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [["--recipe", "static_wi8_ai"], ["--target", "raspberrypi44"]])
def test_a_misspelt_name_is_said_before_any_work(
    arguments: list[str], compress: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", "m", *arguments]) == 1
    assert "did you mean" in capsys.readouterr().err
    assert compress.arguments == ()


def test_evaluate_prints_percent_or_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"top1": 0.984, "top5": None, "num_samples": 500}
    recorder = install(monkeypatch, "evaluate", figures)
    assert main(["evaluate", "model.onnx", "--data", "digits", "--threads", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "top1         98.40 %", "top5         not measured", "num_samples  500",
    ]  # fmt: skip
    assert recorder.arguments == ("model.onnx",)
    assert recorder.named["data"] == "digits"
    assert recorder.named["options"].threads == 2
    assert main(["evaluate", "model.onnx", "--data", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == figures


def test_inspect_prints_a_table_or_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {
        "name": "net", "params": 10, "macs": 20, "size_bytes": 40, "inputs": [], "outputs": [],
        "preprocess": None, "layers": [], "unsupported": [],
    }  # fmt: skip
    recorder = install(monkeypatch, "inspect_model", found)
    assert main(["inspect", "m.pt2", "--input-shape", "1x8x8"]) == 0
    assert "net  10 params, 20 MACs" in capsys.readouterr().out
    assert recorder.arguments[0] == "m.pt2"
    assert recorder.arguments[1].input_shape == (1, 8, 8)
    assert main(["inspect", "m.pt2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "  Static int8: int8 weights" in lines["static_wi8_ai8"]
    assert "  Weights in float16, everything computed in float32" in lines["fp16"]
    assert all(len(line.split()) > 8 for line in lines.values())
    assert main(["recipes", "show", "static_wi8_ai8"]) == 0
    assert Recipe.from_toml(capsys.readouterr().out) == Recipe.load("static_wi8_ai8")


def test_devices_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "list"]) == 0
    assert "raspberrypi4" in capsys.readouterr().out
    assert main(["devices", "show", "raspberrypi4"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {"name raspberrypi4", "isa aarch64"} <= set(lines)
