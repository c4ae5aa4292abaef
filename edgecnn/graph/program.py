"""The Program: the one description of a network from which the ONNX file, the TFLite file and the
NumPy reference are all made, so that they compute the same integers.

A Program is a list of single-output operators in execution order over named tensors. Shapes and axes
are PyTorch's (NCHW); a writer that wants NHWC converts on its own. Dimension 0 of every activation is
the batch, written as BATCH. An activation or weight with `quant` set holds int8 values q with

    real = scale * (q - zero_point)          q in [-128, 127] (activations), [-127, 127] (weights)

(or int16 activations in [-32768, 32767] with zero_point 0, beside the same int8 weights)

and a bias holds int32 with scale = scale_x * scale_w[c], zero_point 0. A float Program is the same thing
with no `quant` anywhere, used for the float baseline files.

Integer semantics of a quantized op (all inputs and the output quantized): accumulate exactly, then

    q_y = clamp(round_half_even(acc * multiplier) + zero_point_y, q_lo, q_hi)

in float32; the attribute `clamp` (lo, hi in real units, either may be None) bounds q_lo, q_hi. Only a
bilinear resize rounds half up, with weights of 11 bits (`graph.interpolation`), as XNNPACK does.

Operators and attributes (x is the data input; every op has `inputs`, one `output`):

    conv2d            x, w (c_out, c_in/groups, k_h, k_w)[, b]; stride (2), padding (top, left, bottom,
                      right), dilation (2), groups, clamp
    conv_transpose2d  x, w (c_in, c_out/groups, k_h, k_w)[, b]; stride, padding (4), output_padding (2),
                      dilation, groups, clamp
    linear            x (..., c_in), w (c_out, c_in)[, b]; clamp
    add sub mul       a, b broadcast as in NumPy; either may be a constant; clamp
    clamp             x; clamp (lo, hi): relu is (0, None), relu6 is (0, 6)
    leaky_relu        x; negative_slope
    sigmoid tanh      x
    hard_swish        x; float only: x * hard_sigmoid(x)
    hard_sigmoid      x; float only: clamp(x / 6 + 1/2, 0, 1)
    softmax           x; axis
    max_pool2d        x; kernel (2), stride (2), padding (4, may be asymmetric), dilation (2)
    avg_pool2d        x; kernel (2), stride (2), padding (4), count_include_pad
    mean amax         x; axes (sorted tuple), keepdim
    concat            x0, x1, ...; axis
    slice             x; axis, start, stop, step
    gather            x; axis, indices: x[..., indices, ...]
    pad               x; pads ((before, after) per dimension), value (real); mode "reflect": mirrored instead
    reshape           x; shape (BATCH first)
    transpose         x; perm (perm[0] == 0)
    resize            x (n, c, h, w); size (2), mode "nearest" | "bilinear", align_corners
    normalize         x; float only; axes (sorted tuple), eps: (x - mean) / sqrt(variance + eps)
    gelu              x; float only; approximate (by tanh, else exact)
    matmul            a (..., m, k), b (..., k, n); float only; the other dimensions broadcast
    div               a, b; float only
    sum               x; float only; axes (sorted tuple), keepdim
    abs exp log sqrt  x; float only; so are rsqrt (1 / sqrt(x)), elu, sin and cos
    quantize          float x -> quantized        dequantize  quantized x -> float
    requantize        quantized x -> quantized with other parameters

conv2d and linear may have the attribute `dynamic`, "image", "row" or "pixel": x and the output are float32,
w is int8, and the runtime quantizes x to int8 itself, with a scale and a zero point from the range (0
included) of each image, each row of the last dimension, or the channels of each pixel.

max_pool2d, avg_pool2d, amax, concat, slice, gather, pad, reshape, transpose and resize keep the quantization
parameters of their input (all inputs of a concat share one set). sigmoid and softmax give scale 1/256,
zero_point -128; tanh gives scale 1/128, zero_point 0. A quantized network holds hard_swish and hard_sigmoid
as mul, add and clamp (the pass decompose_activations writes them so), for which there are integer kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

BATCH = -1
"""Stands for the batch size in dimension 0 of an activation's shape."""

