"""Where the windows of a pool lie."""

from __future__ import annotations

from collections.abc import Sequence

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
