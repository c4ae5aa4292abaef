"""What channel coupling tells about a network: groups of channels, the tensors they live in, the layers
they cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgecnn.graph.channels.union import Ints


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor that carries a group's channels.

    Attributes:
        tensor: attribute name in the graph ("layer1.0.conv1.weight").
        dim: the dimension that gets shorter.
        role: "out" (the layer makes these channels), "in" (it reads them), "norm" (scale, shift and
            statistics per channel) or "constant" (position embeddings, layer scales, bias tables ...).
        node: name of the graph node that reads the tensor.
        layer: where in the network that is, for messages.
        positions: for each channel of the group, in the order of `Group.channels`, the indices along `dim`
            that go with it.
    """

    tensor: str
    dim: int
    role: str
    node: str
    layer: str
    positions: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Group:
    """Channels that live in exactly the same dimensions of the same tensors: they compete with each other
    only.

    Attributes:
        index: position in `Coupling.groups`.
        channels: ids of the smallest units that can be removed; a unit is all that must go together.
        members: where the channels live, producing layers first.
        frozen: why it cannot be cut, or None.
    """

    index: int
    channels: tuple[int, ...]
    members: tuple[Member, ...]
    frozen: str | None

    @property
    def name(self) -> str:
        """Path of the first tensor that makes these channels, without its last part ("layer1.0.conv1")."""
        made = [m for m in self.members if m.role == "out"] or list(self.members)
        return made[0].tensor.rpartition(".")[0] or made[0].tensor if made else f"group {self.index}"

    @property
    def size(self) -> int:
        """Number of units that can be removed one by one."""
        return len(self.channels)


@dataclass(frozen=True)
class WeightedLayer:
    """A convolution or linear layer, for its cost under any cut.

    Attributes:
        node: name of the graph node.
        layer: where in the network.
        kind: "conv2d" (1-D and 3-D convolutions too), "conv_transpose2d" or "linear".
        weight: attribute name.
        bias: attribute name, or None.
        output_channels: channel id of each output channel, -1 where it cannot be cut.
        input_channels: channel id of each input channel of the value it reads, -1 where it cannot be cut.
        groups: of the convolution, uncut.
        macs: multiply-accumulates on one image, uncut.
        params: weights and biases, uncut.
        positions: channel ids over which the layer is repeated (token mixing, one layer for all heads), or
            ().
    """

    node: str
    layer: str
    kind: str
    weight: str
    bias: str | None
    output_channels: tuple[int, ...]
    input_channels: tuple[int, ...]
    groups: int
    macs: int
    params: int
    positions: tuple[int, ...] = ()


@dataclass(frozen=True)
class TensorInfo:
    """Shape of a parameter or buffer, and the channel id per index of each dimension that has channels."""

    shape: tuple[int, ...]
    is_parameter: bool
    channels: Mapping[int, Ints] = field(default_factory=dict)


@dataclass(frozen=True)
class Coupling:
    """Which channels of a network stand and fall together.

    Attributes:
        groups: every channel is in exactly one.
        layers: convolutions and linear layers, in execution order.
        values: node name -> channel id per element of its value at batch 1 (a tuple of them for a node that
            gives several), -1 for none. Broadcast dimensions have stride 0.
        tensors: parameters and buffers in use, with the channel ids along their dimensions.
        constants: node name -> for values made of constants alone: which elements follow which tensor
            dimension, as (tensor, dim, index along dim per element, -1 for none).
        inexact: (node name, reason, ids): where the result depends on channels that are there but zero, so
            that a zeroed network and a cut one differ.
        prunable_params: parameters that lie in at least one dimension that can be cut.
        params: all parameters.
        frozen_reasons: why the others cannot be cut -> number of parameters.
        shapes: node name -> shape at batch `batch`, a tuple of them for a node that gives several.
        batch: size of dimension 0 in `values` and `shapes`.
    """

    groups: tuple[Group, ...]
    layers: tuple[WeightedLayer, ...]
    values: Mapping[str, Ints | tuple[Ints, ...]]
    tensors: Mapping[str, TensorInfo]
    constants: Mapping[str, tuple[tuple[str, int, Ints], ...]]
    inexact: tuple[tuple[str, str, frozenset[int]], ...]
    prunable_params: int
    params: int
    frozen_reasons: Mapping[str, int]
    shapes: Mapping[str, Any]
    batch: int = 1

    @property
    def prunable_fraction(self) -> float:
        """Share of the parameters that lie in at least one dimension that can be cut, in [0, 1]."""
        return self.prunable_params / self.params if self.params else 0.0
