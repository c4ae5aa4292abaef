"""What every TFLite lowering shares: where each Program tensor lies in the file, and in which stored orders.

A tensor may be in the file in several orders; a lowering asks for the one it needs and a TRANSPOSE (or a
RESHAPE, when only dimensions of size 1 move) is written the first time that is needed. The flattening of an
image is put off until it is read, since a linear can take the stored order and permute its columns instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from edgecnn.errors import UnsupportedOpError
from edgecnn.export.tflite_activation import FUSED_CODES, Activation, choose_activation
from edgecnn.export.tflite_graph import FileGraph
from edgecnn.export.tflite_layout import (
    Order,
    ReshapePlan,
    complete_order,
    default_order,
    plain_order,
    same_memory,
    stored_shape,
)
from edgecnn.graph.program import BATCH, Array, Op, Program, QuantParams, Tensor

SHUFFLED_GROUPS = (8, 4)
"""Up to so many groups of channels, int8 and float, are shuffled faster by two large transposes than by one
of many small ones: 2 to 6 times for two groups in int8, as measured with 28x28x120 to 7x7x480 in XNNPACK."""

_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: its index and the order in which it holds the Program's dimensions."""

    index: int
    order: Order


@dataclass(frozen=True)
class _PendingReshape:
    """A reshape that needs a transpose, not yet written: `source` is what is stored now."""

    source: int
    plan: ReshapePlan


