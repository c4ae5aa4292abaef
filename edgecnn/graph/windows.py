"""Where the windows of a pool lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgecnn.graph.program import Op


def leaves_padding_out(op: Op, size: Sequence[int], out_size: Sequence[int]) -> bool:
    """Whether windows of an average pool hold padding that is not counted, so that they divide by less.

    Such a pool averages the levels themselves, as LiteRT does, and rounds halves away from level 0: no
    convolution has a divisor of its own at every place, and AVERAGE_POOL_2D knows nothing of the numbers.

    Args:
        op: avg_pool2d.
        size: (h, w) of its input.
        out_size: (h, w) of its output.

    Example:
        >>> window = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0, 1, 1)}
        >>> pool = Op("avg_pool2d", ("x",), "y", {**window, "count_include_pad": False})
        >>> leaves_padding_out(pool, (4, 4), (2, 2)), leaves_padding_out(pool, (5, 5), (3, 3))
        (False, True)
    """
    a = op.attributes
    if a.get("count_include_pad", True):
        return False
    before = a["padding"][:2]
    ends = [(out_size[i] - 1) * a["stride"][i] + a["kernel"][i] - before[i] for i in range(2)]
    return any(before) or any(end > length for end, length in zip(ends, size, strict=True))


@dataclass(frozen=True)
class Windows:
    """The windows of a pool along one dimension.

    Attributes:
        size: of the input.
        count: how many there are.
        kernel: values in each.
        stride: from one to the next.
        before: padding ahead of the input.
        dilation: distance of the values in one.
    """

    size: int
    count: int
    kernel: int
    stride: int
    before: int
    dilation: int = 1

    def hold_padding_alone(self) -> bool:
        """Whether one of them holds no value of the input, so that its maximum is minus infinity.

        Example: of 3 values, padding of 2 ahead of windows of 2.
            >>> Windows(3, 3, 2, 2, 2).hold_padding_alone(), Windows(3, 2, 2, 2, 1).hold_padding_alone()
            (True, False)
        """
        starts = (i * self.stride - self.before for i in range(self.count))
        ends = self.kernel * self.dilation
        return not all(
            any(0 <= place < self.size for place in range(start, start + ends, self.dilation))
            for start in starts
        )

    def padded_alike(self) -> PaddedAlike | None:
        """Return how a max pool of PyTorch, which pads both sides alike, gives these windows.

        Its padding is at most half of the kernel. With more padding than wanted, by whole
        strides, there are windows ahead of the first; with ceil_mode the last may reach past the padding.

        Returns:
            None where it cannot.

        Example: TensorFlow's "same" padding of 24 values by (0, 1), windows of 3, stride 2.
            >>> Windows(24, 12, 3, 2, 0).padded_alike()
            PaddedAlike(padding=0, skipped=0, count=11, count_up=12)
        """
        reach = self.dilation * (self.kernel - 1) + 1
        for padding in range(self.before, self.kernel // 2 + 1, self.stride):
            left, skipped = self.size + 2 * padding - reach, (padding - self.before) // self.stride
            up = -(-left // self.stride)
            up -= up * self.stride >= self.size + padding  # which would start in the padding at the end
            found = PaddedAlike(padding, skipped, left // self.stride + 1, up + 1)
            if found.count_up >= skipped + self.count:
                return found
        return None


@dataclass(frozen=True)
class PaddedAlike:
    """A pool along one dimension that pads both sides alike, some of whose windows are those wanted.

    Attributes:
        padding: on both sides.
        skipped: windows ahead of the first that is wanted.
        count: windows there are.
        count_up: windows there are with ceil_mode.
    """

    padding: int
    skipped: int
    count: int
    count_up: int
