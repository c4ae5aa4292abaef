"""`edgecnn compress` with pruning and training: one command, from the flags to the proven files."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")

import onnx
import running
import small_networks
from running import RESULTS, names, run_onnx, run_tflite

import edgecnn
from edgecnn.cli.main import main
from edgecnn.errors import OutputError, PassError
from edgecnn.load import load_model
from edgecnn.making import too_large
from edgecnn.prune.prune_channels import PruneChannels
from edgecnn.recipe import Recipe
from edgecnn.report import Report

pytestmark = pytest.mark.usefixtures("latency_costs_nothing")

Captured = pytest.CaptureFixture[str]
SMALL = running.small("deep")
DATA = ["--data", "small_networks:images"]
BRIEF = ["--epochs", "1", "--batch-size", "8"]


def compress(out: Path, capsys: Captured, *arguments: str) -> Report:
    code = main(["compress", *SMALL, *arguments, "-o", str(out), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return Report.from_json(captured.out)


def fails(out: Path, capsys: Captured, *arguments: str) -> tuple[str, str]:
    """Return the error and the hint of a run that must fail with exit code 1."""
    code = main(["compress", *SMALL, *arguments, "-o", str(out)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert code == 1
    return lines[0].removeprefix("error: "), (lines[1:] or ["hint: "])[0].removeprefix("hint: ")


@pytest.fixture(scope="module")
def whole_chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """Prune, distil, int8, both files, in one command."""
    out = tmp_path_factory.mktemp("chain")
    arguments = ["--prune", "0.5", "--distill", *BRIEF, "--int8", *DATA, "-o", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("edgecnn.judgement"), "measure_latency", running.latency)
        assert main(["compress", *SMALL, *arguments]) == 0
    return out, Report.from_json((out / "report.json").read_text())


def test_one_command_does_all_of_it(whole_chain: tuple[Path, Report]) -> None:
    out, report = whole_chain
    assert names(out) == RESULTS
    assert report.recipe == "prune50_distill_wi8_ai8"
    done = [step.name for step in report.passes]
    assert done[:2] == ["prune_channels", "distill"]
    assert done[-1] == "quantize_static"
    assert Recipe.from_toml(report.recipe_toml).name == report.recipe


def test_a_layer_that_is_not_there_is_said_before_the_training(tmp_path: Path, capsys: Captured) -> None:
    text = Recipe.load("prune50_wi8_ai8").to_toml().replace("float_layers = []", 'float_layers = ["haed"]')
    (tmp_path / "mine.toml").write_text(text)
    out = tmp_path / "out"
    code = main(["compress", *SMALL, "--recipe", str(tmp_path / "mine.toml"), *DATA, "-o", str(out)])
    said = capsys.readouterr().err
    assert code == 1
    assert "(quantize_static): float_layers names 'haed', and the network has no such layer" in said
    assert "`edgecnn inspect MODEL` lists them" in said
    assert "pass 1" not in said, "nothing was trained"
    assert not out.exists() or names(out) == set()


def test_float_is_the_network_as_it_was_given(whole_chain: tuple[Path, Report]) -> None:
    out, report = whole_chain
    module = small_networks.deep()
    assert report.model.params == sum(p.numel() for p in module.parameters())
    assert report.model.params_after is not None and report.model.macs_after is not None
    assert 0 < report.model.params_after < report.model.params
    assert 0 < report.model.macs_after < report.model.macs
    for size in report.sizes.values():
        assert size.size_bytes < size.float_size_bytes
        assert size.float_size_bytes > 4 * report.model.params
    pruned = load_model(out / "model.pt2")
    kept = sum(b.numel() for b in pruned.graph.buffers() if b.dim() == 4)
    assert kept < sum(p.numel() for p in module.parameters() if p.dim() == 4)


def test_the_files_hold_no_channel_that_is_gone(whole_chain: tuple[Path, Report]) -> None:
    out, report = whole_chain
    (detail,) = [d for d in report.details if d["kind"] == "pruning"]
    left = {layer["layer"].split(" ")[0]: layer["channels_left"] for layer in detail["layers"]}
    assert left["0"] < 16 and left["3"] < 24
    model = onnx.load(out / "model.onnx")
    widths = [t.dims[0] for t in model.graph.initializer if len(t.dims) == 4]
    assert sorted(widths)[-1] < 24


def test_training_curves_are_in_the_report_and_on_the_page(whole_chain: tuple[Path, Report]) -> None:
    out, report = whole_chain
    (curves,) = [d for d in report.details if d["kind"] == "training_curves"]
    assert curves["pass"] == "distill"
    assert len(curves["steps"]) == len(curves["loss"]) == report.data.num_train // 8
    assert all(value > 0 for value in curves["loss"])
    page = (out / "report.html").read_text()
    for text in ("Pruning", "Channels of each layer", "Training: distill", "Loss over the epochs"):
        assert text in page


def test_no_image_is_both_trained_on_and_judged_by(whole_chain: tuple[Path, Report]) -> None:
    _, report = whole_chain
    data = report.data
    assert report.accuracy is not None
    used = data.num_train + data.num_validation + data.num_calibration + report.accuracy.num_samples
    assert used == 40
    assert (data.train_source, data.held_out) == ("small_networks:images", True)


def test_pruned_files_stay_float_without_int8(tmp_path: Path, capsys: Captured) -> None:
    report = compress(tmp_path, capsys, "--prune", "0.5", *BRIEF, *DATA)
    assert report.recipe == "prune50"
    assert [step.name for step in report.passes] == ["prune_channels", "fine_tune", "fold_batch_norm"]
    for parity in report.parity.values():
        assert parity.max_relative_error is not None and parity.max_relative_error < 1e-5
        assert parity.top1_agreement == 1.0
    for name, size in report.sizes.items():
        assert 2 * size.size_bytes < 1.5 * size.float_size_bytes, name
    pixels, _ = small_networks.images()
    x = pixels.astype(np.float32).transpose(0, 3, 1, 2) / 255
    a, b = (
        run_onnx(tmp_path / "model.onnx", x),
        run_tflite(tmp_path / "model.tflite", x.transpose(0, 2, 3, 1)),
    )
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "megabytes"), [([], 0.1), (["--fp16"], 0.06), (["--int8"], 0.03)])
def test_files_are_as_large_as_asked_for(
    tmp_path: Path, capsys: Captured, examples_dir: Path, kind: list[str], megabytes: float
) -> None:
    """LeNet-5 has 61,706 weights: 0.25 MB in float32, 0.127 in float16, 0.072 in int8."""
    model = str(examples_dir / "lenet5_digits.pt2")
    arguments = ["--prune-to-mb", f"{megabytes}", *kind, "--epochs", "0", "--no-search", "--data", "digits"]
    assert main(["compress", model, *arguments, "-o", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for name in ("model.onnx", "model.tflite"):
        assert 0.9 * megabytes < (tmp_path / name).stat().st_size / 1e6 < 1.03 * megabytes
    larger = max((tmp_path / name).stat().st_size / 1e6 for name in ("model.onnx", "model.tflite"))
    assert ("prune_channels was to leave a file of" in out) is (larger > megabytes)


def test_a_file_larger_than_pruning_was_to_make_it_is_said() -> None:
    step = PruneChannels(size_mb=0.5)
    assert too_large([step], {"onnx": 499_999, "tflite": 625_000}) == [
        "prune_channels was to leave a file of 0.5 MB, and the tflite file has 0.625 MB: ask for 0.4"
    ]
    assert too_large([PruneChannels(ratio=0.5)], {"onnx": 625_000}) == []


@pytest.mark.slow
def test_the_table_says_what_was_pruned_and_trained(tmp_path: Path, capsys: Captured) -> None:
    assert main(["compress", *SMALL, "--prune", "0.5", *BRIEF, *DATA, "-o", str(tmp_path)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("Pruned MACs ") and line.endswith("x fewer") for line in lines)
    assert any(line.startswith("params ") for line in lines)
    assert any(line.startswith("trained on ") and "images of small_networks:images" in line for line in lines)
    assert any(line.startswith("fine_tune 1 epoch, validation top-1") for line in lines)
    assert any("of range" in line or "no difference" in line for line in lines)


def test_without_data_the_accuracy_is_not_won_back(tmp_path: Path, capsys: Captured) -> None:
    report = compress(tmp_path, capsys, "--prune", "0.5")
    assert report.recipe == "prune50_untrained"
    assert report.accuracy is None
    assert any(text.startswith("pruned without training: the accuracy") for text in report.warnings)
    assert report.data.train_source is None


@pytest.mark.slow
def test_distilling_needs_no_labels(tmp_path: Path, capsys: Captured) -> None:
    arguments = ["--data", "small_networks:images", "--train-data", "small_networks:unlabelled"]
    report = compress(tmp_path, capsys, "--prune", "0.3", "--distill", *BRIEF, *arguments)
    assert (report.data.train_source, report.data.num_train) == ("small_networks:unlabelled", 38)
    assert report.accuracy is not None


@pytest.mark.slow
def test_another_teacher(tmp_path: Path, capsys: Captured) -> None:
    report = compress(tmp_path, capsys, "--distill", "--teacher", "small_networks:classifier", *BRIEF, *DATA)
    (taught,) = [d for d in report.details if d["kind"] == "distillation"]
    assert report.recipe == "distill"
    assert "classifier" in taught["teacher"].lower() or "sequential" in taught["teacher"].lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prune", "1.0", *DATA], "--prune is 1, expected a fraction between 0 and 1"),
        (["--prune", "0", *DATA], "--prune is 0, expected"),
        (["--prune-macs", "0.9999", *BRIEF, *DATA], "the least in reach is"),
        (["--prune", "0.5", "--epochs", "2"], "--epochs is 2, and there are no images to train on"),
        (["--epochs", "2", *DATA], "--epochs is 2, but no pass of the recipe static_wi8_ai8 trains"),
        (
            ["--prune", "0.5", "--data", "small_networks:unlabelled"],
            "fine_tune needs labels, found 40 images",
        ),
        (
            ["--prune", "0.5", *DATA, "--train-data", "small_networks:wrong_labels"],
            "small_networks:wrong_labels: 1 of 40 labels are out of range",
        ),
        (
            ["--prune", "0.5", "--distill", *DATA, "--teacher", "small_networks:regression"],
            "the teacher regression gives (n, 1) and the student deep (n, 5), expected the same outputs",
        ),
        (
            ["--prune", "0.5", "--distill", *DATA, "--teacher", "small_networks:nothing"],
            "the teacher small_networks:nothing: ",
        ),
        (["--prune", "0.5", *DATA, "--teacher", "small_networks:deep"], "a teacher is given, but no pass"),
        (["--int8", *DATA, "--train-data", "small_networks:images"], "but no pass of the recipe trains"),
        (["--prune", "0.5", "--io", "int8", *DATA], "io is 'int8', but the recipe prune50 does not quantize"),
        (["--prune", "0.5", *DATA, "--resume"], "holds no checkpoints"),
        (["--int8", *DATA, "--resume"], "nothing to resume: the recipe static_wi8_ai8 does not train"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: Captured, arguments: list[str], message: str
) -> None:
    found, _ = fails(tmp_path / "o", capsys, *arguments)
    assert message in found
    assert not (tmp_path / "o").exists()


class Killed(BaseException):
    """Stands for a process that is gone."""


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every state is saved, and the run ends at the second time."""
    checkpoint = importlib.import_module("edgecnn.train.checkpoint")
    original = checkpoint.Checkpoint.save
    saved = []

    def save(self: Any, state: Any) -> None:
        original(self, state)
        saved.append(self.path)
        if len(saved) == 2:
            raise Killed

    monkeypatch.setattr(checkpoint, "INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint.Checkpoint, "is_due", property(lambda _: True))
    monkeypatch.setattr(checkpoint.Checkpoint, "save", save)
    return saved


def train(out: Path, **changes: Any) -> edgecnn.Report:
    values = {"seed": 0, **changes}
    recipe = Recipe.from_toml(
        "[[passes]]\npass = 'prune_channels'\n[[passes]]\npass = 'fine_tune'\nepochs = 2.0\nbatch_size = 4\n"
        "[[passes]]\npass = 'fold_batch_norm'\n",
        "mine",
    )
    options = edgecnn.CompressOptions(
        load=edgecnn.LoadOptions(input_shape=small_networks.SIZE, preprocess="unit"), measure=False, **values
    )
    return edgecnn.compress(
        small_networks.deep(), recipe=recipe, data="small_networks:images", out=out, options=options
    ).report


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_files(tmp_path: Path, killed: list[Path]) -> None:
    with pytest.raises(Killed):
        train(tmp_path / "a")
    assert names(tmp_path / "a") == {"checkpoints"}
    hint = "go on with it with --resume, or start over with --force"
    with pytest.raises(OutputError, match="holds the checkpoints of an unfinished run") as found:
        train(tmp_path / "a")
    assert found.value.hint == hint
    with pytest.raises(OutputError, match="belongs to another run: seed was 0, is 1"):
        train(tmp_path / "a", seed=1, resume=True)
    resumed = train(tmp_path / "a", resume=True)
    unbroken = train(tmp_path / "b")
    assert names(tmp_path / "a") == names(tmp_path / "b") == RESULTS
    assert resumed.artifacts["onnx"].sha256 == unbroken.artifacts["onnx"].sha256
    assert resumed.artifacts["tflite"].sha256 == unbroken.artifacts["tflite"].sha256


@pytest.mark.slow
def test_an_unfinished_run_can_be_dropped(tmp_path: Path, killed: list[Path]) -> None:
    with pytest.raises(Killed):
        train(tmp_path)
    train(tmp_path, seed=1, force=True)
    assert names(tmp_path) == RESULTS


def test_a_full_disk_while_checkpointing_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = importlib.import_module("edgecnn.train.checkpoint")

    def full(*_: Any) -> None:
        raise OutputError("cannot write: No space left on device")

    monkeypatch.setattr(checkpoint, "_write_to_disk", full)
    with pytest.raises(OutputError, match="No space left"):
        train(tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_a_pass_that_fails_after_training_keeps_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folding = importlib.import_module("edgecnn.graph.folding")

    def broken(*_: Any) -> None:
        raise PassError("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(folding.FoldBatchNorm, "requires", broken)
        with pytest.raises(PassError, match=r"pass 3 of 3 \(fold_batch_norm\): broken on purpose"):
            train(tmp_path)
    assert names(tmp_path) == {"checkpoints"}
    train(tmp_path, resume=True)
    assert names(tmp_path) == RESULTS


def test_a_dry_run_shows_the_recipe_and_where_images_go(capsys: Captured, tmp_path: Path) -> None:
    arguments = ["--prune", "0.5", "--distill", "--int8", "--data", "a", "--train-data", "b"]
    assert main(["compress", "missing.pt2", *arguments, "-o", str(tmp_path / "o"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert Recipe.from_toml(text) == Recipe.load("prune50_distill_wi8_ai8")
    assert "#   train on     b\n" in text
    assert "#   learn from   the network as it was given\n" in text
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_the_python_api_takes_the_recipe_by_name(tmp_path: Path) -> None:
    options = edgecnn.CompressOptions(
        load=edgecnn.LoadOptions(input_shape=small_networks.SIZE, preprocess="unit"),
        measure=False,
        num_samples=16,
    )
    result = edgecnn.compress(
        small_networks.deep(),
        recipe="prune50_distill_wi8_ai8",
        data="small_networks:images",
        out=tmp_path,
        options=options,
    )
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["recipe"] == result.report.recipe == "prune50_distill_wi8_ai8"
    assert values["model"]["macs_after"] < values["model"]["macs"]
