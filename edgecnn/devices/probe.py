"""What will run on a device, and what to install there.

A small script goes to its Python through stdin; nothing is written there. Each package is imported in a
process of its own, since one built for another CPU dies by an illegal instruction.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from edgecnn.devices.board import check_python
from edgecnn.devices.deploy import open_transport
from edgecnn.devices.profile import Device
from edgecnn.devices.transport import Completed, Transport, run_process
from edgecnn.devices.wheels import install_command
from edgecnn.errors import DeviceError
from edgecnn.runner.environment import cpu_flags, cpu_name, isa_name
from edgecnn.runner.runtimes import numpy_mismatch

TIMEOUT_S = 180.0
MIN_DISK_BYTES = 300 * 2**20
"""For a runtime, numpy and a few models."""

ONNX = ("onnxruntime",)
TFLITE = ("ai-edge-litert", "tflite-runtime")

SCRIPT = r"""
import json, os, platform, shutil, signal, struct, subprocess, sys, sysconfig, tempfile
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
MODULES = [("numpy", "numpy"), ("onnxruntime", "onnxruntime"),
           ("ai-edge-litert", "ai_edge_litert.interpreter"), ("tflite-runtime", "tflite_runtime.interpreter")]
CODE = "import importlib, sys; m = importlib.import_module(sys.argv[1]); " \
       "m = sys.modules[sys.argv[1].split('.')[0]]; v = getattr(m, '__version__', None)\n" \
       "if v is None:\n  from importlib import metadata; v = metadata.version(sys.argv[2])\n" \
       "sys.stdout.write('\\nversion=' + v)"
packages = {}
for name, module in MODULES:
    words = [sys.executable, "-c", CODE, module, name]
    done = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = [text.decode("utf-8", "replace") for text in done.communicate()]
    last = ([line for line in err.splitlines() if line.strip()] or [""])[-1]
    if done.returncode == 0:
        packages[name] = {"version": out.rpartition("version=")[2], "error": None}
    elif done.returncode < 0:
        packages[name] = {"version": None, "error": "killed by signal %d" % -done.returncode}
    elif "ModuleNotFoundError" not in last or module.split(".")[0] not in last:
        packages[name] = {"version": None, "error": last[:300]}
def text(path):
    try:
        with open(path) as stream:
            return stream.read(20000)
    except (OSError, UnicodeError):
        return ""
def ask(code):
    done = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return done.communicate()[0].decode("utf-8", "replace").strip()
