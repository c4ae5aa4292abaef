"""Pooling, reductions over dimensions, and resizing as TFLite operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgecnn.export.tflite_convolution import PADDING_CODES, bias_dtype, pad_nhwc
from edgecnn.export.tflite_layout import Order
from edgecnn.export.tflite_lowering import Lowering, reduced_order
from edgecnn.export.tflite_padding import WindowPadding, choose_padding, counted_padding
from edgecnn.graph.interpolation import has_exact_weights
from edgecnn.graph.program import Op, Program, QuantParams

MOST_DIMS = 6
"""XNNPACK's tensors have no more dimensions, and a file whose SUM has more does not load."""

_NHWC: Order = (0, 2, 3, 1)


def max_pool2d(lowering: Lowering, op: Op) -> None:
    """Write a MAX_POOL_2D; padding that SAME cannot give is filled with a value that never wins first."""
    if tuple(op.attributes.get("dilation", (1, 1))) != (1, 1):
        raise lowering.unsupported(op, f"dilation is {op.attributes['dilation']}, expected (1, 1)")
    padding = _pool_padding(lowering, op)
    index = lowering.read(op.inputs[0], _NHWC)
    if any(padding.explicit) and is_lowest_zero(lowering.program, op.inputs[0]):
        index = pad_nhwc(lowering, index, padding.explicit)
    elif any(padding.explicit):
        index = pad_nhwc(lowering, index, padding.explicit, fill=_lowest(lowering, op.inputs[0]))
    lowering.write(op.output, _NHWC, "MAX_POOL_2D", (index,), _pool_options(op, padding))


def is_lowest_zero(program: Program, name: str) -> bool:
    """Whether no value of the tensor is below real 0, so that padding with 0 never wins a maximum.

    PAD, which pads with 0, stays in XNNPACK and is fused there; PADV2, which pads with anything, does not.

    Example:
        >>> from edgecnn.graph.program import BATCH, Tensor
        >>> tensors = {name: Tensor(name, (BATCH, 3)) for name in ("x", "y")}
        >>> relu = Op("clamp", ("x",), "y", {"clamp": (0.0, None)})
        >>> program = Program("p", ("x",), (("y", "y"),), tensors, (relu,))
        >>> is_lowest_zero(program, "y"), is_lowest_zero(program, "x")
        (True, False)
    """
    quant = program.tensors[name].quant
    if quant is not None and quant.zero_point == quant.low:
        return True
    return _is_non_negative({op.output: op for op in program.ops}, name)


_KEEPS_SIGN = frozenset(
    {
        "max_pool2d",
        "avg_pool2d",
        "mean",
        "amax",
        "slice",
        "gather",
        "reshape",
        "transpose",
        "resize",
        "concat",
    }
)


def _is_non_negative(producers: Mapping[str, Op], name: str) -> bool:
    op = producers.get(name)
    if op is None:
        return False
    if op.kind in _KEEPS_SIGN:
        return all(_is_non_negative(producers, source) for source in op.inputs)
    low = (op.attributes.get("clamp") or (None, None))[0]
    return op.kind in ("sigmoid", "hard_sigmoid", "softmax") or (low is not None and low >= 0)


def _lowest(lowering: Lowering, name: str) -> int:
    quant = lowering.tensor(name).quant
    if quant is None:
        return lowering.constant("fill/lowest", np.full(1, np.finfo(np.float32).min, np.float32))
    return lowering.constant("fill/lowest", np.full(1, quant.low, quant.dtype), quant)


