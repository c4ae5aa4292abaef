"""ONNX files in ONNX Runtime."""

from __future__ import annotations

import re
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np

from .failure import InferenceFailure, MissingRuntimeFailure, ModelLoadFailure, RequestFailure, first_line
from .op_profile import read_profile
from .runtimes import import_runtime
from .session import Session
from .tensors import TensorInfo, apply_sidecar, read_sidecar

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "acl": "ACLExecutionProvider",
}

GPU_PROVIDERS = ("cuda", "tensorrt")
MAX_PROFILED_RUNS = 50
"""Enough for stable shares; the profiler stops recording after a million events."""

DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}

LOCATION = re.compile(
    r"^(?:\[ONNXRuntimeError\] : \d+ : \w+ : )?(?:Load model from .*? failed:)?(?:/\S+:\d+ .*?\) (?=[A-Z]))?"
)
"""What ONNX Runtime puts before its message: error code, file and the place in its own source."""


class OnnxRuntimeSession(Session):
    """An .onnx file; `invoke` is `InferenceSession.run`, the allocation of outputs included."""

    def __init__(self, path: Path, provider: str, threads: int, optimize: bool) -> None:
        super().__init__()
        if provider not in PROVIDERS:
            raise RequestFailure(f"provider is {provider!r}, onnxruntime has {', '.join(sorted(PROVIDERS))}")
        ort = import_runtime("onnxruntime")
        self.path, self.runtime, self.runtime_package, self.threads = (
            path,
            "onnxruntime",
            "onnxruntime",
            threads,
        )
        self.runtime_version = str(ort.__version__)
        wanted = PROVIDERS[provider]
        if wanted not in ort.get_available_providers():
            raise MissingRuntimeFailure(
                f"this build of onnxruntime has no {wanted}, only {', '.join(ort.get_available_providers())}",
                hint="install the onnxruntime build made for this board, or use provider cpu",
            )
        if provider in GPU_PROVIDERS and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        self._open_another: Callable[[Any], Any] = partial(_load, ort, path, [wanted])
        self._new_options: Callable[[], Any] = partial(_options, ort, threads, optimize)
        self._on_cpu = provider not in GPU_PROVIDERS
        start = time.perf_counter_ns()
        self._session = self._open_another(self._new_options())
        self.load_ms = (time.perf_counter_ns() - start) / 1e6
        if self._session.get_providers()[0] != wanted:
            raise MissingRuntimeFailure(
                f"{wanted} did not start for {path.name}; onnxruntime fell back to the CPU",
                hint="check the driver and its libraries, or use provider cpu",
            )
        sidecar = read_sidecar(path)
        self.inputs = apply_sidecar(_infos(self._session.get_inputs()), sidecar.get("inputs"))
        self.outputs = apply_sidecar(_infos(self._session.get_outputs()), sidecar.get("outputs"))
        self._output_names = [info.name for info in self.outputs]
        self._bound: Dict[str, "np.ndarray[Any, Any]"] = {}
        self._last: List["np.ndarray[Any, Any]"] = []

    def profile(self, seconds: float) -> Optional[List[Dict[str, Any]]]:
        """Time each operator with ONNX Runtime's own profiler."""
        if not self._pieces:
            raise InferenceFailure(f"{self.path.name} was profiled before inputs were prepared")
        with tempfile.TemporaryDirectory(prefix="edgecnn-profile-") as folder:
            options = self._new_options()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "ort")
            session = self._open_another(options)
            deadline = time.perf_counter() + seconds
            for _ in range(MAX_PROFILED_RUNS):
                self._guard(session.run, self._output_names, self._pieces[0])
                if time.perf_counter() >= deadline:
                    break
            written = Path(session.end_profiling())
            return read_profile(written.read_text(encoding="utf-8", errors="replace"))

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU computes."""
        return self._on_cpu

    def _bind(self, piece: Dict[str, "np.ndarray[Any, Any]"]) -> None:
        self._bound, self._last = piece, []

    def _execute(self) -> None:
        self._last = self._session.run(self._output_names, self._bound)

    def _read(self) -> List["np.ndarray[Any, Any]"]:
        if not self._last:
            raise InferenceFailure(f"{self.path.name} has no results yet")
        return self._last

    def _release(self) -> None:
        self._session, self._bound, self._last = None, {}, []


def _options(ort: Any, threads: int, optimize: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    return options


def _load(ort: Any, path: Path, providers: List[str], options: Any) -> Any:
    try:
        return ort.InferenceSession(str(path), sess_options=options, providers=providers)
    except MemoryError:
        raise
    except Exception as error:
        reason = LOCATION.sub("", first_line(error, limit=2000))[:300]
        hint = None
        if "opset" in reason.lower() or "IR version" in reason:
            hint = "the file is newer than this onnxruntime: export for this device, or update onnxruntime"
        raise ModelLoadFailure(f"onnxruntime {ort.__version__} cannot load {path}: {reason}", hint) from error


def _infos(nodes: Any) -> Tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(
            name=node.name,
            shape=tuple(size if isinstance(size, int) else None for size in node.shape or ()),
            dtype=DTYPES.get(node.type, node.type),
        )
        for node in nodes
    )
