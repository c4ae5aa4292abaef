"""Widen channels of a quantized Program to what ONNX Runtime's fast x86 kernels take; the values stay.

    depthwise convolution          channels  -> next multiple of 16, at most half as many more
    kernel larger than 1x1         channels  -> next multiple of 16, at most a quarter more
    convolution on the image       channels  -> next multiple of 4, if it makes a multiple of 16

MLAS has direct convolutions for symmetric weights on those widths only (MlasConvSymDepthwise, MlasConvSym);
others are gathered into columns first. A channel that is added has weights of zero wherever it is read, so
every integer that the network gives stays what it was. All tensors that share the channels widen together:
a squeeze-and-excitation branch with its gate, an addition with both operands.

Measured (x86 with VNNI, one thread, ONNX Runtime 1.31): depthwise 5x5 of 88 channels 172 us, of 96 72 us;
3x3 of 72 channels 74 us, of 80 31 us, of 24 channels 90 us, of 32 59 us; the first convolution of
MobileNetV3 on 3 channels 293 us, on 4 158 us; 3x3 from 61 to 61 channels 675 us, from 64 to 64 533 us.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from edgecnn.graph.program import Array, Op, Program, QuantParams, Tensor

MULTIPLE = 16
INPUT_MULTIPLE = 4

MOST_DEPTHWISE, MOST_DENSE = 1.5, 1.25
"""How many times as many channels a layer may get. Dense layers pay for them in multiplications."""

SMALLEST_IMAGE = 32 * 32
"""Pixels below which a Pad of the input costs more than it saves."""

_PASSES_CHANNELS = frozenset(
    {"add", "sub", "mul", "clamp", "leaky_relu", "sigmoid", "tanh", "max_pool2d", "avg_pool2d", "requantize"}
)


def align_channels(program: Program, kept: Collection[str] = ()) -> Program:
    """Return the Program with aligned channels; itself where there is nothing to align.

    Args:
        program: quantized; a float one is returned as it is.
        kept: tensors that must stay as they are (debug outputs).

    Returns:
        A Program that gives the same integers.
    """
    return _widen_input(_widen_layers(program, frozenset(kept)), frozenset(kept))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _is_depthwise(program: Program, op: Op) -> bool:
    weight = program.tensors[op.inputs[1]].shape if op.kind == "conv2d" else ()
    return op.kind == "conv2d" and op.attributes["groups"] == weight[0] > 1 and weight[1] == 1


class _Components:
    """Activations that must have the same number of channels (union-find), and those that cannot change."""

    def __init__(self, program: Program, kept: frozenset[str]) -> None:
        self.program = program
        self.parent = {name: name for name, t in program.tensors.items() if not t.is_constant}
        self.stiff: set[str] = set(program.inputs) | {name for _, name in program.outputs} | set(kept)
        for op in program.ops:
            self._read(op)

    def root(self, name: str) -> str:
        while self.parent[name] != name:
            self.parent[name] = self.parent[self.parent[name]]
            name = self.parent[name]
        return name

    def _join(self, a: str, b: str) -> None:
        self.parent[self.root(a)] = self.root(b)

    def _read(self, op: Op) -> None:
        tensors = self.program.tensors
        active = [name for name in op.inputs if not tensors[name].is_constant]
        constants = [tensors[name] for name in op.inputs if tensors[name].is_constant]
        if self._passes(op, [tensors[name] for name in active], constants):
            for name in active:
                self._join(name, op.output)
        elif op.kind == "conv2d" and op.attributes["groups"] == 1:
            return
        elif op.kind == "linear" and len(tensors[op.inputs[0]].shape) == 2:
            self.stiff.add(op.output)
        else:
            self.stiff.update((*active, op.output))

    def _passes(self, op: Op, active: list[Tensor], constants: list[Tensor]) -> bool:
        """Whether channel i of the output is made of channel i of the inputs."""
        y = self.program.tensors[op.output]
        if any(len(x.shape) not in (2, 4) or x.shape[1] != y.shape[1] for x in active):
            return False
        if _is_depthwise(self.program, op) or _is_flatten(self.program, op):
            return True
        if op.kind in ("mean", "amax"):
            return tuple(op.attributes["axes"]) == (2, 3)
        per_channel = all(_is_per_channel(constant, y.shape[1]) for constant in constants)
        return op.kind in _PASSES_CHANNELS and len(y.shape) == 4 and per_channel


def _is_flatten(program: Program, op: Op) -> bool:
    """Whether an operator makes (n, c) of (n, c, 1, 1)."""
    x, y = program.tensors[op.inputs[0]].shape, program.tensors[op.output].shape
    return op.kind == "reshape" and x[2:] == (1, 1) and y == x[:2]


def _is_per_channel(constant: Tensor, channels: int) -> bool:
    """Whether a constant is one number, or one per channel of a 4-D activation."""
    shape = (1,) * (4 - len(constant.shape)) + constant.shape
    return len(constant.shape) <= 4 and shape[1] in (1, channels) and shape[0] == shape[2] == shape[3] == 1


def _widen_layers(program: Program, kept: frozenset[str]) -> Program:
    components = _Components(program, kept)
    stiff = {components.root(name) for name in components.stiff if name in components.parent}
    width: dict[str, int] = {}
    for op in program.ops:
        if op.kind != "conv2d" or program.tensors[op.output].quant is None:
            continue
        kernel = program.tensors[op.inputs[1]].shape[2:]
        depthwise = _is_depthwise(program, op)
        if not depthwise and (kernel == (1, 1) or op.attributes["groups"] != 1):
            continue
        for name in (op.inputs[0], op.output):
            root, channels = components.root(name), program.tensors[name].shape[1]
            most = channels * (MOST_DEPTHWISE if depthwise else MOST_DENSE)
            if root not in stiff and channels < _round_up(channels, MULTIPLE) <= most:
                width[root] = _round_up(channels, MULTIPLE)
    roots = {name: components.root(name) for name in components.parent}
    wide = {name: width[root] for name, root in roots.items() if root in width}
    return _rebuild(program, wide) if wide else program


def _rebuild(program: Program, wide: Mapping[str, int]) -> Program:
    """Return the Program with the activations in `wide` at that many channels."""
    tensors = dict(program.tensors)
    for name, channels in wide.items():
        shape = program.tensors[name].shape
        tensors[name] = replace(program.tensors[name], shape=(shape[0], channels, *shape[2:]))
    ops = tuple(_widen_op(program, op, wide, tensors) for op in program.ops)
    used = {name for op in ops for name in op.inputs} | {op.output for op in ops} | set(program.inputs)
    return replace(program, tensors={n: t for n, t in tensors.items() if n in used}, ops=ops)


def _widen_op(program: Program, op: Op, wide: Mapping[str, int], tensors: dict[str, Tensor]) -> Op:
    """Return an operator that reads constants of the widths of its activations."""
    c_out = wide.get(op.output)
    c_in = next((wide[name] for name in op.inputs if name in wide), None)
    if c_out is None and c_in is None:
        return op
    depthwise = _is_depthwise(program, op)
    inputs = list(op.inputs)
    for position, name in enumerate(op.inputs):
        constant = program.tensors[name]
        if constant.data is None:
            continue
        grown = constant
        if op.kind in ("conv2d", "linear"):
            grown = constant if c_out is None else _grow(grown, 0, c_out)
            if position == 1 and not depthwise and c_in is not None:
                grown = _grow(grown, 1, c_in)
        elif c_out is not None and constant.shape[-3:-2] == (program.tensors[op.output].shape[1],):
            grown = _grow(grown, len(constant.shape) - 3, c_out)
        if grown is not constant:
            inputs[position] = f"{name}/wide_{op.output}"
            tensors[inputs[position]] = replace(grown, name=inputs[position])
    attributes = dict(op.attributes)
    if depthwise:
        attributes["groups"] = c_out
    if op.kind == "reshape":
        attributes["shape"] = tensors[op.output].shape
    return replace(op, inputs=tuple(inputs), attributes=MappingProxyType(attributes))


def _grow(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Return a constant with zeros (real zeros) appended along an axis."""
    if tensor.data is None or tensor.shape[axis] == size:
        return tensor
    quant = tensor.quant
    extra = [(0, 0)] * len(tensor.shape)
    extra[axis] = (0, size - tensor.shape[axis])
    zero = 0 if quant is None else quant.zero_point
    data: Array = np.pad(tensor.data, extra, constant_values=zero)
    if quant is not None and quant.axis == axis:
        scale = np.pad(np.asarray(quant.scale), extra[axis], mode="edge")
        quant = QuantParams(scale, quant.zero_point, quant.axis)
    return replace(tensor, shape=data.shape, data=data, quant=quant)