FLOAT_KINDS = frozenset(
    {
        *("normalize", "gelu", "matmul", "div", "sum", "elu"),
        *("abs", "exp", "log", "sqrt", "rsqrt", "sin", "cos"),
    }
)
"""Kinds of operators that no integer kernel computes."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class QuantParams:
    """Affine quantization parameters: real = scale * (q - zero_point).

    Attributes:
        scale: float32, shape () for per_tensor or (channels,) for per_channel.
        zero_point: one integer; 0 for per_channel.
        axis: channel dimension of per_channel parameters, None for per_tensor.
        num_bits: of an activation: 8, or 16.

    Example:
        >>> q = QuantParams(np.float32(0.5), zero_point=-128)
        >>> q.dequantize(np.array([-128, -126], np.int8)).tolist()
        [0.0, 1.0]
    """

    scale: Array
    zero_point: int = 0
    axis: int | None = None
    num_bits: int = 8

    @property
    def low(self) -> int:
        """The lowest level."""
        return -(1 << (self.num_bits - 1))

    @property
    def high(self) -> int:
        """The highest level."""
        return (1 << (self.num_bits - 1)) - 1

    @property
    def dtype(self) -> type[np.signedinteger[Any]]:
        """The type of the levels."""
        return np.int8 if self.num_bits == 8 else np.int16

    def broadcast_scale(self, num_dims: int) -> Array:
        """Return the scale shaped to multiply a tensor of `num_dims` dimensions."""
        if self.axis is None:
            return np.asarray(self.scale, np.float32)
        shape = [1] * num_dims
        shape[self.axis] = -1
        return np.asarray(self.scale, np.float32).reshape(shape)

    def dequantize(self, q: Array) -> Array:
        """Return scale * (q - zero_point) in float32, with q's shape."""
        real: Array = (q.astype(np.int32) - self.zero_point).astype(np.float32) * self.broadcast_scale(q.ndim)
        return real

    def quantize(self, x: Array) -> Array:
        """Return clamp(round_half_even(x / scale) + zero_point, low, high) in `dtype`, with x's shape."""
        q = np.rint(x.astype(np.float32) / self.broadcast_scale(x.ndim)) + self.zero_point
        clamped: Array = np.clip(q, self.low, self.high).astype(self.dtype)
        return clamped


@dataclass(frozen=True)
class Tensor:
    """An activation (data is None) or a constant.

    Attributes:
        name: unique in the Program.
        shape: dimension 0 of an activation is BATCH.
        dtype: "float32", "int8" or "int16" (quantized) or "int32" (bias). A weight may be "float16": it is
            read as float32.
        quant: parameters of an integer tensor, None for float32.
        data: the constant's values in `dtype`, None for an activation.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    quant: QuantParams | None = None
    data: Array | None = None

    @property
    def is_constant(self) -> bool:
        """Whether the values are known now."""
        return self.data is not None


@dataclass(frozen=True)
class Op:
    """One operator: `kind` and `attributes` are described in the module docstring.

    Attributes:
        kind: "conv2d", "add", ...
        inputs: names of tensors, data inputs first.
        output: name of the tensor it makes.
        attributes: everything but tensors.
        layer: where in the network it comes from ("features.0 (aten.conv2d)"), for error messages.
    """

    kind: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    layer: str = ""


@dataclass(frozen=True)
class Program:
    """Operators in execution order over named tensors.

    Attributes:
        name: the network's name.
        inputs: tensor names, which are also the public names of the file's inputs.
        outputs: (public name, tensor name), in order.
        tensors: every tensor by name.
        ops: in execution order; each tensor is made by exactly one op, a constant or an input.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, str], ...]
    tensors: Mapping[str, Tensor]
    ops: tuple[Op, ...]

    @property
    def computes_in_float(self) -> bool:
        """Whether no activation is quantized; weights may be stored in float16 or int8 all the same."""
        return all(tensor.quant is None for tensor in self.tensors.values() if tensor.data is None)

    @property
    def activation_bits(self) -> int:
        """Bits of quantized activations, 8 where there are none."""
        found = [t.quant.num_bits for t in self.tensors.values() if t.quant is not None and t.data is None]
        return max(found, default=8)

    @property
    def is_dynamic(self) -> bool:
        """Whether a runtime quantizes activations itself, by scales that the file does not hold."""
        return any(op.attributes.get("dynamic") for op in self.ops)

    def consumers(self) -> dict[str, list[Op]]:
        """Return for each tensor name the ops that read it, in order."""
        found: dict[str, list[Op]] = {name: [] for name in self.tensors}
        for op in self.ops:
            for name in op.inputs:
                found[name].append(op)
        return found

    def constants(self) -> Iterator[Tensor]:
        """Yield the tensors whose values are known, in order of definition."""
        return (tensor for tensor in self.tensors.values() if tensor.data is not None)
