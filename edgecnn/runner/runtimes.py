"""The inference runtimes: which packages they come in, which files they take, and importing them."""

from __future__ import annotations

import importlib
import os
import time
from pathlib import Path
from types import ModuleType
from typing import Dict, List, Optional, Tuple

from .failure import MissingRuntimeFailure, RequestFailure, first_line

RUNTIMES = ("onnxruntime", "litert", "torch")

SUFFIXES = {".onnx": "onnxruntime", ".ort": "onnxruntime", ".tflite": "litert", ".pt2": "torch"}

MODULES: Dict[str, Tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime",),
    "litert": ("ai_edge_litert.interpreter", "tflite_runtime.interpreter", "tensorflow.lite"),
    "torch": ("torch",),
}

INSTALL_HINTS = {
    "onnxruntime": "pip install onnxruntime (no wheel for 32-bit ARM: use a .tflite file there)",
    "litert": "pip install ai-edge-litert (32-bit ARM, Python 3.11: pip install tflite-runtime 'numpy<2')",
    "torch": "pip install torch",
}

NUMPY_1_PACKAGE = "tflite_runtime"
NUMPY_1_HINT = "pip install 'numpy<2', or ai-edge-litert in place of tflite-runtime"

LABELS = {"ai_edge_litert": "litert", "tflite_runtime": "tflite-runtime"}

IMPORT_MS: Dict[str, float] = {}
"""Milliseconds the first import of each runtime took in this process."""


def runtime_of(path: Path, runtime: Optional[str]) -> str:
    """Return the runtime that runs a file: the one asked for, else the suffix's.

    Raises:
        RequestFailure: if it is none of RUNTIMES.
    """
    name = runtime or SUFFIXES.get(path.suffix.lower())
    if name not in RUNTIMES:
        found = f"runtime is {runtime!r}" if runtime else f"{path.name} has suffix {path.suffix!r}"
        raise RequestFailure(f"{found}, expected one of {', '.join(RUNTIMES)} ({', '.join(SUFFIXES)})")
    return name


def import_runtime(runtime: str) -> ModuleType:
    """Import the first of a runtime's packages that is installed, and note how long that took.

    Raises:
        MissingRuntimeFailure: if none can be imported; it names what to install and what went wrong.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    broken: List[str] = []
    for name in MODULES[runtime]:
        start = time.perf_counter_ns()
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                broken.append(f"{name}: {first_line(error)}")
            continue
        except Exception as error:  # noqa: BLE001 - a binary built for another NumPy fails in many ways
            broken.append(f"{name}: {first_line(error)}")
            continue
        IMPORT_MS.setdefault(runtime, (time.perf_counter_ns() - start) / 1e6)
        return module
    reason = f"cannot be imported ({'; '.join(broken)})" if broken else "is not installed"
    raise MissingRuntimeFailure(
        f"runtime {runtime} {reason}: tried {', '.join(MODULES[runtime])}", hint=INSTALL_HINTS[runtime]
    )


def package_label(package: str) -> str:
    """Return what a runtime's package is called where its version is told.

    Example:
        >>> package_label("ai_edge_litert"), package_label("tflite_runtime"), package_label("onnxruntime")
        ('litert', 'tflite-runtime', 'onnxruntime')
    """
    return LABELS.get(package, package)


def numpy_mismatch(
    package: Optional[str], version: Optional[str], numpy_version: Optional[str]
) -> Optional[str]:
    """Say that tflite_runtime, which was built for NumPy 1, stands beside NumPy 2; None if it does not.

    Such a pair imports, and fails without a reason when it opens a model.

    Example:
        >>> numpy_mismatch("tflite_runtime", "2.14.0", "1.26.4") is None
        True
    """
    if package != NUMPY_1_PACKAGE or numpy_version is None or int(numpy_version.split(".")[0]) < 2:
        return None
    return f"numpy {numpy_version} stands beside tflite-runtime {version}, which was built for numpy 1"
