"""Read a state dict from a checkpoint without running its code, and put it into a network."""

from __future__ import annotations

import argparse
import collections
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgecnn.errors import LoadError, MissingDependencyError, StateDictMismatchError, UntrustedPickleError
from edgecnn.load.detect import SAFETENSORS
from edgecnn.load.export import first_line

_NESTED = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "ema",
    "state_dict_ema",
    "model_ema",
    "weights",
)
_WRAPPERS = ("module.", "_orig_mod.")
_IGNORED = (".total_ops", ".total_params")
_SHOWN = 5


def read_checkpoint(path: Path, kind: str, *, trust: bool) -> dict[str, torch.Tensor] | torch.nn.Module:
    """Read a checkpoint.

    Args:
        path: a file of `kind`.
        kind: CHECKPOINT or SAFETENSORS of `edgecnn.load.detect`.
        trust: allow the file to run code.

    Returns:
        The state dict without wrapper prefixes; or, with trust, the pickled network.

    Raises:
        UntrustedPickleError: if the file wants to run code and is not trusted.
        LoadError: if the file is damaged or holds no state dict.
    """
    content = _read_safetensors(path) if kind == SAFETENSORS else _read_torch(path, trust=trust)
    if isinstance(content, torch.nn.Module):
        return content
    found = _find_state_dict(content)
    if isinstance(found, torch.nn.Module):
        return found
    if found is None:
        keys = list(content)[:_SHOWN] if isinstance(content, Mapping) else []
        with_keys = f" with keys {', '.join(map(str, keys))}" if keys else ""
        raise LoadError(
            f"{path}: holds {type(content).__name__}{with_keys}, expected a state dict",
            hint="save it with torch.save(net.state_dict(), path)",
        )
    return strip_wrappers(found)


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise MissingDependencyError(
            f"{path}: safetensors is not installed", hint="pip install safetensors"
        ) from error
    try:
        return load(path.read_bytes())
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError, OverflowError) as error:
        raise LoadError(
            f"{path}: damaged safetensors file ({first_line(error)})", hint="copy or download it again"
        ) from error


def _safe_globals() -> list[Any]:
    """Classes that training scripts leave in checkpoints and that only hold values."""
    scalar = np.float64(0.0).__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in ("f4", "f8", "i4", "i8", "u1", "?")}
    return [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *dtypes,
        argparse.Namespace,
        collections.defaultdict,
    ]


