"""The package's public face: lazy, complete, and the same whatever was imported before."""

from __future__ import annotations

import subprocess
import sys

import pytest

import edgecnn


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def test_import_is_light() -> None:
    heavy = ("torch", "numpy", "onnx", "onnxruntime", "click", "rich")
    assert run(f"import sys, edgecnn; print([name for name in {heavy!r} if name in sys.modules])") == "[]"


@pytest.mark.parametrize("name", [name for name in edgecnn.__all__ if name != "__version__"])
def test_every_public_name_is_there(name: str) -> None:
    pytest.importorskip("torch", reason="compress and load need PyTorch")
    assert callable(getattr(edgecnn, name))
    assert name in dir(edgecnn)


def test_functions_are_not_hidden_by_the_modules_of_their_name() -> None:
    pytest.importorskip("torch", reason="compress needs PyTorch")
    program = (
        "import edgecnn.compress, edgecnn.load; from edgecnn.load import LoadOptions; "
        "print(type(edgecnn.compress).__name__, type(edgecnn.load).__name__)"
    )
    assert run(program) == "function function"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'edgecnn' has no attribute 'compres'"):
        _ = edgecnn.compres
