"""Running `edgecnn` as a process and inside this one, and what is measured at no cost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "import sys; from edgecnn.cli.main import main; sys.exit(main())"
RESULTS = {
    "model.onnx", "model.onnx.json", "model.tflite", "model.tflite.json", "model.pt2", "report.json",
    "report.html",
}  # fmt: skip
HIDE = """
import os
from importlib.machinery import PathFinder
find, hidden = PathFinder.find_spec, os.environ["HIDDEN"].split()
PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: (
        None if name.split(".")[0] in hidden else find(name, path, target)
    )
)
"""
"""A sitecustomize that lets packages seem not to be installed."""


def small(network: str) -> list[str]:
    """Return the arguments that compress one of `small_networks` on few images."""
    source = [f"small_networks:{network}", "--input-shape", "3x16x16"]
    return [*source, "--preprocess", "unit", "--num-samples", "16"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *map(str, arguments)]


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **(changes or {})}


def run(*arguments: object, changes: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(changes),
        check=False,
    )


def hide(folder: Path, *packages: str) -> dict[str, str]:
    """Return the environment of a process in which packages are not installed."""
    (folder / "sitecustomize.py").write_text(HIDE)
    paths = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "tests")])
    return {"HIDDEN": " ".join(packages), "PYTHONPATH": paths}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def latency(candidates: Any, inputs: Any, threads: int, progress: Any) -> dict[str, Any]:
    """Stands for `measure_latency`, with int8 twice as fast as float."""
    samples = {key.key: 2.0 if key.key.startswith("float") else 1.0 for key in candidates}
    return {
        "artifacts": {
            key: {"median_ms": ms, "p90_ms": ms, "p99_ms": None, "num_samples": 64}
            for key, ms in samples.items()
        },
        "speedup": {
            key: {"speedup": 2.0, "interval": [1.9, 2.1]} for key in samples if not key.startswith("float")
        },
        "environment": {},
        "warnings": [],
    }


def run_onnx(path: Path, inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Run a file with onnxruntime and nothing of edgecnn."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: inputs})[0])


def run_tflite(path: Path, inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Run a file with LiteRT and nothing of edgecnn, NHWC, one image at a time."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    source, target = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    rows = []
    for image in inputs:
        interpreter.set_tensor(source["index"], image[None])
        interpreter.invoke()
        rows.append(interpreter.get_tensor(target["index"]))
    return np.concatenate(rows)
