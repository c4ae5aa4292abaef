"""The errors edgecnn raises on purpose.

EdgeCNNError                    exit code 1; one line that says what was found and expected, and a hint
|-- LoadError                   a model file or spec that cannot become a Model
|   |-- UntrustedPickleError    the file wants to run code, and --trust was not given
|   `-- StateDictMismatchError  keys or shapes do not fit the architecture
|-- DataError                   images, labels or a data source that cannot be used
|-- RecipeError                 a recipe with an unknown key or a value out of range
|-- PassError                   a pass whose requirement or promise does not hold
|-- UnsupportedOpError          an operator that has no lowering (names layer and op)
|-- ExportError                 a file format that cannot hold the network
|-- ParityError                 two executions that should give the same integers do not
|-- RunnerError                 a runtime that failed on a model
|-- DeviceError                 a device profile or a board
|-- OutputError                 results that cannot be written (directory, permissions, disk)
|-- MissingDependencyError      an optional package that is not installed
`-- BudgetError                 exit code 3; a budget the user set was missed
"""

from __future__ import annotations


class EdgeCNNError(Exception):
    """Base of every error edgecnn raises on purpose.

    Args:
        message: what was found, what was expected, and where, in one line.
        hint: what the user can do about it.

    Example:
        >>> str(EdgeCNNError("ratio is 1.3, expected 0 <= ratio < 1", hint="use 0.5"))
        'ratio is 1.3, expected 0 <= ratio < 1 (hint: use 0.5)'
    """

    exit_code: int = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Return the message with its hint."""
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message


class LoadError(EdgeCNNError):
    """A model file or model spec that cannot become a Model."""


class UntrustedPickleError(LoadError):
    """A pickle that needs code to load, and the user did not say --trust."""


class StateDictMismatchError(LoadError):
    """A state dict whose keys or shapes do not fit the architecture."""


class DataError(EdgeCNNError):
    """Images, labels or a data source that cannot be used."""


class RecipeError(EdgeCNNError):
    """A recipe with an unknown key or a value out of range."""


class PassError(EdgeCNNError):
    """A pass whose requirement or promise does not hold."""


class UnsupportedOpError(EdgeCNNError):
    """An operator that has no lowering; the message names the layer and the op."""


class ExportError(EdgeCNNError):
    """A file format that cannot hold the network."""


class ParityError(EdgeCNNError):
    """Two executions that should give the same integers do not."""


class RunnerError(EdgeCNNError):
    """A runtime that failed on a model."""


class DeviceError(EdgeCNNError):
    """A device profile or a board that cannot be used."""


class TransportError(DeviceError):
    """A connection to a board that was lost after it had worked; trying once more may help."""


class DeviceTimeoutError(DeviceError):
    """A command on a board that took longer than it was given."""


class OutputError(EdgeCNNError):
    """Results that cannot be written."""


class MissingDependencyError(EdgeCNNError):
    """An optional package that is not installed; the hint names the extra."""


class BudgetError(EdgeCNNError):
    """A budget the user set (accuracy drop, latency, size) was missed.

    Args:
        message: which budget, what was found.
        hint: what the user can do about it.
        result: what the run made all the same (a `CompressResult`), or None.
    """

    exit_code = 3

    def __init__(self, message: str, *, hint: str | None = None, result: object = None) -> None:
        super().__init__(message, hint=hint)
        self.result = result
