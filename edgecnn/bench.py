"""The sentence `edgecnn bench`: files -> a device -> latency, comparison, accuracy -> BenchReport.

Several files, or several numbers of threads, are compared in interleaved blocks. Every block is a process of
its own; in each round every entry has one block, and the order turns and mirrors from round to round
(A B, B A, B A, A B, ...), so that a device that warms up does so for all alike:

    r_i = median(baseline block i) / median(candidate block i)        speedup = median(r), 95 % interval
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecnn.bench_files import find_files
from edgecnn.devices.profile import Device, load_device
from edgecnn.errors import RunnerError
from edgecnn.pipeline import Progress, SilentProgress
from edgecnn.report.bench_build import BenchFile, build_comparison, build_run
from edgecnn.report.bench_results import EMULATED, BenchReport, BenchRun, BoardAccuracy, Comparison
from edgecnn.runner.measure import round_order

if TYPE_CHECKING:
    from edgecnn.devices.deploy import Executor

PRESETS = ("mlperf",)
MLPERF_RUNS = 1024
MLPERF_SECONDS = 60.0
START_TIMEOUT_S = 300.0
"""Allowed for importing, loading and warming up, on an emulated board too."""


@dataclass(frozen=True)
class BenchOptions:
    """What `bench` can be told besides files, device and data.

    Attributes:
        threads: numbers of threads inside an operator; empty for the device's own.
        num_runs: timed runs of each file, at least; None for 64, from which a p90 is known.
        seconds: timed seconds of each file, at least; None for 1.
        sustained_s: run each file for so long without a pause, one after the other; None for not.
        preset: "mlperf" for the least its single-stream scenario asks for: 1,024 runs and 60 s; p90 counts.
        profile: also time the operators, in a process of its own.
        half: run torch in half precision, on a GPU.
        cuda_graph: let torch replay one recorded CUDA graph instead of launching each kernel.
        num_blocks: processes of each file when files are compared.
    """

    threads: tuple[int, ...] = ()
    num_runs: int | None = None
    seconds: float | None = None
    sustained_s: float | None = None
    preset: str | None = None
    profile: bool = False
    half: bool = False
    cuda_graph: bool = False
    num_blocks: int = 12

    def check(self) -> None:
        """Check the values.

        Raises:
            RunnerError: naming the option, what was found and what was expected.
        """
        for name, counts in (
            ("threads", self.threads),
            ("num_runs", (self.num_runs,)),
            ("num_blocks", (self.num_blocks,)),
        ):
            for count in counts:
                if count is not None and (isinstance(count, bool) or count < 1):
                    raise RunnerError(f"{name} is {count}, expected 1 or more")
        if len(set(self.threads)) != len(self.threads):
            raise RunnerError(f"threads are {', '.join(map(str, self.threads))}, expected each once")
        for name, seconds in (("seconds", self.seconds), ("sustained", self.sustained_s)):
            if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
                raise RunnerError(f"{name} is {seconds}, expected seconds above 0")
        if self.preset is not None and self.preset not in PRESETS:
            raise RunnerError(f"preset is {self.preset!r}, expected one of {', '.join(PRESETS)}")
        if self.sustained_s is not None and (self.preset or self.num_runs or self.seconds):
            raise RunnerError("sustained runs last as long as they say, without a preset, runs or seconds")

    def limits(self, num_processes: int) -> dict[str, Any]:
        """Return the runner's limits for one of `num_processes` processes that share the work.

        Example:
            >>> BenchOptions(num_runs=50, seconds=2.0).limits(10)
            {'min_runs': 5, 'min_seconds': 0.2, 'max_seconds': 6.0}
        """
        if self.sustained_s is not None:
            seconds = self.sustained_s
            return {"min_runs": 1, "min_seconds": 0.0, "max_seconds": seconds, "sustained_s": seconds}
        mlperf = self.preset == "mlperf"
        runs = self.num_runs or (MLPERF_RUNS if mlperf else 64)
        seconds = self.seconds or (MLPERF_SECONDS if mlperf else 1.0)
        cap = max(60.0 if not mlperf else 10 * MLPERF_SECONDS, 2 * seconds)
        return {
            "min_runs": -(-runs // num_processes),
            "min_seconds": seconds / num_processes,
            "max_seconds": cap / num_processes,
        }

    def switches(self) -> dict[str, bool]:
        """Return the runner's switches that are on."""
        return {name: True for name in ("half", "cuda_graph") if getattr(self, name)}


