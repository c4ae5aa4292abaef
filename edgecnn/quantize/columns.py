"""A layer as a matrix product: the columns that its kernel meets at some output positions.

    y[g, s, c] = sum_k W[g, c, k] X[g, s, k] + b[g, c]

for group g and sample s, with k over (c_in/groups, k_h, k_w). Neighbouring positions of an image look alike,
so a layer is learned from a few positions of many images at a fraction of the work of whole images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.nn import functional

from edgecnn.graph.nodes import argument, aten, pair

MAX_COLUMN_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Columns:
    """Inputs and wanted outputs of a layer at sampled positions.

    Attributes:
        x: float32 (groups, samples, k).
        y: float32 (groups, samples, c_out/groups).
    """

    x: torch.Tensor
    y: torch.Tensor


def layer_groups(node: fx.Node) -> int:
    """Return the groups of a convolution, 1 for a linear layer."""
    return 1 if node.target is aten.linear.default else int(argument(node, 6, "groups", 1))


def is_columnar(node: fx.Node) -> bool:
    """Whether `sample_columns` knows the layer: a convolution or a linear layer, not a transposed one."""
    return node.target in (aten.conv2d.default, aten.conv2d.padding, aten.linear.default)


def sample_columns(
    node: fx.Node,
    weight: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    num_columns: int,
    generator: torch.Generator,
) -> Columns:
    """Return about `num_columns` positions, the same number from each image.

    Args:
        node: a layer that `is_columnar`.
        weight: (c_out, c_in/groups, k_h, k_w) or (c_out, c_in).
        inputs: batches (n, c_in, h, w) or (..., c_in).
        outputs: batches of what the layer should give there, (n, c_out, h_out, w_out) or (..., c_out).
        num_columns: wanted; fewer where they would take more than 128 MB.
        generator: of the positions.
    """
    size = int(weight[0].numel()) * layer_groups(node) * 4
    num_columns = max(min(num_columns, MAX_COLUMN_BYTES // max(size, 1)), 1)
    if node.target is aten.linear.default:
        x = torch.cat([batch.reshape(-1, batch.shape[-1]) for batch in inputs])
        y = torch.cat([batch.reshape(-1, batch.shape[-1]) for batch in outputs])
        kept = torch.randperm(len(x), generator=generator)[:num_columns]
        return Columns(x[kept][None], y[kept][None])
    per_image = max(num_columns // sum(len(batch) for batch in inputs), 1)
    parts = [
        _batch_columns(node, weight, x, y, per_image, generator) for x, y in zip(inputs, outputs, strict=True)
    ]
    return Columns(torch.cat([part.x for part in parts], 1), torch.cat([part.y for part in parts], 1))


def _batch_columns(
    node: fx.Node,
    weight: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    per_image: int,
    generator: torch.Generator,
) -> Columns:
    """Return `per_image` random columns of each image of a batch."""
    groups, kernel = layer_groups(node), tuple(int(d) for d in weight.shape[2:])
    stride, dilation = pair(argument(node, 3, "stride", 1)), pair(argument(node, 5, "dilation", 1))
    top, left, bottom, right = _padding(argument(node, 4, "padding", 0), kernel, dilation)
    unfolded = functional.unfold(
        functional.pad(x, (left, right, top, bottom)), kernel, dilation, 0, stride
    )  # (n, c_in kk, l)
    n, _, positions = unfolded.shape
    count = min(per_image, positions)
    chosen = torch.rand(n, positions, generator=generator).argsort(1)[:, None, :count]  # (n, 1, count)
    columns = torch.gather(unfolded, 2, chosen.expand(-1, unfolded.shape[1], -1))
    wanted = torch.gather(y.flatten(2), 2, chosen.expand(-1, y.shape[1], -1))
    return Columns(_by_group(columns, groups), _by_group(wanted, groups))


def _by_group(values: torch.Tensor, groups: int) -> torch.Tensor:
    """Return (n, groups k, count) as (groups, n count, k)."""
    n, rows, count = values.shape
    split = values.reshape(n, groups, rows // groups, count)
    return split.permute(1, 0, 3, 2).reshape(groups, n * count, rows // groups)


def _padding(
    padding: object, kernel: tuple[int, ...], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return (top, left, bottom, right); "same" puts the odd one at the end, as PyTorch does."""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        rows, columns = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return rows // 2, columns // 2, rows - rows // 2, columns - columns // 2
    height, width = pair(padding)
    return height, width, height, width
