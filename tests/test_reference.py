"""The NumPy reference: numbers by hand, naive integer loops, integer ops against float ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import (
    SAMPLE_NAMES,
    feeds_for,
    float_sample,
    quantize_program,
    quantized_sample,
    quantized_samples,
)

from edgecnn.errors import UnsupportedOpError
from edgecnn.graph.program import FLOAT_KINDS, Array, Op, Program, QuantParams, Tensor
from edgecnn.quantize.reference import OP_KINDS, iterate_program, run_op, run_program
from edgecnn.quantize.reference_call import clamp_levels

Value = tuple[Array, QuantParams | None]


def per_tensor(scale: float, zero_point: int = 0) -> QuantParams:
    return QuantParams(np.asarray(scale, np.float32), zero_point)


def per_channel(*scales: float) -> QuantParams:
    return QuantParams(np.asarray(scales, np.float32), 0, 0)


def int8(values: Any) -> Array:
    return np.asarray(values, np.int8)


def compute(kind: str, *inputs: Value, out: QuantParams | None = None, **attributes: Any) -> Array:
    """Run one op on (raw array, its parameters) pairs."""
    tensors = {f"x{i}": Tensor(f"x{i}", x.shape, str(x.dtype), quant) for i, (x, quant) in enumerate(inputs)}
    op = Op(kind, tuple(tensors), "y", attributes, "layer")
    tensors["y"] = Tensor("y", (), "float32" if out is None else "int8", out)
    return run_op(Program("one", (), (), tensors, (op,)), op, [x for x, _ in inputs])


# ---------------------------------------------------------------- by hand


def test_conv2d_by_hand() -> None:
    x = int8([[[[1, 2], [3, 4]]]]), per_tensor(0.5, 1)
    w = int8([[[[1, -1], [2, 0]]], [[[0, 0], [0, 1]]]]), per_channel(0.25, 0.5)
    b = np.int32([3, 2]), per_channel(0.125, 0.25)
    # c 0: 0*1 + 1*-1 + 2*2 + 3*0 + 3 = 6, times 0.125 / 0.25 = 3;  c 1: 3 + 2 = 5, times 0.25 / 0.25 = 5
    y = compute("conv2d", x, w, b, out=per_tensor(0.25, -10))
    assert y.dtype == np.int8
    assert y.tolist() == [[[[-7]], [[-5]]]]


def test_conv2d_padding_is_real_zero() -> None:
    x = np.full((1, 1, 2, 2), 9, np.int8), per_tensor(1.0, 7)
    w = np.ones((1, 1, 3, 3), np.int8), per_channel(1.0)
    y = compute("conv2d", x, w, out=per_tensor(1.0, 0), padding=(1, 1, 1, 1))
    assert y.tolist() == [[[[8, 8], [8, 8]]]]  # four values of real 2 under every window


@pytest.mark.parametrize(("acc", "expected"), [(1, 0), (3, 2), (5, 2), (-1, 0), (-3, -2), (7, 4)])
def test_halves_round_to_even(acc: int, expected: int) -> None:
    y = compute(
        "linear", (int8([[acc]]), per_tensor(1.0)), (int8([[1]]), per_channel(0.5)), out=per_tensor(1.0)
    )
    assert y.tolist() == [[expected]]


def test_linear_by_hand() -> None:
    x = int8([[10, -20, 30]]), per_tensor(0.1, 0)
    w = int8([[1, 2, 3], [-1, 0, 1]]), per_channel(0.2, 0.4)
    b = np.int32([5, -4]), per_channel(0.02, 0.04)
    # c 0: 10 - 40 + 90 + 5 = 65 of 0.02 = 1.3;  c 1: -10 + 30 - 4 = 16 of 0.04 = 0.64;  levels of 0.05, + 4
    assert compute("linear", x, w, b, out=per_tensor(0.05, 4)).tolist() == [[30, 17]]


def test_add_sub_mul_by_hand() -> None:
    a, b = (int8([[4, -6]]), per_tensor(0.5, 2)), (int8([[10, 1]]), per_tensor(0.25, -2))
    # real: a = 1, -4; b = 3, 0.75
    out = per_tensor(0.25, 1)
    assert compute("add", a, b, out=out).tolist() == [[17, -12]]
    assert compute("sub", a, b, out=out).tolist() == [[-7, -18]]
    assert compute("mul", a, b, out=out).tolist() == [[13, -11]]
    assert compute("add", a, b, out=out, clamp=(0.0, 3.5)).tolist() == [[15, 1]]


def test_pools_and_mean_by_hand() -> None:
    quant = per_tensor(0.5, -3)
    x = int8([[[[-3, -2, 5], [-1, -3, 7], [0, 0, -128]]]]), quant
    window = {"kernel": (2, 2), "stride": (1, 1), "padding": (0, 0, 0, 0)}
    assert compute("max_pool2d", x, out=quant, **window).tolist() == [[[[-1, 7], [0, 7]]]]
    # sums of q + 3: 3, 19, 8, -112 over 4: 0.75, 4.75, 2, -28
    assert compute("avg_pool2d", x, out=quant, **window).tolist() == [[[[-2, 2], [-1, -31]]]]
    # all nine: 0+1+8+2+0+10+3+3-125 = -98, /9 * 0.5 / 0.25 = -21.8
    y = compute("mean", x, out=per_tensor(0.25, 100), axes=(2, 3), keepdim=False)
    assert y.tolist() == [[78]]


def test_avg_pool_counts_padding_only_when_asked() -> None:
    quant = per_tensor(1.0, -8)
    x = np.full((1, 1, 2, 2), 4, np.int8), quant  # real 12
    window = {"kernel": (2, 2), "stride": (2, 2), "padding": (1, 1, 1, 1)}
    included = compute("avg_pool2d", x, out=quant, count_include_pad=True, **window)
    excluded = compute("avg_pool2d", x, out=quant, count_include_pad=False, **window)
    assert included.ravel().tolist() == [-5] * 4  # 12 / 4 = 3
    assert excluded.ravel().tolist() == [4] * 4


def test_avg_pool_that_leaves_padding_out_averages_levels() -> None:
    # corners 2 x 2 of 3 levels and 0 outside: halves go away from level 0, whatever the zero point is
    quant = per_tensor(1.0, -128)
    x = int8([[[[1, 0, 0, -1], [0, 0, 0, -1], [3, 0, 0, 0], [3, 0, 0, 0]]]]), quant
    window = {"kernel": (3, 3), "stride": (3, 3), "padding": (1, 1, 1, 1), "count_include_pad": False}
    # 1 / 4, -2 / 4, 6 / 4, 0 / 4
    assert compute("avg_pool2d", x, out=quant, **window).tolist() == [[[[0, -1], [2, 0]]]]


def test_max_pool_padding_never_wins() -> None:
    quant = per_tensor(1.0, 0)
    x = np.full((1, 1, 2, 2), -128, np.int8), quant
    window = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1, 1, 1)}
    assert (compute("max_pool2d", x, out=quant, **window) == -128).all()


def test_requantize_by_hand() -> None:
    x = int8([[0, 1, 2, 3, 127, -128]]), per_tensor(0.5, 0)
    assert compute("requantize", x, out=per_tensor(1.0, 5)).tolist() == [[5, 5, 6, 7, 69, -59]]
    assert compute("requantize", x, out=per_tensor(0.25, 0)).tolist() == [[0, 2, 4, 6, 127, -128]]


def test_clamp_levels() -> None:
    quant = per_tensor(0.1, -20)
    assert clamp_levels(None, quant) == (-128, 127)
    assert clamp_levels((None, None), quant) == (-128, 127)
    assert clamp_levels((0.0, None), quant) == (-20, 127)
    assert clamp_levels((-100.0, 6.0), quant) == (-128, 40)


def test_clamp_between_unlike_parameters() -> None:
    x = int8([[-100, 0, 40, 100]]), per_tensor(0.1, 0)
    assert compute("clamp", x, out=per_tensor(0.1, 0), clamp=(0.0, 6.0)).tolist() == [[0, 0, 40, 60]]
    assert compute("clamp", x, out=per_tensor(0.05, -128), clamp=(0.0, 6.0)).tolist() == [
        [-128, -128, -48, -8]
    ]


def test_pad_and_concat_keep_levels() -> None:
    quant = per_tensor(0.5, 3)
    x = int8([[1, 2]]), quant
    assert compute("pad", x, out=quant, pads=((0, 0), (1, 2)), value=2.0).tolist() == [[7, 1, 2, 7, 7]]
    assert compute("concat", x, x, out=quant, axis=1).tolist() == [[1, 2, 1, 2]]


# ---------------------------------------------------------------- exactness


def naive_conv(x: Array, w: Array, b: Array, zero_point: int, attributes: dict[str, Any]) -> Array:
    """Convolve with Python integers: int64 (n, c_out, h_out, w_out)."""
    (s_h, s_w), (d_h, d_w), groups = attributes["stride"], attributes["dilation"], attributes["groups"]
    top, left, bottom, right = attributes["padding"]
    n, _, height, width = x.shape
    c_out, per_group, k_h, k_w = w.shape
    out_h = (height + top + bottom - d_h * (k_h - 1) - 1) // s_h + 1
    out_w = (width + left + right - d_w * (k_w - 1) - 1) // s_w + 1
    y = np.zeros((n, c_out, out_h, out_w), np.int64)
    for index in np.ndindex(*y.shape):
        image, channel, row, column = index
        first = channel // (c_out // groups) * per_group
        total = int(b[channel])
        for c, i, j in np.ndindex(per_group, k_h, k_w):
            r, q = row * s_h + i * d_h - top, column * s_w + j * d_w - left
            if 0 <= r < height and 0 <= q < width:
                total += (int(x[image, first + c, r, q]) - zero_point) * int(w[channel, c, i, j])
        y[index] = total
    return y


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Value, Value, Value, QuantParams, dict[str, Any]]:
    """Draw x, w, b, output parameters and attributes of a small quantized convolution."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    groups, per_group, multiple = (draw(st.integers(1, 3)) for _ in range(3))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    attributes: dict[str, Any] = {
        "stride": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "padding": draw(st.tuples(*[st.integers(0, 2)] * 4)),
        "dilation": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "groups": groups,
    }
    c_out = groups * multiple
    x = rng.integers(-128, 128, (2, groups * per_group, 6, 5)).astype(np.int8)
    w = rng.integers(-127, 128, (c_out, per_group, *kernel)).astype(np.int8)
    b = rng.integers(-(10**5), 10**5, c_out).astype(np.int32)
    quant_x = per_tensor(float(rng.uniform(0.001, 1)), draw(st.integers(-128, 127)))
    quant_w = per_channel(*rng.uniform(0.001, 1, c_out))
    quant_b = per_channel(*(quant_x.scale * quant_w.scale))
    quant_y = per_tensor(float(quant_x.scale * rng.uniform(20, 400)), draw(st.integers(-128, 127)))
    return (x, quant_x), (w, quant_w), (b, quant_b), quant_y, attributes


