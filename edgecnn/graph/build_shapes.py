"""Lowerings of operators that move values: reshape, transpose, slice, split, pad, concat, resize."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.build import ProgramBuilder
from edgecnn.graph.nodes import argument, aten, layer_name
from edgecnn.graph.program import BATCH

GETITEM = operator.getitem

_BROADCASTING = frozenset({aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor})


def identity(builder: ProgramBuilder, node: fx.Node) -> str:
    """Pass the value through (dropout in eval mode, contiguous, clone)."""
    return builder.tensor(node.args[0])


def getitem(builder: ProgramBuilder, node: fx.Node) -> str:
    """Pick one value of an operator that gives several."""
    source, index = node.args
    values = builder.values.get(source)  # type: ignore[arg-type]
    picked = values[index] if isinstance(values, list) else None  # type: ignore[index]
    if picked is None:
        where = layer_name(source)  # type: ignore[arg-type]
        raise UnsupportedOpError(f"{where}: output {index} has no lowering")
    return str(picked)


def concat(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.cat."""
    tensors: Any = node.args[0]
    axis = int(argument(node, 1, "dim", 0)) % len(builder.shape(node))
    return builder.emit(node, "concat", [builder.tensor(t) for t in tensors], {"axis": axis})


def reshape(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower view, reshape, flatten, squeeze and unsqueeze; the new shape is the value's own."""
    x = builder.tensor(node.args[0])
    shape = builder.shape(node)
    if builder.tensors[x].shape == shape:
        return x
    if shape[0] != BATCH:
        raise UnsupportedOpError(f"{layer_name(node)} gives shape {shape}, expected the batch in dimension 0")
    return builder.emit(node, "reshape", [x], {"shape": shape})


def _permute(builder: ProgramBuilder, node: fx.Node, perm: tuple[int, ...]) -> str:
    x = builder.tensor(node.args[0])
    if perm == tuple(range(len(perm))):
        return x
    if perm[0] != 0:
        raise UnsupportedOpError(f"{layer_name(node)} moves the batch out of dimension 0")
    return builder.emit(node, "transpose", [x], {"perm": perm})


def permute(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.permute."""
    dims: Any = node.args[1]
    return _permute(builder, node, tuple(int(d) % len(dims) for d in dims))


def transpose(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.transpose of two dimensions."""
    rank = len(builder.shape(node))
    a, b = int(node.args[1]) % rank, int(node.args[2]) % rank  # type: ignore[arg-type]
    perm = list(range(rank))
    perm[a], perm[b] = b, a
    return _permute(builder, node, tuple(perm))


def _slice(builder: ProgramBuilder, node: fx.Node, axis: int, start: int, stop: int, step: int = 1) -> str:
    """Emit x[start:stop:step] along one axis, or nothing where that is all of it."""
    x = builder.tensor(node.args[0])
    shape = list(builder.tensors[x].shape)
    if axis == 0 and shape[0] == BATCH:
        if start == 0 and step == 1 and stop >= 2**31:
            return x
        raise UnsupportedOpError(f"{layer_name(node)} slices the batch")
    if (start, stop, step) == (0, shape[axis], 1):
        return x
    shape[axis] = len(range(start, stop, step))
    attributes = {"axis": axis, "start": start, "stop": stop, "step": step}
    return builder.emit_moved(node, "slice", [x], attributes, tuple(shape))


def slice_tensor(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.slice."""
    x = builder.tensor(node.args[0])
    shape = builder.tensors[x].shape
    axis = int(argument(node, 1, "dim", 0)) % len(shape)
    start, stop, step = (
        argument(node, 2, "start"),
        argument(node, 3, "end"),
        int(argument(node, 4, "step", 1)),
    )
    if axis == 0 and shape[0] == BATCH:
        return _slice(builder, node, 0, start or 0, 2**31 if stop is None else stop, step)
    size = shape[axis]
    start = 0 if start is None else int(start)
    stop = size if stop is None else int(stop)
    start = min(max(start + size if start < 0 else start, 0), size)
    stop = min(max(stop + size if stop < 0 else stop, start), size)
    return _slice(builder, node, axis, start, stop, step)


def narrow(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.narrow."""
    axis = int(node.args[1]) % len(builder.shape(node))  # type: ignore[arg-type]
    start, length = int(node.args[2]), int(node.args[3])  # type: ignore[arg-type]
    return _slice(builder, node, axis, start, start + length)


def select(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.select: a slice of one, then its dimension dropped."""
    x = builder.tensor(node.args[0])
    x_shape = builder.tensors[x].shape
    axis = int(node.args[1]) % len(x_shape)  # type: ignore[arg-type]
    index = int(node.args[2]) % x_shape[axis]  # type: ignore[arg-type]
    picked = _slice(builder, node, axis, index, index + 1)
    return builder.emit(node, "reshape", [picked], {"shape": builder.shape(node)})


def unbind(builder: ProgramBuilder, node: fx.Node) -> list[str]:
    """Lower aten.unbind: each slice of one, its dimension dropped."""
    shapes = builder.shapes[node.name]
    x = builder.tensor(node.args[0])
    axis = int(argument(node, 1, "dim", 0)) % len(builder.tensors[x].shape)
    found = []
    for index, shape in enumerate(shapes):
        picked = _slice(builder, node, axis, index, index + 1)
        found.append(builder.emit(node, "reshape", [picked], {"shape": tuple(shape)}, tuple(shape)))
    return found


def index(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower x[..., indices, ...] with known indices along one dimension."""
    x, given = builder.tensor(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    places = [i for i, part in enumerate(given) if part is not None]
    known = builder.constant_value(given[places[0]]) if len(places) == 1 else None
    if known is None or known.dim() != 1 or known.is_floating_point() or known.dtype is torch.bool:
        raise UnsupportedOpError(f"{layer_name(node)} picks by several lists or unknown ones, expected one")
    axis, size = places[0], builder.tensors[x].shape[places[0]]
    if axis == 0:
        raise UnsupportedOpError(f"{layer_name(node)} picks images of the batch")
    indices = tuple(int(i) % size for i in known)
    return builder.emit(node, "gather", [x], {"axis": axis, "indices": indices})


def split(builder: ProgramBuilder, node: fx.Node) -> list[str]:
    """Lower split, split_with_sizes and chunk as slices; the sizes are read off the values."""
    pieces = builder.shapes[node.name]
    axis_default = 0
    axis = int(argument(node, 2, "dim", axis_default)) % len(pieces[0])
    if axis == 0:
        raise UnsupportedOpError(f"{layer_name(node)} splits the batch")
    found, start = [], 0
    for piece in pieces:
        found.append(_slice(builder, node, axis, start, start + piece[axis]))
        start += piece[axis]
    return found


def pad(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower constant padding; PyTorch lists (before, after) from the last dimension on."""
    x = builder.tensor(node.args[0])
    amounts: Any = node.args[1]
    constant = node.target is aten.constant_pad_nd.default
    mode = "constant" if constant else argument(node, 2, "mode", "constant")
    value = argument(node, 2, "value", 0) if constant else argument(node, 3, "value", 0)
    if mode not in ("constant", "reflect") or (mode == "reflect" and min(amounts) < 0):
        raise UnsupportedOpError(
            f"{layer_name(node)} pads by {list(amounts)} in mode {mode!r}, expected 'constant' or 'reflect', "
            "the latter without cropping"
        )
    rank = len(builder.shape(node))
    pads = [(0, 0)] * rank
    for i in range(len(amounts) // 2):
        pads[rank - 1 - i] = (int(amounts[2 * i]), int(amounts[2 * i + 1]))
    if not any(before or after for before, after in pads):
        return x
    if pads[0] != (0, 0):
        raise UnsupportedOpError(f"{layer_name(node)} pads the batch")
    for axis, (before, after) in enumerate(pads):
        if min(before, after) < 0:
            size = builder.tensors[x].shape[axis]
            start, stop = max(-before, 0), size - max(-after, 0)
            shape = (*builder.tensors[x].shape[:axis], stop - start, *builder.tensors[x].shape[axis + 1 :])
            bounds = {"axis": axis, "start": start, "stop": stop, "step": 1}
            x = builder.emit_moved(node, "slice", [x], bounds, shape)
    pads = [(max(before, 0), max(after, 0)) for before, after in pads]
    if not any(before or after for before, after in pads):
        return x
    if mode == "reflect":
        return builder.emit(node, "pad", [x], {"pads": tuple(pads), "value": 0.0, "mode": "reflect"})
    return builder.emit(node, "pad", [x], {"pads": tuple(pads), "value": float(value or 0.0)})


def resize(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower nearest and bilinear upsampling to the size that the value has.

    PyTorch steps by a scale factor where it was given one, the runtimes by the ratio of the sizes.
    """
    x = builder.tensor(node.args[0])
    out = builder.shape(node)
    bilinear = "bilinear" in str(node.target)
    sizes = builder.tensors[x].shape[2:]
    for size, target, factor in zip(sizes, out[2:], _scale_factors(node, bilinear), strict=True):
        if factor is not None and abs(size * factor - target) > 1e-3:
            raise UnsupportedOpError(
                f"{layer_name(node)} enlarges {size} by {factor:g} to {target}, expected a whole number",
                hint="give interpolate a size, or recompute_scale_factor=True",
            )
    align = bool(argument(node, 2, "align_corners", False)) if bilinear else False
    if builder.tensors[x].shape == out:
        return x
    mode = "bilinear" if bilinear else "nearest"
    return builder.emit(node, "resize", [x], {"size": (out[2], out[3]), "mode": mode, "align_corners": align})


def _scale_factors(node: fx.Node, bilinear: bool) -> list[float | None]:
    """Return the factors for (h, w) that the resize was given, None where it was given sizes."""
    first = 3 if bilinear else 2
    if "vec" in str(node.target):
        factors = argument(node, first, "scale_factors")
        return [None, None] if factors is None else [float(f) for f in factors]
    return [argument(node, first, "scales_h"), argument(node, first + 1, "scales_w")]


def expand(builder: ProgramBuilder, node: fx.Node) -> str:
    """Pass an expand through where only broadcasting arithmetic reads it, else join copies."""
    x, shape = builder.tensor(node.args[0]), builder.shape(node)
    if builder.tensors[x].shape == shape or all(_broadcasts(builder, node, user) for user in _readers(node)):
        return x
    if len(shape) != len(builder.tensors[x].shape):
        raise UnsupportedOpError(
            f"{layer_name(node)} adds dimensions for an operator that does not broadcast"
        )
    for axis, size in enumerate(shape):
        old = builder.tensors[x].shape
        if old[axis] != size:
            wide = (*old[:axis], size, *old[axis + 1 :])
            x = builder.emit_moved(node, "concat", [x] * size, {"axis": axis}, wide)
    return x


def _broadcasts(builder: ProgramBuilder, node: fx.Node, user: fx.Node) -> bool:
    """Whether an operator gives the same without the expand, by a value that has the result's shape."""
    others = [builder.shape(n) for n in user.all_input_nodes if _origin(n) is not node]
    return user.target in _BROADCASTING and builder.shape(user) in others


def unfold(builder: ProgramBuilder, node: fx.Node) -> str:
    """Lower aten.unfold: windows along a dimension, their values in a new last one."""
    x, shape = builder.tensor(node.args[0]), builder.shape(node)
    old = builder.tensors[x].shape
    axis, size, step = int(node.args[1]) % len(old), int(node.args[2]), int(node.args[3])  # type: ignore[arg-type]
    if axis == 0:
        raise UnsupportedOpError(f"{layer_name(node)} takes windows along the batch")
    perm = (*(i for i in range(len(old)) if i != axis), axis)
    windows = []
    for start in range(0, shape[axis] * step, step):
        piece = _slice(builder, node, axis, start, start + size)
        turned = tuple(builder.tensors[piece].shape[i] for i in perm)
        piece = builder.emit_moved(node, "transpose", [piece], {"perm": perm}, turned)
        one = (*shape[:axis], 1, *shape[axis + 1 :])
        windows.append(builder.emit_moved(node, "reshape", [piece], {"shape": one}, one))
    return builder.emit(node, "concat", windows, {"axis": axis})


def _readers(node: fx.Node) -> list[fx.Node]:
    """Return the operators that read a value, through quantize and dequantize."""
    found: list[fx.Node] = []
    for user in node.users:
        found += _readers(user) if "quantized_decomposed" in str(user.target) else [user]
    return found


def _origin(node: fx.Node) -> fx.Node:
    """Return the operator that made a value, through quantize and dequantize."""
    while "quantized_decomposed" in str(node.target) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
