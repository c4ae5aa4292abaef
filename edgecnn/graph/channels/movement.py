"""Operators that move elements without changing them: the operator itself is run on the ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from edgecnn.graph.channels.pointwise import reduced_dims
from edgecnn.graph.channels.trace import Trace, op_name
from edgecnn.graph.channels.values import (
    Axis,
    Constant,
    Record,
    Value,
    blank,
    compact,
    constant_of,
    counting,
    tidy,
    varying,
    words,
)
from edgecnn.graph.nodes import argument, aten

_PLAIN = words("""
view reshape _unsafe_view permute transpose flatten unflatten unsqueeze squeeze slice expand expand_as t
numpy_T flip repeat movedim swapaxes narrow alias detach lift_fresh_copy chunk split split_with_sizes
tensor_split unbind select roll index index_select reshape_as slice_scatter select_scatter view_as
repeat_interleave unfold
""")


def run_on(trace: Trace, node: fx.Node, ids: dict[fx.Node, Tensor]) -> Any:
    """Run a node's operator with integers in place of the tensors named; numbers and indices as they are."""

    def replaced(source: fx.Node) -> Any:
        if source in ids:
            return ids[source]
        example = trace.example(source)
        if isinstance(example, Tensor):
            return trace.real(source)
        return example

    views = (aten.view.default, aten._unsafe_view.default)  # ids have other strides than the numbers
    target: Any = aten.reshape.default if node.target in views else node.target
    return target(*fx.map_arg(node.args, replaced), **fx.map_arg(node.kwargs, replaced))


def moved(trace: Trace, node: fx.Node) -> Record:
    """Any operator of _PLAIN."""
    x = node.args[0]
    value = trace.value(x)
    _keep_sizes(trace, node, value.ids)
    data = {n: trace.value(n).ids for n in node.all_input_nodes if isinstance(trace.record(n), Value)}
    for n in node.all_input_nodes:  # x itself, or what a scatter writes, may be a constant without channels
        if (
            n in (node.args[0], node.args[1] if op_name(node).endswith("_scatter") else None)
            and n not in data
        ):
            data[n] = blank(trace.shape(n))
    found = run_on(trace, node, data)
    if isinstance(found, (tuple, list)):
        return tuple(Value(tidy(f), value.zero) for f in found)
    return Value(tidy(found), value.zero)


def _keep_sizes(trace: Trace, node: fx.Node, ids: Tensor) -> None:
    """Say which dimensions an operator picks elements of by number."""
    name = op_name(node)
    dims: list[int] = []
    if name in ("select", "unbind", "select_scatter", "slice_scatter", "unfold"):
        position = 2 if name.endswith("_scatter") else 1
        dims = [int(argument(node, position, "dim", 0))]
    elif name == "roll":
        dims = [int(d) for d in argument(node, 2, "dims", []) or range(ids.dim())]
    elif name == "index":
        dims = [d for d, index in enumerate(argument(node, 1, "indices")) if index is not None]
    for d in dims:
        if d % ids.dim() in varying(ids):
            trace.rigid(ids, d, f"{name} counts along the channels")


def concat(trace: Trace, node: fx.Node) -> Record:
    """aten.cat and aten.stack."""
    sources: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    shape = trace.shape(node)
    dim = int(argument(node, 1, "dim", 0)) % len(shape)
    stacked = op_name(node) == "stack"
    records = [trace.record(s) for s in sources]
    dims = {d for r in records if isinstance(r, Value) for d in varying(r.ids)}
    parts: list[Tensor] = []
    for source, record in zip(sources, records, strict=True):
        part = record.ids if isinstance(record, Value) else _adopted(trace, node, source, dims, dim)
        parts.append(part.unsqueeze(dim) if stacked else part)
    wide = [
        d for d in range(len(shape)) if d != dim and all(p.stride(d) == 0 or p.shape[d] == 1 for p in parts)
    ]
    small = parts
    for d in wide:
        small = [p.narrow(d, 0, 1) for p in small]
    ids = tidy(torch.cat(small, dim).expand(shape))
    if not stacked and len(wide) < len(shape) - 1 and not any(dim in varying(p) for p in parts):
        ids = trace.join_all(ids, keep=[d for d in range(len(shape)) if d != dim])
    return Value(ids, all(isinstance(r, Value) and r.zero for r in records))


def _adopted(trace: Trace, node: fx.Node, source: fx.Node, dims: set[int], dim: int) -> Tensor:
    """Return ids for a constant that is laid beside activations: new ones along the axis they follow."""
    record = trace.record(source)
    shape = trace.shape(source)
    if isinstance(record, Constant):
        for wanted in (*sorted(dims - {dim}), dim):
            for axis in record.axes:
                if wanted in dims and varying(axis.index) == (wanted,):
                    index = compact(axis.index)
                    ids = trace.issue(int(index.max()) + 1)[index].expand(shape)
                    trace.bind(record, ids, "constant", node)
                    return ids
    return blank(shape)


