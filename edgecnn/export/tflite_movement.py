"""Operators that only move values: concat, slice, pad, reshape, transpose.

A transpose writes nothing: it renames the stored dimensions. A reshape is one RESHAPE, or waits for its
reader where it needs a transpose (see `tflite_layout`).
"""

from __future__ import annotations

from math import prod

import numpy as np

from edgecnn.export.tflite_layout import Order, plain_order, plan_reshape
from edgecnn.export.tflite_lowering import Lowering, common_order, same_parameters
from edgecnn.graph.program import BATCH, Op, Tensor


def reshape(lowering: Lowering, op: Op) -> None:
    """Write a reshape."""
    x, y = lowering.tensor(op.inputs[0]), lowering.tensor(op.output)
    order = lowering.order(x.name)
    plan = plan_reshape(x.shape, order, y.shape)
    if plan is None:
        order, new_order = plain_order(len(x.shape)), plain_order(len(y.shape))
        output = lowering.new_tensor(y.name, new_order)
        lowering.place(y.name, lowering.write_reshape(lowering.read(x.name, order), output), new_order)
        return
    lowering.postpone_reshape(y.name, lowering.read(x.name, order), plan)


def transpose(lowering: Lowering, op: Op) -> None:
    """Rename the stored dimensions: stored dimension i holds perm^-1[order[i]] of the result."""
    perm = tuple(op.attributes["perm"])
    if perm[0] != 0:
        raise lowering.unsupported(op, f"perm is {perm}, expected the batch to stay first")
    index = lowering.read(op.inputs[0])
    order = lowering.order(op.inputs[0])
    lowering.place(op.output, index, tuple(perm.index(dim) for dim in order))


def concat(lowering: Lowering, op: Op) -> None:
    """Write a CONCATENATION in the order of the largest input.

    Where an earlier concat joined the first inputs already, as each layer of a DenseNet does, its result
    stands for them. XNNPACK joins at most five int8 tensors at once; more are joined in two steps or more.
    """
    y = lowering.tensor(op.output)
    axis = op.attributes["axis"] % len(y.shape)
    names = _joined_before(lowering, op, axis)
    order = common_order(lowering, names, len(y.shape))
    inputs = [lowering.read(name, order) for name in names]
    if len(inputs) == 1:
        lowering.place(y.name, inputs[0], order)
        return
    place = order.index(axis)
    while y.quant is not None and len(inputs) > _MAX_INT8_INPUTS:
        parts = [inputs[i : i + _MAX_INT8_INPUTS] for i in range(0, len(inputs), _MAX_INT8_INPUTS)]
        inputs = [_join(lowering, part, place) for part in parts]
    lowering.write(y.name, order, "CONCATENATION", inputs, {"axis": place})


_MAX_INT8_INPUTS = 5


def _joined_before(lowering: Lowering, op: Op, axis: int) -> tuple[str, ...]:
    """Return the inputs of a concat, the longest start that an earlier concat made replaced by its output."""
    y = lowering.tensor(op.output)
    best: Op | None = None
    for other in lowering.program.ops:
        if other is op:
            break
        count = len(other.inputs)
        if (
            other.kind == "concat"
            and other.inputs == op.inputs[:count]
            and other.attributes["axis"] % len(y.shape) == axis
            and same_parameters(lowering.tensor(other.output), y)
            and (best is None or count > len(best.inputs))
        ):
            best = other
    return op.inputs if best is None else (best.output, *op.inputs[len(best.inputs) :])


def _join(lowering: Lowering, part: list[int], place: int) -> int:
    """Add a CONCATENATION of some file tensors along stored dimension `place`."""
    if len(part) == 1:
        return part[0]
    shapes = [lowering.graph.tensors[index].shape for index in part]
    size = sum(shape[place] for shape in shapes)
    output = lowering.like(part[0], (*shapes[0][:place], size, *shapes[0][place + 1 :]), "/joined")
    return lowering.graph.add_operator("CONCATENATION", part, output, {"axis": place})


