"""Input images and labels from .npy files, read batch by batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple

import numpy as np

from .failure import InputFailure
from .preprocess import Preprocess
from .session import Session
from .tensors import read_sidecar


class Images:
    """An .npy file of float32 NCHW inputs or uint8 NHWC pixels.

    Args:
        path: the file; it is read batch by batch.
        preprocess: for pixels; None takes the one in each model file's sidecar.

    Raises:
        InputFailure: if the file is missing, is not .npy, is empty or has another type.
    """

    def __init__(self, path: Path, preprocess: Optional[Mapping[str, Any]] = None) -> None:
        self.path = path
        # Each batch maps the file anew: pages of one long-lived mapping would add up to the whole file.
        array = map_array(path)
        self._preprocess = None if preprocess is None else _preprocess(preprocess, "the request")
        self._by_file: Dict[Path, Preprocess] = {}
        kind = array.dtype.name
        if kind not in ("float32", "uint8") or array.ndim < 2:
            raise InputFailure(
                f"{path} holds {kind} of shape {array.shape}, "
                "expected float32 (n, c, h, w) or uint8 pixels (n, h, w, c)"
            )
        if array.shape[0] == 0:
            raise InputFailure(f"{path} holds no images")
        self.is_pixels = kind == "uint8"
        self._num_images = int(array.shape[0])

    def __len__(self) -> int:
        return self._num_images

    def batches(self, batch_size: int) -> Iterator[Tuple[int, int]]:
        """Yield (start, stop) of each batch; the last may be short."""
        for start in range(0, len(self), batch_size):
            yield start, min(start + batch_size, len(self))

    def feeds(self, session: Session, start: int, stop: int) -> Dict[str, "np.ndarray[Any, Any]"]:
        """Return a session's feeds for images start to stop, (stop - start, c, h, w).

        Raises:
            InputFailure: if the model has several inputs, or pixels have no preprocess or do not fit it.
        """
        if len(session.inputs) != 1:
            names = [info.name for info in session.inputs]
            raise InputFailure(f"{session.path.name} takes the inputs {names}, expected one image input")
        values = np.array(map_array(self.path)[start:stop])
        if self.is_pixels:
            try:
                values = self._preprocess_for(session.path).apply(values)
            except ValueError as error:
                raise InputFailure(f"{self.path}: {error}") from error
        return {session.inputs[0].name: values}

    def _preprocess_for(self, path: Path) -> Preprocess:
        if self._preprocess is not None:
            return self._preprocess
        if path not in self._by_file:
            values = read_sidecar(path).get("preprocess")
            if not values:
                raise InputFailure(
                    f"{self.path} holds uint8 pixels, and neither the request nor {path.name}.json "
                    "has a preprocess",
                    hint="give the preprocess the network was trained with",
                )
            self._by_file[path] = _preprocess(values, f"{path.name}.json")
        return self._by_file[path]


def noise_feeds(session: Session, batch_size: int) -> Dict[str, "np.ndarray[Any, Any]"]:
    """Return standard normal inputs (seed 0) in the session's own shapes, float32 NCHW.

    Raises:
        InputFailure: if a dimension other than the batch is free.
    """
    generator = np.random.default_rng(0)
    feeds = {}
    for info in session.inputs:
        if any(size is None for size in info.nchw_shape[1:]):
            raise InputFailure(
                f"input '{info.name}' of {session.path.name} has free dimensions {info.nchw_shape}",
                hint="give inputs",
            )
        shape = (batch_size, *(int(size or 1) for size in info.nchw_shape[1:]))
        feeds[info.name] = generator.standard_normal(shape).astype(np.float32)
    return feeds


def read_labels(path: Path, num_images: int) -> "np.ndarray[Any, Any]":
    """Read integer labels, (n,) or (n, h, w).

    Raises:
        InputFailure: if they are not integers or their number is not that of the images.
    """
    labels = map_array(path)
    if labels.dtype.kind not in "iu" or labels.ndim not in (1, 3):
        raise InputFailure(
            f"{path} holds {labels.dtype.name} of shape {labels.shape}, expected integers (n,) or (n, h, w)"
        )
    if labels.shape[0] != num_images:
        raise InputFailure(f"{path} holds {labels.shape[0]} labels for {num_images} images")
    return labels


def map_array(path: Path) -> "np.ndarray[Any, Any]":
    """Map an .npy file into memory.

    Raises:
        InputFailure: if it is missing or is not an .npy file of plain values.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise InputFailure(f"{path} does not exist") from error
    except (OSError, ValueError, EOFError) as error:
        raise InputFailure(f"{path} is not a readable .npy file: {error}") from error
    if not isinstance(array, np.ndarray):
        raise InputFailure(f"{path} is not one array, expected a .npy file")
    return array


def _preprocess(values: Mapping[str, Any], where: str) -> Preprocess:
    try:
        return Preprocess.from_dict(dict(values))
    except (TypeError, KeyError) as error:
        raise InputFailure(f"the preprocess in {where} is not valid: {error}") from error
