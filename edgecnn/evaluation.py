"""Accuracy of a file or a network on labelled images; a file needs its runtime alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgecnn.artifact import read_artifact, sidecar_path
from edgecnn.data import open_dataset, require_labels
from edgecnn.errors import DataError, LoadError
from edgecnn.load import LoadOptions
from edgecnn.model import ModelSpec
from edgecnn.options import CompressOptions
from edgecnn.pipeline import Progress, SilentProgress
from edgecnn.proof import Candidate, predict, temporary_folder

ARTIFACT_SUFFIXES = (".onnx", ".tflite")


def evaluate(
    artifact_or_model: Any,
    *,
    data: Any,
    options: CompressOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure top-1 and top-5 accuracy in the real runtime.

    Args:
        artifact_or_model: an .onnx or .tflite file that `compress` wrote (its sidecar beside it), run as it
            is; or any model that `compress` takes, run as float ONNX.
        data: labelled images, whatever `edgecnn.data.open_dataset` takes.
        options: `load` and `threads` are used.
        progress: told how far it is.

    Returns:
        {"path" or "model", "runtime", "top1", "top5", "num_samples", "classes", "preprocess"}; fractions in
        [0, 1], top5 None below 6 classes.

    Raises:
        DataError: if the images have no labels or do not fit.
        LoadError: if the file has no sidecar or the model cannot be loaded.
    """
    options = options or CompressOptions()
    options.check()
    progress = progress or SilentProgress()
    if isinstance(artifact_or_model, (str, Path)) and str(artifact_or_model).endswith(ARTIFACT_SUFFIXES):
        path = Path(artifact_or_model)
        if path.is_file() and not sidecar_path(path).is_file():
            raise LoadError(
                f"{path} has no sidecar {sidecar_path(path).name}, which says how images become its input",
                hint="keep the .json that compress wrote beside it",
            )
        if options.load != LoadOptions():
            raise LoadError(
                f"{path} carries its own network and preprocess in its sidecar",
                hint="leave out the options that say how to load a model",
            )
        spec = read_artifact(path).spec
        return {"path": str(path), **_measure(path, spec, data, options.threads, progress)}
    return _evaluate_network(artifact_or_model, data, options, progress)


def _evaluate_network(source: Any, data: Any, options: CompressOptions, progress: Progress) -> dict[str, Any]:
    """Measure a network as float ONNX; only this needs PyTorch."""
    from edgecnn.export.files import FileOptions, write_model
    from edgecnn.graph.build import build_program
    from edgecnn.graph.folding import FoldBatchNorm
    from edgecnn.judgement import stage_file
    from edgecnn.load import load_model
    from edgecnn.pipeline import PassContext
    from edgecnn.preflight import require_packages

    require_packages(("onnx",))
    progress.start("load and export the graph", None)
    model = load_model(source, options.load)
    program = build_program(FoldBatchNorm().run(model, PassContext()))
    file = write_model(program, "onnx", model.spec, FileOptions())
    progress.finish()
    with temporary_folder() as folder:
        path = stage_file(file, folder, model, "float")
        return {"model": model.spec.name, **_measure(path, model.spec, data, options.threads, progress)}


def _measure(path: Path, spec: ModelSpec, data: Any, threads: int, progress: Progress) -> dict[str, Any]:
    """Run every image of the data through one file."""
    shape = spec.outputs[0].shape
    if spec.task != "classification" or shape[1] is None:
        raise DataError(
            f"{spec.name} is of task {spec.task!r}, its output has shape {_spell(shape)}; accuracy is "
            "measured for classification only, outputs of shape n x classes"
        )
    dataset = open_dataset(data, spec.preprocess, class_count=shape[1], labels=spec.labels)
    require_labels(dataset, "accuracy")
    found = predict([Candidate("file", path)], dataset, range(len(dataset)), "file", progress, threads)
    runtimes = found.environment.get("runtimes", {})
    return {
        "runtime": ", ".join(f"{name} {version}" for name, version in runtimes.items()),
        "top1": found.top1["file"],
        "top5": found.top5["file"],
        "num_samples": found.num_samples,
        "classes": shape[1],
        "preprocess": spec.preprocess.to_dict(),
    }


def _spell(shape: tuple[int | None, ...]) -> str:
    return " x ".join("n" if size is None else str(size) for size in shape)
