"""What can go wrong while training, and what is said about it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from edgecnn.errors import PassError
from edgecnn.model import Model
from edgecnn.train.settings import TrainSettings

_EXHAUSTED = (
    "can't allocate memory",
    "out of memory",
    "not enough memory",
    "bad alloc",
    "could not create a memory",
)

_SAFE_LEARNING_RATE = 0.02


class DivergedError(PassError):
    """Training whose loss or gradient became NaN or infinite.

    Args:
        message: at which step.
        hint: what to change.
        step: the step that failed, from 1.
        good_step: steps taken when the last good state was copied.
        model: the last good state.
    """

    def __init__(self, message: str, *, hint: str, step: int, good_step: int, model: Model) -> None:
        super().__init__(message, hint=hint)
        self.step = step
        self.good_step = good_step
        self.model = model


def divergence_hint(settings: TrainSettings) -> str:
    """Return what to try against NaN."""
    lower = min(settings.learning_rate / 10, _SAFE_LEARNING_RATE)
    tries = [f"lower the learning rate (learning_rate = {lower:g}, or --lr {lower:g})"]
    if settings.clip_norm is None:
        tries.append("clip gradients (clip_norm = 1.0)")
    if settings.precision != "float32":
        tries.append('train in precision = "float32"')
    return ", or ".join(tries)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."))
        True
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _EXHAUSTED)


def fitting_batch_size(batch_size: int, attempt: Callable[[int], None]) -> int | None:
    """Return the largest of batch_size / 2, / 4, ... for which `attempt` does not run out of memory.

    Returns:
        None if not even one image fits.
    """
    gc.collect()
    size = batch_size // 2
    while size >= 1:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            attempt(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size //= 2
        else:
            return size
    return None


def out_of_memory_error(batch_size: int, fits: int | None, step: int) -> PassError:
    """Return the error that says which batch fits."""
    found = f"out of memory at step {step} with {batch_size} images in a batch"
    if fits is None:
        return PassError(
            f"{found}; not even 1 image fits", hint="train on a machine with more memory, or smaller images"
        )
    return PassError(
        f"{found}; {fits} fit",
        hint=f"set batch_size = {fits}, or --batch-size {fits} (and lower the learning rate with it)",
    )
