"""A run that was killed, or stopped with Ctrl-C, and resumed ends with the bits of an unbroken one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from running import ROOT
from torch import Tensor
from training import SETTINGS, make_model, train_data

from edgecnn.errors import OutputError, PassError
from edgecnn.train.checkpoint import Checkpoint, Checkpoints
from edgecnn.train.loop import TrainResult, train
from edgecnn.train.settings import TrainSettings

SCRIPT = ROOT / "tests" / "training.py"
KILLS = 10


def weights(result: TrainResult) -> dict[str, Tensor]:
    return dict(result.model.graph.state_dict())


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Broken(Exception):
    """Ends a run in a test."""


class BreakingCheckpoint(Checkpoint):
    """Saves after every step, and breaks the run off after some of them."""

    left = -1

    def save(self, state: dict[str, Any]) -> None:
        super().save(state)
        self.left -= 1
        if self.left == 0:
            raise Broken


def go_on(checkpoint: Checkpoint, settings: TrainSettings = SETTINGS) -> TrainResult:
    return train(make_model(), train_data(), settings, seed=3, checkpoint=checkpoint)


@pytest.mark.parametrize("after", [1, 7, 30])
@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        replace(SETTINGS, optimizer="adamw", learning_rate=0.01, ema_decay=None, precision="bfloat16"),
    ],
    ids=["sgd", "adamw"],
)
def test_resumed_in_the_same_process(tmp_path: Path, after: int, settings: TrainSettings) -> None:
    unbroken = train(make_model(), train_data(), settings, seed=3)
    checkpoint = BreakingCheckpoint(tmp_path / "a", interval_seconds=0.0)
    checkpoint.left = after
    with pytest.raises(Broken):
        go_on(checkpoint, settings)
    torch.manual_seed(99)
    resumed = go_on(Checkpoint(tmp_path / "a"), settings)
    assert same(weights(unbroken), weights(resumed))
    assert resumed.curves.loss == unbroken.curves.loss
    assert resumed.curves.validation_accuracy == unbroken.curves.validation_accuracy
    assert resumed.warnings == unbroken.warnings


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    first = training.run(tmp_path)
    again = training.run(tmp_path)
    assert same(weights(first), weights(again))
    assert again.curves.loss == first.curves.loss
    assert again.curves.images_per_second is None, "nothing was done"


def test_other_settings_do_not_go_on_with_it(tmp_path: Path) -> None:
    training.run(tmp_path, settings=replace(SETTINGS, epochs=1))
    with pytest.raises(PassError, match=r"another training run: epochs was 1, is 2.*use the same settings"):
        training.run(tmp_path, settings=replace(SETTINGS, epochs=2))


def test_a_disk_that_fills_up_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = train(make_model(), train_data(), SETTINGS, seed=3)
    original, count = Checkpoint.save, iter(range(1000))

    def full(self: Checkpoint, state: dict[str, Any]) -> None:
        if next(count) > 4:
            raise OutputError("cannot write a: No space left on device")
        original(self, state)

    monkeypatch.setattr(Checkpoint, "save", full)
    result = training.run(tmp_path)
    assert same(weights(unbroken), weights(result))
    assert [w for w in result.warnings if "No space left" in w] == [
        "a checkpoint was not written (cannot write a: No space left on device); the one before it was kept"
    ]
    monkeypatch.undo()
    kept = Checkpoints(tmp_path, {"test": "1"}).stage("train").load()
    assert kept is not None
    assert kept["step"] == 5
    assert same(weights(training.run(tmp_path, seconds=60)), weights(unbroken))


def start(folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder)], env=environment, stderr=subprocess.PIPE
    )


def stage_file(folder: Path) -> Path:
    return folder / "train.checkpoint"


def wait_for(condition: Any, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "nothing happened for two minutes"
        time.sleep(0.002)


def steps_done(folder: Path) -> int:
    state = Checkpoints(folder, {"test": "1"}).stage("train").load()
    return 0 if state is None else int(state["step"])


@pytest.mark.slow
def test_killed_ten_times_at_random_moments(tmp_path: Path) -> None:
    """kill -9 while training, saving or validating; the checkpoint is always whole, and the end the same."""
    unbroken = train(make_model(), train_data(), SETTINGS, seed=3)
    draw = random.Random(0)
    killed_at = []
    for _ in range(KILLS):
        before = stage_file(tmp_path).stat().st_mtime_ns if stage_file(tmp_path).exists() else 0
        process = start(tmp_path)
        wait_for(
            lambda b=before: stage_file(tmp_path).exists() and stage_file(tmp_path).stat().st_mtime_ns > b,
            process,
        )
        time.sleep(draw.uniform(0.0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stderr.close()  # type: ignore[union-attr]
        killed_at.append(steps_done(tmp_path))
    assert killed_at == sorted(killed_at)
    assert len(set(killed_at)) > 4, "it got further each time"
    process = start(tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert same(weights(unbroken), found)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are another matter there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_stops(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path)
    wait_for(stage_file(tmp_path).exists, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    if number is signal.SIGINT:
        assert b"KeyboardInterrupt" in errors
    done = steps_done(tmp_path)
    assert 0 < done <= 30
    process = start(tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    unbroken = train(make_model(), train_data(), SETTINGS, seed=3)
    assert same(weights(unbroken), torch.load(tmp_path / "weights.pt", weights_only=True))


def test_ctrl_c_waits_for_the_step_and_acts_after_it(tmp_path: Path) -> None:
    """Raised in the middle of step 4, it takes effect after that step, which is in the checkpoint."""
    calls = iter(range(1000))

    def interrupt(graph: torch.fx.GraphModule) -> Tensor:
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return torch.zeros(())

    before = signal.getsignal(signal.SIGINT)
    checkpoint = Checkpoint(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), train_data(), SETTINGS, seed=3, penalty=interrupt, checkpoint=checkpoint)
    assert signal.getsignal(signal.SIGINT) is before
    assert (checkpoint.load() or {})["step"] == 4
    calls = iter(range(4, 1000))
    resumed = train(make_model(), train_data(), SETTINGS, seed=3, penalty=interrupt, checkpoint=checkpoint)
    unbroken = train(make_model(), train_data(), SETTINGS, seed=3)
    assert same(weights(unbroken), weights(resumed))