def _widen_input(program: Program, kept: frozenset[str]) -> Program:
    """Append channels of zeros to the quantized input of first convolutions."""
    quantized = {
        op.output: program.tensors[op.output]
        for op in program.ops
        if op.kind == "quantize" and op.inputs[0] in program.inputs
    }
    consumers = program.consumers()
    tensors, ops = dict(program.tensors), []
    if not quantized:
        return program
    for op in program.ops:
        ops.append(op)
        if op.output not in quantized or op.output in kept or len(program.tensors[op.output].shape) != 4:
            continue
        x = program.tensors[op.output]
        channels = _round_up(x.shape[1], INPUT_MULTIPLE)
        suits = all(_reads_image(program, reader) for reader in consumers[x.name])
        if not suits or channels == x.shape[1] or x.shape[2] * x.shape[3] < SMALLEST_IMAGE:
            continue
        name = f"{x.name}/wide"
        tensors[name] = replace(x, name=name, shape=(x.shape[0], channels, *x.shape[2:]))
        pads = ((0, 0), (0, channels - x.shape[1]), (0, 0), (0, 0))
        ops.append(Op("pad", (x.name,), name, MappingProxyType({"pads": pads, "value": 0.0}), op.layer))
        quantized[x.name] = tensors[name]
    rewritten = tuple(_read_wide(op, quantized, program, tensors) for op in ops)
    return replace(program, tensors=tensors, ops=rewritten)


def _reads_image(program: Program, op: Op) -> bool:
    """Whether an operator is a convolution that is faster on a multiple of 4 channels."""
    dense = op.kind == "conv2d" and op.attributes["groups"] == 1
    return dense and program.tensors[op.output].shape[1] % MULTIPLE == 0


def _read_wide(op: Op, wide: Mapping[str, Tensor], program: Program, tensors: dict[str, Tensor]) -> Op:
    """Let a convolution read the widened input."""
    if op.kind != "conv2d" or op.inputs[0] not in wide or wide[op.inputs[0]].name == op.inputs[0]:
        return op
    x = wide[op.inputs[0]]
    weight = _grow(program.tensors[op.inputs[1]], 1, x.shape[1])
    name = f"{op.inputs[1]}/wide_{op.output}"
    tensors[name] = replace(weight, name=name)
    return replace(op, inputs=(x.name, name, *op.inputs[2:]))
