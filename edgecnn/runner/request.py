"""The JSON request: what it may hold, checked before anything is loaded."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple

from .failure import RequestFailure

COMMON_KEYS = (
    "task",
    "artifacts",
    "inputs",
    "preprocess",
    "batch_size",
    "threads",
    "provider",
    "optimize",
    "half",
    "cuda_graph",
)

TASK_KEYS: Dict[str, Tuple[str, ...]] = {
    "outputs": (*COMMON_KEYS, "outputs", "raw"),
    "predictions": (*COMMON_KEYS, "labels", "reference"),
    "latency": (
        *COMMON_KEYS,
        "min_runs",
        "min_seconds",
        "max_seconds",
        "warmup_seconds",
        "baseline",
        "profile",
        "sustained_s",
        "preset",
    ),
    "probe": ("task", "runtimes"),
}

PRESETS: Dict[str, Dict[str, Any]] = {"mlperf": {"min_runs": 1024, "min_seconds": 60.0, "max_seconds": 600.0}}
"""Least runs and seconds, and the cap unless the request has one.

**Source** MLPerf Mobile's rules: single stream, at least 1,024 queries and 60 s, the 90th percentile.
"""

PROBE_RUNTIMES = ("onnxruntime", "litert", "torch")

KEY_PATTERN = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class ArtifactRequest:
    """One model file to run.

    Attributes:
        key: the caller's name for it; letters, digits, "_", "-" and ".".
        path: .onnx, .tflite or .pt2 file.
        runtime: "onnxruntime", "litert", "torch" or None for the suffix to decide.
    """

    key: str
    path: Path
    runtime: Optional[str] = None


@dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes:
        task: "outputs", "predictions", "latency" or "probe".
        artifacts: at least one, keys unique; none for "probe".
        inputs: .npy file; float32 NCHW, or uint8 NHWC pixels. None only for latency: seeded noise.
        preprocess: `Preprocess.to_dict()` for pixels; None takes the one in the model file's sidecar.
        batch_size: images per inference.
        threads: threads inside an operator.
        provider: "cpu", "cuda" (torch, onnxruntime) or an execution provider of onnxruntime.
        optimize: False turns the runtime's own graph optimizations off.
        half: run torch in half precision.
        cuda_graph: replay one recorded CUDA graph instead of launching each kernel (torch).
        outputs: directory, or one .npz file, for the task "outputs".
        raw: keep stored integers instead of float32.
        labels: .npy file of integers, (n,) or (n, h, w).
        reference: key of the artifact that the others' predictions are compared with.
        min_runs: timed runs per artifact.
        min_seconds: timed seconds per artifact.
        max_seconds: cap on the timed seconds of all artifacts together.
        warmup_seconds: cap on the warm-up of each artifact; None: what `measure` takes.
        baseline: key of the artifact that the others' latencies are compared with; None: the first.
        profile: time each operator too, in runs of their own after the timed ones.
        sustained_s: keep timing for so many seconds and give the curve.
        preset: a name in PRESETS; its least runs and seconds hold beside the request's own.
        runtimes: what "probe" tries to import.
    """

    task: str
    artifacts: Tuple[ArtifactRequest, ...]
    inputs: Optional[Path] = None
    preprocess: Optional[Mapping[str, Any]] = None
    batch_size: int = 1
    threads: int = 1
    provider: str = "cpu"
    optimize: bool = True
    half: bool = False
    cuda_graph: bool = False
    outputs: Optional[Path] = None
    raw: bool = False
    labels: Optional[Path] = None
    reference: Optional[str] = None
    min_runs: int = 50
    min_seconds: float = 1.0
    max_seconds: float = 60.0
    warmup_seconds: Optional[float] = None
    baseline: Optional[str] = None
    profile: bool = False
    sustained_s: Optional[float] = None
    preset: Optional[str] = None
    runtimes: Tuple[str, ...] = PROBE_RUNTIMES


