"""Run a graph on channel ids instead of numbers.

Every convolution and linear layer issues one new id per output channel; what follows moves ids around
exactly as it would move numbers, and joins the ids of elements it combines. What the operators say on the
way is collected here: which ids are one (`join`), along which dimension a value must keep its size
(`rigid`), which tensor dimension follows which ids (`bind`), which ids cannot go at all (`freeze`), and
where zero is not the same as absent (`inexact`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from edgecnn.errors import EdgeCNNError, UnsupportedOpError
from edgecnn.graph.channels.union import Classes
from edgecnn.graph.channels.values import (
    Constant,
    Record,
    Value,
    blank,
    compact,
    constant_of,
    spread,
    tidy,
    varying,
)
from edgecnn.graph.nodes import fetch, layer_name
from edgecnn.model import Model

Handler = Callable[["Trace", fx.Node], Record]


@dataclass(frozen=True)
class Binding:
    """A constant read element by element with a value of these ids; both have the same shape after
    alignment.
    """

    constant: Constant
    ids: Tensor
    role: str
    node: fx.Node


@dataclass(frozen=True)
class Rigid:
    """A dimension of a value that must keep its size."""

    ids: Tensor
    dim: int
    reason: str


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer as it was met; ids are vectors, raw."""

    node: fx.Node
    kind: str
    output_ids: Tensor
    input_ids: Tensor
    position_ids: Tensor
    groups: int


class Trace:
    """What is known so far, and the questions and statements of the operators' handlers.

    Attributes:
        classes: the disjoint sets of channel ids.
        records: node -> what its value is made of.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.graph = model.graph
        self.batch = model.fixed_batch or 1
        self.classes = Classes()
        self.records: dict[fx.Node, Record] = {}
        self.rigids: list[Rigid] = []
        self.bindings: list[Binding] = []
        self.layers: list[Layer] = []
        self.frozen: list[tuple[Tensor, str]] = []
        self.inexact: list[tuple[fx.Node, str, Tensor]] = []
        self.inexact_constants: list[tuple[fx.Node, str, tuple[tuple[str, int], ...]]] = []
        self._values = _example_values(model, self.batch)
        self._real: dict[fx.Node, Any] = {}

    # --- what handlers ask ---

    def example(self, node: Any) -> Any:
        """Return a node's value at this batch size, a tensor without data; numbers as they are."""
        return self._values[node] if isinstance(node, fx.Node) else node

    def shape(self, node: Any) -> tuple[int, ...]:
        """Return the shape of a tensor node at this batch size."""
        return tuple(int(s) for s in self._values[node].shape)

    def record(self, node: Any) -> Record:
        """Return what is known of an argument; None for numbers."""
        return self.records.get(node) if isinstance(node, fx.Node) else None

    def value(self, node: Any) -> Value:
        """Return the ids of an argument; no channels where it is a constant."""
        found = self.record(node)
        return found if isinstance(found, Value) else Value(blank(self.shape(node)))

    def real(self, node: Any) -> Any:
        """Return the numbers behind a node made of constants alone (an index, say)."""
        if not isinstance(node, fx.Node):
            return node
        if not isinstance(self._values[node], Tensor):
            return self._values[node]
        if node not in self._real:
            if node.op == "get_attr":
                self._real[node] = fetch(self.graph, node)
            elif node.op == "call_function":
                self._real[node] = node.target(  # type: ignore[operator]
                    *fx.map_arg(node.args, self.real), **fx.map_arg(node.kwargs, self.real)
                )
            else:
                raise UnsupportedOpError(f"{layer_name(node)} depends on the image")
        return self._real[node]

    def vector(self, node: Any, dim: int, reason: str) -> Tensor:
        """Return the ids along one dimension, shape (size of dim,); along the others they may not change."""
        ids = self.value(node).ids
        for d in varying(ids):
            if d != dim % ids.dim():
                self.rigid(ids, d, reason)
        moved = compact(ids.movedim(dim, 0)).flatten(1)[:, 0]
        return moved.expand(ids.shape[dim]) if len(moved) == 1 else moved

    def resolved(self, ids: Tensor) -> Tensor:
        """Return the least id of each element's class, tidy."""
        small = compact(ids)
        return tidy(torch.from_numpy(self.classes.find(small.numpy())).expand(ids.shape))

    # --- what handlers say ---

    def issue(self, count: int) -> Tensor:
        """Return new channel ids, shape (count,)."""
        return torch.from_numpy(self.classes.issue(count))

    def join(self, a: Tensor, b: Tensor) -> None:
        """Say that elements of equal position are one channel; where only one of them is a channel,
        nothing.
        """
        a, b = spread(a, b)
        self.classes.join(a.numpy(), b.numpy())

    def join_all(self, ids: Tensor, keep: Sequence[int]) -> Tensor:
        """Join the ids along all dimensions but `keep`, and return ids that follow only those.

        Where one element of a slice belongs to no channel, the whole slice is frozen.
        """
        first = ids
        for d in range(ids.dim()):
            if d not in keep:
                first = first.narrow(d, 0, 1)
        small = compact(ids)
        best = small
        for d in range(small.dim()):
            if d not in keep and small.shape[d] > 1:
                best = best.amax(d, keepdim=True)
        self.join(small, best.expand_as(small))
        mixed = (small < 0) & (best >= 0).expand_as(small)
        if bool(mixed.any()):
            self.freeze(
                best.expand_as(small)[mixed], "shares its place with values that belong to no channel"
            )
        return tidy(best.expand(first.shape).expand_as(ids))

    def freeze(self, ids: Tensor, reason: str) -> None:
        """Say that these channels cannot be cut."""
        self.frozen.append((compact(ids), reason))

    def rigid(self, ids: Tensor, dim: int, reason: str) -> None:
        """Say that a value must keep its size along one dimension."""
        self.rigids.append(Rigid(ids, dim % ids.dim(), reason))

    def bind(self, constant: Record, ids: Tensor, role: str, node: fx.Node) -> None:
        """Say that a constant is read element by element with a value of these ids (equal shapes)."""
        if isinstance(constant, Constant):
            self.bindings.append(Binding(constant, ids, role, node))

    def unknown(self, node: fx.Node, reason: str) -> Record:
        """Freeze everything a node reads and return a record without channels."""
        for source in node.all_input_nodes:
            found = self.record(source)
            for item in found if isinstance(found, tuple) else (found,):
                if isinstance(item, Value):
                    self.freeze(item.ids, reason)
        return self.without_channels(node)

    def without_channels(self, node: fx.Node) -> Record:
        """Return the record of a node whose value has no channels."""
        example = self.example(node)
        if isinstance(example, Tensor):
            return Value(blank(example.shape))
        if isinstance(example, (tuple, list)):
            return tuple(
                Value(blank(e.shape)) if isinstance(e, Tensor) else Constant((), ()) for e in example
            )
        return None


