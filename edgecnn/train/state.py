"""What a training run knows: everything that a checkpoint holds, and the last state known to be good."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from edgecnn.errors import PassError
from edgecnn.train.checkpoint import Checkpoint, differences
from edgecnn.train.curves import CurveRecorder
from edgecnn.train.data import BatchMaker
from edgecnn.train.distributed import Team
from edgecnn.train.network import TrainingNetwork
from edgecnn.train.objective import Objective
from edgecnn.train.optimize import make_optimizer
from edgecnn.train.settings import TrainSettings
from edgecnn.train.validate import Validation

_TOLERATED_RISE = 0.5
_NUM_LOOKS = 20


class RunState:
    """Everything that changes while training.

    Attributes:
        step: steps taken.
        trained: parameters of the network, and of the objective under "objective.NAME".
        optimizer: over `trained`.
        scaler: of the loss, at work in float16 only.
        average: of the weights and statistics, or None.
        best: the best validation and its weights, with early stopping.
        stale: validations since then.
        stopped: whether training stopped early.
        curves: losses and accuracies so far.
        warnings: for the user.
        result: tensors of the trained network once it is done.
    """

    def __init__(
        self, network: TrainingNetwork, objective: Objective, settings: TrainSettings, total: int
    ) -> None:
        self._network = network
        self._objective = objective
        self._settings = settings
        self._total = total
        self._extra = objective.modules()
        self.trained = dict(network.parameters)
        if self._extra is not None:
            self._extra.to(network.device).train()
            self.trained |= {f"objective.{name}": p for name, p in self._extra.named_parameters()}
        self.optimizer = make_optimizer(self.trained.items(), settings)
        self.scaler = torch.amp.GradScaler(network.device.type, enabled=network.dtype is torch.float16)
        self.step = 0
        self.average = network.copies() if settings.ema_decay is not None else None
        self.best: tuple[Validation, dict[str, Tensor]] | None = None
        self.stale = 0
        self.stopped = False
        self.curves = CurveRecorder(total)
        self.warnings: list[str] = []
        self.result: dict[str, Tensor] | None = None

    def save(self, checkpoint: Checkpoint, batches: BatchMaker, seconds: float) -> None:
        """Write everything down.

        Raises:
            OutputError: if it cannot be written; the checkpoint before is whole.
        """
        state: dict[str, Any] = {
            "run": self._describe(batches),
            "step": self.step,
            "stale": self.stale,
            "stopped": self.stopped,
            "curves": self.curves.state(seconds),
            "warnings": list(self.warnings),
            "result": self.result,
        }
        if self.result is None:
            state |= {
                "network": self._network.tensors(),
                "objective": None if self._extra is None else self._extra.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "average": self.average,
                "best": None if self.best is None else (*asdict(self.best[0]).values(), self.best[1]),
            }
        checkpoint.save(state)

    def digest(self, batches: BatchMaker) -> str:
        """Return a hash of what this run is; weights are left out, as unlike machines round apart."""
        return _short_hash(json.dumps(self._describe(batches), sort_keys=True))

    def restore(self, checkpoint: Checkpoint, batches: BatchMaker, team: Team) -> None:
        """Take everything back, if there is a checkpoint; the process that leads reads it for all.

        Raises:
            PassError: if it belongs to another run; the message says what differs.
        """
        state = team.share(lambda: self._load(checkpoint, batches))
        if state is None:
            return
        self.step, self.stale, self.stopped = state["step"], state["stale"], state["stopped"]
        self.curves = CurveRecorder(self._total, state["curves"])
        self.warnings = list(state["warnings"])
        self.result = state["result"]
        if self.result is not None:
            return
        self._network.load(state["network"])
        if self._extra is not None:
            self._extra.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        device = self._network.device
        if self.average is not None:
            self.average = {name: tensor.to(device) for name, tensor in state["average"].items()}
        if state["best"] is not None:
            loss, accuracy, tensors = state["best"]
            self.best = Validation(loss, accuracy), {name: t.to(device) for name, t in tensors.items()}

    def _load(self, checkpoint: Checkpoint, batches: BatchMaker) -> dict[str, Any] | None:
        """Return the state saved last, or None."""
        state = checkpoint.load()
        differing = () if state is None else differences(state["run"], self._describe(batches))
        if differing:
            raise PassError(
                f"{checkpoint.path}: the checkpoint belongs to another training run: {'; '.join(differing)}",
                hint="use the same settings, or remove the checkpoint to start anew",
            )
        return state

    def _describe(self, batches: BatchMaker) -> dict[str, str]:
        """Say what this run is, so that another one does not continue it."""
        shapes = {name: list(tensor.shape) for name, tensor in self._network.tensors().items()}
        data = batches.data
        chosen = json.dumps([data.indices, data.validation, data.labelled])
        return {
            **{name: str(value) for name, value in asdict(self._settings).items()},
            "seed": str(batches.seed),
            "objective": type(self._objective).__name__,
            "data": f"{data.dataset.name}, {len(data.indices)} images ({_short_hash(chosen)})",
            "network": f"{len(shapes)} tensors ({_short_hash(json.dumps(shapes, sort_keys=True))})",
            "processes": str(batches.world),
            "precision used": str(self._network.dtype),
        }


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class LastGood:
    """The weights at the last look that the steps behind it have shown to be good: their loss had not risen.

    The loss of a step is that of the weights ahead of it, so a copy waits until the next look to be judged.

    Args:
        tensors: the weights now.
        total: steps of the run; there are about 20 looks.
        step: steps taken.
    """

    def __init__(self, tensors: dict[str, Tensor], total: int, step: int = 0) -> None:
        self.tensors = tensors
        self.step = step
        self._interval = max(total // _NUM_LOOKS, 1)
        self._waiting: tuple[dict[str, Tensor], int] = (tensors, step)
        self._lowest = math.inf
        self._sum, self._count = 0.0, 0

    def note(self, step: int, loss: float, copies: Callable[[], dict[str, Tensor]]) -> None:
        """Take in the loss of a step; now and then judge the copy that waits, and take another."""
        self._sum += loss
        self._count += 1
        if step % self._interval:
            return
        mean = self._sum / self._count
        self._sum, self._count = 0.0, 0
        if self._lowest is math.inf or mean <= self._lowest + _TOLERATED_RISE * abs(self._lowest):
            self.tensors, self.step = self._waiting
        self._waiting = copies(), step
        self._lowest = min(self._lowest, mean)
