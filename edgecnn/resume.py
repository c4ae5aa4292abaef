"""Unfinished runs: what a run that trains keeps in its output directory, and when it may be gone on with.

OUT/checkpoints/     the state of each stage, with a fingerprint of the run; removed when the run is done
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch

from edgecnn import __version__
from edgecnn.data import Dataset
from edgecnn.errors import OutputError
from edgecnn.images import Images, is_trained
from edgecnn.model import Model
from edgecnn.pipeline import Pass, Stages, parameters
from edgecnn.recipe import Recipe

FOLDER = "checkpoints"


class Resumable:
    """One run's checkpoints.

    Args:
        folder: directory of the results.
        recipe: of the run.
        resume: go on with what an unfinished run left.
        force: throw away what an unfinished run left.
        leads: whether this process keeps the checkpoints; of several that train together only one does.

    Raises:
        OutputError: if there is an unfinished run and neither is set, or nothing to resume.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, *, resume: bool, force: bool, leads: bool = True
    ) -> None:
        self._leads = leads
        self._folder = folder / FOLDER
        self._recipe = recipe
        self._resume = resume
        self._is_trained = any(is_trained(step) for step in recipe.passes)
        self._open = False
        self._is_new = not folder.exists()
        if not leads:
            return
        found = self._folder.exists()
        if found and not resume and not force:
            raise OutputError(
                f"{folder}: holds the checkpoints of an unfinished run",
                hint="go on with it with --resume, or start over with --force",
            )
        if resume and not self._is_trained:
            raise OutputError(
                f"nothing to resume: the recipe {recipe.name} does not train", hint="leave --resume out"
            )
        if resume and not found:
            raise OutputError(
                f"nothing to resume: {folder} holds no checkpoints",
                hint="leave --resume out, or name the unfinished run's directory with -o",
            )

    def __enter__(self) -> Resumable:
        """Begin; nothing is written yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the checkpoints of a run that is done, or that failed before it had any."""
        if self._open and (kind is None or not self._has_states()):
            shutil.rmtree(self._folder, ignore_errors=True)
            if self._is_new:
                with contextlib.suppress(OSError):
                    self._folder.parent.rmdir()  # succeeds only where no result is in it

    def _has_states(self) -> bool:
        """Return whether there is something to go on with, or a network saved ahead of a NaN loss."""
        return any(True for suffix in (".checkpoint", ".pt2") for _ in self._folder.glob(f"*{suffix}"))

    def open(
        self, model: Model, images: Images, passes: Sequence[Pass], teacher: Model | None
    ) -> Stages | None:
        """Return where the passes keep their state; None if no pass trains.

        Raises:
            OutputError: if the unfinished run differs from this one; the message says in what.
        """
        if not self._is_trained:
            if self._leads:
                shutil.rmtree(self._folder, ignore_errors=True)
            return None
        from edgecnn.train.checkpoint import Checkpoints

        stages = Checkpoints(self._folder, fingerprint(model, images, passes, self._recipe.seed, teacher))
        if not self._leads:
            return stages
        if self._resume:
            differing = stages.differences()
            if differing:
                raise OutputError(
                    f"{self._folder} belongs to another run: {'; '.join(differing)}",
                    hint="resume with the same model, data and flags, or start over with --force",
                )
        elif self._folder.exists():
            shutil.rmtree(self._folder)
        self._open = True
        stages.begin()
        return stages


def fingerprint(
    model: Model, images: Images, passes: Sequence[Pass], seed: int, teacher: Model | None
) -> dict[str, str]:
    """Return what must be the same for one run to go on with another's checkpoints, by name."""
    found = {
        "model": _model_text(model),
        "passes": ", ".join(step.name for step in passes),
        "seed": str(seed),
        "data": _data_text(images.dataset),
        "edgecnn": __version__,
        "torch": str(torch.__version__),
    }
    for index, step in enumerate(passes, 1):
        for name, value in parameters(step).items():
            found[f"pass {index} ({step.name}): {name}"] = str(value)
    if images.train is not None:
        found["train data"] = _data_text(images.train.dataset)
    if teacher is not None:
        found["teacher"] = _model_text(teacher)
    return found


def _model_text(model: Model) -> str:
    """Return a network's name and a hash of its graph and tensors."""
    digest = hashlib.sha256(model.graph.code.encode())
    for name, tensor in sorted(model.graph.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return f"{model.spec.name} {digest.hexdigest()[:16]}"


def _data_text(dataset: Dataset) -> str:
    """Return a data set's name, its size and a hash of its labels."""
    labels = b"" if dataset.labels is None else dataset.labels.tobytes()
    return f"{dataset.name}, {len(dataset)} images, labels {hashlib.sha256(labels).hexdigest()[:16]}"
