"""The task "probe": what this machine can run, found without risk.

Each runtime is imported in a process of its own, so that one built for another processor dies there and is
reported. Nothing here needs NumPy.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib import util
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from .environment import describe_environment, package_version
from .request import Request
from .runtimes import INSTALL_HINTS, MODULES, NUMPY_1_HINT, numpy_mismatch
from .sensors import read_text

IMPORT_TIMEOUT_S = 180.0
MEMINFO = Path("/proc/meminfo")

CHILD = """
import importlib, json, sys
sys.path[:0] = json.loads(sys.argv[2])
module = importlib.import_module(sys.argv[1])
found = {"providers": None}
if sys.argv[1] == "onnxruntime":
    found["providers"] = module.get_available_providers()
if sys.argv[1] == "torch":
    found["providers"] = ["cpu"] + (["cuda"] if module.cuda.is_available() else [])
sys.stdout.write("\\n" + json.dumps(found) + "\\n")
"""


def run_probe(request: Request) -> Dict[str, Any]:
    """Try every runtime of the request, and describe the machine.

    Returns:
        What the task adds to a result: `python` (executable and version); `numpy` and `runtimes` by name, as
        `probe_modules` has it; `memory_total_bytes`,
        `memory_available_bytes`, `disk_free_bytes` (of the temporary folder and the working one),
        `warnings` and `environment`.
    """
    runtimes = {name: probe_runtime(name) for name in request.runtimes}
    numpy = probe_modules(("numpy",), "pip install numpy")
    for entry in runtimes.values():
        mismatch = numpy_mismatch(entry["package"], entry["version"], numpy["version"])
        if entry["available"] and mismatch is not None:  # it imports, and fails at the first model
            entry.update(available=False, broken=True, error=mismatch, hint=NUMPY_1_HINT)
    warnings = [f"{entry['error']}" for entry in [numpy, *runtimes.values()] if entry["broken"]]
    if not numpy["available"] and not numpy["broken"]:
        warnings.append("numpy is not installed, and nothing runs without it")
    memory = read_text(MEMINFO)
    versions = {name: str(entry["version"]) for name, entry in runtimes.items() if entry["available"]}
    return {
        "python": {"executable": sys.executable, "version": ".".join(map(str, sys.version_info[:3]))},
        "numpy": numpy,
        "runtimes": runtimes,
        "memory_total_bytes": _meminfo(memory, "MemTotal"),
        "memory_available_bytes": _meminfo(memory, "MemAvailable"),
        "disk_free_bytes": {
            "temporary": shutil.disk_usage(tempfile.gettempdir()).free,
            "working": shutil.disk_usage(Path.cwd()).free,
        },
        "warnings": warnings,
        "environment": describe_environment(versions),
    }


def probe_runtime(name: str) -> Dict[str, Any]:
    """Import a runtime's packages in order, each in a process of its own, until one succeeds."""
    return probe_modules(MODULES[name], INSTALL_HINTS[name])


def probe_modules(modules: Tuple[str, ...], hint: str) -> Dict[str, Any]:
    """Import modules in order, each in a process of its own, until one succeeds.

    Returns:
        `available`, `package` and `version` of the one that did (or of the first that failed), `providers`,
        `error`, `hint`, and `broken`: something is installed and cannot be imported.
    """
    errors: List[str] = []
    first: Optional[Tuple[str, Optional[str]]] = None
    for module in modules:
        package = module.split(".")[0]
        if util.find_spec(package) is None:
            continue
        version = package_version(package.replace("_", "-"))
        first = first or (package, version)
        found, error = _import_in_child(module)
        if found is not None:
            return {
                "available": True,
                "package": package,
                "version": version,
                "providers": found["providers"],
                "error": "; ".join(errors) or None,
                "hint": None,
                "broken": bool(errors),
            }
        errors.append(f"{package} {version or '(unknown version)'} {error}")
    package, version = first or (modules[0].split(".")[0], None)
    return {
        "available": False,
        "package": package,
        "version": version,
        "providers": None,
        "error": "; ".join(errors) or f"not installed: tried {', '.join(modules)}",
        "hint": hint,
        "broken": bool(errors),
    }


def describe_exit(exit_code: int, stderr: str) -> str:
    r"""Say how an import ended that did not succeed.

    Example:
        >>> describe_exit(-4, ""), describe_exit(1, "Traceback\nImportError: no libfoo.so\n")
        ('dies with SIGILL while it is imported', 'cannot be imported: ImportError: no libfoo.so')
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if exit_code < 0 or exit_code > 128:
        number = -exit_code if exit_code < 0 else exit_code - 128
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return f"dies with {name} while it is imported"
    return f"cannot be imported: {lines[-1][:300] if lines else f'exit code {exit_code}'}"


def _import_in_child(module: str) -> Tuple[Optional[Dict[str, Any]], str]:
    command = [sys.executable, "-c", CHILD, module, json.dumps([path for path in sys.path if path])]
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=IMPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"was not imported within {IMPORT_TIMEOUT_S:g} s"
    if done.returncode != 0:
        return None, describe_exit(done.returncode, done.stderr.decode("utf-8", "replace"))
    last = done.stdout.decode("utf-8", "replace").strip().splitlines()[-1]
    found: Dict[str, Any] = json.loads(last)
    return found, ""


def _meminfo(text: str, key: str) -> Optional[int]:
    match = re.search(rf"^{key}:\s*(\d+)\s*kB", text, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None
