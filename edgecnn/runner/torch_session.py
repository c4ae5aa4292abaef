"""Exported PyTorch graphs (.pt2) on the CPU or a CUDA GPU.

On a GPU `invoke` runs from inputs already there to outputs still there, and waits for the GPU to finish; with
a CUDA graph it replays the kernels recorded at `prepare`.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from .failure import InferenceFailure, MissingRuntimeFailure, ModelLoadFailure, RequestFailure, first_line
from .op_profile import with_shares
from .runtimes import import_runtime
from .session import Session, SessionOptions
from .tensors import TensorInfo, apply_sidecar, read_sidecar

MAX_PROFILED_RUNS = 20
PROVIDERS = ("cpu", "cuda")
GRAPH_WARMUP_RUNS = 3
"""Runs before recording, so that libraries have chosen their algorithms and made their workspaces."""


class TorchSession(Session):
    """A .pt2 file; outputs come back as float32 whatever the precision."""

    def __init__(self, path: Path, options: SessionOptions) -> None:
        super().__init__()
        if options.provider not in PROVIDERS:
            raise RequestFailure(f"provider is {options.provider!r}, torch has {', '.join(PROVIDERS)}")
        if options.cuda_graph and options.provider != "cuda":
            raise RequestFailure(f"cuda_graph needs provider cuda, the request has {options.provider!r}")
        self._torch = torch = import_runtime("torch")
        self.path, self.runtime, self.runtime_package = path, "torch", "torch"
        self.runtime_version, self.threads = str(torch.__version__), options.threads
        _need_device(torch, options.provider)
        self._device, self._half, self._records = options.provider, options.half, options.cuda_graph
        torch.set_num_threads(options.threads)
        if self._device == "cuda":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter_ns()
        program, self._module = self._load()
        self.load_ms = (time.perf_counter_ns() - start) / 1e6
        sidecar = read_sidecar(path)
        signature = program.graph_signature
        values = {node.name: node.meta.get("val") for node in program.graph.nodes}
        self.inputs = apply_sidecar(_infos(signature.user_inputs, values), sidecar.get("inputs"))
        self.outputs = apply_sidecar(_infos(signature.user_outputs, values), sidecar.get("outputs"))
        self._arguments: Tuple[Any, ...] = ()
        self._graph: Any = None
        self._last: Any = None

    def device_memory_bytes(self) -> Optional[int]:
        """Return the most memory that tensors took on the GPU, or None on the CPU."""
        return None if self.on_cpu else int(self._torch.cuda.max_memory_allocated())

    def profile(self, seconds: float) -> Optional[List[Dict[str, Any]]]:
        """Time each kind of operator with torch's profiler: its own time on the GPU, or on the CPU."""
        profiler = self._torch.profiler
        kinds = [profiler.ProfilerActivity.CPU]
        if not self.on_cpu:
            kinds.append(profiler.ProfilerActivity.CUDA)
        deadline = time.perf_counter() + seconds
        with profiler.profile(activities=kinds) as recorded:
            for _ in range(MAX_PROFILED_RUNS):
                self._guard(self._execute)
                if time.perf_counter() >= deadline:
                    break
        rows = []
        for event in recorded.key_averages():
            micros = event.self_cpu_time_total if self.on_cpu else event.self_device_time_total
            if micros > 0:
                rows.append(
                    {"op": event.key, "name": event.key, "total_ms": micros / 1e3, "count": event.count}
                )
        return with_shares(rows)

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU computes."""
        return self._device == "cpu"

    def _load(self) -> Tuple[Any, Any]:
        torch = self._torch
        try:
            program = torch.export.load(str(self.path))
            if self._device == "cuda":
                passes = importlib.import_module("torch.export.passes")
                program = passes.move_to_device_pass(program, "cuda")
            module = program.module(check_guards=False)
            return program, module.half() if self._half else module
        except MemoryError:
            raise
        except Exception as error:
            raise ModelLoadFailure(
                f"torch {self.runtime_version} cannot load {self.path}: {first_line(error)}",
                hint="a .pt2 file is read by the torch that wrote it, or a newer one",
            ) from error

    def _bind(self, piece: Dict[str, "np.ndarray[Any, Any]"]) -> None:
        torch = self._torch
        fresh = []
        for info in self.inputs:
            tensor = torch.from_numpy(piece[info.name]).to(self._device)
            fresh.append(tensor.half() if self._half and tensor.is_floating_point() else tensor)
        shapes = [tensor.shape for tensor in fresh]
        if self._graph is not None and shapes == [tensor.shape for tensor in self._arguments]:
            for recorded, tensor in zip(self._arguments, fresh):  # noqa: B905 - 3.9
                recorded.copy_(tensor)
            return
        self._arguments, self._last = tuple(fresh), None
        if self._records:
            self._record()

    def _record(self) -> None:
        torch = self._torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode():
            with torch.cuda.stream(stream):
                for _ in range(GRAPH_WARMUP_RUNS):
                    self._module(*self._arguments)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._last = self._module(*self._arguments)

    def _execute(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            with self._torch.inference_mode():
                self._last = self._module(*self._arguments)
        if self._device == "cuda":
            self._torch.cuda.synchronize()

    def _read(self) -> List["np.ndarray[Any, Any]"]:
        if self._last is None:
            raise InferenceFailure(f"{self.path.name} has no results yet")
        leaves = self._torch.utils._pytree.tree_leaves(self._last)
        return [
            np.asarray((leaf.float() if leaf.is_floating_point() else leaf).cpu().numpy()) for leaf in leaves
        ]

    def _release(self) -> None:
        self._module, self._graph, self._last, self._arguments = None, None, None, ()


def _need_device(torch: Any, provider: str) -> None:
    if provider == "cuda" and not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU alone"
        raise MissingRuntimeFailure(
            f"torch {torch.__version__} ({build}) finds no CUDA GPU here, only cpu is available",
            hint="check nvidia-smi and that torch is a CUDA build, or use provider cpu",
        )


def _infos(names: Sequence[str], values: Dict[str, Any]) -> Tuple[TensorInfo, ...]:
    infos = []
    for name in names:
        value = values.get(name)
        shape = () if value is None else tuple(s if isinstance(s, int) else None for s in value.shape)
        dtype = "float32" if value is None else str(value.dtype).replace("torch.", "")
        infos.append(TensorInfo(str(name), shape, dtype))
    return tuple(infos)
