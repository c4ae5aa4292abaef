"""What a model file's inputs and outputs look like, and how NCHW float32 becomes what the file stores.

q = clamp(round_half_even(x / scale) + zero_point, dtype)        x = scale * (q - zero_point)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from .failure import InputFailure, ModelLoadFailure

QUANTIZED_DTYPES = ("int8", "uint8")


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a model file.

    Attributes:
        name: public name (ONNX graph name, TFLite signature name).
        shape: as the file stores it; None for a dimension decided at run time.
        dtype: NumPy name of the stored type.
        layout: "nchw" or "nhwc": how the file stores a 4-D tensor.
        scale: of an int8 or uint8 tensor, else None.
        zero_point: of an int8 or uint8 tensor, else None.
    """

    name: str
    shape: Tuple[Optional[int], ...]
    dtype: str = "float32"
    layout: str = "nchw"
    scale: Optional[float] = None
    zero_point: Optional[int] = None

    @property
    def nchw_shape(self) -> Tuple[Optional[int], ...]:
        """The shape in NCHW order."""
        if self.layout == "nhwc" and len(self.shape) == 4:
            n, h, w, c = self.shape
            return (n, c, h, w)
        return self.shape

    def to_dict(self) -> Dict[str, Any]:
        """Return a JSON-ready description; the shape in NCHW order."""
        return {
            "name": self.name,
            "shape": list(self.nchw_shape),
            "dtype": self.dtype,
            "layout": self.layout,
            "scale": self.scale,
            "zero_point": self.zero_point,
        }


def quantize(x: "np.ndarray[Any, Any]", info: TensorInfo) -> "np.ndarray[Any, Any]":
    """Return clamp(round_half_even(x / scale) + zero_point) in the tensor's integer type.

    Raises:
        InputFailure: if the scale is unknown or x holds NaN or infinity.

    Example:
        >>> info = TensorInfo("x", (1, 3), "int8", scale=0.5, zero_point=-128)
        >>> quantize(np.array([[0.0, 1.0, 1000.0]], np.float32), info).tolist()
        [[-128, -126, 127]]
    """
    if info.scale is None or info.zero_point is None:
        raise InputFailure(
            f"input '{info.name}' is {info.dtype} and its scale is unknown",
            hint="keep the sidecar FILE.json beside the model file, or feed integers",
        )
    if not np.isfinite(x).all():
        raise InputFailure(
            f"values for input '{info.name}' hold NaN or infinity, which no integer stands for"
        )
    bounds = np.iinfo(info.dtype)
    q = np.rint(x / np.float32(info.scale)) + info.zero_point
    clipped: "np.ndarray[Any, Any]" = np.clip(q, bounds.min, bounds.max).astype(info.dtype)
    return clipped


def dequantize(q: "np.ndarray[Any, Any]", info: TensorInfo) -> "np.ndarray[Any, Any]":
    """Return the float32 values of a stored tensor; types other than int8 and uint8 are only cast.

    Raises:
        InputFailure: if the tensor is quantized and its scale is unknown.

    Example:
        >>> info = TensorInfo("y", (1, 2), "uint8", scale=0.5, zero_point=128)
        >>> dequantize(np.array([[128, 130]], np.uint8), info).tolist()
        [[0.0, 1.0]]
    """
    if info.dtype not in QUANTIZED_DTYPES:
        return np.ascontiguousarray(q, np.float32)
    if info.scale is None or info.zero_point is None:
        raise InputFailure(
            f"output '{info.name}' is {info.dtype} and its scale is unknown",
            hint="keep the sidecar FILE.json beside the model file, or ask for raw outputs",
        )
    shifted = (q.astype(np.int32) - info.zero_point).astype(np.float32)
    real: "np.ndarray[Any, Any]" = shifted * np.float32(info.scale)
    return real


