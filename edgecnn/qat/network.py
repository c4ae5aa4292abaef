"""A float network that rounds as its files will, made to be trained, and the integers read back from it.

Weights and biases are parameters behind fake quantization; a slot's scale is one tensor that all its values
share. Under "lsq" the scales are parameters too, else buffers. Zero points stay. What the files compute in
float is trained in float: there a value is rounded on its way into int8 and nowhere else.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.nodes import argument, aten, copy_graph, fetch, finish, is_constant, layer_name
from edgecnn.graph.shapes import infer_shapes
from edgecnn.model import Model
from edgecnn.qat.fake_quantize import fake_quantize, fake_quantize_bias, gradient_scale
from edgecnn.quantize.annotate import spec_of
from edgecnn.quantize.columns import layer_groups
from edgecnn.quantize.constants import layer_scales
from edgecnn.quantize.leaky_relu import write_slopes
from edgecnn.quantize.static import (
    Calibrated,
    QuantizeStatic,
    has_weight,
    held_input,
    quantize_all_operands,
)
from edgecnn.quantize.ties import remove_ties

SMALLEST_SHARE = 1.0 / 64.0
"""A scale that training takes below this share of where it started counts as this share."""

_PICKS = frozenset(
    {
        aten.relu.default,
        aten.max_pool2d.default,
        aten.max_pool2d_with_indices.default,
        aten.adaptive_max_pool2d.default,
        aten.amax.default,
        aten.max.dim,
        aten.cat.default,
        aten.flatten.using_ints,
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.permute.default,
        aten.transpose.int,
        aten.slice.Tensor,
        aten.narrow.default,
        aten.select.int,
        aten.unbind.int,
        aten.unflatten.int,
        aten.unfold.default,
        aten.roll.default,
        aten.index.Tensor,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.upsample_nearest2d.vec,
        aten.upsample_nearest2d.default,
        aten.expand.default,
        aten.expand_as.default,
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        operator.getitem,
    }
)
"""Operators that only pick values, which are on the grid of their slot already, unless a layer fuses them."""


@dataclass
class FakeQuantized:
    """A float network that rounds, and where its scales are.

    Attributes:
        model: to be trained; its weights have the names they had.
        calibrated: what it was made from.
        learns_scales: whether step sizes are trained.
        slot_scales: slot root -> name of its scale, (1,).
        weight_scales: layer -> name of its weight's scales, (c_out,) or (1,).
        smallest: name of a scale -> what a smaller one counts as.
    """

    model: Model
    calibrated: Calibrated
    learns_scales: bool
    slot_scales: dict[fx.Node, str] = field(default_factory=dict)
    weight_scales: dict[fx.Node, str] = field(default_factory=dict)
    smallest: dict[str, float] = field(default_factory=dict)

    def read_back(self, trained: fx.GraphModule) -> dict[fx.Node, npt.NDArray[np.float32]]:
        """Put what was trained into `calibrated`: parameters, and the scales of slots, without ties.

        Args:
            trained: the graph of `model` after training.

        Returns:
            The scales of the weights, float32 (c_out,), by layer.
        """
        values = {name: value.detach() for name, value in trained.state_dict().items()}
        graph = self.calibrated.model.graph
        known = graph.state_dict()
        for name, _ in trained.named_parameters():
            if name in known:  # the others are scales
                known[name].copy_(values[name])
        by_root = self.calibrated.by_root
        if self.learns_scales:  # else they have no ties already
            for root, name in self.slot_scales.items():
                scale = float(values[name].clamp_min(self.smallest[name]))
                by_root[root] = (scale, by_root[root][1])
            remove_ties(self.calibrated.slots, by_root, self.calibrated.mean_counts, nearest=True)
        return {layer: self._scales(graph, layer, values) for layer in self.weight_scales}

    def _scales(
        self, graph: fx.GraphModule, layer: fx.Node, values: dict[str, torch.Tensor]
    ) -> npt.NDArray[np.float32]:
        name = self.weight_scales[layer]
        found = values[name].clamp_min(self.smallest[name])
        spec = spec_of(layer)
        weight = fetch(graph, argument(layer, 1, "weight"))
        axis = spec.weight_axis if spec is not None and spec.weight_axis is not None else 0
        scales: npt.NDArray[np.float32] = found.expand(weight.shape[axis]).numpy().astype(np.float32)
        return scales


Scales = Mapping[fx.Node, npt.NDArray[np.float32]]
"""Of the weights, float32 (c_out,), by layer."""


def make_fake_quantized(
    calibrated: Calibrated, step: QuantizeStatic, *, learn_scales: bool, scales: Scales | None = None
) -> FakeQuantized:
    """Return the network to train.

    Args:
        calibrated: left as it is.
        step: weight_bits and weight_observer.
        learn_scales: whether step sizes are trained.
        scales: of the weights to start from, None to choose them.
    """
    graph = copy_graph(calibrated.model.graph)
    made = FakeQuantized(calibrated.model.with_graph(graph), calibrated, learn_scales)
    builder = _Builder(graph, made, step, scales or {})
    write_slopes(graph, calibrated.slots, calibrated.parameters)
    builder.add_slot_scales()
    for layer in calibrated.model.graph.graph.nodes:
        if layer in calibrated.layers:
            builder.round_layer(layer)
        elif has_weight(layer):
            builder.train_in_float(layer)
    builder.round_operands()
    builder.round_values()
    finish(graph)
    return made


def constants_of(layer: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes of a layer's weight and, where it has one, its bias."""
    for node in (argument(layer, 1, "weight"), argument(layer, 2, "bias")):
        if is_constant(node):
            yield node


