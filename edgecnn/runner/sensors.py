"""Temperature, clock and throttling of the board, from whichever of vcgencmd and /sys there is.

A Raspberry Pi's firmware answers `vcgencmd get_throttled` with bits: 0 under-voltage, 1 frequency capped,
2 throttled, 3 soft temperature limit now; 16 to 19 the same since boot. Elsewhere a CPU cooling device
above state 0 is the sign. Everything here is optional, and None says that it is not known.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

THERMAL = Path("/sys/class/thermal")
CPUS = Path("/sys/devices/system/cpu")
CPU_ZONES = ("cpu", "soc", "x86_pkg_temp", "acpitz")
"""Thermal zones that hold the processor's temperature, by what their type contains."""

COOLING_TYPES = ("cpufreq", "processor")
"""Cooling devices that slow the processor down; a fan does not."""

NOT_THROTTLED = "0x0"
VCGENCMD_SECONDS = 5.0
COST_FACTOR = 10.0

BITS = {
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
}


@dataclass(frozen=True)
class Sample:
    """What the sensors said at one moment.

    Attributes:
        t_s: seconds since the monitor started.
        temperature_c: of the processor.
        frequency_mhz: of the fastest core.
        throttled: the firmware's bits as hexadecimal, or the cooling devices above state 0; "0x0" is none.
    """

    t_s: float
    temperature_c: Optional[float]
    frequency_mhz: Optional[float]
    throttled: Optional[str]


class Monitor:
    """Samples of the sensors, taken when asked: no thread disturbs what is timed.

    Args:
        interval_s: `sample` does nothing within this many seconds after the last one, nor within
            COST_FACTOR times as long as that one took: reading stays a small part of a slow board's run.
    """

    def __init__(self, interval_s: float = 1.0) -> None:
        self.interval_s = interval_s
        self.samples: List[Sample] = []
        self._start = time.perf_counter()
        self._cost_s = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the monitor started."""
        return time.perf_counter() - self._start

    def sample(self, force: bool = False) -> bool:
        """Read the sensors unless that was done a moment ago, and tell whether they were read."""
        now = self.elapsed_s
        pause_s = max(self.interval_s, COST_FACTOR * self._cost_s)
        if self.samples and not force and now - self.samples[-1].t_s < pause_s:
            return False
        clocks = frequencies_mhz()
        clock = arm_clock_mhz()
        fastest = max(clocks) if clocks else None
        reading = Sample(now, temperature_c(), fastest if clock is None else clock, throttled())
        self.samples.append(reading)
        self._cost_s = self.elapsed_s - now
        return True

    def trace(self) -> List[Dict[str, Any]]:
        """Return the samples JSON-ready."""
        return [asdict(sample) for sample in self.samples]


def throttling(samples: List[Sample]) -> List[str]:
    """Say what slowed the processor down during a run.

    Args:
        samples: the first one from before the run; what it says of the time since boot is old.

    Returns:
        Names of the bits set at any sample, or newly since boot, and of active cooling devices.

    Example:
        >>> throttling([Sample(0, None, None, "0x50000"), Sample(1, None, None, "0x50000")])
        []
        >>> throttling([Sample(0, None, None, "0x0"), Sample(1, None, None, "0x40000")])
        ['throttled']
    """
    found: List[str] = []
    words = [word for word in (sample.throttled for sample in samples) if word is not None]
    before = _bits(words[0]) if words else 0
    for word in words:
        bits = _bits(word)
        low = (bits & 0xF) | ((bits & ~before) >> 16 & 0xF)
        names = [name for bit, name in BITS.items() if low >> bit & 1] if bits else []
        if not bits and word != NOT_THROTTLED:
            names = [word]
        found += [name for name in names if name not in found]
    return found


def throttled() -> Optional[str]:
    """Return the throttle flags.

    Returns:
        A Raspberry Pi's bits ("0x50005"); elsewhere "cooling NAME=STATE", "0x0" for none; None if not known.
    """
    match = re.search(r"throttled=(0x[0-9a-fA-F]+)", _vcgencmd("get_throttled"))
    if match:
        return match.group(1)
    states = []
    known = False
    for device in _listed(THERMAL, "cooling_device*"):
        kind = read_text(device / "type").strip()
        if not any(name in kind.lower() for name in COOLING_TYPES):
            continue
        state = _number(device / "cur_state")
        known = known or state is not None
        if state is not None and state > 0:
            states.append(f"{kind}={state:g}")
    if states:
        return "cooling " + ", ".join(states)
    return NOT_THROTTLED if known else None


def temperature_c() -> Optional[float]:
    """Return the processor's temperature in degrees Celsius: the hottest of its zones, else of any zone."""
    zones = [
        (read_text(zone / "type").strip().lower(), _number(zone / "temp"))
        for zone in _listed(THERMAL, "thermal_zone*")
    ]
    known = [(kind, value / 1000.0) for kind, value in zones if value is not None]
    of_cpu = [value for kind, value in known if any(name in kind for name in CPU_ZONES)]
    if known:
        return max(of_cpu or [value for _, value in known])
    match = re.search(r"temp=([0-9.]+)", _vcgencmd("measure_temp"))
    return float(match.group(1)) if match else None


def frequencies_mhz() -> Optional[List[float]]:
    """Return the clock that each core is asked to run at, in MHz, or None where cpufreq is not there."""
    values = [
        _number(cpu / "cpufreq" / "scaling_cur_freq")
        for cpu in sorted(_listed(CPUS, "cpu[0-9]*"), key=lambda path: int(path.name[3:]))
    ]
    known = [value / 1000.0 for value in values if value is not None]
    return known or None


def arm_clock_mhz() -> Optional[float]:
    """Return the clock that a Raspberry Pi's firmware measures, in MHz; None elsewhere."""
    match = re.search(r"frequency\(\d+\)=(\d+)", _vcgencmd("measure_clock", "arm"))
    return int(match.group(1)) / 1e6 if match else None


def read_text(path: Path) -> str:
    """Return a file's text, empty when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _bits(word: str) -> int:
    return int(word, 16) if word.startswith("0x") else 0


def _listed(folder: Path, pattern: str) -> List[Path]:
    return sorted(folder.glob(pattern)) if folder.is_dir() else []


def _number(path: Path) -> Optional[float]:
    try:
        return float(read_text(path))
    except ValueError:
        return None


def _vcgencmd(*arguments: str) -> str:
    command = shutil.which("vcgencmd")
    if command is None:
        return ""
    try:
        done = subprocess.run(
            [command, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=VCGENCMD_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")
