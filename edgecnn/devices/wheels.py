"""Which Python packages have wheels where, read off PyPI in November 2026, and what to install from that.

Only Linux on ARM is tabled; elsewhere the newest version is taken to be there.
"""

from __future__ import annotations

from edgecnn.errors import DeviceError

Version = tuple[int, int]

NEWEST: dict[tuple[str, str], dict[Version, str]] = {
    ("onnxruntime", "aarch64"): {
        (3, 9): "1.19.2",
        (3, 10): "1.23.2",
        (3, 11): "1.31.1",
        (3, 12): "1.31.1",
        (3, 13): "1.31.1",
        (3, 14): "1.31.1",
    },
    ("ai-edge-litert", "aarch64"): {
        (3, 9): "2.1.0",
        (3, 10): "2.3.0",
        (3, 11): "2.3.0",
        (3, 12): "2.3.0",
        (3, 13): "2.3.0",
        (3, 14): "2.3.0",
    },
    ("tflite-runtime", "aarch64"): {(3, 9): "2.14.0", (3, 10): "2.14.0", (3, 11): "2.14.0"},
    ("onnxruntime", "armv7l"): {},
    ("ai-edge-litert", "armv7l"): {},
    ("tflite-runtime", "armv7l"): {(3, 9): "2.14.0", (3, 11): "2.14.0"},
}
"""(package, machine) -> Python version -> newest version with a wheel; an empty table: none at all."""

MIN_GLIBC: dict[str, Version] = {
    "onnxruntime": (2, 28),
    "ai-edge-litert": (2, 27),
    "tflite-runtime": (2, 34),
}
"""Of the newest wheels for ARM."""

PACKAGES = ("onnxruntime", "ai-edge-litert", "tflite-runtime")


def wheel_version(package: str, machine: str, python: Version, glibc: Version | None = None) -> str | None:
    """Return the newest version with a wheel, "" where that is not tabled, None where there is no wheel.

    Args:
        package: "onnxruntime", "ai-edge-litert" or "tflite-runtime".
        machine: "aarch64", "armv7l", "x86_64" ...; of the Python there, not of its kernel.
        python: its version.
        glibc: its C library's version; None when unknown.

    Raises:
        DeviceError: for another package.

    Example:
        >>> wheel_version("onnxruntime", "aarch64", (3, 10)), wheel_version("onnxruntime", "armv7l", (3, 11))
        ('1.23.2', None)
        >>> wheel_version("tflite-runtime", "aarch64", (3, 9), glibc=(2, 31)) is None
        True
    """
    if package not in PACKAGES:
        raise DeviceError(f"package is {package!r}, expected one of {', '.join(PACKAGES)}")
    table = NEWEST.get((package, machine))
    if table is None:
        return None if package == "tflite-runtime" and python >= (3, 12) else ""
    if glibc is not None and glibc < MIN_GLIBC[package]:
        return None
    return table.get(python)


def install_command(package: str, machine: str, python: Version, glibc: Version | None = None) -> str | None:
    """Return what to give to `pip install`, or None where there is no wheel.

    tflite-runtime is built against numpy 1, though its metadata does not say so.

    Example:
        >>> install_command("tflite-runtime", "armv7l", (3, 11))
        "'tflite-runtime==2.14.0' 'numpy<2'"
        >>> install_command("ai-edge-litert", "x86_64", (3, 12))
        'ai-edge-litert'
    """
    version = wheel_version(package, machine, python, glibc)
    if version is None:
        return None
    requirement = f"'{package}=={version}'" if version else package
    return f"{requirement} 'numpy<2'" if package == "tflite-runtime" else requirement
