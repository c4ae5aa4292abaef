"""The pipeline: what a Pass is, what it is given, and how a list of passes runs.

    for each pass:  requires(model) -> run(model, context) -> ensures(before, after) -> PassRecord

A pass is a frozen dataclass whose fields are its parameters and nothing else. It never changes the model
it is given. Each pass draws from its own random stream, derived from (seed, index of the pass), so that
adding a pass at the end of a recipe leaves the earlier ones as they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from edgecnn.errors import EdgeCNNError, PassError
from edgecnn.model import Model, PassRecord

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from edgecnn.data import Dataset


class Need(Enum):
    """What a pass cannot run without, besides the model."""

    CALIBRATION = "calibration images"
    TRAIN = "labelled training images"
    TRAIN_IMAGES = "training images"
    EVAL = "labelled evaluation images"
    TEACHER = "a teacher network"


class Progress(Protocol):
    """Where long work says how far it is. Steps do not nest: starting one finishes the one before."""

    def start(self, title: str, total: int | None) -> None:
        """Begin a step of `total` units, or of unknown length."""

    def advance(self, n: int = 1) -> None:
        """Say that `n` more units are done."""

    def finish(self) -> None:
        """End the step."""


class SilentProgress:
    """A Progress that says nothing."""

    def start(self, title: str, total: int | None) -> None:
        """Do nothing."""

    def advance(self, n: int = 1) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class Stages(Protocol):
    """Where a run keeps what it can be resumed from: `edgecnn.train.checkpoint.Checkpoints`."""

    def stage(self, name: str) -> Any:
        """Return the checkpoint of one stage, with `load()` and `save(state)`."""
        ...


@dataclass(frozen=True)
class PassStages:
    """The stages of one pass: their names start with its own, so that no two passes share one."""

    stages: Stages
    prefix: str

    def stage(self, name: str) -> Any:
        """Return the checkpoint of one stage of this pass."""
        return self.stages.stage(f"{self.prefix}_{name}")


@dataclass(frozen=True)
class PassContext:
    """What a pass is given besides the model.

    Attributes:
        calibration: images that stand for the network's real input, or None.
        calibration_indices: which of them may be used; the others stay unseen for the proof.
        seed: of this pass alone, once `run_passes` has derived it.
        progress: where to say how far the work is.
        train: images to train on, with labels or without, or None.
        train_indices: which of them may be trained on.
        validation_indices: which of `train` judge the training as it goes, and are not trained on.
        teacher: the network to learn from, or None.
        checkpoints: where training keeps what it can be resumed from, or None.
        records: a pass appends JSON-ready details for the report: {"pass": name, "kind": ..., ...}.
    """

    calibration: Dataset | None = None
    calibration_indices: tuple[int, ...] = ()
    seed: int = 0
    progress: Progress = field(default_factory=SilentProgress)
    train: Dataset | None = None
    train_indices: tuple[int, ...] = ()
    validation_indices: tuple[int, ...] = ()
    teacher: Model | None = None
    checkpoints: Stages | None = None
    records: list[dict[str, Any]] = field(default_factory=list)

    def has(self, need: Need) -> bool:
        """Return whether this context holds what `need` names."""
        images = self.train is not None and bool(self.train_indices)
        labelled = self.train is not None and self.train.labels is not None
        return {
            Need.CALIBRATION: self.calibration is not None and bool(self.calibration_indices),
            Need.TRAIN: images and labelled,
            Need.TRAIN_IMAGES: images,
            Need.EVAL: labelled and bool(self.validation_indices),
            Need.TEACHER: self.teacher is not None,
        }[need]


class Pass(Protocol):
    """Something that changes a model: a frozen dataclass whose fields are its parameters."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]

    def requires(self, model: Model) -> None:
        """Check that the pass applies to `model`.

        Raises:
            PassError: if it does not; the message says why.
        """

    def run(self, model: Model, context: PassContext) -> Model:
        """Return a changed copy of `model`, which itself stays as it was."""
        ...

    def ensures(self, before: Model, after: Model) -> None:
        """Check what the pass promises about its result.

        Raises:
            PassError: if the promise is broken, which is a bug in the pass.
        """


def pass_seed(seed: int, index: int) -> int:
    """Return the seed of pass number `index` (from 0) of a run seeded with `seed`, in [0, 2**32).

    Example:
        >>> pass_seed(0, 0) == pass_seed(0, 0), pass_seed(0, 0) == pass_seed(0, 1)
        (True, False)
    """
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def parameters(step: Pass) -> dict[str, Any]:
    """Return the parameters of a pass by name, JSON-ready apart from tuples.

    Example:
        >>> @dataclass(frozen=True)
        ... class Prune:
        ...     ratio: float = 0.5
        >>> parameters(Prune())
        {'ratio': 0.5}
    """
    instance: DataclassInstance = step  # type: ignore[assignment]
    return asdict(instance)


def run_passes(
    model: Model,
    passes: Sequence[Pass],
    context: PassContext,
    summarize: Callable[[Model], dict[str, Any]],
    start: int = 0,
    stop: int | None = None,
) -> Model:
    """Run passes in order and record what each did in the model's history.

    Args:
        model: the network, left as it is.
        passes: in order.
        context: what the passes may use; its seed is the run's seed.
        summarize: gives the figures (params, macs ...) recorded before and after each pass.
        start: index of the first pass to run; each draws from the random stream of its place in the list.
        stop: index behind the last, None for all.

    Returns:
        The changed network, with one PassRecord more per pass.

    Raises:
        EdgeCNNError: the error of the pass that failed, saying which pass of how many.
        PassError: if a pass needs what the context lacks, or failed without an error of its own.
    """
    figures = summarize(model) if passes else {}
    for index, step in list(enumerate(passes))[start:stop]:
        where = f"pass {index + 1} of {len(passes)} ({step.name})"
        context.progress.start(where, None)
        stages = context.checkpoints
        own_context = replace(
            context,
            seed=pass_seed(context.seed, index),
            checkpoints=stages and PassStages(stages, f"{index + 1:02}_{step.name}"),
        )
        started = time.perf_counter()
        after = _run_pass(model, step, own_context, where)
        seconds = time.perf_counter() - started
        context.progress.finish()
        figures_after = summarize(after)
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in parameters(step).items()
        }
        record = PassRecord(step.name, values, seconds, figures, figures_after)
        model = replace(after, history=(*after.history, record))
        figures = figures_after
    return model


def _run_pass(model: Model, step: Pass, context: PassContext, where: str) -> Model:
    """Run one pass between its two checks; `where` goes in front of the message of any failure."""
    missing = sorted(need.value for need in step.needs if not context.has(need))
    if missing:
        raise PassError(f"{where}: needs {' and '.join(missing)}, but this run has none")
    try:
        step.requires(model)
        after = step.run(model, context)
        step.ensures(model, after)
    except EdgeCNNError as error:
        # Changed in place, so that the subclass, its attributes and the traceback stay as they are.
        error.message = f"{where}: {error.message}"
        error.args = (error.message,)
        raise
    except Exception as error:
        message = f"{where}: failed with {type(error).__name__}: {error}"
        raise PassError(message, hint="set EDGECNN_DEBUG=1 to see where, and report it as a bug") from error
    return after
