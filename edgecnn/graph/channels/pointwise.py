"""Operators that combine elements of equal position, normalize, reduce or pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from edgecnn.graph.channels.layers import whole_groups
from edgecnn.graph.channels.trace import Trace, op_name
from edgecnn.graph.channels.values import (
    Constant,
    Record,
    Value,
    blank,
    broadcast,
    common,
    compact,
    tidy,
    varying,
    words,
)
from edgecnn.graph.nodes import argument

_KEEPS_ZERO = frozenset(
    words("""
relu relu6 leaky_relu prelu silu gelu hardswish tanh elu selu celu mish neg abs sqrt square erf clone to
_to_copy contiguous dropout feature_dropout sin sign round floor ceil trunc softshrink hardshrink
""")
)
_OUTER = "is spread over other channels"
_UNCOVERED = "is combined with values that belong to no channel"


def pointwise(trace: Trace, node: fx.Node) -> Record:
    """Y = f(a, b, ...) element by element, operands broadcast."""
    shape = trace.shape(node)
    operands = [a for a in _tensors(node) if isinstance(trace.record(a), (Value, Constant))]
    values = [trace.value(a) for a in operands if isinstance(trace.record(a), Value)]
    ids = blank(shape)
    for count, value in enumerate(values):
        wide = broadcast(value.ids, shape)
        if _crosses(value.ids, ids):
            trace.freeze(value.ids, _OUTER)
        elif _crosses(ids, wide, values[:count]):
            trace.freeze(ids, _OUTER)
            ids = wide
        else:
            ids = merge(trace, ids, wide)
    for value in values:
        check_covered(trace, ids, value.ids)
    ids = tidy(ids)
    for operand in operands:
        record = trace.record(operand)
        if isinstance(record, Constant):
            bind_broadcast(trace, node, operand, ids)
    return Value(ids, _keeps_zero(trace, node, values))


def _crosses(operand: Tensor, ids: Tensor, spanning: Sequence[Value] | None = None) -> bool:
    """Return whether an operand that belongs to channels has size 1 along a dimension the ids follow."""
    if not bool((compact(operand) >= 0).any()):
        return False
    spans = set[int]()
    for shape in [operand.shape] if spanning is None else [v.ids.shape for v in spanning if v.has_channels]:
        spans |= {d + ids.dim() - len(shape) for d, s in enumerate(shape) if s > 1}
    return any(d not in spans for d in varying(ids))


def _tensors(node: fx.Node) -> list[fx.Node]:
    found = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node)]
    return [a for a in found if not isinstance(a.meta.get("val"), (int, float))]


def merge(trace: Trace, a: Tensor, b: Tensor) -> Tensor:
    """Join ids of equal position (equal shapes) and return one of them, NONE only where neither is a
    channel.
    """
    small_a, small_b = common(a, b)
    trace.join(small_a, small_b)
    return torch.where(small_a >= 0, small_a, small_b).expand(a.shape)


def check_covered(trace: Trace, ids: Tensor, operand: Tensor) -> None:
    """Freeze ids that an operand spans with elements that belong to no channel, so that it could not
    shrink.
    """
    shape = (1,) * (ids.dim() - operand.dim()) + tuple(operand.shape)
    spanned = [d for d in varying(ids) if shape[d] > 1]
    if not spanned:
        return
    for d in range(ids.dim()):
        if shape[d] == 1 and d not in spanned:
            ids = ids.narrow(d, 0, 1)
    a, b = common(ids, operand.reshape(shape).expand(ids.shape) if shape != tuple(ids.shape) else operand)
    lost = (a >= 0) & (b < 0)
    if bool(lost.any()):
        trace.freeze(a[lost], _UNCOVERED)


def bind_broadcast(trace: Trace, node: fx.Node, operand: Any, ids: Tensor, role: str = "constant") -> None:
    """Bind a constant operand whose dimensions align with the last of `ids`."""
    record = trace.record(operand)
    if not isinstance(record, Constant):
        return
    shape = (1,) * (ids.dim() - len(record.shape)) + record.shape
    if not any(shape[d] > 1 for d in varying(ids)):
        return
    for d in range(ids.dim()):
        if shape[d] == 1 and ids.shape[d] != 1:
            ids = ids.narrow(d, 0, 1)
    trace.bind(record, ids.reshape(record.shape), role, node)


def _keeps_zero(trace: Trace, node: fx.Node, values: Sequence[Value]) -> bool:
    name = op_name(node)
    if name == "mul":
        return any(v.zero for v in values)
    if name in ("div", "true_divide"):
        first = trace.record(node.args[0])
        return isinstance(first, Value) and first.zero
    if name in ("add", "sub", "maximum", "minimum"):
        numbers = any(isinstance(a, (int, float)) and a != 0 for a in node.args[:2])
        return all(v.zero for v in values) and not numbers
    if name in ("clamp", "hardtanh", "clamp_min"):
        low = argument(node, 1, "min", -1.0)
        return values[0].zero and (low is None or (isinstance(low, (int, float)) and low <= 0))
    return name in _KEEPS_ZERO and values[0].zero


def prelu(trace: Trace, node: fx.Node) -> Record:
    """X (n, c, ...), one slope per channel or one for all."""
    value = trace.value(node.args[0])
    if trace.shape(node.args[1])[0] > 1:
        _bind_channels(trace, node, node.args[1], value.ids, "constant")
    return value


def _bind_channels(trace: Trace, node: fx.Node, operand: Any, ids: Tensor, role: str) -> None:
    """Bind a vector that follows dimension 1."""
    record = trace.record(operand)
    if isinstance(record, Constant):
        vector = ids.movedim(1, -1)
        while vector.dim() > 1:  # a value may follow other dimensions; then its vector follows none here
            vector = vector[0]
        trace.bind(record, tidy(vector) if 1 in varying(ids) else blank(vector.shape), role, node)


def batch_norm(trace: Trace, node: fx.Node) -> Record:
    """batch_norm and instance_norm: weight, bias and statistics per channel."""
    value = trace.value(node.args[0])
    for operand in node.args[1:5]:
        _bind_channels(trace, node, operand, value.ids, "norm")
    affine = isinstance(argument(node, 1, "weight"), fx.Node)
    return Value(value.ids, zero=affine or value.zero)


def layer_norm(trace: Trace, node: fx.Node) -> Record:
    """layer_norm and rms_norm over the last dimensions."""
    value = trace.value(node.args[0])
    sizes: Any = argument(node, 1, "normalized_shape")
    rank = value.ids.dim()
    if any(d >= rank - len(sizes) for d in varying(value.ids)):
        trace.inexact.append((node, f"{op_name(node)} takes its statistics over the channels", value.ids))
    for operand in node.args[2:4]:
        bind_broadcast(trace, node, operand, value.ids, "norm")
    affine = isinstance(argument(node, 2, "weight"), fx.Node)
    return Value(value.ids, zero=affine)


def group_norm(trace: Trace, node: fx.Node) -> Record:
    """Whole groups go where that is the finer choice, else the same positions of every group."""
    value = trace.value(node.args[0])
    groups = int(argument(node, 1, "num_groups", 1))
    size = trace.shape(node)[1] // groups
    vector = trace.vector(node.args[0], 1, "group_norm runs along another dimension")
    if size > 1:
        whole = groups > 1 and whole_groups(groups, size)
        if groups > 1:
            trace.join_all(vector.reshape(groups, size), keep=(0,) if whole else (1,))
        if not whole:
            trace.inexact.append((node, "group_norm takes its statistics over the channels", value.ids))
    for operand in node.args[2:4]:
        _bind_channels(trace, node, operand, value.ids, "norm")
    return Value(value.ids, zero=isinstance(argument(node, 2, "weight"), fx.Node))


def softmax(trace: Trace, node: fx.Node) -> Record:
    """Softmax and log_softmax: the channels they run along stay."""
    ids = trace.value(node.args[0]).ids
    dim = int(argument(node, 1, "dim")) % ids.dim()
    if dim in varying(ids):
        trace.rigid(ids, dim, "softmax runs along the channels")
    return Value(ids)


def reduced_dims(node: fx.Node, rank: int) -> list[int]:
    """Return the dimensions a reduction removes."""
    position = 2 if op_name(node) in ("linalg_vector_norm", "norm") else 1
    dims = argument(node, position, "dim")
    if isinstance(dims, bool) or dims is None:  # var(x, unbiased)
        return list(range(rank))
    found = [dims] if isinstance(dims, int) else list(dims)
    return [int(d) % rank for d in found] or list(range(rank))


def reduction(trace: Trace, node: fx.Node) -> Record:
    """mean, sum, amax, var, norm ...: over channels the result depends on how many there are."""
    value = trace.value(node.args[0])
    ids = value.ids
    dims = [d for d in reduced_dims(node, ids.dim()) if d in varying(ids)]
    if dims:
        kept = [d for d in varying(ids) if d not in dims]
        if kept:
            ids = trace.join_all(ids, keep=kept)
        else:
            if not (value.zero and op_name(node) in ("sum", "linalg_vector_norm", "norm")):
                trace.inexact.append((node, f"{op_name(node)} over the channels", ids))
            ids = blank(ids.shape)
    return _sized(trace, node, _reduce(trace, node, ids), op_name(node) in ("sum", "mean") and value.zero)


def _reduce(trace: Trace, node: fx.Node, ids: Tensor) -> Tensor:
    """Return ids with the reduced dimensions gone, or of size 1 where the operator keeps them."""
    dims = reduced_dims(node, ids.dim())
    example = trace.example(node)
    first = example[0] if isinstance(example, (tuple, list)) else example
    for d in sorted(dims, reverse=True):
        ids = ids.narrow(d, 0, 1) if first.dim() == trace.example(node.args[0]).dim() else ids.select(d, 0)
    return ids


def _sized(trace: Trace, node: fx.Node, ids: Tensor, zero: bool) -> Record:
    example = trace.example(node)
    if isinstance(example, (tuple, list)):  # max(dim) and others: values, indices
        return tuple(Value(ids if e.is_floating_point() else blank(e.shape), zero) for e in example)
    return Value(ids, zero)


def spatial(trace: Trace, node: fx.Node) -> Record:
    """Pools and resizes: the last dimensions change, the channels stay."""
    value = trace.value(node.args[0])
    example = trace.example(node)
    shape = tuple((example[0] if isinstance(example, (tuple, list)) else example).shape)
    ids = value.ids
    for d in range(max(2, ids.dim() - 3) if ids.dim() > 3 else ids.dim() - 1, ids.dim()):
        if d in varying(ids):
            trace.rigid(ids, d, f"{op_name(node)} runs along the channels")
            ids = blank(ids.shape)
    for d in range(ids.dim()):
        if ids.shape[d] != shape[d]:
            ids = ids.narrow(d, 0, 1)
    return _sized(trace, node, ids.expand(shape), value.zero)


def pass_through(trace: Trace, node: fx.Node) -> Record:
    """An operator that changes numbers but neither shape nor which channel they belong to."""
    value = trace.value(node.args[0])
    return Value(value.ids, value.zero and op_name(node) in _KEEPS_ZERO)


_POOLS = words("""
max_pool1d max_pool2d max_pool2d_with_indices avg_pool1d avg_pool2d adaptive_avg_pool1d
adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest1d upsample_nearest2d upsample_bilinear2d
upsample_bicubic2d _upsample_bilinear2d_aa
""")
_REDUCTIONS = [
    "mean",
    "sum",
    "amax",
    "amin",
    "max",
    "min",
    "var",
    "std",
    "prod",
    "logsumexp",
    "linalg_vector_norm",
    "norm",
    "argmax",
    "argmin",
]

HANDLERS = {
    "pointwise": pointwise,
    "where": pointwise,
    "prelu": prelu,
    "batch_norm": batch_norm,
    "_native_batch_norm_legit_no_training": batch_norm,
    "instance_norm": batch_norm,
    "layer_norm": layer_norm,
    "rms_norm": layer_norm,
    "group_norm": group_norm,
    "softmax": softmax,
    "_softmax": softmax,
    "log_softmax": softmax,
    **dict.fromkeys(_REDUCTIONS, reduction),
    **dict.fromkeys(_POOLS, spatial),
    **dict.fromkeys(
        [
            "dropout",
            "feature_dropout",
            "hardswish",
            "to",
            "_to_copy",
            "contiguous",
            "log_sigmoid",
            "type_as",
            "float",
        ],
        pass_through,
    ),
}
