"""Images for calibration when there are no data: made up to please the network.

Images x, starting from noise, are moved by Adam until the network takes them for what it was trained on:

    loss(x) = objective(x) + 0.1 * ((mean(x) - 0.45)^2 + (std(x) - 0.25)^2) + 0.02 * TV(x)

with the objective of edgecnn.data.objectives (BatchNorm statistics; where there are none, classes), mean and
std over (n, h, w), x in 0..1 before the Preprocess, per colour. 0.45 and 0.25 are what the usual
normalisation takes to mean 0 and variance 1; TV, the mean absolute difference of neighbouring pixels, keeps
the images smooth. x stays within 0..1 and ends as 8-bit pixels, so the network gets nothing that a camera
could not give.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from edgecnn.data.arrays import ArrayDataset
from edgecnn.data.geometry import Pixels
from edgecnn.data.noise import PRIOR_MEAN, PRIOR_STD, check_num_images, natural_noise, noise_images
from edgecnn.data.objectives import (
    MAX_BATCH,
    MAX_STEPS,
    BatchNormStatistics,
    ClassConfidence,
    Loss,
    Objective,
    has_batch_norm,
    has_classes,
)
from edgecnn.model import Model
from edgecnn.runner.preprocess import Preprocess

GOOD_STEPS, MIN_STEPS = 35, 20
MIN_IMAGES = 4
WORK_BUDGET = 1.2e12
"""Work of all forward passes, 1 per multiply-accumulate and 200 per activation: about 40 s on one core."""
MAX_SECONDS = 120.0

_LEARNING_RATE = 0.05
_TOLERATED_RISE, _BACK_OFF = 1.1, 0.3
_PRIOR_WEIGHT, _SMOOTHNESS_WEIGHT = 0.1, 0.02

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


def _to_input(x: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """Take colours (n, c, h, w) in 0..1 and the network's channel order to the network's input."""
    shape = (1, -1, 1, 1)
    mean, std = (torch.tensor(values).reshape(shape) for values in (preprocess.mean, preprocess.std))
    return (x * (255.0 * preprocess.scale) - mean) / std


def _image_loss(x: torch.Tensor) -> torch.Tensor:
    """Return the prior on colours and smoothness of x (n, c, h, w) in 0..1."""
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    prior = ((mean - PRIOR_MEAN).square() + ((var + 1e-8).sqrt() - PRIOR_STD).square()).mean()
    differences = [x.diff(dim=dim).abs().mean() for dim in (2, 3) if x.shape[dim] > 1]
    smoothness = torch.stack(differences).sum() if differences else x.new_zeros(())
    return _PRIOR_WEIGHT * prior + _SMOOTHNESS_WEIGHT * smoothness


def batch_norm_loss(model: Model, inputs: np.ndarray[Any, Any]) -> float:
    """Return how far the statistics of inputs are from those that BatchNorm remembers, mean over layers.

    Args:
        model: a network with BatchNorm.
        inputs: float32 (n, c, h, w).

    Returns:
        0 for images like the training data; 1 is a distance as large as the layer's own spread.

    Raises:
        DataError: if the network has no BatchNorm.
    """
    with torch.no_grad():
        return float(BatchNormStatistics(model).losses(torch.from_numpy(inputs)).mean())


def plan_work(work_per_image: float, num_images: int, max_steps: int = MAX_STEPS) -> tuple[int, int]:
    """Choose how many images to distil, and in how many steps, the same on every machine.

    Few good images calibrate better than many unfinished ones, so images are given up before steps.

    Args:
        work_per_image: of one forward pass of one image, in the unit of WORK_BUDGET.
        num_images: asked for.
        max_steps: after which the objective is as good as reached.

    Returns:
        (images, steps).

    Example:
        >>> plan_work(1e8, 32), plan_work(4e9, 32)
        ((32, 50), (8, 37))
    """
    affordable = int(WORK_BUDGET / (work_per_image * min(GOOD_STEPS, max_steps)))
    num_images = min(num_images, max(affordable, MIN_IMAGES))
    steps = int(WORK_BUDGET / (work_per_image * num_images))
    return num_images, min(max(steps, MIN_STEPS), max_steps)


def _distill_batch(
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    start: torch.Tensor,
    steps: int,
    report: Callable[[int], bool],
) -> torch.Tensor:
    """Return the best images (n, c, h, w) in 0..1 of `steps` of Adam, or of fewer where report says stop.

    The step size falls as a cosine. A step that makes the loss clearly worse is taken back, and the
    steps after it are shorter: networks with small or no training have very steep losses.
    """
    x = start.clone().requires_grad_(True)
    best, best_loss = start.clone(), float("inf")
    base = _LEARNING_RATE
    optimizer = torch.optim.Adam([x], lr=base)
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(x)
        if float(loss.detach()) < best_loss:
            best, best_loss = x.detach().clone(), float(loss.detach())
        stop = report(step + 1)
        if stop or step == steps - 1:
            break
        if not float(loss.detach()) <= _TOLERATED_RISE * best_loss:
            with torch.no_grad():
                x.copy_(best)
            base *= _BACK_OFF
            optimizer = torch.optim.Adam([x], lr=base)
            continue
        for group in optimizer.param_groups:
            group["lr"] = base * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            x.clamp_(0.0, 1.0)
    return best


def distill_images(
    model: Model, num_images: int, seed: int, progress: Progress | None = None
) -> ArrayDataset:
    """Make unlabelled images whose BatchNorm statistics match the training data's.

    A classifier without BatchNorm gets images that it is sure of, of classes drawn at random; any other
    network without BatchNorm gets `noise_images`. The number of steps follows from the network's size, so
    the same seed gives the same images; only a machine so slow that two minutes pass stops earlier, with a
    warning.

    Args:
        model: the network.
        num_images: how many, at least 1; a large network gets fewer, so that the work stays bounded.
        seed: of the noise to start from and of the classes.
        progress: told about the steps.

    Returns:
        Images without labels, with warnings.

    Raises:
        DataError: if num_images is not positive.
    """
    preprocess = model.spec.preprocess
    check_num_images(num_images)
    objective: BatchNormStatistics | ClassConfidence
    if has_batch_norm(model):
        objective = BatchNormStatistics(model)
    elif has_classes(model):
        objective = ClassConfidence(model, num_images, seed)
    else:
        return noise_images(preprocess, num_images, seed)
    probe = model.fixed_batch or 1
    with torch.no_grad():
        work = objective.work(torch.zeros(probe, preprocess.num_channels, *preprocess.size))
    asked = num_images
    num_images, steps = plan_work(work / probe, num_images, objective.max_steps)
    deadline = time.monotonic() + MAX_SECONDS
    images = _distill_all(model, objective, (num_images, steps, seed), deadline, progress)
    messages = _warnings(objective, num_images, asked, time.monotonic() > deadline)
    return ArrayDataset("distilled images", _to_pixels(images, preprocess), preprocess, warnings=messages)


def _distill_all(
    model: Model, objective: Objective, plan: tuple[int, int, int], deadline: float, progress: Progress | None
) -> torch.Tensor:
    """Return images (n, c, h, w) in 0..1, made batch by batch, for a plan of (images, steps, seed)."""
    num_images, steps, seed = plan
    preprocess = model.spec.preprocess
    batch = model.fixed_batch or min(num_images, MAX_BATCH)
    num_batches = -(-num_images // batch)
    whole = max(model.fixed_batch or 1, min(objective.min_batch, batch))
    num_made = -(-num_images // whole) * whole
    noise = _to_tensor(natural_noise(preprocess, num_made, seed), preprocess)
    done = []
    for index in range(num_batches):
        images = slice(index * batch, min((index + 1) * batch, num_made))

        def report(step: int, first: int = index * steps) -> bool:
            if progress is not None:
                progress(first + step, num_batches * steps)
            return time.monotonic() > deadline

        distance = objective.loss_of(images)

        def loss(x: torch.Tensor, distance: Loss = distance) -> torch.Tensor:
            return distance(_to_input(x, preprocess)) + _image_loss(x)

        with torch.enable_grad():
            done.append(_distill_batch(loss, noise[images], steps, report))
    return torch.cat(done)[:num_images]


def _warnings(
    objective: BatchNormStatistics | ClassConfidence, num_images: int, asked: int, stopped: bool
) -> tuple[str, ...]:
    by_classes = isinstance(objective, ClassConfidence)
    made = (
        "made up to look like the network's classes to it, as it has no BatchNorm to learn from; accuracy is "
        "unmeasured and may be some points lower (SqueezeNet 1.1: 62 % instead of 65 %)"
        if by_classes
        else "distilled from the network's BatchNorm statistics, so accuracy is unmeasured"
    )
    unmeasured = (
        f"no data given: calibrated and judged on {num_images} images {made}; give --data with about 100 "
        "labelled images to measure it"
    )
    messages = [unmeasured]
    if num_images < asked:
        messages.append(
            f"{num_images} images distilled, fewer than the {asked} asked for: the network is large and the "
            "work is bounded"
        )
    if isinstance(objective, BatchNormStatistics) and not objective.is_trained:
        messages.append(
            "all BatchNorm statistics are mean 0, variance 1: the network does not seem to be trained"
        )
    if stopped:
        messages.append(
            f"distilling images was stopped after {MAX_SECONDS:.0f} s; another run may give other images"
        )
    return tuple(messages)


def _to_tensor(pixels: Pixels, preprocess: Preprocess) -> torch.Tensor:
    """Take uint8 (n, h, w, c) to float32 (n, c, h, w) in 0..1 and the network's channel order."""
    ordered = pixels[..., ::-1] if preprocess.channel_order == "bgr" else pixels
    return torch.from_numpy(np.ascontiguousarray(ordered.transpose(0, 3, 1, 2), dtype=np.float32) / 255.0)


def _to_pixels(x: torch.Tensor, preprocess: Preprocess) -> Pixels:
    """Take float32 (n, c, h, w) in 0..1 back to uint8 (n, h, w, c): the inverse of `_to_tensor`."""
    pixels = np.rint(x.numpy() * 255.0).astype(np.uint8).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels[..., ::-1] if preprocess.channel_order == "bgr" else pixels)
