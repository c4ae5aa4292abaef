"""Do two executions of one Program give the same integers?

    lsb = |y_a - y_b| / scale_y        rounded to whole steps of the output's scale

The contract of a file against the NumPy reference: on the held-out images no output is more than
MAX_LSB steps away and MIN_FRACTION of them at most one. A file that misses it is examined operator by
operator, each given the very integers that the runtime gave it; an operator that is then more than one
step off computes something else, and the file is refused. If none is, rounding differences of one step
have added up along a deep network, which is said as a warning.

Layers left in float are judged as one operator from the integers that go in to those that come out. The
orders of float sums differ, which moves a value across a rounding border now and then, by one step; more
than MAX_FLIPPED of them, or an output in float that is MAX_RELATIVE_ERROR off, is something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgecnn.graph.program import Array, Op, Program

MAX_LSB = 2
MIN_FRACTION = 0.999
MAX_LSB_MIXED, MIN_FRACTION_MIXED = 3, 0.99
"""With layers in float: values behind them are one step off now and then, and int8 layers pass that on."""
MAX_OP_LSB = {8: 1, 16: 4}
"""By bits of the activations. In 16 LiteRT's tables of tanh are up to 3 steps off, all others 1."""
MAX_FLIPPED = {8: 0.001, 16: 0.01}
"""Share of the integers behind float layers that may be one step off; in 8 bits ResNet-20 has 0.00002."""
NEAR_TIE = 0.01
"""Steps from half-way at which float rounding may decide where a value goes."""
FEW = 3
"""So many may be whatever their share."""
MAX_RELATIVE_ERROR = 1e-3
"""Between two executions in float32: a fraction of the outputs' largest value."""
MAX_OP_STEP = 1.0 / 255.0
"""Of a dynamic operator on given inputs, a fraction of its largest output: one step of what it quantizes."""
_NOT_FINITE = 2.0**31
"""Steps that stand for a NaN or infinite difference."""