class _Builder:
    """Edits the copy of a graph; nodes of the original stand for those of the same name in the copy."""

    def __init__(
        self, graph: fx.GraphModule, made: FakeQuantized, step: QuantizeStatic, scales: Scales
    ) -> None:
        self._graph = graph
        self._made = made
        self._step = step
        self._scales = scales
        self._learn = made.learns_scales
        self._nodes = {node.name: node for node in graph.graph.nodes}
        self._shapes = infer_shapes(made.calibrated.model)
        self._slots = made.calibrated.slots
        self._reals: dict[fx.Node, fx.Node] = {}

    def add_slot_scales(self) -> None:
        """Add a scale per slot; those that an operator prescribes are never trained."""
        by_root = self._made.calibrated.by_root
        fixed = {self._slots.root(node) for node in self._slots.fixed}
        for index, (root, (scale, _)) in enumerate(by_root.items()):
            name = f"qat_activation_scale_{index}"
            self._add_scale(name, torch.tensor([scale]), self._learn and root not in fixed)
            self._made.slot_scales[root] = name

    def _add_scale(self, name: str, value: torch.Tensor, learned: bool) -> None:
        self._made.smallest[name] = float(value.min()) * SMALLEST_SHARE
        if learned:
            self._graph.register_parameter(name, nn.Parameter(value))
        else:
            self._graph.register_buffer(name, value)

    def _scale(self, name: str, before: fx.Node) -> fx.Node:
        with self._graph.graph.inserting_before(before):
            return self._graph.graph.get_attr(name)

    def round_layer(self, layer: fx.Node) -> None:
        """Let a layer read a rounded weight and bias, both trained."""
        node = self._nodes[layer.name]
        spec = spec_of(layer)
        weight_node = argument(node, 1, "weight")
        if not is_constant(weight_node):
            raise UnsupportedOpError(
                f"{layer_name(node)} has a weight computed from the input, expected a parameter"
            )
        weight = fetch(self._graph, weight_node).float()
        axis = spec.weight_axis if spec is not None and spec.weight_axis is not None else 0
        groups = layer_groups(layer)
        known = self._scales.get(layer)
        chosen = layer_scales(weight.numpy(), axis, groups, self._step) if known is None else known
        scales = torch.from_numpy(chosen.copy())
        if axis == 1 and groups > 1:
            scales = scales[:1].clone()
        is_average = _is_average(weight)
        name = f"qat_weight_scale_{len(self._made.weight_scales)}"
        self._add_scale(name, scales, self._learn and not is_average)
        self._made.weight_scales[layer] = name
        high = 2.0 ** (self._step.weight_bits - 1) - 1.0
        g = gradient_scale(weight.numel() // len(scales), high)
        shape = [1] * weight.ndim
        shape[axis] = -1
        with self._graph.graph.inserting_before(node):
            scale = self._graph.graph.get_attr(name)
            shaped = self._graph.graph.call_function(aten.reshape.default, (scale, shape))
            arguments = (weight_node, shaped, -high, high, g, self._made.smallest[name])
            rounded = self._graph.graph.call_function(fake_quantize, arguments)
        new_bias = bias_node = argument(node, 2, "bias")
        if is_constant(bias_node):
            x_name = self._made.slot_scales[self._slots.root(held_input(self._slots, layer))]
            x_scale = self._scale(x_name, node)
            with self._graph.graph.inserting_before(node):
                new_bias = self._graph.graph.call_function(fake_quantize_bias, (bias_node, x_scale, scale))
        node.args = (node.args[0], rounded, new_bias, *node.args[3:])
        node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("weight", "bias")}
        for constant in (weight_node, bias_node):
            if is_constant(constant):
                self._own(str(constant.target), trained=not is_average or constant is bias_node)

    def train_in_float(self, layer: fx.Node) -> None:
        """Train the weight and bias of a layer that computes in float."""
        for constant in constants_of(layer):
            is_weight = constant is argument(layer, 1, "weight")
            average = is_weight and _is_average(fetch(self._graph, constant))
            self._own(str(constant.target), trained=not average)

    def _own(self, name: str, *, trained: bool) -> None:
        """Make a tensor a parameter if it is to be trained, else a buffer."""
        path, _, leaf = name.rpartition(".")
        owner = self._graph.get_submodule(path) if path else self._graph
        value = getattr(owner, leaf).detach()
        delattr(owner, leaf)
        if trained:
            owner.register_parameter(leaf, nn.Parameter(value))
        else:
            owner.register_buffer(leaf, value)

    def round_operands(self) -> None:
        """Make what arithmetic reads the int8 constants that they will be; they are not trained."""
        parameters = {
            self._nodes[node.name]: value for node, value in self._made.calibrated.parameters.items()
        }
        constants = [node for node in self._graph.graph.nodes if is_constant(node)]
        readers = {constant: len(constant.users) for constant in constants}
        floats = {self._nodes[node.name] for node in self._slots.floats.nodes}
        quantize_all_operands(self._graph, parameters, floats)
        for constant, count in readers.items():
            if len(constant.users) < count:  # what reads it in float too must see the same
                self._own(str(constant.target), trained=False)

    def round_values(self) -> None:
        """Round every held value that is not on the grid of its slot already, and convert where needed."""
        own = set(self._slots.sources)
        for held in self._slots.held:
            node = self._nodes[held.name]
            real = node
            if held in own or node.target not in _PICKS:
                real = self._round(node, held, after=node)
                for user in self._slots.readers(held):
                    self._nodes[user.name].replace_input_with(node, real)
            self._reals[held] = real
        for producer, consumer in self._slots.conversions:
            node = self._nodes[consumer.name]
            converted = self._round(self._reals[producer], consumer, before=node)
            node.replace_input_with(self._reals[producer], converted)

    def _round(
        self, value: fx.Node, held: fx.Node, *, after: fx.Node | None = None, before: fx.Node | None = None
    ) -> fx.Node:
        """Insert the rounding of a value with the parameters of the slot of `held`."""
        root = self._slots.root(held)
        name, zero_point = self._made.slot_scales[root], self._made.calibrated.by_root[root][1]
        low, high = -128.0 - zero_point, 127.0 - zero_point
        shape: Any = self._shapes[root.name]
        g = gradient_scale(prod(shape[1:]), high)
        target = after.next if after is not None else before
        with self._graph.graph.inserting_before(target):
            scale = self._graph.graph.get_attr(name)
            arguments = (value, scale, low, high, g, self._made.smallest[name])
            return self._graph.graph.call_function(fake_quantize, arguments)


def _is_average(weight: torch.Tensor) -> bool:
    """Whether a layer's weights are all alike: an average pool, which has to stay one."""
    return bool((weight == weight.flatten()[0]).all())