def _read_torch(path: Path, *, trust: bool) -> Any:
    try:
        with torch.serialization.safe_globals(_safe_globals()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if trust:
            return _read_trusted(path)
        raise _untrusted(path, error) from error
    except Exception as error:
        if trust:
            return _read_trusted(path)
        raise LoadError(
            f"{path}: damaged PyTorch checkpoint ({first_line(error)})", hint="copy or download it again"
        ) from error


def _read_trusted(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise LoadError(
            f"{path}: cannot be unpickled ({first_line(error)})",
            hint="a pickled network needs its Python classes importable; a state dict with --arch does not",
        ) from error


def _untrusted(path: Path, error: Exception) -> LoadError:
    text = str(error)
    wanted = re.search(r"(?:GLOBAL|global|class|function)[: ]+`?([A-Za-z_][\w.]+\.[\w.]+)", text)
    if wanted is None:
        wanted = re.search(r"\b([A-Za-z_]\w*(?:\.\w+)+)\b whose module", text)
    if wanted is None and "nsupported" not in text:
        return LoadError(
            f"{path}: damaged PyTorch checkpoint ({first_line(error)})", hint="copy or download it again"
        )
    name = wanted.group(1).rstrip(".") if wanted else "code of its own"
    return UntrustedPickleError(
        f"{path}: the pickle wants to load {name}, which could run any code; it was not loaded",
        hint="save the state dict and give --arch, or pass --trust if you trust the file's author",
    )


def _find_state_dict(content: Any) -> dict[str, torch.Tensor] | torch.nn.Module | None:
    """Return the state dict in a checkpoint, where training scripts put it, or None."""
    if not isinstance(content, Mapping):
        return None
    for key in _NESTED:
        value = content.get(key)
        if isinstance(value, torch.nn.Module):
            return value
        if isinstance(value, Mapping) and (found := _find_state_dict(value)) is not None:
            return found
    tensors = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }
    return tensors if tensors and 2 * len(tensors) >= len(content) else None


def strip_wrappers(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove what DataParallel and torch.compile put before names, and counters of profilers.

    Example:
        >>> list(strip_wrappers({"module.conv.weight": torch.zeros(1)}))
        ['conv.weight']
    """
    result = {key: value for key, value in state.items() if not key.endswith(_IGNORED)}
    while result and (
        prefix := next((w for w in _WRAPPERS if all(key.startswith(w) for key in result)), None)
    ):
        result = {key[len(prefix) :]: value for key, value in result.items()}
    return result


def fit_state_dict(module: torch.nn.Module, state: dict[str, torch.Tensor], where: str) -> tuple[str, ...]:
    """Load `state` into `module`; every key and shape must fit.

    Args:
        module: edited in place.
        state: without wrapper prefixes.
        where: names the file in messages.

    Returns:
        Warnings, when a common prefix had to be removed.

    Raises:
        StateDictMismatchError: listing the first keys or shapes that do not fit.
    """
    expected = module.state_dict()
    warnings: tuple[str, ...] = ()
    if not _fits(expected, state) and (prefix := _extra_prefix(expected, state)):
        stripped = {key.removeprefix(prefix): value for key, value in state.items()}
        if _fits(expected, stripped):
            state, warnings = (
                stripped,
                (f"{where}: removed the prefix {prefix!r} from all names of the state dict",),
            )
    problems = describe_mismatch(expected, state)
    if problems:
        raise StateDictMismatchError(
            f"{where}: the state dict does not fit {type(module).__name__}: {'; '.join(problems)}",
            hint=_mismatch_hint(expected, state),
        )
    try:
        module.load_state_dict(state, strict=False)
    except Exception as error:
        raise StateDictMismatchError(
            f"{where}: cannot be loaded into the network ({first_line(error)})"
        ) from error
    return warnings


def _missing(expected: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    return [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]


def _shape_mismatches(expected: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    return [key for key in expected if key in state and _shape(expected[key]) != _shape(state[key])]


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _fits(expected: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    return not describe_mismatch(expected, state)


def describe_mismatch(expected: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Return one phrase for each way in which a state dict does not fit, or an empty list."""
    problems = []
    if missing := _missing(expected, state):
        problems.append(f"missing in the file: {_shorten(missing)}")
    if unexpected := [key for key in state if key not in expected]:
        problems.append(f"not in the network: {_shorten(unexpected)}")
    if wrong := _shape_mismatches(expected, state):
        shown = [
            f"{key} is {_shape(state[key])} in the file, {_shape(expected[key])} in the network"
            for key in wrong
        ]
        problems.append(f"shapes: {_shorten(shown)}")
    return problems


def _shorten(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def _extra_prefix(expected: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Return the prefix ("model.") that all names of the state dict have and the network's have not."""
    if not state or not expected:
        return ""
    first = next(iter(state))
    parts = first.split(".")
    for end in range(1, len(parts)):
        prefix = ".".join(parts[:end]) + "."
        if first.removeprefix(prefix) in expected and all(key.startswith(prefix) for key in state):
            return prefix
    return ""


def _mismatch_hint(expected: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    if prefix := _extra_prefix(expected, state):
        return f"the names in the file begin with {prefix!r}, which the network's do not"
    if prefix := _extra_prefix(state, expected):
        return f"the names in the network begin with {prefix!r}, which the file's do not"
    if not _missing(expected, state) and all(key in expected for key in state):
        return "the same network with other sizes: check the number of classes and the width in --arch"
    return "check that --arch names the network the weights were trained in"


def infer_num_classes(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> int | None:
    """Return the number of classes of a state dict that differs from `module` in its last layer only.

    Args:
        module: built with its package's default number of classes.
        state: the weights to come.

    Returns:
        The first dimension of the differing tensors, or None if they are no mere change of classes.
    """
    expected = module.state_dict()
    wrong = _shape_mismatches(expected, state)
    if not wrong or _missing(expected, state) or any(key not in expected for key in state):
        return None
    sizes = {(expected[key].shape[:1], state[key].shape[:1]) for key in wrong}
    tails = all(expected[key].shape[1:] == state[key].shape[1:] for key in wrong)
    if len(sizes) != 1 or not tails:
        return None
    (_, size), = sizes  # fmt: skip
    return int(size[0]) if len(size) == 1 and size[0] > 0 else None
