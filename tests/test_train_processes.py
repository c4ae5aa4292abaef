"""Several processes that train one network, started by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training
import training_team
from running import ROOT
from torch import Tensor

from edgecnn.errors import PassError
from edgecnn.graph.nodes import copy_graph
from edgecnn.train import distributed
from edgecnn.train.distributed import Team, join_team, launched
from edgecnn.train.loop import train


def launch(folder: Path, kind: str, processes: int = 2) -> list[dict[str, Tensor]]:
    """Train with torchrun and return the weights of every process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        str(ROOT / "tests" / "training_team.py"), str(folder), kind,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_the_whole_batch(tmp_path: Path) -> None:
    """Without BatchNorm the averaged gradient is that of the whole batch, up to rounding."""
    first, second = launch(tmp_path, "plain")
    alone = train(training.make_model(norm=False), training.train_data(), training_team.SETTINGS, seed=3)
    start = training.make_model(norm=False).graph.state_dict()
    for name, value in alone.model.graph.state_dict().items():
        assert torch.equal(first[name], second[name]), "both end with the same bits"
        moved = float((value - start[name]).abs().max())
        assert moved > 0.01
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-4 * moved)


@pytest.mark.slow
def test_two_processes_agree_with_batch_norm_average_and_augmentation(tmp_path: Path) -> None:
    first, second = launch(tmp_path, "norm")
    assert all(torch.equal(first[name], second[name]) for name in first)
    graph = copy_graph(training.make_model().graph)
    graph.load_state_dict(first)
    data = training.train_data()
    with torch.no_grad():
        scores = graph(torch.from_numpy(data.dataset.inputs(data.validation)))
    labels = torch.from_numpy(data.dataset.labels[list(data.validation)])  # type: ignore[index]
    assert float((scores.argmax(1) == labels).float().mean()) == 1.0
    again = launch(tmp_path, "norm")[0]
    assert all(torch.equal(first[name], again[name]) for name in first), "the finished run is not repeated"


def test_a_batch_that_cannot_be_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(PassError, match=r"batch_size is 16, expected a multiple of the 3 processes.*use 15"):
        join_team(16)


def test_one_process_is_a_team_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    team = join_team(16)
    assert team == Team()
    assert team.leads
    tensor = torch.ones(3)
    team.average([tensor])
    assert tensor.tolist() == [1.0, 1.0, 1.0]
    assert team.any(True, torch.device("cpu"))


RECIPE = """
name = "together"
[[passes]]
pass = "prune_channels"
ratio = 0.3
importance = "l2"
allocation = "uniform"
compensation = "none"
[[passes]]
pass = "distill"
epochs = 2
batch_size = 32
precision = "float32"
augment = []
[[passes]]
pass = "fold_batch_norm"
"""
"""Without augmentation, which each process draws for its own share, and for a network without BatchNorm."""


def compress(arguments: list[str], processes: int, out: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m edgecnn compress` in several processes, or in one."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "edgecnn", "compress"]
    return subprocess.run(
        [*command, *arguments, "-o", str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_the_command_in_two_processes_makes_what_it_makes_in_one(tmp_path: Path, examples_dir: Path) -> None:
    (tmp_path / "together.toml").write_text(RECIPE)
    arguments = [str(examples_dir / "lenet5_digits.pt2"), "--recipe", str(tmp_path / "together.toml")]
    arguments += ["--data", "digits", "--format", "onnx", "--no-search"]
    found = []
    for processes in (1, 2):
        out = tmp_path / f"in{processes}"
        done = compress(arguments, processes, out)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("recipe together") == 1, "the first process alone prints"
        assert not (out / "checkpoints").exists()
        found.append(torch.export.load(out / "model.pt2").state_dict)
    assert ", 2 processes" in done.stderr
    one, two = found
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-3 * float(value.abs().max()))


@pytest.mark.slow
def test_quantization_aware_training_in_two_processes(tmp_path: Path, examples_dir: Path) -> None:
    arguments = [str(examples_dir / "lenet5_digits.pt2"), "--int8", "--qat", "--epochs", "0.5"]
    arguments += ["--data", "digits", "--format", "tflite", "--no-search"]
    done = compress(arguments, 2, tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    assert ", 2 processes" in done.stderr
    assert (tmp_path / "out" / "model.tflite").exists()


@pytest.mark.slow
def test_an_error_in_two_processes_says_whose_it_is(tmp_path: Path, examples_dir: Path) -> None:
    arguments = [str(examples_dir / "lenet5_digits.pt2"), "--prune", "0.5", "--data", "digits"]
    done = compress([*arguments, "--batch-size", "33"], 2, tmp_path / "out")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "batch_size is 33, expected a multiple of" in line]
    assert any(line.startswith("error: ") for line in lines)
    assert all(line.startswith(("error: ", "process 1 of 2: error: ")) for line in lines)
    assert not (tmp_path / "out").exists()


def test_what_a_process_of_several_knows_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert launched() == Team(1, 2)
    assert not launched().leads
    monkeypatch.setattr(distributed, "_released", True)
    assert launched() == Team(), "once the team is left, training is this process's own"
    assert join_team(33) == Team()
