"""Small Programs for tests: a builder, a plain post-training quantizer, and samples of every op kind.

    builder = ProgramBuilder("net")
    x = builder.input((3, 8, 8))
    y = builder.conv2d(x, 4, 3, padding=(1, 1, 1, 1), clamp=(0.0, None))
    program = builder.finish(y)                    # a float Program
    quantized = quantize_program(program)          # the same net in int8, float input and output

    float_sample(name), quantized_sample(name)     # a Program; all samples together hold every op kind
    feeds_for(program, batch)                      # seeded inputs for either

The builder computes a value for every tensor as it goes (batch of 2), so it knows all shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgecnn.graph.program import BATCH, Array, Op, Program, QuantParams, Tensor
from edgecnn.quantize.reference import run_op, run_program

KEEPS_QUANT = frozenset(
    {"max_pool2d", "avg_pool2d", "amax", "concat", "slice", "gather", "pad", "reshape", "transpose", "resize"}
)
"""Op kinds whose output has the quantization parameters of the input."""

FIXED_QUANT: Mapping[str, QuantParams] = {
    "sigmoid": QuantParams(np.asarray(1 / 256, np.float32), -128),
    "softmax": QuantParams(np.asarray(1 / 256, np.float32), -128),
    "tanh": QuantParams(np.asarray(1 / 128, np.float32), 0),
}
"""Op kinds whose output parameters do not depend on data."""

Clamp = tuple[float | None, float | None]
Pair = tuple[int, int]
Sides = tuple[int, int, int, int]
RELU: Clamp = (0.0, None)
RELU6: Clamp = (0.0, 6.0)


class ProgramBuilder:
    """Builds a float Program op by op; every method returns the name of the tensor it makes."""

    def __init__(self, name: str, seed: int = 0) -> None:
        self.name = name
        self.rng = np.random.default_rng(seed)
        self.tensors: dict[str, Tensor] = {}
        self.ops: list[Op] = []
        self.inputs: list[str] = []
        self.values: dict[str, Array] = {}

    def input(self, shape: tuple[int, ...], name: str = "image") -> str:
        """Add a float input of `shape` (without the batch)."""
        self.tensors[name] = Tensor(name, (BATCH, *shape))
        self.values[name] = self.rng.standard_normal((2, *shape)).astype(np.float32)
        self.inputs.append(name)
        return name

    def constant(self, values: Any, name: str | None = None) -> str:
        """Add a float32 constant."""
        name = name or f"c{len(self.tensors)}"
        data = np.asarray(values, np.float32)
        self.tensors[name] = Tensor(name, data.shape, data=data)
        self.values[name] = data
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add an op of any kind."""
        name = f"{kind}_{len(self.ops)}"
        op = Op(kind, inputs, name, attributes, layer=f"{self.name}.{len(self.ops)} ({kind})")
        probe = Program("", (), (), {**self.tensors, name: Tensor(name, ())}, ())
        value = run_op(probe, op, [self.values[x] for x in inputs])
        self.tensors[name] = Tensor(name, (BATCH, *value.shape[1:]))
        self.values[name] = value
        self.ops.append(op)
        return name

    def shape(self, x: str) -> tuple[int, ...]:
        """Return the shape of a tensor, BATCH first."""
        return self.tensors[x].shape

    def conv2d(
        self,
        x: str,
        c_out: int,
        kernel: int | tuple[int, int],
        stride: Pair = (1, 1),
        padding: Sides = (0, 0, 0, 0),
        dilation: Pair = (1, 1),
        groups: int = 1,
        clamp: Clamp = (None, None),
        bias: bool = True,
    ) -> str:
        """Add a convolution with random weights of unlike size per channel."""
        k_h, k_w = (kernel, kernel) if isinstance(kernel, int) else kernel
        inputs = (x, *self._weights((c_out, self.shape(x)[1] // groups, k_h, k_w), c_out, 0, bias))
        window = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return self.op("conv2d", *inputs, **window, clamp=clamp)

    def conv_transpose2d(
        self,
        x: str,
        c_out: int,
        kernel: int,
        stride: Pair = (1, 1),
        padding: Sides = (0, 0, 0, 0),
        output_padding: Pair = (0, 0),
        groups: int = 1,
        clamp: Clamp = (None, None),
    ) -> str:
        """Add a transposed convolution with random weights and bias."""
        inputs = (x, *self._weights((self.shape(x)[1], c_out // groups, kernel, kernel), c_out, 1, True))
        window = {"stride": stride, "padding": padding, "output_padding": output_padding}
        return self.op("conv_transpose2d", *inputs, **window, dilation=(1, 1), groups=groups, clamp=clamp)

    def linear(self, x: str, c_out: int, clamp: Clamp = (None, None), bias: bool = True) -> str:
        """Add a fully connected layer with random weights."""
        inputs = self._weights((c_out, self.shape(x)[-1]), c_out, 0, bias)
        return self.op("linear", x, *inputs, clamp=clamp)

    def finish(self, *outputs: str) -> Program:
        """Return the Program; its public outputs are named "output" or "output_0", "output_1", ..."""
        names = ["output"] if len(outputs) == 1 else [f"output_{i}" for i in range(len(outputs))]
        pairs = tuple(zip(names, outputs, strict=True))
        return Program(self.name, tuple(self.inputs), pairs, dict(self.tensors), tuple(self.ops))

    def _weights(self, shape: tuple[int, ...], c_out: int, axis: int, bias: bool) -> list[str]:
        fan_in = int(np.prod(shape)) / shape[axis]
        per_channel = [1] * len(shape)
        per_channel[axis] = -1
        size = self.rng.uniform(0.3, 2.0, shape[axis]).reshape(per_channel) / np.sqrt(fan_in)
        names = [self.constant(self.rng.standard_normal(shape) * size, f"w{len(self.ops)}")]
        if bias:
            names.append(self.constant(self.rng.standard_normal(c_out) * 0.3, f"b{len(self.ops)}"))
        return names


def feeds_for(program: Program, batch: int = 2, seed: int = 0) -> dict[str, Array]:
    """Return seeded standard normal float32 inputs, name -> (batch, ...)."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal((batch, *program.tensors[name].shape[1:])).astype(np.float32)
        for name in program.inputs
    }


def activation_quant(values: Array) -> QuantParams:
    """Return asymmetric per_tensor parameters that cover the range of `values` and 0."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = np.float32(max(high - low, 1e-6) / 255)
    return QuantParams(np.asarray(scale), int(np.clip(np.rint(-128 - low / scale), -128, 127)))


def quantize_program(program: Program, feeds: Mapping[str, Array] | None = None) -> Program:
    """Return the int8 Program of a float one: `quantize` on each input, `dequantize` before each output.

    Activations get asymmetric per_tensor parameters from the ranges seen on `feeds` (or `feeds_for`),
    weights symmetric per_channel ones. The inputs of a concat are brought to shared parameters by
    `requantize` where they differ.
    """
    return _Quantizer(program, feeds or feeds_for(program, batch=128)).run()


class _Quantizer:
    def __init__(self, program: Program, feeds: Mapping[str, Array]) -> None:
        self.program = program
        kept = [name for name, tensor in program.tensors.items() if tensor.data is None]
        self.values = run_program(program, feeds, keep=kept)
        self.tensors: dict[str, Tensor] = {}
        self.ops: list[Op] = []

    def run(self) -> Program:
        for name in self.program.inputs:
            self.tensors[name] = self.program.tensors[name]
            self._change("quantize", name, f"{name}_q", activation_quant(self.values[name]))
        for op in self.program.ops:
            self._add(op)
        outputs = []
        for public, name in self.program.outputs:
            real = Tensor(f"{name}_real", self.program.tensors[name].shape)
            self.tensors[real.name] = real
            self.ops.append(Op("dequantize", (self._q(name),), real.name))
            outputs.append((public, real.name))
        return Program(self.program.name, self.program.inputs, tuple(outputs), self.tensors, tuple(self.ops))

    def _q(self, name: str) -> str:
        return f"{name}_q" if name in self.program.inputs else name

    def _change(self, kind: str, source: str, name: str, quant: QuantParams) -> str:
        self.tensors[name] = Tensor(name, self.tensors[source].shape, "int8", quant)
        self.ops.append(Op(kind, (source,), name, layer=f"{name} ({kind})"))
        return name

    def _add(self, op: Op) -> None:
        inputs = [self._q(name) for name in op.inputs]
        if op.kind in ("conv2d", "conv_transpose2d", "linear"):
            self._weights(op)
        else:
            for name in op.inputs:
                if self.program.tensors[name].data is not None:
                    self._constant(name)
        quant = self._output_quant(op)
        if op.kind == "concat":
            inputs = [self._shared(name, quant, op.output) for name in inputs]
        self.tensors[op.output] = Tensor(op.output, self.program.tensors[op.output].shape, "int8", quant)
        self.ops.append(Op(op.kind, tuple(inputs), op.output, op.attributes, op.layer))

    def _output_quant(self, op: Op) -> QuantParams:
        if op.kind in FIXED_QUANT:
            return FIXED_QUANT[op.kind]
        if op.kind in KEEPS_QUANT and op.kind != "concat":
            quant = self.tensors[self._q(op.inputs[0])].quant
            assert quant is not None
            return quant
        return activation_quant(self.values[op.output])

    def _shared(self, name: str, quant: QuantParams, user: str) -> str:
        if self.tensors[name].quant == quant:
            return name
        return self._change("requantize", name, f"{name}_for_{user}", quant)

    def _constant(self, name: str) -> None:
        data = self.program.tensors[name].data
        assert data is not None
        quant = activation_quant(data)
        self.tensors[name] = Tensor(name, data.shape, "int8", quant, quant.quantize(data))

    def _weights(self, op: Op) -> None:
        w = self.program.tensors[op.inputs[1]].data
        quant_x = self.tensors[self._q(op.inputs[0])].quant
        assert w is not None
        assert quant_x is not None
        axis = 1 if op.kind == "conv_transpose2d" else 0
        others = tuple(i for i in range(w.ndim) if i != axis)
        scale = (np.abs(w).max(axis=others) / 127).astype(np.float32)
        quant_w = QuantParams(scale, 0, axis)
        self.tensors[op.inputs[1]] = Tensor(op.inputs[1], w.shape, "int8", quant_w, quant_w.quantize(w))
        if len(op.inputs) > 2:
            b = self.program.tensors[op.inputs[2]].data
            assert b is not None
            quant_b = QuantParams(quant_x.scale * np.tile(scale, b.size // scale.size), 0, 0)
            data = np.rint(b.astype(np.float64) / quant_b.scale).astype(np.int32)
            self.tensors[op.inputs[2]] = Tensor(op.inputs[2], b.shape, "int32", quant_b, data)


def _single(name: str, make: Callable[[ProgramBuilder, str], str]) -> Program:
    builder = ProgramBuilder(name)
    return builder.finish(make(builder, builder.input((4, 9, 7))))


def _two_branches(b: ProgramBuilder, x: str) -> tuple[str, str]:
    return b.conv2d(x, 6, 3, clamp=RELU), b.conv2d(x, 6, 3)


def _binary(kind: str, clamp: Clamp = (None, None)) -> Callable[[ProgramBuilder, str], str]:
    return lambda b, x: b.op(kind, *_two_branches(b, x), clamp=clamp)


def _with_constant(kind: str, shape: tuple[int, ...]) -> Callable[[ProgramBuilder, str], str]:
    return lambda b, x: b.op(kind, x, b.constant(b.rng.uniform(-0.5, 2.0, shape)), clamp=(None, None))


def _pool(kind: str, **attributes: Any) -> Callable[[ProgramBuilder, str], str]:
    return lambda b, x: b.op(kind, x, **attributes)


def _linear_net(b: ProgramBuilder, x: str) -> str:
    flat = b.op("reshape", x, shape=(BATCH, 4 * 9 * 7))
    return b.linear(b.linear(flat, 16, clamp=RELU), 5)


def _shuffle(b: ProgramBuilder, x: str) -> str:
    split = b.op("reshape", x, shape=(BATCH, 2, 2, 9, 7))
    swapped = b.op("transpose", split, perm=(0, 2, 1, 3, 4))
    return b.conv2d(b.op("reshape", swapped, shape=(BATCH, 4, 9, 7)), 4, 1)


def _residual(b: ProgramBuilder, x: str) -> str:
    first = b.conv2d(x, 4, 3, padding=(1, 1, 1, 1), clamp=RELU)
    return b.op("add", b.conv2d(first, 4, 3, padding=(1, 1, 1, 1)), x, clamp=RELU)


def _squeeze_excite(b: ProgramBuilder, x: str) -> str:
    y = b.conv2d(x, 8, 3, padding=(1, 1, 1, 1), clamp=RELU)
    squeezed = b.conv2d(b.op("mean", y, axes=(2, 3), keepdim=True), 4, 1, clamp=RELU)
    gate = b.op("sigmoid", b.conv2d(squeezed, 8, 1))
    return b.op("mul", gate, y, clamp=(None, None))


def _classifier(b: ProgramBuilder, x: str) -> str:
    y = b.conv2d(x, 8, 3, (2, 2), (1, 1, 1, 1), clamp=RELU6)
    y = b.conv2d(y, 8, 3, (1, 1), (1, 1, 1, 1), groups=8, clamp=RELU6)
    y = b.op("max_pool2d", y, kernel=(2, 2), stride=(2, 2), padding=(0, 0, 0, 0), dilation=(1, 1))
    return b.linear(b.op("mean", y, axes=(2, 3), keepdim=False), 10)


_SAMPLES: dict[str, Callable[[ProgramBuilder, str], str]] = {
    "conv": lambda b, x: b.conv2d(x, 6, 3, padding=(1, 1, 1, 1)),
    "conv_no_bias": lambda b, x: b.conv2d(x, 6, 3, bias=False),
    "conv_relu": lambda b, x: b.conv2d(x, 6, 3, padding=(1, 1, 1, 1), clamp=RELU),
    "conv_relu6": lambda b, x: b.conv2d(x, 6, (3, 5), padding=(1, 2, 1, 2), clamp=(0.0, 0.75)),
    "conv_strided": lambda b, x: b.conv2d(x, 6, 3, (2, 2), (1, 1, 1, 1)),
    "conv_asymmetric_padding": lambda b, x: b.conv2d(x, 6, 3, (2, 2), (0, 1, 2, 0)),
    "conv_dilated": lambda b, x: b.conv2d(x, 6, 3, padding=(2, 2, 2, 2), dilation=(2, 2)),
    "conv_grouped": lambda b, x: b.conv2d(x, 6, 3, padding=(1, 1, 1, 1), groups=2),
    "conv_depthwise": lambda b, x: b.conv2d(x, 4, 3, padding=(1, 1, 1, 1), groups=4, clamp=RELU6),
    "conv_depthwise_multiplier": lambda b, x: b.conv2d(x, 8, 3, (2, 2), (1, 1, 1, 1), groups=4),
    "conv_1x1": lambda b, x: b.conv2d(x, 8, 1),
    "conv_1x1_strided": lambda b, x: b.conv2d(x, 8, 1, (2, 2)),
    "conv_transpose": lambda b, x: b.conv_transpose2d(x, 6, 2, (2, 2)),
    "conv_transpose_padded": lambda b, x: b.conv_transpose2d(
        x, 6, 3, (2, 2), (1, 1, 1, 1), (1, 1), clamp=RELU
    ),
    "conv_transpose_grouped": lambda b, x: b.conv_transpose2d(x, 6, 3, (2, 2), (1, 1, 1, 1), groups=2),
    "linear": _linear_net,
    "add": _binary("add"),
    "add_relu": _binary("add", RELU),
    "sub": _binary("sub"),
    "mul": _binary("mul"),
    "add_constant_per_channel": _with_constant("add", (1, 4, 1, 1)),
    "add_constant_scalar": _with_constant("add", ()),
    "sub_constant_per_channel": _with_constant("sub", (1, 4, 1, 1)),
    "mul_constant_per_channel": _with_constant("mul", (1, 4, 1, 1)),
    "mul_constant_scalar": _with_constant("mul", ()),
    "relu": lambda b, x: b.op("clamp", x, clamp=RELU),
    "clamp": lambda b, x: b.op("clamp", x, clamp=(-0.5, 1.25)),
    "leaky_relu": lambda b, x: b.op("leaky_relu", x, negative_slope=0.1),
    "sigmoid": lambda b, x: b.op("sigmoid", x),
    "tanh": lambda b, x: b.op("tanh", x),
    "softmax_channels": lambda b, x: b.op("softmax", x, axis=1),
    "softmax_2d": lambda b, x: b.op("softmax", _linear_net(b, x), axis=1),
    "max_pool": _pool("max_pool2d", kernel=(3, 3), stride=(2, 2), padding=(1, 1, 1, 1), dilation=(1, 1)),
    "max_pool_ceil": _pool("max_pool2d", kernel=(2, 2), stride=(2, 2), padding=(0, 0, 1, 1), dilation=(1, 1)),
    "avg_pool": _pool(
        "avg_pool2d", kernel=(2, 2), stride=(2, 2), padding=(0, 0, 0, 0), count_include_pad=True
    ),
    "avg_pool_include_pad": _pool(
        "avg_pool2d", kernel=(3, 3), stride=(2, 2), padding=(1, 1, 1, 1), count_include_pad=True
    ),
    "avg_pool_exclude_pad": _pool(
        "avg_pool2d", kernel=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1), count_include_pad=False
    ),
    "global_mean": lambda b, x: b.op("mean", x, axes=(2, 3), keepdim=False),
    "global_mean_keepdim": lambda b, x: b.op("mean", x, axes=(2, 3), keepdim=True),
    "channel_mean": lambda b, x: b.op("mean", x, axes=(1,), keepdim=True),
    "global_amax": lambda b, x: b.op("amax", x, axes=(2, 3), keepdim=False),
    "channel_amax": lambda b, x: b.op("amax", x, axes=(1,), keepdim=True),
    "concat": lambda b, x: b.op("concat", *_two_branches(b, x), axis=1),
    "concat_height": lambda b, x: b.op("concat", *_two_branches(b, x), axis=2),
    "slice_channels": lambda b, x: b.op("slice", x, axis=1, start=1, stop=4, step=2),
    "slice_height": lambda b, x: b.op("slice", x, axis=2, start=2, stop=8, step=1),
    "gather": lambda b, x: b.op("gather", x, axis=1, indices=(3, 0, 0, 2)),
    "gather_width": lambda b, x: b.op("gather", x, axis=3, indices=(6, 5, 0)),
    "mirror": lambda b, x: b.op("pad", x, pads=((0, 0), (0, 0), (1, 2), (0, 3)), value=0.0, mode="reflect"),
    "pad": lambda b, x: b.op("pad", x, pads=((0, 0), (0, 0), (1, 2), (0, 3)), value=0.0),
    "pad_value": lambda b, x: b.op("pad", x, pads=((0, 0), (1, 1), (1, 0), (2, 0)), value=0.5),
    "flatten": lambda b, x: b.op("reshape", x, shape=(BATCH, 4 * 9 * 7)),
    "transpose": lambda b, x: b.op("transpose", x, perm=(0, 2, 3, 1)),
    "channel_shuffle": _shuffle,
    "resize_nearest": lambda b, x: b.op("resize", x, size=(18, 14), mode="nearest", align_corners=False),
    "resize_nearest_odd": lambda b, x: b.op("resize", x, size=(13, 5), mode="nearest", align_corners=False),
    "resize_bilinear": lambda b, x: b.op("resize", x, size=(18, 14), mode="bilinear", align_corners=False),
    "resize_bilinear_odd": lambda b, x: b.op("resize", x, size=(13, 5), mode="bilinear", align_corners=False),
    "resize_bilinear_corners": lambda b, x: b.op(
        "resize", x, size=(17, 13), mode="bilinear", align_corners=True
    ),
    "residual_block": _residual,
    "squeeze_excite": _squeeze_excite,
    "classifier": _classifier,
}

SAMPLE_NAMES: tuple[str, ...] = tuple(_SAMPLES)
"""For pytest.mark.parametrize; `float_sample` and `quantized_sample` build one of them."""

_FLOAT_ONLY: dict[str, Callable[[ProgramBuilder, str], str]] = {
    "hard_swish": lambda b, x: b.op("hard_swish", b.conv2d(x, 6, 3)),
    "hard_sigmoid": lambda b, x: b.op("hard_sigmoid", b.conv2d(x, 6, 3)),
}

FLOAT_SAMPLE_NAMES: tuple[str, ...] = (*SAMPLE_NAMES, *_FLOAT_ONLY)
"""SAMPLE_NAMES and those that `float_sample` alone builds, as their op has no integer form."""


def float_sample(name: str) -> Program:
    """Return one sample as a float Program."""
    return _single(name, {**_SAMPLES, **_FLOAT_ONLY}[name])


def quantized_sample(name: str) -> Program:
    """Return one sample in int8, from a float input to a float output."""
    return quantize_program(float_sample(name))


def quantized_samples() -> dict[str, Program]:
    """Return every sample in int8, by name; together they hold every integer op kind."""
    return {name: quantized_sample(name) for name in SAMPLE_NAMES}
