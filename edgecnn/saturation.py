"""What an ONNX file for x86 would give on a processor without VNNI, foreseen by the reference.

Such processors add pairs of products in int16 with saturation (`edgecnn.quantize.saturation`). Files made
for one have weights of 7 bits, whose pairs fit; a file with 8 bits is exact where it was proven and may give
other answers on an older machine. So every report says what would happen there, before anyone deploys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgecnn.export.onnx_alignment import align_channels
from edgecnn.export.parity import sqnr_db
from edgecnn.graph.cost import layer_costs
from edgecnn.graph.program import Array, Op, Program
from edgecnn.quantize.reference import iterate_program, run_op, run_program
from edgecnn.quantize.saturation import may_saturate
from edgecnn.report.saturation import SATURATION

WORK_MACS = 1e9
MOST_IMAGES, FEWEST_IMAGES = 8, 2
"""On how many images it is foreseen: as many as take about so many multiply-accumulates."""

MOST_LAYERS = 8
"""Layers named, those of which most values change."""


@dataclass(frozen=True)
class Saturation:
    """What x86 without VNNI would make of an ONNX file with uint8 activations.

    Attributes:
        possible: whether some image can make a sum saturate.
        layers: (layer, share of its values that change when it alone saturates), the largest share first.
        num_layers: how many layers change at all.
        num_samples: images that it was computed on.
        sqnr_db: of the saturated output against the exact one; 200 where they are the same, None where the
            exact one is zero.
        agreement: fraction of the images with the same first class, None where the output has no classes.
    """

    possible: bool
    layers: tuple[tuple[str, float], ...]
    num_layers: int
    num_samples: int
    sqnr_db: float | None
    agreement: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return a detail for the report."""
        layers = [{"layer": layer, "changed": share} for layer, share in self.layers]
        return {
            "pass": "target",
            "kind": SATURATION,
            "possible": self.possible,
            "layers": layers,
            "num_layers": self.num_layers,
            "num_samples": self.num_samples,
            "sqnr_db": self.sqnr_db,
            "agreement": self.agreement,
        }


def foresee_saturation(program: Program, inputs: Array) -> Saturation | None:
    """Compute a network as x86 with VNNI does, and as x86 without it.

    Args:
        program: quantized.
        inputs: float32 (n, c, h, w); the first few are used.

    Returns:
        What differs; None for a network whose activations are not int8.
    """
    if program.computes_in_float or program.is_dynamic or program.activation_bits != 8:
        return None
    program = align_channels(program)  # as the file has it: neighbours are others there
    macs = sum(cost.macs for cost in layer_costs(program))
    images = inputs[: int(np.clip(WORK_MACS // max(macs, 1), FEWEST_IMAGES, MOST_IMAGES))]
    public, name = program.outputs[0]
    has_classes = len(program.tensors[name].shape) == 2 and program.tensors[name].shape[1] > 1
    if not may_saturate(program):
        return Saturation(False, (), 0, len(images), 200.0, 1.0 if has_classes else None)
    feeds = {program.inputs[0]: images}
    layers = _changed_layers(program, feeds)
    exact, found = (run_program(program, feeds, saturates=s)[public] for s in (False, True))
    agreement = float((exact.argmax(1) == found.argmax(1)).mean()) if has_classes else None
    named, ratio = tuple(layers[:MOST_LAYERS]), sqnr_db(exact, found)
    return Saturation(True, named, len(layers), len(images), ratio, agreement)


def _changed_layers(program: Program, feeds: dict[str, Array]) -> list[tuple[str, float]]:
    """Return layers of which values change where they alone saturate, with the share, the largest first."""
    values: dict[str, Array] = {
        name: program.tensors[name].quant.quantize(array) if program.tensors[name].quant else array  # type: ignore[union-attr]
        for name, array in feeds.items()
    }
    last_use = {name: op.output for op in program.ops for name in op.inputs}
    found = []
    for op, array in iterate_program(program, feeds):
        if op.kind in ("conv2d", "linear") and program.tensors[op.output].quant is not None:
            share = _share(program, op, [values.get(name) for name in op.inputs], array)
            if share:
                found.append((op.layer or op.output, share))
        values[op.output] = array
        for name in op.inputs:
            if last_use[name] == op.output:
                values.pop(name, None)
    return sorted(found, key=lambda entry: -entry[1])


def _share(program: Program, op: Op, inputs: Sequence[Array | None], exact: Array) -> float:
    return float((run_op(program, op, inputs, saturates=True) != exact).mean())
