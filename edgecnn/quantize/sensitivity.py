"""Which layers int8 hurts: each quantized alone, judged by the network's output; and what to leave in float.

    sqnr_db = 10 log10(sum y^2 / sum (y_i - y)^2)      y float, y_i with layer i alone in int8

A layer is an operator that holds a value of its own, with its weights and the clamp that is part of it. The
noise that a layer makes alone is not what leaving it in float saves: its value is quantized for int8 readers
all the same. So `pareto` measures what each layer saves when it alone is left in float (`mixed`), orders them
by that per multiply-accumulate, and measures more and more of them together.

Measured on ResNet-20 and CIFAR-10: full int8 has 30.8 dB, the first and the last layer in float, 1 % of the
multiply-accumulates, 32.7; in the order of the noise alone eight layers brought 31.0. A network quantized
with a point's layers in float has the SQNR that is said here within 0.6 dB.

Source: Nagel et al. 2021, arXiv:2106.08295, section 4.3 (per-layer analysis); Pandey et al. 2023,
arXiv:2302.05397 (SQNR for mixed precision).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx
from torch.ao.quantization.fx import _decomposed  # noqa: F401 (registers torch.ops.quantized_decomposed)

from edgecnn.errors import PassError
from edgecnn.graph.nodes import argument, fetch, is_constant, layer_name
from edgecnn.graph.shapes import infer_shapes
from edgecnn.model import Model
from edgecnn.pipeline import Progress
from edgecnn.quantize.annotate import spec_of
from edgecnn.quantize.calibrate import calibration_batch_size
from edgecnn.quantize.mixed import MixedGraph, mixed_outputs
from edgecnn.quantize.scheme import CLAMPS, Holds

qd = torch.ops.quantized_decomposed
Array = npt.NDArray[np.float32]

MOST_NOISE_DB, LEAST_NOISE_DB = -100.0, 200.0


@dataclass(frozen=True)
class LayerNoise:
    """What one layer in int8 does to the output of a network that is float elsewhere.

    Attributes:
        name: of the node that holds the value.
        layer: where in the network, for people.
        sqnr_db: of the output; 200 where nothing changes.
        agreement: share of images with the same first class, None where the output is not (n, classes).
        macs: multiply-accumulates of the layer, for one image; 0 for an operator without weights.
        weights: number of weights.
    """

    name: str
    layer: str
    sqnr_db: float
    agreement: float | None
    macs: int
    weights: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class _Unit:
    """What is quantized together: a quantize node, the layer whose value it holds (or None)."""

    held: fx.Node
    source: fx.Node
    layer: fx.Node | None


class _Mixed(fx.Interpreter):
    """A quantized graph of which only some values, and the weights that make them, are quantized.

    A value that an operator only moves or picks goes with the one it came from.
    """

    def __init__(self, quantized: fx.GraphModule, float_graph: fx.GraphModule) -> None:
        super().__init__(quantized)
        self.units = find_units(quantized)
        self.active: Collection[str] = frozenset()
        by_name = {node.name: node for node in float_graph.graph.nodes}
        self._owner = {unit.held: unit.source.name for unit in self.units}
        self._layers = {unit.layer: unit.source.name for unit in self.units if unit.layer is not None}
        self._float = {layer: _constants(float_graph, by_name[layer.name]) for layer in self._layers}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is qd.quantize_per_tensor.default and self._owner.get(n) not in self.active:
            return self.env[n.args[0]]  # type: ignore[index]
        if n.target is qd.dequantize_per_tensor.default and not is_constant(n.args[0]):
            value = self.env[n.args[0]]  # type: ignore[index]
            return value if value.is_floating_point() else super().run_node(n)
        if n in self._layers and self._layers[n] not in self.active:
            weight, bias = self._float[n]
            arguments, keywords = self.fetch_args_kwargs_from_env(n)
            return n.target(arguments[0], weight, bias, *arguments[3:], **keywords)  # type: ignore[operator]
        return super().run_node(n)

    def outputs(self, batches: Sequence[torch.Tensor], active: Collection[str]) -> Array:
        """Return the first output for all images, the named units quantized."""
        self.active = active
        with torch.inference_mode():
            return np.concatenate([_first(self.run(batch)).numpy() for batch in batches])


def _first(value: Any) -> torch.Tensor:
    while not isinstance(value, torch.Tensor):
        value = next(iter(value.values() if isinstance(value, dict) else value))
    return value


def _constants(graph: fx.GraphModule, node: fx.Node) -> tuple[torch.Tensor, torch.Tensor | None]:
    bias = argument(node, 2, "bias")
    return fetch(graph, argument(node, 1, "weight")), None if bias is None else fetch(graph, bias)


def find_units(quantized: fx.GraphModule) -> list[_Unit]:
    """Return what holds a value of its own in a quantized graph, in execution order.

    Raises:
        PassError: if the graph is not quantized.
    """
    units = []
    for node in quantized.graph.nodes:
        if node.target is not qd.quantize_per_tensor.default:
            continue
        source = node.args[0]
        maker = source.args[0] if source.target in CLAMPS else source
        spec = spec_of(maker) if maker.op == "call_function" else None
        if maker.op == "placeholder":
            units.append(_Unit(node, source, None))
        elif spec is not None and spec.holds is not Holds.SHARED:
            units.append(_Unit(node, source, maker if spec.weight_axis is not None else None))
    if not units:
        raise PassError("the graph is not quantized", hint="run quantize_static first")
    return units


def layer_sensitivity(
    float_model: Model, quantized: Model, inputs: Array, progress: Progress
) -> list[LayerNoise]:
    """Quantize one layer at a time and measure the output.

    Args:
        float_model: folded, what was quantized.
        quantized: by `quantize_static`.
        inputs: float32 (n, c, h, w); no labels are needed.
        progress: told about every layer.

    Returns:
        One entry per layer, the noisiest first.

    Raises:
        PassError: if `quantized` is not.
    """
    mixed, batches = _Mixed(quantized.graph, float_model.graph), _batches(float_model, inputs)
    macs = _macs(float_model)
    expected = mixed.outputs(batches, frozenset())
    found = []
    progress.start("sensitivity, layers", len(mixed.units))
    for unit in mixed.units:
        sqnr_db, agreement = judge(expected, mixed.outputs(batches, {unit.source.name}))
        name = layer_name(unit.layer or unit.source)
        cost, weights = macs.get(unit.layer.name, (0, 0)) if unit.layer is not None else (0, 0)
        found.append(LayerNoise(unit.source.name, name, sqnr_db, agreement, cost, weights))
        progress.advance()
    progress.finish()
    return sorted(found, key=lambda entry: (entry.sqnr_db, entry.name))


def pareto(
    float_model: Model, quantized: Model, inputs: Array, layers: Sequence[LayerNoise], progress: Progress
) -> list[dict[str, Any]]:
    """Leave more and more layers in float and measure what that brings.

    Args:
        float_model: folded, what was quantized.
        quantized: by `quantize_static`.
        inputs: float32 (n, c, h, w).
        layers: of `layer_sensitivity`.
        progress: told about every layer, then about every point.

    Returns:
        Points that no cheaper one beats, cheapest first, JSON-ready: {"float_layers": [names], "float_macs",
        "float_macs_share", "sqnr_db", "agreement"}. The first is full int8. The names are such as
        `QuantizeStatic.float_layers` takes; the input, which follows, is not among them.
    """
    mixed = MixedGraph(quantized.graph, float_model.graph, infer_shapes(float_model))
    batches = _batches(float_model, inputs)

    def outputs(names: Collection[str]) -> Array:
        found = mixed_outputs(mixed, batches, names)
        return np.concatenate([_first(value).numpy() for value in found])

    expected = outputs({node.name for node in float_model.graph.graph.nodes})
    total = max(sum(entry.macs for entry in layers), 1)
    calls = {node.name for node in float_model.graph.graph.nodes if node.op == "call_function"}
    known = [entry for entry in layers if entry.name in calls]
    left_noise = {}
    progress.start("mixed precision, layers", len(known))
    for entry in known:
        left_noise[entry.name] = _noise(judge(expected, outputs({entry.name}))[0])
        progress.advance()
    progress.finish()
    full = _noise(judge(expected, outputs(()))[0])
    ordered = sorted(known, key=lambda entry: (left_noise[entry.name] - full) / (entry.macs + 1.0))
    counts = sorted({0, *(2**k for k in range(len(ordered).bit_length())), len(ordered)})
    points: list[dict[str, Any]] = []
    progress.start("mixed precision, points", len(counts))
    for count in counts:
        left = ordered[:count]
        sqnr_db, agreement = judge(expected, outputs({entry.name for entry in left}))
        macs = sum(entry.macs for entry in left)
        progress.advance()
        if points and sqnr_db <= points[-1]["sqnr_db"]:
            continue
        points.append(
            {
                "float_layers": [entry.name for entry in left],
                "float_macs": macs,
                "float_macs_share": macs / total,
                "sqnr_db": sqnr_db,
                "agreement": agreement,
            }
        )
    progress.finish()
    return points


def _noise(ratio_db: float) -> float:
    """Return noise in parts of the signal."""
    return float(10.0 ** (-ratio_db / 10.0))


def judge(expected: Array, found: Array) -> tuple[float, float | None]:
    """Return (SQNR in dB, share of images with the same first class or None).

    Example:
        >>> a = np.array([[3.0, 1.0], [0.0, 2.0]], np.float32)
        >>> noise_db, same = judge(a, a + np.array([[0, 0], [0, -1]], np.float32))
        >>> round(noise_db, 2), same
        (11.46, 1.0)
    """
    signal = float((expected.astype(np.float64) ** 2).sum())
    noise = float(((found.astype(np.float64) - expected) ** 2).sum())
    sqnr_db = LEAST_NOISE_DB if noise == 0.0 else 10.0 * np.log10(max(signal, 1e-300) / noise)
    sqnr_db = float(np.clip(sqnr_db, MOST_NOISE_DB, LEAST_NOISE_DB))
    if expected.ndim != 2:
        return sqnr_db, None
    return sqnr_db, float((expected.argmax(1) == found.argmax(1)).mean())


def _batches(model: Model, inputs: Array) -> list[torch.Tensor]:
    size = calibration_batch_size(model)
    count = len(inputs) // size * size if model.fixed_batch is not None else len(inputs)
    return [torch.from_numpy(np.ascontiguousarray(inputs[i : i + size])) for i in range(0, count, size)]


def _macs(model: Model) -> Mapping[str, tuple[int, int]]:
    """Return layer -> (multiply-accumulates for one image, weights)."""
    shapes = infer_shapes(model)
    found = {}
    for node in model.graph.graph.nodes:
        spec = spec_of(node) if node.op == "call_function" else None
        if spec is not None and spec.weight_axis is not None and is_constant(argument(node, 1, "weight")):
            weights = int(fetch(model.graph, argument(node, 1, "weight")).numel())
            positions = shapes[node.name][2:] if spec.weight_axis == 0 else shapes[node.args[0].name][2:]
            found[node.name] = (weights * int(np.prod(positions)), weights)
    return found
