"""Layout, padding and transposed convolution of the TFLite writer, by rule and in the real runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from programs import ProgramBuilder, float_sample, quantize_program
from tflite_session import Make, TfliteSession, difference, make, structure
from torch.nn import functional

from edgecnn.export.tflite import to_tflite
from edgecnn.export.tflite_layout import plan_reshape, stored_shape
from edgecnn.export.tflite_padding import choose_padding
from edgecnn.graph.program import BATCH, Array


def dense_block(b: ProgramBuilder, x: str) -> str:
    features = [b.op("max_pool2d", x, kernel=(1, 2), stride=(1, 1), padding=(0, 0, 0, 1), dilation=(1, 1))]
    for height in (2, 3, 3, 2, 3, 2, 2):
        joined = b.op("concat", *features, axis=1) if len(features) > 1 else features[0]
        part = b.op("slice", joined, axis=1, start=0, stop=2, step=1)
        pads = ((height - 1) // 2, 0, height // 2, 0)
        pool = {"kernel": (height, 1), "stride": (1, 1), "padding": pads, "dilation": (1, 1)}
        features.append(b.op("max_pool2d", part, **pool))
    return b.op("concat", *features, axis=1)


def pixel_shuffle(b: ProgramBuilder, x: str) -> str:
    split = b.op("reshape", x, shape=(BATCH, 1, 2, 2, 9, 7))
    moved = b.op("transpose", split, perm=(0, 1, 4, 2, 5, 3))
    return b.op("reshape", moved, shape=(BATCH, 1, 18, 14))


def relu_then_pool(b: ProgramBuilder, x: str) -> str:
    y = b.conv2d(x, 4, 1, clamp=(0.0, None))
    y = b.op("concat", y, b.op("sigmoid", y), axis=1)
    return b.op("max_pool2d", y, kernel=(3, 3), stride=(2, 2), padding=(1, 1, 0, 0), dilation=(1, 1))


EXTRA: dict[str, tuple[Make, list[str]]] = {
    "dense_block": (dense_block, []),
    "pixel_shuffle": (pixel_shuffle, ["RESHAPE", "TRANSPOSE", "RESHAPE"]),
    "linear_nhwc": (lambda b, x: b.linear(b.op("transpose", x, perm=(0, 2, 3, 1)), 5), ["FULLY_CONNECTED"]),
    "linear_tokens": (
        lambda b, x: b.linear(b.op("transpose", b.op("reshape", x, shape=(BATCH, 4, 63)), perm=(0, 2, 1)), 5),
        ["RESHAPE", "FULLY_CONNECTED"],
    ),
    "two_outputs": (lambda b, x: (b.conv2d(x, 6, 3), b.op("mean", x, axes=(2, 3), keepdim=False)), []),
    "one_output_twice": (lambda b, x: [y := b.conv2d(x, 6, 3)] and (y, y), []),
    "output_is_a_transpose": (lambda b, x: b.op("transpose", x, perm=(0, 1, 3, 2)), []),
    "flatten_then_add": (
        lambda b, x: b.op(
            "add",
            b.op("reshape", x, shape=(BATCH, 252)),
            b.op("reshape", b.conv2d(x, 4, 1), shape=(BATCH, 252)),
            clamp=(None, None),
        ),
        ["CONV_2D", "TRANSPOSE", "RESHAPE", "TRANSPOSE", "RESHAPE", "ADD"],
    ),
    "flatten_of_1x1": (
        lambda b, x: b.linear(
            b.op("reshape", b.op("mean", x, axes=(2, 3), keepdim=True), shape=(BATCH, 4)), 3
        ),
        ["MEAN", "RESHAPE", "FULLY_CONNECTED"],
    ),
    "reshape_without_common_factors": (lambda b, x: b.op("reshape", x, shape=(BATCH, 6, 42)), []),
    "mean_of_one_axis": (lambda b, x: b.op("mean", x, axes=(3,), keepdim=False), []),
    "softmax_of_height": (lambda b, x: b.op("softmax", x, axis=2), []),
    "strided_pointwise_with_padding": (lambda b, x: b.conv2d(x, 8, 1, (2, 2), (1, 1, 1, 1)), []),
    "relu_then_padded_pool": (relu_then_pool, ["CONV_2D", "LOGISTIC", "CONCATENATION", "PAD", "MAX_POOL_2D"]),
    "conv_transpose_depthwise": (
        lambda b, x: b.conv_transpose2d(x, 4, 4, (2, 2), (1, 1, 1, 1), groups=4),
        ["PAD", "DEPTHWISE_CONV_2D", "RESHAPE", "TRANSPOSE", "RESHAPE"],
    ),
    "conv_transpose_unequal_strides": (lambda b, x: b.conv_transpose2d(x, 6, 3, (2, 1), (1, 1, 1, 1)), []),
    "conv_transpose_clamped": (
        lambda b, x: b.conv_transpose2d(x, 6, 3, (3, 3), (1, 0, 1, 0), clamp=(-0.2, 0.3)),
        [],
    ),
    "conv_transpose_stride_above_kernel": (lambda b, x: b.conv_transpose2d(x, 3, 2, (3, 3)), []),
}


@pytest.mark.parametrize("name", EXTRA)
def test_nets_that_need_care_with_layout(name: str) -> None:
    build, operators = EXTRA[name]
    program = make(build)
    file = to_tflite(program)
    assert difference(program, file, 3) < 1e-4
    if operators:
        assert TfliteSession(file).operators() == operators
    quantized = quantize_program(program)
    assert difference(quantized, to_tflite(quantized), 3) < 1e-3


def test_dense_block_joins_each_tensor_once_and_stays_in_one_partition() -> None:
    assert TfliteSession(to_tflite(quantize_program(make(dense_block)))).num_delegates() == 1
    file = to_tflite(make(dense_block))
    operators = structure(file)["operators"]
    assert [len(op["inputs"]) for op in operators if op["operator"] == "CONCATENATION v1"] == [2] * 7


@pytest.mark.parametrize(
    ("count", "joins"), [(1, []), (5, [5]), (6, [5, 2]), (12, [5, 5, 2, 3]), (26, [5] * 6 + [2])]
)
def test_int8_joins_of_many_tensors_take_five_at_a_time(count: int, joins: list[int]) -> None:
    def build(b: ProgramBuilder, x: str) -> str:
        parts = [b.op("slice", x, axis=1, start=i % 4, stop=i % 4 + 1, step=1) for i in range(count)]
        return b.op("concat", *parts, axis=1)

    program = quantize_program(make(build))
    file = to_tflite(program)
    assert TfliteSession(file).num_delegates() == 1
    assert difference(program, file, 2) < 1e-3
    found = [len(op["inputs"]) for op in structure(file)["operators"] if op["operator"].startswith("CONCAT")]
    assert found == joins


def shuffled(groups: int, channels: int) -> Make:
    """Return a shuffle of (groups, channels), then a convolution."""

    def build(b: ProgramBuilder, x: str) -> str:
        split = b.op("reshape", b.conv2d(x, groups * channels, 1), shape=(BATCH, groups, channels, 9, 7))
        swapped = b.op("transpose", split, perm=(0, 2, 1, 3, 4))
        return b.conv2d(b.op("reshape", swapped, shape=(BATCH, groups * channels, 9, 7)), 4, 1)

    return build


MOVED_ONCE = ["RESHAPE", "TRANSPOSE", "RESHAPE"]
MOVED_TWICE = ["RESHAPE", "TRANSPOSE", "RESHAPE", "TRANSPOSE", "RESHAPE"]


@pytest.mark.parametrize(
    ("groups", "channels", "moves"),
    [
        (2, 3, MOVED_TWICE),
        (4, 5, MOVED_TWICE),
        (3, 2, MOVED_ONCE),
        (2, 2, MOVED_ONCE),
        (5, 6, MOVED_ONCE),
    ],
)
def test_a_shuffle_of_few_groups_moves_rows_of_pixels(groups: int, channels: int, moves: list[str]) -> None:
    program = make(shuffled(groups, channels))
    file = to_tflite(program)
    assert TfliteSession(file).operators() == ["CONV_2D", *moves, "CONV_2D"]
    assert TfliteSession(file).num_delegates() == 1
    assert difference(program, file, 2) < 1e-5


def test_a_shuffle_in_int8_computes_the_same_integers() -> None:
    program = quantize_program(make(shuffled(5, 6)))
    file = to_tflite(program)
    assert TfliteSession(file).operators().count("TRANSPOSE") == 2
    assert difference(program, file, 2) == 0.0


def test_an_average_that_leaves_padding_out_is_the_same_integers() -> None:
    window = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1, 1, 1), "count_include_pad": False}
    for clamp in ((0.0, None), (None, None)):
        program = quantize_program(
            make(lambda b, x, c=clamp: b.op("avg_pool2d", b.conv2d(x, 16, 1, clamp=c), **window))
        )
        file = to_tflite(program)
        assert "AVERAGE_POOL_2D" in TfliteSession(file).operators()
        assert difference(program, file, 8) == 0.0


def test_flatten_before_linear_goes_into_the_weight() -> None:
    session = TfliteSession(to_tflite(float_sample("linear")))
    assert session.operators() == ["RESHAPE", "FULLY_CONNECTED", "FULLY_CONNECTED"]


def tflite_window_padding(scheme: str, size: int, reach: int, stride: int) -> tuple[int, int]:
    """What TFLite's kernels pad, as its padding.h computes it."""
    if scheme == "VALID":
        return 0, 0
    total = max((-(-size // stride) - 1) * stride + reach - size, 0)
    return total // 2, total - total // 2


pairs = st.tuples(st.integers(1, 12), st.integers(1, 12))


@settings(max_examples=300, deadline=None)
@given(
    size=pairs,
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 4)] * 4),
)
def test_padding_gives_the_windows_of_torch(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int, int, int],
) -> None:
    reach = [(kernel[dim] - 1) * dilation[dim] + 1 for dim in (0, 1)]
    assume(all(size[dim] + padding[dim] + padding[dim + 2] >= reach[dim] for dim in (0, 1)))
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((1, 1, *size)))
    w = torch.from_numpy(rng.standard_normal((1, 1, *kernel)))
    top, left, bottom, right = padding
    expected = functional.conv2d(
        functional.pad(x, (left, right, top, bottom)), w, stride=stride, dilation=dilation
    )

    chosen = choose_padding(size, kernel, stride, padding, dilation)
    top, left, bottom, right = chosen.explicit
    x = functional.pad(x, (left, right, top, bottom))
    rows, columns = (
        tflite_window_padding(chosen.scheme, x.shape[dim + 2], reach[dim], stride[dim]) for dim in (0, 1)
    )
    found = functional.conv2d(functional.pad(x, (*columns, *rows)), w, stride=stride, dilation=dilation)
    assert torch.equal(found, expected)
    assert chosen.scheme == "VALID" or chosen.explicit == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "scheme"),
    [
        (32, 1, (1, 1, 1, 1), "SAME"),
        (33, 2, (1, 1, 1, 1), "SAME"),
        (32, 2, (0, 0, 1, 1), "SAME"),
        (32, 2, (0, 0, 0, 0), "VALID"),
        (33, 2, (0, 0, 1, 1), "VALID"),
    ],
)
def test_same_and_valid_need_no_pad(
    size: int, stride: int, padding: tuple[int, int, int, int], scheme: str
) -> None:
    chosen = choose_padding((size, size), (3, 3), (stride, stride), padding)
    assert (chosen.scheme, chosen.explicit) == (scheme, (0, 0, 0, 0))


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A shape, an order to store it in, and a shape with as many elements."""
    factors = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))

    def joined() -> tuple[int, ...]:
        sizes = [1]
        for factor in factors:
            if draw(st.booleans()):
                sizes.append(factor)
            else:
                sizes[-1] *= factor
        return (BATCH, *sizes)

    shape, new_shape = joined(), joined()
    if draw(st.booleans()):
        new_shape = (BATCH, *draw(st.permutations(new_shape[1:])))
    return shape, (0, *draw(st.permutations(range(1, len(shape))))), new_shape


@settings(max_examples=300, deadline=None)
@given(reshapes())
def test_planned_reshapes_move_every_element_where_torch_does(
    case: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
) -> None:
    shape, order, new_shape = case
    plan = plan_reshape(shape, order, new_shape)
    if plan is None:
        return
    x: Array = np.arange(2 * abs(int(np.prod(shape)))).reshape(2, *shape[1:])
    memory = x.transpose(order).reshape(2, *plan.factors[1:])
    if plan.perm is not None:
        memory = memory.transpose(plan.perm)
    found = memory.reshape(2, *stored_shape(new_shape, plan.order)[1:])
    assert np.array_equal(found, x.reshape(2, *new_shape[1:]).transpose(plan.order))


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.integers(1, 5),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    groups=st.sampled_from([1, 2, 4]),
)
def test_transposed_convolutions_are_exact_in_int8(
    kernel: int, stride: tuple[int, int], padding: tuple[int, int, int, int], groups: int
) -> None:
    smallest = [(size - 1) * step + kernel for size, step in zip((4, 3), stride, strict=True)]
    assume(all(smallest[dim] > padding[dim] + padding[dim + 2] for dim in (0, 1)))

    def build(b: ProgramBuilder, x: str) -> str:
        return b.conv_transpose2d(x, 4, kernel, stride, padding, groups=groups)

    program = make(build, (4, 4, 3))
    assert difference(program, to_tflite(program), 2) < 1e-4
    quantized = quantize_program(program)
    assert difference(quantized, to_tflite(quantized), 2) < 1e-3
