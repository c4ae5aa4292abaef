"""Device profiles: what a machine is, how to reach it and what its runtimes read, as TOML.

A profile is looked up as a path, then in ./devices, then in the copy that comes with edgecnn.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgecnn.devices.capability import max_ir_version_for, max_opset_for
from edgecnn.errors import DeviceError
from edgecnn.runner.environment import local_isa

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHOICES = {
    "transport": ("local", "ssh", "adb"),
    "runtime": ("onnxruntime", "litert", "torch"),
    "isa": ("auto", "x86-64", "x86-64-vnni", "aarch64", "aarch64-dotprod", "armv7l"),
}

PATTERNS = {
    "name": (re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*"), "letters, digits, '_', '-' and '.'"),
    "host": (
        re.compile(r"(?:[A-Za-z0-9_.:\[][A-Za-z0-9_.@:%\[\]+-]*)?"),
        "an ssh alias, user@host or a serial: no spaces, no characters that mean something to a shell",
    ),
    "python": (
        re.compile(r"(?:[\w./+][\w./+@:, -]*)?"),
        "the path of an interpreter: no arguments, no characters that mean something to a shell",
    ),
    "workdir": (
        re.compile(r"(?:[\w./+][\w./+@:, -]*)?"),
        "the path of a folder on the device, relative to home: no characters that mean something to a shell",
    ),
}
"""What reaches a command line on this machine or the device; each is quoted there all the same."""

HOST_PATHS = ("ssh_config", "benchmark_model")
"""Paths on this machine; relative ones start at the profile's folder."""

REQUIRED = ("name", "transport", "runtime", "isa")


@dataclass(frozen=True)
class KnownBad:
    """Versions of a package that do not work on a device.

    Attributes:
        package: as pip names it.
        versions: a version specifier, ">=2" for instance; "any" when no version works.
        reason: what goes wrong.
    """

    package: str
    versions: str
    reason: str


@dataclass(frozen=True)
class Device:
    """A machine to run networks on.

    Attributes:
        name: of the profile.
        transport: "local", "ssh" or "adb".
        runtime: the runtime to prefer, "onnxruntime", "litert" or "torch".
        isa: "x86-64", "x86-64-vnni", "aarch64", "aarch64-dotprod" or "armv7l"; "auto" in a file is replaced
            by this machine's own.
        host: ssh host or alias, or adb serial; empty when the user must say it.
        ssh_config: path of an ssh configuration file, or empty.
        python: interpreter on the device; empty when it has none.
        workdir: folder on the device for files in transit; empty for a temporary one.
        provider: execution provider, "cpu" or one that the runtime has.
        threads: threads for latency.
        benchmark_model: path on this machine of TensorFlow Lite's tool, for a device without Python.
        description: one line.
        ram_mb: memory in MiB, None when unknown.
        runtimes: newest version known to install, by package.
        known_bad: versions that do not work there.
    """

    name: str
    transport: str
    runtime: str
    isa: str
    host: str = ""
    ssh_config: str = ""
    python: str = "python3"
    workdir: str = ""
    provider: str = "cpu"
    threads: int = 1
    benchmark_model: str = ""
    description: str = ""
    ram_mb: int | None = None
    runtimes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    known_bad: tuple[KnownBad, ...] = ()

    @property
    def max_opset(self) -> int | None:
        """Newest ONNX opset the device's onnxruntime reads; None when it has none."""
        version = self.runtimes.get("onnxruntime")
        return None if version is None else max_opset_for(version)

    @property
    def max_ir_version(self) -> int | None:
        """Newest ONNX IR version the device's onnxruntime reads; None when it has none."""
        version = self.runtimes.get("onnxruntime")
        return None if version is None else max_ir_version_for(version)


