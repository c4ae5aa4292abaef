"""What was seen while training: losses, learning rates and accuracies over the steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

MAX_POINTS = 500


@dataclass(frozen=True)
class TrainCurves:
    """Curves of one run, JSON-ready.

    Attributes:
        steps: number of steps done at each point of `loss`.
        loss: mean training loss since the point before.
        learning_rate: of the last step of each point.
        epochs: passes over the training images done at each validation; 0 is before training.
        validation_loss: at each of `epochs`.
        validation_accuracy: top-1 at each of `epochs`, a fraction; empty where there are no labels.
        seconds: time spent training, over all attempts.
        images_per_second: trained on, of this attempt; None where it did nothing.
    """

    steps: tuple[int, ...] = ()
    loss: tuple[float, ...] = ()
    learning_rate: tuple[float, ...] = ()
    epochs: tuple[float, ...] = ()
    validation_loss: tuple[float, ...] = ()
    validation_accuracy: tuple[float, ...] = ()
    seconds: float = 0.0
    images_per_second: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }


class CurveRecorder:
    """Collects curves with at most MAX_POINTS points of the training loss.

    Args:
        total: steps of the run.
        state: what `state()` gave in an earlier attempt, or None.
    """

    def __init__(self, total: int, state: dict[str, Any] | None = None) -> None:
        self._stride = max(-(-total // MAX_POINTS), 1)
        self._total = total
        self._state: dict[str, Any] = state or {
            "steps": [],
            "loss": [],
            "learning_rate": [],
            "epochs": [],
            "validation_loss": [],
            "validation_accuracy": [],
            "sum": 0.0,
            "count": 0,
            "seconds": 0.0,
        }

    def step(self, done: int, loss: float, rate: float) -> None:
        """Record that `done` steps are done, the last with this loss and learning rate."""
        state = self._state
        state["sum"] += loss
        state["count"] += 1
        if done % self._stride == 0 or done == self._total:
            state["steps"].append(done)
            state["loss"].append(state["sum"] / state["count"])
            state["learning_rate"].append(rate)
            state["sum"], state["count"] = 0.0, 0

    def validation(self, epoch: float, loss: float, accuracy: float | None) -> None:
        """Record a validation."""
        self._state["epochs"].append(epoch)
        self._state["validation_loss"].append(loss)
        if accuracy is not None:
            self._state["validation_accuracy"].append(accuracy)

    def state(self, seconds: float) -> dict[str, Any]:
        """Return what a checkpoint keeps; `seconds` were spent in this attempt."""
        kept = {key: list(v) if isinstance(v, list) else v for key, v in self._state.items()}
        return {**kept, "seconds": self._state["seconds"] + seconds}

    def curves(self, seconds: float, num_images: int) -> TrainCurves:
        """Return the curves; this attempt trained on `num_images` images in `seconds`."""
        state = self._state
        lists = {key: tuple(value) for key, value in state.items() if isinstance(value, list)}
        speed = num_images / seconds if num_images and seconds > 0 else None
        return TrainCurves(**lists, seconds=state["seconds"] + seconds, images_per_second=speed)
