"""Tries ways to make the files of one run and measures each: accuracy against float, and speed."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgecnn.data import Dataset
from edgecnn.errors import EdgeCNNError
from edgecnn.export.files import ModelFile
from edgecnn.judgement import Made, float_file, stage_file, time_files
from edgecnn.making import Maker, Plan, Prepared
from edgecnn.pipeline import Need
from edgecnn.proof import Candidate, predict, read_images, temporary_folder
from edgecnn.report.build import speedup_figures
from edgecnn.report.results import SpeedupFigures
from edgecnn.report.sampling import drop_error
from edgecnn.search.cures import to_be_timed


@dataclass(frozen=True)
class Trial:
    """One way that was tried.

    Attributes:
        change: against the plan before it, in words.
        drop_points: float's top-1 minus the file's, in percentage points; None without labels or not asked.
        drop_error: standard error of the drop, in percentage points; None where that is not known.
        num_samples: images that it was judged on.
        agreement: fraction of images with float's first class, None if not asked.
        speedup: over float by format, empty if not asked.
        size_share: of float's size, of the file that is larger in this respect; None if not asked.
        seconds: it took.
        kept: whether what came after builds on it.
        error: why it could not be made, or "".
    """

    change: str
    drop_points: float | None = None
    agreement: float | None = None
    speedup: Mapping[str, SpeedupFigures] = field(default_factory=dict)
    size_share: float | None = None
    seconds: float = 0.0
    kept: bool = False
    error: str = ""
    drop_error: float | None = None
    num_samples: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, JSON-ready, with a ratio per format."""
        ratios = {f"{name}_speedup": figures.ratio for name, figures in self.speedup.items()}
        own = {
            name: getattr(self, name)
            for name in ("change", "drop_points", "drop_error", "agreement", "size_share", "error")
        }
        return {**own, **ratios, "seconds": self.seconds, "kept": self.kept}


class Workbench:
    """Makes plans into files and measures them against float.

    Args:
        maker: of the run.
        prepared: the network after pruning and training.

    Attributes:
        trials: in the order in which they were tried.
    """

    def __init__(self, maker: Maker, prepared: Prepared) -> None:
        self.maker, self.prepared = maker, prepared
        self.trials: list[Trial] = []
        self._floats: dict[str, ModelFile] = {}

    @property
    def images(self) -> tuple[Dataset, Sequence[int]]:
        """The data set and which of its images judge."""
        return self.prepared.images.dataset, self.prepared.images.split.held_out

    @property
    def can_train(self) -> bool:
        """Whether there are images to train on."""
        return self.prepared.context.has(Need.TRAIN_IMAGES)

    @property
    def may_widen(self) -> bool:
        """Whether int16 activations keep to what is asked for: float inputs, and no latency."""
        options = self.maker.options
        return options.io == "float32" and not options.must_be_faster and options.max_latency_ms is None

    def try_accuracy(self, change: str, plan: Plan) -> tuple[Trial, Made | None]:
        """Make a plan's files and count right answers; both files hold the same numbers, so one is run.

        Returns:
            The figures, and what was made; None if it could not be made, which the trial explains.
        """
        started = time.perf_counter()
        made = None
        try:
            made, _ = self.maker.make(self.prepared, plan)
            chosen = next(iter(made.files))
            dataset, held_out = self.images
            per_pixel = self.prepared.loaded.spec.task == "segmentation"
            with self.staged(made, [chosen]) as candidates:
                found = predict(
                    candidates,
                    dataset,
                    held_out,
                    f"float_{chosen}",
                    self.maker.progress,
                    per_pixel=per_pixel,
                )
            right, before = found.top1[chosen], found.top1[f"float_{chosen}"]
            drop = None if right is None or before is None else 100.0 * (before - right)
            changed = found.changed.get(chosen)
            spread = None if drop is None or changed is None else drop_error(*changed, found.num_samples)
            trial = Trial(
                change, drop, found.agreement[chosen], drop_error=spread, num_samples=found.num_samples
            )
        except EdgeCNNError as error:
            trial = Trial(change, error=error.message)
        return self._noted(trial, started), made

    def try_speed(self, change: str, plan: Plan, formats: Sequence[str]) -> tuple[Trial, Made | None]:
        """Make files as fast as a plan's and time those of some formats against float, as the report does."""
        started = time.perf_counter()
        made = None
        try:
            made, _ = self.maker.make(self.prepared, to_be_timed(plan))
            dataset, held_out = self.images
            inputs, _ = read_images(dataset, held_out[:1])
            with self.staged(made, formats) as candidates:
                _, latency = time_files(
                    made, candidates, inputs, self.maker.options.threads, self.maker.progress
                )
            share = max(len(made.files[name].data) / len(self._floats[name].data) for name in formats)
            trial = Trial(change, speedup=speedup_figures(latency), size_share=share)
        except EdgeCNNError as error:
            trial = Trial(change, error=error.message)
        return self._noted(trial, started), made

    def times_slower(self, change: str, plan: Plan) -> float | None:
        """Return the latency of a plan's slowest file as a multiple of float's, at least 1.

        None where this run does not time anything.
        """
        if not self.maker.options.measure:
            return None
        trial, _ = self.try_speed(change, plan, self.maker.options.formats)
        slow = [figures.ratio for figures in trial.speedup.values() if figures.verdict == "slower"]
        return math.inf if trial.error else max((1.0 / ratio for ratio in slow), default=1.0)

    @contextlib.contextmanager
    def staged(self, made: Made, formats: Sequence[str]) -> Iterator[list[Candidate]]:
        """Yield the files of some formats and float's, where the runner can open them."""
        recipe = self.maker.recipe.name
        with temporary_folder() as folder:
            candidates = []
            for name in formats:
                if name not in self._floats:
                    self._floats[name] = float_file(made, name)
                for key, file in ((f"float_{name}", self._floats[name]), (name, made.files[name])):
                    path: Path = stage_file(file, folder / key, made.compressed, recipe)
                    candidates.append(Candidate(key, path))
            yield candidates

    def keep(self, trial: Trial) -> Trial:
        """Note that what follows builds on a trial."""
        index = self.trials.index(trial)
        self.trials[index] = replace(trial, kept=True)
        return self.trials[index]

    def _noted(self, trial: Trial, started: float) -> Trial:
        trial = replace(trial, seconds=time.perf_counter() - started)
        self.trials.append(trial)
        return trial
