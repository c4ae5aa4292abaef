"""Does the preprocess fit? The BatchNorms remember what they saw in training.

Per channel c of a BatchNorm's input, over images and positions, with mean m_c, variance v_c and running
statistics rm_c, rv_c:

    shift = average over c of |m_c - rm_c| / sqrt(rv_c + eps)
    log_ratio = average over c of log((v_c + eps) / (rv_c + eps))
    spread = average over c of |log((v_c + eps) / (rv_c + eps))|
    misfit = shift + spread / 2

The first BatchNorm tells pixels that were scaled otherwise; the average misfit of the first eight tells
images unlike those of training, and the order of the colours. On ResNet-20 and 64 images of CIFAR-10 that
average is 0.17 to 0.18 for the right images (ResNet-56: 0.22 to 0.24), 0.22 to 0.24 with red and blue swapped
(0.28 to 0.31), 0.46 for one image repeated, 0.78 with another mean and std, 1.1 for noise, 1.3 for single
colours and 1.8 for black images. The usual other preprocesses are tried, to name the probable cause.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import Interpreter, Node

from edgecnn.load.functional import layer_name, op_name
from edgecnn.load.preprocess import NAMES, named_preprocess
from edgecnn.load.suspicion import to_pixels
from edgecnn.model import Model
from edgecnn.runner.preprocess import Preprocess

MAX_SHIFT = 1.0
MAX_LOG_RATIO = math.log(4.0)
MAX_MISFIT = 0.55
"""Average over the first layers, above which the images are unlike those of training."""

_NUM_LAYERS = 8
_WORK_PIXELS = 32 * 224 * 224
_MOST_IMAGES = 64
_FEWEST_FOR_ORDER = 16
_SWAP_GAIN = 0.94
"""The other order of colours is named when its average misfit is below this share of ours."""

_IMPROVEMENT = 0.6
"""Another preprocess is named when its misfit is below this share of ours."""


@dataclass(frozen=True)
class BatchNormFit:
    """How far a BatchNorm's input is from what it saw in training; see the module docstring.

    Attributes:
        layer: the BatchNorm.
        shift: in running standard deviations.
        log_ratio: natural logarithm of the ratio of variances, averaged over the channels.
        spread: average magnitude of that logarithm.
    """

    layer: str
    shift: float
    log_ratio: float
    spread: float = 0.0

    @property
    def misfit(self) -> float:
        """One number for all; smaller is better."""
        return self.shift + max(self.spread, abs(self.log_ratio)) / 2.0


class _Finished(Exception):  # noqa: N818  ends the run of the graph early
    """Enough layers were seen."""


class _UpToBatchNorm(Interpreter):
    def __init__(self, graph: Any, most: int) -> None:
        super().__init__(graph)
        self.most = most
        self.fits: list[BatchNormFit] = []

    def run_node(self, n: Node) -> Any:
        if op_name(n) == "batch_norm":
            args, _ = self.fetch_args_kwargs_from_env(n)
            found = _fit(n, args)
            if found is None and not self.fits:  # never trained
                raise _Finished
            if found is not None:
                self.fits.append(found)
            if len(self.fits) >= self.most:
                raise _Finished
        return super().run_node(n)


def _fit(node: Node, args: Any) -> BatchNormFit | None:
    """Compare a BatchNorm's input with its statistics; None where it has none, or was never trained."""
    x, running_mean, running_var, eps = args[0], args[3], args[4], float(args[7])
    if running_mean is None or running_var is None:
        return None
    if not bool(running_mean.any()) and bool((running_var == 1).all()):
        return None
    axes = [axis for axis in range(x.dim()) if axis != 1]
    mean, var = x.mean(axes), x.var(axes, unbiased=False)
    shift = ((mean - running_mean).abs() / (running_var + eps).sqrt()).mean()
    log = ((var + eps) / (running_var + eps)).log()
    return BatchNormFit(layer_name(node), float(shift), float(log.mean()), float(log.abs().mean()))


def measure_batch_norms(
    model: Model, inputs: npt.NDArray[np.float32], most: int = _NUM_LAYERS
) -> list[BatchNormFit]:
    """Compare the inputs of the first BatchNorms with their running statistics.

    Args:
        model: run as far as is needed.
        inputs: float32 (n, c, h, w), preprocessed; 32 of them are enough.
        most: layers, at most.

    Returns:
        A fit per layer; empty where the first BatchNorm was never trained or there is none.
    """
    run = _UpToBatchNorm(model.graph, most)
    try:
        with torch.no_grad():
            run.run(torch.from_numpy(np.ascontiguousarray(inputs)))
    except _Finished:
        pass
    return run.fits


