"""An artifact: a file for a runtime, its SHA-256 and the sidecar JSON that says how to feed it.

Files appear under their final names complete or not at all: the bytes go to a temporary name in the same
directory, are flushed to the disk, and are renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgecnn.errors import LoadError, OutputError
from edgecnn.model import ModelSpec, PassRecord, TensorSpec
from edgecnn.runner.preprocess import Preprocess

SIDECAR_VERSION = 1

OUTPUT_NAMES = ("model.onnx", "model.tflite", "model.pt2", "report.json", "report.html")
"""What one run may write into its output directory, sidecars aside."""

_HINTS = {
    errno.ENOSPC: "the disk is full: free some space or choose another directory with -o",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another directory with -o",
    errno.EACCES: "no permission to write there: choose another directory with -o",
    errno.EPERM: "no permission to write there: choose another directory with -o",
    errno.EROFS: "the file system is read-only: choose another directory with -o",
    errno.ENOTDIR: "a part of the path is a file, not a directory: choose another directory with -o",
    errno.EEXIST: "a file stands where the directory should be: choose another directory with -o",
    errno.EISDIR: "a directory stands where the file should be: remove it or choose another with -o",
    errno.ENAMETOOLONG: "the path is too long: choose another directory with -o",
}


@dataclass(frozen=True)
class FileTensor:
    """An input or output as a file stores it.

    Attributes:
        name: the tensor's name in the file.
        shape: the batch dimension is None; images are (None, c, h, w) whatever the layout.
        layout: "nchw" or "nhwc", how the file stores a 4-D tensor.
        dtype: "float32", "int8" or "uint8".
        scale: real = scale * (q - zero_point); set when dtype is an integer.
        zero_point: likewise.
    """

    name: str
    shape: tuple[int | None, ...]
    layout: str = "nchw"
    dtype: str = "float32"
    scale: float | None = None
    zero_point: int | None = None


@dataclass(frozen=True)
class Artifact:
    """A file that a runtime executes, and what is known about it.

    Attributes:
        path: where it is.
        format: "onnx" or "tflite".
        spec: the network's inputs, outputs, labels and preprocess, in PyTorch's order of dimensions.
        sha256: of the file's bytes, in hex.
        size_bytes: of the file.
        recipe: name of the recipe that made it, or None.
        history: the passes that made it, oldest first.
        inputs: the inputs as the file stores them.
        outputs: the outputs as the file stores them.
    """

    path: Path
    format: str
    spec: ModelSpec
    sha256: str
    size_bytes: int
    recipe: str | None = None
    history: tuple[PassRecord, ...] = ()
    inputs: tuple[FileTensor, ...] = ()
    outputs: tuple[FileTensor, ...] = ()

    @property
    def sidecar_path(self) -> Path:
        """Where the sidecar stands: the file's name with ".json" behind it."""
        return sidecar_path(self.path)

    def to_sidecar(self) -> dict[str, Any]:
        """Return the content of the sidecar, JSON-ready."""
        return {
            "schema_version": SIDECAR_VERSION,
            "format": self.format,
            "name": self.spec.name,
            "task": self.spec.task,
            "labels": None if self.spec.labels is None else list(self.spec.labels),
            "preprocess": self.spec.preprocess.to_dict(),
            "sha256": self.sha256,
            "size_bytes": self.size_bytes,
            "recipe": self.recipe,
            "history": [asdict(record) for record in self.history],
            "inputs": [asdict(tensor) for tensor in self.inputs],
            "outputs": [asdict(tensor) for tensor in self.outputs],
        }

    def sidecar_bytes(self) -> bytes:
        """Return the sidecar's bytes.

        Raises:
            OutputError: if a value has no place in JSON (NaN, infinity).
        """
        try:
            text = json.dumps(self.to_sidecar(), indent=1, allow_nan=False)
        except ValueError as error:
            raise OutputError(f"{self.sidecar_path}: a value is not a finite number ({error})") from error
        return text.encode() + b"\n"


def sha256_hex(data: bytes) -> str:
    """Return the SHA-256 of some bytes in hex.

    Example:
        >>> sha256_hex(b"")[:8]
        'e3b0c442'
    """
    return hashlib.sha256(data).hexdigest()


