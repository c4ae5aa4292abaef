"""Damaged, foreign and hostile files: one clear error, nothing runs, no other exception."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgecnn.errors import EdgeCNNError, LoadError, MissingDependencyError, OutputError, UntrustedPickleError
from edgecnn.load import LoadOptions, load_model, save_pt2

ARCH = LoadOptions(arch="examples.lenet5:LeNet5", input_shape=(1, 32, 32))


class Bomb:
    """Makes a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.fixture(autouse=True)
def from_project_root(monkeypatch: pytest.MonkeyPatch, examples_dir: Path) -> None:
    monkeypatch.chdir(examples_dir.parent)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, examples_dir: Path) -> Path:
    """A good file of every format."""
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("good")
    state = load_file(examples_dir / "lenet5_digits.safetensors")
    shutil.copy(examples_dir / "lenet5_digits.safetensors", folder / "net.safetensors")
    shutil.copy(examples_dir / "lenet5_digits.pt2", folder / "net.pt2")
    torch.save(state, folder / "net.pt")
    torch.save({"state_dict": state, "epoch": 1}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    return folder


FORMATS = ["net.pt", "legacy.pth", "net.safetensors", "net.pt2"]


def load(path: Path) -> Any:
    return load_model(path, LoadOptions() if path.name.endswith(".pt2") else ARCH)


@pytest.mark.parametrize("name", FORMATS)
def test_truncated(files: Path, tmp_path: Path, name: str) -> None:
    content = (files / name).read_bytes()
    rng = random.Random(1)
    for length in [1, 7, 9, 100, len(content) - 1, *(rng.randrange(1, len(content)) for _ in range(10))]:
        bad = tmp_path / name
        bad.write_bytes(content[:length])
        with pytest.raises(LoadError) as caught:
            load(bad)
        assert str(bad) in str(caught.value)
        assert caught.value.hint


@pytest.mark.parametrize("name", FORMATS)
def test_flipped_bits_never_crash(files: Path, tmp_path: Path, name: str) -> None:
    content = (files / name).read_bytes()
    rng = random.Random(2)
    interesting = _interesting(content, name)
    loads = 0
    for i in range(40):
        damaged = bytearray(content)
        for _ in range(1 + i % 3):
            start, stop = interesting if i % 2 else (0, len(content))
            damaged[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
        bad = tmp_path / name
        bad.write_bytes(bytes(damaged))
        try:
            load(bad)
            loads += 1
        except EdgeCNNError as error:
            assert error.message
    assert loads < 40, "some damage is noticed"


def _interesting(content: bytes, name: str) -> tuple[int, int]:
    """Where the structure is, as opposed to weights: the end of a zip, the head of the others."""
    return (len(content) - 4000, len(content)) if name in ("net.pt", "net.pt2") else (0, 900)


def test_damaged_program_inside_a_sound_archive(files: Path, tmp_path: Path) -> None:
    """Bits flipped in the serialized graph, with checksums made right again."""
    rng = random.Random(3)
    for i in range(40):

        def edit(text: bytes, i: int = i) -> bytes:
            damaged = bytearray(text)
            for _ in range(1 + i % 4):
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            return bytes(damaged)

        member = ("models/model.json", "model_weights_config.json", "sample_inputs/model.pt")[i % 3]
        bad = rewrite(files / "net.pt2", tmp_path / "bad.pt2", {member: edit})
        try:
            load(bad)
        except EdgeCNNError as error:
            assert error.message


def rewrite(source: Path, target: Path, edits: dict[str, Any], extra: dict[str, bytes] | None = None) -> Path:
    """Copy a .pt2 with some members edited; stored, as PyTorch writes them."""
    reader = torch._C.PyTorchFileReader(str(source))
    writer = torch._C.PyTorchFileWriter(str(target))
    names = [n for n in reader.get_all_records() if not n.startswith(".data/") and n != "byteorder"]
    for name in names:
        content = reader.get_record(name)
        for suffix, edit in edits.items():
            if name.endswith(suffix):
                content = edit(content)
        writer.write_record(name, content, len(content))
    for name, content in (extra or {}).items():
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return target


def replacing(old: str, new: str) -> Any:
    def edit(content: bytes) -> bytes:
        assert old.encode() in content
        return content.replace(old.encode(), new.encode())

    return edit


def test_rewriting_alone_does_no_harm(files: Path, tmp_path: Path) -> None:
    assert load(rewrite(files / "net.pt2", tmp_path / "same.pt2", {})).spec.labels == tuple("0123456789")


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_that_runs_a_command(tmp_path: Path, legacy: bool) -> None:
    touched, bad = tmp_path / "touched", tmp_path / "evil.pt"
    torch.save(
        {"state_dict": {"w": torch.zeros(1), "x": Bomb(touched)}},
        bad,
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(UntrustedPickleError, match=r"wants to load (posix|nt)\.system.*--arch.*--trust"):
        load(bad)
    assert not touched.exists()


def test_bare_pickle_that_runs_a_command(tmp_path: Path) -> None:
    touched, bad = tmp_path / "touched", tmp_path / "evil.pkl"
    bad.write_bytes(pickle.dumps(Bomb(touched), protocol=2))
    with pytest.raises(LoadError):
        load(bad)
    assert not touched.exists()


def test_pickled_module_needs_trust(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 1))
    torch.save(net, tmp_path / "whole.pt")
    shape = (3, 4, 4)
    with pytest.raises(UntrustedPickleError, match=r"torch\.nn\.modules\.container\.Sequential.*--trust"):
        load_model(tmp_path / "whole.pt", LoadOptions(input_shape=shape))
    model = load_model(tmp_path / "whole.pt", LoadOptions(input_shape=shape, trust=True))
    x = torch.randn(2, *shape)
    torch.testing.assert_close(model.graph(x), net(x).detach())


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _with_hostile_key(content: bytes) -> bytes:
    """A keyword argument whose name closes the quotes PyTorch puts around it in source text."""
    program = json.loads(content)
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    spec = json.loads(signature["in_spec"])
    spec[1]["children_spec"][1]["context"] = json.dumps(["a': print(1), '"])
    signature["in_spec"] = json.dumps(spec)
    return json.dumps(program).encode()


def _hostile(kind: str, touched: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    command = f"__import__('os').system('touch {touched}')"
    quoted = command.replace('"', '\\"')
    program, constants = "models/model.json", "model_constants_config.json"
    opaque = json.dumps({"config": {"c": dict(OPAQUE)}})
    return {
        "sample_inputs": ({"sample_inputs/model.pt": lambda _: _pickled(Bomb(touched))}, {}),
        "weight": ({"model_weights_config.json": replacing('"use_pickle": false', '"use_pickle": true'),
                    "weights/weight_0": lambda _: _pickled(Bomb(touched))}, {}),
        "legacy_weights": ({}, {"data/weights/model.pt": _pickled(Bomb(touched))}),
        "opaque": ({constants: lambda _: opaque.encode()},
                   {"data/constants/opaque_obj_0": pickle.dumps(Bomb(touched))}),
        "size": ({program: replacing("Symbol('s", f"{quoted} or Symbol('s")}, {}),
        "operator": ({program: replacing('"torch.ops.aten.relu.default"', '"torch.os.system"')}, {}),
        "name": ({program: replacing('"image"', f'"image={quoted}"')}, {}),
        "parameter": ({program: replacing('"features.0.weight"', f'"f\\"), {quoted}, (\\""')}, {}),
        "argument": ({program: replacing('["image"]', f'["image={quoted}"]')}, {}),
        "key": ({program: _with_hostile_key}, {}),
        "tree": ({program: replacing("builtins.tuple", "collections.defaultdict")}, {}),
        "compiled": ({}, {"data/aotinductor/model/model.so": b"\x7fELF"}),
    }[kind]  # fmt: skip


OPAQUE = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
HOSTILE = [
    "sample_inputs",
    "weight",
    "legacy_weights",
    "opaque",
    "size",
    "operator",
    "name",
    "parameter",
    "argument",
    "key",
    "tree",
    "compiled",
]


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pt2(files: Path, tmp_path: Path, kind: str) -> None:
    touched = tmp_path / "touched"
    edits, extra = _hostile(kind, touched)
    bad = rewrite(files / "net.pt2", tmp_path / "evil.pt2", edits, extra)
    with pytest.raises(LoadError) as caught:
        load(bad)
    assert not touched.exists()
    if kind != "compiled":
        assert isinstance(caught.value, UntrustedPickleError)
        assert "it was not loaded" in str(caught.value)
        assert "--trust" in str(caught.value)


@pytest.mark.parametrize("kind", ["sample_inputs", "size"])
def test_the_hostile_files_are_indeed_hostile(files: Path, tmp_path: Path, kind: str) -> None:
    touched = tmp_path / "touched"
    edits, extra = _hostile(kind, touched)
    bad = rewrite(files / "net.pt2", tmp_path / "evil.pt2", edits, extra)
    with contextlib.suppress(LoadError):
        load_model(bad, LoadOptions(trust=True))
    assert touched.exists()


def _foreign(folder: Path) -> dict[str, tuple[bytes, str]]:
    np.savez(folder / "a.npz", images=np.zeros(3))
    np.save(folder / "a.npy", np.zeros(3))
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.ReLU()), buffer)
    keras = io.BytesIO()
    with zipfile.ZipFile(keras, "w") as archive:
        for name in ("metadata.json", "config.json", "model.weights.h5"):
            archive.writestr(name, "{}")
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("photo.jpg", "x")
    return {
        "torchscript": (buffer.getvalue(), "this is a TorchScript archive.*torch.export.save"),
        "onnx": (b"\x08\x0a\x12\x07pytorch\x1a\x052.13", "this is an ONNX model.*torch.export.save"),
        "tflite": (b"\x1c\0\0\0TFL3" + bytes(40), "this is a TFLite model.*PyTorch model it was made from"),
        "keras": (keras.getvalue(), "this is a Keras model.*not read yet"),
        "h5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "this is an HDF5 file.*not read yet"),
        "npz": ((folder / "a.npz").read_bytes(), "this is a NumPy file.*--data"),
        "npy": ((folder / "a.npy").read_bytes(), "this is a NumPy file.*--data"),
        "zip": (other.getvalue(), r"a zip archive, but not of a model \(photo.jpg\)"),
        "text": (b"hello, this is no model at all", "not a model file edgecnn knows"),
        "empty": (b"", "the file is empty"),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "kind", ["torchscript", "onnx", "tflite", "keras", "h5", "npz", "npy", "zip", "text", "empty"]
)
def test_foreign_files_are_recognised(tmp_path: Path, kind: str) -> None:
    content, message = _foreign(tmp_path)[kind]
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=message):
        load(path)


