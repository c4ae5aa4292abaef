"""Which device trains, and in which precision."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from math import prod
from typing import Any

import torch

from edgecnn.errors import EdgeCNNError, PassError
from edgecnn.graph.nodes import argument, aten
from edgecnn.graph.shapes import infer_shapes
from edgecnn.model import Model

MAX_DEPTHWISE_SHARE = 0.025
"""Of the multiply-accumulates, from which on bfloat16 is slower on a CPU."""


def choose_device() -> torch.device:
    """Return the GPU of this process (LOCAL_RANK chooses among several), or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def choose_precision(name: str, device: torch.device, model: Model) -> torch.dtype:
    """Return the dtype of convolutions and matrix products.

    Args:
        name: auto, float32, bfloat16 or float16.
        device: where it runs.
        model: that is trained.

    Returns:
        For "auto" bfloat16 where the device computes it in hardware, else float32; on a CPU also float32 for
        a network of depthwise convolutions, which PyTorch trains at 0.7 to 0.9 of that speed in bfloat16
        (others at 1.3 to 1.6).

    Raises:
        PassError: for float16 on a CPU, where it is slower than float32 and needs loss scaling all the same.
    """
    if name == "auto":
        suits = device.type != "cpu" or depthwise_share(model) < MAX_DEPTHWISE_SHARE
        return torch.bfloat16 if suits and _computes_bfloat16(device) else torch.float32
    if name == "float16" and device.type != "cuda":
        raise PassError("precision is float16, expected float32 or bfloat16 on a CPU", hint='use "auto"')
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def depthwise_share(model: Model) -> float:
    """Return the share of the multiply-accumulates that depthwise convolutions have, 0 if shapes are unknown.

    Example: a depthwise 3x3 and then a pointwise convolution of 16 channels: 9 / (9 + 16) = 0.36.
    """
    try:
        shapes = infer_shapes(model)
    except EdgeCNNError:
        return 0.0
    macs = {True: 0, False: 0}
    for node in model.graph.graph.nodes:
        if node.target not in (aten.conv2d.default, aten.linear.default):
            continue
        weight = shapes[argument(node, 1, "weight").name]
        groups = argument(node, 6, "groups", 1)
        is_linear = node.target is aten.linear.default
        positions = shapes[node.name][1:-1] if is_linear else shapes[node.name][2:]
        macs[groups > 1 and weight[1] == 1] += prod(weight) * prod(positions)
    return macs[True] / max(sum(macs.values()), 1)


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in checks)


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which a network runs in `dtype`; parameters stay float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)