def slice_axis(lowering: Lowering, op: Op) -> None:
    """Write a slice as a STRIDED_SLICE."""
    x, y = lowering.tensor(op.inputs[0]), lowering.tensor(op.output)
    axis, step = op.attributes["axis"] % len(x.shape), op.attributes.get("step", 1)
    if axis == 0 or step < 1:
        raise lowering.unsupported(op, f"axis is {axis} and step {step}, expected axis >= 1 and step >= 1")
    start, _, _ = slice(op.attributes.get("start", 0), None).indices(x.shape[axis])
    index, order = lowering.read(x.name), lowering.order(x.name)
    begin = [start if dim == axis else 0 for dim in order]
    steps = [step if dim == axis else 1 for dim in order]
    if len(order) > _MAX_SLICED_DIMS:
        lowering.place(y.name, _slice_in_fewer(lowering, op, index, order), order)
        return
    output = lowering.new_tensor(y.name, order)
    lowering.place(y.name, lowering.strided_slice(index, output, begin, steps), order)


_MAX_SLICED_DIMS = 5


def _slice_in_fewer(lowering: Lowering, op: Op, index: int, order: Order) -> int:
    """Add a STRIDED_SLICE of more dimensions than it takes, those on either side of the axis joined."""
    x, y = lowering.tensor(op.inputs[0]), lowering.tensor(op.output)
    axis, step = op.attributes["axis"] % len(x.shape), op.attributes.get("step", 1)
    start, _, _ = slice(op.attributes.get("start", 0), None).indices(x.shape[axis])
    place = order.index(axis)
    stored = [x.shape[dim] for dim in order]
    ahead, behind = prod(stored[1:place]), prod(stored[place + 1 :])
    joined = lowering.reshape(index, (BATCH, ahead, stored[place], behind), "/joined")
    cut = lowering.like(joined, (BATCH, ahead, y.shape[axis], behind), "/cut")
    lowering.strided_slice(joined, cut, [0, 0, start, 0], [1, 1, step, 1])
    return lowering.write_reshape(cut, lowering.new_tensor(y.name, order))


def gather(lowering: Lowering, op: Op) -> None:
    """Write a GATHER."""
    index, order = lowering.read(op.inputs[0]), lowering.order(op.inputs[0])
    indices = lowering.integers(f"{op.output}/indices", op.attributes["indices"])
    lowering.write(op.output, order, "GATHER", (index, indices), {"axis": order.index(op.attributes["axis"])})


def pad(lowering: Lowering, op: Op) -> None:
    """Write a PAD where the value is a real zero, a PADV2 or MIRROR_PAD otherwise."""
    x = lowering.tensor(op.inputs[0])
    pads = tuple(tuple(pair) for pair in op.attributes["pads"])
    value = float(op.attributes.get("value", 0.0))
    if any(pads[0]):
        raise lowering.unsupported(op, f"pads are {pads}, expected none along the batch")
    if min(min(pair) for pair in pads) < 0:
        raise lowering.unsupported(op, f"pads are {pads}, expected none below zero (use a slice)")
    index, order = lowering.read(x.name), lowering.order(x.name)
    amounts = lowering.integers(f"{op.output}/pads", [pads[dim] for dim in order])
    if op.attributes.get("mode") == "reflect":
        lowering.write(op.output, order, "MIRROR_PAD", (index, amounts), {"mode": 0})
        return
    if value == 0.0:
        lowering.write(op.output, order, "PAD", (index, amounts))
        return
    lowering.write(op.output, order, "PADV2", (index, amounts, fill_constant(lowering, x, value)))


def fill_constant(lowering: Lowering, x: Tensor, value: float) -> int:
    """Add the constant (1,) that holds the real number `value` in the type of `x`."""
    filled = np.full(1, value, np.float32)
    data = filled if x.quant is None else x.quant.quantize(filled)
    return lowering.constant(f"fill/{value:g}", data, x.quant)
