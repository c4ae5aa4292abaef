"""Which elements of every value are left after a cut, and the literal sizes that follow from it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from edgecnn.errors import PassError
from edgecnn.graph.channels import Coupling
from edgecnn.graph.nodes import add_constant, argument, aten, insert_call, layer_name

Mask = npt.NDArray[np.bool_]

MAX_SLICES = 16
"""Slices that stand for one uneven pick of channels, at most."""


class Kept:
    """Element masks of the values of a graph under one cut.

    Args:
        coupling: of the uncut graph.
        removed: channel ids.
    """

    def __init__(self, coupling: Coupling, removed: Collection[int]) -> None:
        self._coupling = coupling
        self._gone = np.asarray(sorted(removed), np.int64)

    def along_tensor(self, tensor: str) -> dict[int, Mask]:
        """Return dimension -> which indices of a parameter or buffer stay, where some go."""
        info = self._coupling.tensors.get(tensor)
        found: dict[int, Mask] = {}
        for dim, ids in (info.channels if info else {}).items():
            keep = ~np.isin(ids, self._gone)
            if not keep.all():
                found[dim] = keep
        return found

    def along(self, node: fx.Node, item: int | None = None) -> list[Mask] | None:
        """Return which indices stay along each dimension of a node's value; None if nothing goes.

        Args:
            node: of the uncut graph (by name).
            item: which of its values, for a node that gives several.

        Raises:
            PassError: if what stays is not a box.
        """
        mask = self._elements(node, item)
        if mask is None or mask.all():
            return None
        keep = [
            np.any(mask, axis=tuple(e for e in range(mask.ndim) if e != d)) if mask.ndim > 1 else mask
            for d in range(mask.ndim)
        ]
        box: Mask = np.ones((), bool)
        for vector in keep:
            box = box[..., None] & vector
        if not np.array_equal(box, mask):
            raise PassError(
                f"{layer_name(node)}: what is left of its value is no rectangular tensor",
                hint="this is a bug in the channel coupling; please report the network",
            )
        shape = self._shape(node, item)
        return [np.broadcast_to(v, (s,)) for v, s in zip(keep, shape, strict=True)]

    def shape(self, node: fx.Node, item: int | None = None) -> tuple[int, ...]:
        """Return the shape of a node's value after the cut, at the coupling's batch size."""
        keep = self.along(node, item)
        before = self._shape(node, item)
        return before if keep is None else tuple(int(k.sum()) for k in keep)

    def old_shape(self, node: fx.Node, item: int | None = None) -> tuple[int, ...]:
        """Return the shape before the cut."""
        return self._shape(node, item)

    def _shape(self, node: fx.Node, item: int | None) -> tuple[int, ...]:
        found = self._coupling.shapes[node.name]
        return tuple(found if item is None else found[item])

    def _elements(self, node: fx.Node, item: int | None) -> Mask | None:
        """Return the mask of elements, cut to size 1 along dimensions that nothing follows."""
        value = self._coupling.values.get(node.name)
        if value is not None:
            ids = value[item or 0] if isinstance(value, tuple) else value
            if ids.size == 0:
                return None
            small = ids[tuple(slice(0, 1) if s == 0 else slice(None) for s in ids.strides)]
            found: Mask = ~np.isin(small, self._gone)
            return found
        mask: Mask | None = None
        for tensor, dim, index in self._coupling.constants.get(node.name, ()):
            keep = self.along_tensor(tensor).get(dim)
            if keep is not None:
                small = index[tuple(slice(0, 1) if s == 0 else slice(None) for s in index.strides)]
                own = keep[np.maximum(small, 0)] | (small < 0)
                mask = own if mask is None else mask & own
        return mask


Rewrite = Callable[[fx.GraphModule, fx.Node, Kept], None]


def rewrite_sizes(graph: fx.GraphModule, kept: Kept) -> None:
    """Change every literal size of `graph` (in place) to what is left after the cut.

    Raises:
        PassError: naming a node whose sizes cannot be written down.
    """
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        rewrite = _REWRITES.get(str(node.target._schema.name.split("::")[-1]))
        if rewrite is not None:
            rewrite(graph, node, kept)


def _set(node: fx.Node, position: int, name: str, value: Any) -> None:
    """Replace an argument given by position or by keyword."""
    if name in node.kwargs or len(node.args) <= position:
        node.kwargs = {**node.kwargs, name: value}
    else:
        node.args = (*node.args[:position], value, *node.args[position + 1 :])


def _new_sizes(
    graph: fx.GraphModule, node: fx.Node, sizes: Sequence[Any], old: Sequence[int], new: Sequence[int]
) -> list[Any]:
    """Return a literal size list for a value that goes from shape `old` to `new`."""
    found = list(sizes)
    for d, (before, after) in enumerate(zip(old, new, strict=True)):
        if before == after or (isinstance(found[d], int) and found[d] == -1):
            continue
        if isinstance(found[d], int):
            found[d] = after
        elif not any(isinstance(s, int) and s == -1 for s in found):
            found[d] = -1
        else:  # computed from the batch: scale it
            with graph.graph.inserting_before(node):
                scaled = graph.graph.call_function(operator.mul, (found[d], after))
                found[d] = graph.graph.call_function(operator.floordiv, (scaled, before))
    return found


def _sizes_at(position: int, name: str) -> Rewrite:
    def rewrite(graph: fx.GraphModule, node: fx.Node, kept: Kept) -> None:
        old, new = kept.old_shape(node), kept.shape(node)
        if old != new:
            sizes: Any = argument(node, position, name)
            _set(node, position, name, _new_sizes(graph, node, sizes, old, new))

    return rewrite


def _unflatten(graph: fx.GraphModule, node: fx.Node, kept: Kept) -> None:
    old, new = kept.old_shape(node), kept.shape(node)
    if old != new:
        sizes: Any = argument(node, 2, "sizes")
        start = int(argument(node, 1, "dim")) % (len(old) - len(sizes) + 1)
        span = slice(start, start + len(sizes))
        _set(node, 2, "sizes", _new_sizes(graph, node, sizes, old[span], new[span]))


def _repeat(graph: fx.GraphModule, node: fx.Node, kept: Kept) -> None:  # noqa: ARG001
    old, new = kept.old_shape(node), kept.shape(node)
    source = kept.shape(node.args[0]) if isinstance(node.args[0], fx.Node) else ()
    source = (1,) * (len(new) - len(source)) + source
    if old != new:
        repeats: Any = argument(node, 1, "repeats")
        found = [n // s if o != n else r for o, n, s, r in zip(old, new, source, repeats, strict=True)]
        _set(node, 1, "repeats", found)


def _groups_left(node: fx.Node, kept: Kept, groups: int, dim: int) -> int:
    """Return how many of a layer's groups keep anything of its input."""
    source: Any = node.args[0]
    keep = kept.along(source)
    return groups if keep is None else int(keep[dim].reshape(groups, -1).any(1).sum())