def avg_pool2d(lowering: Lowering, op: Op) -> None:
    """Write an AVERAGE_POOL_2D, in int8 a DEPTHWISE_CONV_2D of ones with scale 1 / (k_h * k_w).

    XNNPACK has no int8 AVERAGE_POOL_2D, and TFLite's own rounds the mean of the levels, not of the numbers;
    the convolution is 7 times faster and exact. Only AVERAGE_POOL_2D can leave the padding of SAME uncounted.
    """
    x, padding = lowering.tensor(op.inputs[0]), _pool_padding(lowering, op)
    is_padded = any(padding.explicit) or padding.scheme == "SAME"
    if is_padded and not op.attributes.get("count_include_pad", True):
        if any(padding.explicit):
            given = tuple(op.attributes["padding"])
            raise lowering.unsupported(op, f"padding is {given}, not counted, expected what SAME pads")
    elif x.quant is not None:
        _depthwise_average(lowering, op, padding, x.quant)
        return
    elif is_padded:
        kernel, stride = op.attributes["kernel"], op.attributes["stride"]
        counted = counted_padding((x.shape[2], x.shape[3]), kernel, stride, op.attributes["padding"])
        padding = WindowPadding("VALID", counted)
    index = pad_nhwc(lowering, lowering.read(x.name, _NHWC), padding.explicit)
    lowering.write(op.output, _NHWC, "AVERAGE_POOL_2D", (index,), _pool_options(op, padding))


def _depthwise_average(lowering: Lowering, op: Op, padding: WindowPadding, quant: QuantParams) -> None:
    name, c = op.inputs[0], lowering.tensor(op.inputs[0]).shape[1]
    (height, width), stride = op.attributes["kernel"], op.attributes["stride"]
    scale = np.asarray(1 / (height * width), np.float32)
    ones = np.ones((1, height, width, c), np.int8)
    bias_quant = QuantParams(np.asarray(quant.scale * scale, np.float32))
    inputs = (
        pad_nhwc(lowering, lowering.read(name, _NHWC), padding.explicit),
        lowering.constant(f"ones/{height}x{width}x{c}", ones, QuantParams(scale)),
        lowering.constant(f"{op.output}/zero_bias", np.zeros(c, bias_dtype(quant)), bias_quant),
    )
    options = {
        "padding": PADDING_CODES[padding.scheme],
        "strideH": stride[0],
        "strideW": stride[1],
        "depthMultiplier": 1,
    }
    lowering.write(op.output, _NHWC, "DEPTHWISE_CONV_2D", inputs, options)


def _pool_padding(lowering: Lowering, op: Op) -> WindowPadding:
    shape = lowering.tensor(op.inputs[0]).shape
    attributes = op.attributes
    kernel, stride = tuple(attributes["kernel"]), tuple(attributes["stride"])
    padding = tuple(attributes.get("padding", (0, 0, 0, 0)))
    return choose_padding((shape[2], shape[3]), kernel, stride, padding)


def _pool_options(op: Op, padding: WindowPadding) -> dict[str, int]:
    kernel, stride = op.attributes["kernel"], op.attributes["stride"]
    return {
        "padding": PADDING_CODES[padding.scheme],
        "strideH": stride[0],
        "strideW": stride[1],
        "filterHeight": kernel[0],
        "filterWidth": kernel[1],
    }


def mean(lowering: Lowering, op: Op) -> None:
    """Write a MEAN."""
    reduce_axes(lowering, op, "MEAN")


def amax(lowering: Lowering, op: Op) -> None:
    """Write a REDUCE_MAX."""
    reduce_axes(lowering, op, "REDUCE_MAX")


def reduce_axes(lowering: Lowering, op: Op, operator: str) -> None:
    """Write a reduction over the op's axes, wherever they are stored."""
    x = lowering.tensor(op.inputs[0])
    axes = _axes(lowering, op, len(x.shape))
    keepdim = bool(op.attributes.get("keepdim", False))
    index, order = lowering.read(x.name), lowering.order(x.name)
    stored_axes = sorted(order.index(axis) for axis in axes)
    new_order = order if keepdim else reduced_order(x.shape, order, axes)
    if len(order) > MOST_DIMS:
        output = _reduce_merged(lowering, op, operator, index, frozenset(stored_axes))
        lowering.place(
            op.output, lowering.write_reshape(output, lowering.new_tensor(op.output, new_order)), new_order
        )
        return
    lowering.write(
        op.output, new_order, operator, (index, _stored(lowering, stored_axes)), {"keepDims": keepdim}
    )


def _stored(lowering: Lowering, axes: Sequence[int]) -> int:
    return lowering.integers("axes/" + "_".join(map(str, axes)), axes)