@dataclass
class Lowering:
    """A Program on its way into a file.

    Attributes:
        program: what is being written.
        graph: the file so far.
    """

    program: Program
    graph: FileGraph
    _stored: dict[str, list[Stored]] = field(default_factory=dict)
    _pending: dict[str, _PendingReshape] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """Return the Program's tensor of that name."""
        return self.program.tensors[name]

    def order(self, name: str) -> Order:
        """Return the order in which an activation is stored; the default order for a constant."""
        if name in self._stored:
            return self._stored[name][0].order
        if name in self._pending:
            return self._pending[name].plan.order
        return default_order(len(self.tensor(name).shape))

    def place(self, name: str, index: int, order: Order) -> None:
        """Record that Program tensor `name` lies in file tensor `index` in `order`."""
        self._stored.setdefault(name, []).append(Stored(index, order))

    def adopt(self, name: str, index: int, order: Order) -> None:
        """Record like `place`, and give the file tensor the Program's name."""
        self.graph.tensors[index] = replace(self.graph.tensors[index], name=name)
        self.place(name, index, order)

    def postpone_reshape(self, name: str, source: int, plan: ReshapePlan) -> None:
        """Record that `name` is file tensor `source` reshaped by `plan`, to be written when it is read."""
        self._pending[name] = _PendingReshape(source, plan)

    def new_tensor(self, name: str, order: Order, suffix: str = "") -> int:
        """Add a file tensor with the type and shape of Program tensor `name`, not yet recorded as it."""
        tensor = self.tensor(name)
        return self.graph.add_tensor(
            name + suffix, stored_shape(tensor.shape, order), tensor.dtype, tensor.quant
        )

    def like(self, index: int, shape: Sequence[int], suffix: str) -> int:
        """Add a file tensor of another shape with the type and quantization of file tensor `index`."""
        tensor = self.graph.tensors[index]
        return self.graph.add_tensor(tensor.name + suffix, shape, tensor.dtype, tensor.quant)

    def write(
        self,
        name: str,
        order: Order,
        operator: str,
        inputs: Sequence[int],
        options: Mapping[str, Any] = _NO_OPTIONS,
    ) -> int:
        """Add an operator that makes Program tensor `name` in `order`, record it and return its index."""
        index = self.new_tensor(name, order)
        self.graph.add_operator(operator, inputs, index, options)
        self.place(name, index, order)
        return index

    def write_clamped(
        self,
        op: Op,
        order: Order,
        operator: str,
        inputs: Sequence[int],
        options: Mapping[str, Any] = _NO_OPTIONS,
    ) -> int:
        """Add an operator that makes the output of `op`, bounded by the op's attribute `clamp`."""
        tensor = self.tensor(op.output)
        activation = choose_activation(op.attributes.get("clamp"), tensor.quant)
        fused = {**options, "fusedActivationFunction": FUSED_CODES[activation.fused]}
        if activation.is_fused:
            return self.write(op.output, order, operator, inputs, fused)
        index = self.new_tensor(op.output, order, "/unbounded")
        self.graph.add_operator(operator, inputs, index, fused)
        return self.write_bounds(op.output, order, index, activation)

    def write_bounds(self, name: str, order: Order, index: int, activation: Activation) -> int:
        """Add the MAXIMUM and MINIMUM that `activation` leaves, from file tensor `index` to `name`."""
        quant = self.tensor(name).quant
        steps = [("MAXIMUM", activation.low), ("MINIMUM", activation.high)]
        todo = [(operator, bound) for operator, bound in steps if bound is not None]
        for place, (operator, bound) in enumerate(todo):
            limit = self.constant(f"{name}/{operator.lower()}", bound, quant)
            if place == len(todo) - 1:
                return self.write(name, order, operator, (index, limit))
            output = self.new_tensor(name, order, f"/{operator.lower()}")
            index = self.graph.add_operator(operator, (index, limit), output)
        return index

    def read(self, name: str, order: Order | None = None) -> int:
        """Return the file tensor that holds `name` in `order` (any order for None), written if need be."""
        tensor = self.tensor(name)
        if tensor.data is not None:
            wanted = order or default_order(len(tensor.shape))
            return self.constant(name, tensor.data.transpose(wanted), tensor.quant)
        if name not in self._stored:
            self._write_pending(name)
        forms = self._stored[name]
        if order is None:
            return forms[0].index
        for form in forms:
            if form.order == order:
                return form.index
        index = self._reorder(tensor, forms[0], order)
        self.place(name, index, order)
        return index

    def read_columns(self, name: str) -> tuple[int, Array | None]:
        """Return a (n, features) tensor in any column order, and which feature each column holds.

        Returns:
            File tensor index, and either None (columns in order) or an int array of shape (features,).
        """
        pending = self._pending.get(name)
        if name in self._stored or pending is None or pending.plan.perm is None:
            return self.read(name, plain_order(len(self.tensor(name).shape))), None
        sizes, perm = pending.plan.factors[1:], [place - 1 for place in pending.plan.perm[1:]]
        features = np.arange(int(np.prod(sizes))).reshape([sizes[place] for place in perm])
        columns = features.transpose(np.argsort(perm)).reshape(-1)
        return self.reshape(pending.source, (BATCH, len(columns)), "/columns"), columns

    def constant(self, name: str, data: Array, quant: QuantParams | None = None) -> int:
        """Add a constant as it is to be stored; a per_channel axis counts stored dimensions."""
        return self.graph.add_constant(name, data, quant)

    def integers(self, name: str, values: Any) -> int:
        """Add an int32 constant: a shape, axes, paddings."""
        return self.graph.add_constant(name, np.asarray(values, np.int32))

    def reshape(self, index: int, shape: Sequence[int], suffix: str = "/reshaped") -> int:
        """Add a RESHAPE of file tensor `index` to a stored shape that begins with BATCH."""
        return self.write_reshape(index, self.like(index, shape, suffix))

    def write_reshape(self, index: int, output: int) -> int:
        """Add a RESHAPE of file tensor `index` into file tensor `output` and return `output`."""
        shape = self.graph.tensors[output].shape
        target = self.integers("shape/" + "x".join(str(size) for size in shape), shape)
        return self.graph.add_operator("RESHAPE", (index, target), output, {"newShape": list(shape)})

    def transpose(self, index: int, perm: Sequence[int], suffix: str = "/transposed") -> int:
        """Add a TRANSPOSE of stored dimensions."""
        shape = self.graph.tensors[index].shape
        output = self.like(index, [shape[dim] for dim in perm], suffix)
        axes = self.integers("perm/" + "".join(str(dim) for dim in perm), perm)
        return self.graph.add_operator("TRANSPOSE", (index, axes), output)

    def strided_slice(self, index: int, output: int, begin: Sequence[int], steps: Sequence[int]) -> int:
        """Add a STRIDED_SLICE of stored dimensions into file tensor `output` and return `output`.

        Dimensions kept whole are masked, so that any batch fits; XNNPACK takes steps of 1, and takes a SLICE
        only for a known batch.
        """
        old, new = self.graph.tensors[index].shape, self.graph.tensors[output].shape
        whole = sum(1 << dim for dim in range(len(old)) if old[dim] == new[dim])
        end = [
            0 if whole >> dim & 1 else start + (size - 1) * step + 1
            for dim, (start, size, step) in enumerate(zip(begin, new, steps, strict=True))
        ]
        name = self.graph.tensors[output].name
        values = {"begin": begin, "end": end, "strides": steps}
        constants = [self.integers(f"{name}/{key}", value) for key, value in values.items()]
        options = {"beginMask": whole, "endMask": whole}
        return self.graph.add_operator("STRIDED_SLICE", (index, *constants), output, options)

    def unsupported(self, op: Op, reason: str, hint: str | None = None) -> UnsupportedOpError:
        """Return the error for an op that TFLite cannot express."""
        where = op.layer or op.output
        return UnsupportedOpError(f"{where}: op '{op.kind}' has no TFLite form: {reason}", hint=hint)

    def _reorder(self, tensor: Tensor, form: Stored, order: Order) -> int:
        suffix = "/" + "".join("nchw"[dim] if len(order) == 4 else str(dim) for dim in order)
        if same_memory(tensor.shape, form.order, order):
            return self.write_reshape(form.index, self.new_tensor(tensor.name, order, suffix))
        return self.transpose(form.index, [form.order.index(dim) for dim in order], suffix)

    def _write_pending(self, name: str) -> None:
        pending = self._pending[name]
        shape = stored_shape(self.tensor(name).shape, pending.plan.order)
        index, perm = pending.source, pending.plan.perm
        if perm is not None:
            index = self._transpose_factors(index, pending.plan.factors, perm)
        if self.graph.tensors[index].shape != shape:
            index = self.write_reshape(index, self.new_tensor(name, pending.plan.order))
        self.place(name, index, pending.plan.order)

    def _transpose_factors(self, index: int, factors: Sequence[int], perm: Order) -> int:
        """Add a TRANSPOSE of the factors of a file tensor, after a RESHAPE if more than sizes of 1 differ."""
        shape = self.graph.tensors[index].shape
        wide = [dim for dim, size in enumerate(shape) if size != 1]
        if self._is_shuffle(index, factors, perm):
            return self._shuffle(index, factors)
        if [shape[dim] for dim in wide] != [size for size in factors if size != 1]:
            return self.transpose(self.reshape(index, factors, "/factors"), perm)
        narrow = [dim for dim, size in enumerate(shape) if size == 1]
        return self.transpose(index, (0, *narrow, *(wide[place] for place in perm[1:])))

    def _is_shuffle(self, index: int, factors: Sequence[int], perm: Order) -> bool:
        """Whether few groups of channels and the channels in them change places, everywhere in an image."""
        last = len(perm) - 1
        few = SHUFFLED_GROUPS[self.graph.tensors[index].dtype == "float32"]
        swapped = last >= 3 and perm == (*range(last - 1), last, last - 1)
        return swapped and factors[-2] <= min(few, factors[-1] - 1) and math.prod(factors[1:-2]) > 1

    def _shuffle(self, index: int, factors: Sequence[int]) -> int:
        """Add the TRANSPOSEs of (n, places, groups, channels) to (n, places, channels x groups).

        Moving single elements costs XNNPACK a call for every place. So places go last, and come back as rows
        of one large matrix.
        """
        batch, *places, groups, channels = factors
        last = len(factors) - 1
        index = self._transpose_factors(index, factors, (0, last, last - 1, *range(1, last - 1)))
        index = self.reshape(index, (batch, channels * groups, math.prod(places)), "/shuffled")
        return self.transpose(index, (0, 2, 1))