def _convolution(graph: fx.GraphModule, node: fx.Node, kept: Kept) -> None:  # noqa: ARG001
    position = 8 if node.target is aten.convolution.default else 6
    groups = int(argument(node, position, "groups", 1))
    left = _groups_left(node, kept, groups, 1) if groups > 1 else 1
    if left != groups:
        _set(node, position, "groups", left)


def _group_norm(graph: fx.GraphModule, node: fx.Node, kept: Kept) -> None:  # noqa: ARG001
    groups = int(argument(node, 1, "num_groups"))
    left = _groups_left(node, kept, groups, 1)
    if left != groups:
        _set(node, 1, "num_groups", left)


def _layer_norm(graph: fx.GraphModule, node: fx.Node, kept: Kept) -> None:  # noqa: ARG001
    sizes: Any = argument(node, 1, "normalized_shape")
    new = list(kept.shape(node)[-len(sizes) :])
    if new != list(sizes):
        _set(node, 1, "normalized_shape", new)


def _split(graph: fx.GraphModule, node: fx.Node, kept: Kept) -> None:
    count = len(kept.old_shape(node))
    name = "split_sizes" if node.target is aten.split_with_sizes.default else "dim"
    dim = int(argument(node, 2, "dim", 0))
    sizes = [kept.shape(node, i)[dim] for i in range(count)]
    if sizes == [kept.old_shape(node, i)[dim] for i in range(count)]:
        return
    if name == "split_sizes":
        _set(node, 1, name, sizes)
        return
    node.target = aten.split_with_sizes.default
    node.args, node.kwargs = (node.args[0], sizes, dim), {}
    graph.graph.lint()


def _slice(graph: fx.GraphModule, node: fx.Node, kept: Kept) -> None:
    source: Any = node.args[0]
    keep = kept.along(source)
    if keep is None:
        return
    dim = int(argument(node, 1, "dim", 0)) % len(keep)
    along = keep[dim]
    start, stop, step = (argument(node, p, n) for p, n in ((2, "start"), (3, "end"), (4, "step")))
    if along.all() or not all(v is None or isinstance(v, int) for v in (start, stop, step)):
        return
    first, last, step = slice(start, stop, step).indices(len(along))
    if step == 1:
        before = np.concatenate([[0], np.cumsum(along)])
        node.args, node.kwargs = (source, dim, int(before[first]), int(before[max(first, last)])), {}
        return
    _pick(graph, node, along, np.arange(first, last, step), dim)


