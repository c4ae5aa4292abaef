"""From what the operators said to classes of channels that can be cut.

1. A value must stay a box: if its ids follow several dimensions, no cut of a single id leaves a tensor.
Then all ids
   along the other dimensions are joined, and the one dimension with the most different slices stays free.
2. A rigid dimension must keep its size: ids that follow it alone are frozen.
3. Constants take the ids of the values they are read with; a constant read twice joins both.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx

from edgecnn.graph.channels.trace import Binding, Trace
from edgecnn.graph.channels.union import NONE, Ints
from edgecnn.graph.channels.values import Axis, Value, common, compact, spread, varying
from edgecnn.graph.nodes import layer_name

_UNTRACED = "is combined with a constant whose channels cannot be told"


@dataclass
class Carrier:
    """One dimension of one constant and the ids along it."""

    ids: Ints
    role: str
    node: fx.Node
    reads: int = field(default=1)


def resolve(trace: Trace) -> dict[tuple[str, int], Carrier]:
    """Settle the classes and return the ids along each tensor dimension."""
    _make_boxes(trace)
    _keep_rigid(trace)
    carriers: dict[tuple[str, int], Carrier] = {}
    for binding in trace.bindings:
        _bind(trace, binding, carriers)
    return carriers


def _make_boxes(trace: Trace) -> None:
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for record in trace.records.values():
        for item in record if isinstance(record, tuple) else (record,):
            if isinstance(item, Value) and len(varying(item.ids)) > 1:
                key = (item.ids.data_ptr(), item.ids.stride())
                if key not in seen:
                    seen.add(key)
                    _make_box(trace, item.ids)


def _make_box(trace: Trace, ids: Tensor) -> None:
    found = trace.resolved(ids)
    dims = varying(found)
    if len(dims) < 2:
        return
    slices = [len(torch.unique(compact(found).movedim(d, 0).flatten(1), dim=0)) for d in dims]
    most = max(slices)
    keep = max(d for d, count in zip(dims, slices, strict=True) if count == most)
    trace.join_all(found, keep=(keep,))


def _keep_rigid(trace: Trace) -> None:
    for rigid in trace.rigids:
        found = trace.resolved(rigid.ids)
        dims = varying(found)
        if rigid.dim not in dims:
            continue
        if len(dims) > 1:
            trace.join_all(found, keep=[d for d in dims if d != rigid.dim])
        else:
            trace.freeze(found, rigid.reason)


def _bind(trace: Trace, binding: Binding, carriers: dict[tuple[str, int], Carrier]) -> None:
    """Give the axes of a constant that follow the same dimension as the ids those ids."""
    ids = trace.resolved(binding.ids)
    dims = varying(ids)
    if not dims:
        if ids.numel() > 0:
            _freeze_whole(trace, binding, ids)
        return
    if len(dims) > 1:
        trace.freeze(ids, _UNTRACED)
        return
    candidates = [a for a in binding.constant.axes if dims[0] in varying(a.index)]
    exact = [a for a in candidates if _is_function(a, ids)]
    chosen = exact or (candidates if len(candidates) == 1 else [])
    if not chosen and binding.constant.shape[dims[0]] > 1:
        trace.freeze(ids, f"{_UNTRACED} ({layer_name(binding.node)})")
    for axis in chosen:
        _carry(trace, binding, axis, ids, carriers)


def _freeze_whole(trace: Trace, binding: Binding, ids: Tensor) -> None:
    """One id all along a constant: without it nothing would be left of the constant."""
    first = compact(ids).flatten()[:1]
    if bool((first >= 0).all()):
        trace.freeze(first, f"is all there is of a layer ({layer_name(binding.node)})")


def _pairs(axis: Axis, ids: Tensor) -> tuple[Ints, Ints]:
    """Return index and id of every element, without repeats."""
    laid, small = spread(*common(axis.index.expand(ids.shape), ids))
    index, found = laid.flatten().numpy(), small.flatten().numpy()
    if len(index) and (np.diff(index) > 0).all() and index[0] >= 0:
        return index, found
    present = index >= 0
    span = int(found.max(initial=0)) + 2
    codes = np.unique(index[present] * span + found[present] + 1)
    return codes // span, codes % span - 1


def _is_function(axis: Axis, ids: Tensor) -> bool:
    index, _ = _pairs(axis, ids)
    return bool((np.diff(index) > 0).all())


def _carry(
    trace: Trace, binding: Binding, axis: Axis, ids: Tensor, carriers: dict[tuple[str, int], Carrier]
) -> None:
    index, found = _pairs(axis, ids)
    size = int(axis.index.max()) + 1
    key = (axis.tensor, axis.dim)
    carrier = carriers.get(key)
    if carrier is None:
        carrier = carriers[key] = Carrier(np.full(size, NONE, np.int64), binding.role, binding.node, reads=0)
    elif len(carrier.ids) < size:
        carrier.ids = np.concatenate([carrier.ids, np.full(size - len(carrier.ids), NONE, np.int64)])
    held = carrier.ids[index]
    if carrier.reads:
        lost = np.concatenate([held[(held >= 0) & (found < 0)], found[(held < 0) & (found >= 0)]])
        known = np.isin(index, np.flatnonzero(carrier.ids >= 0))
        if len(lost) and known.any():
            trace.freeze(torch.from_numpy(lost), "shares a constant with values that belong to no channel")
    trace.classes.join(held, found)
    free = held < 0
    carrier.ids[index[free]] = found[free]
    repeated = np.flatnonzero(index[1:] == index[:-1])
    trace.classes.join(found[repeated], found[repeated + 1])
    carrier.reads += 1
