"""Artifacts: written whole or not at all, read back with their sidecar, refused when they do not fit."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from edgecnn import artifact as artifact_module
from edgecnn.artifact import (
    Artifact,
    FileTensor,
    check_output_directory,
    read_artifact,
    sha256_hex,
    write_artifact,
    write_file_atomically,
    write_files_atomically,
)
from edgecnn.errors import LoadError, OutputError
from edgecnn.model import ModelSpec, PassRecord, TensorSpec
from edgecnn.runner.preprocess import Preprocess

DATA = b"the bytes of a model"


def make_artifact(path: Path) -> Artifact:
    spec = ModelSpec(
        name="net",
        inputs=(TensorSpec("x", (None, 3, 8, 6)),),
        outputs=(TensorSpec("logits", (None, 2)),),
        task="classification",
        labels=("cat", "dog"),
        preprocess=Preprocess(size=(8, 6), mean=(0.5, 0.5, 0.5)),
    )
    history = (PassRecord("quantize_static", {"observer": "mse"}, 1.5, {"params": 3}, {"params": 3}),)
    inputs = (FileTensor("x", (None, 3, 8, 6), "nhwc", "int8", 0.5, -3),)
    outputs = (FileTensor("logits", (None, 2)),)
    digest = sha256_hex(DATA)
    return Artifact(path, "tflite", spec, digest, len(DATA), "static_wi8_ai8", history, inputs, outputs)


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


def fail_with(code: int, after_bytes: int = 0) -> Any:
    """A write that puts some bytes on the disk and then fails, as a full disk does."""

    def write(path: Path, data: bytes) -> None:
        path.write_bytes(data[:after_bytes])
        raise OSError(code, os.strerror(code))

    return write


def test_an_artifact_comes_back_as_it_was_written(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "out" / "model.tflite")
    write_artifact(artifact, DATA)
    assert leftovers(tmp_path) == ["model.tflite", "model.tflite.json"]
    assert read_artifact(artifact.path) == artifact


def test_the_sidecar_says_what_the_runner_needs(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "model.tflite")
    write_artifact(artifact, DATA)
    values = json.loads((tmp_path / "model.tflite.json").read_text())
    assert values["schema_version"] == 1
    assert values["inputs"] == [
        {
            "name": "x",
            "shape": [None, 3, 8, 6],
            "layout": "nhwc",
            "dtype": "int8",
            "scale": 0.5,
            "zero_point": -3,
        }
    ]
    assert values["sha256"] == sha256_hex(DATA)
    assert values["preprocess"]["mean"] == [0.5, 0.5, 0.5]
    assert list(values) == [
        "schema_version", "format", "name", "task", "labels", "preprocess", "sha256", "size_bytes", "recipe",
        "history", "inputs", "outputs",
    ]  # fmt: skip


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "model.tflite")
    write_artifact(artifact, DATA)
    artifact.path.write_bytes(DATA + b"!")
    with pytest.raises(LoadError, match=r"SHA-256 is .*, its sidecar says"):
        read_artifact(artifact.path)


def test_a_missing_sidecar_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(DATA)
    with pytest.raises(
        LoadError, match=r"model\.onnx\.json: No such file.*keep model.onnx and model.onnx.json together"
    ):
        read_artifact(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda values: values.pop("sha256"), "missing 'sha256'"),
        (lambda values: values.update(schema_version=9), "schema_version is 9, expected 1"),
        (lambda values: values.update(inputs=[{"nam": "x", "shape": []}]), "not a sidecar of edgecnn"),
        (lambda values: values.update(preprocess=None), "not a sidecar of edgecnn"),
    ],
)
def test_a_broken_sidecar_is_refused(tmp_path: Path, change: Any, expected: str) -> None:
    artifact = make_artifact(tmp_path / "model.tflite")
    write_artifact(artifact, DATA)
    values = artifact.to_sidecar()
    change(values)
    artifact.sidecar_path.write_text(json.dumps(values))
    with pytest.raises(LoadError, match=expected):
        read_artifact(artifact.path)


def test_a_sidecar_cut_short_is_refused(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "model.tflite")
    write_artifact(artifact, DATA)
    artifact.sidecar_path.write_text("{")
    with pytest.raises(LoadError, match="not JSON"):
        read_artifact(artifact.path)


def test_a_written_file_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_file_atomically(tmp_path / "file", DATA)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "choose another directory"),
    ],
)
def test_a_failing_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, hint: str
) -> None:
    monkeypatch.setattr(artifact_module, "_write_to_disk", fail_with(code, after_bytes=5))
    with pytest.raises(
        OutputError, match=f"cannot write {tmp_path}/out/model.onnx: {os.strerror(code)}"
    ) as caught:
        write_file_atomically(tmp_path / "out" / "model.onnx", DATA)
    assert hint in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_the_system_stops_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="file size limits are POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*model.onnx: File too large"):
            write_file_atomically(tmp_path / "model.onnx", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(tmp_path) == []


def test_a_failing_write_keeps_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    write_file_atomically(path, b"old")
    monkeypatch.setattr(artifact_module, "_write_to_disk", fail_with(errno.ENOSPC, after_bytes=5))
    with pytest.raises(OutputError):
        write_file_atomically(path, DATA)
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == ["model.onnx"]


def test_files_that_belong_together_appear_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written = artifact_module._write_to_disk, []

    def interrupt_second(path: Path, data: bytes) -> None:
        real(path, data)
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(artifact_module, "_write_to_disk", interrupt_second)
    with pytest.raises(KeyboardInterrupt):
        write_files_atomically({tmp_path / "out" / "a": DATA, tmp_path / "out" / "in" / "b": DATA})
    assert len(written) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_directory_under_the_final_name_is_said(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(OutputError, match="a directory stands where the file should be"):
        write_file_atomically(tmp_path / "model.onnx", DATA)
    assert leftovers(tmp_path) == []


def test_the_check_of_a_good_directory_leaves_it_as_it_is(tmp_path: Path) -> None:
    check_output_directory(tmp_path, force=False)
    check_output_directory(tmp_path / "new" / "deeper", force=False)
    assert list(tmp_path.iterdir()) == []


def test_earlier_results_are_kept_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"old")
    (tmp_path / "notes.txt").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"already holds model\.onnx \(hint: .*--force\)"):
        check_output_directory(tmp_path, force=False)
    check_output_directory(tmp_path, force=True)
    check_output_directory(tmp_path, force=False, names=("model.tflite",))


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"")
    for path in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(
            OutputError, match=r"cannot write .*out.*: Not a directory.*is a file, not a directory"
        ):
            check_output_directory(path, force=False)


def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_module, "_write_to_disk", fail_with(errno.EROFS))
    with pytest.raises(OutputError, match="Read-only file system"):
        check_output_directory(tmp_path, force=False)
    assert leftovers(tmp_path) == []