@settings(max_examples=40, deadline=None)
@given(convolutions())
def test_conv2d_equals_python_integers(case: Any) -> None:
    x, w, b, quant_y, attributes = case
    acc = naive_conv(x[0], w[0], b[0], x[1].zero_point, attributes)
    multiplier = (x[1].scale * w[1].scale / quant_y.scale).astype(np.float32)[:, None, None]
    expected = np.clip(np.rint(acc.astype(np.float32) * multiplier) + quant_y.zero_point, -128, 127)
    assert np.array_equal(compute("conv2d", x, w, b, out=quant_y, **attributes), expected)


@settings(max_examples=40, deadline=None)
@given(convolutions())
def test_grouped_conv2d_equals_concat_of_groups(case: Any) -> None:
    x, w, b, quant_y, attributes = case
    groups = attributes["groups"]
    whole = compute("conv2d", x, w, b, out=quant_y, **attributes)
    parts = []
    for x_g, w_g, b_g, scale in zip(
        np.split(x[0], groups, 1),
        np.split(w[0], groups),
        np.split(b[0], groups),
        np.split(w[1].scale, groups),
        strict=True,
    ):
        quant_w = per_channel(*scale)
        group = (x_g, x[1]), (w_g, quant_w), (b_g, quant_w)
        parts.append(compute("conv2d", *group, out=quant_y, **{**attributes, "groups": 1}))
    assert np.array_equal(whole, np.concatenate(parts, axis=1))


