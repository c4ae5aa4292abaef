"""Products between activations: attention, bilinear pooling, and products with a constant matrix.

Every product is an einsum: labels that occur in both operands and in the result are batch labels, labels in
both but not in the result are contracted, the others are free. Where the operands' channels follow a batch
label (the heads of an attention), a whole head is the unit: all channels of a head go together, in both
operands and in the result. Otherwise contracted labels join position by position, and free labels keep
their channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from edgecnn.graph.channels.layers import dense
from edgecnn.graph.channels.pointwise import bind_broadcast, check_covered, merge
from edgecnn.graph.channels.trace import Trace
from edgecnn.graph.channels.values import Constant, Record, Value, blank, spread, tidy, varying
from edgecnn.graph.nodes import argument

_ONE_SIDED = "is multiplied, channel by channel, with values that belong to no channel"
_TWO_SIDED = "an element of the product belongs to channels of both factors"


def product(trace: Trace, node: fx.Node, a: fx.Node, b: fx.Node, equation: tuple[str, str, str]) -> Record:
    """Einsum of two operands; labels of size 1 broadcast."""
    left, right, out = equation
    values = trace.value(a), trace.value(b)
    ids = [values[0].ids, values[1].ids]
    batch = [c for c in out if c in left and c in right]
    followed = [
        c
        for c in batch
        if any(labels.index(c) in varying(t) for labels, t in zip((left, right), ids, strict=True))
    ]
    if followed:
        heads = _by_head(trace, ids, (left, right), followed, out, trace.shape(node))
        return Value(heads, any(v.zero for v in values))
    for c in left:
        if c in right and c not in out:
            _contract(trace, node, values, (left.index(c), right.index(c)))
    return _free(trace, node, ids, (left, right, out), all(v.zero for v in values))


def _by_head(
    trace: Trace,
    ids: list[Tensor],
    labels: tuple[str, str],
    followed: list[str],
    out: str,
    shape: tuple[int, ...],
) -> Tensor:
    """Join all channels of a head, in both operands; return the ids of the result."""
    laid: list[Tensor] = []
    for t, names in zip(ids, labels, strict=True):
        keep = [names.index(c) for c in followed if t.shape[names.index(c)] > 1]
        tied = trace.join_all(t, keep=keep)
        for d in range(tied.dim()):
            if d not in keep:
                tied = tied.narrow(d, 0, 1)
        sizes = [tied.shape[names.index(c)] if c in names and c in followed else 1 for c in out]
        order = [names.index(c) for c in out if c in followed]
        rest = [d for d in range(tied.dim()) if d not in order]
        laid.append(tied.permute(order + rest).reshape(sizes))
    a, b = spread(*laid)
    trace.join(a, b)
    for one, other, source in ((a, b, laid[1]), (b, a, laid[0])):
        lost = (one >= 0) & (other < 0)
        if source.numel() > 1 and bool(lost.any()):
            trace.freeze(one[lost], _ONE_SIDED)
    return tidy(torch.maximum(a, b).expand(shape))


def _contract(trace: Trace, node: fx.Node, values: tuple[Value, Value], dims: tuple[int, int]) -> None:
    """Join two operands along a contracted label."""
    a, b = values[0].ids, values[1].ids
    on_a, on_b = dims[0] in varying(a), dims[1] in varying(b)
    if on_a and on_b:
        one, other = (_only(trace, t, d) for t, d in ((a, dims[0]), (b, dims[1])))
        trace.join(one, other)
        if not any(v.zero for v in values):
            trace.inexact.append((node, "a product over channels that are not zero", a))
        for x, y in ((one, other), (other, one)):
            trace.freeze(x[(x >= 0) & (y < 0)], _ONE_SIDED)
    else:
        for t, d, on in ((a, dims[0], on_a), (b, dims[1], on_b)):
            if on:
                trace.rigid(t, d, _ONE_SIDED)


def _only(trace: Trace, ids: Tensor, dim: int) -> Tensor:
    """Return ids along one dimension, tied along the others."""
    return trace.join_all(ids, keep=(dim,)).movedim(dim, 0).flatten(1)[:, 0]


def _free(trace: Trace, node: fx.Node, ids: list[Tensor], labels: tuple[str, str, str], zero: bool) -> Record:
    """Return the ids of a result whose labels each come from one operand."""
    out, shape = labels[2], trace.shape(node)
    laid: list[Tensor] = []
    for t, names in zip(ids, labels[:2], strict=True):
        free = [c for c in out if c in names and names.index(c) in varying(t)]
        if not free:
            continue
        if len(free) < len(varying(t)):
            t = trace.join_all(t, keep=[names.index(c) for c in free])
        for d, c in enumerate(names):
            if c not in free:
                t = t.narrow(d, 0, 1)
        order = [names.index(c) for c in out if c in free]
        rest = [d for d in range(t.dim()) if d not in order]
        sizes = [t.shape[names.index(c)] if c in free else 1 for c in out]
        laid.append(t.permute(order + rest).reshape(sizes))
    if len(laid) == 2:
        for t in laid:
            trace.freeze(t, _TWO_SIDED)
        return Value(blank(shape))
    return Value(tidy(laid[0].expand(shape)) if laid else blank(shape), zero)


def matmul(trace: Trace, node: fx.Node) -> Record:
    """matmul, bmm, mm."""
    a, b = node.args[0], node.args[1]
    if isinstance(trace.record(b), Constant) and len(trace.shape(b)) == 2:
        return dense(trace, node, a, b, output_dim=1)  # type: ignore[arg-type]
    rank_a, rank_b = len(trace.shape(a)), len(trace.shape(b))
    if min(rank_a, rank_b) < 2:
        return trace.unknown(node, "is multiplied with a vector")
    rank = max(rank_a, rank_b)
    batch = "abcdefg"[: rank - 2]
    return product(
        trace,
        node,
        a,  # type: ignore[arg-type]
        b,  # type: ignore[arg-type]
        (batch[rank - rank_a :] + "xk", batch[rank - rank_b :] + "ky", batch + "xy"),
    )


def einsum(trace: Trace, node: fx.Node) -> Record:
    """aten.einsum of two operands without an ellipsis."""
    equation = str(node.args[0]).replace(" ", "")
    operands: Any = node.args[1]
    left, _, right = equation.partition("->")
    names = left.split(",")
    repeated = any(len(set(n)) < len(n) for n in (*names, right))
    if len(names) != 2 or "." in equation or not right or repeated:
        return trace.unknown(node, f"einsum {equation!r} is not a product of two values")
    a, b = operands
    return product(trace, node, a, b, (names[0], names[1], right))


def attention(trace: Trace, node: fx.Node) -> Record:
    """scaled_dot_product_attention: query (..., h, n, d), key (..., h, m, d), value (..., h, m, e)."""
    q, k, v = node.args[:3]
    if argument(node, 7, "enable_gqa", False):
        return trace.unknown(node, "attention with fewer key heads than query heads")
    batch = "abcdefg"[: len(trace.shape(q)) - 2]
    heads = [d for d in range(1, len(batch)) if trace.shape(q)[d] > 1] or [
        0 for _ in (1,) if 0 in varying(trace.value(q).ids)
    ]
    if heads:
        return _attention_by_head(trace, node, heads)
    ids = [trace.value(n).ids for n in (q, k, v)]
    _contract(trace, node, (trace.value(q), trace.value(k)), (ids[0].dim() - 1, ids[1].dim() - 1))
    if any(d != ids[2].dim() - 1 for d in varying(ids[2])):
        return trace.unknown(node, "attention over channels")
    return Value(ids[2].narrow(-2, 0, 1).expand(trace.shape(node)), trace.value(v).zero)


def _attention_by_head(trace: Trace, node: fx.Node, heads: list[int]) -> Record:
    tied = []
    for source in node.args[:3]:
        t = trace.join_all(trace.value(source).ids, keep=heads)
        for d in (-1, -2):
            t = t.narrow(d, 0, 1)
        tied.append(t)
    for other in tied[1:]:
        trace.join(tied[0], other)
        for x, y in ((tied[0], other), (other, tied[0])):
            trace.freeze(x[(x >= 0) & (y < 0)], _ONE_SIDED)
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, fx.Node):
        shape = (*trace.shape(node)[:-1], trace.shape(node.args[1])[-2])
        _mask(trace, node, mask, tied[0].expand(shape))
    ids = torch.maximum(torch.maximum(tied[0], tied[1]), tied[2])
    return Value(tidy(ids.expand(trace.shape(node))), trace.value(node.args[2]).zero)


def _mask(trace: Trace, node: fx.Node, mask: fx.Node, ids: Tensor) -> None:
    """Bind a bias table that is added to the attention scores, or join a computed one."""
    record = trace.record(mask)
    if isinstance(record, Value):
        wide = record.ids.expand(ids.shape)
        merge(trace, ids, wide)
        check_covered(trace, tidy(ids), record.ids)
    else:
        bind_broadcast(trace, node, mask, tidy(ids))


HANDLERS = {
    "matmul": matmul,
    "bmm": matmul,
    "mm": matmul,
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
}
