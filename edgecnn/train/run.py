"""One training run: its steps, and what happens between them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from edgecnn.errors import OutputError
from edgecnn.graph.modes import reestimate_batch_norm
from edgecnn.load.pt2 import save_pt2
from edgecnn.model import Model
from edgecnn.pipeline import Progress
from edgecnn.train.checkpoint import Checkpoint
from edgecnn.train.curves import TrainCurves
from edgecnn.train.data import BatchMaker
from edgecnn.train.distributed import Team
from edgecnn.train.failures import (
    DivergedError,
    divergence_hint,
    fitting_batch_size,
    is_out_of_memory,
    out_of_memory_error,
)
from edgecnn.train.interrupt import Interruption, held_back
from edgecnn.train.network import TrainingNetwork, model_with
from edgecnn.train.objective import Batch, Objective, Penalty
from edgecnn.train.optimize import ema_decay, learning_rate, update_average
from edgecnn.train.seeds import stream, torch_seed
from edgecnn.train.settings import TrainSettings
from edgecnn.train.state import LastGood, RunState
from edgecnn.train.validate import Validation, validate


@dataclass(frozen=True)
class TrainResult:
    """What training made.

    Attributes:
        model: the trained network.
        curves: how it went.
        warnings: what the user should know.
    """

    model: Model
    curves: TrainCurves
    warnings: tuple[str, ...] = ()


class Run:
    """A training run.

    Args:
        network: what is trained.
        batches: what it is trained on.
        settings: checked, with a batch size that fits.
        objective: what is minimized.
        penalty: added to it.
        team: the processes that train together.
        progress: told about the steps.
    """

    def __init__(
        self,
        network: TrainingNetwork,
        batches: BatchMaker,
        settings: TrainSettings,
        objective: Objective,
        penalty: Penalty | None,
        team: Team,
        progress: Progress,
    ) -> None:
        self.network = network
        self.batches = batches
        self.settings = settings
        self.objective = objective
        self.penalty = penalty
        self.team = team
        self.progress = progress
        self.warnings: list[str] = []
        num_images = len(batches.data.indices)
        self.total = settings.steps(num_images)
        self.per_epoch = settings.steps_per_epoch(num_images)
        self.warmup = min(round(settings.warmup_epochs * self.per_epoch), self.total - 1)
        self.state = RunState(network, objective, settings, self.total)
        self.last_good = LastGood(network.copies(), self.total)
        self._first_step = 0
        self._started = time.perf_counter()
        spec = network.model.spec
        self._is_classifier = spec.task in ("classification", "segmentation") and batches.data.labelled

    def execute(self, checkpoint: Checkpoint | None) -> TrainResult:
        """Train to the end, or go on from a checkpoint.

        Raises:
            PassError: see `edgecnn.train.loop.train`.
            KeyboardInterrupt: on Ctrl-C, after the state was saved.
        """
        devices = [self.network.device] if self.network.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            self.team.require_same("a network, settings or data", self.state.digest(self.batches))
            if checkpoint is not None:
                self.state.restore(checkpoint, self.batches, self.team)
            self._first_step = self.state.step
            if self.state.result is None:
                with held_back() as interruption:
                    self._train(checkpoint, interruption)
                    self.state.result = self._finish()
                    self._save(checkpoint)
                interruption.take_effect()
        model = model_with(self.network.model, self.state.result)
        seconds = time.perf_counter() - self._started
        trained_on = (self.state.step - self._first_step) * self.settings.batch_size
        curves = self.state.curves.curves(seconds if trained_on else 0.0, trained_on)
        return TrainResult(model, curves, (*self.warnings, *self.state.warnings))

    def _train(self, checkpoint: Checkpoint | None, interruption: Interruption) -> None:
        """Take every step that is left."""
        state = self.state
        self.team.copy_first([*state.trained.values(), *self.network.statistics()])
        self.last_good = LastGood(self._weights(copies=True), self.total, state.step)
        self._announce()
        self._started = time.perf_counter()
        if state.step == 0:
            self._validate()
        with contextlib.closing(self.batches.steps(state.step, self.total)) as batches:
            while state.step < self.total and not state.stopped:
                self._guarded_step(batches, checkpoint)
                self.progress.advance()
                if state.step % self.per_epoch == 0 or state.step == self.total:
                    self._validate()
                if self.team.any(interruption.number is not None, self.network.device):
                    self._save(checkpoint)
                    interruption.take_effect()
                if checkpoint is not None and checkpoint.is_due:
                    self._save(checkpoint)
        self.progress.finish()

    def _announce(self) -> None:
        s, left = self.settings, self.total - self.state.step
        precision = str(self.network.dtype).removeprefix("torch.")
        where = (
            f"from step {self.state.step}" if self.state.step else f"{self.total / self.per_epoch:.3g} epochs"
        )
        processes = f", {self.team.world} processes" if self.team.world > 1 else ""
        title = f"train {where}, batch {s.batch_size}, {precision} on {self.network.device}{processes}"
        self.progress.start(title, left)

    def _guarded_step(self, batches: Iterator[Batch], checkpoint: Checkpoint | None = None) -> None:
        """Take one step; explain a lack of memory, keep the last good state where the loss is NaN."""
        try:
            self._step(next(batches))
        except DivergedError as error:
            self._keep_last_good(error, checkpoint)
            raise
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return
        # Outside the handler, so that the frames of the failed step no longer hold its memory.
        share = self.settings.batch_size // self.team.world
        fits = None if self.network.model.fixed_batch else fitting_batch_size(share, self._probe)
        raise out_of_memory_error(
            self.settings.batch_size, fits and fits * self.team.world, self.state.step + 1
        )

    def _probe(self, size: int) -> None:
        """Run forward and backward with a batch of `size`."""
        self.state.optimizer.zero_grad(set_to_none=True)
        batch = self.batches.plain(self.batches.indices(self.state.step)[:size])
        self._loss(batch).backward()  # type: ignore[no-untyped-call]

    def _loss(self, batch: Batch) -> Tensor:
        outputs, tapped = self.network(batch.inputs)
        loss = self.objective(outputs, batch, tapped)
        return loss if self.penalty is None else loss + self.penalty(self.network.graph)

    def _step(self, batch: Batch) -> None:
        """Take one step: loss, gradients, checks, weights, average."""
        s, state = self.settings, self.state
        rate = learning_rate(s, state.step, self.total, self.warmup)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(torch_seed(self.batches.seed, "dropout", state.step, self.team.rank))
        state.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(batch)
        state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        trained = [p for p in state.trained.values() if p.grad is not None]
        gradients = [p.grad for p in trained if p.grad is not None]
        self.team.average([*gradients, *self.network.statistics()])
        state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.get_total_norm(gradients, error_if_nonfinite=False)
        value = float(loss.detach())
        finite = math.isfinite(value) and (state.scaler.is_enabled() or math.isfinite(float(norm)))
        if self.team.any(not finite, self.network.device):
            self._diverged(value, rate)
        if s.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, s.clip_norm, norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.average is not None and s.ema_decay is not None:
            update_average(state.average, self.network.tensors(), ema_decay(s.ema_decay, state.step))
        state.step += 1
        state.curves.step(state.step, value, rate)
        self.last_good.note(state.step, value, lambda: self._weights(copies=True))

    def _weights(self, copies: bool = False) -> dict[str, Tensor]:
        """Return the weights that count: the average where there is one."""
        found = self.network.tensors() if self.state.average is None else self.state.average
        return {name: tensor.clone() for name, tensor in found.items()} if copies else found

    def _diverged(self, loss: float, rate: float) -> None:
        """Stop at a loss or gradient that is not finite, with the last good state."""
        step = self.state.step + 1
        what = (
            f"the loss is {loss}"
            if not math.isfinite(loss)
            else f"the loss is {loss:.4g}, its gradient not finite"
        )
        model = model_with(self.network.model, self.last_good.tensors)
        raise DivergedError(
            f"{what} at step {step} of {self.total} (epoch {step / self.per_epoch:.2f}, "
            f"learning rate {rate:.3g})",
            hint=divergence_hint(self.settings),
            step=step,
            good_step=self.last_good.step,
            model=model,
        )

    def _keep_last_good(self, error: DivergedError, checkpoint: Checkpoint | None) -> None:
        """Write the last good state beside the checkpoint, and say so."""
        if checkpoint is None or not self.team.leads:
            return
        path = checkpoint.path.with_suffix(".last_good.pt2")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_pt2(error.model, path)
        except (OSError, OutputError):  # what went wrong with the training matters more
            return
        error.message += f"; the network as it was after step {error.good_step} is in {path}"
        error.args = (error.message,)

    def _validate(self) -> None:
        """Judge the weights that count, and keep them if they are the best so far."""
        data, state = self.batches.data, self.state
        if not data.validation:
            return
        with self._weights_that_count():
            found = validate(
                self.network, self.objective, self.batches.plain_batches(data.validation), self._is_classifier
            )
        state.curves.validation(state.step / self.per_epoch, found.loss, found.accuracy)
        if self.settings.patience is None:
            return
        if found.is_better_than(state.best[0] if state.best else None):
            state.best, state.stale = (found, self._weights(copies=True)), 0
        else:
            state.stale += 1
        state.stopped = self.team.any(state.stale >= self.settings.patience, self.network.device)

    @contextlib.contextmanager
    def _weights_that_count(self) -> Iterator[None]:
        """Put the average into the network for a while."""
        if self.state.average is None:
            yield
            return
        trained = self.network.copies()
        self.network.load(self.state.average)
        try:
            yield
        finally:
            self.network.load(trained)

    def _finish(self) -> dict[str, Tensor]:
        """Return the tensors of the result: best, average or last, with fresh statistics where asked for."""
        s, state = self.settings, self.state
        if state.stopped and state.best:
            state.warnings.append(
                f"training stopped at step {state.step} of {self.total}: "
                f"{s.patience} validations without a gain"
            )
        self.network.load(state.best[1] if state.best else self._weights())
        if s.batch_norm_batches and reestimate_batch_norm(self.network.graph, self._statistics_batches()):
            data = self.batches.data
            if data.validation:
                found: Validation = validate(
                    self.network,
                    self.objective,
                    self.batches.plain_batches(data.validation),
                    self._is_classifier,
                )
                state.curves.validation(state.step / self.per_epoch, found.loss, found.accuracy)
        return {name: tensor.cpu() for name, tensor in self.network.copies().items()}

    def _statistics_batches(self) -> Iterator[Tensor]:
        """Yield inputs to re-estimate the BatchNorm statistics with, as they are outside training."""
        data = self.batches.data
        order = stream(self.batches.seed, "statistics", 0).permutation(len(data.indices))
        chosen = [
            data.indices[i] for i in order[: self.settings.batch_norm_batches * self.settings.batch_size]
        ]
        for batch in self.batches.plain_batches(chosen):
            if len(batch.inputs) > 1:
                yield batch.inputs

    def _save(self, checkpoint: Checkpoint | None) -> None:
        """Save the state; a disk that is full costs a warning, not the run."""
        if checkpoint is None or not self.team.leads:
            return
        seconds = time.perf_counter() - self._started
        try:
            self.state.save(checkpoint, self.batches, seconds)
        except OutputError as error:
            message = f"a checkpoint was not written ({error.message}); the one before it was kept"
            if message not in self.warnings:
                self.warnings.append(message)
