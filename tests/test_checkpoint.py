"""Checkpoints: written whole or not at all, refused where they belong to another run."""

from __future__ import annotations

import builtins
import errno
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from edgecnn.errors import OutputError, PassError
from edgecnn.train.checkpoint import Checkpoint, Checkpoints, differences


def state(value: float) -> dict[str, Any]:
    return {"step": int(value), "tensors": {"w": torch.full((3,), value)}, "losses": [0.5, value]}


def test_round_trip(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "deep" / "a.checkpoint", {"seed": "0"})
    assert checkpoint.load() is None
    checkpoint.save(state(1.0))
    checkpoint.save(state(2.0))
    found = checkpoint.load()
    assert found is not None
    assert found["step"] == 2
    assert found["losses"] == [0.5, 2.0]
    assert found["tensors"]["w"].tolist() == [2.0] * 3
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.checkpoint"]


def test_another_run_is_told_apart(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "a", {"seed": "0", "model": "x"}).save(state(1.0))
    with pytest.raises(PassError, match=r"belongs to another run: model was x, is y.*remove the checkpoints"):
        Checkpoint(tmp_path / "a", {"seed": "0", "model": "y"}).load()


@pytest.mark.parametrize("damage", ["short", "empty", "text", "pickle"])
def test_a_file_that_is_no_checkpoint(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a"
    Checkpoint(path).save(state(1.0))
    whole = path.read_bytes()
    contents = {
        "short": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"not a checkpoint",
        "pickle": pickle.dumps({"format": 1, "run": print}),
    }
    path.write_bytes(contents[damage])
    with pytest.raises(PassError, match=r"the checkpoint cannot be read.*start this stage anew"):
        Checkpoint(path).load()


class FullDisk(io.FileIO):
    """A file on a disk that takes 100 bytes."""

    def write(self, data: Any) -> int:
        super().write(bytes(data)[:100])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path / "a")
    checkpoint.save(state(1.0))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode: FullDisk(str(self), mode))
        with pytest.raises(OutputError, match=r"cannot write .*a: No space left.*before it is still there"):
            checkpoint.save(state(2.0))
    found = checkpoint.load()
    assert found is not None
    assert found["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a"], "nothing half-written is left"
    checkpoint.save(state(3.0))
    assert (checkpoint.load() or {})["step"] == 3


def test_a_disk_that_does_not_sync_keeps_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tmp_path / "a")
    checkpoint.save(state(1.0))

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OutputError, match="Input/output error"):
            checkpoint.save(state(2.0))
    assert (checkpoint.load() or {})["step"] == 1


def can_mount(folder: Path) -> bool:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
    )
    return done.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs, which Linux has")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not builtins.any((Path(p) / "mount").exists() for p in os.get_exec_path()) or not can_mount(disk):
        pytest.skip("may not mount a tmpfs here")
    try:
        checkpoint = Checkpoint(disk / "a")
        checkpoint.save(state(1.0))
        with pytest.raises(OutputError, match="No space left on device"):
            checkpoint.save({"step": 2, "w": torch.zeros(100_000)})
        assert (checkpoint.load() or {})["step"] == 1
        assert [p.name for p in disk.iterdir()] == ["a"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_stages_of_a_run(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path / "checkpoints", {"seed": "0"})
    assert not run.exists()
    assert run.differences() == ()
    run.begin()
    assert run.exists()
    first, second = run.stage("1 fine_tune"), run.stage("2/distill")
    assert first.path.parent == second.path.parent == tmp_path / "checkpoints"
    assert first.path != second.path
    second.save(state(1.0))
    assert (run.stage("2/distill").load() or {})["step"] == 1
    assert first.load() is None
    other = Checkpoints(tmp_path / "checkpoints", {"seed": "1"})
    assert other.differences() == ("seed was 0, is 1",)
    with pytest.raises(PassError, match="seed was 0, is 1"):
        other.stage("2/distill").load()
    run.remove()
    assert not (tmp_path / "checkpoints").exists()
    run.remove()


def test_differences_name_what_only_one_has() -> None:
    assert differences({"a": "1"}, {"b": "2"}) == ("a was 1, is not set", "b was not set, is 2")


def test_due_after_the_interval(tmp_path: Path) -> None:
    assert not Checkpoint(tmp_path / "a", interval_seconds=60).is_due
    assert Checkpoint(tmp_path / "a", interval_seconds=0).is_due