def read_request(path: Path) -> Request:
    """Read and check a request file.

    Raises:
        RequestFailure: if it cannot be read, is not JSON or does not hold a valid request.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestFailure(f"request {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RequestFailure(f"request {path} is not JSON: {error}") from error
    return parse_request(values)


def parse_request(values: Any) -> Request:
    """Check a request.

    Raises:
        RequestFailure: naming the key, what was found and what was expected.

    Example:
        >>> r = parse_request({"task": "latency", "artifacts": [{"key": "int8", "path": "m.tflite"}]})
        >>> r.artifacts[0].key, r.threads
        ('int8', 1)
    """
    if not isinstance(values, dict):
        raise RequestFailure(f"request is a {type(values).__name__}, expected an object")
    task = values.get("task")
    if task not in TASK_KEYS:
        raise RequestFailure(f"task is {task!r}, expected one of {', '.join(TASK_KEYS)}")
    _check_keys(values, TASK_KEYS[task], f"a request for {task}")
    artifacts = () if task == "probe" else _artifacts(values.get("artifacts"))
    checked: Dict[str, Any] = {"task": task, "artifacts": artifacts}
    for key, value in values.items():
        if key not in checked and value is not None:
            checked[key] = _value(key, value)
    _apply_preset(checked)
    request = Request(**checked)
    if request.inputs is None and task not in ("latency", "probe"):
        raise RequestFailure(f"a request for {task} has no inputs, expected a .npy file")
    if task == "outputs" and request.outputs is None:
        raise RequestFailure("a request for outputs has no 'outputs', expected a directory or a .npz file")
    keys = [artifact.key for artifact in artifacts]
    for name in ("reference", "baseline"):
        chosen = getattr(request, name)
        if chosen is not None and chosen not in keys:
            raise RequestFailure(f"{name} is {chosen!r}, expected one of the artifacts {keys}")
    return request


def _apply_preset(checked: Dict[str, Any]) -> None:
    """Raise the least runs and seconds to the preset's, and the cap where the request has none."""
    if "preset" not in checked:
        return
    preset = PRESETS[checked["preset"]]
    for key in ("min_runs", "min_seconds"):
        checked[key] = max(checked.get(key, 0), preset[key])
    checked.setdefault("max_seconds", preset["max_seconds"])


def _check_keys(values: Mapping[str, Any], allowed: Tuple[str, ...], where: str) -> None:
    for key in values:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            raise RequestFailure(
                f"{where} has the unknown key {key!r}, expected one of {', '.join(allowed)}",
                hint=f"did you mean {near[0]!r}?" if near else None,
            )


def _artifacts(values: Any) -> Tuple[ArtifactRequest, ...]:
    if not isinstance(values, list) or not values:
        raise RequestFailure(f"artifacts is {values!r}, expected a list of at least one {{key, path}}")
    artifacts = []
    for index, entry in enumerate(values):
        if not isinstance(entry, dict):
            raise RequestFailure(f"artifacts[{index}] is {entry!r}, expected an object with key and path")
        _check_keys(entry, ("key", "path", "runtime"), f"artifacts[{index}]")
        for name in ("key", "path"):
            if not isinstance(entry.get(name), str) or not entry[name]:
                raise RequestFailure(f"artifacts[{index}].{name} is {entry.get(name)!r}, expected text")
        if not KEY_PATTERN.fullmatch(entry["key"]):
            raise RequestFailure(
                f"artifacts[{index}].key is {entry['key']!r}, expected letters, digits, '_', '-' and '.'"
            )
        runtime = entry.get("runtime")
        if runtime is not None and not isinstance(runtime, str):
            raise RequestFailure(f"artifacts[{index}].runtime is {runtime!r}, expected text")
        artifacts.append(ArtifactRequest(entry["key"], Path(entry["path"]), runtime))
    keys = [artifact.key for artifact in artifacts]
    if len(set(keys)) != len(keys):
        raise RequestFailure(f"artifacts have the keys {keys}, expected each once")
    return tuple(artifacts)


def _value(key: str, value: Any) -> Any:
    """Check one value by its key's kind and return it in its type."""
    if key in ("inputs", "outputs", "labels"):
        if not isinstance(value, str) or not value:
            raise RequestFailure(f"{key} is {value!r}, expected a path")
        return Path(value)
    if key in ("batch_size", "threads", "min_runs"):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RequestFailure(f"{key} is {value!r}, expected a whole number of 1 or more")
        return value
    if key in ("min_seconds", "max_seconds", "warmup_seconds", "sustained_s"):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise RequestFailure(f"{key} is {value!r}, expected seconds of 0 or more")
        return float(value)
    if key in ("raw", "optimize", "profile", "half", "cuda_graph"):
        if not isinstance(value, bool):
            raise RequestFailure(f"{key} is {value!r}, expected true or false")
        return value
    if key == "preprocess":
        if not isinstance(value, dict):
            raise RequestFailure(f"preprocess is {value!r}, expected an object")
        return value
    if key == "runtimes":
        if not isinstance(value, list) or not value or any(name not in PROBE_RUNTIMES for name in value):
            raise RequestFailure(f"runtimes is {value!r}, expected some of {', '.join(PROBE_RUNTIMES)}")
        return tuple(value)
    if not isinstance(value, str):
        raise RequestFailure(f"{key} is {value!r}, expected text")
    if key == "preset" and value not in PRESETS:
        raise RequestFailure(f"preset is {value!r}, expected one of {', '.join(PRESETS)}")
    return value
