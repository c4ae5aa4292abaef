"""Values as channel coupling sees them: an integer per element instead of a number.

A tensor of ids has the shape of the value it stands for. Dimensions along which nothing changes are kept
with stride 0, so that a feature map of (1, 512, 56, 56) whose ids follow the channels takes 512 integers, and
"which dimensions do the ids follow" is read off the strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgecnn.graph.channels.union import NONE


@dataclass(frozen=True)
class Value:
    """An activation.

    Attributes:
        ids: channel id per element, NONE where an element belongs to no channel; int64, the value's shape.
        zero: whether the elements of a channel are zero once all weights and constants of the channel are
            zero.
    """

    ids: Tensor
    zero: bool = False

    @property
    def has_channels(self) -> bool:
        """Whether any element belongs to a channel."""
        return bool((compact(self.ids) >= 0).any())


@dataclass(frozen=True)
class Axis:
    """One dimension of one tensor, as it lies in a value made of constants.

    Attributes:
        tensor: attribute name; the node's name for tensors that the graph makes itself (zeros, expand).
        dim: of that tensor.
        index: index along that dimension per element of the value, NONE for none; int64, the value's shape.
    """

    tensor: str
    dim: int
    index: Tensor


@dataclass(frozen=True)
class Constant:
    """A value that does not depend on the input: parameters, buffers and what is computed from them.

    Attributes:
        axes: the tensor dimensions its elements follow.
        shape: of the value.
    """

    axes: tuple[Axis, ...]
    shape: tuple[int, ...]


def words(text: str) -> list[str]:
    """Return the words of a text, for lists of operator names."""
    return text.split()


Record = Value | Constant | tuple[Value | Constant, ...] | None
"""What is known of a node: None for numbers."""


def varying(ids: Tensor) -> tuple[int, ...]:
    """Return the dimensions a tidy tensor's elements follow."""
    return tuple(d for d in range(ids.dim()) if ids.shape[d] > 1 and ids.stride(d) != 0)


def compact(ids: Tensor) -> Tensor:
    """Return a view with every stride-0 dimension cut to size 1."""
    for d in range(ids.dim()):
        if ids.shape[d] > 1 and ids.stride(d) == 0:
            ids = ids.narrow(d, 0, 1)
    return ids


def tidy(ids: Tensor) -> Tensor:
    """Return equal elements with stride 0 along every dimension along which nothing changes."""
    if ids.numel() == 0:
        return ids
    small = compact(ids)
    for d in range(small.dim()):
        if small.shape[d] > 1:
            first = small.narrow(d, 0, 1)
            if torch.equal(small, first.expand_as(small)):
                small = first
    return small.contiguous().expand(ids.shape)


def blank(shape: Sequence[int]) -> Tensor:
    """Return ids of a value without channels."""
    return torch.tensor(NONE).expand(tuple(shape)) if shape else torch.tensor(NONE)


def along(vector: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Return `vector` laid along one dimension of a value of `shape`.

    Example:
        >>> along(torch.tensor([7, 8]), 1, (1, 2, 2)).tolist()
        [[[7, 7], [8, 8]]]
    """
    sizes = [1] * len(shape)
    sizes[dim] = -1
    return tidy(vector.reshape(sizes).expand(tuple(shape)))


def counting(dim: int, shape: Sequence[int]) -> Tensor:
    """Return 0, 1, 2 ... along one dimension of a value of `shape`."""
    return along(torch.arange(shape[dim]), dim, shape)


def broadcast(ids: Tensor, shape: Sequence[int]) -> Tensor:
    """Return ids broadcast to `shape`, dimensions aligned at the last."""
    return ids.expand(tuple(shape))


def spread(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors broadcast to one shape."""
    shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
    return a.expand(shape), b.expand(shape)


def common(*tensors: Tensor) -> list[Tensor]:
    """Return tensors of one shape cut to size 1 along the dimensions none of them follows."""
    found = list(tensors)
    for d in range(found[0].dim()):
        if found[0].shape[d] > 1 and all(t.stride(d) == 0 for t in found):
            found = [t.narrow(d, 0, 1) for t in found]
    return found


def constant_of(name: str, shape: Sequence[int]) -> Constant:
    """Return the record of a tensor that is its own source."""
    sizes = tuple(int(s) for s in shape)
    axes = tuple(Axis(name, d, counting(d, sizes)) for d in range(len(sizes)) if sizes[d] > 1)
    return Constant(axes, sizes)
