"""The emulated boards, and the networks that run on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from board import boards
from board.networks import Network, make_network


@pytest.fixture(scope="session", params=list(boards.CPUS))
def board(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Profile of a running 64-bit board: a Raspberry Pi 4's CPU model, then a Raspberry Pi 5's."""
    name = f"test-{request.param}"
    profile = boards.start(name, "arm64", boards.CPUS[request.param])
    yield profile
    boards.stop(name)


@pytest.fixture(scope="session")
def pi4() -> Iterator[Path]:
    """Profile of a running board with a Raspberry Pi 4's CPU model, for what does not depend on it."""
    profile = boards.start("test-faults", "arm64", boards.CPUS["pi4"])
    yield profile
    boards.stop("test-faults")


@pytest.fixture(scope="session")
def pi32() -> Iterator[Path]:
    """Profile of a running 32-bit board with tflite-runtime and Debian's numpy, and no onnxruntime."""
    profile = boards.start("test-32bit", "armhf", "cortex-a15")
    yield profile
    boards.stop("test-32bit")


@pytest.fixture(scope="session", params=["lenet5", "resnet20"])
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Network:
    """LeNet-5 on digits, and ResNet-20 on CIFAR-10 where its weights are."""
    name = request.param
    if name == "resnet20":
        request.getfixturevalue("data_dir")
    return make_network(name, tmp_path_factory)


@pytest.fixture(scope="session")
def lenet5(tmp_path_factory: pytest.TempPathFactory) -> Network:
    return make_network("lenet5", tmp_path_factory)


@pytest.fixture(scope="session")
def resnet20(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Network:
    return make_network("resnet20", tmp_path_factory)