@dataclass(frozen=True)
class Comparison:
    """How far two executions are apart.

    Attributes:
        max_lsb: largest difference in steps of the output's scale.
        fraction_within_1_lsb: of all output values.
        top1_agreement: fraction of samples with the same largest output; None unless (n, classes).
        num_samples: images compared.
        max_relative_error: of a network in float: see `relative_error`.
    """

    max_lsb: int
    fraction_within_1_lsb: float
    top1_agreement: float | None
    num_samples: int
    max_relative_error: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the contract holds."""
        if self.max_relative_error is not None:
            return self.max_relative_error <= MAX_RELATIVE_ERROR
        return self.max_lsb <= MAX_LSB and self.fraction_within_1_lsb >= MIN_FRACTION

    @property
    def holds_mixed(self) -> bool:
        """Whether the contract of a network holds of which some layers compute in float."""
        if self.max_relative_error is not None:
            return self.holds
        return self.max_lsb <= MAX_LSB_MIXED and self.fraction_within_1_lsb >= MIN_FRACTION_MIXED


@dataclass(frozen=True)
class Difference:
    """The first operator whose output differs from the reference on the runtime's own inputs.

    Attributes:
        op: in float, it ends a chain of them.
        max_lsb: of an output in float, in steps of 1/127 of its largest value.
        fraction: of the values.
    """

    op: Op
    max_lsb: int
    fraction: float

    def __str__(self) -> str:
        what = f"{self.op.layer}, {self.op.kind}"
        return f"{what}: {self.max_lsb} LSB off, {100 * self.fraction:.3g} % of its values differ"


def output_scales(program: Program) -> dict[str, float]:
    """Return the step of each output: its quantization scale, or 0 where it is computed in float."""
    producers = {op.output: op for op in program.ops}
    scales = {}
    for public, name in program.outputs:
        quant = program.tensors[name].quant
        producer = producers.get(name)
        if quant is None and producer is not None and producer.kind == "dequantize":
            quant = program.tensors[producer.inputs[0]].quant
        scales[public] = 0.0 if quant is None else float(quant.scale)
    return scales


def compare(
    first: Mapping[str, Array], second: Mapping[str, Array], scales: Mapping[str, float]
) -> Comparison:
    """Compare outputs by name.

    Args:
        first: name -> float32, batch first.
        second: the same outputs of the other execution.
        scales: step of each output; for an output computed in float (0) a step is 1/127 of its largest value.

    Example:
        >>> a, b = np.array([[0.0, 1.0]]), np.array([[0.0, 1.5]])
        >>> compare({"y": a}, {"y": b}, {"y": 0.5}).max_lsb
        1
    """
    worst, within, total = 0, 0, 0
    for name, scale in scales.items():
        a, b = first[name].astype(np.float64), second[name].astype(np.float64)
        step = scale or max(float(np.abs(a).max(initial=0.0)) / 127.0, 1e-12)
        lsb = np.nan_to_num(np.rint(np.abs(a - b) / step), nan=_NOT_FINITE, posinf=_NOT_FINITE)
        worst = max(worst, int(lsb.max(initial=0.0)))
        within += int((lsb <= 1).sum())
        total += lsb.size
    main = next(iter(scales))
    agreement = None
    if first[main].ndim == 2 and first[main].shape[1] > 1:
        agreement = float((first[main].argmax(1) == second[main].argmax(1)).mean())
    return Comparison(worst, within / max(total, 1), agreement, len(first[main]))


def relative_error(first: Mapping[str, Array], second: Mapping[str, Array]) -> float:
    """Return the largest difference of an output, as a fraction of that output's largest value.

    Args:
        first: name -> float32, batch first.
        second: the same outputs of the other execution.

    Example:
        >>> relative_error({"y": np.array([1.0, -4.0])}, {"y": np.array([1.5, -4.0])})
        0.125
    """
    worst = 0.0
    for name, values in first.items():
        a, b = values.astype(np.float64), second[name].astype(np.float64)
        step = max(float(np.abs(a).max(initial=0.0)), 1e-12)
        difference = np.nan_to_num(np.abs(a - b), nan=_NOT_FINITE, posinf=_NOT_FINITE)
        worst = max(worst, float(difference.max(initial=0.0)) / step)
    return worst


def worst_images(
    first: Mapping[str, Array], second: Mapping[str, Array], scales: Mapping[str, float], count: int
) -> list[int]:
    """Return the indices of the images whose outputs differ most, at most `count`, in ascending order.

    Example:
        >>> worst_images({"y": np.zeros((3, 2))}, {"y": np.array([[0, 1], [0, 0], [5, 0]])}, {"y": 1.0}, 2)
        [0, 2]
    """
    largest = [
        np.abs(first[name].astype(np.float64) - second[name]).reshape(len(first[name]), -1).max(axis=1)
        / (scale or max(float(np.abs(first[name]).max(initial=0.0)) / 127.0, 1e-12))
        for name, scale in scales.items()
    ]
    order = np.argsort(-np.nan_to_num(np.max(largest, axis=0), nan=_NOT_FINITE), kind="stable")
    return sorted(int(index) for index in order[:count])


def traced_outputs(program: Program, traced: Mapping[str, Array]) -> dict[str, Array]:
    """Return the outputs that follow from traced integers, float32; those computed in float are left out.

    Those of a dynamic Program, all in float, are traced themselves.
    """
    if program.is_dynamic:
        return {public: traced[name] for public, name in program.outputs}
    producers = {op.output: op for op in program.ops}
    found: dict[str, Array] = {}
    for public, name in program.outputs:
        producer = producers.get(name)
        source = producer.inputs[0] if producer is not None and producer.kind == "dequantize" else name
        quant = program.tensors[source].quant
        if source in traced and quant is not None:
            found[public] = quant.dequantize(traced[source])
    return found


def first_difference(
    program: Program,
    traced: Mapping[str, Array],
    feeds: Mapping[str, Array],
    run_op: Callable[[Program, Op, Sequence[Array | None]], Array],
) -> Difference | None:
    """Return the first operator that computes something else on the runtime's own integers.

    Args:
        program: quantized, some layers perhaps in float; or dynamic: then a step is 1/255 of the operator's
            largest output.
        traced: every quantized activation as the runtime computed it, and the outputs made in float.
        feeds: the network's inputs.
        run_op: the reference for one operator.
    """
    known: dict[str, Array] = {**feeds, **traced}
    in_float: set[str] = set()
    for op in program.ops:
        inputs = [known.get(name) for name in op.inputs]
        if any(
            value is None and not program.tensors[n].is_constant
            for n, value in zip(op.inputs, inputs, strict=True)
        ):
            continue
        is_real = program.tensors[op.output].quant is None
        if is_real and op.kind != "dequantize":
            in_float.add(op.output)
        if op.output not in traced and not is_real:
            continue
        expected = run_op(program, op, inputs)
        if op.output not in traced:
            known[op.output] = expected
        elif program.is_dynamic:
            error = relative_error({"y": expected}, {"y": traced[op.output]})
            if error > MAX_OP_STEP:
                return Difference(op, round(error / MAX_OP_STEP), 1.0)
        elif is_real:
            found = _float_difference(op, expected, traced[op.output])
            if found is not None:
                return found
        else:
            bits = program.activation_bits
            flipped = 1.0 if in_float.isdisjoint(op.inputs) else MAX_FLIPPED[bits]
            found = _integer_difference(op, expected, traced[op.output], MAX_OP_LSB[bits], flipped)
            if found is not None and not _are_ties(program, op, inputs[0], expected, traced[op.output]):
                return found
    return None


def _are_ties(program: Program, op: Op, real: Array | None, expected: Array, found: Array) -> bool:
    """Whether a float value was rounded one step the other way only where it lies half-way between two.

    An average of four integers, computed in float, lies there one time in four.
    """
    quant = program.tensors[op.output].quant
    if op.kind != "quantize" or quant is None or real is None:
        return False
    differs = expected != found
    if np.abs(expected[differs].astype(np.int32) - found[differs].astype(np.int32)).max(initial=0) > 1:
        return False
    steps = np.abs(real[differs] / np.float32(quant.scale))
    return bool((np.abs(steps - np.floor(steps) - 0.5) <= NEAR_TIE).all())


def _integer_difference(
    op: Op, expected: Array, found: Array, most_lsb: int, most_flipped: float
) -> Difference | None:
    lsb = np.abs(expected.astype(np.int32) - found.astype(np.int32))
    differing = int((lsb > 0).sum())
    if lsb.max(initial=0) <= most_lsb and differing <= most_flipped * lsb.size + FEW:
        return None
    return Difference(op, int(lsb.max()), differing / lsb.size)


def _float_difference(op: Op, expected: Array, found: Array) -> Difference | None:
    if relative_error({"y": expected}, {"y": found}) <= MAX_RELATIVE_ERROR:
        return None
    step = max(float(np.abs(expected).max(initial=0.0)) / 127.0, 1e-12)
    lsb = np.nan_to_num(np.abs(expected - found) / step, nan=_NOT_FINITE, posinf=_NOT_FINITE)
    return Difference(op, int(np.ceil(lsb.max())), float((lsb > 127.0 * MAX_RELATIVE_ERROR).mean()))


def sqnr_db(reference: Array, value: Array) -> float | None:
    """Return 10 log10(sum reference^2 / sum (value - reference)^2), None for a reference of zeros.

    Identical arrays give 200 dB, the value that stands for no noise.

    Example:
        >>> round(sqnr_db(np.array([10.0]), np.array([9.0])), 1)
        20.0
    """
    signal = float((reference.astype(np.float64) ** 2).sum())
    noise = float(((value.astype(np.float64) - reference) ** 2).sum())
    if signal == 0.0:
        return None
    return 200.0 if noise == 0.0 else min(200.0, float(10.0 * np.log10(signal / noise)))
