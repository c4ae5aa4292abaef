"""Padding of windows: when TFLite's SAME and VALID give PyTorch's numbers, and what to pad where not.

With input size i, window reach r = (k - 1) * d + 1, stride s and padding p_before, p_after, PyTorch gives

    o = floor((i + p_before + p_after - r) / s) + 1          outputs, of which the last reads up to
    used = (o - 1) * s + r - i - p_before                    rows of the padding after the input.

TFLite's SAME gives ceil(i / s) outputs and pads max((o - 1) * s + r - i, 0) rows, the smaller half before.
Trailing padding that no window reads does not count.

Source: TFLite's tflite/kernels/padding.h; the tests compare with torch.nn.functional.conv2d.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WindowPadding:
    """A TFLite padding and what a PAD before it must add.

    Attributes:
        scheme: "SAME" or "VALID".
        explicit: (top, left, bottom, right) rows and columns that a PAD adds first; all zero for none.
    """

    scheme: str
    explicit: tuple[int, int, int, int] = (0, 0, 0, 0)


def output_size(size: int, reach: int, stride: int, before: int, after: int) -> int:
    """Return PyTorch's number of windows (ceil_mode off) along one dimension.

    Example:
        >>> output_size(224, 7, 2, 3, 3)
        112
    """
    return (size + before + after - reach) // stride + 1


def choose_padding(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int] = (1, 1),
) -> WindowPadding:
    """Return the TFLite padding that equals `padding`, with an explicit PAD only where neither scheme does.

    Args:
        size: (h, w) of the input.
        kernel: (k_h, k_w).
        stride: (s_h, s_w).
        padding: (top, left, bottom, right).
        dilation: (d_h, d_w).

    Example:
        >>> choose_padding((32, 32), (3, 3), (1, 1), (1, 1, 1, 1))
        WindowPadding(scheme='SAME', explicit=(0, 0, 0, 0))
        >>> choose_padding((32, 32), (3, 3), (2, 2), (1, 1, 1, 1))
        WindowPadding(scheme='VALID', explicit=(1, 1, 0, 0))
    """
    counted = counted_padding(size, kernel, stride, padding, dilation)
    if not any(counted):
        return WindowPadding("VALID")
    if all(
        _is_same(
            size[dim], (kernel[dim] - 1) * dilation[dim] + 1, stride[dim], padding[dim], padding[dim + 2]
        )
        for dim in (0, 1)
    ):
        return WindowPadding("SAME")
    return WindowPadding("VALID", counted)


def counted_padding(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int] = (1, 1),
) -> tuple[int, int, int, int]:
    """Return the (top, left, bottom, right) padding that windows read; arguments as for `choose_padding`.

    Example:
        >>> counted_padding((32, 32), (3, 3), (2, 2), (1, 1, 1, 1))
        (1, 1, 0, 0)
    """
    after = []
    for dim in (0, 1):
        reach = (kernel[dim] - 1) * dilation[dim] + 1
        count = output_size(size[dim], reach, stride[dim], padding[dim], padding[dim + 2])
        after.append(max((count - 1) * stride[dim] + reach - size[dim] - padding[dim], 0))
    return (padding[0], padding[1], after[0], after[1])


def _is_same(size: int, reach: int, stride: int, before: int, after: int) -> bool:
    """Whether SAME makes as many windows along one dimension and starts them at the same place."""
    count = output_size(size, reach, stride, before, after)
    total = max((count - 1) * stride + reach - size, 0)
    return count == -(-size // stride) and before == total // 2