@pytest.mark.parametrize("zero_point", [-128, 127])
def test_sums_beyond_float32_stay_exact(zero_point: int) -> None:
    """A sum of 512 * 9 products near 127 * 255 is far above 2^24; one unit must still show."""
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (1, 512, 3, 3)).astype(np.int8)
    x[:, ::2] = -zero_point - 1
    w = rng.integers(100, 128, (4, 512, 3, 3)).astype(np.int8)
    acc = np.einsum("nchw,ochw->no", x.astype(np.int64) - zero_point, w.astype(np.int64))
    assert np.abs(acc).max() > 1 << 24
    b = (np.array([-1, 1, 5, 100]) - acc[0]).astype(np.int32)
    one, ones = per_tensor(1.0), per_channel(1, 1, 1, 1)
    y = compute("conv2d", (x, per_tensor(1.0, zero_point)), (w, ones), (b, ones), out=one)
    assert y.ravel().tolist() == [-1, 1, 5, 100]
    flat = (x.reshape(1, -1), per_tensor(1.0, zero_point)), (w.reshape(4, -1), ones), (b, ones)
    assert compute("linear", *flat, out=one).ravel().tolist() == [-1, 1, 5, 100]


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-4, 10), st.floats(1e-4, 10), st.integers(-128, 127), st.integers(-128, 127))
def test_requantize_is_monotone_and_near(s_x: float, s_y: float, z_x: int, z_y: int) -> None:
    q = np.arange(-128, 128, dtype=np.int8)
    quant_x, quant_y = per_tensor(s_x, z_x), per_tensor(s_y, z_y)
    y = compute("requantize", (q, quant_x), out=quant_y)
    assert (np.diff(y.astype(int)) >= 0).all()
    x = quant_x.dequantize(q)
    inside = (y > -128) & (y < 127)
    assert (np.abs(quant_y.dequantize(y) - x)[inside] <= 0.5 * quant_y.scale * (1 + 1e-4)).all()
    assert np.array_equal(compute("requantize", (q, quant_x), out=quant_x), q)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["add", "mul"]))
