"""Which files a bench measures, and the short names they have in its report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edgecnn.artifact import sha256_hex
from edgecnn.errors import LoadError
from edgecnn.report.bench_build import BenchFile

SUFFIXES = (".onnx", ".tflite", ".pt2")
FOLDER_SUFFIXES = SUFFIXES[:2]
"""Of the files that a folder of results stands for; its .pt2 is there to be trained further."""


def find_files(paths: Sequence[str | Path], baseline: str | Path | None = None) -> list[BenchFile]:
    """Return the files to be measured, the baseline first, each under a key of its own.

    Args:
        paths: files, and folders that `compress` wrote.
        baseline: a file; it may be one of the paths.

    Raises:
        LoadError: if there is none, or one is missing or no artifact.
    """
    found = [file for path in paths for file in _artifacts(Path(path))]
    if baseline is not None:
        first = _artifacts(Path(baseline))
        if len(first) != 1:
            raise LoadError(f"baseline {baseline} holds {len(first)} files, expected one file")
        found = [first[0], *(path for path in found if not path.samefile(first[0]))]
    if not found:
        raise LoadError("no file to measure", hint="give .onnx or .tflite files, or a folder of results")
    repeated = next((a for i, a in enumerate(found) if any(a.samefile(b) for b in found[:i])), None)
    if repeated is not None and len(found) > 2:
        raise LoadError(f"{repeated} is given twice", hint="a file alone against itself is an A/A comparison")
    files: list[BenchFile] = []
    for path, key in zip(found, _keys(found), strict=True):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise LoadError(f"{path} cannot be read: {error.strerror}") from error
        files.append(BenchFile(key, path, sha256_hex(content), len(content)))
    return files


def _artifacts(path: Path) -> list[Path]:
    """Return the file itself, or those of a folder."""
    if path.is_dir():
        found = [path / f"model{suffix}" for suffix in FOLDER_SUFFIXES if (path / f"model{suffix}").is_file()]
        if not found:
            raise LoadError(
                f"{path} holds neither model.onnx nor model.tflite, expected a folder that compress wrote"
            )
        return found
    if not path.is_file():
        raise LoadError(f"{path} does not exist", hint="give .onnx or .tflite files, or a folder of results")
    if path.suffix.lower() not in SUFFIXES:
        raise LoadError(f"{path} is a {path.suffix or 'nameless'} file, expected .onnx, .tflite or .pt2")
    return [path]


def _keys(paths: Sequence[Path]) -> list[str]:
    """Return short names, with the folder's where files have the same, numbered where that is not enough.

    Example:
        >>> _keys([Path("a/model.onnx"), Path("b/model.onnx"), Path("b/model.tflite")])
        ['a-model.onnx', 'b-model.onnx', 'model.tflite']
    """
    folders: dict[str, set[Path]] = {}
    for path in paths:
        folders.setdefault(path.name, set()).add(path.absolute().parent)
    keys: list[str] = []
    for path in paths:
        name = path.name if len(folders[path.name]) == 1 else f"{path.absolute().parent.name}-{path.name}"
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
        number = 2
        unique = name
        while unique in keys:
            unique, number = f"{name}-{number}", number + 1
        keys.append(unique)
    return keys
