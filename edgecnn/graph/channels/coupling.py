"""Channel coupling of a network: which channels stand and fall together, and what each cut costs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgecnn.graph.channels import contraction, layers, movement, pointwise
from edgecnn.graph.channels.records import Coupling, Group, Member, TensorInfo, WeightedLayer
from edgecnn.graph.channels.resolve import Carrier, resolve
from edgecnn.graph.channels.trace import Layer, Trace, run_trace
from edgecnn.graph.channels.union import NONE, Ints
from edgecnn.graph.channels.values import Constant, Value, compact
from edgecnn.graph.nodes import argument, layer_name
from edgecnn.model import Model

_HANDLERS = {**movement.HANDLERS, **pointwise.HANDLERS, **layers.HANDLERS, **contraction.HANDLERS}
_ROLES = ("out", "in", "norm", "constant")
_NO_CHANNEL = "carries no channel that can be cut"


def couple_channels(model: Model) -> Coupling:
    """Find which channels of a network stand and fall together.

    Args:
        model: float, batch norms folded or not; left as it is.

    Returns:
        The groups, the layers and the channel ids of every value.

    Raises:
        UnsupportedOpError: if the graph does not run.

    Source: the grouping problem of Fang et al. 2023, arXiv:2301.12900 (DepGraph), section 3.1, solved here by
    running the graph on ids instead of following layer-to-layer rules.
    """
    with torch.no_grad():
        trace = run_trace(model, _HANDLERS, movement.CONSTANTS)
        carriers = resolve(trace)
    reasons = _reasons(trace)
    real = {
        **{n: (tuple(p.shape), True) for n, p in model.graph.named_parameters()},
        **{n: (tuple(b.shape), False) for n, b in model.graph.named_buffers()},
    }
    used = {str(node.target) for node in model.graph.graph.nodes if node.op == "get_attr"}
    dims = {key: trace.classes.find(carrier.ids) for key, carrier in carriers.items()}
    groups = _groups(carriers, dims, reasons, real)
    final = _final_ids(trace, {c for g in groups if g.frozen is None for c in g.channels})
    tensors: dict[str, TensorInfo] = {}
    for name in (*(n for n in real if n in used), *sorted({t for t, _ in dims if t not in real})):
        shape, trained = real.get(name, ((), False))
        tensors[name] = TensorInfo(
            shape, trained, {d: final[ids] for (t, d), ids in dims.items() if t == name}
        )
    prunable, frozen = _prunable(tensors, dims, reasons)
    return Coupling(
        groups=groups,
        layers=tuple(_layer(trace, layer, final) for layer in trace.layers),
        values=_values(trace, final),
        tensors=tensors,
        constants={
            node.name: tuple((a.tensor, a.dim, a.index.numpy()) for a in record.axes)
            for node, record in trace.records.items()
            if isinstance(record, Constant)
        },
        inexact=_inexact(trace, dims, final),
        prunable_params=prunable,
        params=sum(prod(t.shape) for t in tensors.values() if t.is_parameter),
        frozen_reasons=frozen,
        shapes=_shapes(trace),
        batch=trace.batch,
    )


def _reasons(trace: Trace) -> dict[int, str]:
    """Return class -> why it cannot be cut, the first reason given."""
    reasons: dict[int, str] = {}
    for ids, reason in trace.frozen:
        for root in np.unique(trace.classes.find(ids.numpy())).tolist():
            if root >= 0:
                reasons.setdefault(root, reason)
    return reasons


def _final_ids(trace: Trace, cuttable: set[int]) -> Ints:
    """Return for every id issued its class if that can be cut, else NONE; the last entry stands for NONE."""
    roots = trace.classes.find(np.arange(len(trace.classes), dtype=np.int64))
    keep = np.zeros(len(roots) + 1, bool)
    keep[list(cuttable)] = True
    found: Ints = np.append(np.where(keep[roots], roots, NONE), NONE)
    return found


def _value_ids(ids: Tensor, final: Ints) -> Ints:
    return np.broadcast_to(final[compact(ids).numpy()], tuple(ids.shape))


def _values(trace: Trace, final: Ints) -> dict[str, Ints | tuple[Ints, ...]]:
    found: dict[str, Ints | tuple[Ints, ...]] = {}
    for node, record in trace.records.items():
        if isinstance(record, Value):
            found[node.name] = _value_ids(record.ids, final)
        elif isinstance(record, tuple):
            found[node.name] = tuple(
                _value_ids(r.ids, final) if isinstance(r, Value) else np.zeros(0, np.int64) for r in record
            )
    return found


def _shapes(trace: Trace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for node in trace.records:
        example = trace.example(node) if node.op != "output" else None
        if isinstance(example, Tensor):
            found[node.name] = tuple(int(s) for s in example.shape)
        elif isinstance(example, (tuple, list)):
            found[node.name] = tuple(
                tuple(int(s) for s in e.shape) if isinstance(e, Tensor) else () for e in example
            )
    return found


def _groups(
    carriers: Mapping[tuple[str, int], Carrier],
    dims: Mapping[tuple[str, int], Ints],
    reasons: Mapping[int, str],
    real: Mapping[str, tuple[tuple[int, ...], bool]],
) -> tuple[Group, ...]:
    """Partition the classes by the set of tensor dimensions they occur in."""
    places: dict[int, list[tuple[str, int]]] = {}
    for key, ids in dims.items():
        if key[0] in real:
            for root in np.unique(ids[ids >= 0]).tolist():
                places.setdefault(root, []).append(key)
    parts: dict[tuple[tuple[tuple[str, int], ...], str | None], list[int]] = {}
    for root in sorted(places):
        parts.setdefault((tuple(places[root]), reasons.get(root)), []).append(root)
    groups = []
    for index, ((keys, reason), channels) in enumerate(parts.items()):
        members = [_member(carriers[key], key, dims[key], channels) for key in keys]
        members.sort(key=lambda m: _ROLES.index(m.role))
        groups.append(Group(index, tuple(channels), tuple(members), reason))
    return tuple(groups)


def _member(carrier: Carrier, key: tuple[str, int], ids: Ints, channels: list[int]) -> Member:
    order = np.argsort(ids, kind="stable")
    ordered, wanted = ids[order], np.asarray(channels, np.int64)
    starts = np.searchsorted(ordered, wanted).tolist()
    stops = np.searchsorted(ordered, wanted, side="right").tolist()
    indices = order.tolist()
    positions = tuple(tuple(indices[a:b]) for a, b in zip(starts, stops, strict=True))
    return Member(key[0], key[1], carrier.role, carrier.node.name, layer_name(carrier.node), positions)


def _prunable(
    tensors: Mapping[str, TensorInfo], dims: Mapping[tuple[str, int], Ints], reasons: Mapping[int, str]
) -> tuple[int, dict[str, int]]:
    """Return how many parameters lie in a dimension that can be cut, and reason -> how many do not."""
    prunable, frozen = 0, dict[str, int]()
    for name, tensor in tensors.items():
        if not tensor.is_parameter:
            continue
        kept = 1
        for d, size in enumerate(tensor.shape):
            kept *= int((tensor.channels[d] < 0).sum()) if d in tensor.channels else size
        prunable += prod(tensor.shape) - kept
        if kept:
            own = [ids for (t, _), ids in dims.items() if t == name]
            why = [reasons[r] for ids in own for r in np.unique(ids[ids >= 0]).tolist() if r in reasons]
            reason = why[0] if why else _NO_CHANNEL
            frozen[reason] = frozen.get(reason, 0) + kept
    return prunable, dict(sorted(frozen.items(), key=lambda item: -item[1]))


def _layer(trace: Trace, layer: Layer, final: Ints) -> WeightedLayer:
    node = layer.node
    weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias") if layer.kind != "matmul" else None
    shape, x = trace.shape(weight), trace.shape(node.args[0])
    out = trace.shape(node)
    if layer.kind == "linear":
        macs = prod(out) * len(layer.input_ids)
    else:
        macs = prod(x if layer.kind == "conv_transpose2d" else out) * prod(shape[1:])
    names = [str(n.target) if n is not None and n.op == "get_attr" else None for n in (weight, bias)]

    def channels(ids: Tensor) -> tuple[int, ...]:
        return tuple(final[ids.numpy()].tolist())

    return WeightedLayer(
        node=node.name,
        layer=layer_name(node),
        kind=layer.kind,
        weight=names[0] or weight.name,
        bias=names[1],
        output_channels=channels(layer.output_ids),
        input_channels=channels(layer.input_ids),
        groups=layer.groups,
        macs=macs // trace.batch,
        params=prod(shape) + (prod(trace.shape(bias)) if bias is not None else 0),
        positions=channels(layer.position_ids),
    )


def _inexact(
    trace: Trace, dims: Mapping[tuple[str, int], Ints], final: Ints
) -> tuple[tuple[str, str, frozenset[int]], ...]:
    found = [
        (node.name, reason, frozenset(np.unique(final[compact(ids).numpy()]).tolist()) - {NONE})
        for node, reason, ids in trace.inexact
    ]
    for node, reason, keys in trace.inexact_constants:
        ids = {i for key in keys if key in dims for i in np.unique(final[dims[key]]).tolist()}
        found.append((node.name, reason, frozenset(ids - {NONE})))
    return tuple((name, reason, ids) for name, reason, ids in found if ids)


def macs_and_params(coupling: Coupling, removed: Collection[int]) -> tuple[int, int]:
    """Return multiply-accumulates (one image) and parameters once these channels are cut.

    Args:
        coupling: of the uncut network.
        removed: channel ids, out of `Group.channels` of groups that are not frozen.
    """
    gone = np.asarray(sorted(removed), np.int64)
    macs = sum(_macs(layer, gone) for layer in coupling.layers)
    params = 0
    for tensor in coupling.tensors.values():
        if tensor.is_parameter:
            sizes = list(tensor.shape)
            for d, ids in tensor.channels.items():
                sizes[d] = int((~np.isin(ids, gone)).sum())
            params += prod(sizes)
    return macs, params


def _macs(layer: WeightedLayer, gone: Ints) -> int:
    outs = ~np.isin(np.asarray(layer.output_channels), gone)
    ins = ~np.isin(np.asarray(layer.input_channels), gone)
    groups = int(ins.reshape(layer.groups, -1).any(1).sum())
    before = len(outs) * (len(ins) // layer.groups)
    after = int(outs.sum()) * (int(ins.sum()) // groups if groups else 0)
    macs = layer.macs * after // before
    if layer.positions:
        macs = macs * int((~np.isin(np.asarray(layer.positions), gone)).sum()) // len(layer.positions)
    return macs