def _reduce_merged(lowering: Lowering, op: Op, operator: str, index: int, axes: frozenset[int]) -> int:
    """Write a reduction with neighbours that are reduced, or kept, as one dimension; return its output.

    Args:
        lowering: where it is written.
        op: the reduction.
        operator: its name in TFLite.
        index: file tensor that is read.
        axes: of its stored dimensions.
    """
    sizes, reduced = merged_dims(lowering.graph.tensors[index].shape, axes)
    if len(sizes) > MOST_DIMS:
        raise lowering.unsupported(op, f"XNNPACK takes at most {MOST_DIMS} dimensions, found {len(sizes)}")
    kept = [size for dim, size in enumerate(sizes) if dim not in reduced]
    y = lowering.tensor(op.output)
    output = lowering.graph.add_tensor(f"{op.output}/merged", kept, y.dtype, y.quant)
    inputs = (lowering.reshape(index, sizes, "/merged"), _stored(lowering, reduced))
    return lowering.graph.add_operator(operator, inputs, output, {"keepDims": False})


def merged_dims(shape: Sequence[int], axes: frozenset[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sizes of neighbouring dimensions that are all in `axes`, or all not, and which are in it.

    The batch stays by itself; a kept size of 1 goes with its neighbour.

    Example: swin_v2's windows.
        >>> merged_dims((-1, 8, 8, 7, 7, 3, 32), frozenset({3, 4}))
        ((-1, 64, 49, 96), (2,))
    """
    sizes, kinds = [shape[0]], [False]
    for dim, size in enumerate(shape[1:], 1):
        is_reduced = dim in axes
        if len(sizes) > 1 and (kinds[-1] == is_reduced or (size == 1 and not is_reduced)):
            sizes[-1] *= size
        else:
            sizes.append(size)
            kinds.append(is_reduced)
    return tuple(sizes), tuple(dim for dim, kind in enumerate(kinds) if kind)


def _axes(lowering: Lowering, op: Op, num_dims: int) -> Sequence[int]:
    axes = sorted(axis % num_dims for axis in op.attributes["axes"])
    if not axes or axes[0] == 0:
        raise lowering.unsupported(op, f"axes are {tuple(axes)}, expected some, without the batch")
    return axes


def resize(lowering: Lowering, op: Op) -> None:
    """Write a RESIZE_BILINEAR or RESIZE_NEAREST_NEIGHBOR."""
    _check_wide_resize(lowering, op)
    index = lowering.read(op.inputs[0], _NHWC)
    height, width = op.attributes["size"]
    size = lowering.integers(f"size/{height}x{width}", [height, width])
    mode = op.attributes.get("mode", "nearest")
    if mode == "nearest":
        lowering.write(op.output, _NHWC, "RESIZE_NEAREST_NEIGHBOR", (index, size))
    elif mode == "bilinear":
        aligned = bool(op.attributes.get("align_corners", False))
        options = {"alignCorners": aligned, "halfPixelCenters": not aligned}
        lowering.write(op.output, _NHWC, "RESIZE_BILINEAR", (index, size), options)
    else:
        raise lowering.unsupported(op, f"mode is '{mode}', expected 'nearest' or 'bilinear'")


def _check_wide_resize(lowering: Lowering, op: Op) -> None:
    """Refuse what TFLite's 16-bit bilinear kernel, of weights with 10 bits, interpolates elsewhere."""
    x, aligned = lowering.tensor(op.inputs[0]), bool(op.attributes.get("align_corners", False))
    if x.quant is None or x.quant.num_bits == 8 or op.attributes.get("mode") != "bilinear":
        return
    sizes = list(zip(x.shape[2:], op.attributes["size"], strict=True))
    if not all(has_exact_weights(size_in, size_out, aligned) for size_in, size_out in sizes):
        hint = "take the ONNX file alone with --format onnx, or the recipe static_wi8_ai8"
        what = f"from {x.shape[2:]} to {tuple(op.attributes['size'])}"
        raise lowering.unsupported(op, f"TFLite's 16-bit kernel has no exact weights {what}", hint=hint)
