"""TFLite files in LiteRT (ai_edge_litert, tflite_runtime or tensorflow.lite)."""

from __future__ import annotations

import importlib
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from .failure import MissingRuntimeFailure, ModelLoadFailure, RequestFailure, first_line
from .op_profile import delegate_coverage
from .runtimes import NUMPY_1_HINT, import_runtime, numpy_mismatch
from .session import Session
from .tensors import QUANTIZED_DTYPES, TensorInfo, apply_sidecar, guess_nhwc, read_sidecar


class LiteRTSession(Session):
    """A .tflite file; `invoke` is `Interpreter.invoke`, inputs set and outputs read outside of it.

    The XNNPACK delegate is LiteRT's default on the CPU. A batch larger than the file's own runs piece by
    piece, since a resized file may fold its batch into the channels of a reshape; only a file that
    declares its batch dynamic is resized.
    """

    def __init__(self, path: Path, provider: str, threads: int, optimize: bool) -> None:
        super().__init__()
        if provider != "cpu":
            raise RequestFailure(f"provider is {provider!r}, litert has cpu (XNNPACK)")
        module = import_runtime("litert")
        self.path, self.runtime, self.threads = path, "litert", threads
        self.runtime_package = module.__name__.split(".")[0]
        self.runtime_version = _version(self.runtime_package, module)
        mismatch = numpy_mismatch(self.runtime_package, self.runtime_version, np.__version__)
        if mismatch is not None:
            raise MissingRuntimeFailure(mismatch, hint=NUMPY_1_HINT)
        start = time.perf_counter_ns()
        self._interpreter = self._load(module.Interpreter, optimize)
        self.load_ms = (time.perf_counter_ns() - start) / 1e6
        inputs, outputs = _details(self._interpreter)
        self._input_indices = {name: detail["index"] for name, detail in inputs}
        self._output_indices = [detail["index"] for _, detail in outputs]
        self._bound_shapes: Dict[int, Tuple[int, ...]] = {}
        self.inputs, self.outputs = self._describe(inputs, outputs)

    def _load(self, interpreter_type: Any, optimize: bool) -> Any:
        arguments: Dict[str, Any] = {"model_path": str(self.path), "num_threads": self.threads}
        if not optimize:
            resolver = sys.modules[interpreter_type.__module__].OpResolverType
            arguments["experimental_op_resolver_type"] = resolver.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        try:
            interpreter = interpreter_type(**arguments)
            interpreter.allocate_tensors()
        except MemoryError:
            raise
        except Exception as error:
            raise ModelLoadFailure(
                f"{self.runtime_package} {self.runtime_version} cannot load {self.path}: {first_line(error)}"
            ) from error
        return interpreter

    def _describe(
        self, inputs: Sequence[Tuple[str, Any]], outputs: Sequence[Tuple[str, Any]]
    ) -> Tuple[Tuple[TensorInfo, ...], Tuple[TensorInfo, ...]]:
        sidecar = read_sidecar(self.path)
        input_infos = [_info(name, detail) for name, detail in inputs]
        output_infos = [_info(name, detail) for name, detail in outputs]
        if guess_nhwc(input_infos):
            input_infos = [replace(info, layout="nhwc") for info in input_infos]
            output_infos = [replace(info, layout="nhwc") for info in output_infos]
        return (
            apply_sidecar(input_infos, sidecar.get("inputs")),
            apply_sidecar(output_infos, sidecar.get("outputs")),
        )

    def delegate(self) -> Optional[Dict[str, int]]:
        """Count what the delegate took over."""
        details = getattr(self._interpreter, "_get_ops_details", None)
        return None if details is None else delegate_coverage(details())

    def _bind(self, piece: Dict[str, "np.ndarray[Any, Any]"]) -> None:
        resized = False
        for info in self.inputs:
            index = self._input_indices[info.name]
            shape = piece[info.name].shape
            if None in info.shape and self._bound_shapes.get(index) != shape:
                self._interpreter.resize_tensor_input(index, list(shape))
                self._bound_shapes[index] = shape
                resized = True
        if resized:
            self._interpreter.allocate_tensors()
        for info in self.inputs:
            self._interpreter.set_tensor(self._input_indices[info.name], piece[info.name])

    def _execute(self) -> None:
        self._interpreter.invoke()

    def _read(self) -> List["np.ndarray[Any, Any]"]:
        return [self._interpreter.get_tensor(index) for index in self._output_indices]

    def _release(self) -> None:
        self._interpreter = None


def _version(package: str, module: Any) -> str:
    version = getattr(importlib.import_module(package), "__version__", None) or getattr(
        module, "__version__", None
    )
    if version:
        return str(version)
    from importlib import metadata

    try:
        return metadata.version(package.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return "unknown"


def _details(interpreter: Any) -> Tuple[List[Tuple[str, Any]], List[Tuple[str, Any]]]:
    """Return (public name, detail) of inputs and outputs, names from the signature where there is one."""
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    signatures = interpreter.get_signature_list() or {}
    names: Dict[int, str] = {}
    if signatures:
        key: Optional[str] = "serving_default" if "serving_default" in signatures else next(iter(signatures))
        runner = interpreter.get_signature_runner(key)
        for details in (runner.get_input_details(), runner.get_output_details()):
            names.update({int(detail["index"]): name for name, detail in details.items()})
    return (
        [(names.get(int(detail["index"]), detail["name"]), detail) for detail in inputs],
        [(names.get(int(detail["index"]), detail["name"]), detail) for detail in outputs],
    )


def _info(name: str, detail: Any) -> TensorInfo:
    signature = detail.get("shape_signature")
    shape = detail["shape"] if signature is None or len(signature) == 0 else signature
    dtype = np.dtype(detail["dtype"]).name
    scale, zero_point = detail.get("quantization", (0.0, 0))
    quantized = dtype in QUANTIZED_DTYPES and scale
    return TensorInfo(
        name=name,
        shape=tuple(int(size) if size >= 0 else None for size in shape),
        dtype=dtype,
        scale=float(scale) if quantized else None,
        zero_point=int(zero_point) if quantized else None,
    )
