"""Images for calibration when there are no data: distilled from BatchNorm statistics, or noise.

A trained network remembers in each BatchNorm layer l the mean m_l and variance v_l (per channel) of what
came in during training. Images x, starting from noise, are moved by Adam until the network sees those again:

    loss(x) = sum_l (|mean(a_l(x)) - m_l|^2 + |std(a_l(x)) - sqrt(v_l)|^2) / sum(v_l)
              + 0.1 * ((mean(x) - 0.45)^2 + (std(x) - 0.25)^2) + 0.02 * TV(x)

with a_l(x) the input of layer l, mean and std over (n, h, w), x in 0..1 before the Preprocess, per colour.
0.45 and 0.25 are what the usual normalisation takes to mean 0 and variance 1; TV, the mean absolute
difference of neighbouring pixels, keeps the images smooth. Dividing by sum(v_l) makes each layer count
alike. x stays within 0..1 and ends as 8-bit pixels, so the network gets nothing that a camera could not give.

**Source**: Y. Cai et al., ZeroQ: A Novel Zero Shot Quantization Framework, CVPR 2020, arXiv:2001.00281,
equation 3.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from edgecnn.data.arrays import ArrayDataset
from edgecnn.data.geometry import Pixels
from edgecnn.errors import DataError
from edgecnn.model import Model
from edgecnn.runner.preprocess import Preprocess

PRIOR_MEAN, PRIOR_STD = 0.45, 0.25
MAX_STEPS, GOOD_STEPS, MIN_STEPS = 50, 35, 20
MAX_BATCH, MIN_IMAGES = 32, 4
WORK_BUDGET = 1.2e12
"""Work of all forward passes, 1 per multiply-accumulate and 200 per activation: about 40 s on one core."""
MAX_SECONDS = 120.0

_LEARNING_RATE = 0.05
_TOLERATED_RISE, _BACK_OFF = 1.1, 0.3
_PRIOR_WEIGHT, _SMOOTHNESS_WEIGHT = 0.1, 0.02
_WORK_PER_ACTIVATION = 200
_BATCH_NORM = torch.ops.aten.batch_norm.default
_CONVS = (torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default)

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass(frozen=True)
class _LayerStatistics:
    """What one BatchNorm layer saw, and what it should have seen: per channel, differentiable."""

    input: torch.Tensor  # (n, c, ...)
    running_mean: torch.Tensor  # (c,)
    running_var: torch.Tensor  # (c,)

    def loss(self) -> torch.Tensor:
        """Return the squared distance of mean and std, relative to the layer's variance."""
        dims = [0, *range(2, self.input.dim())]
        var, mean = torch.var_mean(self.input, dims, correction=0)
        std = torch.sqrt(var + 1e-8)
        distance = (mean - self.running_mean).square().sum() + (std - self.running_var.sqrt()).square().sum()
        return distance / (self.running_var.sum() + 1e-8)


class _Finished(Exception):  # noqa: N818
    """The last BatchNorm is reached; what follows is not needed."""


class _Capture(fx.Interpreter):
    """Run a graph as far as its last BatchNorm and keep what each of them sees.

    Parameters are detached, so that no gradients are computed for them.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        nodes = _batch_norm_nodes(graph)
        self._last = nodes[-1]
        self._layers: list[_LayerStatistics] = []
        self.work = 0.0

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, noting statistics and work."""
        if n.op == "call_function" and n.target is _BATCH_NORM:
            args, _ = self.fetch_args_kwargs_from_env(n)
            self._layers.append(_LayerStatistics(args[0], args[3], args[4]))
            if n is self._last:
                raise _Finished
        result = super().run_node(n)
        if n.op == "get_attr" and isinstance(result, torch.Tensor):
            return result.detach()
        if isinstance(result, torch.Tensor):
            self.work += result.numel() * (_WORK_PER_ACTIVATION + self._macs_per_value(n))
        return result

    def _macs_per_value(self, n: fx.Node) -> int:
        if n.target not in _CONVS:
            return 0
        args, _ = self.fetch_args_kwargs_from_env(n)
        return int(args[1].shape[1:].numel())

    def layers(self, x: torch.Tensor) -> list[_LayerStatistics]:
        """Return what every BatchNorm sees for x (n, c, h, w)."""
        self._layers, self.work = [], 0.0
        try:
            self.run(x)
        except _Finished:
            self.env = {}
        return self._layers


