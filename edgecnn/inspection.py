"""What a network is made of, what each layer costs, and what has no lowering."""

from __future__ import annotations

from typing import Any

import torch

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.build import build_program
from edgecnn.graph.build_ops import unsupported_nodes
from edgecnn.graph.cost import layer_costs
from edgecnn.graph.inference_form import to_inference_form
from edgecnn.graph.nodes import layer_name
from edgecnn.graph.shapes import infer_shapes
from edgecnn.load import LoadOptions, load_model
from edgecnn.model import Model


def inspect_model(source: Any, options: LoadOptions | None = None) -> dict[str, Any]:
    """Describe a network.

    Args:
        source: whatever `load_model` takes.
        options: how to load it.

    Returns:
        JSON-ready: name, task, params, macs, size_bytes, inputs, outputs, preprocess, layers (layer, op,
        output_shape, params, macs), unsupported (layers and operators without a lowering) and warnings.
        macs and layers are None and empty where an operator has no lowering. Of a network that compress has
        quantized, the integers count as params.
    """
    model = load_model(source, options or LoadOptions())
    tensors = [*model.graph.parameters(), *_integer_buffers(model)]
    parameters = list({id(p): p for p in tensors}.values())
    warnings = list(model.warnings)
    model, unsupported = _unsupported(model)
    layers: list[dict[str, Any]] = []
    macs: int | None = None
    if not unsupported:
        try:
            costs = layer_costs(build_program(model))
            macs = sum(cost.macs for cost in costs)
            layers = [
                {
                    "layer": cost.layer,
                    "op": cost.kind,
                    "output_shape": [None, *cost.output_shape[1:]],
                    "params": cost.params,
                    "macs": cost.macs,
                }
                for cost in costs
            ]
        except UnsupportedOpError as error:
            unsupported = [error.message]
    return {
        "name": model.spec.name,
        "task": model.spec.task,
        "params": sum(p.numel() for p in parameters),
        "macs": macs,
        "size_bytes": sum(p.numel() * p.element_size() for p in parameters),
        "inputs": [{"name": s.name, "shape": list(s.shape)} for s in model.spec.inputs],
        "outputs": [{"name": s.name, "shape": list(s.shape)} for s in model.spec.outputs],
        "preprocess": model.spec.preprocess.to_dict(),
        "layers": layers,
        "unsupported": unsupported,
        "warnings": warnings,
    }


def _unsupported(model: Model) -> tuple[Model, list[str]]:
    """Return the network in the form for files, and what has no lowering there."""
    try:
        if not _integer_buffers(model):
            model = to_inference_form(model)
        found = unsupported_nodes(list(model.graph.graph.nodes), set(infer_shapes(model)))
    except UnsupportedOpError as error:
        return model, [error.message]
    return model, [layer_name(node) for node in found]


def _integer_buffers(model: Model) -> list[torch.Tensor]:
    """Return the int8 weights and int32 biases of a network that is quantized already."""
    return [buffer for buffer in model.graph.buffers() if buffer.dtype in (torch.int8, torch.int32)]
