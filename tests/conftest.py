"""What all tests share: one thread, torchvision beside CPU PyTorch, and the data that may be absent."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import importlib
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from edgecnn.compress import CompressResult

# A shell that starts the tests in the background lets them, and all they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"


def _define_torchvision_operators() -> object:
    """Let torchvision's PyPI wheel, built for CUDA, be imported beside CPU PyTorch.

    Its compiled operators do not load there; the two that are registered at import need a schema.
    """
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)
    try:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:  # torchvision fits this PyTorch and has defined them
        return None
    return library


_LIBRARY = _define_torchvision_operators()  # its definitions live as long as the object


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with real data and weights; tests that need it skip where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"needs {DATA}, which is not on this machine")
    return DATA


@pytest.fixture
def latency_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are not timed: int8 counts as twice as fast as float."""
    import running

    judgement = importlib.import_module("edgecnn.judgement")
    monkeypatch.setattr(judgement, "measure_latency", running.latency)


@pytest.fixture(scope="session")
def examples_dir() -> Path:
    """Folder of the shipped examples."""
    return ROOT / "examples"


@pytest.fixture(scope="session")
def lenet_result(tmp_path_factory: pytest.TempPathFactory, examples_dir: Path) -> CompressResult:
    """The example network compressed once: 64 calibration images of digits, seed 0, latency not measured."""
    pytest.importorskip("torch")
    for package in ("onnxruntime", "ai_edge_litert", "sklearn"):
        pytest.importorskip(package)
    import edgecnn

    return edgecnn.compress(
        examples_dir / "lenet5_digits.pt2",
        data="digits",
        out=tmp_path_factory.mktemp("lenet"),
        options=edgecnn.CompressOptions(num_samples=64, measure=False),
    )
