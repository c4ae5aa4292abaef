"""Rewrite a graph so that the batch is dimension 0 of every value, and nothing known is computed.

Attention code moves the batch about: (n, tokens, c) becomes (tokens, n, c) in `nn.MultiheadAttention`,
windows become part of the batch, (n * windows, tokens, c), in Swin. Both files hold the batch in front, since
its size is open. Every value gets a form (`forms`); operators on single dimensions run on it where it lies,
the others on axes in order.

A network that needs nothing of this is returned as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.evaluation import SIZES, Evaluation, evaluate, merged_shape
from edgecnn.graph.forms import Form, plain_form, settle
from edgecnn.graph.nodes import add_constant, aten, copy_graph, finish, insert_call, is_constant, layer_name
from edgecnn.model import Model

Shape = tuple[int, ...]

MAX_PARTS = 16
"""Windows of an image, at most, that an operator without a rule is repeated for."""


@dataclass(frozen=True)
class Held:
    """A value of the network in the rewritten graph.

    Attributes:
        node: that makes it.
        form: how it lies.
    """

    node: fx.Node
    form: Form


@dataclass(frozen=True)
class Known:
    """A value that no image changes.

    Attributes:
        node: that held it in the graph as it was.
        value: without the batch: rows that are the same for every image are kept once.
    """

    node: fx.Node
    value: torch.Tensor


def put_batch_first(model: Model) -> Model:
    """Return the model with the batch in dimension 0 of every value and known values as constants.

    Args:
        model: float.

    Raises:
        UnsupportedOpError: naming the operator that mixes the images of a batch, or that has no such form.
    """
    if model.fixed_batch is not None or not _may_need_it(model.graph):
        return model
    runs = [evaluate(model, size) for size in SIZES]
    if not _needs_it(model.graph, runs):
        return model
    graph = copy_graph(model.graph)
    back = dict(zip(model.graph.graph.nodes, graph.graph.nodes, strict=True))
    for run in runs:
        run.values = {back[node]: value for node, value in run.values.items()}
        run.of_image = {back[node] for node in run.of_image}
    Rewriter(graph, runs).rewrite()
    return model.with_graph(finish(graph))


_MOVES_BATCH = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default),
        *(aten.transpose.int, aten.expand.default, aten.unflatten.int, aten.flatten.using_ints),
    }
)


def _may_need_it(graph: fx.GraphModule) -> bool:
    """Whether any call could hold the batch elsewhere, or compute what is known."""
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    live: set[fx.Node] = {node for node in graph.graph.nodes if node.op == "placeholder"}
    for node in nodes:
        if not any(source in live for source in node.all_input_nodes):
            return True
        live.add(node)
        if node.target in _MOVES_BATCH or str(node.target).startswith("aten.new_"):
            return True
    return False


def _needs_it(graph: fx.GraphModule, runs: Sequence[Evaluation]) -> bool:
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        if node not in runs[0].of_image:
            if isinstance(runs[0].values[node], torch.Tensor):
                return True
            continue
        for shape in _shapes(node, runs):
            if shape is not None and (shape[:1] != (-1,) or min(shape[1:], default=0) < 0):
                return True
    return False


def _shapes(node: fx.Node, runs: Sequence[Evaluation]) -> list[Shape | None]:
    """Return the shapes of what a node gives, as `merged_shape` writes them."""
    first, second = (run.values[node] for run in runs)
    if isinstance(first, (tuple, list)):
        return [merged_shape(node, a, b) for a, b in zip(first, second, strict=True)]
    return [merged_shape(node, first, second)]


class Rewriter:
    """Rewrites one graph in place, node by node in execution order.

    Args:
        graph: a copy.
        runs: evaluations of it for both of SIZES.
    """

    def __init__(self, graph: fx.GraphModule, runs: Sequence[Evaluation]) -> None:
        from edgecnn.graph.batch_rules import RULES

        self.graph = graph
        self.runs = runs
        self.values: dict[fx.Node, Any] = {}
        self.current: fx.Node = next(iter(graph.graph.nodes))
        self._rules = RULES
        self._settled: dict[tuple[fx.Node, Form], Held] = {}
        self._parts: dict[fx.Node, list[fx.Node]] = {}
        self._names: dict[fx.Node, str] = {}

    def rewrite(self) -> None:
        """Rewrite every node, and drop the calls that are no longer read, random ones too."""
        given, given_names = list(self.graph.graph.nodes), set[str]()
        for node in given:
            self.current = node
            if node.op == "output":
                node.args = fx.map_arg(node.args, self.plain)
            elif node.op == "placeholder":
                self.values[node] = Held(node, plain_form(self.shape(node)))
            elif node.op == "call_function" and node in self.runs[0].of_image:
                self._rewrite_call(node)
        for node in reversed(given):
            if node.op == "call_function" and not node.users:
                self.graph.graph.erase_node(node)
                given_names.add(node.name)
        for made, name in self._names.items():
            if name in given_names:  # the layer is called as it was
                made.name = name

    def _rewrite_call(self, node: fx.Node) -> None:
        rule = self._rules.get(node.target)
        is_plain = self._reads_plain(node) and all(
            shape is None or (shape[:1] == (-1,) and min(shape[1:], default=0) >= 0)
            for shape in self.shapes(node)
        )
        if is_plain and (rule is None or not (rule.always or self._reads_sizes(node))):
            node.args = fx.map_arg(node.args, self.argument)
            node.kwargs = fx.map_arg(node.kwargs, self.argument)
            self.values[node] = self._plain_results(node)
            return
        made = self.by_part(node) if rule is None else rule.rewrite(self, node)
        self.values[node] = made
        if isinstance(made, Held) and made.node is not node and made.node.target is node.target:
            self._names.setdefault(made.node, node.name)

    def has_parts(self, node: fx.Node) -> bool:
        """Whether a value was made part by part."""
        return node in self._parts

    def by_part(self, node: fx.Node) -> Held:
        """Run a call on each part of a batch that a few parts of every image were joined to, windows say."""
        held = self.value(node.args[0])
        settled = self.settled(held) if isinstance(held, Held) else None
        if settled is None or settled.form.dims[0] != (0, 1) or settled.form.axes[1] > MAX_PARTS:
            raise UnsupportedOpError(
                f"{layer_name(node)} reads or gives values whose batch is not in dimension 0",
                hint="write the network with the batch first, for instance x.view(x.shape[0], ...)",
            )
        count = settled.form.axes[1]
        parts = self._parts.get(settled.node)
        if parts is None:
            parts = [self.call(aten.select.int, settled.node, 1, i) for i in range(count)]
        rest = [self.argument(a) if isinstance(a, fx.Node) else a for a in node.args[1:]]
        made = []
        for part in parts:
            made.append(self.call(node.target, part, *rest))
            made[-1].kwargs = fx.map_arg(node.kwargs, self.argument)
        whole = self.call(aten.stack.default, made, 1)
        self._parts[whole] = made
        shape = self.shape(node)
        if shape[0] != -count or min(shape[1:], default=0) < 0:
            raise UnsupportedOpError(f"{layer_name(node)} gives {shape}, expected {-count} in dimension 0")
        dims = ((0, 1), *((i + 1,) for i in range(1, len(shape))))
        return Held(whole, Form((-1, count, *shape[1:]), dims))

    def _plain_results(self, node: fx.Node) -> Any:
        shapes = self.shapes(node)
        if isinstance(self.runs[0].values[node], (tuple, list)):
            return [None if shape is None else plain_form(shape) for shape in shapes]
        return Held(node, plain_form(self.shape(node)))

    def _reads_plain(self, node: fx.Node) -> bool:
        held = [self.values.get(n) for n in node.all_input_nodes]
        return all(
            not isinstance(h, Held) or h.form.is_plain or settle(h.form).form.is_plain for h in held
        ) and not any(isinstance(h, list) and h and isinstance(h[0], Held) for h in held)

    def _reads_sizes(self, node: fx.Node) -> bool:
        """Whether an argument is a size computed from the batch."""
        return any(isinstance(self.runs[0].values.get(n), int) for n in node.all_input_nodes)

    def shapes(self, node: fx.Node) -> list[Shape | None]:
        """Return the network's shapes of what a node gives, -k for k times the batch."""
        return _shapes(node, self.runs)

    def shape(self, node: fx.Node) -> Shape:
        """Return the network's shape of a tensor."""
        shape = self.shapes(node)[0]
        if shape is None:
            raise UnsupportedOpError(f"{layer_name(node)} gives no tensor")
        return shape

    def value(self, source: Any) -> Held | Known:
        """Return a tensor argument."""
        found = self.values.get(source)
        if isinstance(found, Held):
            return found
        if source in self.runs[0].of_image:
            raise UnsupportedOpError(f"{layer_name(self.current)} reads several values as one")
        return Known(source, self._without_batch(source))

    def _without_batch(self, source: fx.Node) -> torch.Tensor:
        """Return a known value with its batch dimension, whose rows must be alike, of size 1."""
        value: torch.Tensor = self.runs[0].values[source]
        shape = merged_shape(source, value, self.runs[1].values[source]) or ()
        for dim, size in enumerate(shape):
            if size < 0:
                row = value.narrow(dim, 0, 1)
                if size != -1 or not torch.equal(row.expand_as(value), value):
                    raise UnsupportedOpError(f"{layer_name(source)} differs from image to image of a batch")
                return row
        return value

    def call(self, target: Any, *args: Any) -> fx.Node:
        """Insert a call ahead of the current node, which names its layer."""
        return insert_call(self.graph, self.current, target, args, like=self.current)

    def constant(self, known: Known, value: torch.Tensor | None = None) -> fx.Node:
        """Return a node that holds a known value: the parameter itself, or a buffer."""
        given = known.value if value is None else value
        if value is None and is_constant(known.node):
            return known.node
        return add_constant(self.graph, self.current, known.node.name, given)

    def argument(self, source: fx.Node) -> Any:
        """Return what stands for an argument of a call on plain values."""
        if source in self.runs[0].of_image:
            found = self.values.get(source)
            return self.plain(source) if isinstance(found, Held) else source
        value = self.runs[0].values[source]
        if isinstance(value, torch.Tensor):
            known = self.value(source)
            return self.constant(known) if isinstance(known, Known) else source
        if value != self.runs[1].values[source]:
            raise UnsupportedOpError(f"{layer_name(self.current)} depends on the size of the batch")
        return value

    def plain(self, source: fx.Node) -> fx.Node:
        """Return a node that holds a value with the batch in dimension 0 and nothing joined to it."""
        if source not in self.runs[0].of_image:
            found = self.value(source)
            return self.constant(found) if isinstance(found, Known) else source
        held = self.settled(self.values[source])
        if not held.form.is_plain:
            raise UnsupportedOpError(
                f"{layer_name(self.current)} reads {self.shape(source)} (negative: times the batch), "
                "expected the batch alone in dimension 0"
            )
        return held.node

    def settled(self, held: Held) -> Held:
        """Return a value with one axis per dimension, the batch first."""
        key = (held.node, held.form)
        if key in self._settled:
            return self._settled[key]
        plan = settle(held.form)
        node = held.node
        if plan.perm != tuple(range(len(plan.perm))):
            node = self.call(aten.permute.default, node, list(plan.perm))
        if tuple(held.form.axes[i] for i in plan.perm) != plan.form.axes:
            node = self.call(aten.reshape.default, node, list(plan.form.axes))
        self._settled[key] = Held(node, plan.form)
        return self._settled[key]

    def reshaped(self, held: Held, form: Form) -> Held:
        """Return a value whose axes are divided further."""
        if form.axes == held.form.axes:
            return Held(held.node, form)
        return Held(self.call(aten.reshape.default, held.node, list(form.axes)), form)
