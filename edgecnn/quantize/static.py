"""The pass `quantize_static`: int8 activations and weights, int32 biases, written into the graph once.

    x_q = quantize(x; scale_x, z_x)    w_q = quantize(w; scale_w[c])    b_q = round(b / (scale_x scale_w[c]))

The graph keeps PyTorch operators between quantize and dequantize nodes (it can be run, saved and trained
further); the integers of weights and biases are buffers. Everything that is exported reads them from here.
Layers named in `float_layers` keep their float weights, and their values are quantized only for int8 readers.

Source: Jacob et al. 2018, arXiv:1712.05877; Nagel et al. 2019, arXiv:1906.04721, section 4.2 (bias
correction).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import fx
from torch.ao.quantization.fx import _decomposed  # noqa: F401 (registers torch.ops.quantized_decomposed)

from edgecnn.errors import PassError, RecipeError
from edgecnn.graph.nodes import argument, aten, copy_graph, finish, layer_name
from edgecnn.graph.shapes import infer_shapes
from edgecnn.model import Model
from edgecnn.pipeline import Need, PassContext
from edgecnn.quantize.annotate import Slots, assign_slots, spec_of
from edgecnn.quantize.bias import batch_norm_means, correct_in_order
from edgecnn.quantize.calibrate import Statistics, calibrate, calibration_batches
from edgecnn.quantize.concats import apart_text, concats_far_apart
from edgecnn.quantize.constants import fold_constants, quantize_layer, quantize_operands
from edgecnn.quantize.float_layers import FloatPlan, match_layers, plan_float, shrinks
from edgecnn.quantize.islands import (
    FLOAT_LAYERS,
    float_records,
    float_warnings,
    layer_list,
    plan_islands,
    refuse_unknown,
    unknown_operators,
)
from edgecnn.quantize.leaky_relu import write_slopes
from edgecnn.quantize.lockstep import affordable_images
from edgecnn.quantize.observers import OBSERVERS, make_observer
from edgecnn.quantize.scheme import Holds
from edgecnn.quantize.slot_parameters import Parameters, Ranges, keep_ranges, slot_parameters

qd = torch.ops.quantized_decomposed


@dataclass(frozen=True)
class Calibrated:
    """A float network with all that its integers follow from.

    Attributes:
        model: the float network, batch norms and constants folded; its graph may be edited.
        slots: which of its values are held in int8, and which share their parameters.
        layers: nodes with weights.
        statistics: what was seen on the calibration images.
        mean_counts: how many values each mean averages.
        by_root: (scale, zero_point) of each slot, by its root, without ties.
        notes: what else the user should know.
        unknown: operators without an int8 form.
    """

    model: Model
    slots: Slots
    layers: frozenset[fx.Node]
    statistics: Statistics
    mean_counts: dict[fx.Node, int]
    by_root: Parameters
    notes: tuple[str, ...] = ()
    unknown: tuple[fx.Node, ...] = ()

    @property
    def parameters(self) -> Parameters:
        """(scale, zero_point) of every value that has a slot."""
        return {node: self.by_root[self.slots.root(node)] for node in self.slots.parent}

    @property
    def ranges(self) -> Ranges:
        """What was seen, by the names of nodes."""
        floats = frozenset(node.name for node in self.slots.floats.nodes)
        counts = {node.name: count for node, count in self.mean_counts.items()}
        return Ranges({n.name: seen for n, seen in self.statistics.ranges.items()}, counts, floats)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know about the calibration."""
        found = [*float_warnings(self.slots.floats, self.layers, self.unknown), *self.notes]
        dead = [layer_name(n) for n, seen in self.statistics.ranges.items() if seen == (0.0, 0.0)]
        if dead:
            named = ", ".join(dead[:3])
            found.append(f"{len(dead)} activations were zero on every calibration image, first {named}")
        return tuple(found)


BIAS_METHODS = ("mean_input", "batch_norm", "in_order")
ROUNDINGS = ("nearest", "adaround", "brecq")
UNSUPPORTED = ("float", "error")


