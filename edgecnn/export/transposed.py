"""Transposed convolution as a convolution whose channels are then spread over space.

With stride s and padding p, output position o = s * m + r of phase r in 0..s-1 is

    y[s * m + r] = sum_j x[m + a - j] * w[b + s * j]          a = (r + p) div s,  b = (r + p) mod s

so each phase is a plain convolution with every s-th tap of the kernel. All phases together are one
convolution with s_h * s_w * c_out channels, whose result a depth-to-space puts in place; the sums are the
same integers.
The runtimes have fast integer kernels for these two and none, or none that is right, for the one.

Source: Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel
Convolutional Neural Network", arXiv:1609.05158, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgecnn.graph.program import Array, Op


@dataclass(frozen=True)
class PhaseConvolution:
    """A transposed convolution as one convolution with stride 1.

    Attributes:
        taps: the kernel by phase, (c_in, c_out/groups, s_h, reach_h, s_w, reach_w).
        padding: zeros around the input: top, left, bottom, right.
        stride: (s_h, s_w), how far the phases are to be spread.
        counts: (h, w) of each phase.
    """

    taps: Array
    padding: tuple[int, int, int, int]
    stride: tuple[int, int]
    counts: tuple[int, int]

    @property
    def copies(self) -> int:
        """How many phases there are, s_h * s_w."""
        return self.stride[0] * self.stride[1]


@dataclass(frozen=True)
class Phases:
    """One dimension of a transposed convolution as a convolution per phase.

    Attributes:
        taps: (stride, reach) index into the kernel of each tap, or the kernel's size where there is none.
        before: zeros to pad before the input.
        after: zeros to pad after it.
    """

    taps: npt.NDArray[np.intp]
    before: int
    after: int


def split_phases(kernel: int, stride: int, padding: int, size: int, new_size: int) -> Phases:
    """Return the phases of one dimension.

    Args:
        kernel: size of the kernel, dilation included.
        stride: of the transposed convolution.
        padding: rows it cuts off before the output.
        size: of the input.
        new_size: of the output.

    Example:
        >>> split_phases(3, 2, 1, 8, 16).taps.tolist()
        [[1, 3], [2, 0]]
    """
    shifts = [divmod(phase + padding, stride) for phase in range(stride)]
    spans = [(a - (kernel - 1 - b) // stride, a) for a, b in shifts if b < kernel]
    first = min([0, *(span[0] for span in spans)])
    last = max([0, *(span[1] for span in spans)])
    count = -(-new_size // stride)
    after = max(count + last - size, 0)
    reach = size + after - first - count + 1
    taps = np.full((stride, reach), kernel, np.intp)
    for phase, (a, b) in enumerate(shifts):
        for tap in range(reach):
            step = a - first - tap
            if step >= 0 and b + stride * step < kernel:
                taps[phase, tap] = b + stride * step
    return Phases(taps, -first, after)


def phase_convolution(
    op: Op, kernel: Array, size: Sequence[int], new_size: Sequence[int]
) -> PhaseConvolution:
    """Return the convolution that stands for a conv_transpose2d.

    Args:
        op: the conv_transpose2d.
        kernel: (c_in, c_out/groups, k_h, k_w), before dilation.
        size: (h, w) of the input.
        new_size: (h, w) of the output.

    Example: 2x2 with stride 2 becomes four 1x1 kernels.
        >>> op = Op("conv_transpose2d", ("x", "w"), "y", {"stride": (2, 2), "padding": (0, 0, 0, 0)})
        >>> phases = phase_convolution(op, np.arange(4.0).reshape(1, 1, 2, 2), (8, 8), (16, 16))
        >>> phases.taps.shape, phases.taps.ravel().tolist(), phases.padding
        ((1, 1, 2, 1, 2, 1), [0.0, 1.0, 2.0, 3.0], (0, 0, 0, 0))
    """
    stride, padding = op.attributes.get("stride", (1, 1)), op.attributes.get("padding", (0, 0, 0, 0))
    kernel = _dilated(kernel, op.attributes.get("dilation", (1, 1)))
    rows = split_phases(kernel.shape[2], stride[0], padding[0], size[0], new_size[0])
    columns = split_phases(kernel.shape[3], stride[1], padding[1], size[1], new_size[1])
    with_zero = np.pad(kernel, ((0, 0), (0, 0), (0, 1), (0, 1)))
    return PhaseConvolution(
        np.asarray(with_zero[:, :, rows.taps[:, :, None, None], columns.taps]),
        (rows.before, columns.before, rows.after, columns.after),
        (stride[0], stride[1]),
        (-(-new_size[0] // stride[0]), -(-new_size[1] // stride[1])),
    )


def _dilated(kernel: Array, dilation: Sequence[int]) -> Array:
    """Return the kernel with zeros between its taps."""
    c_in, c_out, height, width = kernel.shape
    sizes = ((height - 1) * dilation[0] + 1, (width - 1) * dilation[1] + 1)
    spread = np.zeros((c_in, c_out, *sizes), kernel.dtype)
    spread[:, :, :: dilation[0], :: dilation[1]] = kernel
    return spread
