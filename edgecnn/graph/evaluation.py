"""What a graph's values are where the image does not matter, and their shapes where it does.

A position table, a mask made of zeros in the image's device and type, a class token repeated for each image:
such values follow from the weights and the batch size alone. They are computed for two batch sizes; the rest
runs on tensors without data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.nodes import aten, fetch, layer_name
from edgecnn.model import Model

SIZES = (2, 3)
"""Batch sizes that tell a dimension that follows the batch from one that does not."""

_FROM_SHAPE = frozenset(
    {
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
        aten.new_empty.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.empty_like.default,
    }
)


@dataclass
class Evaluation:
    """One run of a graph.

    Attributes:
        values: node -> tensor (on the device "meta" where it depends on the image), number, or several.
        of_image: nodes whose value depends on the image.
    """

    values: dict[fx.Node, Any] = field(default_factory=dict)
    of_image: set[fx.Node] = field(default_factory=set)


def evaluate(model: Model, batch: int) -> Evaluation:
    """Run a graph for one batch size.

    Raises:
        UnsupportedOpError: naming the operator that cannot be run.
    """
    found = Evaluation()
    specs = iter(model.spec.inputs)
    with torch.no_grad():
        for node in model.graph.graph.nodes:
            if node.op == "placeholder":
                shape = (batch, *(int(d or 1) for d in next(specs).shape[1:]))
                found.values[node] = torch.empty(shape, device="meta")
                found.of_image.add(node)
            elif node.op == "get_attr":
                found.values[node] = _attribute(model.graph, node)
            elif node.op == "call_function":
                _call(found, node)
    return found


def _attribute(graph: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return fetch(graph, node) if isinstance(value, torch.Tensor) else value


def _call(found: Evaluation, node: fx.Node) -> None:
    reads_image = any(source in found.of_image for source in node.all_input_nodes)
    is_size = "sym_size" in str(node.target)
    depends = reads_image and not is_size and node.target not in _FROM_SHAPE

    def given(source: fx.Node) -> Any:
        value = found.values[source]
        return value.to("meta") if depends and isinstance(value, torch.Tensor) else value

    keywords = dict(fx.map_arg(node.kwargs, given))
    if node.target in _FROM_SHAPE:
        keywords["device"] = "cpu"
    try:
        found.values[node] = node.target(*fx.map_arg(node.args, given), **keywords)  # type: ignore[operator]
    except (RuntimeError, NotImplementedError, TypeError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedOpError(f"{layer_name(node)} cannot be traced for shapes: {first_line}") from error
    if depends:
        found.of_image.add(node)


def merged_shape(node: fx.Node, first: Any, second: Any) -> tuple[int, ...] | None:
    """Return the shape of a value computed for both of SIZES, -k in the dimension that is k times the batch.

    None where it is no tensor.

    Raises:
        UnsupportedOpError: if a dimension follows the batch in another way, or several do.

    Example: shapes (2, 5) and (3, 5) give (-1, 5), shapes (16, 5) and (24, 5) give (-8, 5).
    """
    if not isinstance(first, torch.Tensor):
        return None
    shape, batched = [], 0
    for a, b in zip(first.shape, second.shape, strict=True):
        if a == b:
            shape.append(int(a))
        elif a * SIZES[1] == b * SIZES[0] and a % SIZES[0] == 0:
            shape.append(-int(a) // SIZES[0])
            batched += 1
        else:
            batched = 2
            break
    if batched > 1:
        raise UnsupportedOpError(
            f"{layer_name(node)} gives shapes {tuple(first.shape)} and {tuple(second.shape)} for batches of "
            f"{SIZES[0]} and {SIZES[1]}, expected one dimension that follows the batch"
        )
    return tuple(shape)
