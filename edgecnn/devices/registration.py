"""Writing a device profile, from one that is there or from what the device says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgecnn.devices.probe import DeviceProbe, probe
from edgecnn.devices.profile import Device, check_profile, load_device
from edgecnn.errors import OutputError

COPIED = ("transport", "python", "workdir", "runtime", "provider", "threads", "isa", "ram_mb", "description")
"""Keys that a profile takes from the one it is like, in the order they are written."""

ORDER = ("name", "description", "transport", "host", "ssh_config", "benchmark_model", *COPIED[1:-1])


def add_device(
    name: str, values: Mapping[str, Any], like: str | None = None, force: bool = False
) -> tuple[Path, DeviceProbe | None]:
    """Write ./devices/NAME.toml.

    Args:
        name: of the profile.
        values: its keys, `host` among them.
        like: a profile to take the other keys from; a shipped one of the same name counts by itself.
        force: replace a file that is there.

    Returns:
        (the file, what the device said of itself or None if it was not asked).

    Raises:
        DeviceError: if a value is wrong, or the device was to be asked and cannot be.
        OutputError: if the file is there, or cannot be written.
    """
    path = Path("devices") / f"{name}.toml"
    if path.exists() and not force:
        raise OutputError(f"{path} exists already", hint="use --force to replace it")
    complete: dict[str, Any] = {"transport": "ssh", "runtime": "litert", **values, "name": name}
    found = None
    if like is not None:
        base = load_device(like)
        complete = {**complete, **_copied(base), **values, "name": name}
    elif "isa" not in complete:
        if complete["transport"] == "adb":
            complete = {"python": "", "workdir": "/data/local/tmp", **complete}
        asked = check_profile({**complete, "isa": "aarch64"}, path)
        found = probe(asked)
        complete |= {"isa": found.isa}
        if found.ram_bytes is not None:
            complete |= {"ram_mb": found.ram_bytes // 2**20}
        if "runtime" not in values and found.runs:
            complete["runtime"] = "litert" if any(".tflite" in run for run in found.runs) else "onnxruntime"
    device = check_profile(complete, path)
    _write(path, profile_text(complete, device))
    return path, found


def profile_text(values: Mapping[str, Any], device: Device) -> str:
    """Return a profile as TOML.

    Args:
        values: the keys to write.
        device: the same, checked; for its tables.

    Example:
        >>> values = {"name": "b", "transport": "ssh", "host": "pi@b", "runtime": "litert", "isa": "armv7l"}
        >>> device = check_profile(values, Path("b.toml"))
        >>> print(profile_text(values, device), end="")
        name = "b"
        transport = "ssh"
        host = "pi@b"
        runtime = "litert"
        isa = "armv7l"
    """
    lines = [f"{key} = {_toml(values[key])}" for key in ORDER if key in values]
    if device.runtimes:
        lines += ["", "[runtimes]", *(f"{key} = {_toml(value)}" for key, value in device.runtimes.items())]
    for bad in device.known_bad:
        lines += ["", "[[known_bad]]"]
        lines += [f"{key} = {_toml(getattr(bad, key))}" for key in ("package", "versions", "reason")]
    return "\n".join(lines) + "\n"


def _copied(base: Device) -> dict[str, Any]:
    values = {key: getattr(base, key) for key in COPIED}
    known_bad = [{"package": b.package, "versions": b.versions, "reason": b.reason} for b in base.known_bad]
    kept = {key: value for key, value in values.items() if value is not None}
    return {**kept, "runtimes": dict(base.runtimes), "known_bad": known_bad}


def _toml(value: str | int) -> str:
    return str(value) if isinstance(value, int) else json.dumps(value, ensure_ascii=False)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