def test_add_and_mul_commute(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    a, b = (
        (rng.integers(-128, 128, (2, 3, 4, 4)).astype(np.int8), per_tensor(rng.uniform(0.01, 1), z))
        for z in rng.integers(-128, 128, 2).tolist()
    )
    out = per_tensor(rng.uniform(0.01, 1), int(rng.integers(-128, 128)))
    assert np.array_equal(compute(kind, a, b, out=out), compute(kind, b, a, out=out))


# ---------------------------------------------------------------- integer against float, op by op


def float_result(program: Program, op: Op, inputs: list[Array]) -> Array:
    """Compute a quantized op in float32 on its dequantized inputs."""
    tensors = {name: program.tensors[name] for name in op.inputs}
    arrays = [t.quant.dequantize(x) for t, x in zip(tensors.values(), inputs, strict=True) if t.quant]
    plain = {name: Tensor(name, t.shape) for name, t in tensors.items()}
    plain[op.output] = Tensor(op.output, ())
    return run_op(Program("float", (), (), plain, ()), op, list(arrays))


@pytest.mark.parametrize("name", SAMPLE_NAMES)
def test_integer_ops_are_within_half_a_level_of_float(name: str) -> None:
    program = quantized_sample(name)
    values = feeds_for(program, batch=3, seed=1)
    values.update({tensor.name: tensor.data for tensor in program.constants() if tensor.data is not None})
    for op, y in iterate_program(program, feeds_for(program, batch=3, seed=1)):
        values[op.output] = y
        quant = program.tensors[op.output].quant
        if op.kind in ("quantize", "dequantize", "requantize") or quant is None:
            continue
        expected = float_result(program, op, [values[x] for x in op.inputs])
        assert y.shape == expected.shape
        low, high = quant.dequantize(int8([-128, 127]))
        error = np.abs(quant.dequantize(y) - np.clip(expected, low, high)) / quant.scale
        # a clamp bound between two levels costs up to another half
        allowed = 0.5 if op.attributes.get("clamp", (None, None))[1] is None else 1.0
        assert error.max() <= allowed + 2e-3, op


def test_samples_cover_every_op_kind() -> None:
    kinds = {op.kind for program in quantized_samples().values() for op in program.ops}
    assert kinds | {"hard_swish", "hard_sigmoid"} | FLOAT_KINDS == OP_KINDS


@pytest.mark.parametrize("name", SAMPLE_NAMES)
def test_quantized_sample_follows_float_sample(name: str) -> None:
    program = float_sample(name)
    feeds = feeds_for(program, batch=128)
    expected = run_program(program, feeds)["output"]
    found = run_program(quantize_program(program), feeds)["output"]
    assert found.dtype == np.float32
    noise = np.square(found - expected).sum() / np.square(expected).sum()
    assert -10 * np.log10(noise) > 28, "SQNR in dB"


# ---------------------------------------------------------------- bad ops


def test_ops_that_mix_float_and_quantized_tensors() -> None:
    x = np.zeros((1, 2), np.float32)
    q = np.zeros((1, 2), np.int8), per_tensor(1.0)
    with pytest.raises(UnsupportedOpError, match="layer: op kind is 'erf', expected one of abs, add, amax"):
        compute("erf", (x, None))
    with pytest.raises(
        UnsupportedOpError, match=r"layer \(sigmoid\): input 'x0' is float32 and the output is"
    ):
        compute("sigmoid", (x, None), out=per_tensor(1.0))
    with pytest.raises(
        UnsupportedOpError, match=r"layer \(add\): input 'x1' is quantized and the output is f"
    ):
        compute("add", (x, None), q)
    with pytest.raises(UnsupportedOpError, match="tensor 'x0' is float32, expected a quantized tensor"):
        compute("dequantize", (x, None))