class ShapeInterpreter(fx.Interpreter):
    """Runs a graph on tensors without data and keeps every value; numbers (sizes) are real.

    Attributes:
        values: node -> tensor on the meta device, a sequence of them, or a number.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and keep its value."""
        try:
            self.values[n] = super().run_node(n)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UnsupportedOpError(f"{layer_name(n)} does not run: {reason}") from error
        return self.values[n]

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a parameter's shape."""
        value = super().get_attr(target, args, kwargs)
        return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator; a tensor that it makes has no data either."""
        meta = torch.device("meta")
        args = tuple(meta if isinstance(a, torch.device) else a for a in args)
        kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
        if "device" in kwargs:
            kwargs["device"] = meta
        return super().call_function(target, args, kwargs)

    def run_shapes(self, model: Model, batch: int) -> Any:
        """Run on `batch` images and return the outputs."""
        with torch.no_grad():
            return self.run(
                *(
                    torch.empty((batch, *(int(d or 1) for d in s.shape[1:])), device="meta")
                    for s in model.spec.inputs
                )
            )


def _example_values(model: Model, batch: int) -> dict[fx.Node, Any]:
    interpreter = ShapeInterpreter(model.graph)
    interpreter.run_shapes(model, batch)
    return interpreter.values


def op_name(node: fx.Node) -> str:
    """Return the ATen operator's name without its overload ("conv2d"), or a function's name."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name.split("::")[-1])
    return str(getattr(node.target, "__name__", node.target))


def run_trace(model: Model, handlers: Mapping[str, Handler], constants: Mapping[str, Handler]) -> Trace:
    """Walk a graph in execution order and return all that its operators said.

    Args:
        model: any graph.
        handlers: operator name -> what it does to channels.
        constants: operator name -> what it does to values made of constants alone.
    """
    trace = Trace(model)
    for node in model.graph.graph.nodes:
        if node.op == "get_attr":
            example = trace.example(node)
            found: Record = (
                constant_of(str(node.target), example.shape) if isinstance(example, Tensor) else None
            )
        elif node.op == "placeholder":
            found = trace.without_channels(node)
        elif node.op == "output":
            for source in node.all_input_nodes:
                item = trace.record(source)
                if isinstance(item, Value):
                    trace.freeze(item.ids, "is an output of the network")
            found = None
        else:
            found = _call(trace, node, handlers, constants)
        trace.records[node] = _settled(trace, found)
    return trace


def _settled(trace: Trace, record: Record) -> Record:
    """Read ids that follow several dimensions through the classes joined so far; they may follow fewer."""
    if isinstance(record, tuple):
        return tuple(_settled(trace, item) for item in record)  # type: ignore[misc]
    if isinstance(record, Value) and len(varying(record.ids)) > 1:
        return Value(trace.resolved(record.ids), record.zero)
    return record


def _call(
    trace: Trace, node: fx.Node, handlers: Mapping[str, Handler], constants: Mapping[str, Handler]
) -> Record:
    """Return the record of one call."""
    example = trace.example(node)
    if not isinstance(example, (Tensor, tuple, list)):
        return None
    if node.target is operator.getitem:
        whole, position = trace.record(node.args[0]), cast("int", node.args[1])
        return whole[int(position)] if isinstance(whole, tuple) else trace.unknown(node, "is indexed")
    name = op_name(node)
    sources = [trace.record(source) for source in node.all_input_nodes]
    if any(isinstance(s, (Value, tuple)) for s in sources):
        handler = handlers.get(name) or (handlers["pointwise"] if _is_pointwise(node) else handlers[""])
    else:
        handler = constants.get(name, constants[""])
    try:
        return handler(trace, node)
    except (EdgeCNNError, RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return trace.unknown(node, f"{layer_name(node)} cannot be followed ({reason[:120]})")


def _is_pointwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags
