"""What makes a latency untrustworthy, said by the run itself.

    share = CPU seconds / wall seconds of the timed blocks

One thread that has its core to itself has a share of 1; a lower one means that the process waited, since
nothing in the timed region sleeps. Several threads wait for each other between operators, so half of them
busy counts as undisturbed.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any, Dict, List, Optional

from .sensors import Sample, throttling

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

MAX_DRIFT = 1.05
MIN_SHARE_ONE_THREAD = 0.9
MIN_SHARE_PER_THREAD = 0.5
MAX_SWITCHES_PER_SECOND = 50.0
MIN_WALL_SECONDS = 0.05
"""Below this, clock ticks are too coarse for a share."""

CLOCK_TOLERANCE_S = 0.1
CLOCK_TOLERANCE = 0.001
"""A clock that is being slewed by NTP runs up to 0.05 % off; a jump is more."""


@dataclass
class CpuUse:
    """Processor time of one artifact's timed blocks, summed.

    Attributes:
        user_s: CPU seconds in user mode, all threads.
        system_s: CPU seconds in the kernel.
        wall_s: seconds by the clock.
        involuntary_switches: times a thread was put aside for another, None where not counted.
    """

    user_s: float = 0.0
    system_s: float = 0.0
    wall_s: float = 0.0
    involuntary_switches: Optional[int] = None

    @property
    def share(self) -> float:
        """CPU seconds by wall seconds."""
        return (self.user_s + self.system_s) / max(self.wall_s, 1e-9)

    def to_dict(self) -> Dict[str, Any]:
        """Return the `cpu` entry of a result."""
        return {
            "user_s": self.user_s,
            "system_s": self.system_s,
            "wall_s": self.wall_s,
            "involuntary_switches": self.involuntary_switches,
        }

    def add_since(self, earlier: "CpuUse") -> None:
        """Add what this process used since `earlier`, which is a `now`."""
        later = CpuUse.now()
        self.user_s += later.user_s - earlier.user_s
        self.system_s += later.system_s - earlier.system_s
        self.wall_s += later.wall_s - earlier.wall_s
        if later.involuntary_switches is not None and earlier.involuntary_switches is not None:
            switches = later.involuntary_switches - earlier.involuntary_switches
            self.involuntary_switches = (self.involuntary_switches or 0) + switches

    @classmethod
    def now(cls) -> "CpuUse":
        """Return the process's use so far, wall_s on the monotonic clock."""
        if resource is None:
            times = os.times()
            return cls(times.user, times.system, time.perf_counter())
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return cls(usage.ru_utime, usage.ru_stime, time.perf_counter(), usage.ru_nivcsw)


@dataclass(frozen=True)
class Clocks:
    """The clocks and the load at one moment; two of them enclose a run.

    Latencies are differences of the monotonic clock, which neither jumps nor counts while a machine sleeps.

    Attributes:
        monotonic_s: seconds awake.
        wall_s: the time of day, which people and NTP set.
        load_average: processes that run or want to, None where not known.
        boot_s: seconds since boot, asleep ones too; None where there is no such clock.
    """

    monotonic_s: float
    wall_s: float
    load_average: Optional[float]
    boot_s: Optional[float] = None

    @classmethod
    def now(cls) -> "Clocks":
        """Read them."""
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        boot_s = time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else None
        return cls(time.monotonic(), time.time(), load, boot_s)


def suspend_taint(before: Clocks, after: Clocks) -> Optional[str]:
    """Say for how long the machine slept during a run; None if it did not, or that is not known.

    Its processor wakes up cold, in temperature and caches, though no latency counts the sleep.

    Example:
        >>> suspend_taint(Clocks(0.0, 100.0, None, 50.0), Clocks(2.0, 132.0, None, 82.0))
        'suspended: the machine slept for 30.0 s during the run'
    """
    asleep_s = _asleep_s(before, after)
    if asleep_s <= CLOCK_TOLERANCE_S:
        return None
    return f"suspended: the machine slept for {asleep_s:.1f} s during the run"


def clock_taint(before: Clocks, after: Clocks) -> Optional[str]:
    """Say by how much the wall clock jumped during a run, beyond a sleep; None if it did not.

    Example:
        >>> clock_taint(Clocks(0.0, 100.0, None), Clocks(2.0, 107.0, None))
        'clock jumped: it moved by +5.00 s against the monotonic clock in 2.0 s'
    """
    elapsed = after.monotonic_s - before.monotonic_s
    asleep_s = _asleep_s(before, after)
    jump = (after.wall_s - before.wall_s) - elapsed - asleep_s
    if abs(jump) <= CLOCK_TOLERANCE_S + CLOCK_TOLERANCE * (elapsed + asleep_s):
        return None
    return f"clock jumped: it moved by {jump:+.2f} s against the monotonic clock in {elapsed:.1f} s"


def _asleep_s(before: Clocks, after: Clocks) -> float:
    """Return the seconds between two moments that only the clock since boot counted."""
    if before.boot_s is None or after.boot_s is None:
        return 0.0
    return max(0.0, (after.boot_s - before.boot_s) - (after.monotonic_s - before.monotonic_s))


def load_taint(before: Clocks, num_cores: int) -> Optional[str]:
    """Say that more was running than the machine has cores for when the run began; None if not.

    Example:
        >>> load_taint(Clocks(0.0, 0.0, 5.0), 4)
        'shared CPU: load average 5.0 on 4 cores before the run'
    """
    if before.load_average is None or before.load_average <= num_cores + 0.5:
        return None
    return f"shared CPU: load average {before.load_average:.1f} on {num_cores} cores before the run"


def cpu_taints(use: CpuUse, threads: int) -> List[str]:
    """Say that other processes took the CPU during the timed blocks.

    Example:
        >>> cpu_taints(CpuUse(0.5, 0.0, 1.0, 0), 1)
        ['shared CPU: 0.50 CPU seconds per second with 1 thread, at least 0.90 expected']
        >>> cpu_taints(CpuUse(1.0, 0.0, 1.0, 3), 1)
        []
    """
    if use.wall_s < MIN_WALL_SECONDS:
        return []
    found = []
    least = (
        MIN_SHARE_ONE_THREAD if threads == 1 else max(MIN_SHARE_ONE_THREAD, MIN_SHARE_PER_THREAD * threads)
    )
    if use.share < least:
        unit = "thread" if threads == 1 else "threads"
        found.append(
            f"shared CPU: {use.share:.2f} CPU seconds per second with {threads} {unit}, "
            f"at least {least:.2f} expected"
        )
    rate = (use.involuntary_switches or 0) / use.wall_s
    if rate > MAX_SWITCHES_PER_SECOND * threads:
        found.append(f"shared CPU: {rate:.0f} involuntary context switches per second")
    return found


def drift_taint(drift: Optional[float]) -> Optional[str]:
    """Say that the last quarter of the runs was over 5 % slower than the first; None if not.

    Example:
        >>> drift_taint(1.2), drift_taint(1.01)
        ('drifted: the last quarter of the runs is 1.20 times as slow as the first', None)
    """
    if drift is None or drift <= MAX_DRIFT:
        return None
    return f"drifted: the last quarter of the runs is {drift:.2f} times as slow as the first"


def throttle_taint(samples: List[Sample]) -> Optional[str]:
    """Say what throttled the processor during the run; None if nothing did."""
    found = throttling(samples)
    return f"throttled: {', '.join(found)}" if found else None
