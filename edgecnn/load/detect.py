r"""Recognise a model file by its content, never by its name.

first bytes          what it is
PK\x03\x04           zip: PyTorch checkpoint, .pt2, TorchScript, .keras, .npz (its member names decide)
<u64 size>{"         safetensors
\x80\x02 ...         pickle (PyTorch's legacy format starts with a magic long)
????TFL3             TFLite
\x89HDF              HDF5 (Keras .h5)
\x93NUMPY            NumPy
\x08 <ir_version>    ONNX protobuf
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

from edgecnn.errors import LoadError

PT2 = "pt2"
CHECKPOINT = "checkpoint"
SAFETENSORS = "safetensors"

_TORCH_EXPORT = (
    "export the network from PyTorch with torch.export.save(torch.export.export(net, (x,)), 'net.pt2')"
)
_NO_KERAS = "Keras is not read yet: give a PyTorch model (.pt2, or a state dict with --arch)"
_NO_TORCHSCRIPT = f"TorchScript is not read yet: {_TORCH_EXPORT}, or save its state dict and give --arch"
_REFUSED = {
    "torchscript": ("a TorchScript archive", _NO_TORCHSCRIPT),
    "onnx": ("an ONNX model", f"ONNX is not read yet: {_TORCH_EXPORT}"),
    "tflite": ("a TFLite model", "TFLite is an output of edgecnn: give the PyTorch model it was made from"),
    "keras": ("a Keras model", _NO_KERAS),
    "hdf5": ("an HDF5 file (Keras .h5?)", _NO_KERAS),
    "numpy": ("a NumPy file", "a model is expected here; images and labels in .npz belong to --data"),
    "aoti": ("a compiled AOTInductor package", f"it holds machine code and no graph: {_TORCH_EXPORT}"),
}


def detect_format(path: Path) -> str:
    """Tell which kind of model file `path` is.

    Returns:
        PT2, CHECKPOINT (torch.save, zip or legacy) or SAFETENSORS.

    Raises:
        LoadError: for an empty, unreadable, unknown or recognised but unsupported file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise LoadError(f"{path}: cannot be read ({error.strerror})") from error
    if not size:
        raise LoadError(f"{path}: the file is empty", hint="copy or download it again")
    kind = _by_magic(path, head, size)
    if kind in (PT2, CHECKPOINT, SAFETENSORS):
        return kind
    if kind in _REFUSED:
        what, hint = _REFUSED[kind]
        raise LoadError(f"{path}: this is {what}", hint=hint)
    raise LoadError(
        f"{path}: not a model file edgecnn knows (starts with {head[:8].hex(' ')})",
        hint="expected .pt2, a PyTorch checkpoint or .safetensors",
    )


def _by_magic(path: Path, head: bytes, size: int) -> str:
    if head[:2] == b"PK":
        return _zip_kind(path)
    if head[4:8] == b"TFL3":
        return "tflite"
    if head[:4] == b"\x89HDF":
        return "hdf5"
    if head[:6] == b"\x93NUMPY":
        return "numpy"
    if _is_safetensors(head, size):
        return SAFETENSORS
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return CHECKPOINT
    return "onnx" if _is_onnx(head) else "unknown"


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.split("/", 1)[-1] for name in archive.namelist()]
            full = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, struct.error) as error:
        raise LoadError(
            f"{path}: a damaged zip archive ({error}); it is probably truncated",
            hint="copy or download it again",
        ) from error
    found = set(names) | set(full)
    if any(name.startswith("data/aotinductor/") for name in names):
        return "aoti"
    if "archive_format" in found or any(name.startswith("models/") for name in names):
        return PT2
    if "serialized_exported_program.json" in found:
        raise LoadError(
            f"{path}: a .pt2 file of PyTorch 2.7 or older", hint="load and save it again with a newer PyTorch"
        )
    if "constants.pkl" in found or any(name.startswith("code/") for name in names):
        return "torchscript"
    if "data.pkl" in found:
        return CHECKPOINT
    if {"metadata.json", "config.json"} <= found or "model.weights.h5" in found:
        return "keras"
    if full and all(name.endswith(".npy") for name in full):
        return "numpy"
    raise LoadError(
        f"{path}: a zip archive, but not of a model ({', '.join(full[:3]) or 'no members'})",
        hint="expected .pt2, a PyTorch checkpoint or .safetensors",
    )


def _is_safetensors(head: bytes, size: int) -> bool:
    if len(head) < 10:
        return False
    length = int(struct.unpack("<Q", head[:8])[0])
    return head[8:9] == b"{" and 2 <= length <= 100_000_000 and size > 8


def _is_onnx(head: bytes) -> bool:
    """ModelProto: field 1 (ir_version, a varint) first, then a field with a length."""
    return (
        len(head) > 4
        and head[0] == 0x08
        and head[1] < 0x20
        and head[2] in (0x12, 0x1A, 0x22, 0x2A, 0x32, 0x3A, 0x42)
    )