def sidecar_path(path: Path) -> Path:
    """Return where the sidecar of a file stands.

    Example:
        >>> sidecar_path(Path("out/model.onnx")).name
        'model.onnx.json'
    """
    return path.with_name(path.name + ".json")


def write_artifact(artifact: Artifact, data: bytes) -> None:
    """Write the file and its sidecar, both or neither.

    Raises:
        OutputError: if either cannot be written.
    """
    write_files_atomically({artifact.path: data, artifact.sidecar_path: artifact.sidecar_bytes()})


def read_artifact(path: Path) -> Artifact:
    """Read an artifact back from its file and its sidecar.

    Raises:
        LoadError: if one of the two is missing or unreadable, or they do not belong together.
    """
    sidecar = sidecar_path(path)
    try:
        data = path.read_bytes()
        values = json.loads(sidecar.read_bytes())
    except OSError as error:
        message = f"{error.filename}: {error.strerror}, expected an artifact with its sidecar"
        raise LoadError(message, hint=f"keep {path.name} and {sidecar.name} together") from error
    except ValueError as error:
        raise LoadError(f"{sidecar}: not JSON ({error})", hint="compress the model again") from error
    try:
        artifact = _from_sidecar(path, values)
    except (AttributeError, KeyError, TypeError) as error:
        found = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise LoadError(
            f"{sidecar}: not a sidecar of edgecnn ({found})", hint="compress the model again"
        ) from error
    if artifact.sha256 != sha256_hex(data):
        message = f"{path}: SHA-256 is {sha256_hex(data)[:12]}..., its sidecar says {artifact.sha256[:12]}..."
        raise LoadError(message, hint="the file changed since it was written; compress the model again")
    return artifact


def _from_sidecar(path: Path, values: dict[str, Any]) -> Artifact:
    """Build the artifact at `path` from its sidecar's values."""
    if values["schema_version"] != SIDECAR_VERSION:
        message = (
            f"{sidecar_path(path)}: schema_version is {values['schema_version']}, expected {SIDECAR_VERSION}"
        )
        raise LoadError(message, hint="read it with the edgecnn that wrote it, or compress the model again")
    inputs, outputs = (
        tuple(FileTensor(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in values[key])
        for key in ("inputs", "outputs")
    )
    labels = values["labels"]
    spec = ModelSpec(
        name=values["name"],
        inputs=tuple(TensorSpec(tensor.name, tensor.shape) for tensor in inputs),
        outputs=tuple(TensorSpec(tensor.name, tensor.shape) for tensor in outputs),
        task=values["task"],
        labels=None if labels is None else tuple(labels),
        preprocess=Preprocess.from_dict(values["preprocess"]),
    )
    history = tuple(PassRecord(**record) for record in values["history"])
    size_bytes, recipe = values["size_bytes"], values["recipe"]
    return Artifact(
        path, values["format"], spec, values["sha256"], size_bytes, recipe, history, inputs, outputs
    )


def write_file_atomically(path: Path, data: bytes) -> None:
    """Write one file: complete under its final name, or not at all.

    Raises:
        OutputError: if it cannot be written; nothing is left behind.
    """
    write_files_atomically({path: data})


def write_files_atomically(files: Mapping[Path, bytes], remove: Iterable[Path] = ()) -> None:
    """Write some files that belong together: afterwards all are the new ones, or all the old ones.

    Args:
        files: the bytes of each path. Missing directories are made.
        remove: older files that do not belong to the new ones, deleted together with the exchange.

    Raises:
        OutputError: if one cannot be written. Nothing is left behind, also on Ctrl-C.
    """
    temporary: dict[Path, Path] = {}
    parents = {place for path in files for place in path.parents}
    missing = sorted((place for place in parents if not place.exists()), reverse=True)
    path = Path()
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path] = _hidden(path)
            _write_to_disk(temporary[path], data)
        with _uninterrupted():
            _exchange(temporary, [path for path in remove if path.is_file()])
    except OSError as error:
        raise _output_error(Path(error.filename2 or path), error) from error
    finally:
        for leftover in temporary.values():
            with contextlib.suppress(OSError):
                leftover.unlink()
        for directory in missing:
            with contextlib.suppress(OSError):
                directory.rmdir()  # succeeds only where no file got its final name


