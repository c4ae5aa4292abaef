"""From what the user wrote to a Dataset."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import numpy.typing as npt

from edgecnn.data.dataset import Dataset
from edgecnn.data.digits import open_digits
from edgecnn.data.factory import call_factory, from_python
from edgecnn.data.folder import FolderDataset
from edgecnn.data.npz import open_npz
from edgecnn.errors import DataError
from edgecnn.runner.preprocess import Preprocess

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_EXPECTED = "a folder of images, an .npz file, digits, or package.module:factory"

Source = str | Path | Dataset | tuple[Any, Any] | npt.NDArray[Any]
"""What `open_dataset` takes."""


def _refuse_missing(path: Path) -> None:
    """Raise for a path that does not exist, with the nearest name in the same place.

    Raises:
        DataError: always.
    """
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        names = []
    close = difflib.get_close_matches(path.name, [*names, "digits"], n=1)
    nearest = None if not close else path.parent / close[0] if close[0] in names else close[0]
    raise DataError(
        f"data source '{path}' does not exist, expected {_EXPECTED}",
        hint=f"did you mean '{nearest}'?" if nearest else None,
    )


def _open_path(
    path: Path, preprocess: Preprocess, class_count: int | None, labels: tuple[str, ...] | None
) -> Dataset:
    try:
        exists, is_dir = path.exists(), path.is_dir()
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror or error}") from error
    if is_dir:
        return FolderDataset(path, preprocess, class_count=class_count, labels=labels)
    if not exists:
        _refuse_missing(path)
    if path.suffix.lower() == ".npz":
        return open_npz(path, preprocess, class_count=class_count, labels=labels)
    archive = path.name.lower().endswith(_ARCHIVES)
    raise DataError(
        f"data source '{path}' is a file, expected {_EXPECTED}",
        hint="extract the archive first and give the folder" if archive else None,
    )


def open_dataset(
    source: Source,
    preprocess: Preprocess,
    *,
    class_count: int | None = None,
    labels: tuple[str, ...] | None = None,
) -> Dataset:
    """Open images as inputs for a network.

    Args:
        source: a folder (class subfolders, or images side by side), an .npz file, "digits" ("digits:train",
            "digits:test"), "package.module:factory", a Dataset, (images, labels), or images: uint8
            (n, h, w, c), or float (n, c, h, w) that are preprocessed already.
        preprocess: of the network.
        class_count: classes the network tells apart, or None where unknown.
        labels: the network's class names, or None.

    Returns:
        A Dataset whose inputs are float32 (n, c, h, w).

    Raises:
        DataError: if the source is missing, damaged, or does not fit the network.
        MissingDependencyError: if Pillow or scikit-learn is needed and not installed.

    Example:
        >>> import numpy as np
        >>> images = np.zeros((5, 8, 8, 3), np.uint8)
        >>> open_dataset((images, [0, 1, 2, 3, 4]), Preprocess((4, 4)), class_count=5).inputs([0, 4]).shape
        (2, 3, 4, 4)
    """
    if class_count is None and labels is not None:
        class_count = len(labels)
    if isinstance(source, Path):
        return _open_path(source, preprocess, class_count, labels)
    if not isinstance(source, str):
        return from_python("data", source, preprocess, class_count=class_count)
    name, _, part = source.partition(":")
    if name == "digits" and not Path(source).exists():
        return open_digits(part, preprocess, class_count=class_count)
    if _FACTORY.fullmatch(source) and not Path(source).exists():
        return from_python(source, call_factory(source), preprocess, class_count=class_count)
    return _open_path(Path(source).expanduser(), preprocess, class_count, labels)