@dataclass
class _Entry:
    """A file at a number of threads, and what its processes gave so far."""

    file: BenchFile
    key: str
    threads: int
    results: list[Mapping[str, Any]] = field(default_factory=list)
    error: RunnerError | None = None
    profile: Sequence[Mapping[str, Any]] | None = None


def bench(
    *paths: str | Path,
    device: str | Path | Device = "local_cpu",
    baseline: str | Path | None = None,
    data: Any = None,
    options: BenchOptions | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure files on a device.

    Args:
        paths: .onnx and .tflite files, or folders that `compress` wrote.
        device: a profile's name, a .toml file or a Device.
        baseline: the file that the others are compared with; None for the first.
        data: images for the accuracy on the device, whatever `edgecnn.data.open_dataset` takes; then each
            file needs its sidecar.
        options: everything else.
        progress: told how far it is.

    Returns:
        The report; a file that did not run there has a run with an error and no number.

    Raises:
        LoadError: if a file is missing or is no artifact.
        DataError: if the data do not fit the files.
        DeviceError: if the device cannot be used.
        RunnerError: if no file ran at all.
    """
    options = options or BenchOptions()
    options.check()
    progress = progress or SilentProgress()
    files = find_files(paths, baseline)
    profile = device if isinstance(device, Device) else load_device(device)
    tasks = _open_data(files, data)
    from edgecnn.devices.deploy import open_executor

    warnings: list[str] = []
    with open_executor(profile) as executor:
        entries, environment = _measure(executor, files, options, progress, warnings)
        accuracy = _accuracy(executor, files, tasks, progress, entries)
    if all(entry.error is not None for entry in entries):
        raise _nothing_ran([entry.error for entry in entries if entry.error], profile, device)
    runs = tuple(
        build_run(e.file, e.key, e.threads, e.results, None if e.error is None else str(e.error), e.profile)
        for e in entries
    )
    emulated = bool(environment.get("emulated"))
    warnings += [*_said(runs, accuracy), *_unmet(runs, options)]
    return BenchReport(
        device=profile.name,
        environment=environment,
        runs=runs,
        comparisons=() if options.sustained_s else tuple(_comparisons(entries, runs)),
        accuracy=accuracy,
        warnings=tuple(dict.fromkeys([EMULATED] * emulated + warnings)),
        emulated=emulated,
        baseline=None if baseline is None else files[0].key,
        data=None if data is None else str(data) if isinstance(data, (str, Path)) else type(data).__name__,
    )


def _nothing_ran(errors: Sequence[RunnerError], profile: Device, device: str | Path | Device) -> RunnerError:
    """Return the error for a device on which no file ran: each reason once, and what to do."""
    reasons = dict.fromkeys(error.message.removeprefix(f"{profile.name}: ") for error in errors)
    hints = dict.fromkeys(error.hint for error in errors if error.hint)
    probe = profile.name if isinstance(device, Device) else device
    asked = () if profile.transport == "local" else (f"`edgecnn devices probe {probe}` says what runs there",)
    return RunnerError(
        f"nothing ran on {profile.name}: {'; '.join(reasons)}", hint="; ".join([*hints, *asked]) or None
    )


def _measure(
    executor: Executor,
    files: Sequence[BenchFile],
    options: BenchOptions,
    progress: Progress,
    warnings: list[str],
) -> tuple[list[_Entry], dict[str, Any]]:
    """Run every block of every entry; return them with the device's environment."""
    counts = options.threads or (executor.device.threads,)
    entries = [
        _Entry(file, file.key if len(counts) == 1 else f"{file.key}@{threads}", threads)
        for threads in counts
        for file in files
    ]
    single = len(entries) == 1 or options.sustained_s is not None
    num_rounds = 1 if single else options.num_blocks
    limits = {**options.limits(num_rounds), **options.switches()}
    by_key = {entry.key: entry for entry in entries}
    environment: dict[str, Any] = {}
    progress.start(f"latency on {executor.device.name}", num_rounds * len(entries))
    for round_index in range(num_rounds):
        for key in round_order(list(by_key), round_index):
            entry = by_key[key]
            if entry.error is None:
                _run_block(executor, entry, limits, environment, warnings)
            progress.advance()
    progress.finish()
    if options.sustained_s is not None and len(entries) > 1:
        warnings.append("sustained runs went one after the other, so no ratio is given")
    if options.profile:
        progress.start(f"operators on {executor.device.name}", len(entries))
        for entry in entries:
            if entry.error is None:
                _profile(executor, entry, options, warnings)
            progress.advance()
        progress.finish()
    return entries, environment


def _request(device: Device, entry: _Entry, limits: Mapping[str, Any]) -> dict[str, Any]:
    """Return the runner's request for one process."""
    return {
        "task": "latency",
        "artifacts": [{"key": "file", "path": str(entry.file.path)}],
        "threads": entry.threads,
        "provider": device.provider,
        **limits,
    }


def _run_block(
    executor: Executor,
    entry: _Entry,
    limits: Mapping[str, Any],
    environment: dict[str, Any],
    warnings: list[str],
) -> None:
    """Run one process; a file that breaks in it is out, a device that breaks ends everything."""
    try:
        result = executor.run_request(
            _request(executor.device, entry, limits), START_TIMEOUT_S + 2 * limits["max_seconds"]
        )
    except RunnerError as error:
        entry.error = error
        return
    entry.results.append(result["artifacts"]["file"])
    warnings += [str(text) for text in result.get("warnings", ())]
    found = result["environment"]
    runtimes = {**environment.get("runtimes", {}), **found.get("runtimes", {})}
    emulated = bool(environment.get("emulated")) or bool(found.get("emulated"))
    environment.update({**found, "runtimes": runtimes, "emulated": emulated})


def _profile(executor: Executor, entry: _Entry, options: BenchOptions, warnings: list[str]) -> None:
    """Time the operators of an entry; latency is none of it, since timing them disturbs it."""
    limits = {"min_runs": 10, "min_seconds": 0.0, "max_seconds": 10.0, "profile": True}
    limits |= options.switches()
    try:
        result = executor.run_request(_request(executor.device, entry, limits), START_TIMEOUT_S)
    except RunnerError as error:
        warnings.append(f"{entry.key}: operators were not timed: {error.message}")
        return
    entry.profile = result["artifacts"]["file"]["profile"]
    if entry.profile is None:
        warnings.append(f"{entry.key}: its runtime does not time operators")


def _comparisons(entries: Sequence[_Entry], runs: Sequence[BenchRun]) -> list[Comparison]:
    """Compare the files thread count by thread count, or the thread counts of a single file."""
    first = entries[0]
    one_file = all(entry.file is first.file for entry in entries)
    bases: dict[int, BenchRun] = {}
    found = []
    for entry, run in zip(entries, runs, strict=True):
        base = bases.setdefault(first.threads if one_file else entry.threads, run)
        if base is not run:
            found.append(build_comparison(base, run))
    return [comparison for comparison in found if comparison is not None]


def _said(runs: Sequence[BenchRun], accuracy: Sequence[BoardAccuracy]) -> list[str]:
    """Return what runs and accuracy have to say, in words."""
    broken = [f"{run.key} did not run: {run.error}" for run in runs if run.error]
    tainted = [f"{run.key}: {text}" for run in runs for text in run.taints]
    return broken + tainted + [f"{entry.key}: {entry.note}" for entry in accuracy if entry.note]


def _unmet(runs: Sequence[BenchRun], options: BenchOptions) -> list[str]:
    """Say which runs the cap on time kept from what the preset asks for."""
    if options.preset is None:
        return []
    return [
        f"{run.key}: preset {options.preset} was not met: {len(run.samples_ns)} runs in "
        f"{run.samples_ns.total_ns / 1e9:.1f} s"
        for run in runs
        if run.error is None
        and (len(run.samples_ns) < MLPERF_RUNS or run.samples_ns.total_ns < MLPERF_SECONDS * 1e9)
    ]


def _open_data(files: Sequence[BenchFile], data: Any) -> dict[str, Any]:
    """Open the data as each file takes them, before anything is measured."""
    if data is None:
        return {}
    from edgecnn.accuracy import open_task

    return {file.key: open_task(file.path, data) for file in files}


def _accuracy(
    executor: Executor,
    files: Sequence[BenchFile],
    tasks: Mapping[str, Any],
    progress: Progress,
    entries: Sequence[_Entry],
) -> tuple[BoardAccuracy, ...]:
    """Measure accuracy of the files that ran."""
    if not tasks:
        return ()
    from edgecnn.accuracy import measure_accuracy

    ran = {entry.file.key for entry in entries if entry.error is None}
    found = []
    for file in files:
        if file.key in ran:
            entry = measure_accuracy(executor, tasks[file.key], progress)
            found.append(replace(entry, key=file.key))
    return tuple(found)
