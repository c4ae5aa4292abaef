"""ONNX models in ONNX Runtime, for the tests of the writer."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnx
import onnxruntime as ort

from edgecnn.graph.program import Array


def open_session(
    model: onnx.ModelProto, optimized: Path | None = None, int8_allowed: bool = True
) -> ort.InferenceSession:
    """Open a model as on ARM, where int8 activations are allowed to stay int8, or as by default on x86."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.qdqisint8allowed", str(int(int8_allowed)))
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
    session = open_session(model)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def executed(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Return how often the optimized graph has each operator."""
    open_session(model, folder / "optimized.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def shifted(q: Array, dtype: str) -> Array:
    return (q.astype(np.int16) + (128 if dtype == "uint8" else 0)).astype(dtype)
