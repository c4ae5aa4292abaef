"""Which device trains, and in which precision."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any

import torch

from edgecnn.errors import PassError


def choose_device() -> torch.device:
    """Return the GPU of this process (LOCAL_RANK chooses among several), or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of convolutions and matrix products.

    Args:
        name: auto, float32, bfloat16 or float16.
        device: where it runs.

    Returns:
        For "auto" bfloat16 where the device computes it in hardware, else float32.

    Raises:
        PassError: for float16 on a CPU, where it is slower than float32 and needs loss scaling all the same.
    """
    if name == "auto":
        return torch.bfloat16 if _computes_bfloat16(device) else torch.float32
    if name == "float16" and device.type != "cuda":
        raise PassError("precision is float16, expected float32 or bfloat16 on a CPU", hint='use "auto"')
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in checks)


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which a network runs in `dtype`; parameters stay float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)
