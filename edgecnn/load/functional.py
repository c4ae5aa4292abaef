"""Make an exported graph functional: no op writes into a tensor that another op can see.

`torch.export` keeps in-place ops. Of y = op_(a, ...) the value written is op(a, ...), so

    y = op_(a, ...)   ->   y = op(a, ...)   and every later use of a becomes a use of y,

which is right when no other alias of a's storage is read later. A view v = view(a) taken before and read
after is taken again from y. Everything else is left to PyTorch's own functionalisation by the caller.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

_aten = torch.ops.aten

_DROPOUT = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
_NO_OPS = ("clone", "contiguous", "detach", "alias", "lift_fresh_copy", "lift_fresh", "_conj_physical")
_ASSERTS = ("_assert_", "_assert", "sym_constrain_range", "_check")


class NotFunctionalError(Exception):
    """An in-place op that cannot be shown to have a functional form; the message names op and layer."""


def make_functional(graph_module: GraphModule) -> bool:
    """Rewrite in-place ops, drop what computes nothing in eval mode; edits `graph_module`.

    Args:
        graph_module: a graph module of `ExportedProgram.module()`.

    Returns:
        Whether an in-place op was rewritten.

    Raises:
        NotFunctionalError: for a mutation with no simple functional form.
    """
    graph = graph_module.graph
    _drop_asserts(graph)
    _set_eval(graph)
    rewritten = _rewrite_in_place(graph)
    _drop_no_ops(graph)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if _is_mutable(node):
            raise NotFunctionalError(f"{layer_name(node)} writes into its input")
    graph.lint()
    graph_module.recompile()
    return rewritten


def op_name(node: Node) -> str:
    """Return the ATen op's name without its overload ("relu_"), or an empty string."""
    target = node.target
    return str(target._schema.name.split("::")[-1]) if isinstance(target, torch._ops.OpOverload) else ""


def layer_name(node: Node) -> str:
    """Return where in the network a node comes from: "layer1.0.relu (aten.relu_)"."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    path = path.removeprefix("L['self'].").removeprefix("L['self']")
    return f"{path or node.name} ({str(node.target).removesuffix('.default')})"


def _is_mutable(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _drop_asserts(graph: Graph) -> None:
    for node in reversed(list(graph.nodes)):
        is_guard = node.op == "call_module" and str(node.target).startswith("_guards")
        is_assert = node.op == "call_function" and op_name(node).startswith(_ASSERTS)
        if (is_guard or is_assert) and not node.users:
            graph.erase_node(node)


def _argument(node: Node, name: str) -> int | None:
    """Return the position of argument `name` in the node's schema."""
    schema = node.target._schema  # type: ignore[union-attr]
    return next((i for i, argument in enumerate(schema.arguments) if argument.name == name), None)


def _set_eval(graph: Graph) -> None:
    """Turn training batch_norm into eval, drop dropout and the counters of training batches."""
    for node in list(graph.nodes):
        name = op_name(node)
        if name.rstrip("_") in _DROPOUT and node.op == "call_function":
            if name == "native_dropout":
                raise NotFunctionalError(f"{layer_name(node)} is dropout in training form")
            node.replace_all_uses_with(_tensor_input(node))
            graph.erase_node(node)
        elif name in ("batch_norm", "instance_norm"):
            position = _training_position(node)
            if position is not None:
                node.update_arg(position, False)
        elif name == "add_" and not node.users and _is_counter(node):
            graph.erase_node(node)


def _training_position(node: Node) -> int | None:
    """Return the position of the flag that says "training", where eval mode can be had."""
    name = op_name(node).rstrip("_")
    if name in _DROPOUT:
        position = _argument(node, "train")
    elif name in ("batch_norm", "instance_norm"):
        statistics = _argument(node, "running_mean")
        if statistics is None or statistics >= len(node.args) or node.args[statistics] is None:
            return None  # weight standardisation, or instance_norm: there are no statistics to use instead
        position = _argument(node, "training" if name == "batch_norm" else "use_input_stats")
    else:
        return None
    return position if position is not None and position < len(node.args) else None


def is_training(graph: Graph) -> bool:
    """Tell whether any batch_norm or dropout of the graph is in training mode."""
    positions = ((node, _training_position(node)) for node in graph.nodes)
    return any(position is not None and node.args[position] is True for node, position in positions)


def _is_counter(node: Node) -> bool:
    source = _tensor_input(node)
    return source.op == "get_attr" and str(source.target).endswith("num_batches_tracked")


def _tensor_input(node: Node) -> Node:
    source = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    if not isinstance(source, Node):
        raise NotFunctionalError(f"{layer_name(node)} has no tensor as its first argument")
    return source


