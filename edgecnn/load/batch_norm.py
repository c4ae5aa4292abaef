"""Does the preprocess fit? The first BatchNorm remembers what it saw in training.

Per channel c of its input, over images and positions, with mean m_c, variance v_c and running statistics
rm_c, rv_c:

    shift = average over c of |m_c - rm_c| / sqrt(rv_c + eps)
    log_ratio = average over c of log((v_c + eps) / (rv_c + eps))
    misfit = shift + |log_ratio| / 2

Around 0.1 to 0.4 for images like those of training; above 1 the pixels were scaled otherwise. The usual
other preprocesses and the swapped channel order are tried, to name the probable cause.
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
from edgecnn.model import Model
from edgecnn.runner.preprocess import Preprocess

MAX_SHIFT = 1.0
MAX_LOG_RATIO = math.log(4.0)
_NUM_IMAGES = 32
_IMPROVEMENT = 0.6
"""Another preprocess is named when its misfit is below this share of ours."""


@dataclass(frozen=True)
class BatchNormFit:
    """How far a BatchNorm's input is from what it saw in training; see the module docstring.

    Attributes:
        layer: the BatchNorm.
        shift: in running standard deviations.
        log_ratio: natural logarithm of the ratio of variances.
    """

    layer: str
    shift: float
    log_ratio: float

    @property
    def misfit(self) -> float:
        """One number for both; smaller is better."""
        return self.shift + abs(self.log_ratio) / 2.0


class _Found(Exception):  # noqa: N818  ends the run of the graph early
    def __init__(self, fit: BatchNormFit | None) -> None:
        super().__init__()
        self.fit = fit


class _UpToBatchNorm(Interpreter):
    def run_node(self, n: Node) -> Any:
        if op_name(n) != "batch_norm":
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        x, running_mean, running_var, eps = args[0], args[3], args[4], float(args[7])
        if running_mean is None or running_var is None:
            raise _Found(None)
        if not bool(running_mean.any()) and bool((running_var == 1).all()):  # never trained
            raise _Found(None)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        mean, var = x.mean(axes), x.var(axes, unbiased=False)
        shift = ((mean - running_mean).abs() / (running_var + eps).sqrt()).mean()
        log_ratio = ((var + eps) / (running_var + eps)).log().mean()
        raise _Found(BatchNormFit(layer_name(n), float(shift), float(log_ratio)))


def measure_batch_norm(model: Model, inputs: npt.NDArray[np.float32]) -> BatchNormFit | None:
    """Compare the input of the first BatchNorm with its running statistics.

    Args:
        model: run up to its first BatchNorm.
        inputs: float32 (n, c, h, w), preprocessed; 32 of them are enough.

    Returns:
        The fit, or None where there is no trained BatchNorm.
    """
    try:
        with torch.no_grad():
            _UpToBatchNorm(model.graph).run(torch.from_numpy(np.ascontiguousarray(inputs)))
    except _Found as found:
        return found.fit
    return None


def check_against_batch_norm(model: Model, inputs: npt.NDArray[np.float32]) -> list[str]:
    """Check the preprocess against what the network saw in training.

    Args:
        model: with the preprocess that made `inputs`.
        inputs: float32 (n, c, h, w), real images; the first 32 are used.

    Returns:
        Warnings; empty if all is well or there is no BatchNorm to ask.
    """
    count = model.fixed_batch or _NUM_IMAGES
    if len(inputs) < (model.fixed_batch or 1):
        return []
    images = np.asarray(inputs[:count], np.float32)
    fit = measure_batch_norm(model, images)
    if fit is None or (fit.shift <= MAX_SHIFT and abs(fit.log_ratio) <= MAX_LOG_RATIO):
        return []
    cause = _probable_cause(model, images, fit)
    warning = (
        f"the preprocess ({model.spec.preprocess.source}) does not fit the network's training: the input of "
        f"{fit.layer} is {fit.shift:.1f} standard deviations off on average and its variance "
        f"{math.exp(fit.log_ratio):.3g} times that of training; {cause}"
    )
    return [warning]


def _probable_cause(model: Model, inputs: npt.NDArray[np.float32], fit: BatchNormFit) -> str:
    """Name the preprocess that would fit best, or the direction in which ours is off."""
    ours = model.spec.preprocess
    _, channels, height, width = inputs.shape
    pixels = _undo(ours, inputs)
    best, name = fit.misfit * _IMPROVEMENT, ""
    for candidate in NAMES:
        if candidate == "imagenet" and channels != 3:
            continue
        other = named_preprocess(candidate, (channels, height, width))
        for swapped in (False, True) if channels == 3 else (False,):
            found = measure_batch_norm(model, _redo(other, pixels[:, ::-1] if swapped else pixels))
            if found is not None and found.misfit < best:
                order = {"rgb": "bgr", "bgr": "rgb"}.get(ours.channel_order, "") if swapped else ""
                best, name = (
                    found.misfit,
                    f"--preprocess {candidate}" + (f" --channel-order {order}" if order else ""),
                )
    if name:
        return f"{name} would fit better"
    if fit.log_ratio > MAX_LOG_RATIO:
        return "the pixels are scaled too large (0..255 where 0..1 is expected?)"
    if fit.log_ratio < -MAX_LOG_RATIO:
        return "the pixels are scaled too small (0..1 where 0..255 is expected?), or the images are flat"
    return "check mean, std and the channel order, or the images are unlike those of training"


def _undo(preprocess: Preprocess, inputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return pixel values 0..255 (n, c, h, w) in the network's channel order."""
    mean, std = (np.asarray(v, np.float32).reshape(-1, 1, 1) for v in (preprocess.mean, preprocess.std))
    return np.asarray((inputs * std + mean) / np.float32(preprocess.scale), np.float32)


def _redo(preprocess: Preprocess, pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    mean, std = (np.asarray(v, np.float32).reshape(-1, 1, 1) for v in (preprocess.mean, preprocess.std))
    return np.asarray((pixels * np.float32(preprocess.scale) - mean) / std, np.float32)