def to_stored(x: "np.ndarray[Any, Any]", info: TensorInfo) -> "np.ndarray[Any, Any]":
    """Turn float32 NCHW values (or integers already in the file's type) into what the file stores.

    Raises:
        InputFailure: if shape or dtype do not fit the input.
    """
    expected = info.nchw_shape
    fits = len(expected) == x.ndim and all(
        want is None or want == got
        for want, got in zip(expected[1:], x.shape[1:])  # noqa: B905 - strict= needs Python 3.10
    )
    if not fits or x.ndim == 0 or x.shape[0] == 0:
        raise InputFailure(
            f"values for input '{info.name}' have shape {shape_text(x.shape)}, "
            f"expected {shape_text(expected)}" + (" in NCHW order" if len(expected) == 4 else "")
        )
    if x.dtype.name != info.dtype:
        if x.dtype.kind != "f":
            raise InputFailure(
                f"values for input '{info.name}' are {x.dtype.name}, expected float32 or {info.dtype}",
                hint="pixels need a preprocess to become the network's input",
            )
        x = quantize(x, info) if info.dtype in QUANTIZED_DTYPES else x.astype(info.dtype)
    if info.layout == "nhwc" and x.ndim == 4:
        x = x.transpose(0, 2, 3, 1)  # (n, c, h, w) -> (n, h, w, c)
    return np.ascontiguousarray(x)


def from_stored(y: "np.ndarray[Any, Any]", info: TensorInfo, raw: bool) -> "np.ndarray[Any, Any]":
    """Return a stored tensor in NCHW order: as float32, or in its stored type when `raw`."""
    if info.layout == "nhwc" and y.ndim == 4:
        y = np.ascontiguousarray(y.transpose(0, 3, 1, 2))  # (n, h, w, c) -> (n, c, h, w)
    return y if raw else dequantize(y, info)


def shape_text(shape: Sequence[Optional[int]]) -> str:
    """Spell a shape, "n" for a free dimension.

    Example:
        >>> shape_text((None, 3, 32, 32))
        '(n, 3, 32, 32)'
    """
    return "(" + ", ".join("n" if size is None else str(size) for size in shape) + ")"


def guess_nhwc(inputs: Sequence[TensorInfo]) -> bool:
    """Tell whether a TFLite file without a sidecar stores NHWC.

    It does, unless every 4-D input has 1, 3 or 4 entries in dimension 1 and more than 4 in dimension 3.

    Example:
        >>> guess_nhwc([TensorInfo("x", (1, 32, 32, 3))]), guess_nhwc([TensorInfo("x", (1, 3, 32, 32))])
        (True, False)
    """
    images = [info.shape for info in inputs if len(info.shape) == 4]
    return not images or not all(shape[1] in (1, 3, 4) and (shape[3] or 0) > 4 for shape in images)


def read_sidecar(path: Path) -> Dict[str, Any]:
    """Read FILE.json beside a model file; an empty dict when there is none.

    Raises:
        ModelLoadFailure: if it is there and is not a JSON object of schema_version 1.
    """
    sidecar = path.with_name(path.name + ".json")
    if not sidecar.is_file():
        return {}
    try:
        values = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadFailure(
            f"{sidecar} is not readable JSON: {error}", hint="write the artifact again"
        ) from error
    if not isinstance(values, dict) or values.get("schema_version") != 1:
        found = values.get("schema_version") if isinstance(values, dict) else type(values).__name__
        raise ModelLoadFailure(f"{sidecar} has schema_version {found!r}, expected 1")
    return values


def apply_sidecar(infos: Sequence[TensorInfo], entries: Any) -> Tuple[TensorInfo, ...]:
    """Take layout and quantization from sidecar entries, matched by name, else by position.

    Raises:
        ModelLoadFailure: if an entry states another dtype than the file has.
    """
    described: List[Dict[str, Any]] = [entry for entry in entries or [] if isinstance(entry, dict)]
    by_name = {entry.get("name"): entry for entry in described}
    result = []
    for index, info in enumerate(infos):
        entry = by_name.get(info.name)
        if entry is None and len(described) == len(infos):
            entry = described[index]
        if entry is None:
            result.append(info)
            continue
        if entry.get("dtype", info.dtype) != info.dtype:
            raise ModelLoadFailure(
                f"the sidecar says tensor '{info.name}' is {entry['dtype']}, the file stores {info.dtype}",
                hint="file and sidecar are not of one export; write the artifact again",
            )
        known = entry.get("scale") is not None
        result.append(
            replace(
                info,
                layout=entry.get("layout", info.layout),
                scale=float(entry["scale"]) if known else info.scale,
                zero_point=int(entry.get("zero_point") or 0) if known else info.zero_point,
            )
        )
    return tuple(result)
