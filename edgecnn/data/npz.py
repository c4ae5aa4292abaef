"""Images and labels in an .npz file."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecnn.data.arrays import ArrayDataset
from edgecnn.errors import DataError
from edgecnn.runner.preprocess import Preprocess

IMAGE_KEYS = ("images", "x", "data")
LABEL_KEYS = ("labels", "y")


def _read_array(path: Path, archive: Any, key: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(archive[key])
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise DataError(f"{path}: the array '{key}' is damaged: {error}") from error
        raise DataError(
            f"{path}: the array '{key}' is a pickle of Python objects, which may run code and is not opened",
            hint="store plain arrays: np.savez(path, images=uint8 (n, h, w, c), labels=int64 (n,))",
        ) from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise DataError(
            f"{path}: the array '{key}' is damaged or truncated: {error}", hint="copy or write the file again"
        ) from error


def _first_key(path: Path, keys: list[str], wanted: tuple[str, ...]) -> str | None:
    found = [key for key in wanted if key in keys]
    if len(found) > 1:
        raise DataError(
            f"{path}: found the arrays {' and '.join(found)}, expected only one of {', '.join(wanted)}"
        )
    return found[0] if found else None


def open_npz(
    path: Path,
    preprocess: Preprocess,
    *,
    class_count: int | None = None,
    labels: tuple[str, ...] | None = None,
) -> ArrayDataset:
    """Open an .npz file with uint8 images (key images, x or data) and integer labels (labels or y, optional).

    Args:
        path: the file; pickled arrays in it are refused.
        preprocess: of the network.
        class_count: classes the network tells apart, or None where unknown.
        labels: the network's class names, or None.

    Raises:
        DataError: if the file is damaged, or images or labels do not fit.
    """
    try:
        archive = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, PermissionError):
            raise DataError(f"{path}: cannot be opened: permission denied") from error
        raise DataError(
            f"{path}: not a whole .npz file ({' '.join(str(error).split())})",
            hint="copy or write the file again",
        ) from error
    if not hasattr(archive, "files"):
        raise DataError(
            f"{path}: holds one bare array, expected an .npz with named arrays", hint="use np.savez"
        )
    with archive:
        keys = list(archive.files)
        image_key = _first_key(path, keys, IMAGE_KEYS)
        if image_key is None:
            raise DataError(
                f"{path}: found the arrays {', '.join(keys) or '(none)'}, expected images under one of "
                f"{', '.join(IMAGE_KEYS)}",
                hint="np.savez(path, images=uint8 (n, h, w, c), labels=int64 (n,))",
            )
        label_key = _first_key(path, keys, LABEL_KEYS)
        images = _read_array(path, archive, image_key)
        label_array = None if label_key is None else _read_array(path, archive, label_key)
    return ArrayDataset(
        str(path), images, preprocess, labels=label_array, class_count=class_count, class_names=labels
    )
