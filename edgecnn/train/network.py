"""The copy of a model's graph that is trained.

Against the model's own graph it is in training mode, its floating-point parameters want gradients, 4-D
weights lie channels_last (the layout that oneDNN and cuDNN are fast in), `view` is `reshape` (a channels_last
value has no view as a flat one), and the outputs come as a flat tuple, followed by the values tapped.
Node and parameter names are the model's. Of the copy only the tensors go back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from edgecnn.errors import PassError
from edgecnn.graph.modes import set_training
from edgecnn.graph.nodes import aten, copy_graph
from edgecnn.model import Model
from edgecnn.train.precision import autocast

_RESHAPED = {aten.view.default, aten._unsafe_view.default}


class TrainingNetwork:
    """A trainable copy of a model's graph.

    Args:
        model: stays as it is.
        taps: names of nodes whose values are wanted.
        device: where it trains.
        dtype: of convolutions and matrix products.

    Raises:
        PassError: if nothing in the graph can be trained, or there is no node of a name.
    """

    def __init__(
        self, model: Model, taps: tuple[str, ...], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = model
        self.taps = taps
        self.device = device
        self.dtype = dtype
        self.graph = copy_graph(model.graph)
        self._flatten_outputs()
        self.graph.to(device=device)
        self.parameters = self._make_trainable()
        set_training(self.graph, True)

    def _make_trainable(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, parameter in self.graph.named_parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
            parameter.requires_grad_(True)
            found[name] = parameter
        if not found:
            raise PassError(
                f"{self.model.spec.name}: the graph has no trainable parameters",
                hint="train before batch norms are folded and weights are quantized",
            )
        return found

    def _flatten_outputs(self) -> None:
        graph = self.graph.graph
        by_name = {node.name: node for node in graph.nodes}
        unknown = [name for name in self.taps if name not in by_name]
        if unknown:
            raise PassError(f"{self.model.spec.name}: the graph has no node {unknown[0]!r} to tap")
        output = next(node for node in graph.nodes if node.op == "output")
        flat: list[fx.Node] = []
        fx.map_arg(output.args, flat.append)
        self._num_outputs = len(flat)
        output.args = ((*flat, *(by_name[name] for name in self.taps)),)
        for node in graph.nodes:
            if node.target in _RESHAPED:
                node.target = aten.reshape.default
            if "device" in node.kwargs:  # tensors made in the graph follow the parameters
                node.update_kwarg("device", self.device)
        graph.set_codegen(fx.graph.CodeGen())
        graph.lint()

    def __call__(self, x: Tensor) -> tuple[tuple[Tensor, ...], Mapping[str, Tensor]]:
        """Run it.

        Args:
            x: (n, c, h, w), float32.

        Returns:
            The outputs in order, and tapped node name -> value; all float32.
        """
        with autocast(self.dtype, self.device):
            values = self.graph(x)
        values = [value.float() if value.is_floating_point() else value for value in values]
        outputs = tuple(values[: self._num_outputs])
        return outputs, dict(zip(self.taps, values[self._num_outputs :], strict=True))

    def statistics(self) -> list[Tensor]:
        """Return the floating-point buffers: running means and variances, not copied."""
        return [buffer for buffer in self.graph.buffers() if buffer.is_floating_point()]

    def set_training(self, training: bool) -> None:
        """Choose between batch and running statistics."""
        set_training(self.graph, training)

    def tensors(self) -> dict[str, Tensor]:
        """Return every parameter and buffer by name, not copied."""
        return {
            name: tensor.detach()
            for name, tensor in (*self.graph.named_parameters(), *self.graph.named_buffers())
        }

    def copies(self) -> dict[str, Tensor]:
        """Return copies of every parameter and buffer by name."""
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into the parameters and buffers; their layout stays."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    def to_model(self) -> Model:
        """Return the model with these parameters and buffers, on the CPU, in eval mode."""
        return model_with(self.model, self.tensors())


@torch.no_grad()
def model_with(model: Model, tensors: Mapping[str, Tensor]) -> Model:
    """Return a copy of a model with other values in its parameters and buffers."""
    graph = copy_graph(model.graph)
    owned: dict[str, Any] = dict((*graph.named_parameters(), *graph.named_buffers()))
    for name, tensor in owned.items():
        tensor.data = tensors[name].detach().to("cpu", tensor.dtype).contiguous().clone()
    return model.with_graph(graph)
