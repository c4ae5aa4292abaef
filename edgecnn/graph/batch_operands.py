"""What every rule of `batch_rules` asks about the operands of a call."""

from __future__ import annotations

from typing import Any

from torch import fx

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.batch_first import Held, Known, Rewriter
from edgecnn.graph.forms import Form
from edgecnn.graph.nodes import layer_name


def held_input(work: Rewriter, source: Any) -> Held:
    """Return an argument that must depend on the image."""
    found = work.value(source)
    if isinstance(found, Known):
        raise UnsupportedOpError(f"{layer_name(work.current)} reads {source} where an activation is expected")
    return found


def cannot(work: Rewriter, why: str) -> UnsupportedOpError:
    """Return the error for a call that has no form with the batch first."""
    return UnsupportedOpError(
        f"{layer_name(work.current)} {why}, with the batch not in dimension 0",
        hint="write the network with the batch first, for instance x.view(x.shape[0], ...)",
    )


def aligned(work: Rewriter, found: Held | Known, form: Form, rank: int) -> fx.Node:
    """Return an operand with the axes of a settled form, broadcast where it has fewer."""
    if isinstance(found, Held):
        dims = ((),) * (rank - len(found.form.dims)) + found.form.dims
        settled = work.settled(Held(found.node, Form(found.form.axes, dims)))
        if len(settled.form.axes) != len(form.axes) or settled.form.dims != form.dims:
            raise cannot(work, "joins values whose batch lies in different dimensions")
        return settled.node
    shape = [1] * (rank - found.value.dim()) + list(found.value.shape)
    place = form.batch_dim
    if shape[place] != 1:
        raise cannot(work, "joins a constant that differs along the batch")
    extra = [1] * (len(form.dims[place]) - 1)
    target = [1, *shape[:place], *extra, *shape[place + 1 :]]
    while len(target) > 1 and target[0] == 1 and found.value.dim() < len(target) and len(target) > 2:
        target = target[1:]
    return work.constant(found, found.value.reshape(target))
