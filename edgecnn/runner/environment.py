"""The machine and the software a result was measured with."""

from __future__ import annotations

import os
import platform
import re
import struct
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, FrozenSet, Iterable, Optional

from .sensors import frequencies_mhz, read_text, temperature_c, throttled

ISA_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx_vnni_int8",
    "neon",
    "asimd",
    "asimddp",
    "i8mm",
)
"""CPU flags in Linux spelling that decide which integer kernels run (asimddp is NEON dotprod)."""

CPUINFO = Path("/proc/cpuinfo")
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
EMULATED_FILE = Path("/etc/board/emulated")
EMULATED_VARIABLE = "EDGECNN_EMULATED"
DEVICE_TREE_MODEL = Path("/proc/device-tree/model")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def describe_environment(runtime_versions: Optional[Dict[str, str]] = None) -> Dict[str, Any]:
    """Return a JSON-ready description of machine, system and software.

    Args:
        runtime_versions: inference runtimes in use, by name.
    """
    cpuinfo = read_text(CPUINFO)
    flags = cpu_flags(cpuinfo)
    return {
        "cpu": cpu_name(cpuinfo),
        "num_cores": os.cpu_count(),
        "num_usable_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "isa": isa_name(platform.machine(), flags, struct.calcsize("P") * 8),
        "cpu_flags": [flag for flag in ISA_FLAGS if flag in flags],
        "machine": platform.machine(),
        "system": platform.system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": package_version("numpy"),
        "runtimes": dict(runtime_versions or {}),
        "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "governor": read_text(GOVERNOR).strip() or None,
        "frequencies_mhz": frequencies_mhz(),
        "temperature_c": temperature_c(),
        "throttled": throttled(),
        "board": board_name(cpuinfo),
        "emulated": is_emulated(cpuinfo),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def local_isa() -> str:
    """Return this machine's `isa_name`."""
    return isa_name(platform.machine(), cpu_flags(read_text(CPUINFO)), struct.calcsize("P") * 8)


def isa_name(machine: str, flags: Iterable[str], pointer_bits: int = 64) -> str:
    """Name the instruction set as far as int8 kernels care.

    Args:
        machine: `platform.machine()`.
        flags: CPU flags as /proc/cpuinfo spells them.
        pointer_bits: of the running Python; 32 on a 64-bit ARM kernel means 32-bit software.

    Returns:
        "x86-64", "x86-64-vnni", "aarch64", "aarch64-dotprod", "armv7l", or the machine's own name.

    Example:
        >>> isa_name("x86_64", ["avx2", "avx512_vnni"]), isa_name("aarch64", ["asimd"])
        ('x86-64-vnni', 'aarch64')
        >>> isa_name("aarch64", ["asimd"], pointer_bits=32)
        'armv7l'
    """
    present: FrozenSet[str] = frozenset(flags)
    name = machine.lower()
    if name in ("x86_64", "amd64"):
        return "x86-64-vnni" if present & {"avx512_vnni", "avx_vnni"} else "x86-64"
    if name in ("aarch64", "arm64"):
        if pointer_bits == 32:
            return "armv7l"
        apple = name == "arm64" and sys.platform == "darwin"  # every Apple core has dotprod
        return "aarch64-dotprod" if apple or "asimddp" in present else "aarch64"
    return "armv7l" if name.startswith("armv7") else name


def cpu_flags(cpuinfo: str) -> FrozenSet[str]:
    r"""Return the flags of the first core in the text of /proc/cpuinfo ("flags" on x86, "Features" on ARM).

    Example:
        >>> sorted(cpu_flags("processor : 0\nFeatures : asimd asimddp\n"))
        ['asimd', 'asimddp']
    """
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return frozenset(match.group(1).split()) if match else frozenset()


def cpu_name(cpuinfo: str) -> str:
    r"""Return the CPU's name: x86 "model name", an ARM board's "Model", else what the platform says.

    Example:
        >>> cpu_name("processor : 0\nmodel name : AMD EPYC\n")
        'AMD EPYC'
    """
    for key in ("model name", "Model", "Hardware"):
        match = re.search(rf"^{key}\s*:(.*)$", cpuinfo, re.MULTILINE)
        if match and match.group(1).strip():
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def board_name(cpuinfo: str) -> Optional[str]:
    r"""Return a board's own name, from the device tree, else from /proc/cpuinfo; None on a PC.

    Example:
        >>> board_name("processor : 0\nModel : Raspberry Pi 5 Model B Rev 1.0\n")
        'Raspberry Pi 5 Model B Rev 1.0'
    """
    model = read_text(DEVICE_TREE_MODEL).strip("\0 \n")
    match = re.search(r"^Model\s*:(.*)$", cpuinfo, re.MULTILINE)
    return model or (match.group(1).strip() if match else "") or None


def is_emulated(cpuinfo: str) -> bool:
    """Tell whether an emulator runs this process, so that its times say nothing about a board.

    A file on the board, QEMU in /proc/cpuinfo, or the variable EDGECNN_EMULATED says so, unless that is "0".
    """
    variable = os.environ.get(EMULATED_VARIABLE, "")
    return variable not in ("", "0") or EMULATED_FILE.exists() or "QEMU" in cpuinfo


def package_version(package: str) -> Optional[str]:
    """Return an installed package's version without importing it; None when it is not there."""
    module = sys.modules.get(package)
    version = getattr(module, "__version__", None)
    if version is not None:
        return str(version)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def peak_rss_bytes() -> Optional[int]:
    """Return the peak resident memory of this process (VmHWM), or None where it cannot be read.

    VmHWM starts afresh at exec, while `ru_maxrss` can report the parent's peak.
    """
    return _status_bytes("VmHWM")


def rss_bytes() -> Optional[int]:
    """Return the resident memory of this process now (VmRSS), or None where it cannot be read."""
    return _status_bytes("VmRSS")


def reset_peak_rss() -> bool:
    """Set VmHWM back to VmRSS, and tell whether the kernel allowed it."""
    try:
        CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> Optional[int]:
    match = re.search(rf"^{key}:\s*(\d+)\s*kB", read_text(STATUS), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None
