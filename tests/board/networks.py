"""The networks that run on boards: int8 and float, in both formats, and images for them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
NUM_LABELLED = 50


@dataclass(frozen=True)
class Network:
    """One network as files for a Raspberry Pi 4, and images it has not been calibrated with.

    Attributes:
        files: by "onnx", "tflite" (int8), "float_onnx" and "float_tflite".
        images: .npy, float32 (n, c, h, w).
        few: the first of them.
        labels: .npy, (n,).
    """

    files: dict[str, Path]
    images: Path
    few: Path
    labels: Path

    def artifacts(self, *keys: str) -> list[dict[str, str]]:
        """Return the runner's form of the named files, or of all."""
        return [{"key": key, "path": str(self.files[key])} for key in keys or self.files]


_MADE: dict[str, Network] = {}


def make_network(name: str, factory: pytest.TempPathFactory) -> Network:
    """Return a network's files, made once in a session."""
    for package in ("torch", "onnxruntime", "ai_edge_litert", "sklearn"):
        pytest.importorskip(package)
    if name not in _MADE:
        _MADE[name] = _make(name, factory.mktemp(name))
    return _MADE[name]


def _make(name: str, folder: Path) -> Network:
    import edgecnn
    from edgecnn.data import open_dataset
    from edgecnn.load import load_model

    model, source, load, few = _sources()[name]()
    options = edgecnn.CompressOptions(load=load, target="raspberrypi4", num_samples=64, measure=False)
    made = edgecnn.compress(model, data=source, out=folder / "int8", options=options)
    loaded = load_model(model, load)
    files = {key: artifact.path for key, artifact in made.artifacts.items()}
    files |= {f"float_{key}": path for key, path in _float_files(loaded, folder / "float").items()}

    preprocess = loaded.spec.preprocess
    assert preprocess is not None
    dataset = open_dataset(source, preprocess)
    assert dataset.labels is not None
    indices = np.random.default_rng(0).permutation(len(dataset))[:NUM_LABELLED].tolist()
    images = dataset.inputs(indices)
    np.save(folder / "images.npy", images)
    np.save(folder / "few.npy", images[:few])
    np.save(folder / "labels.npy", np.asarray(dataset.labels)[indices])
    return Network(files, folder / "images.npy", folder / "few.npy", folder / "labels.npy")


def _sources() -> dict[str, Any]:
    """Return name -> a function that gives (model, data, how to load it, images for comparing outputs)."""
    from edgecnn.load import LoadOptions

    def resnet20() -> tuple[Path, Path, LoadOptions, int]:
        load = LoadOptions(
            arch="benchmarks.cifar_resnet:resnet20", input_shape=(3, 32, 32), preprocess="imagenet"
        )
        weights = DATA / "weights" / "resnet20-12fca82f.th"
        return weights, DATA / "cifar10" / "test1000.npz", load, 8

    def lenet5() -> tuple[Path, str, LoadOptions, int]:
        return ROOT / "examples" / "lenet5_digits.pt2", "digits", LoadOptions(), 32

    return {"lenet5": lenet5, "resnet20": resnet20}


def _float_files(model: Any, folder: Path) -> dict[str, Path]:
    """Write a network as it is, batch norm folded."""
    from edgecnn.export.files import FORMATS, FileOptions, write_model
    from edgecnn.graph.build import build_program
    from edgecnn.graph.folding import FoldBatchNorm
    from edgecnn.judgement import stage_file
    from edgecnn.pipeline import PassContext, SilentProgress

    program = build_program(FoldBatchNorm().run(model, PassContext(None, (), 0, SilentProgress())))
    write = functools.partial(write_model, program, spec=model.spec, options=FileOptions())
    return {name: stage_file(write(format=name), folder, model, "float") for name in FORMATS}
