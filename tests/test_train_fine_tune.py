"""The pass fine_tune: through the pipeline, with checkpoints and records, on real networks and images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training
from running import ROOT

from edgecnn.data import open_dataset
from edgecnn.errors import PassError
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.graph.nodes import copy_graph
from edgecnn.load import LoadOptions, load_model
from edgecnn.model import Model
from edgecnn.pipeline import PassContext, run_passes
from edgecnn.recipe import Recipe
from edgecnn.train.checkpoint import Checkpoints
from edgecnn.train.fine_tune import FineTune, settings_of
from edgecnn.train.settings import TrainSettings


def context(checkpoints: Checkpoints | None = None) -> PassContext:
    data = training.train_data()
    return PassContext(
        train=data.dataset,
        train_indices=data.indices,
        validation_indices=data.validation,
        checkpoints=checkpoints,
    )


STEP = FineTune(epochs=4, learning_rate=0.05, batch_size=16, precision="float32", augment=("crop",))


def test_it_runs_in_a_pipeline_and_records_its_curves(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", {"run": "1"})
    given = context(checkpoints)
    model = run_passes(training.make_model(), [STEP], given, lambda m: {})
    assert [record.name for record in model.history] == ["fine_tune"]
    assert model.history[0].parameters["epochs"] == 4
    (record,) = given.records
    assert record["pass"] == "fine_tune"
    assert record["kind"] == "training_curves"
    assert record["validation_accuracy"][-1] == 1.0
    json.dumps(record)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    again = run_passes(training.make_model(), [STEP], context(checkpoints), lambda m: {})
    for first, second in zip(model.graph.parameters(), again.graph.parameters(), strict=True):
        assert torch.equal(first, second)


def test_its_fields_are_the_settings() -> None:
    assert settings_of(STEP) == TrainSettings(
        epochs=4, learning_rate=0.05, batch_size=16, precision="float32", augment=("crop",)
    )
    recipe = Recipe("r", (STEP,))
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_what_it_refuses() -> None:
    with pytest.raises(PassError, match=r"needs labelled training images, but this run has none"):
        run_passes(training.make_model(), [STEP], PassContext(), lambda m: {})
    with pytest.raises(PassError, match=r"has no trainable parameters.*before its batch norms are folded"):
        STEP.requires(without_parameters(training.make_model()))
    poisoned = training.make_model()
    poisoned = poisoned.with_graph(copy_graph(poisoned.graph))
    with torch.no_grad():
        next(poisoned.graph.parameters()).fill_(float("nan"))
    with pytest.raises(PassError, match=r"holds NaN or infinity after fine-tuning"):
        STEP.ensures(training.make_model(), poisoned)


def without_parameters(model: Model) -> Model:
    graph = copy_graph(FoldBatchNorm().run(model, None).graph)
    for name, parameter in list(graph.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        module = graph.get_submodule(owner)
        delattr(module, leaf)
        module.register_buffer(leaf, parameter.detach())
    return model.with_graph(graph)


def test_the_shipped_network_gets_its_accuracy_back(examples_dir: Path) -> None:
    """LeNet-5 with noise on its weights: 46 % of the digits, tuned with three epochs 95 % and more."""
    pytest.importorskip("sklearn")
    model = load_model(examples_dir / "lenet5_digits.pt2")
    graph = copy_graph(model.graph)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in graph.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * parameter.std() * 1.2)
    digits = open_dataset("digits", model.spec.preprocess)
    given = PassContext(
        train=digits, train_indices=tuple(range(1437)), validation_indices=tuple(range(1437, 1797))
    )
    FineTune(epochs=3, precision="float32").run(model.with_graph(graph), given)
    accuracy = given.records[0]["validation_accuracy"]
    assert accuracy[0] < 0.7
    assert accuracy[-1] > 0.94


@pytest.mark.slow
def test_resnet20_on_jpeg_images(data_dir: Path, tmp_path: Path) -> None:
    """40 steps on re-encoded images win accuracy back, in float32 and bfloat16 alike."""
    import tarfile

    with tarfile.open(data_dir / "cifar10" / "test_jpeg.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    options = LoadOptions(arch="benchmarks.cifar_resnet:resnet20", input_shape=(3, 32, 32))
    model = load_model(data_dir / "weights" / "resnet20-12fca82f.th", options)
    images = open_dataset(str(tmp_path), model.spec.preprocess, class_count=10)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    found = {}
    for precision in ("float32", "bfloat16"):
        given = PassContext(
            train=images, train_indices=tuple(order[1000:]), validation_indices=tuple(order[:1000])
        )
        step = FineTune(epochs=2, max_steps=40, precision=precision)  # type: ignore[arg-type]
        step.run(model, given)
        found[precision] = given.records[0]["validation_accuracy"]
    assert found["float32"][-1] > found["float32"][0]
    assert abs(found["float32"][-1] - found["bfloat16"][-1]) < 0.02


SMALL_MEMORY = """
import resource, sys
import torch
torch.set_num_threads(1)
import training
from dataclasses import replace
from edgecnn.train.data import TrainData
from edgecnn.train.loop import train
images = training.dataset(65536)
data = TrainData(images, tuple(range(65536)))
settings = replace(training.SETTINGS, batch_size=65536, augment=(), mixup=0.0, cutmix=0.0, patience=None)
model = training.make_model()
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 700_000_000, used + 700_000_000))
try:
    train(model, data, settings, seed=0)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_memory_that_really_runs_out() -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SMALL_MEMORY], env=environment, capture_output=True, text=True, timeout=200
    )
    assert "PassError out of memory at step 1 with 65536 images in a batch" in done.stdout, (
        done.stdout + done.stderr[-2000:]
    )
    assert "hint: set batch_size = " in done.stdout
