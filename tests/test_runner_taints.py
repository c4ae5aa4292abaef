"""What a run says against itself: throttling, drift, a shared CPU, a clock that jumped."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecnn.runner import sensors, taints
from edgecnn.runner.measure import Limits, Timing, curve, measure
from edgecnn.runner.sensors import Monitor, Sample, throttling
from edgecnn.runner.session import Session
from edgecnn.runner.taints import (
    Clocks,
    CpuUse,
    clock_taint,
    cpu_taints,
    drift_taint,
    load_taint,
    suspend_taint,
    throttle_taint,
)

MS = 1_000_000


class CallSession(Session):
    """A session whose inference is a function."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.path, self.runtime, self.threads = Path("call"), "call", 1
        self.call = call

    def invoke(self) -> None:
        self.call()

    def _bind(self, piece: Any) -> None:
        pass

    def _execute(self) -> None:
        pass

    def _read(self) -> list[Any]:
        return []

    def _release(self) -> None:
        pass


def words(*throttled: str | None) -> list[Sample]:
    return [Sample(float(index), None, None, word) for index, word in enumerate(throttled)]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (words(), []),
        (words(None, None), []),
        (words("0x0", "0x0"), []),
        (words("0x50000", "0x50000"), []),  # since boot, before the run: old
        (words("0x50000", "0xd0000"), ["soft temperature limit"]),  # bit 19 is new
        (words("0x0", "0x50005", "0x50000"), ["under-voltage", "throttled"]),
        (words("0x2", "0x2"), ["frequency capped"]),  # a low bit counts from the first sample on
        (words("0x0", "cooling thermal-cpufreq-0=2", "0x0"), ["cooling thermal-cpufreq-0=2"]),
    ],
)
def test_throttling_by_hand(samples: list[Sample], expected: list[str]) -> None:
    assert throttling(samples) == expected
    assert throttle_taint(samples) == (f"throttled: {', '.join(expected)}" if expected else None)