def test_options_that_contradict_the_source(files: Path) -> None:
    with pytest.raises(LoadError, match=r"net\.pt2: a \.pt2 file holds its own network"):
        load_model(files / "net.pt2", ARCH)
    with pytest.raises(LoadError, match=r"weights .*net\.pt beside the model file .*net\.pt2"):
        load_model(files / "net.pt2", LoadOptions(weights=files / "net.pt"))
    with pytest.raises(LoadError, match="the model is already an architecture, torchvision:resnet18"):
        load_model("torchvision:resnet18", ARCH)


def test_paths(files: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"net\.pth: no such file \(hint: did you mean net\.pt"):
        load(files / "net.pth")
    with pytest.raises(LoadError, match="is a directory, expected a model file"):
        load(tmp_path)
    with pytest.raises(LoadError, match="holds dict with keys epoch, expected a state dict"):
        torch.save({"epoch": 1}, tmp_path / "no.pt")
        load(tmp_path / "no.pt")
    with pytest.raises(LoadError, match="the model is int, expected a path"):
        load_model(3)  # type: ignore[arg-type]
    with pytest.raises(LoadError, match=r"a \.pt2 file holds its own network"):
        load_model("examples.lenet5:LeNet5", LoadOptions(weights=files / "net.pt2"))


def _write_factories(folder: Path) -> None:
    (folder / "factories_for_test.py").write_text(
        "def broken():\n    raise KeyError('width')\n\ndef number():\n    return 3\n\nvalue = 4\n"
    )
    (folder / "needs_more_for_test.py").write_text("import no_such_package_for_test\n")


