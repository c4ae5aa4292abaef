"""The NumPy reference: what a Program computes, op by op, in exact integers where it is quantized.

Both runtimes are held against it. An op with a quantized output follows the integer semantics of
`edgecnn.graph.program`:

    q_y = clamp(round_half_even(acc * multiplier) + zero_point_y, q_lo, q_hi)

and an op with a float output computes in float32 (its quantized constants are dequantized first).
The arithmetic of each op stands in `reference_conv`, `reference_elementwise`, `reference_spatial` and
`reference_float`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from edgecnn.errors import DataError, UnsupportedOpError
from edgecnn.graph.program import BATCH, Array, Op, Program, Tensor
from edgecnn.quantize import reference_conv, reference_elementwise, reference_float, reference_spatial
from edgecnn.quantize.reference_call import Call
from edgecnn.quantize.reference_dynamic import held_at_run_time

_KERNELS: Mapping[str, Callable[[Call], Array]] = MappingProxyType(
    {
        "conv2d": reference_conv.conv2d,
        "conv_transpose2d": reference_conv.conv_transpose2d,
        "linear": reference_conv.linear,
        "add": reference_elementwise.add,
        "sub": reference_elementwise.sub,
        "mul": reference_elementwise.mul,
        "clamp": reference_elementwise.clamp,
        "leaky_relu": reference_elementwise.leaky_relu,
        "sigmoid": reference_elementwise.sigmoid,
        "tanh": reference_elementwise.tanh,
        "hard_swish": reference_elementwise.hard_swish,
        "hard_sigmoid": reference_elementwise.hard_sigmoid,
        "softmax": reference_elementwise.softmax,
        "quantize": reference_elementwise.quantize,
        "dequantize": reference_elementwise.dequantize,
        "requantize": reference_elementwise.requantize,
        "max_pool2d": reference_spatial.max_pool2d,
        "avg_pool2d": reference_spatial.avg_pool2d,
        "mean": reference_spatial.mean,
        "amax": reference_spatial.amax,
        "concat": reference_spatial.concat,
        "slice": reference_spatial.slice_axis,
        "gather": reference_spatial.gather,
        "pad": reference_spatial.pad,
        "reshape": reference_spatial.reshape,
        "transpose": reference_spatial.transpose,
        "resize": reference_spatial.resize,
        "normalize": reference_float.normalize,
        "gelu": reference_float.gelu,
        "matmul": reference_float.matmul,
        "div": reference_float.div,
        "sum": reference_float.total,
        **dict.fromkeys(reference_float.FUNCTIONS, reference_float.function),
    }
)

OP_KINDS: frozenset[str] = frozenset(_KERNELS)
"""Every op kind the reference computes, which is every kind a Program may hold."""


def run_program(
    program: Program, feeds: Mapping[str, Array], keep: Collection[str] = (), *, saturates: bool = False
) -> dict[str, Array]:
    """Run a Program on a batch.

    Args:
        program: float or quantized.
        feeds: for each input name float32 (n, c, h, w); an input that is quantized takes int8 as well.
        keep: names of tensors to return beside the outputs.
        saturates: compute as ONNX Runtime does with uint8 activations on x86 without VNNI (`saturation`).

    Returns:
        Public output names and the names in `keep`, each with its array: float32, or int8 if the tensor
        is quantized.

    Raises:
        DataError: if feeds or `keep` do not fit the program.
        UnsupportedOpError: for an op kind that is unknown or mixes float and quantized tensors.

    Example:
        >>> from edgecnn.graph.program import Op, Tensor
        >>> x, y = Tensor("x", (BATCH, 2)), Tensor("y", (BATCH, 2))
        >>> relu = Op("clamp", ("x",), "y", {"clamp": (0.0, None)})
        >>> program = Program("relu", ("x",), (("out", "y"),), {"x": x, "y": y}, (relu,))
        >>> run_program(program, {"x": np.float32([[-1, 2]])})["out"].tolist()
        [[0.0, 2.0]]
    """
    unknown = sorted(set(keep) - set(program.tensors))
    if unknown:
        raise DataError(f"{program.name}: keep names {unknown[:3]}, expected names of the program's tensors")
    wanted = {tensor for _, tensor in program.outputs} | set(keep)
    kept = {name: array for name, array in _inputs(program, feeds).items() if name in wanted}
    for name in wanted:
        constant = program.tensors[name].data
        if constant is not None:
            kept[name] = constant
    for op, array in iterate_program(program, feeds, saturates=saturates):
        if op.output in wanted:
            kept[op.output] = array
    results = {name: kept[name] for name in keep}
    results.update({public: kept[tensor] for public, tensor in program.outputs})
    return results


def iterate_program(
    program: Program, feeds: Mapping[str, Array], *, saturates: bool = False
) -> Iterator[tuple[Op, Array]]:
    """Run a Program on a batch, yielding each op with its output as soon as it is known.

    An activation is freed after its last use, unless the caller keeps it.

    Args:
        program: float or quantized.
        feeds: as for `run_program`.
        saturates: as for `run_program`.

    Yields:
        Each op, in execution order, and its output: float32, or int8 if the tensor is quantized.

    Raises:
        DataError: if feeds do not fit the program.
        UnsupportedOpError: for an op kind that is unknown or mixes float and quantized tensors.
    """
    values = _inputs(program, feeds)
    last_use = {name: index for index, op in enumerate(program.ops) for name in op.inputs}
    for index, op in enumerate(program.ops):
        array = run_op(program, op, [values.get(name) for name in op.inputs], saturates=saturates)
        yield op, array
        if op.output in last_use:
            values[op.output] = array
        for name in op.inputs:
            if last_use[name] == index:
                values.pop(name, None)
        del array


def run_op(program: Program, op: Op, inputs: Sequence[Array | None], *, saturates: bool = False) -> Array:
    """Run one op on given values, for instance on those a runtime computed.

    Args:
        program: where the op's tensors are described.
        op: an op of `program`.
        inputs: one array for each of `op.inputs`, raw (int8 for a quantized tensor); None stands for the
            value of a constant.
        saturates: as for `run_program`.

    Returns:
        The op's output: float32, or int8 if the tensor is quantized.

    Raises:
        DataError: if an input is missing.
        UnsupportedOpError: for an op kind that is unknown or mixes float and quantized tensors.

    Example:
        >>> from edgecnn.graph.program import QuantParams
        >>> x = Tensor("x", (BATCH, 2))
        >>> q = Tensor("q", (BATCH, 2), "int8", QuantParams(np.float32(0.5), 1))
        >>> program = Program("p", ("x",), (("q", "q"),), {"x": x, "q": q}, (Op("quantize", ("x",), "q"),))
        >>> run_op(program, program.ops[0], [np.float32([[1.0, -2.0]])]).tolist()
        [[3, -3]]
    """
    where = op.layer or op.output
    kernel = _KERNELS.get(op.kind)
    if kernel is None:
        raise UnsupportedOpError(
            f"{where}: op kind is '{op.kind}', expected one of {', '.join(sorted(OP_KINDS))}"
        )
    if len(inputs) != len(op.inputs):
        raise DataError(f"{where} ({op.kind}): {len(inputs)} arrays given, expected {len(op.inputs)}")
    tensors = tuple(program.tensors[name] for name in op.inputs)
    arrays: list[Array] = []
    for tensor, given in zip(tensors, inputs, strict=True):
        array = tensor.data if given is None else given
        if array is None:
            raise DataError(f"{where} ({op.kind}): no value for input '{tensor.name}', which is no constant")
        arrays.append(array)
    output = program.tensors[op.output]
    if op.kind in ("quantize", "dequantize"):
        pass  # the two kinds that mix float and quantized tensors
    elif output.quant is None:
        arrays = [_as_float(op, tensor, array) for tensor, array in zip(tensors, arrays, strict=True)]
        if op.attributes.get("dynamic"):
            arrays[0] = held_at_run_time(arrays[0], op.attributes["dynamic"])
    else:
        _check_quantized(op, tensors)
    return kernel(Call(op, tensors, output, tuple(arrays), saturates))


def _as_float(op: Op, tensor: Tensor, array: Array) -> Array:
    """Return an input of a float op in float32: itself, or a quantized constant dequantized."""
    if tensor.quant is None:
        return array.astype(np.float32, copy=False)  # a weight may be stored in float16
    if tensor.data is None:
        raise UnsupportedOpError(
            f"{op.layer or op.output} ({op.kind}): input '{tensor.name}' is quantized and the output is "
            "float32, expected both quantized or both float32",
            hint="put a dequantize op between them",
        )
    return tensor.quant.dequantize(array)


def _check_quantized(op: Op, tensors: Sequence[Tensor]) -> None:
    """Refuse a float input of an integer op."""
    for tensor in tensors:
        if tensor.quant is None:
            raise UnsupportedOpError(
                f"{op.layer or op.output} ({op.kind}): input '{tensor.name}' is float32 and the output is "
                "quantized, expected both quantized or both float32",
                hint="put a quantize op between them",
            )


def _inputs(program: Program, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Return the checked inputs by name, each in its tensor's dtype."""
    if set(feeds) != set(program.inputs):
        raise DataError(f"{program.name}: feeds are {sorted(feeds)}, expected {sorted(program.inputs)}")
    values: dict[str, Array] = {}
    for name in program.inputs:
        tensor, array = program.tensors[name], np.asarray(feeds[name])
        expected = tuple(array.shape[:1]) if tensor.shape[:1] == (BATCH,) else tensor.shape[:1]
        if array.shape != (*expected, *tensor.shape[1:]):
            shown = ", ".join("n" if size == BATCH else str(size) for size in tensor.shape)
            raise DataError(f"{program.name}: input '{name}' has shape {array.shape}, expected ({shown})")
        if array.dtype != np.float32 and array.dtype != tensor.dtype:
            raise DataError(f"{program.name}: input '{name}' is {array.dtype}, expected {tensor.dtype}")
        if tensor.quant is not None and array.dtype == np.float32:
            array = tensor.quant.quantize(array)
        values[name] = array
    return values