@pytest.fixture
def vcgencmd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A vcgencmd on PATH that answers get_throttled with the text of a file."""
    answer = tmp_path / "throttled"
    answer.write_text("0x0")
    program = tmp_path / "vcgencmd"
    program.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"get_throttled) echo throttled=$(cat {answer});;\n"
        'measure_temp) echo "temp=48.3\'C";;\n'
        'measure_clock) echo "frequency(48)=1800404000";;\nesac\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sensors, "THERMAL", tmp_path / "none")
    monkeypatch.setattr(sensors, "CPUS", tmp_path / "none")
    yield answer


def test_a_raspberry_pi_that_throttles_in_the_run_is_seen(vcgencmd: Path) -> None:
    monitor = Monitor(interval_s=0.0)
    monitor.sample()
    calls = []

    def infer() -> None:
        calls.append(1)
        if len(calls) > 30:
            vcgencmd.write_text("0x50005")

    measure({"a": CallSession(infer)}, Limits(min_runs=64, min_seconds=0.0), monitor=monitor)
    monitor.sample(force=True)
    first, last = monitor.samples[0], monitor.samples[-1]
    assert first == Sample(first.t_s, 48.3, 1800.404, "0x0")
    assert last.throttled == "0x50005"
    assert throttle_taint(monitor.samples) == "throttled: under-voltage, throttled"
    assert set(monitor.trace()[0]) == {"t_s", "temperature_c", "frequency_mhz", "throttled"}


def test_a_vcgencmd_that_fails_is_no_answer(vcgencmd: Path) -> None:
    (vcgencmd.parent / "vcgencmd").write_text("#!/bin/sh\nexit 1\n")
    assert sensors.throttled() is None
    (vcgencmd.parent / "vcgencmd").write_bytes(b"\x7fELF of another machine")
    assert (sensors.throttled(), sensors.temperature_c(), sensors.arm_clock_mhz()) == (None, None, None)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_sensors_of_a_board_with_sys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors, "THERMAL", tmp_path / "thermal")
    monkeypatch.setattr(sensors, "CPUS", tmp_path / "cpu")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (sensors.throttled(), sensors.temperature_c(), sensors.frequencies_mhz()) == (None, None, None)
    write(tmp_path / "thermal" / "thermal_zone0" / "type", "gpu-thermal\n")
    write(tmp_path / "thermal" / "thermal_zone0" / "temp", "81000\n")
    write(tmp_path / "thermal" / "thermal_zone1" / "type", "cpu-thermal\n")
    write(tmp_path / "thermal" / "thermal_zone1" / "temp", "61500\n")
    write(tmp_path / "thermal" / "thermal_zone2" / "type", "cpu-broken\n")
    write(tmp_path / "thermal" / "cooling_device0" / "type", "pwm-fan\n")
    write(tmp_path / "thermal" / "cooling_device0" / "cur_state", "3\n")
    write(tmp_path / "thermal" / "cooling_device1" / "type", "cpufreq-cpu0\n")
    write(tmp_path / "thermal" / "cooling_device1" / "cur_state", "0\n")
    for index, khz in ((0, 1500000), (10, 600000), (2, 1800000)):
        write(tmp_path / "cpu" / f"cpu{index}" / "cpufreq" / "scaling_cur_freq", f"{khz}\n")
    write(tmp_path / "cpu" / "cpufreq" / "boost", "0\n")
    assert sensors.temperature_c() == 61.5
    assert sensors.frequencies_mhz() == [1500.0, 1800.0, 600.0]
    assert sensors.throttled() == "0x0"  # a fan that turns does not slow anything down
    write(tmp_path / "thermal" / "cooling_device1" / "cur_state", "2\n")
    assert sensors.throttled() == "cooling cpufreq-cpu0=2"


def test_the_monitor_keeps_its_distance() -> None:
    monitor = Monitor(interval_s=60.0)
    assert [monitor.sample(), monitor.sample(), monitor.sample(force=True)] == [True, False, True]
    assert len(monitor.samples) == 2


def test_drift_over_five_percent() -> None:
    assert drift_taint(1.05) is None
    assert drift_taint(0.5) is None
    assert drift_taint(None) is None
    assert drift_taint(1.06) == "drifted: the last quarter of the runs is 1.06 times as slow as the first"


def test_cpu_share_and_switches_by_hand() -> None:
    assert cpu_taints(CpuUse(0.92, 0.0, 1.0, 10), 1) == []
    assert cpu_taints(CpuUse(2.1, 0.0, 1.0, 10), 4) == []  # four threads that wait for each other
    assert cpu_taints(CpuUse(1.0, 0.5, 1.0, 10), 4) == [
        "shared CPU: 1.50 CPU seconds per second with 4 threads, at least 2.00 expected"
    ]
    assert cpu_taints(CpuUse(2.0, 0.0, 2.0, 240), 1) == [
        "shared CPU: 120 involuntary context switches per second"
    ]
    assert cpu_taints(CpuUse(2.0, 0.0, 2.0, None), 1) == []
    assert cpu_taints(CpuUse(0.0, 0.0, 0.01, 0), 1) == []  # too short to tell


def test_load_before_the_run() -> None:
    assert load_taint(Clocks(0, 0, None), 2) is None
    assert load_taint(Clocks(0, 0, 2.4), 2) is None
    assert load_taint(Clocks(0, 0, 3.9), 2) == "shared CPU: load average 3.9 on 2 cores before the run"


@pytest.mark.parametrize(("jump", "tainted"), [(0.0, False), (0.05, False), (3600.0, True), (-2.0, True)])
def test_a_clock_that_jumps(jump: float, tainted: bool) -> None:
    taint = clock_taint(Clocks(10.0, 1000.0, None), Clocks(20.0, 1010.0 + jump, None))
    assert (taint is not None) == tainted
    if taint:
        assert taint.startswith("clock jumped: it moved by ")


def test_ntp_slewing_over_an_hour_is_no_jump() -> None:
    assert clock_taint(Clocks(0.0, 0.0, None), Clocks(3600.0, 3601.8, None)) is None  # 500 ppm


def test_a_process_that_waits_has_a_low_share_and_one_that_works_a_high_one() -> None:
    timings = measure({"a": CallSession(lambda: time.sleep(0.002))}, Limits(min_runs=50, min_seconds=0.1))
    use = timings["a"].cpu
    assert use.wall_s >= 0.1
    assert use.share < 0.5
    assert cpu_taints(use, 1)[0].startswith("shared CPU: ")
    before = CpuUse.now()
    spun = CpuUse()
    while time.process_time() - (before.user_s + before.system_s) < 0.05:
        pass
    spun.add_since(before)
    assert spun.user_s + spun.system_s >= 0.04


def test_without_the_resource_module_switches_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taints, "resource", None)
    use = CpuUse()
    use.add_since(CpuUse.now())
    assert use.to_dict()["involuntary_switches"] is None


def test_a_machine_that_slept_says_so_and_its_clock_did_not_jump() -> None:
    before, after = Clocks(10.0, 1000.0, None, 40.0), Clocks(20.0, 1040.0, None, 80.0)
    assert suspend_taint(before, after) == "suspended: the machine slept for 30.0 s during the run"
    assert clock_taint(before, after) is None
    awake = Clocks(20.0, 1010.0, None, 50.0)
    assert suspend_taint(before, awake) is None
    assert suspend_taint(Clocks(10.0, 1000.0, None), Clocks(20.0, 1040.0, None)) is None
    jumped = clock_taint(before, Clocks(20.0, 1045.0, None, 80.0))
    assert jumped == "clock jumped: it moved by +5.00 s against the monotonic clock in 10.0 s"


def test_latencies_come_from_a_clock_that_cannot_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day goes backwards at every call, and no latency notices."""
    assert time.get_clock_info("perf_counter").monotonic
    assert not time.get_clock_info("perf_counter").adjustable
    days = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(days)))
    before = Clocks.now()
    limits = Limits(min_runs=64, min_seconds=0.01, max_seconds=5)
    timing = measure({"a": CallSession(lambda: time.sleep(0.001))}, limits)["a"]
    samples = np.concatenate([*timing.store.chunks()])
    assert (samples.min() >= MS, samples.max() < 1000 * MS) == (True, True)
    found = clock_taint(before, Clocks.now())
    assert found is not None
    assert found.startswith("clock jumped: it moved by -10")


