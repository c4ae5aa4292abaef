"""The failures the runner reports in its result file instead of a traceback."""

from __future__ import annotations

from typing import Any, Dict, Optional


class RunFailure(Exception):  # noqa: N818 - "Error" names the host's exceptions, this crosses as data
    """Base of every failure the runner reports on purpose.

    Args:
        message: what was found, what was expected, and where, in one line.
        hint: what the user can do about it.

    Example:
        >>> ModelLoadFailure("m.onnx is empty").to_dict()
        {'type': 'ModelLoadFailure', 'message': 'm.onnx is empty', 'hint': None}
    """

    def __init__(self, message: str, hint: Optional[str] = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def to_dict(self) -> Dict[str, Any]:
        """Return the `error` entry of a result file."""
        return {"type": type(self).__name__, "message": self.message, "hint": self.hint}


class RequestFailure(RunFailure):
    """A request with an unknown key, a missing key or a value out of range."""


class MissingRuntimeFailure(RunFailure):
    """An inference runtime or execution provider that is not there; the hint says what to install."""


class ModelLoadFailure(RunFailure):
    """A model file that the runtime does not take."""


class InputFailure(RunFailure):
    """Inputs or labels that do not fit the model."""


class InferenceFailure(RunFailure):
    """A runtime that failed while it ran a loaded model."""


def first_line(error: BaseException, limit: int = 300) -> str:
    r"""Return the first non-empty line of an exception's text, at most `limit` characters.

    Example:
        >>> first_line(ValueError("bad magic\n  at line 3"))
        'bad magic'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