accelerated = len(sys.argv) > 2 and sys.argv[2] not in ("", "cpu")
providers = ask("import onnxruntime; print(*onnxruntime.get_available_providers())") if accelerated else ""
gpu = ask("import torch; print(torch.cuda.get_device_name(0))") if accelerated else ""
folder = sys.argv[1] if len(sys.argv) > 1 and os.path.isdir(sys.argv[1]) else tempfile.gettempdir()
managed = os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"))
print(json.dumps({
    "python": platform.python_version(), "machine": platform.machine(), "system": platform.system(),
    "bits": struct.calcsize("P") * 8, "glibc": platform.libc_ver()[1], "cpuinfo": text("/proc/cpuinfo"),
    "os": text("/etc/os-release"), "board": text("/proc/device-tree/model").strip("\0\n") or None,
    "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    "disk_free_bytes": shutil.disk_usage(folder).free, "folder": folder, "packages": packages,
    "providers": providers.split(), "gpu": gpu or None,
    "emulated": os.path.exists("/etc/board/emulated") or "QEMU" in text("/proc/cpuinfo")
    or os.environ.get("EDGECNN_EMULATED", "0") not in ("", "0"),
    "externally_managed": managed and sys.prefix == sys.base_prefix,
}))
"""


@dataclass(frozen=True)
class Package:
    """A package on a device.

    Attributes:
        version: None when it cannot be imported.
        error: why not; None when it can.
    """

    version: str | None
    error: str | None


@dataclass(frozen=True)
class DeviceProbe:
    """What a device said of itself.

    Attributes:
        name: of its profile.
        board: its model, None when unknown.
        cpu: its name.
        isa: as profiles call it.
        machine: of the Python there, "armv7l" for a 32-bit one on a 64-bit kernel.
        system: name and version.
        python: version; empty when it has none.
        glibc: version; empty when unknown.
        ram_bytes: memory.
        disk_free_bytes: in the folder that files will go to.
        emulated: whether an emulator runs it, so that its speed says nothing.
        packages: those found, whether or not they can be imported.
        providers: execution providers of its onnxruntime; asked only when the profile names one.
        gpu: what PyTorch calls it; asked likewise.
        runs: what will run there, in words.
        advice: what to do, in words and commands; empty when all is well.
    """

    name: str
    board: str | None
    cpu: str
    isa: str
    machine: str
    system: str
    python: str
    glibc: str
    ram_bytes: int | None
    disk_free_bytes: int | None
    emulated: bool = False
    packages: Mapping[str, Package] = field(default_factory=dict)
    providers: tuple[str, ...] = ()
    gpu: str | None = None
    runs: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        return asdict(self)


def probe(device: Device, transport: Transport | None = None) -> DeviceProbe:
    """Ask a device what will run there.

    Args:
        device: its profile.
        transport: used instead of the one the profile names; for tests.

    Raises:
        DeviceError: if it cannot be reached, or has no Python (and no benchmark_model instead).
    """
    if device.transport == "local" and transport is None:
        argv = [sys.executable, "-", device.workdir, device.provider]
        return _read(device, run_process(argv, TIMEOUT_S, device.name, SCRIPT.encode()))
    with contextlib.closing(transport or open_transport(device)) as opened:
        if not device.python:
            return _without_python(device, opened)
        check_python(device, opened, minimum=(3, 0))
        argv = [device.python, "-", device.workdir, device.provider]
        return _read(device, opened.run(argv, timeout_s=TIMEOUT_S, stdin=SCRIPT.encode()))


def _read(device: Device, found: Completed) -> DeviceProbe:
    try:
        values = json.loads(found.stdout)
        packages = _without_mismatch({name: Package(**entry) for name, entry in values["packages"].items()})
        cpuinfo, machine = values["cpuinfo"], values["machine"]
        isa = isa_name(machine, cpu_flags(cpuinfo), values["bits"])
        probed = DeviceProbe(
            name=device.name,
            board=values["board"],
            cpu=cpu_name(cpuinfo) if cpuinfo else machine,
            isa=isa,
            machine="armv7l" if isa == "armv7l" else machine,
            system=_system(values["os"]) or values["system"],
            python=values["python"],
            glibc=values["glibc"],
            ram_bytes=values["ram_bytes"],
            disk_free_bytes=values["disk_free_bytes"],
            emulated=bool(values["emulated"]),
            packages=packages,
            providers=tuple(values["providers"]),
            gpu=values["gpu"],
        )
        managed = bool(values["externally_managed"])
    except (ValueError, KeyError, TypeError) as error:
        raise DeviceError(
            f"{device.name} does not answer the probe (exit code {found.exit_code}): "
            f"{found.tail or 'no message'}"
        ) from error
    return _with_advice(probed, device, managed)


def _with_advice(probed: DeviceProbe, device: Device, managed: bool) -> DeviceProbe:
    runs = tuple(
        f"{kind} with {name} {probed.packages[name].version}"
        for kind, names in ((".onnx", ONNX), (".tflite", TFLITE))
        for name in names
        if _works(probed, name)
    )
    values = {entry: getattr(probed, entry) for entry in probed.__dataclass_fields__}
    if probed.gpu:
        runs += (f".pt2 with torch on {probed.gpu}",)
    python = _version(probed.python) or (0, 0)
    if python < (3, 9):
        advice = [f"Python {probed.python} is too old: install 3.9 or newer, set python in the profile"]
        return DeviceProbe(**{**values, "runs": (), "advice": tuple(advice)})
    advice = [*_broken(probed), *_missing(probed, device, python, managed), *_differences(probed, device)]
    if not _works(probed, "numpy"):
        runs = ()
    return DeviceProbe(**{**values, "runs": runs, "advice": tuple(advice)})


def _works(probed: DeviceProbe, name: str) -> bool:
    return name in probed.packages and probed.packages[name].error is None


def _without_mismatch(packages: dict[str, Package]) -> dict[str, Package]:
    """Return the packages, tflite-runtime beside numpy 2 as broken: it imports, and opens no file."""
    found, numpy = packages.get("tflite-runtime"), packages.get("numpy")
    if found is None or numpy is None or found.error is not None:
        return packages
    error = numpy_mismatch("tflite_runtime", found.version, numpy.version)
    return packages if error is None else {**packages, "tflite-runtime": Package(None, error)}


def _broken(probed: DeviceProbe) -> list[str]:
    """Say what is installed and does not work."""
    advice = []
    for name, package in probed.packages.items():
        if package.error is None:
            continue
        reason = package.error
        numpy = probed.packages.get("numpy")
        if reason == "killed by signal 4":
            reason = "illegal instruction: its build is for a newer CPU; install an older version"
        elif name == "tflite-runtime" and numpy and (_version(numpy.version or "") or (0, 0)) >= (2, 0):
            reason = f"it needs numpy 1 and finds {numpy.version}: pip install 'numpy<2'"
        advice.append(f"{name} is installed and does not work: {reason}")
    return advice


def _missing(probed: DeviceProbe, device: Device, python: tuple[int, int], managed: bool) -> list[str]:
    """Say what to install, by the wheels there are."""
    glibc = _version(probed.glibc)
    pip = f"{shlex.quote(device.python or sys.executable)} -m pip install"
    advice, wanted = [], []
    if "numpy" not in probed.packages:
        if probed.machine == "armv7l":
            advice.append("numpy has no wheel for 32-bit ARM on PyPI: sudo apt install python3-numpy")
        else:
            wanted.append("numpy")
    for names, suffix in ((ONNX, ".onnx"), (TFLITE, ".tflite")):
        if any(name in probed.packages for name in names):
            continue
        commands = [install_command(name, probed.machine, python, glibc) for name in names]
        command = next((found for found in commands if found), None)
        if command is None:
            advice.append(
                f"{suffix} files will not run: no wheel of {' or '.join(names)} for Python "
                f"{python[0]}.{python[1]} on {probed.machine}"
                + (f" with glibc {probed.glibc}" if probed.glibc else "")
            )
        else:
            wanted.append(command)
    if wanted and managed:
        advice.append(
            "the system's Python takes no packages (PEP 668): python3 -m venv ~/edgecnn && "
            f"~/edgecnn/bin/pip install {' '.join(wanted)}; then set python in the profile to its bin/python"
        )
    elif wanted:
        advice.append(f"{pip} {' '.join(wanted)}")
    return advice


def _differences(probed: DeviceProbe, device: Device) -> list[str]:
    """Say where the profile is wrong, and where room is short."""
    advice = []
    if probed.isa != device.isa:
        advice.append(
            f"the profile says isa {device.isa}, the device is {probed.isa}: set isa in the profile"
        )
    provider = f"{device.provider}executionprovider"
    if device.provider != "cpu" and provider not in [name.lower() for name in probed.providers]:
        advice.append(
            f"its onnxruntime has no provider {device.provider}: install the build that has it "
            "(CUDA and TensorRT on x86-64: onnxruntime-gpu), or set provider to cpu"
        )
    if device.provider == "cuda" and not probed.gpu:
        advice.append("its PyTorch sees no GPU: install a CUDA build of torch for .pt2 files there")
    if probed.disk_free_bytes is not None and probed.disk_free_bytes < MIN_DISK_BYTES:
        free = probed.disk_free_bytes // 2**20
        advice.append(f"{free} MiB are free where files go: set workdir in the profile to a folder with more")
    known_bad = [bad for bad in device.known_bad if bad.package in probed.packages]
    return advice + [f"{bad.package} {bad.versions} is known not to work: {bad.reason}" for bad in known_bad]


def _without_python(device: Device, transport: Transport) -> DeviceProbe:
    script = "uname -m; cat /proc/cpuinfo 2>/dev/null; true"
    found = transport.run(["sh", "-c", script], timeout_s=TIMEOUT_S)
    machine, _, cpuinfo = found.text.partition("\n")
    tool = bool(device.benchmark_model)
    advice = () if tool else ("there is no Python: set benchmark_model in the profile to the tool's binary",)
    return DeviceProbe(
        name=device.name,
        board=None,
        cpu=cpu_name(cpuinfo) if cpuinfo else machine,
        isa=isa_name(machine, cpu_flags(cpuinfo), 64),
        machine=machine,
        system="Android" if device.transport == "adb" else "",
        python="",
        glibc="",
        ram_bytes=None,
        disk_free_bytes=None,
        runs=(".tflite with benchmark_model, latency only",) if tool else (),
        advice=advice,
    )


def _version(text: str) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", text)
    return None if match is None else (int(match.group(1)), int(match.group(2)))


def _system(os_release: str) -> str:
    match = re.search(r'^PRETTY_NAME="?([^"\n]*)"?', os_release, re.MULTILINE)
    return match.group(1) if match else ""
