"""Convolutions and linear layers: they read the channels of their input and make new ones.

A grouped convolution of g groups, m inputs and n outputs each, can shrink in two ways:

    whole groups    (g' < g): the m inputs and n outputs of one group go together             g units
    same positions  (m' < m, n' < n): input j of every group goes together, and output i      m + n units

Depthwise convolutions (m = n = 1) and channel multipliers (m = 1) are the first kind. Whole groups are
taken where that gives the finer choice, g >= 2 max(m, n).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from edgecnn.graph.channels.trace import Layer, Trace, op_name
from edgecnn.graph.channels.union import NONE
from edgecnn.graph.channels.values import Constant, Record, Value, along, varying
from edgecnn.graph.nodes import argument

_SPATIAL = "convolved along its channels"
_IMAGE = "a grouped convolution reads values that belong to no channel"


def whole_groups(groups: int, *sizes: int) -> bool:
    """Return whether whole groups are the finer choice, for groups of these numbers of channels.

    Example:
        >>> whole_groups(32, 4, 4), whole_groups(3, 80, 80), whole_groups(8, 1, 2)
        (True, False, True)
    """
    return 1 in sizes or groups >= 2 * max(sizes)


def convolution(trace: Trace, node: fx.Node) -> Record:
    """Convolutions of any number of dimensions, transposed or not."""
    name = op_name(node)
    general = name == "convolution"
    transposed = bool(argument(node, 6, "transposed")) if general else "transpose" in name
    groups = int(argument(node, 8 if general else 6, "groups", 1))
    x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    if not isinstance(trace.record(weight), Constant):
        return trace.unknown(node, "is convolved with weights computed from the image")
    if _slides_along_channels(trace, node, x, weight):
        ids = trace.value(x).ids
        trace.inexact.append((node, "a convolution along the channels sees other neighbours", ids))
        return Value(ids)
    inputs = trace.vector(x, 1, _SPATIAL)
    c_out = trace.shape(node)[1]
    read, made, input_axis, output_axis = _read_and_made(trace, inputs, c_out, groups)
    shape = trace.shape(weight)
    # conv: (c_out, c_in/groups, ...); transposed: (c_in, c_out/groups, ...)
    first, second = (read, output_axis) if transposed else (made, input_axis)
    roles = ("in", "out") if transposed else ("out", "in")
    for dim, vector, role in ((0, first, roles[0]), (1, second, roles[1])):
        if vector is not None:
            trace.bind(trace.record(weight), along(vector, dim, shape), role, node)
    _bias(trace, node, made)
    kind = "conv_transpose2d" if transposed else "conv2d"
    trace.layers.append(Layer(node, kind, made, inputs, inputs[:0], groups))
    return Value(along(made, 1, trace.shape(node)), zero=True)


def _slides_along_channels(trace: Trace, node: fx.Node, x: fx.Node, weight: fx.Node) -> bool:
    """ECA: a 1-D convolution from one to one channel whose length is the channels of the network."""
    ids = trace.value(x).ids
    return (
        varying(ids) == (2,)
        and ids.dim() == 3
        and trace.shape(weight)[:2] == (1, 1)
        and trace.shape(node) == tuple(ids.shape)
    )


def _read_and_made(
    trace: Trace, inputs: Tensor, c_out: int, groups: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return input ids, output ids, ids along c_in/groups and ids along c_out/groups (None: fixed)."""
    if groups == 1:
        made = trace.issue(c_out)
        return inputs, made, inputs, made
    blocks = inputs.reshape(groups, -1)  # (g, m)
    m, n = blocks.shape[1], c_out // groups
    if m == n == 1:
        return inputs, inputs, None, None
    if whole_groups(groups, m, n):
        units = trace.join_all(blocks, keep=(0,))[:, 0]
        return units.repeat_interleave(m), units.repeat_interleave(n), None, None
    tied = trace.join_all(blocks, keep=(1,))
    made = trace.issue(n)
    return tied.flatten(), made.repeat(groups), tied[0], made


def linear(trace: Trace, node: fx.Node) -> Record:
    """aten.linear: x (..., c_in), weight (c_out, c_in)."""
    x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    if not isinstance(trace.record(weight), Constant):
        return trace.unknown(node, "is multiplied by weights computed from the image")
    return dense(trace, node, x, weight, output_dim=0)


def dense(trace: Trace, node: fx.Node, x: fx.Node, weight: fx.Node, output_dim: int) -> Record:
    """A product with a constant matrix along the last dimension of x; `output_dim` of the matrix makes
    channels.
    """
    ids, shape, sizes = trace.value(x).ids, trace.shape(node), trace.shape(weight)
    others = [d for d in varying(ids) if d != ids.dim() - 1]
    if (
        others
    ):  # applied to each channel (token mixing) or to each head: those go as they are, the matrix stays
        kept = trace.join_all(ids, keep=others).narrow(-1, 0, 1)
        positions = torch.full((0,), NONE) if len(others) > 1 else kept.movedim(others[0], 0).flatten(1)[:, 0]
        none = torch.full((sizes[0],), NONE), torch.full((sizes[1],), NONE)
        made, read = (none[output_dim], none[1 - output_dim])
        trace.layers.append(Layer(node, "linear", made, read, positions, 1))
        return Value(kept.expand(shape))
    inputs = trace.vector(x, -1, "a linear layer runs along another dimension")
    made = trace.issue(shape[-1])
    constant = trace.record(weight)
    trace.bind(constant, along(inputs, 1 - output_dim, sizes), "in", node)
    trace.bind(constant, along(made, output_dim, sizes), "out", node)
    _bias(trace, node, made)
    trace.layers.append(Layer(node, "linear", made, inputs, inputs[:0], 1))
    return Value(along(made, len(shape) - 1, shape), zero=True)


def _bias(trace: Trace, node: fx.Node, made: Tensor) -> None:
    bias = argument(node, 2, "bias")
    if isinstance(bias, fx.Node):
        trace.bind(trace.record(bias), along(made, 0, trace.shape(bias)), "out", node)


HANDLERS = {
    **{f"{kind}{n}d": convolution for kind in ("conv", "conv_transpose") for n in (1, 2, 3)},
    "convolution": convolution,
    "linear": linear,
}
