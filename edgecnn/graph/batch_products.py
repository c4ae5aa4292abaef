"""How products of matrices are rewritten for values whose batch is not in dimension 0, see `batch_rules`."""

from __future__ import annotations

from typing import Any

from torch import fx

from edgecnn.graph.batch_first import Held, Known, Rewriter
from edgecnn.graph.batch_operands import aligned, cannot, held_input
from edgecnn.graph.forms import Form


def matmul(work: Rewriter, node: fx.Node) -> Held:
    """Rewrite a product over the last two dimensions."""
    rank = len(work.shape(node))
    operands = [work.value(node.args[0]), work.value(node.args[1])]
    forms = []
    for place, found in enumerate(operands):
        if isinstance(found, Held):
            dims = ((),) * (rank - len(found.form.dims)) + found.form.dims
            settled = work.settled(Held(found.node, Form(found.form.axes, dims)))
            if settled.form.batch_dim >= rank - 2:
                raise cannot(work, "multiplies matrices that the batch is part of")
            operands[place] = settled
            forms.append(settled.form)
    if any(form.dims != forms[0].dims for form in forms):
        raise cannot(work, "multiplies values whose batch lies in different dimensions")
    given = []
    for found in operands:
        small = isinstance(found, Known) and found.value.dim() <= 2
        given.append(
            work.constant(found)
            if isinstance(found, Known) and small
            else aligned(work, found, forms[0], rank)
        )
    axes = [max(sizes) for sizes in zip(*(form.axes for form in forms), strict=True)]
    shape = work.shape(node)
    axes[-2:] = shape[-2:]
    for dim in range(rank - 2):
        axis = forms[0].axis(dim)
        if axis is not None:
            axes[axis] = shape[dim]
    return Held(work.call(node.target, *given), Form(tuple(axes), forms[0].dims))


def attention(work: Rewriter, node: fx.Node) -> Held:
    """Rewrite scaled_dot_product_attention."""
    rank = len(work.shape(node))
    held = [work.settled(held_input(work, node.args[i])) for i in range(3)]
    if any(h.form.batch_dim >= rank - 2 or h.form.dims != held[0].form.dims for h in held):
        raise cannot(work, "attends over the batch")
    given: list[Any] = [h.node for h in held]
    if len(node.args) > 3:
        mask: Any = node.args[3]
        found = None if mask is None else work.value(mask)
        small = isinstance(found, Known) and found.value.dim() <= 2
        given.append(
            None
            if found is None
            else work.constant(found)
            if isinstance(found, Known) and small
            else aligned(work, found, held[0].form, rank)
        )
        given += node.args[4:]
    made = work.call(node.target, *given)
    made.kwargs = dict(node.kwargs)
    form = held[0].form
    return Held(made, form.resized(len(form.axes) - 1, work.shape(node)[-1]))
