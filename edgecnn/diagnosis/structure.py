"""What a network is made of that int8 runtimes find hard: activations, gates, BatchNorms, missing kernels.

Which operators ONNX Runtime computes in float between DequantizeLinear and QuantizeLinear was read off the
graphs that version 1.31 optimized, and which ones LiteRT's XNNPACK delegate leaves out off the partitions of
version 2.3, with one small network per operator.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

from edgecnn.diagnosis.finding import Finding, unique
from edgecnn.graph.build_ops import unsupported_nodes
from edgecnn.graph.nodes import argument, aten, layer_name
from edgecnn.graph.program import Op, Program
from edgecnn.model import Model
from edgecnn.quantize.islands import island_names, plan_islands, unknown_operators

SWISHES = {
    "aten.silu.default": "SiLU",
    "aten.hardswish.default": "hard-swish",
    "aten.gelu.default": "GELU",
    "aten.mish.default": "Mish",
}
REWRITTEN = frozenset({"SiLU", "hard-swish"})

_BEHIND_A_LAYER = frozenset(
    {aten.conv2d.default, aten.conv2d.padding, aten.conv_transpose2d.input, aten.linear.default}
)


def find_swishes(nodes: list[fx.Node]) -> list[Finding]:
    """Name the activations that are no single int8 operator."""
    found = []
    for target, name in SWISHES.items():
        layers = [layer_name(node) for node in nodes if str(node.target) == target]
        if not layers:
            continue
        why = "as one int8 operator it is missing or slow: ONNX Runtime and LiteRT leave int8 for it"
        if name in REWRITTEN:
            action = "nothing to do: edgecnn writes it in integer operators (the pass decompose_activations)"
            found.append(Finding("swish", "note", f"{name} activations", unique(layers), why, action))
        else:
            action = (
                "edgecnn leaves it in float; a network trained with ReLU or hard-swish gains more from int8"
            )
            found.append(Finding("swish", "warning", f"{name} activations", unique(layers), why, action))
    return found


def find_gates(nodes: list[fx.Node], shapes: dict[str, Any]) -> list[Finding]:
    """Name squeeze-and-excitation blocks: x (n, c, h, w) times a gate (n, c, 1, 1)."""
    layers = []
    for node in nodes:
        if node.target is not aten.mul.Tensor:
            continue
        sizes = [shapes.get(n.name, ()) for n in node.all_input_nodes if n.op != "get_attr"]
        if len(sizes) == 2 and all(isinstance(s, tuple) and len(s) == 4 for s in sizes):
            small, large = sorted(sizes, key=lambda s: int(s[2] * s[3]))
            if small[2:] == (1, 1) and large[2:] != (1, 1) and small[1] == large[1]:
                layers.append(layer_name(node))
    if not layers:
        return []
    return [
        Finding(
            "squeeze_excitation",
            "note",
            f"{len(layers)} squeeze-and-excitation gates",
            unique(layers),
            "each averages over the image and multiplies two activations, which int8 hardly speeds up",
            "nothing to do: edgecnn keeps both in int8; expect less speed-up than without them",
        )
    ]


def find_lone_batch_norms(nodes: list[fx.Node]) -> list[Finding]:
    """Name each BatchNorm that no convolution precedes, or whose convolution others read too."""
    layers = []
    for node in nodes:
        if node.target is aten.batch_norm.default:
            source = node.args[0]
            fits = isinstance(source, fx.Node) and source.target in _BEHIND_A_LAYER and len(source.users) == 1
            if not fits:
                layers.append(layer_name(node))
    if not layers:
        return []
    return [
        Finding(
            "batch_norm_alone",
            "note",
            f"{len(layers)} BatchNorms not behind a convolution",
            unique(layers),
            "they cannot be folded into a layer and cost an operator of their own",
            "edgecnn writes each as a 1x1 depthwise convolution with a scale per channel; BatchNorm right "
            "behind each convolution would be faster",
        )
    ]


def find_unsupported(nodes: list[fx.Node], shapes: dict[str, Any]) -> list[Finding]:
    """Name operators that have no lowering at all."""
    left = [n for n in unsupported_nodes(nodes, set(shapes)) if str(n.target) not in SWISHES]
    if not left:
        return []
    return [
        Finding(
            "unsupported",
            "problem",
            "operators that cannot be exported",
            tuple(layer_name(node) for node in left),
            "neither file can be written while they are in the network",
            "move them out of the network, or express them by others that `edgecnn inspect MODEL` takes",
        )
    ]


def find_islands(model: Model, shapes: dict[str, Any]) -> list[Finding]:
    """Name what would compute in float, since it has no int8 form.

    Args:
        model: float, after the passes that come before quantization.
        shapes: of its values.
    """
    unknown = unknown_operators(model.graph)
    if not unknown:
        return []
    inside = plan_islands(model.graph, frozenset(), shapes).nodes
    beside = len(inside) - len(unknown)
    also = f", and {beside} beside them which would otherwise be converted twice" if beside else ""
    return [
        Finding(
            "float_islands",
            "warning",
            f"{len(unknown)} operators without an int8 form: {island_names(unknown)}",
            unique(layer_name(node) for node in unknown),
            "each piece in float costs a conversion where int8 values come in and one where they go out",
            f"edgecnn leaves them in float{also}, and proves both files as they are; "
            'unsupported = "error" of quantize_static refuses instead',
        )
    ]


def without_islands(program: Program, model: Model, shapes: dict[str, Any]) -> Program:
    """Return the Program without the operators that would compute in float.

    Args:
        program: of the model.
        model: float, after the passes that come before quantization.
        shapes: of its values.
    """
    inside = {layer_name(node) for node in plan_islands(model.graph, frozenset(), shapes).nodes}
    return replace(program, ops=tuple(op for op in program.ops if op.layer not in inside))


def find_float_kernels(program: Program) -> list[Finding]:
    """Name what ONNX Runtime computes in float in an int8 file.

    Args:
        program: float, after the passes that come before quantization.
    """
    found = [op for op in program.ops if _is_float_in_onnx(program, op)]
    if not found:
        return []
    kinds = ", ".join(dict.fromkeys(op.kind for op in found))
    return [
        Finding(
            "float_between_int8",
            "warning",
            f"no int8 kernel in ONNX Runtime: {kinds}",
            unique(op.layer for op in found),
            "ONNX Runtime converts to float and back at each of them; LiteRT stays in int8",
            "prefer the TFLite file, or replace them: nearest for bilinear, a + (-1) * b for a - b",
        )
    ]


def _is_float_in_onnx(program: Program, op: Op) -> bool:
    """Whether there is no integer kernel; tanh, amax, softmax, sigmoid and leaky_relu have one."""
    if op.kind == "mean":
        rank = len(program.tensors[op.inputs[0]].shape)
        return rank != 4 or tuple(op.attributes["axes"]) != (2, 3)
    if op.kind == "resize":
        return bool(op.attributes["mode"] == "bilinear")
    return op.kind == "sub"


def find_delegate_breaks(program: Program) -> list[Finding]:
    """Name what LiteRT computes outside the XNNPACK delegate: in int8, but in more than one partition."""
    used = program.consumers()
    found = [
        op
        for op in program.ops
        if (op.kind == "softmax" or (op.kind == "resize" and op.attributes["mode"] == "nearest"))
        and used[op.output]
    ]
    if not found:
        return []
    kinds = ", ".join(dict.fromkeys("nearest resize" if op.kind == "resize" else op.kind for op in found))
    return [
        Finding(
            "delegate_break",
            "note",
            f"outside LiteRT's XNNPACK delegate: {kinds}",
            unique(op.layer for op in found),
            "they stay in int8, but each breaks the delegate into one more partition, which costs some time",
            "nothing to do; the ONNX file has integer kernels for them",
        )
    ]


def find_channels(program: Program, isa: str) -> list[Finding]:
    """Name layers whose number of channels leaves the target's int8 kernels half idle.

    Args:
        program: float, after the passes that come before quantization.
        isa: of the target.
    """
    x86 = isa.startswith("x86")
    multiple = 16 if x86 else 8
    layers, first = [], []
    for op in program.ops:
        if op.kind != "conv2d":
            continue
        c_out, c_in, *kernel = program.tensors[op.inputs[1]].shape
        if op.inputs[0] in program.inputs and op.attributes["groups"] == 1 and c_in == 1:
            first.append(op.layer)
        depthwise = c_in == 1 and op.attributes["groups"] == c_out
        if c_out % multiple and (not x86 or depthwise or tuple(kernel) != (1, 1)):
            layers.append(op.layer)
    found = []
    if layers:
        facts = (
            "a depthwise 5x5 of 88 channels takes 172 us, of 96 channels 72 us (x86 with VNNI, ONNX Runtime)"
            if x86
            else "ARM int8 kernels compute 8 or 16 channels at once, the rest idles (not measured here)"
        )
        action = (
            "edgecnn widens them with zeros in the ONNX file where that pays; when you design or prune, keep "
            "multiples of 16"
            if x86
            else "when you design or prune the network, keep multiples of 8"
        )
        title = f"{len(layers)} layers whose channels are no multiple of {multiple}"
        found.append(Finding("channel_multiple", "note", title, unique(layers), facts, action))
    if first:
        found.append(
            Finding(
                "one_channel_input",
                "note",
                "the first convolution reads one channel",
                unique(first),
                "int8 dot products take 4 channels at once, so 3 of 4 multiplications are idle in this layer",
                "nothing to do unless the layer dominates; a larger stride there helps more than int8 does",
            )
        )
    return found


def has_depthwise(model: Model) -> bool:
    """Whether a network has depthwise convolutions of its own, larger than 1x1."""
    shapes = {name: tuple(t.shape) for name, t in model.graph.named_parameters()}
    for node in model.graph.graph.nodes:
        if node.target not in (aten.conv2d.default, aten.conv2d.padding):
            continue
        weight = argument(node, 1, "weight")
        shape = shapes.get(str(getattr(weight, "target", "")), ())
        groups = int(argument(node, 6, "groups", 1))
        if len(shape) == 4 and groups == shape[0] > 1 and shape[2:] != (1, 1):
            return True
    return False


def weight_arrays(program: Program) -> list[tuple[Op, Any]]:
    """Return (op, float64 weights with the output channels first) of every layer with weights."""
    found = []
    for op in program.ops:
        if op.kind in ("conv2d", "conv_transpose2d", "linear"):
            data = program.tensors[op.inputs[1]].data
            if data is not None:
                weights = np.asarray(data, np.float64)
                if op.kind == "conv_transpose2d":
                    weights = np.swapaxes(weights, 0, 1)
                found.append((op, weights))
    return found
