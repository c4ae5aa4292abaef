"""Outputs of every artifact, written as they come.

Into a directory each output streams to KEY.INDEX.npy; into one .npz they are gathered first, as KEY/NAME.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np

from .failure import InputFailure
from .inputs import Images
from .request import Request
from .session import Session


class NpyWriter:
    """An .npy file written row by row under a temporary name; `close` gives it its own.

    Args:
        path: its final name.
        num_rows: rows that will be appended in all.
    """

    def __init__(self, path: Path, num_rows: int) -> None:
        self.path = path
        self.num_rows = num_rows
        self.shape: Tuple[int, ...] = ()
        self._temporary = path.with_name(path.name + ".part")
        self._stream = self._temporary.open("wb")

    def append(self, rows: "np.ndarray[Any, Any]") -> None:
        """Add rows; the first ones fix dtype and shape."""
        if not self.shape:
            self.shape = (self.num_rows, *rows.shape[1:])
            header = {
                "descr": np.lib.format.dtype_to_descr(rows.dtype),
                "fortran_order": False,
                "shape": self.shape,
            }
            np.lib.format.write_array_header_1_0(self._stream, header)
        self._stream.write(np.ascontiguousarray(rows).tobytes())

    def close(self) -> None:
        """Close the file and rename it."""
        self._stream.close()
        self._temporary.replace(self.path)

    def discard(self) -> None:
        """Close the file, and delete it unless it has its final name."""
        self._stream.close()
        if self._temporary.exists():
            self._temporary.unlink()


def run_outputs(request: Request, sessions: Dict[str, Session], images: Images) -> Dict[str, Any]:
    """Write every output of every artifact.

    Arrays are float32, or as stored when `raw`; 4-D ones in NCHW order.

    Returns:
        `num_samples`, `outputs` (the directory or file), and per artifact its `outputs`: name, shape, dtype
        and the `array` (file in the directory, name in the .npz) that holds it.

    Raises:
        InputFailure: if an output does not have the batch first.
    """
    target = request.outputs or Path()
    gathered: Optional[Dict[str, "np.ndarray[Any, Any]"]] = {} if target.suffix.lower() == ".npz" else None
    (target if gathered is None else target.parent).mkdir(parents=True, exist_ok=True)
    described: Dict[str, Any] = {}
    for key, session in sessions.items():
        if gathered is None:
            names = [f"{key}.{index}.npy" for index in range(len(session.outputs))]
            arrays = _stream(request, session, images, [target / name for name in names])
        else:
            names = [f"{key}/{info.name}" for info in session.outputs]
            batches = list(_batches(request, session, images))
            values = [np.concatenate(pieces) for pieces in zip(*batches)]  # noqa: B905 - 3.9
            gathered.update(zip(names, values))  # noqa: B905 - 3.9
            arrays = [(value.shape, value.dtype.name) for value in values]
        described[key] = {
            "runtime": session.runtime,
            "runtime_package": session.runtime_package,
            "runtime_version": session.runtime_version,
            "outputs": [
                {
                    **info.to_dict(),
                    "stored_dtype": info.dtype,
                    "array": names[index],
                    "shape": list(arrays[index][0]),
                    "dtype": arrays[index][1],
                }
                for index, info in enumerate(session.outputs)
            ],
        }
    if gathered is not None:
        temporary = target.with_name(target.name + ".part")
        with temporary.open("wb") as stream:
            np.savez(stream, **gathered)  # type: ignore[arg-type]
        temporary.replace(target)
    return {"num_samples": len(images), "outputs": str(target), "artifacts": described}


def _batches(request: Request, session: Session, images: Images) -> Iterator[List["np.ndarray[Any, Any]"]]:
    """Yield the outputs of each batch, in the session's order."""
    for start, stop in images.batches(request.batch_size):
        session.prepare(images.feeds(session, start, stop))
        session.invoke()
        outputs = list(session.collect(raw=request.raw).values())
        for info, array in zip(session.outputs, outputs):  # noqa: B905 - strict= needs Python 3.10
            if array.ndim == 0 or array.shape[0] != stop - start:
                raise InputFailure(
                    f"output '{info.name}' of {session.path.name} has shape {array.shape} "
                    f"for a batch of {stop - start}, expected the batch first"
                )
        yield outputs


def _stream(
    request: Request, session: Session, images: Images, paths: List[Path]
) -> List[Tuple[Tuple[int, ...], str]]:
    """Write the outputs to files and return the shape and dtype of each."""
    writers = [NpyWriter(path, len(images)) for path in paths]
    dtypes: List[str] = []
    try:
        for outputs in _batches(request, session, images):
            dtypes = [array.dtype.name for array in outputs]
            for writer, array in zip(writers, outputs):  # noqa: B905 - strict= needs Python 3.10
                writer.append(array)
        for writer in writers:
            writer.close()
    finally:
        for writer in writers:
            writer.discard()
    return [(writer.shape, dtype) for writer, dtype in zip(writers, dtypes)]  # noqa: B905 - 3.9
