"""Frozen dataclasses to JSON values and back, checked field by field, with the place in every message."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, TypeVar

from edgecnn.errors import DataError
from edgecnn.report.latencies import Latencies

T = TypeVar("T")


def to_values(value: Any, where: str = "report") -> Any:
    """Return dicts, lists, texts, finite numbers, bools and None.

    Args:
        value: a dataclass, mapping, tuple, list or plain value. A field's metadata may give its "key".
        where: what to call the value in messages.

    Raises:
        DataError: for a number that is not finite, or a value that JSON does not know.
    """
    if isinstance(value, Latencies):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        return {_key(f): to_values(getattr(value, f.name), f"{where}.{_key(f)}") for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_values(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_values(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where} is {value}, expected a finite number or null")
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise DataError(f"{where} is of type {type(value).__name__}, which JSON does not know")


def from_values(kind: type[T], values: Any, where: str = "report") -> T:
    """Build a dataclass from what `to_values` gave.

    Args:
        kind: the dataclass; its annotations say what each field takes. Unknown keys are ignored, so that
            a report with more in it can be read.
        values: as parsed from JSON.
        where: what to call the value in messages.

    Raises:
        DataError: if a field is missing, of another type or out of its range.
    """
    if not isinstance(values, dict):
        raise DataError(f"{where} is {_short(values)}, expected an object")
    hints = typing.get_type_hints(kind)
    found: dict[str, Any] = {}
    for parameter in fields(typing.cast(Any, kind)):
        key = _key(parameter)
        if key in values:
            found[parameter.name] = _check(hints[parameter.name], values[key], f"{where}.{key}")
        elif parameter.default is MISSING and parameter.default_factory is MISSING:
            raise DataError(
                f"{where}.{key} is missing", hint="the file is no report of this edgecnn, or was cut short"
            )
    try:
        return kind(**found)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


def _check(expected: Any, value: Any, where: str) -> Any:
    """Return `value` as `expected`, or raise."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if expected is Latencies:
        try:
            return Latencies.from_json(value)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
    if origin in (typing.Union, types.UnionType):
        kinds = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _check(kinds[0], value, where)
    if origin is dict and isinstance(value, dict):
        return {key: _check(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(_check(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(expected, type) and is_dataclass(expected):
        return from_values(expected, value, where)
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is expected:
        return value
    name = {dict: "an object", tuple: "a list"}.get(
        origin or expected, getattr(expected, "__name__", str(expected))
    )
    raise DataError(f"{where} is {_short(value)}, expected {name}")


def _key(parameter: Field[Any]) -> str:
    """Return the name of a field in JSON."""
    return str(parameter.metadata.get("key", parameter.name))


def _short(value: Any) -> str:
    """Return a value's text, cut to a message's length."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
