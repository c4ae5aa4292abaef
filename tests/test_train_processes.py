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
from edgecnn.train.distributed import Team, join_team
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
