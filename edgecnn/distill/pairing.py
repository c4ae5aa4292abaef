"""Which values inside the student are to look like which values inside the teacher.

Candidates are the ends of stages: values (n, c, h, w) with h w > 1 through which everything from the input
to the first output flows, the last of each run of one spatial size. A value is such a narrow place if no
edge of the graph jumps over it, so a block's inner layers and parallel branches do not count.

A student that was cut from its teacher has the same layers, and the stage ends pair by their names. Any
other student pairs by spatial size, and within one size by relative depth: the share of convolutions and
linear layers that come before.

**Source**: A. Romero et al., FitNets, ICLR 2015, arXiv:1412.6550, and S. Zagoruyko, N. Komodakis, ICLR 2017,
arXiv:1612.03928, take the ends of stages by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from edgecnn.errors import PassError
from edgecnn.graph.nodes import aten
from edgecnn.graph.shapes import infer_shapes
from edgecnn.model import Model

MAX_PAIRS = 8

_WEIGHTED = (
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.convolution.default,
    aten.conv_transpose2d.input,
    aten.linear.default,
)


@dataclass(frozen=True)
class StageEnd:
    """The last value of one spatial size on the way from the input to the first output.

    Attributes:
        node: name of the fx node.
        channels: c.
        size: (h, w).
        depth: share of the weighted layers at or before it, in [0, 1].
    """

    node: str
    channels: int
    size: tuple[int, int]
    depth: float


@dataclass(frozen=True)
class Pair:
    """A stage end of the student and the one of the teacher that it is compared with."""

    student: StageEnd
    teacher: StageEnd


def stage_ends(model: Model) -> tuple[StageEnd, ...]:
    """Return the stage ends of a network, in order.

    Args:
        model: the network.

    Returns:
        None of them is the input; the tuple is empty for a network without a spatial value.

    Example: a CIFAR ResNet has three, with 16 channels at 32x32, 32 at 16x16 and 64 at 8x8.
    """
    shapes = infer_shapes(model)
    nodes = [node for node in _on_the_way(model.graph) if node.name in shapes]  # sizes are no values
    position = {node: index for index, node in enumerate(nodes)}
    total = sum(node.target in _WEIGHTED for node in nodes) or 1
    furthest, weighted = 0, 0
    ends: list[StageEnd] = []
    for index, node in enumerate(nodes):
        narrow = furthest <= index  # no earlier value is read after this one
        furthest = max(furthest, *(position.get(user, 0) for user in node.users), 0)
        weighted += node.target in _WEIGHTED
        shape = shapes[node.name]
        if not narrow or node.op != "call_function" or not _is_spatial(shape):
            continue
        end = StageEnd(node.name, shape[1], (shape[2], shape[3]), weighted / total)
        if ends and ends[-1].size == end.size:
            ends.pop()
        ends.append(end)
    return tuple(ends)


def pair_stages(student: Model, teacher: Model) -> tuple[Pair, ...]:
    """Return what is compared with what, at most MAX_PAIRS, in the student's order.

    Args:
        student: the network to train.
        teacher: the network to learn from.

    Raises:
        PassError: if no stage of the one has the spatial size of a stage of the other.
    """
    students, teachers = stage_ends(student), stage_ends(teacher)
    pairs = _by_name(students, teachers) if _same_layers(student, teacher) else ()
    pairs = pairs or _by_size(students, teachers)
    if not pairs:
        found, expected = (
            ", ".join(f"{h}x{w}" for h, w in dict.fromkeys(end.size for end in ends)) or "none"
            for ends in (students, teachers)
        )
        raise PassError(
            f"no stage of the student {student.spec.name} has the size of one of the teacher "
            f"{teacher.spec.name}: found {found}, expected one of {expected}",
            hint="distil from the outputs alone: methods logits or dkd",
        )
    step = -(-len(pairs) // MAX_PAIRS)
    return pairs[::-1][::step][::-1]  # thinned out from the end, so that the last stage stays


def _is_spatial(shape: object) -> bool:
    """Return whether a shape is (n, c, h, w) with more than one pixel."""
    return isinstance(shape, tuple) and len(shape) == 4 and shape[0] == -1 and shape[2] * shape[3] > 1


def _on_the_way(graph: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes on a path from an input to the first output, in order."""
    forward: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or any(n in forward for n in node.all_input_nodes):
            forward.add(node)
    output = next(node for node in graph.graph.nodes if node.op == "output")
    needed = set(output.all_input_nodes[:1])
    for node in reversed(graph.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in graph.graph.nodes if node in forward and node in needed]


def _same_layers(student: Model, teacher: Model) -> bool:
    """Return whether both have the same weighted layers, up to the number of channels."""
    found = [
        [
            (n.name, str(n.target), str(n.args[1]))
            for n in model.graph.graph.nodes
            if n.op == "call_function" and n.target in _WEIGHTED
        ]
        for model in (student, teacher)
    ]
    return found[0] == found[1]


def _by_name(students: tuple[StageEnd, ...], teachers: tuple[StageEnd, ...]) -> tuple[Pair, ...]:
    named = {end.node: end for end in teachers}
    return tuple(
        Pair(end, named[end.node])
        for end in students
        if end.node in named and named[end.node].size == end.size
    )


def _by_size(students: tuple[StageEnd, ...], teachers: tuple[StageEnd, ...]) -> tuple[Pair, ...]:
    """Pair the nearest in depth first; each stage end is used once."""
    distances = sorted(
        (abs(s.depth - t.depth), i, j)
        for i, s in enumerate(students)
        for j, t in enumerate(teachers)
        if s.size == t.size
    )
    chosen: dict[int, int] = {}
    for _, i, j in distances:
        if i not in chosen and j not in chosen.values():
            chosen[i] = j
    return tuple(Pair(students[i], teachers[j]) for i, j in sorted(chosen.items()))