def same_parameters(x: Tensor, y: Tensor) -> bool:
    """Whether x and y hold the same levels for the same numbers."""
    if x.quant is None or y.quant is None:
        return x.quant is y.quant
    return bool(x.quant.scale == y.quant.scale) and x.quant.zero_point == y.quant.zero_point


def reduced_order(shape: Sequence[int], order: Order, axes: Sequence[int]) -> Order:
    """Return the order left when the dimensions `axes` are removed and the others renumbered.

    Example:
        >>> reduced_order((BATCH, 8, 4, 4), (0, 2, 3, 1), (2, 3))
        (0, 1)
    """
    kept = [dim for dim in range(len(shape)) if dim not in axes]
    return tuple(kept.index(dim) for dim in order if dim in kept)


def common_order(lowering: Lowering, names: Sequence[str], num_dims: int) -> Order:
    """Return the order of the largest activation among `names` that has `num_dims` dimensions.

    Where all of them can be seen as the default order, because only sizes of 1 differ, that is taken.
    """
    best: tuple[int, Order] | None = None
    for name in names:
        tensor = lowering.tensor(name)
        if tensor.is_constant or len(tensor.shape) != num_dims:
            continue
        size = abs(int(np.prod(tensor.shape)))
        if best is None or size > best[0]:
            best = (size, complete_order(tensor.shape, lowering.order(name)))
    return best[1] if best is not None else default_order(num_dims)