def _aliased_input(node: Node) -> Node | None:
    """Return the node whose storage this node's result may share, if any."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return _tensor_input(node)
    if isinstance(node.target, torch._ops.OpOverload):
        if op_name(node) == "reshape_as":
            return _tensor_input(node)
        if any(result.alias_info is not None for result in node.target._schema.returns):
            return _tensor_input(node)
    return None


def _functional_target(node: Node) -> Any:
    """Return relu for relu_, with the same overload and arguments.

    Raises:
        NotFunctionalError: if there is none.
    """
    schema = node.target._schema  # type: ignore[union-attr]
    namespace, name = schema.name.split("::")
    if not name.endswith("_") or name.endswith("__"):
        raise NotFunctionalError(f"{layer_name(node)} writes into its arguments")
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    overload = getattr(packet, schema.overload_name or "default", None)
    if overload is None or len(overload._schema.arguments) != len(schema.arguments):
        raise NotFunctionalError(f"{layer_name(node)} has no functional form")
    if overload._schema.is_mutable or len(overload._schema.returns) != 1:
        raise NotFunctionalError(f"{layer_name(node)} has no functional form")
    return overload


def _rewrite_in_place(graph: Graph) -> bool:
    root: dict[Node, Node] = {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    rewritten = False
    for node in list(graph.nodes):
        source = _aliased_input(node)
        root[node] = root[source] if source is not None else node
        if node.op != "call_function" or not _is_mutable(node):
            continue
        target = _functional_target(node)
        written = _tensor_input(node)
        if root[written].op == "get_attr":
            raise NotFunctionalError(
                f"{layer_name(node)} changes {root[written].target}, a parameter or buffer"
            )
        _check_dtype(node, written)
        _redirect(graph, node, written, root, order)
        node.target = target
        root[node] = node
        rewritten = True
    return rewritten


def _check_dtype(node: Node, written: Node) -> None:
    before, after = written.meta.get("val"), node.meta.get("val")
    for argument in node.all_input_nodes:
        value = argument.meta.get("val")
        if (
            isinstance(value, torch.Tensor)
            and isinstance(before, torch.Tensor)
            and value.dtype != before.dtype
        ):
            raise NotFunctionalError(f"{layer_name(node)} mixes {before.dtype} and {value.dtype}")
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.shape != after.shape:
        raise NotFunctionalError(f"{layer_name(node)} changes the shape")


def _redirect(
    graph: Graph, node: Node, written: Node, root: dict[Node, Node], order: dict[Node, int]
) -> None:
    """Make the uses after `node` of `written`, and of views of it, read what `node` computes."""
    here = order[node]
    aliases = [a for a in root if a is not node and a is not written and root[a] is root[written]]
    stale = {a: users for a in aliases if (users := [u for u in a.users if order.get(u, here) > here])}
    fresh: dict[Node, Node] = {written: node}
    anchor = node
    for alias in aliases:  # in graph order: a view's source comes before it
        source = _aliased_input(alias)
        if source not in fresh:
            if alias in stale:
                raise NotFunctionalError(
                    f"{layer_name(node)} writes into a view of {alias.name}, which is read later"
                )
            continue
        if alias.op == "call_function" and _is_mutable(alias):
            continue
        with graph.inserting_after(anchor):
            anchor = graph.node_copy(alias, lambda n: fresh.get(n, n))
        fresh[alias], root[anchor], order[anchor] = anchor, node, here
    for alias, users in stale.items():
        for user in users:
            user.replace_input_with(alias, fresh[alias])
    for user in [u for u in written.users if u is not node and order.get(u, here) > here]:
        user.replace_input_with(written, node)


def _drop_no_ops(graph: Graph) -> None:
    dropped_layout = False
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = op_name(node)
        if name in _NO_OPS or (name in ("to", "_to_copy", "type_as") and _keeps_type(node)):
            dropped_layout = dropped_layout or name in ("clone", "contiguous")
            node.replace_all_uses_with(_tensor_input(node))
            graph.erase_node(node)
    if dropped_layout:  # a view of what is no longer contiguous must be a reshape
        for node in graph.nodes:
            if node.target in (_aten.view.default, _aten._unsafe_view.default):
                node.target = _aten.reshape.default


def _keeps_type(node: Node) -> bool:
    before, after = _tensor_input(node).meta.get("val"), node.meta.get("val")
    return (
        isinstance(before, torch.Tensor)
        and isinstance(after, torch.Tensor)
        and before.dtype == after.dtype
        and before.device == after.device
    )