def test_architecture_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_factories(tmp_path)
    monkeypatch.chdir(tmp_path)
    cases = {
        "factories_for_test:broken": (LoadError, r"the factory raised KeyError: 'width'"),
        "factories_for_test:number": (LoadError, r"returned int, expected a torch\.nn\.Module"),
        "factories_for_test:value": (LoadError, r"value is int, expected a function or class"),
        "factories_for_test:brokn": (LoadError, r"has no 'brokn' \(hint: did you mean broken"),
        "no_such_package_for_test:net": (LoadError, r"no module 'no_such_package_for_test' in"),
        "needs_more_for_test:net": (
            MissingDependencyError,
            r"needs 'no_such_package_for_test', which is not installed",
        ),
    }
    for spec, (kind, message) in cases.items():
        with pytest.raises(kind, match=message):
            load_model(spec)
    (tmp_path / "w.pt").write_bytes(_pickled({"w": torch.zeros(1)}))
    with pytest.raises(LoadError, match=r"'resnet 18' is not a spec.*expected torchvision:NAME"):
        load_model(tmp_path / "w.pt", LoadOptions(arch="resnet 18"))


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_unknown_packaged_architecture(package: str) -> None:
    pytest.importorskip(package)
    with pytest.raises(LoadError, match=f"{package} has no model 'resnet19' .*did you mean .*resnet18"):
        load_model(f"{package}:resnet19")


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_missing_package(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingDependencyError, match=f"{package} is not installed .*pip install {package}"):
        load_model(f"{package}:resnet18")


def test_saving_where_nothing_can_be_written(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(files / "net.pt2")
    with pytest.raises(OutputError, match="cannot be written"):
        save_pt2(model, tmp_path / "missing" / "a.pt2")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a.pt2").write_bytes(b"old")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        save_pt2(model, tmp_path / "a.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt2"], "no half-written file stays"
    assert (tmp_path / "a.pt2").read_bytes() == b"old"