def test_a_sustained_run_lasts_and_its_curve_is_short() -> None:
    monitor = Monitor(interval_s=0.1)
    started = time.perf_counter()
    limits = Limits(min_runs=1, min_seconds=0.0, max_seconds=0.1, sustained_s=0.6)
    timing = measure({"a": CallSession(lambda: None)}, limits, monitor=monitor)["a"]
    assert 0.6 <= time.perf_counter() - started < 5
    assert sum(map(len, timing.store.chunks())) == timing.num_samples > 2000
    points = curve(timing)
    assert 300 <= len(points) <= 600
    assert sum(point["num_samples"] for point in points) == timing.num_samples
    times = [point["t_s"] for point in points]
    assert times == sorted(times)
    assert times[-1] - times[0] > 0.4
    assert len(monitor.samples) >= 3


def test_a_curve_keeps_every_sample_of_a_short_run() -> None:
    timing = Timing(block_starts_s=[1.0, 2.0])
    for block in ([10, 20], [40]):
        timing.store.append(block)
    points = [(point["t_s"], point["median_ms"] * 1e6) for point in curve(timing)]
    assert points == [(1.0, 10.0), (1.0 + 1e-8, 20.0), (2.0, 40.0)]
    assert curve(Timing()) == []


def test_a_window_of_the_curve_spans_blocks_and_gives_p90_from_64_samples_only() -> None:
    timing = Timing(block_starts_s=[0.0, 10.0])
    timing.store.append([MS] * 40)
    timing.store.append([*range(2 * MS, 3 * MS, MS // 50), 9 * MS])
    (whole,) = curve(timing, max_points=1)
    assert (whole["t_s"], whole["num_samples"], whole["min_ms"], whole["max_ms"]) == (0.0, 91, 1.0, 9.0)
    assert whole["p90_ms"] == 2.82
    halves = curve(timing, max_points=2)
    assert [point["num_samples"] for point in halves] == [46, 45]
    assert [point["p90_ms"] for point in halves] == [None, None]
    assert (halves[0]["t_s"], halves[0]["median_ms"]) == (0.0, 1.0)


def test_the_process_says_that_its_cpu_was_shared(tmp_path: Path) -> None:
    """Two busy processes on the core of a third: each gets about a third of it."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs sched_setaffinity")
    core = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    busy = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {core})

        def spin() -> None:
            end = time.process_time() + 0.002
            while time.process_time() < end:
                pass

        timing = measure({"a": CallSession(spin)}, Limits(min_runs=100, min_seconds=0.5, max_seconds=5))["a"]
    finally:
        os.sched_setaffinity(0, allowed)
        for process in busy:
            process.kill()
            process.wait()
    assert timing.cpu.share < 0.75
    assert any("CPU seconds per second" in taint for taint in cpu_taints(timing.cpu, 1))