def average_misfit(model: Model, inputs: npt.NDArray[np.float32]) -> float:
    """Return the misfit averaged over the first trained BatchNorms, NaN without any.

    Args:
        model: as for `measure_batch_norms`.
        inputs: float32 (n, c, h, w), preprocessed.
    """
    fits = measure_batch_norms(model, inputs)
    return sum(fit.misfit for fit in fits) / len(fits) if fits else math.nan


def check_against_batch_norm(model: Model, inputs: npt.NDArray[np.float32]) -> list[str]:
    """Check the preprocess against what the network saw in training.

    Args:
        model: with the preprocess that made `inputs`.
        inputs: float32 (n, c, h, w), real images; the first 32 are used.

    Returns:
        Warnings; empty if all is well or there is no BatchNorm to ask.
    """
    height, width = inputs.shape[2:]
    affordable = int(np.clip(_WORK_PIXELS // (height * width), 8, _MOST_IMAGES))
    count = model.fixed_batch or affordable
    if len(inputs) < (model.fixed_batch or 1):
        return []
    images = np.asarray(inputs[:count], np.float32)
    fits = measure_batch_norms(model, images)
    if not fits:
        return []
    first, ours = fits[0], sum(fit.misfit for fit in fits) / len(fits)
    source = model.spec.preprocess.source
    if first.shift > MAX_SHIFT or abs(first.log_ratio) > MAX_LOG_RATIO:
        cause = _probable_cause(model, images, (ours, first))
        warning = (
            f"the preprocess ({source}) does not fit the network's training: the input of "
            f"{first.layer} is {first.shift:.1f} standard deviations off on average and its variance "
            f"{math.exp(first.log_ratio):.3g} times that of training; {cause}"
        )
        return [warning]
    if ours > MAX_MISFIT:
        cause = _probable_cause(model, images, (ours, first))
        warning = (
            f"the images or the preprocess ({source}) do not fit the network's training: over the first "
            f"{len(fits)} BatchNorms the misfit is {ours:.2f}, expected 0.1 to 0.4; {cause}"
        )
        return [warning]
    return _check_order(model, images, ours)


def _check_order(model: Model, images: npt.NDArray[np.float32], ours: float) -> list[str]:
    """Warn where the colours fit clearly better the other way round."""
    preprocess = model.spec.preprocess
    if images.shape[1] != 3 or len(images) < _FEWEST_FOR_ORDER:
        return []
    pixels = to_pixels(preprocess, images)
    if float(np.abs(pixels[:, 0] - pixels[:, 2]).mean()) < 1.0:  # gray images have no order
        return []
    swapped = average_misfit(model, _redo(preprocess, pixels[:, ::-1]))
    if not swapped < ours * _SWAP_GAIN:
        return []
    order, other = preprocess.channel_order, {"rgb": "bgr", "bgr": "rgb"}[preprocess.channel_order]
    warning = (
        f"the order of the colours seems wrong: read as {order} ({preprocess.source}), the images fit the "
        f"BatchNorms worse (misfit {ours:.2f}) than with red and blue swapped ({swapped:.2f}); expected "
        f"--channel-order {other}, or the files store their colours in the other order"
    )
    return [warning]


def _probable_cause(model: Model, inputs: npt.NDArray[np.float32], found: tuple[float, BatchNormFit]) -> str:
    """Name the preprocess that would fit best, or the direction in which ours is off."""
    preprocess = model.spec.preprocess
    misfit, first = found
    _, channels, height, width = inputs.shape
    pixels = to_pixels(preprocess, inputs)
    best, name = misfit * _IMPROVEMENT, ""
    for candidate in NAMES:
        if candidate == "imagenet" and channels != 3:
            continue
        other = named_preprocess(candidate, (channels, height, width))
        for swapped in (False, True) if channels == 3 else (False,):
            fit = average_misfit(model, _redo(other, pixels[:, ::-1] if swapped else pixels))
            if fit < (best * _SWAP_GAIN if swapped else best):
                order = {"rgb": "bgr", "bgr": "rgb"}.get(preprocess.channel_order, "") if swapped else ""
                best, name = fit, f"--preprocess {candidate}" + (f" --channel-order {order}" if order else "")
    if name:
        return f"{name} would fit better"
    if first.log_ratio > MAX_LOG_RATIO:
        return "the pixels are scaled too large (0..255 where 0..1 is expected?)"
    if first.log_ratio < -MAX_LOG_RATIO:
        return "the pixels are scaled too small (0..1 where 0..255 is expected?), or the images are flat"
    return "check mean, std and the channel order, or the images are unlike those of training"


def _redo(preprocess: Preprocess, pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    mean, std = (np.asarray(v, np.float32).reshape(-1, 1, 1) for v in (preprocess.mean, preprocess.std))
    return np.asarray((pixels * np.float32(preprocess.scale) - mean) / std, np.float32)