def publish_files(folder: Path, files: Mapping[Path, bytes], force: bool) -> None:
    """Write one run's results into a directory; of several runs at once, each one's stay together.

    Args:
        folder: the directory.
        files: the bytes of each path in it.
        force: replace the results of an earlier run, those of other formats included.

    Raises:
        OutputError: if results came into being meanwhile and force is not set, or a file cannot be written.
    """
    known = [folder / name for name in OUTPUT_NAMES]
    stale = [place for path in known for place in (path, sidecar_path(path)) if place not in files]
    with _locked(folder):
        check_output_directory(folder, force)
        write_files_atomically(files, stale)


def _hidden(path: Path) -> Path:
    """Return a temporary name beside a file."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _exchange(temporary: dict[Path, Path], stale: list[Path]) -> None:
    """Give new files their names and delete stale ones; on an error put back what was there."""
    earlier: dict[Path, Path] = {}
    named: list[Path] = []
    try:
        for path in [*temporary, *stale]:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path), None, str(path))
            if os.path.lexists(path):
                earlier[path] = _hidden(path)
                _set_aside(path, earlier[path])
            if path in temporary:
                temporary[path].replace(path)
                named.append(path)
            else:
                path.unlink(missing_ok=True)
    except OSError:
        for path in named:
            path.unlink(missing_ok=True)
        for path, kept in earlier.items():
            with contextlib.suppress(FileNotFoundError):
                kept.replace(path)
                kept.unlink(missing_ok=True)  # of two names of one file the renaming leaves both
        raise
    temporary.clear()
    for kept in earlier.values():
        with contextlib.suppress(OSError):
            kept.unlink()


def _set_aside(path: Path, kept: Path) -> None:
    """Give a file a second name, so that its own never points at nothing; else move it."""
    try:
        os.link(path, kept, follow_symlinks=False)
    except (OSError, NotImplementedError):
        path.replace(kept)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until a few renames are through."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {name: signal.signal(name, lambda number, _: pending.append(number)) for name in numbers}
    try:
        yield
    finally:
        for name, handler in handlers.items():
            signal.signal(name, signal.SIG_DFL if handler is None else handler)
        for number in pending[:1]:
            signal.raise_signal(number)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time into a directory, which is made, and removed again if it stays empty."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    descriptor = -1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(ImportError, OSError):  # no such locks on Windows and some network drives
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    except OSError as error:
        raise _output_error(folder, error) from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)
        for place in missing:
            with contextlib.suppress(OSError):
                place.rmdir()


def _write_to_disk(path: Path, data: bytes) -> None:
    """Write a new file with the user's usual permissions (mkstemp's would hide it from everyone else)."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def check_output_directory(path: Path, force: bool, names: Iterable[str] = OUTPUT_NAMES) -> None:
    """Check before the long work that results can be written into a directory, and leave it as it is.

    Args:
        path: the directory, which need not exist yet.
        force: whether earlier results may be overwritten.
        names: the files that will be written.

    Raises:
        OutputError: if it is no directory, cannot be written, or holds one of `names` and force is not set.
    """
    present = sorted(name for name in names if path.is_dir() and (path / name).exists())
    if present and not force:
        message = f"{path}: already holds {', '.join(present)}"
        raise OutputError(message, hint="choose another directory with -o, or overwrite with --force")
    nearest = next((place for place in (path, *path.parents) if os.path.lexists(place)), Path())
    probe = nearest / f".edgecnn.{secrets.token_hex(4)}.tmp"
    try:
        _write_to_disk(probe, b"")
    except OSError as error:
        raise _output_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _output_error(path: Path, error: OSError) -> OutputError:
    """Say what kept `path` from being written."""
    reason = error.strerror or str(error)
    return OutputError(
        f"cannot write {path}: {reason}",
        hint=_HINTS.get(error.errno or 0, "choose another directory with -o"),
    )