@dataclass(frozen=True)
class QuantizeStatic:
    """Pass: static int8 (`static_wi8_ai8`).

    Attributes:
        observer: how activation ranges are chosen: min_max, moving_average, percentile, mse or entropy.
        weight_observer: "min_max" or "mse", per output channel.
        weight_bits: 8, or 7 for x86 without VNNI, whose u8 * s8 pair sums saturate at 16 bits. From Python 4
            and more can be simulated: the files then hold narrower values in int8.
        num_samples: calibration images at most.
        bias_correction: take the mean error that rounding the weights causes out of the biases.
        bias_method: how: "mean_input" by the float network's mean inputs on the images, "batch_norm" by
            those that batch norms imply, where they do, "in_order" by each layer's mean output in the
            quantized network.
        rounding: "nearest"; "adaround" learns layer by layer whether weights are rounded up or down, "brecq"
            block by block, each with the biases in place of their correction.
        iterations: optimization steps per layer or block of adaround and brecq.
        float_layers: names or patterns of layers that compute in float, see `float_layers.match_layers`.
        split_concats: join values at the network's output in float, each from a scale of its own, where
            their ranges are far apart: a detector's boxes beside its scores (`concats`).

        unsupported: an operator without an int8 form computes in "float", or is an "error" (`islands`).

    Source: arXiv:1712.05877; arXiv:1906.04721 section 4.2; arXiv:2004.10568; arXiv:2102.05426.
    """

    observer: str = "mse"
    weight_observer: str = "min_max"
    weight_bits: int = 8
    num_samples: int = 512
    bias_correction: bool = True
    bias_method: str = "mean_input"
    rounding: str = "nearest"
    iterations: int = 500
    float_layers: tuple[str, ...] = ()
    split_concats: bool = True
    unsupported: str = "float"

    name: ClassVar[str] = "quantize_static"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CALIBRATION})

    def check(self) -> None:
        """Check the parameters.

        Raises:
            RecipeError: naming the parameter, what was found and what was expected.
        """
        if self.observer not in OBSERVERS:
            raise RecipeError(f"observer is {self.observer!r}, expected one of {', '.join(OBSERVERS)}")
        if self.weight_observer not in ("mse", "min_max"):
            raise RecipeError(f"weight_observer is {self.weight_observer!r}, expected mse or min_max")
        if self.weight_bits not in (7, 8):
            raise RecipeError(
                f"weight_bits is {self.weight_bits}, expected 7 or 8",
                hint="neither ONNX Runtime nor LiteRT computes a convolution with narrower weights",
            )
        choices = (("rounding", ROUNDINGS), ("bias_method", BIAS_METHODS), ("unsupported", UNSUPPORTED))
        for name, known in choices:
            if getattr(self, name) not in known:
                raise RecipeError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in ("num_samples", "iterations"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not all(isinstance(name, str) and name for name in self.float_layers):
            raise RecipeError(f"float_layers is {self.float_layers!r}, expected names of layers")

    def requires(self, model: Model) -> None:
        """Refuse a graph that is quantized already, has batch norms, or lacks a layer that is named."""
        require_folded(model, self.name)
        match_layers(model.graph, self.float_layers)

    def run(self, model: Model, context: PassContext) -> Model:
        """Return the model with quantize/dequantize nodes and integer weights."""
        calibrated = self.calibrated(model, context)
        work = calibrated.model
        float_model = work.with_graph(copy_graph(work.graph)) if self._is_learned() else work
        quantized = work.with_graph(self.write(calibrated))
        keep_ranges(quantized.graph, calibrated.ranges)
        if self._is_learned():
            quantized = self._learn(float_model, quantized, context)
        return quantized.with_warning(*calibrated.warnings)

    def calibrated(self, model: Model, context: PassContext) -> Calibrated:
        """Run the calibration images and choose the parameters of every slot.

        Raises:
            PassError: if there are no images.
        """
        if context.calibration is None:
            raise PassError(f"{self.name} needs calibration images, found none")
        work = model.with_graph(fold_constants(copy_graph(model.graph)))
        floats = self._plan(model, work, context)
        slots = assign_slots(work.graph, floats)
        layers = frozenset(n for n in work.graph.graph.nodes if has_weight(n) and n not in floats.nodes)
        observed = [*slots.sources, *(n for n in slots.held if shrinks(n) and n not in slots.sources)]
        observers = {node: make_observer(self.observer) for node in observed}
        statistics = Statistics(observers)
        indices = context.calibration_indices[: self.num_samples]
        watched = layers if self.bias_correction else frozenset()
        calibrate(work, statistics, watched, context.calibration, indices, context.progress)
        apart = concats_far_apart(work.graph, slots, statistics.ranges) if self.split_concats else {}
        if apart:
            slots = assign_slots(work.graph, plan_float(work.graph, floats.nodes | frozenset(apart)))
            joined = [n for n in work.graph.graph.nodes if n in slots.floats.nodes - floats.nodes]
            record = {"pass": self.name, "kind": FLOAT_LAYERS, "asked": []}
            context.records.append({**record, "layers": layer_list(joined)})
        mean_counts = _mean_counts(work, slots)
        by_root = slot_parameters(slots, statistics.ranges, mean_counts)
        notes = [apart_text(node, times) for node, times in apart.items()]
        if self.bias_correction and self.bias_method == "batch_norm":
            known = {node: mean for node, mean in batch_norm_means(work).items() if node in layers}
            statistics.input_means.update(known)
            if not known:
                notes.append(
                    "bias correction from batch norms: no layer has one ahead, the images told all means"
                )
        unknown = tuple(unknown_operators(work.graph))
        return Calibrated(work, slots, layers, statistics, mean_counts, by_root, tuple(notes), unknown)

    def _plan(self, model: Model, work: Model, context: PassContext) -> FloatPlan:
        """Return what computes in float, and record it.

        Args:
            model: where the layers are named.
            work: the same, constants folded.
            context: gets the record.
        """
        graph = work.graph
        names = {node.name for node in match_layers(model.graph, self.float_layers)}
        named = frozenset(n for n in graph.graph.nodes if n.name in names)
        if self.unsupported == "error":
            refuse_unknown(graph, named)
        floats = plan_islands(graph, named, infer_shapes(work))
        for record in float_records(graph, floats, named, self.float_layers):
            context.records.append({"pass": self.name, **record})
        return floats

    def _is_learned(self) -> bool:
        """Whether something is learned from the float and the quantized network side by side."""
        return self.rounding != "nearest" or (self.bias_correction and self.bias_method == "in_order")

    def _learn(self, float_model: Model, quantized: Model, context: PassContext) -> Model:
        """Return the network with the integers of weights and biases learned on as many images as fit."""
        from edgecnn.quantize.adaround import RoundingOptions, adaround
        from edgecnn.quantize.brecq import brecq

        if context.calibration is None:
            raise PassError("quantize_static needs calibration images, found none")
        count = affordable_images(float_model, self.num_samples)
        indices = context.calibration_indices[:count]
        batches = list(calibration_batches(float_model, context.calibration, indices))
        if self.rounding == "nearest":
            return correct_in_order(float_model, quantized, batches, context.progress)
        options = RoundingOptions(self.weight_bits, self.iterations, context.seed)
        learn = adaround if self.rounding == "adaround" else brecq
        return learn(float_model, quantized, batches, options, context.progress)

    def ensures(self, before: Model, after: Model) -> None:
        """Check that every layer reads integer weights, and float ones where `float_layers` names it."""
        named = {node.name for node in match_layers(before.graph, self.float_layers)}
        for node in after.graph.graph.nodes:
            if not has_weight(node):
                continue
            is_integer = "dequantize" in str(argument(node, 1, "weight").target)
            if is_integer == (node.name in named):
                kind = "an integer" if is_integer else "a float"
                raise PassError(f"{layer_name(node)} has {kind} weight after {self.name}")

    def write(
        self, calibrated: Calibrated, scales: Mapping[fx.Node, npt.NDArray[np.float32]] | None = None
    ) -> fx.GraphModule:
        """Write the integers into the graph, which is changed.

        The constants come first (their input's parameters are looked up by node), then q/dq.

        Args:
            calibrated: weights and parameters.
            scales: of the weights per output channel, float32 (c_out,), by layer; those that are missing are
                chosen by `weight_observer`.
        """
        graph, slots, parameters = calibrated.model.graph, calibrated.slots, calibrated.parameters
        given = scales or {}
        write_slopes(graph, slots, parameters)
        for node in [node for node in graph.graph.nodes if node in calibrated.layers]:
            mean = calibrated.statistics.input_means.get(node)
            x_scale = parameters[held_input(slots, node)][0]
            quantize_layer(graph, node, x_scale, self, mean, given.get(node))
        quantize_all_operands(graph, parameters, slots.floats.nodes)
        for node in slots.held:
            _hold(graph, node, parameters[node], slots.readers(node))
        for producer, consumer in slots.conversions:
            _convert(graph, producer, consumer, parameters[consumer])
        return finish(graph)


def require_folded(model: Model, step: str) -> None:
    """Check that a graph is float and without batch norms.

    Args:
        model: to be quantized.
        step: the pass that asks, for the message.

    Raises:
        PassError: if it is not.
    """
    for node in model.graph.graph.nodes:
        if "quantized_decomposed" in str(node.target):
            raise PassError("the model is quantized already", hint="start from the float model")
        if node.target is aten.batch_norm.default:
            raise PassError(f"{layer_name(node)} is not folded", hint=f"put fold_batch_norm ahead of {step}")


def quantize_all_operands(
    graph: fx.GraphModule, parameters: Parameters, floats: Collection[fx.Node] = ()
) -> None:
    """Replace every number and parameter that arithmetic reads by an int8 constant, but for `floats`."""
    for node in list(graph.graph.nodes):
        if node not in floats and spec_of(node) is not None and not has_weight(node):
            held = node if node in parameters else next(iter(node.users), node)  # its clamp
            x_scale = next((parameters[x][0] for x in node.all_input_nodes if x in parameters), None)
            quantize_operands(graph, node, parameters.get(held, (1.0, 0))[0], x_scale)


def has_weight(node: fx.Node) -> bool:
    """Whether a node is a layer with weights."""
    spec = spec_of(node) if node.op == "call_function" else None
    return spec is not None and spec.weight_axis is not None


def held_input(slots: Slots, node: fx.Node) -> fx.Node:
    """Return the held value that a layer reads."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source not in slots.parent:
        raise PassError(f"{layer_name(node)} reads a value that is not held in int8")
    return source


def _mean_counts(model: Model, slots: Slots) -> dict[fx.Node, int]:
    """Return how many values each mean over dimensions averages, of those computed in int8."""
    shapes = infer_shapes(model)
    counts = {}
    for node in slots.held:
        spec = spec_of(node) if slots.floats.reads_int8(node) else None
        is_mean = node.target in (aten.mean.dim, aten.adaptive_avg_pool2d.default)
        if spec is not None and spec.holds is Holds.OWN and is_mean:
            x, y = shapes[node.all_input_nodes[0].name], shapes[node.name]
            counts[node] = prod(x[1:]) // prod(y[1:])
    return counts


def _hold(
    graph: fx.GraphModule, node: fx.Node, parameters: tuple[float, int], readers: Sequence[fx.Node]
) -> None:
    """Insert quantize and dequantize after a node and let its readers read those."""
    scale, zero_point = parameters
    with graph.graph.inserting_after(node):
        held = graph.graph.call_function(
            qd.quantize_per_tensor.default, (node, scale, zero_point, -128, 127, torch.int8)
        )
    with graph.graph.inserting_after(held):
        real = graph.graph.call_function(
            qd.dequantize_per_tensor.default, (held, scale, zero_point, -128, 127, torch.int8)
        )
    for user in readers:
        user.replace_input_with(node, real)


def _convert(
    graph: fx.GraphModule, producer: fx.Node, consumer: fx.Node, parameters: tuple[float, int]
) -> None:
    """Insert quantize and dequantize with the consumer's parameters on one edge."""
    held_producer: Any = next(u for u in producer.users if u.target is qd.quantize_per_tensor.default)
    real = next(iter(held_producer.users))
    scale, zero_point = parameters
    with graph.graph.inserting_before(consumer):
        held = graph.graph.call_function(
            qd.quantize_per_tensor.default, (real, scale, zero_point, -128, 127, torch.int8)
        )
        converted = graph.graph.call_function(
            qd.dequantize_per_tensor.default, (held, scale, zero_point, -128, 127, torch.int8)
        )
    consumer.replace_input_with(real, converted)