def _batch_norm_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "call_function" and node.target is _BATCH_NORM]


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
    if not _batch_norm_nodes(model.graph):
        raise DataError(f"{model.spec.name}: the network has no BatchNorm layer, expected at least one")
    with torch.no_grad():
        losses = [layer.loss() for layer in _Capture(model.graph).layers(torch.from_numpy(inputs))]
    return float(torch.stack(losses).mean())


def plan_work(work_per_image: float, num_images: int) -> tuple[int, int]:
    """Choose how many images to distil, and in how many steps, the same on every machine.

    Few good images calibrate better than many unfinished ones, so images are given up before steps.

    Args:
        work_per_image: of one forward pass of one image, in the unit of WORK_BUDGET.
        num_images: asked for.

    Returns:
        (images, steps).

    Example:
        >>> plan_work(1e8, 32), plan_work(4e9, 32)
        ((32, 50), (8, 37))
    """
    affordable = int(WORK_BUDGET / (work_per_image * GOOD_STEPS))
    num_images = min(num_images, max(affordable, MIN_IMAGES))
    steps = int(WORK_BUDGET / (work_per_image * num_images))
    return num_images, min(max(steps, MIN_STEPS), MAX_STEPS)


def _distill_batch(
    capture: _Capture, start: torch.Tensor, preprocess: Preprocess, steps: int, report: Callable[[int], bool]
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
        layers = capture.layers(_to_input(x, preprocess))
        loss = torch.stack([layer.loss() for layer in layers]).sum() + _image_loss(x)
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

    The number of steps follows from the network's size, so the same seed gives the same images; only a
    machine so slow that two minutes pass stops earlier, with a warning.

    Args:
        model: the network. Without BatchNorm it gets `noise_images`.
        num_images: how many, at least 1; a large network gets fewer, so that the work stays bounded.
        seed: of the noise to start from.
        progress: told about the steps.

    Returns:
        Images without labels, with warnings.

    Raises:
        DataError: if num_images is not positive.
    """
    preprocess = model.spec.preprocess
    nodes = _batch_norm_nodes(model.graph)
    if not nodes:
        return noise_images(preprocess, num_images, seed)
    _check_num_images(num_images)
    probe = model.fixed_batch or 1
    capture = _Capture(model.graph)
    with torch.no_grad():
        layers = capture.layers(torch.zeros(probe, preprocess.num_channels, *preprocess.size))
    trained = any(bool((layer.running_mean != 0).any() or (layer.running_var != 1).any()) for layer in layers)
    asked = num_images
    num_images, steps = plan_work(capture.work / probe, num_images)
    batch = model.fixed_batch or min(num_images, MAX_BATCH)
    num_batches = -(-num_images // batch)
    noise = _to_tensor(natural_noise(preprocess, num_batches * batch, seed), preprocess)
    deadline = time.monotonic() + MAX_SECONDS
    done = []
    for index in range(num_batches):
        start = noise[index * batch : (index + 1) * batch]

        def report(step: int, first: int = index * steps) -> bool:
            if progress is not None:
                progress(first + step, num_batches * steps)
            return time.monotonic() > deadline

        with torch.enable_grad():
            done.append(_distill_batch(capture, start, preprocess, steps, report))
    pixels = _to_pixels(torch.cat(done)[:num_images], preprocess)
    warnings = _distilled_warnings(num_images, asked, trained, time.monotonic() > deadline)
    return ArrayDataset("distilled images", pixels, preprocess, warnings=warnings)


def _distilled_warnings(num_images: int, asked: int, trained: bool, stopped: bool) -> tuple[str, ...]:
    unmeasured = (
        f"no data given: calibrated and judged on {num_images} images distilled from the network's BatchNorm "
        "statistics, so accuracy is unmeasured; give --data with about 100 labelled images to measure it"
    )
    messages = [unmeasured]
    if num_images < asked:
        messages.append(
            f"{num_images} images distilled, fewer than the {asked} asked for: the network is large and the "
            "work is bounded"
        )
    if not trained:
        messages.append(
            "all BatchNorm statistics are mean 0, variance 1: the network does not seem to be trained"
        )
    if stopped:
        messages.append(
            f"distilling images was stopped after {MAX_SECONDS:.0f} s; another run may give other images"
        )
    return tuple(messages)


def noise_images(preprocess: Preprocess, num_images: int, seed: int) -> ArrayDataset:
    """Make unlabelled noise with the spectrum, brightness and contrast of photographs.

    Args:
        preprocess: of the network.
        num_images: how many, at least 1.
        seed: of the noise.

    Returns:
        Images without labels, with a warning.

    Raises:
        DataError: if num_images is not positive.

    Example:
        >>> noise_images(Preprocess((8, 8)), 4, seed=0).inputs([0, 1]).shape
        (2, 3, 8, 8)
    """
    _check_num_images(num_images)
    message = (
        "no data given and no BatchNorm to learn from: calibrated and judged on "
        f"{num_images} images of noise, so value ranges are a guess and accuracy is unmeasured and "
        "probably lost (SqueezeNet 1.1: 32 % top-1 instead of 67 %); do not ship this file, give --data with "
        "about 100 real images"
    )
    pixels = natural_noise(preprocess, num_images, seed)
    return ArrayDataset("noise images", pixels, preprocess, warnings=(message,))


def _check_num_images(num_images: int) -> None:
    if num_images < 1:
        raise DataError(f"asked for {num_images} synthetic images, expected at least 1")


def natural_noise(preprocess: Preprocess, num_images: int, seed: int) -> Pixels:
    """Return uint8 (n, h, w, c) noise whose amplitude falls as 1/f, colours mostly gray.

    **Source**: D. J. Field, Relations between the statistics of natural images and the response
    properties of cortical cells, J. Opt. Soc. Am. A 4, 1987: amplitude spectra of photographs fall as 1/f.
    """
    height, width = preprocess.size
    channels = preprocess.num_channels
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1.0
    images = np.empty((num_images, height, width, channels), np.uint8)
    for index in range(num_images):
        white = rng.standard_normal((channels + 1, height, width))
        pink = np.fft.irfft2(np.fft.rfft2(white) / frequency, s=(height, width))
        pink -= pink.mean((1, 2), keepdims=True)
        pink /= pink.std((1, 2), keepdims=True) + 1e-12
        mixed = np.sqrt(0.85) * pink[:1] + np.sqrt(0.15) * pink[1:]  # gray part and colours: (c, h, w)
        level = PRIOR_MEAN + rng.normal(0.0, 0.1, (channels, 1, 1))
        contrast = PRIOR_STD * np.exp(rng.normal(0.0, 0.3))
        colours = np.clip(level + contrast * mixed, 0.0, 1.0)
        images[index] = np.rint(colours * 255.0).astype(np.uint8).transpose(1, 2, 0)
    return images


def _to_tensor(pixels: Pixels, preprocess: Preprocess) -> torch.Tensor:
    """Take uint8 (n, h, w, c) to float32 (n, c, h, w) in 0..1 and the network's channel order."""
    ordered = pixels[..., ::-1] if preprocess.channel_order == "bgr" else pixels
    return torch.from_numpy(np.ascontiguousarray(ordered.transpose(0, 3, 1, 2), dtype=np.float32) / 255.0)


def _to_pixels(x: torch.Tensor, preprocess: Preprocess) -> Pixels:
    """Take float32 (n, c, h, w) in 0..1 back to uint8 (n, h, w, c): the inverse of `_to_tensor`."""
    pixels = np.rint(x.numpy() * 255.0).astype(np.uint8).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels[..., ::-1] if preprocess.channel_order == "bgr" else pixels)
