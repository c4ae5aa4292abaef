"""Sessions: one loaded model file in one runtime, fed and read in NCHW float32.

    session = open_session("model.tflite")
    logits = session.run({"image": x})["output"]          x, logits: float32, NCHW

`prepare` converts layout and type and hands the arrays over; `invoke` is what is timed; `collect`
reads the results. With ONNX Runtime `invoke` is `InferenceSession.run` on arrays made ready before,
including the allocation of outputs; with LiteRT it is `Interpreter.invoke` with inputs set before.
A file whose batch is fixed runs a larger batch in pieces of that size; handing over the pieces after the
first is then inside `invoke`.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Type, Union

import numpy as np

from .failure import (
    InferenceFailure,
    InputFailure,
    ModelLoadFailure,
    RequestFailure,
    first_line,
)
from .runtimes import runtime_of
from .tensors import TensorInfo, from_stored, to_stored


class Session(abc.ABC):
    """A model file loaded in a runtime.

    Attributes:
        path: the model file.
        runtime: "onnxruntime", "litert" or "torch".
        runtime_package: the package that answered, "ai_edge_litert" for instance.
        runtime_version: its version.
        threads: threads the runtime may use inside an operator.
        inputs: the file's inputs in order.
        outputs: the file's outputs in order.
        load_ms: milliseconds from the file's path to a session ready to run, the import left out.
    """

    path: Path
    runtime: str
    runtime_package: str
    runtime_version: str
    threads: int
    inputs: Tuple[TensorInfo, ...]
    outputs: Tuple[TensorInfo, ...]
    load_ms: float

    def __init__(self) -> None:
        self._pieces: List[Dict[str, "np.ndarray[Any, Any]"]] = []
        self._results: List[List["np.ndarray[Any, Any]"]] = []
        self._num_samples = 0

    def prepare(self, feeds: Mapping[str, "np.ndarray[Any, Any]"]) -> None:
        """Convert inputs to what the file stores and hand them to the runtime.

        Args:
            feeds: float32 NCHW arrays by input name; an integer array of the file's own type is taken
                as quantized already.

        Raises:
            InputFailure: if names, shapes or types do not fit.
        """
        names = [info.name for info in self.inputs]
        if sorted(feeds) != sorted(names):
            raise InputFailure(f"inputs given are {sorted(feeds)}, {self.path.name} takes {names}")
        stored = {info.name: to_stored(np.asarray(feeds[info.name]), info) for info in self.inputs}
        sizes = {array.shape[0] for array in stored.values()}
        if len(sizes) != 1:
            raise InputFailure(f"inputs have batch sizes {sorted(sizes)}, expected the same for all")
        self._num_samples = sizes.pop()
        piece_size = self._piece_size(self._num_samples)
        self._pieces = [
            {name: _rows(array, start, piece_size) for name, array in stored.items()}
            for start in range(0, self._num_samples, piece_size)
        ]
        self._results = []
        self._guard(self._bind, self._pieces[0])

    def invoke(self) -> None:
        """Run the network on what `prepare` handed over; this is the timed part.

        Raises:
            InferenceFailure: if the runtime fails, or `prepare` was never called.
        """
        if len(self._pieces) == 1:
            self._guard(self._execute)
            return
        if not self._pieces:
            raise InferenceFailure(f"{self.path.name} was invoked before inputs were prepared")
        self._results = []
        for piece in self._pieces:
            self._guard(self._bind, piece)
            self._guard(self._execute)
            self._results.append(self._read())

    def collect(self, raw: bool = False) -> Dict[str, "np.ndarray[Any, Any]"]:
        """Return what the last `invoke` computed.

        Args:
            raw: keep the stored type (int8, uint8) instead of float32.

        Returns:
            Arrays by output name, 4-D ones in NCHW order.
        """
        results = [self._read()] if len(self._pieces) == 1 else self._results
        collected = {}
        for index, info in enumerate(self.outputs):
            arrays = [result[index] for result in results]
            if len(arrays) > 1 and any(array.ndim == 0 for array in arrays):
                raise InferenceFailure(f"output '{info.name}' of {self.path.name} has no batch dimension")
            # (pieces, piece_size, ...) -> (n, ...)
            array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)[: self._num_samples]
            if array.ndim and self._piece_size(self._num_samples) > self._num_samples:
                array = array[: self._num_samples]
            collected[info.name] = from_stored(array, info, raw)
        return collected

    def run(self, feeds: Mapping[str, "np.ndarray[Any, Any]"]) -> Dict[str, "np.ndarray[Any, Any]"]:
        """Return float32 outputs by name, 4-D ones in NCHW order, for float32 NCHW inputs by name."""
        self.prepare(feeds)
        self.invoke()
        return self.collect()

    def run_raw(self, feeds: Mapping[str, "np.ndarray[Any, Any]"]) -> Dict[str, "np.ndarray[Any, Any]"]:
        """Return outputs in the type the file stores, 4-D ones in NCHW order."""
        self.prepare(feeds)
        self.invoke()
        return self.collect(raw=True)

    def close(self) -> None:
        """Release the runtime's memory; the session cannot run afterwards."""
        self._pieces, self._results = [], []
        self._release()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def _guard(self, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except MemoryError:
            raise
        except Exception as error:
            raise InferenceFailure(
                f"{self.runtime} {self.runtime_version} failed on {self.path.name}: {first_line(error)}"
            ) from error

    def _fixed_batch(self) -> Optional[int]:
        sizes = [info.shape[0] for info in self.inputs if info.shape]
        fixed = [size for size in sizes if size is not None]
        return fixed[0] if fixed else None

    def _piece_size(self, num_samples: int) -> int:
        return self._fixed_batch() or num_samples

    def profile(self, seconds: float) -> Optional[List[Dict[str, Any]]]:
        """Time each operator, in a session of its own that runs what `prepare` handed over.

        Args:
            seconds: how long to run, one inference at least.

        Returns:
            Rows {"op", "name", "total_ms", "count", "share"}, the slowest first; None where Python has none.
        """
        del seconds
        return None

    def delegate(self) -> Optional[Dict[str, int]]:
        """Return {"partitions", "delegated_ops", "total_ops"} of a runtime that delegates, else None."""
        return None

    def device_memory_bytes(self) -> Optional[int]:
        """Return the peak memory on an accelerator, or None on the CPU."""
        return None

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU computes, so that its use tells whether others disturbed."""
        return True

    @abc.abstractmethod
    def _bind(self, piece: Dict[str, "np.ndarray[Any, Any]"]) -> None:
        """Hand stored inputs to the runtime."""

    @abc.abstractmethod
    def _execute(self) -> None:
        """Run the network on the bound inputs."""

    @abc.abstractmethod
    def _read(self) -> List["np.ndarray[Any, Any]"]:
        """Return the stored outputs of the last execution, in order."""

    @abc.abstractmethod
    def _release(self) -> None:
        """Drop the runtime's objects."""


@dataclass(frozen=True)
class SessionOptions:
    """How a file is run.

    Attributes:
        provider: "cpu"; with onnxruntime also "cuda", "tensorrt", "xnnpack", "acl"; with torch also "cuda".
        threads: threads inside an operator, 1 or more.
        optimize: False turns off ONNX Runtime's graph optimizations or LiteRT's default (XNNPACK) delegate.
        half: half precision, torch only.
        cuda_graph: replay a recorded CUDA graph, torch on cuda only.
    """

    provider: str = "cpu"
    threads: int = 1
    optimize: bool = True
    half: bool = False
    cuda_graph: bool = False


def open_session(
    path: Union[str, Path],
    runtime: Optional[str] = None,
    provider: str = "cpu",
    threads: int = 1,
    optimize: bool = True,
) -> Session:
    """Load a model file; `open_with` has the further options.

    Args:
        path: .onnx, .tflite or .pt2 file; FILE.json beside it states layout and quantization.
        runtime: "onnxruntime", "litert" or "torch"; None decides by the suffix.
        provider: as in `SessionOptions`.
        threads: threads inside an operator, 1 or more.
        optimize: as in `SessionOptions`.

    Raises:
        RequestFailure: for an unknown runtime, provider or thread count.
        MissingRuntimeFailure: if the runtime is not installed.
        ModelLoadFailure: if the file cannot be loaded.
    """
    return open_with(path, runtime, SessionOptions(provider, threads, optimize))


def open_with(path: Union[str, Path], runtime: Optional[str], options: SessionOptions) -> Session:
    """Load a model file with all options.

    Raises:
        RequestFailure: for an unknown runtime, or options that it does not have.
        MissingRuntimeFailure: if the runtime is not installed.
        ModelLoadFailure: if the file cannot be loaded.
    """
    path = Path(path)
    name = runtime_of(path, runtime)
    if options.threads < 1:
        raise RequestFailure(f"threads is {options.threads}, expected 1 or more")
    if not path.is_file():
        raise ModelLoadFailure(f"model file {path} does not exist")
    if path.stat().st_size == 0:
        raise ModelLoadFailure(f"model file {path} is empty", hint="export it again")
    if name == "torch":
        from .torch_session import TorchSession

        return TorchSession(path, options)
    if options.half or options.cuda_graph:
        raise RequestFailure(f"half and cuda_graph are options of torch, {path.name} runs in {name}")
    if name == "onnxruntime":
        from .onnxruntime_session import OnnxRuntimeSession

        return OnnxRuntimeSession(path, options.provider, options.threads, options.optimize)
    from .litert_session import LiteRTSession

    return LiteRTSession(path, options.provider, options.threads, options.optimize)


def _rows(array: "np.ndarray[Any, Any]", start: int, count: int) -> "np.ndarray[Any, Any]":
    """Return `count` rows from `start`; a short last piece is filled by repeating its last row."""
    piece = array[start : start + count]
    if piece.shape[0] == count:
        return piece
    missing: Sequence[int] = [piece.shape[0] - 1] * (count - piece.shape[0])
    return np.concatenate([piece, piece[list(missing)]])
