"""The training loop: fine-tuning, distillation and quantization-aware training differ in the objective only.

    for step in 0 .. T - 1:
        loss = objective(network(batch)) + penalty(graph)
        gradients: averaged over the processes, their norm checked and clipped
        weights <- optimizer, with the learning rate of the step
        average of the weights <- weights

Everything random is drawn from (seed, step), so that a run resumed from a checkpoint goes the way of an
unbroken one, to the bit on the same machine's CPU.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from edgecnn.data.augment import Augmentation
from edgecnn.data.memory import MemoryImages
from edgecnn.errors import PassError
from edgecnn.model import Model
from edgecnn.pipeline import Progress, SilentProgress
from edgecnn.train.checkpoint import Checkpoint
from edgecnn.train.data import BatchMaker, TrainData, check_data, choose_augmentation, hold_out
from edgecnn.train.distributed import Team, join_team, launched
from edgecnn.train.losses import SupervisedLoss, choose_loss
from edgecnn.train.network import TrainingNetwork
from edgecnn.train.objective import Batch, Objective, Penalty
from edgecnn.train.precision import choose_device, choose_precision
from edgecnn.train.run import Run, TrainResult
from edgecnn.train.settings import TrainSettings

__all__ = ["Batch", "Objective", "Penalty", "TrainResult", "train"]


def train(
    model: Model,
    data: TrainData,
    settings: TrainSettings,
    *,
    seed: int,
    objective: Objective | None = None,
    penalty: Penalty | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a network.

    Args:
        model: stays as it is.
        data: the images.
        settings: everything else.
        seed: of every random draw.
        objective: what is minimized; by default the loss of the settings against the labels.
        penalty: added to the objective.
        checkpoint: where the state is kept; a state found there is continued.
        progress: told about the steps.

    Returns:
        The trained network, its curves and warnings.

    Raises:
        PassError: if a setting is out of range, the loss is not finite (`DivergedError`), memory runs out
            (it says which batch size fits), or the checkpoint belongs to another run.
        DataError: if the images cannot train this network.

    Example:
        >>> from edgecnn.data import open_dataset
        >>> from edgecnn.load import load_model
        >>> model = load_model("examples/lenet5_digits.pt2")
        >>> digits = open_dataset("digits:train", model.spec.preprocess)
        >>> settings = TrainSettings(max_steps=2, augment=())
        >>> train(model, TrainData(digits, tuple(range(256))), settings, seed=0).curves.steps
        (1, 2)
    """
    settings.check()
    supervised = SupervisedLoss(choose_loss(settings.loss, model.spec), settings.label_smoothing)
    chosen: Objective = supervised if objective is None else objective
    check_data(data, model.spec, needs_labels=objective is None)
    settings = replace(settings, augment=choose_augmentation(settings, data, model.spec))
    data = hold_out(data, settings.validation_fraction, seed)
    settings, warnings = _fit_batch(settings, data, model)
    team = join_team(settings.batch_size)
    device = choose_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = choose_precision(settings.precision, device, model)
    network = TrainingNetwork(model, chosen.taps, device, dtype)
    batches = _batch_maker(model, data, settings, seed, device, team)
    shown = progress if progress is not None and team.leads else SilentProgress()
    run = Run(network, batches, settings, chosen, penalty, team, shown)
    run.warnings.extend(warnings)
    return run.execute(checkpoint)


def _fit_batch(settings: TrainSettings, data: TrainData, model: Model) -> tuple[TrainSettings, list[str]]:
    """Return settings whose batch the network and the images can fill.

    Raises:
        PassError: if there are none, or nothing to stop early by.
    """
    if settings.patience is not None and not data.validation:
        raise PassError(
            f"patience is {settings.patience}, but there are no validation images to stop by",
            hint="set validation_fraction = 0.1",
        )
    size, warnings = settings.batch_size, []
    if model.fixed_batch is not None and size != model.fixed_batch:
        size = model.fixed_batch
        warnings.append(f"batch_size is {size}, the only one that the exported graph takes")
        if 0 < len(data.validation) < size:
            raise PassError(
                f"{data.dataset.name}: found {len(data.validation)} validation images, expected at least "
                f"{size}, the only batch size that the exported graph takes",
                hint="export the network with a dynamic batch",
            )
    if size > len(data.indices):
        if model.fixed_batch is not None:
            raise PassError(
                f"{data.dataset.name}: found {len(data.indices)} training images, expected at least "
                f"{size}, the only batch size that the exported graph takes",
                hint="export the network with a dynamic batch",
            )
        world = launched().world
        size = max(len(data.indices) // world, 1) * world
        share = "all" if size == len(data.indices) else size
        warnings.append(
            f"{data.dataset.name}: {len(data.indices)} training images, fewer than the batch_size of "
            f"{settings.batch_size}; each step trains on {share} of them"
        )
    return replace(settings, batch_size=size), warnings


def _batch_maker(
    model: Model, data: TrainData, settings: TrainSettings, seed: int, device: torch.device, team: Team
) -> BatchMaker:
    """Return what makes the batches, from images kept in memory."""
    spec = model.spec
    augmentation = Augmentation(settings.augment, spec.preprocess, settings.mixup, settings.cutmix)
    augmentation.check()
    if not isinstance(data.dataset, MemoryImages):
        data = replace(data, dataset=MemoryImages(data.dataset, spec.preprocess))
    return BatchMaker(
        data=data,
        augmentation=augmentation,
        seed=seed,
        batch_size=settings.batch_size,
        num_classes=int(spec.outputs[0].shape[1] or 1) if len(spec.outputs[0].shape) > 1 else 1,
        device=device,
        rank=team.rank,
        world=team.world,
        whole=model.fixed_batch is not None,
    )
