"""Small questions about, and edits of, exported graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from edgecnn.errors import UnsupportedOpError
from edgecnn.model import copy_graph as copy_graph

aten = torch.ops.aten


def layer_name(node: fx.Node) -> str:
    """Return where in the network a node comes from, for messages.

    Example: "layer1.0.conv2 (aten.conv2d.default)"; the node's own name where the export kept no path.
    """
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    if stack:
        path = str(list(stack.values())[-1][0])
        path = path.replace("L['self']", "").replace("L__self__", "").strip("._")
    return f"{path or node.name} ({node.target})"


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Return a call's argument given by position or by keyword, else its default."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def fetch(graph: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    """Return the tensor that a get_attr node names."""
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if not isinstance(value, torch.Tensor):
        raise UnsupportedOpError(f"attribute {node.target!r} is a {type(value).__name__}, expected a tensor")
    return value.detach()


def is_constant(node: Any) -> bool:
    """Whether the value is known without running the network (a parameter or buffer)."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


def add_constant(graph: fx.GraphModule, before: fx.Node, name: str, value: torch.Tensor) -> fx.Node:
    """Register `value` as a buffer under a free name and return a get_attr node ahead of `before`."""
    base = name.replace(".", "_")
    free, count = base, 0
    while hasattr(graph, free):
        count += 1
        free = f"{base}_{count}"
    graph.register_buffer(free, value.detach().clone().contiguous())
    with graph.graph.inserting_before(before):
        return graph.graph.get_attr(free)


def insert_call(
    graph: fx.GraphModule, before: fx.Node, target: Any, args: Sequence[Any], like: fx.Node
) -> fx.Node:
    """Insert a call ahead of `before`, carrying the layer path of `like`."""
    with graph.graph.inserting_before(before):
        node = graph.graph.call_function(target, tuple(args))
    if "nn_module_stack" in like.meta:
        node.meta["nn_module_stack"] = like.meta["nn_module_stack"]
    return node


def finish(graph: fx.GraphModule) -> fx.GraphModule:
    """Drop dead nodes and buffers no longer read, check the graph and compile it again."""
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    used = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for name in [n for n, _ in (*graph.named_parameters(), *graph.named_buffers())]:
        if name not in used:
            owner_path, _, leaf = name.rpartition(".")
            owner = graph.get_submodule(owner_path) if owner_path else graph
            delattr(owner, leaf)
    graph.graph.lint()
    graph.recompile()
    return graph


def pair(value: Any) -> tuple[int, int]:
    """Return (h, w) of an int or of a list of one or two ints.

    Example:
        >>> pair([3]), pair(2)
        ((3, 3), (2, 2))
    """
    if isinstance(value, int):
        return (value, value)
    values = [int(v) for v in value]
    return (values[0], values[-1])