def _narrow(graph: fx.GraphModule, node: fx.Node, kept: Kept) -> None:  # noqa: ARG001
    source: Any = node.args[0]
    keep = kept.along(source)
    if keep is None:
        return
    dim = int(argument(node, 1, "dim")) % len(keep)
    start, length = argument(node, 2, "start"), argument(node, 3, "length")
    if keep[dim].all() or not (isinstance(start, int) and isinstance(length, int)):
        return
    before = np.concatenate([[0], np.cumsum(keep[dim])])
    first = start % len(keep[dim])
    left = int(before[first + length] - before[first])
    node.args, node.kwargs = (source, dim, int(before[first]), left), {}


def _even_runs(indices: Sequence[int]) -> list[range]:
    """Return ascending indices as ranges of even steps; [] where they do not ascend."""
    if any(b <= a for a, b in pairwise(indices)):
        return []
    runs: list[range] = []
    start = 0
    while start < len(indices):
        stop = start + 1
        step = indices[stop] - indices[start] if stop < len(indices) else 1
        while stop < len(indices) and indices[stop] - indices[stop - 1] == step:
            stop += 1
        runs.append(range(indices[start], indices[stop - 1] + 1, step))
        start = stop
    return runs


def _pick(graph: fx.GraphModule, node: fx.Node, along: Mask, picked: npt.NDArray[np.int64], dim: int) -> None:
    """Turn a node that picks indices along a dimension into slices of what is left, or index_select."""
    moved = np.cumsum(along) - 1
    found = moved[picked[along[picked]]]
    runs = _even_runs(found.tolist())
    if 0 < len(runs) <= MAX_SLICES:  # every file format has slices
        calls = [(node.args[0], dim, run.start, run.stop, run.step) for run in runs]
        node.target, node.args, node.kwargs = aten.slice.Tensor, calls[0], {}
        if len(calls) > 1:
            parts = [insert_call(graph, node, aten.slice.Tensor, call, like=node) for call in calls]
            node.target, node.args = aten.cat.default, (parts, dim)
        return
    index = torch.from_numpy(found)
    constant = add_constant(graph, node, f"{node.name}_index", index)
    node.target = aten.index_select.default
    node.args, node.kwargs = (node.args[0], dim, constant), {}


def _index_select(graph: fx.GraphModule, node: fx.Node, kept: Kept) -> None:
    from edgecnn.graph.nodes import fetch

    source: Any = node.args[0]
    keep = kept.along(source)
    dim = int(argument(node, 1, "dim"))
    index: Any = argument(node, 2, "index")
    if keep is not None and not keep[dim].all():
        _pick(graph, node, keep[dim], fetch(graph, index).numpy(), dim)


def _pad(graph: fx.GraphModule, node: fx.Node, kept: Kept) -> None:  # noqa: ARG001
    keep = kept.along(node)
    if keep is None:
        return
    pads: Any = list(node.args[1])  # type: ignore[arg-type]
    for position in range(len(pads) // 2):
        along = keep[len(keep) - 1 - position]
        before, after = pads[2 * position], pads[2 * position + 1]
        if not along.all():
            pads[2 * position] = int(along[:before].sum())
            pads[2 * position + 1] = int(along[len(along) - after :].sum())
    _set(node, 1, "pad", pads)


def _attention(graph: fx.GraphModule, node: fx.Node, kept: Kept) -> None:  # noqa: ARG001
    query: Any = node.args[0]
    before, after = kept.old_shape(query)[-1], kept.shape(query)[-1]
    if before != after and argument(node, 6, "scale") is None:
        _set(node, 6, "scale", float(before**-0.5))


_REWRITES: dict[str, Rewrite] = {
    **{name: _sizes_at(1, "size") for name in ("view", "reshape", "_unsafe_view", "expand")},
    **{name: _sizes_at(1, "size") for name in ("new_zeros", "new_ones", "new_full", "new_empty")},
    **{name: _sizes_at(0, "size") for name in ("zeros", "ones", "full", "empty")},
    "unflatten": _unflatten,
    "repeat": _repeat,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "conv_transpose1d": _convolution,
    "conv_transpose2d": _convolution,
    "conv_transpose3d": _convolution,
    "convolution": _convolution,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _split),
    "slice": _slice,
    "narrow": _narrow,
    "index_select": _index_select,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "scaled_dot_product_attention": _attention,
}