def load_device(name_or_path: str | Path) -> Device:
    """Read a device profile.

    Args:
        name_or_path: a .toml file, or the name of a profile in ./devices or of one that comes with edgecnn.

    Raises:
        DeviceError: if there is no such profile, or it holds an unknown key or a wrong value.

    Example:
        >>> load_device("raspberrypi4").isa
        'aarch64'
    """
    path = _find(name_or_path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceError(f"device profile {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise DeviceError(f"device profile {path} is not TOML: {error}") from error
    return check_profile(values, path)


def list_devices() -> list[str]:
    """Return the names of all profiles in ./devices and of those that come with edgecnn, sorted."""
    names = {path.stem for folder in _folders() for path in folder.glob("*.toml")}
    return sorted(names)


def _folders() -> list[Path]:
    """Folders with profiles: ./devices, the wheel's copy, the checkout's own."""
    package = Path(__file__).resolve().parent.parent
    candidates = [Path("devices"), package / "_devices", package.parent / "devices"]
    return [folder for folder in candidates if folder.is_dir()]


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".toml" or len(path.parts) > 1:
        if path.is_file():
            return path
        raise DeviceError(f"device profile {path} does not exist", hint="give a .toml file or a name")
    for folder in _folders():
        candidate = folder / f"{path}.toml"
        if candidate.is_file():
            return candidate
    known = list_devices()
    near = difflib.get_close_matches(str(path), known, n=1)
    raise DeviceError(
        f"no device profile is named {str(path)!r}, expected one of {', '.join(known)}",
        hint=f"did you mean {near[0]!r}?" if near else "give the path of a .toml file",
    )


def check_profile(values: Mapping[str, Any], path: Path) -> Device:
    """Check what a profile says.

    Args:
        values: as TOML reads them.
        path: of its file, for errors and for paths relative to it.

    Raises:
        DeviceError: for an unknown key, a missing one or a wrong value.
    """
    where = f"device profile {path}"
    known = [entry.name for entry in fields(Device)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise DeviceError(
                f"{where} has the unknown key {key!r}, expected {', '.join(known)}",
                hint=f"did you mean {near[0]!r}?" if near else None,
            )
    for key in REQUIRED:
        if key not in values:
            raise DeviceError(f"{where} has no {key!r}, expected {', '.join(REQUIRED)}")
    checked = {key: _check(key, value, where) for key, value in values.items()}
    if checked["isa"] == "auto":
        if checked["transport"] != "local":
            raise DeviceError(
                f"{where}: isa is 'auto' and transport {checked['transport']!r}, only local knows it"
            )
        checked["isa"] = local_isa()
    for key in HOST_PATHS:
        if checked.get(key):
            checked[key] = str(path.parent.absolute() / Path(checked[key]).expanduser())
    return Device(**checked)


def _check(key: str, value: Any, where: str) -> Any:
    """Check one value by its key and return it in its type."""
    if key in PATTERNS:
        return _check_words(key, value, where)
    if key in ("threads", "ram_mb"):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DeviceError(f"{where}: {key} is {value!r}, expected a whole number of 1 or more")
        return value
    if key == "runtimes":
        if not isinstance(value, dict) or not all(isinstance(version, str) for version in value.values()):
            raise DeviceError(f"{where}: runtimes is {value!r}, expected a table of package = 'version'")
        if "onnxruntime" in value:
            max_opset_for(value["onnxruntime"])
        return MappingProxyType(dict(value))
    if key == "known_bad":
        return _known_bad(value, where)
    if not isinstance(value, str):
        raise DeviceError(f"{where}: {key} is {value!r}, expected text")
    if key in CHOICES and value not in CHOICES[key]:
        near = difflib.get_close_matches(value, CHOICES[key], n=1)
        raise DeviceError(
            f"{where}: {key} is {value!r}, expected one of {', '.join(CHOICES[key])}",
            hint=f"did you mean {near[0]!r}?" if near else None,
        )
    return value


def _check_words(key: str, value: Any, where: str) -> str:
    pattern, expected = PATTERNS[key]
    if not isinstance(value, str):
        raise DeviceError(f"{where}: {key} is {value!r}, expected text")
    if not pattern.fullmatch(value):
        raise DeviceError(f"{where}: {key} is {value!r}, expected {expected}")
    return value


def _known_bad(value: Any, where: str) -> tuple[KnownBad, ...]:
    names = {entry.name for entry in fields(KnownBad)}
    if not isinstance(value, list):
        raise DeviceError(f"{where}: known_bad is {value!r}, expected a list of tables")
    for entry in value:
        if (
            not isinstance(entry, dict)
            or set(entry) != names
            or not all(isinstance(text, str) for text in entry.values())
        ):
            raise DeviceError(
                f"{where}: known_bad holds {entry!r}, expected the texts {', '.join(sorted(names))}"
            )
    return tuple(KnownBad(**entry) for entry in value)
