"""Give a graph of fixed batch N a dynamic one: N in the shapes of views becomes the input's batch size.

    view(x, [N, 4096])   ->   view(x, [sym_size(input, 0), 4096])

A guess, checked by value: rows computed in a batch of 3 must equal the rows computed alone.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from edgecnn.load.functional import op_name
from edgecnn.model import copy_graph

_SHAPE_ARGUMENT = {
    "view": 1, "reshape": 1, "_unsafe_view": 1, "expand": 1, "new_zeros": 1, "new_ones": 1, "new_empty": 1,
    "new_full": 1, "zeros": 0, "ones": 0, "full": 0, "empty": 0,
}  # fmt: skip
"""Position of the shape among the arguments, by op."""


def make_batch_dynamic(graph: GraphModule, batch: int) -> GraphModule:
    """Return a copy of `graph` whose literal batch sizes follow the input.

    Args:
        graph: exported for a batch of `batch` images.
        batch: the literal to look for in dimension 0.

    Example:
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x.view(2, 12)
        >>> fixed = torch.export.export(Net(), (torch.zeros(2, 3, 2, 2),)).module(check_guards=False)
        >>> tuple(make_batch_dynamic(fixed, 2)(torch.zeros(5, 3, 2, 2)).shape)
        (5, 12)
    """
    edited = copy_graph(graph)
    nodes = edited.graph.nodes
    image = next(node for node in nodes if node.op == "placeholder")
    depends = {image}
    for node in nodes:
        if any(source in depends for source in node.all_input_nodes):
            depends.add(node)
    size: Node | None = None
    for node in list(nodes):
        position = _SHAPE_ARGUMENT.get(op_name(node))
        if node.op != "call_function" or position is None or position >= len(node.args):
            continue
        shape = node.args[position]
        is_view = position == 1 and op_name(node) != "expand"
        if not isinstance(shape, (list, tuple)) or not shape or shape[0] != batch:
            continue
        if is_view and node.args[0] not in depends:
            continue
        if size is None:
            with edited.graph.inserting_after(image):
                size = edited.graph.call_function(torch.ops.aten.sym_size.int, (image, 0))
        node.update_arg(position, [size, *shape[1:]])
    edited.graph.lint()
    edited.recompile()
    return edited


def same_rows(fixed: GraphModule, dynamic: GraphModule, shape: tuple[int, ...], batch: int) -> bool:
    """Tell whether `dynamic` gives in a batch of 3 the rows it gives alone, and those of `fixed`.

    Args:
        fixed: accepts `batch` images only.
        dynamic: accepts any batch.
        shape: (c, h, w).
        batch: see `fixed`.
    """
    x = torch.randn((max(3, batch), *shape), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = pytree.tree_leaves(dynamic(x))
        alone = [pytree.tree_leaves(dynamic(x[i : i + 1])) for i in range(3)]
        known = pytree.tree_leaves(fixed(x[:batch]))
    for position, value in enumerate(together):
        rows = torch.cat([outputs[position] for outputs in alone])
        tolerance = 1e-4 * (1.0 + float(value.abs().max()))
        if value.shape[0] != x.shape[0] or rows.shape[0] != 3:
            return False
        if not torch.allclose(value[:3], rows, rtol=1e-3, atol=tolerance):
            return False
        if not torch.allclose(value[:batch], known[position], rtol=1e-3, atol=tolerance):
            return False
    return True
