"""Which operators compute in int8, and in whose parameters they hold their output: `static_wi8_ai8`.

    activations   int8, per_tensor, asymmetric, [-128, 127]
    weights       int8, per_channel over output channels, symmetric, [-127, 127]
    biases        int32, scale = scale_x * scale_w[c], zero_point 0

Three ways to hold an output:

    OWN      parameters of its own, from the values seen in calibration
    SHARED   the parameters of its input: the operator only moves or picks values
    FIXED    parameters that the runtimes prescribe (a sigmoid lies in [0, 1])

A clamp (relu, relu6, hardtanh) right after an operator that `fuses_clamp` is part of it: only the clamped
value is held. Elsewhere a clamp only picks values.

Source: Jacob et al. 2018, arXiv:1712.05877, sections 2.1 to 2.4; TensorFlow Lite's 8-bit quantization
specification.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import fx

from edgecnn.graph.nodes import aten, pair
from edgecnn.graph.pool_padding import pads_with_lowest


class Holds(Enum):
    """In whose parameters an operator holds its output."""

    OWN = "own"
    SHARED = "shared"
    FIXED = "fixed"


@dataclass(frozen=True)
class OpSpec:
    """How one operator is quantized.

    Attributes:
        holds: see Holds.
        fuses_clamp: a clamp that alone reads the output becomes part of the operator.
        weight_axis: output-channel axis of the weight (argument 1; the bias is argument 2), None without one.
        fixed: (scale, zero_point) of FIXED.
    """

    holds: Holds
    fuses_clamp: bool = False
    weight_axis: int | None = None
    fixed: tuple[float, int] | None = None


_OWN = OpSpec(Holds.OWN)
_ARITHMETIC = OpSpec(Holds.OWN, fuses_clamp=True)
_SHARED = OpSpec(Holds.SHARED)

SCHEME: dict[Any, OpSpec] = {
    # layers with weights
    aten.conv2d.default: OpSpec(Holds.OWN, fuses_clamp=True, weight_axis=0),
    aten.conv2d.padding: OpSpec(Holds.OWN, fuses_clamp=True, weight_axis=0),
    aten.conv_transpose2d.input: OpSpec(Holds.OWN, fuses_clamp=True, weight_axis=1),
    aten.linear.default: OpSpec(Holds.OWN, fuses_clamp=True, weight_axis=0),
    # arithmetic
    aten.add.Tensor: _ARITHMETIC,
    aten.add.Scalar: _ARITHMETIC,
    aten.sub.Tensor: _ARITHMETIC,
    aten.rsub.Scalar: _ARITHMETIC,
    aten.mul.Tensor: _ARITHMETIC,
    aten.mul.Scalar: _ARITHMETIC,
    aten.div.Tensor: _ARITHMETIC,
    aten.neg.default: _ARITHMETIC,
    # reductions that compute new values
    aten.mean.dim: _OWN,
    aten.leaky_relu.default: _OWN,
    # bounded functions
    aten.sigmoid.default: OpSpec(Holds.FIXED, fixed=(1.0 / 256.0, -128)),
    aten.softmax.int: OpSpec(Holds.FIXED, fixed=(1.0 / 256.0, -128)),
    aten.tanh.default: OpSpec(Holds.FIXED, fixed=(1.0 / 128.0, 0)),
    # clamps, where nothing fuses them
    aten.relu.default: _SHARED,
    aten.relu6.default: _SHARED,
    aten.hardtanh.default: _SHARED,
    aten.clamp.default: _SHARED,
    aten.clamp_min.default: _SHARED,
    # operators that pick, average or move values
    aten.max_pool2d.default: _SHARED,
    aten.max_pool2d_with_indices.default: _SHARED,
    aten.avg_pool2d.default: _SHARED,
    aten.adaptive_max_pool2d.default: _SHARED,
    aten.amax.default: _SHARED,
    aten.max.dim: _SHARED,
    aten.cat.default: _SHARED,
    aten.flatten.using_ints: _SHARED,
    aten.view.default: _SHARED,
    aten.reshape.default: _SHARED,
    aten._unsafe_view.default: _SHARED,
    aten.squeeze.dim: _SHARED,
    aten.squeeze.dims: _SHARED,
    aten.unsqueeze.default: _SHARED,
    aten.permute.default: _SHARED,
    aten.transpose.int: _SHARED,
    aten.slice.Tensor: _SHARED,
    aten.narrow.default: _SHARED,
    aten.select.int: _SHARED,
    aten.unbind.int: _SHARED,
    aten.unflatten.int: _SHARED,
    aten.roll.default: _SHARED,
    aten.index.Tensor: _SHARED,
    aten.unfold.default: _SHARED,
    aten.split.Tensor: _SHARED,
    aten.split_with_sizes.default: _SHARED,
    aten.chunk.default: _SHARED,
    aten.pad.default: _SHARED,
    aten.constant_pad_nd.default: _SHARED,
    aten.upsample_nearest2d.vec: _SHARED,
    aten.upsample_nearest2d.default: _SHARED,
    aten.upsample_bilinear2d.vec: _SHARED,
    aten.upsample_bilinear2d.default: _SHARED,
    aten.expand.default: _SHARED,
    aten.expand_as.default: _SHARED,
    aten.dropout.default: _SHARED,
    aten.feature_dropout.default: _SHARED,
    aten.contiguous.default: _SHARED,
    aten.clone.default: _SHARED,
    aten.alias.default: _SHARED,
    aten.detach.default: _SHARED,
    operator.getitem: _SHARED,
}

CLAMPS: frozenset[Any] = frozenset(
    {aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default}
)

POOL_TO_MEAN = aten.adaptive_avg_pool2d.default
"""Averages over the whole image when its size is 1: then OWN like a mean, else SHARED like a pool."""
POOL_TO_MEAN_SPEC = {True: _OWN, False: _SHARED}


def spec_of(node: fx.Node) -> OpSpec | None:
    """Return how a node is quantized, None for a node the scheme does not know."""
    if node.target is aten.div.Tensor and isinstance(node.args[1], fx.Node) and node.args[1].op != "get_attr":
        return None  # a quotient of two activations
    if pads_with_lowest(node):
        return None  # no level is minus infinity
    if node.target is POOL_TO_MEAN:
        return POOL_TO_MEAN_SPEC[pair(node.args[1]) == (1, 1)]
    return SCHEME.get(node.target)


def fuses_into_clamp(node: fx.Node) -> bool:
    """Whether only the clamp after this node is held."""
    spec = spec_of(node)
    users = list(node.users)
    return spec is not None and spec.fuses_clamp and len(users) == 1 and users[0].target in CLAMPS