def pad(trace: Trace, node: fx.Node) -> Record:
    """New elements belong to the channel they continue, or to new channels where they lie along the
    channels.
    """
    value = trace.value(node.args[0])
    pads: Any = node.args[1]
    ids, shape = value.ids, trace.shape(node)
    for position in range(len(pads) // 2):
        d = ids.dim() - 1 - position
        before, after = int(trace.example(pads[2 * position])), int(trace.example(pads[2 * position + 1]))
        if not before and not after:
            continue
        if d not in varying(ids):
            sizes = list(ids.shape)
            sizes[d] = shape[d]
            ids = ids.narrow(d, 0, 1).expand(sizes)
            continue
        moves = before < 0 or after < 0 or op_name(node) not in ("pad", "constant_pad_nd")
        if moves:
            trace.rigid(ids, d, "is cropped or mirrored along the channels")
        ids = _padded(trace, ids, d, (before, after), new_channels=not moves)
    constant = float(argument(node, 3 if op_name(node) == "pad" else 2, "value", 0.0) or 0.0)
    return Value(tidy(ids), value.zero and constant == 0.0)


def _padded(trace: Trace, ids: Tensor, d: int, pads: tuple[int, int], new_channels: bool) -> Tensor:
    """Return ids with elements put on, or with negative `pads` taken off, at both ends of `d`; those put on
    are channels of their own, or belong to none.
    """
    before, after = pads
    parts = []
    small = compact(ids)
    for count in (before, None, after):
        if count is None:
            start, stop = max(0, -before), small.shape[d] - max(0, -after)
            parts.append(small.narrow(d, start, stop - start))
        elif count > 0:
            sizes = [1] * small.dim()
            sizes[d] = count
            new = trace.issue(count).reshape(sizes) if new_channels else blank(sizes)
            parts.append(new.expand([*small.shape[:d], count, *small.shape[d + 1 :]]))
    joined = torch.cat(parts, d)
    sizes = list(ids.shape)
    sizes[d] = joined.shape[d]
    return joined.expand(sizes)


def pixel_shuffle(trace: Trace, node: fx.Node) -> Record:
    """(n, c r^2, h, w) -> (n, c, h r, w r): the r^2 channels that make one output channel go together."""
    value = trace.value(node.args[0])
    vector = trace.vector(node.args[0], 1, "pixel_shuffle runs along another dimension")
    block = int(argument(node, 1, "upscale_factor", 1)) ** 2
    tied = trace.join_all(vector.reshape(-1, block), keep=(0,))[:, 0]
    return Value(tidy(tied.reshape(1, -1, 1, 1).expand(trace.shape(node))), value.zero)


def pixel_unshuffle(trace: Trace, node: fx.Node) -> Record:
    """(n, c, h r, w r) -> (n, c r^2, h, w)."""
    value = trace.value(node.args[0])
    vector = trace.vector(node.args[0], 1, "pixel_unshuffle runs along another dimension")
    block = int(argument(node, 1, "downscale_factor", 1)) ** 2
    wide = vector.repeat_interleave(block)
    return Value(tidy(wide.reshape(1, -1, 1, 1).expand(trace.shape(node))), value.zero)


def channel_shuffle(trace: Trace, node: fx.Node) -> Record:
    """(n, g m, h, w), transposed as (g, m) -> (m, g): position j of every group goes together."""
    value = trace.value(node.args[0])
    groups = int(argument(node, 1, "groups", 1))
    vector = trace.vector(node.args[0], 1, "channel_shuffle runs along another dimension")
    tied = trace.join_all(vector.reshape(groups, -1), keep=(1,))
    return Value(tidy(tied.t().reshape(1, -1, 1, 1).expand(trace.shape(node))), value.zero)


def made(trace: Trace, node: fx.Node) -> Record:
    """zeros, ones, arange ...: the graph's own tensors; their literal sizes follow what they meet."""
    return constant_of(node.name, trace.shape(node))


def moved_constant(trace: Trace, node: fx.Node) -> Record:
    """The movement of _PLAIN on constants."""
    record = trace.record(node.args[0])
    shape = trace.example(node)
    if not isinstance(record, Constant) or not isinstance(shape, (Tensor, tuple, list)):
        return trace.without_channels(node)
    if op_name(node).endswith("_scatter"):
        return record  # what is written has other contents, its places are the same
    source: Any = node.args[0]
    results = [run_on(trace, node, {source: axis.index}) for axis in record.axes]
    if isinstance(shape, (tuple, list)):
        return tuple(
            Constant(_axes(record, [r[i] for r in results]), tuple(s.shape)) for i, s in enumerate(shape)
        )
    axes = list(_axes(record, results))
    if op_name(node) in ("expand", "repeat"):
        axes += _grown(record, node, tuple(shape.shape))
    return Constant(tuple(axes), tuple(shape.shape))


def _axes(record: Constant, indices: list[Tensor]) -> tuple[Axis, ...]:
    return tuple(Axis(a.tensor, a.dim, tidy(i)) for a, i in zip(record.axes, indices, strict=True))


def _grown(record: Constant, node: fx.Node, shape: tuple[int, ...]) -> list[Axis]:
    """Return axes for the dimensions that an expand or repeat makes out of size 1."""
    before = (1,) * (len(shape) - len(record.shape)) + record.shape
    return [
        Axis(node.name, d, counting(d, shape)) for d in range(len(shape)) if before[d] == 1 and shape[d] > 1
    ]


def concat_constant(trace: Trace, node: fx.Node) -> Record:
    """Cat and stack of constants."""
    sources: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    axes: list[Axis] = []
    for at, source in enumerate(sources):
        record = trace.record(source)
        for axis in record.axes if isinstance(record, Constant) else ():
            parts = [axis.index if i == at else blank(trace.shape(s)) for i, s in enumerate(sources)]
            axes.append(Axis(axis.tensor, axis.dim, tidy(node.target(parts, *node.args[1:], **node.kwargs))))  # type: ignore[operator]
    return Constant(tuple(axes), trace.shape(node))


def combined_constant(trace: Trace, node: fx.Node) -> Record:
    """Arithmetic on constants: an element follows what each operand's element of its position follows."""
    example = trace.example(node)
    if not isinstance(example, Tensor):
        return trace.without_channels(node)
    shape = tuple(example.shape)
    axes: list[Axis] = []
    for source in node.all_input_nodes:
        record = trace.record(source)
        if not isinstance(record, Constant):
            continue
        aligned = (1,) * (len(shape) - len(record.shape)) + record.shape
        if any(a not in (1, s) for a, s in zip(aligned, shape, strict=True)) or len(aligned) > len(shape):
            continue
        axes += [Axis(a.tensor, a.dim, tidy(a.index.expand(shape))) for a in record.axes]
    return Constant(tuple(axes), shape)


def normalized_constant(trace: Trace, node: fx.Node) -> Record:
    """batch_norm of weights (weight standardization): its vectors follow dimension 1."""
    record, shape = trace.record(node.args[0]), trace.shape(node)
    axes = list(record.axes) if isinstance(record, Constant) else []
    trace.inexact_constants.append(
        (node, "weights are standardized over what is cut", tuple((a.tensor, a.dim) for a in axes))
    )
    for operand in node.args[1:5]:
        vector = trace.record(operand)
        if isinstance(vector, Constant):
            sizes = [1, -1, *([1] * (len(shape) - 2))]
            axes += [Axis(a.tensor, a.dim, tidy(a.index.reshape(sizes).expand(shape))) for a in vector.axes]
    return Constant(tuple(axes), shape)


def reduced_constant(trace: Trace, node: fx.Node) -> Record:
    """mean, var ... of constants: what they reduce over is followed no more."""
    record, example = trace.record(node.args[0]), trace.example(node)
    if not isinstance(record, Constant) or not isinstance(example, (Tensor, tuple, list)):
        return trace.without_channels(node)
    outputs = list(example) if isinstance(example, (tuple, list)) else [example]
    dims = sorted(reduced_dims(node, len(record.shape)), reverse=True)
    lost = tuple((a.tensor, a.dim) for a in record.axes if set(varying(a.index)) & set(dims))
    trace.inexact_constants.append((node, "weights are standardized over what is cut", lost))
    axes: list[Axis] = []
    for axis in record.axes:
        if not set(varying(axis.index)) & set(dims):
            index = axis.index
            for d in dims:
                index = index.narrow(d, 0, 1) if outputs[0].dim() == len(record.shape) else index.select(d, 0)
            axes.append(Axis(axis.tensor, axis.dim, index))
    found = tuple(Constant(tuple(axes), tuple(o.shape)) for o in outputs)
    return found if isinstance(example, (tuple, list)) else found[0]


def _unknown(trace: Trace, node: fx.Node) -> Record:
    return trace.unknown(node, f"{node.target} is not known to keep channels apart")


_MADE = [
    "zeros",
    "ones",
    "full",
    "empty",
    "arange",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "scalar_tensor",
]

HANDLERS = {
    **dict.fromkeys(_PLAIN, moved),
    "cat": concat,
    "stack": concat,
    "pad": pad,
    "constant_pad_nd": pad,
    "reflection_pad2d": pad,
    "replication_pad2d": pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "channel_shuffle": channel_shuffle,
    **dict.fromkeys(_MADE, made),
    "": _unknown,
}

CONSTANTS = {
    **dict.fromkeys(_PLAIN, moved_constant),
    "cat": concat_constant,
    "stack": concat_constant,
    "batch_norm": normalized_constant,
    **dict.fromkeys(_MADE, made),
    **dict.fromkeys(
        ["mean", "sum", "var", "std", "var_mean", "std_mean", "amax", "linalg_vector_norm", "norm"],
        reduced_constant,
    ),
    "": combined_constant,
}
