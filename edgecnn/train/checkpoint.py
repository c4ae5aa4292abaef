"""Where training keeps its state, so that a killed run goes on where it was.

A stage is one training run of a recipe (it may have several); its state is one file. A file is written under
another name, brought to disk and renamed, so that there is always a whole one: the new or the older.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from edgecnn.errors import OutputError, PassError

_FORMAT = 1
_SUFFIX = ".checkpoint"
_FINGERPRINT = "fingerprint.json"

INTERVAL_SECONDS = 60.0
"""Time between checkpoints, unless told otherwise."""


class Checkpoint:
    """The state of one stage.

    Args:
        path: its file.
        fingerprint: what the run is about; a file of another run is refused.
        interval_seconds: how often the loop saves.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: Mapping[str, str] | None = None,
        interval_seconds: float = INTERVAL_SECONDS,
    ) -> None:
        self.path = path
        self.fingerprint = dict(fingerprint or {})
        self.interval_seconds = interval_seconds
        self._saved_at = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether `interval_seconds` have passed since the last attempt to save."""
        return time.monotonic() - self._saved_at >= self.interval_seconds

    def load(self) -> dict[str, Any] | None:
        """Return the state saved last, tensors on the CPU, or None if there is none.

        Raises:
            PassError: if the file cannot be read, or belongs to another run (it says what differs).
        """
        if not self.path.exists():
            return None
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']}, expected {_FORMAT}")
            found, state = content["fingerprint"], content["state"]
        except Exception as error:
            raise PassError(
                f"{self.path}: the checkpoint cannot be read: {_reason(error)}",
                hint="remove the file to start this stage anew",
            ) from error
        differing = differences(found, self.fingerprint)
        if differing:
            raise PassError(
                f"{self.path}: the checkpoint belongs to another run: {'; '.join(differing)}",
                hint="run with the same model, data and settings, or remove the checkpoints to start anew",
            )
        loaded: dict[str, Any] = state
        return loaded

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state on disk; the older one stays where that fails.

        Args:
            state: tensors, numbers, texts, lists and dicts.

        Raises:
            OutputError: if it cannot be written (disk full, permissions); the older checkpoint is whole.
        """
        self._saved_at = time.monotonic()
        buffer = io.BytesIO()
        torch.save({"format": _FORMAT, "fingerprint": self.fingerprint, "state": state}, buffer)
        _write_to_disk(self.path, buffer.getbuffer())


class Checkpoints:
    """The states of all stages of a run, in one folder.

    Args:
        folder: made when the first state is saved.
        fingerprint: what the run is about: hash of the model, recipe, data, seed.
        interval_seconds: how often the loop saves.

    Example:
        >>> Checkpoints(Path("out/checkpoints"), {"seed": "0"}).stage("2 fine_tune").path.name
        '2_fine_tune.checkpoint'
    """

    def __init__(
        self, folder: Path, fingerprint: Mapping[str, str], interval_seconds: float = INTERVAL_SECONDS
    ) -> None:
        self.folder = Path(folder)
        self.fingerprint = dict(fingerprint)
        self.interval_seconds = interval_seconds

    def stage(self, name: str) -> Checkpoint:
        """Return the checkpoint of one stage by a name that is unique in the run."""
        safe = "".join(c if c.isalnum() or c in "-." else "_" for c in name)
        return Checkpoint(self.folder / f"{safe}{_SUFFIX}", self.fingerprint, self.interval_seconds)

    def exists(self) -> bool:
        """Return whether an unfinished run left something here."""
        return any(self.folder.glob(f"*{_SUFFIX}")) or (self.folder / _FINGERPRINT).exists()

    def begin(self) -> None:
        """Write the fingerprint, so that a run that dies before its first checkpoint is known too.

        Raises:
            OutputError: if the folder cannot be written.
        """
        text = json.dumps(self.fingerprint, indent=1, sort_keys=True)
        _write_to_disk(self.folder / _FINGERPRINT, text.encode())

    def differences(self) -> tuple[str, ...]:
        """Return how the run that left its fingerprint here differs from this one; empty if it does not."""
        try:
            found = json.loads((self.folder / _FINGERPRINT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ()
        return differences(found, self.fingerprint)

    def remove(self) -> None:
        """Remove the folder, once the run has succeeded."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _write_to_disk(path: Path, data: bytes | memoryview) -> None:
    """Replace a file in one step, once the new one is on disk; a kill leaves at most `.NAME.tmp` behind.

    Raises:
        OutputError: if it cannot be written; the file is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}", hint="the checkpoint before it is still there"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """Say in a few words why a file is no checkpoint."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, UnpicklingError):  # PyTorch's text goes on for ten lines
        return "it is damaged, or no checkpoint of edgecnn"
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def differences(found: Mapping[str, str], expected: Mapping[str, str]) -> tuple[str, ...]:
    """Say in which entries two fingerprints differ.

    Example:
        >>> differences({"seed": "0", "data": "digits"}, {"seed": "1", "data": "digits"})
        ('seed was 0, is 1',)
    """
    names = sorted({*found, *expected})
    return tuple(
        f"{name} was {found.get(name, 'not set')}, is {expected.get(name, 'not set')}"
        for name in names
        if found.get(name) != expected.get(name)
    )
