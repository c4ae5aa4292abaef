"""One bench on several devices side by side, a thread for each."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from edgecnn.bench import BenchOptions, bench
from edgecnn.devices.profile import Device, load_device
from edgecnn.devices.waiting import Stopped, stopped_by
from edgecnn.errors import DeviceError, EdgeCNNError
from edgecnn.pipeline import Progress, SilentProgress
from edgecnn.report.bench_results import BenchReport


class _Shared:
    """A Progress that several devices write to, each under its name; it ends their work when told to stop.

    Args:
        progress: who is told.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self.stopped = threading.Event()

    def stop(self) -> None:
        """Let every device end now."""
        self.stopped.set()

    def start(self, title: str, total: int | None) -> None:  # noqa: ARG002 - steps overlap, so none is counted
        """Say that a step begins."""
        self.advance()
        with self._lock:
            self._progress.start(title, None)

    def advance(self, n: int = 1) -> None:  # noqa: ARG002
        """Raise Stopped if the work is to end."""
        if self.stopped.is_set():
            raise Stopped("stopped between two steps")

    def finish(self) -> None:
        """Do nothing: another device's step may be the one that is shown."""


def bench_devices(
    paths: Sequence[str | Path],
    devices: Sequence[str | Path | Device],
    *,
    baseline: str | Path | None = None,
    data: Any = None,
    options: BenchOptions | None = None,
    progress: Progress | None = None,
) -> tuple[list[BenchReport], dict[str, EdgeCNNError]]:
    """Measure files on several devices side by side, a thread for each.

    Args:
        paths: as for `bench`.
        devices: profiles, files or Devices; their names differ.
        baseline: as for `bench`.
        data: as for `bench`.
        options: as for `bench`.
        progress: told of each device's steps.

    Returns:
        (the reports in the order of the devices, what the devices without one failed with by name).

    Raises:
        DeviceError: if a profile is wrong or two have the same name.
    """
    profiles = [device if isinstance(device, Device) else load_device(device) for device in devices]
    names = [profile.name for profile in profiles]
    if len(set(names)) < len(names):
        raise DeviceError(f"the devices are named {', '.join(names)}, expected each name once")
    shared = _Shared(progress or SilentProgress())

    def run(profile: Device) -> BenchReport:
        with stopped_by(shared.stopped):
            return bench(
                *paths, device=profile, baseline=baseline, data=data, options=options, progress=shared
            )

    with ThreadPoolExecutor(max_workers=max(1, len(profiles))) as pool:
        futures = {profile.name: pool.submit(run, profile) for profile in profiles}
        try:
            wait(futures.values())
        except BaseException:
            shared.stop()
            raise
    reports: list[BenchReport] = []
    failures: dict[str, EdgeCNNError] = {}
    for name, future in futures.items():
        error = future.exception()
        if isinstance(error, EdgeCNNError):
            failures[name] = error
        else:
            reports.append(future.result())
    return reports, failures
