"""Tiny networks, one for each structure that real CNNs have, for the tests of everything behind loading.

module("residual")   the nn.Module, seeded, in eval mode, with the batch-norm statistics of its own data
model("residual")    the same as a Model; folded("residual") is ready to quantize, quantized(...) is int8
images(8)            float32 (8, 3, 12, 12), what every net takes
NETS                 every name; the networks stand in `structures`
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from structures import NETS, Forward, Net, Scale
from torch import Tensor, nn

from edgecnn.devices.capability import weight_bits_for
from edgecnn.devices.profile import load_device
from edgecnn.graph.build import build_program
from edgecnn.graph.folding import FoldBatchNorm
from edgecnn.graph.program import Program
from edgecnn.load import LoadOptions, load_model
from edgecnn.lower.activations import DecomposeActivations
from edgecnn.lower.averages import AveragesToConvolutions
from edgecnn.model import Model
from edgecnn.pipeline import PassContext
from edgecnn.quantize.static import QuantizeStatic

__all__ = ["NETS", "Forward", "Net", "Scale"]

SHAPE = (3, 12, 12)

STEP = QuantizeStatic(weight_bits=weight_bits_for(load_device("local_cpu").isa))
"""Weights that this machine's kernels do not saturate: 7 bits on x86 without VNNI."""


class Images:
    """A Dataset of arrays that are the network's input already."""

    name = "test images"
    labels = None
    class_names = None
    warnings: tuple[str, ...] = ()

    def __init__(self, inputs: npt.NDArray[np.float32]) -> None:
        self._inputs = inputs

    def __len__(self) -> int:
        return len(self._inputs)

    def inputs(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        return self._inputs[list(indices)]


@functools.cache
def images(num_images: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return smooth noise of unit variance with a brightness of its own per image, (n, 3, 12, 12)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(num_images, SHAPE[0], 6, 6, generator=generator)
    fine = torch.randn(num_images, *SHAPE, generator=generator)
    x = F.interpolate(coarse, scale_factor=2, mode="bilinear") + 0.5 * fine
    shift = torch.randn(num_images, 1, 1, 1, generator=generator)
    return (x + 0.5 * shift).numpy()


def settle(net: nn.Module) -> nn.Module:
    """Give batch norms random weights and the statistics of some images, and set eval mode."""
    for layer in net.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, 0.0, 0.3)
            layer.momentum = None
    net.train()
    with torch.no_grad():
        net(torch.from_numpy(images(32)))
    return net.eval()


@functools.cache
def module(name: str) -> nn.Module:
    torch.manual_seed(zlib.crc32(name.encode()))
    return settle(NETS[name]())


def as_model(net: nn.Module, shape: tuple[int, int, int] = SHAPE) -> Model:
    return load_model(net, LoadOptions(input_shape=shape))


@functools.cache
def model(name: str) -> Model:
    return as_model(module(name))


def context(num_images: int = 64) -> PassContext:
    """Calibration images, other than those `held_out` gives."""
    return PassContext(Images(images(num_images, 1)), tuple(range(num_images)))


def held_out(num_images: int = 8) -> npt.NDArray[np.float32]:
    return images(num_images, 2)


def prepare(float_model: Model) -> Model:
    """Return a model after the passes that come ahead of quantization."""
    for step in (FoldBatchNorm(), DecomposeActivations(), AveragesToConvolutions()):
        float_model = step.run(float_model, context())
    return float_model


@functools.cache
def folded(name: str) -> Model:
    return prepare(model(name))


@functools.cache
def quantized(name: str, step: QuantizeStatic = STEP) -> Model:
    return step.run(folded(name), context())


@functools.cache
def quantized_program(name: str) -> Program:
    return build_program(quantized(name))


def outputs_of(net: Callable[[Tensor], Any], x: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
    """Return a module's outputs in order, out of dicts and lists."""
    with torch.no_grad():
        found = net(torch.from_numpy(x))
    values = list(found.values()) if isinstance(found, dict) else found
    return [v.numpy() for v in (values if isinstance(values, (list, tuple)) else [values])]
