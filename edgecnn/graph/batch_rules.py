"""How each operator is rewritten for values whose batch is not in dimension 0, see `batch_first`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.batch_first import Held, Known, Rewriter
from edgecnn.graph.batch_operands import aligned, cannot, held_input
from edgecnn.graph.batch_products import attention, matmul
from edgecnn.graph.forms import Form, plain_form, reshape_form
from edgecnn.graph.nodes import argument, aten, layer_name


@dataclass(frozen=True)
class Rule:
    """How to rewrite a call.

    Attributes:
        rewrite: from the rewriter and the call to what stands for its result.
        always: also where everything has the batch in dimension 0.
    """

    rewrite: Callable[[Rewriter, fx.Node], Any]
    always: bool = False


def _reshape(work: Rewriter, node: fx.Node) -> Held:
    held, shape = held_input(work, node.args[0]), work.shape(node)
    form = reshape_form(held.form, shape)
    if form is not None:
        return work.reshaped(held, form)
    settled = work.settled(held)
    if not settled.form.is_plain or shape[0] != -1 or min(shape[1:], default=0) < 0:
        raise cannot(work, f"reshapes {work.shape(node.args[0])} to {shape}")  # type: ignore[arg-type]
    return Held(work.call(aten.reshape.default, settled.node, list(shape)), plain_form(shape))


def _permute(work: Rewriter, node: fx.Node) -> Held:
    held = held_input(work, node.args[0])
    rank, dims = len(held.form.dims), cast("list[int]", node.args[1])
    return Held(held.node, held.form.permuted([int(d) % rank for d in dims]))


def _transpose(work: Rewriter, node: fx.Node) -> Held:
    held = held_input(work, node.args[0])
    order = list(range(len(held.form.dims)))
    a, b = int(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
    order[a], order[b] = order[b], order[a]
    return Held(held.node, held.form.permuted(order))


def _expand(work: Rewriter, node: fx.Node) -> Held:
    held, shape = work.settled(held_input(work, node.args[0])), work.shape(node)
    if len(shape) != len(held.form.dims):
        raise cannot(work, "adds dimensions")
    sizes, axes = [-1] * len(held.form.axes), list(held.form.axes)
    for dim, size in enumerate(shape):
        axis = held.form.axis(dim)
        if axis is not None and axes[axis] != size:
            sizes[axis] = axes[axis] = size
    if max(sizes) < 0:
        return held
    return Held(work.call(aten.expand.default, held.node, sizes), Form(tuple(axes), held.form.dims))


def _getitem(work: Rewriter, node: fx.Node) -> Any:
    return work.values[node.args[0]][node.args[1]]  # type: ignore[index]


def _axis(work: Rewriter, held: Held, dim: int) -> tuple[Held, int]:
    """Return a value one of whose axes is the dimension, and that axis."""
    axis = held.form.axis(dim)
    if axis is None:
        held = work.settled(held)
        axis = held.form.axis(dim)
    if axis is None:
        raise cannot(work, f"works along dimension {dim}, which the batch is part of")
    return held, axis


def _select(work: Rewriter, node: fx.Node) -> Held:
    return _selected(work, held_input(work, node.args[0]), int(node.args[1]), int(node.args[2]))  # type: ignore[arg-type]


def _selected(work: Rewriter, held: Held, dim: int, index: int) -> Held:
    held, axis = _axis(work, held, dim)
    return Held(work.call(aten.select.int, held.node, axis, index), held.form.without(dim))


def _unbind(work: Rewriter, node: fx.Node) -> list[Held]:
    held, dim = held_input(work, node.args[0]), int(argument(node, 1, "dim", 0))
    held, axis = _axis(work, held, dim)
    return [_selected(work, held, dim, index) for index in range(held.form.axes[axis])]


def _slice(work: Rewriter, node: fx.Node) -> Held:
    dim = int(argument(node, 1, "dim", 0))
    held, axis = _axis(work, held_input(work, node.args[0]), dim)
    rest = [work.argument(a) if isinstance(a, fx.Node) else a for a in node.args[2:]]
    sliced = work.call(aten.slice.Tensor, held.node, axis, *rest)
    return Held(sliced, held.form.resized(axis, work.shape(node)[dim]))


def _split(work: Rewriter, node: fx.Node) -> list[Held]:
    dim = int(argument(node, 2, "dim", 0))
    held, axis = _axis(work, held_input(work, node.args[0]), dim)
    pieces, start = [], 0
    for shape in work.shapes(node):
        size = (shape or ())[dim]
        piece = work.call(aten.slice.Tensor, held.node, axis, start, start + size)
        pieces.append(Held(piece, held.form.resized(axis, size)))
        start += size
    return pieces


def _each_value(work: Rewriter, node: fx.Node) -> Held:
    held = held_input(work, node.args[0])
    if work.has_parts(held.node):
        return work.by_part(node)
    rest = [work.argument(a) if isinstance(a, fx.Node) else a for a in node.args[1:]]
    made = work.call(node.target, held.node, *rest)
    made.kwargs = dict(node.kwargs)
    return Held(made, held.form)


def _binary(work: Rewriter, node: fx.Node) -> Held:
    operands = [work.value(a) if isinstance(a, fx.Node) else a for a in node.args[:2]]
    held = [operand for operand in operands if isinstance(operand, Held)]
    if len(held) == len([o for o in operands if not isinstance(o, (int, float))]) and all(
        h.form == held[0].form for h in held
    ):
        same = [o.node if isinstance(o, Held) else o for o in operands]
        return _with_keywords(work, node, same, held[0].form)
    rank = len(work.shape(node))
    forms = []
    for h in held:
        dims = ((),) * (rank - len(h.form.dims)) + h.form.dims
        forms.append(work.settled(Held(h.node, Form(h.form.axes, dims))).form)
    axes = tuple(max(sizes) for sizes in zip(*(form.axes for form in forms), strict=False))
    form = Form(axes, forms[0].dims)
    given: list[Any] = [aligned(work, o, form, rank) if isinstance(o, (Held, Known)) else o for o in operands]
    for place, o in enumerate(operands):
        if isinstance(o, Known) and o.value.dim() == 0:
            given[place] = work.constant(o)
    shape = work.shape(node)
    sizes = [shape[i] if (axis := form.axis(i)) is not None else 0 for i in range(rank)]
    for i, size in enumerate(sizes):
        axis = form.axis(i)
        if axis is not None and form.axes[axis] != size:
            form = form.resized(axis, size)
    return _with_keywords(work, node, given, form)


def _with_keywords(work: Rewriter, node: fx.Node, given: Sequence[Any], form: Form) -> Held:
    made = work.call(node.target, *given, *node.args[len(given) :])
    made.kwargs = dict(node.kwargs)
    return Held(made, form)


def _last_axes(work: Rewriter, held: Held, count: int) -> Held:
    """Return a value whose last `count` dimensions are its last axes, in order."""
    rank, num_axes = len(held.form.dims), len(held.form.axes)
    wanted = [(num_axes - count + i,) for i in range(count)]
    if list(held.form.dims[rank - count :]) == wanted and 0 not in [w[0] for w in wanted]:
        return held
    held = work.settled(held)
    if held.form.batch_dim >= rank - count:
        raise cannot(work, "works along dimensions that the batch is part of")
    return held


def _linear(work: Rewriter, node: fx.Node) -> Held:
    held = _last_axes(work, held_input(work, node.args[0]), 1)
    rest = [None if a is None else work.argument(a) for a in node.args[1:]]  # type: ignore[arg-type]
    made = work.call(node.target, held.node, *rest)
    return Held(made, held.form.resized(len(held.form.axes) - 1, work.shape(node)[-1]))


def _layer_norm(work: Rewriter, node: fx.Node) -> Held:
    held = _last_axes(work, held_input(work, node.args[0]), len(node.args[1]))  # type: ignore[arg-type]
    rest = [work.argument(a) if isinstance(a, fx.Node) else a for a in node.args[1:]]
    return Held(work.call(node.target, held.node, *rest), held.form)


def _softmax(work: Rewriter, node: fx.Node) -> Held:
    held, axis = _axis(work, held_input(work, node.args[0]), int(argument(node, 1, "dim")))
    return Held(work.call(node.target, held.node, axis, *node.args[2:]), held.form)


def _reduce(work: Rewriter, node: fx.Node) -> Held:
    dims: Any = argument(node, 1, "dim")
    held, keep = held_input(work, node.args[0]), bool(argument(node, 2, "keepdim", False))
    rank = len(held.form.dims)
    dims = sorted({int(d) % rank for d in ([dims] if isinstance(dims, int) else dims)})
    if any(held.form.axis(d) is None for d in dims):
        held = work.settled(held)
    axes = []
    for dim in dims:
        held, axis = _axis(work, held, dim)
        axes.append(axis)
    made = work.call(node.target, held.node, axes, keep)
    form = held.form
    for axis in axes:
        form = form.resized(axis, 1)
    for dim in reversed([] if keep else dims):
        form = form.without(dim)
    return Held(made, form)


def _norm(work: Rewriter, node: fx.Node) -> Held:
    """Rewrite linalg_vector_norm along one dimension."""
    dims: Any = argument(node, 2, "dim")
    keep = bool(argument(node, 3, "keepdim", False))
    if dims is None or len(dims) != 1:
        raise cannot(work, "takes a norm over several dimensions")
    held, axis = _axis(work, held_input(work, node.args[0]), int(dims[0]))
    made = work.call(node.target, held.node, argument(node, 1, "ord", 2), [axis], keep)
    form = held.form.resized(axis, 1)
    return Held(made, form if keep else form.without(int(dims[0])))


def _roll(work: Rewriter, node: fx.Node) -> Held:
    held = held_input(work, node.args[0])
    axes = []
    for dim in argument(node, 2, "dims"):
        held, axis = _axis(work, held, int(dim))
        axes.append(axis)
    return Held(work.call(node.target, held.node, node.args[1], axes), held.form)


def _concat(work: Rewriter, node: fx.Node) -> Held:
    """Join values; what is known is added to zeros that a pad leaves for it."""
    given: Any = node.args[0]
    rank = len(work.shape(node))
    dim = int(argument(node, 1, "dim", 0)) % rank
    parts = [work.value(n) for n in given]
    held = [work.settled(part) for part in parts if isinstance(part, Held)]
    form = held[0].form
    if any(h.form.dims != form.dims for h in held) or form.axis(dim) is None:
        raise cannot(work, "joins values whose batch lies in different dimensions")
    axis = form.axis(dim) or 0
    whole = form.resized(axis, work.shape(node)[dim])
    if len(held) == len(parts):
        return Held(work.call(aten.cat.default, [h.node for h in held], axis), whole)
    if len(held) > 1:
        raise UnsupportedOpError(f"{layer_name(node)} joins several activations with a constant")
    return Held(_padded_with(work, parts, dim, axis, whole), whole)


def _padded_with(work: Rewriter, parts: Sequence[Held | Known], dim: int, axis: int, whole: Form) -> fx.Node:
    """Return x padded with zeros, plus the known parts where the zeros are."""
    place = next(i for i, part in enumerate(parts) if isinstance(part, Held))
    held = work.settled(parts[place])  # type: ignore[arg-type]
    known = [part.value if isinstance(part, Known) else None for part in parts]
    sizes = [0 if value is None else value.shape[dim] for value in known]
    amounts = [0] * (2 * (len(whole.axes) - axis))
    amounts[-2:] = [sum(sizes[:place]), sum(sizes[place + 1 :])]
    padded = work.call(aten.constant_pad_nd.default, held.node, amounts)
    shapes = [value.shape for value in known if value is not None]
    common = [max(shape[i] for shape in shapes) for i in range(len(shapes[0]))]
    pieces = []
    for value in known:
        size = list(common)
        size[dim] = held.form.axes[axis] if value is None else value.shape[dim]
        pieces.append(torch.zeros(size) if value is None else value.expand(size))
    source = next(part for part in parts if isinstance(part, Known))
    table = Known(source.node, torch.cat(pieces, dim))
    return work.call(aten.add.Tensor, padded, aligned(work, table, whole, len(whole.dims)))


def _index(work: Rewriter, node: fx.Node) -> Held:
    given = list(node.args[1])  # type: ignore[arg-type]
    places = [i for i, part in enumerate(given) if part is not None]
    if len(places) != 1:
        raise cannot(work, "picks by several lists")
    held, axis = _axis(work, held_input(work, node.args[0]), places[0])
    picks = [None] * axis + [work.argument(given[places[0]])]
    made = work.call(node.target, held.node, picks)
    return Held(made, held.form.resized(axis, work.shape(node)[places[0]]))


def _pad(work: Rewriter, node: fx.Node) -> Held:
    amounts: Any = node.args[1]
    count = len(amounts) // 2
    held = _last_axes(work, held_input(work, node.args[0]), count)
    made = work.call(node.target, held.node, *node.args[1:])
    made.kwargs = dict(node.kwargs)
    form = held.form
    for place in range(count):
        axis = len(form.axes) - 1 - place
        form = form.resized(axis, form.axes[axis] + amounts[2 * place] + amounts[2 * place + 1])
    return Held(made, form)


def _unfold(work: Rewriter, node: fx.Node) -> Held:
    dim, size, step = (int(a) for a in node.args[1:4])  # type: ignore[arg-type]
    held, axis = _axis(work, held_input(work, node.args[0]), dim)
    made = work.call(node.target, held.node, axis, size, step)
    form = held.form.resized(axis, work.shape(node)[dim])
    last = len(form.axes)
    return Held(made, Form((*form.axes, size), (*form.dims, (last,))))


_RESHAPES = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints),
    *(aten.unflatten.int, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default),
)
_EACH_VALUE = (
    *(aten.gelu.default, aten.relu.default, aten.relu6.default, aten.silu.default, aten.sigmoid.default),
    *(aten.tanh.default, aten.exp.default, aten.neg.default, aten.sqrt.default, aten.rsqrt.default),
    *(aten.hardswish.default, aten.hardsigmoid.default, aten.hardtanh.default, aten.leaky_relu.default),
    *(aten.clamp.default, aten.clamp_min.default, aten.abs.default, aten.elu.default, aten.mish.default),
    *(aten.pow.Tensor_Scalar, aten.mul.Scalar, aten.add.Scalar, aten.rsub.Scalar, aten.clone.default),
    *(aten.contiguous.default, aten.dropout.default, aten.sin.default, aten.cos.default, aten.log.default),
    *(aten.square.default, aten.softplus.default),
)

RULES: dict[Any, Rule] = {
    **dict.fromkeys(_RESHAPES, Rule(_reshape)),
    **dict.fromkeys(_EACH_VALUE, Rule(_each_value)),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor), Rule(_binary)),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default), Rule(matmul)),
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.amax.default), Rule(_reduce)),
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default), Rule(_split)),
    **dict.fromkeys((aten.softmax.int, aten._softmax.default), Rule(_softmax)),
    aten.permute.default: Rule(_permute),
    aten.transpose.int: Rule(_transpose),
    aten.expand.default: Rule(_expand),
    aten.expand_as.default: Rule(_expand),
    aten.select.int: Rule(_select),
    aten.unbind.int: Rule(_unbind),
    aten.slice.Tensor: Rule(_slice),
    aten.linear.default: Rule(_linear),
    aten.layer_norm.default: Rule(_layer_norm),
    aten.linalg_vector_norm.default: Rule(_norm),
    aten.roll.default: Rule(_roll),
    aten.index.Tensor: Rule(_index),
    aten.pad.default: Rule(_pad),
    aten.constant_pad_nd.default: Rule(_pad),
    aten.unfold.default: Rule(_unfold),
    aten.scaled_dot_product_attention.default: Rule(attention),
    aten.cat.default: Rule(_concat, always=True),
    operator.getitem: Rule(_getitem),
}
