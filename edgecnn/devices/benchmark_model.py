"""Latency on a device without Python, through TensorFlow Lite's own `benchmark_model`.

The tool keeps no raw samples: it prints, per phase, the count and the median (older builds: the average) of
one process. Here every .tflite file runs in several processes, interleaved A B, B A, ..., and each process
counts as one sample. Nothing else can be run there: no accuracy, no outputs, no ONNX files.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecnn.devices.board import try_twice
from edgecnn.devices.profile import Device
from edgecnn.devices.transport import Completed, Transport, last_words
from edgecnn.devices.workspace import SETUP_TIMEOUT_S, Workspace
from edgecnn.errors import DeviceError, RunnerError
from edgecnn.runner.failure import RunFailure
from edgecnn.runner.measure import round_order
from edgecnn.runner.request import parse_request
from edgecnn.runner.statistics import compare, summarize

NUM_ROUNDS = 8
WHERE_TO_GET_IT = "https://ai.google.dev/edge/litert/models/measurement has builds for Android and Linux"

_NUMBER = r"([0-9.]+(?:e[+-]?\d+)?)"
_PHASE = re.compile(r"count=(\d+) .*?\bavg=" + _NUMBER)
_INIT = re.compile(r"Initialized session in " + _NUMBER + r" ?ms")
_TIMINGS = re.compile(
    rf"Inference timings in us: Init: {_NUMBER}, First inference: {_NUMBER}, "
    rf"Warmup \(avg\): {_NUMBER}, Inference \(avg\): {_NUMBER}"
)
_PEAK = re.compile(r"(?:Overall p|P)eak memory footprint.*?overall=" + _NUMBER + r"|overall=" + _NUMBER)
_DELEGATE = re.compile(r"Replacing (\d+) out of (\d+) node\(s\) with delegate .*?yielding (\d+) partitions")


@dataclass(frozen=True)
class BenchmarkOutput:
    """What one process of `benchmark_model` printed.

    Attributes:
        count: timed runs.
        median_us: their median; None from builds that print averages only.
        avg_us: their average.
        min_us: smallest.
        max_us: largest.
        p95_us: None from older builds.
        init_ms: until the interpreter was ready.
        first_us: first inference.
        warmup_us: average of the warm-up; None when not printed.
        delegate: partitions, delegated and total operators; None when no delegate said so.
    """

    count: int
    median_us: float | None
    avg_us: float
    min_us: float | None
    max_us: float | None
    p95_us: float | None
    init_ms: float | None
    first_us: float | None
    warmup_us: float | None
    delegate: dict[str, int] | None

    @property
    def typical_us(self) -> float:
        """The median, or the average where there is none."""
        return self.avg_us if self.median_us is None else self.median_us


def parse_benchmark_model(text: str) -> BenchmarkOutput:
    """Read what `benchmark_model` prints; the last line of statistics is that of the timed phase.

    Raises:
        RunnerError: if the timed phase is missing.

    Example:
        >>> parse_benchmark_model("count=50 first=910 curr=812 min=801 max=910 avg=815.5 std=12").avg_us
        815.5
    """
    phases = [line for line in text.splitlines() if _PHASE.search(line)]
    timings = _TIMINGS.search(text)
    if not phases or ("Running benchmark for at least" in text and not _is_timed(text)):
        raise RunnerError(
            f"benchmark_model printed no latencies; its last line: {last_words(text.encode()) or 'nothing'}"
        )
    timed, init, delegate = phases[-1], _INIT.search(text), _DELEGATE.search(text)
    average = _field(timed, "avg")
    if average is None:
        raise RunnerError(f"benchmark_model printed no average: {timed.strip()[:200]}")
    first = float(timings.group(2)) if timings else _field(phases[0], "first")
    warmup = float(timings.group(3)) if timings else _field(phases[0], "avg") if len(phases) > 1 else None
    return BenchmarkOutput(
        count=int(_field(timed, "count") or 0),
        median_us=_field(timed, "median"),
        avg_us=average,
        min_us=_field(timed, "min"),
        max_us=_field(timed, "max"),
        p95_us=_field(timed, "p95"),
        init_ms=float(init.group(1)) if init else float(timings.group(1)) / 1e3 if timings else None,
        first_us=first,
        warmup_us=warmup,
        delegate=None
        if delegate is None
        else {
            "partitions": int(delegate.group(3)),
            "delegated_ops": int(delegate.group(1)),
            "total_ops": int(delegate.group(2)),
        },
    )


def _is_timed(text: str) -> bool:
    """Return whether statistics follow the last header; the warm-up has the same header."""
    return _PHASE.search(text.rpartition("Running benchmark for at least")[2]) is not None


def _field(line: str, name: str) -> float | None:
    match = re.search(rf"(?:^|\s){name}={_NUMBER}", line)
    return None if match is None else float(match.group(1))


class BenchmarkModelExecutor:
    """Latency requests on a device without Python.

    Args:
        device: its profile; `benchmark_model` is the path of the tool's binary on this machine.
        transport: to the device.
        workspace: a fresh folder there.
    """

    def __init__(self, device: Device, transport: Transport, workspace: Workspace) -> None:
        self.device = device
        self._transport = transport
        self._folder = workspace.folder
        self._tool = f"{workspace.folder}/benchmark_model"
        self._pid = f"{workspace.folder}/pid"
        self._pushed: dict[Path, str] = {}
        self._warnings = list(workspace.warnings)
        self._running = False

    def start(self) -> None:
        """Send the tool.

        Raises:
            DeviceError: if the profile names none, or it is not there.
        """
        path = Path(self.device.benchmark_model)
        if not self.device.benchmark_model:
            raise DeviceError(
                f"device {self.device.name} has no Python and no benchmark_model, so nothing can run there",
                hint=f"set benchmark_model in its profile to the tool's binary; {WHERE_TO_GET_IT}",
            )
        if not path.is_file():
            raise DeviceError(
                f"device {self.device.name}: benchmark_model {path} does not exist", hint=WHERE_TO_GET_IT
            )
        self._push(path, self._tool)
        found = self._transport.run(["chmod", "+x", self._tool], timeout_s=SETUP_TIMEOUT_S)
        if found.exit_code != 0:
            raise DeviceError(f"{self._tool} cannot be made executable on {self.device.name}: {found.tail}")

    def stop(self) -> None:
        """End a run that is under way.

        Raises:
            DeviceError: if the device cannot be reached.
        """
        if not self._running:
            return
        script = '[ -f "$1" ] || exit 0; kill -9 "$(cat "$1")" 2>/dev/null; rm -f "$1"'
        self._transport.run(["sh", "-c", script, "sh", self._pid], timeout_s=SETUP_TIMEOUT_S)
        self._running = False

    def environment(self) -> dict[str, Any]:
        """Describe the device as far as its shell knows."""
        script = (
            "for k in ro.product.model ro.board.platform ro.build.version.release; "
            'do getprop "$k" 2>/dev/null; done; echo; uname -m; uname -r; nproc'
        )
        found = self._transport.run(["sh", "-c", script], timeout_s=SETUP_TIMEOUT_S)
        properties, _, system = (
            found.text.rpartition("\n\n") if "\n\n" in found.text else ("", "", found.text)
        )
        names, lines = properties.split("\n"), system.split("\n")
        return {
            "cpu": names[1] if len(names) > 1 else None,
            "board": names[0] or None,
            "machine": lines[0] if lines else None,
            "kernel": lines[1] if len(lines) > 1 else None,
            "num_cores": int(lines[2]) if len(lines) > 2 and lines[2].isdigit() else None,
            "isa": self.device.isa,
            "system": f"Android {names[2]}" if len(names) > 2 else None,
            "python": None,
            "numpy": None,
            "runtimes": {"litert": "benchmark_model"},
            "emulated": False,
        }

    def run_request(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Time .tflite files.

        Args:
            request: a request for latency; inputs are random whatever it says.
            timeout_s: seconds for all processes together.

        Raises:
            RunnerError: if the request asks for anything else, or the tool fails.
            DeviceError: if the device cannot be used.
        """
        try:
            checked = parse_request(dict(request))
        except RunFailure as failure:
            raise RunnerError(failure.message, hint=failure.hint) from failure
        if checked.task != "latency":
            raise RunnerError(
                f"{self.device.name} has no Python, so {checked.task} cannot be run there, only latency",
                hint="set python in its profile if there is one",
            )
        for artifact in checked.artifacts:
            if artifact.path.suffix != ".tflite":
                raise RunnerError(f"benchmark_model takes .tflite files, not {artifact.path.name}")
        share = max(1, NUM_ROUNDS * len(checked.artifacts))
        words = [
            f"--num_threads={checked.threads}",
            f"--num_runs={max(1, checked.min_runs // NUM_ROUNDS)}",
            f"--min_secs={checked.min_seconds / NUM_ROUNDS:g}",
            f"--max_secs={max(checked.max_seconds / share, 0.1):g}",
        ]
        deadline = time.monotonic() + timeout_s
        outputs: dict[str, list[BenchmarkOutput]] = {artifact.key: [] for artifact in checked.artifacts}
        paths = {artifact.key: artifact.path for artifact in checked.artifacts}
        for round_index in range(NUM_ROUNDS):
            for key in round_order(list(paths), round_index):
                remote = self._send(paths[key])
                outputs[key].append(self._once(remote, words, deadline - time.monotonic()))
        return self._result(outputs, checked.threads, checked.baseline or next(iter(paths)))

    def _send(self, path: Path) -> str:
        if path not in self._pushed:
            if not path.is_file():
                raise DeviceError(f"{path} does not exist, so it cannot be sent to {self.device.name}")
            remote = f"{self._folder}/{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.tflite"
            self._push(path, remote)
            self._pushed[path] = remote
        return self._pushed[path]

    def _push(self, path: Path, remote: str) -> None:
        name = self.device.name
        try_twice(lambda: self._transport.push(path, remote), name, self.stop, self._warnings)

    def _once(self, remote: str, words: list[str], timeout_s: float) -> BenchmarkOutput:
        if timeout_s <= 0:
            raise RunnerError(
                f"benchmark_model took longer than its time on {self.device.name}",
                hint="fewer samples, or a longer time limit",
            )
        script = 'echo $$ > "$0"; exec "$@"'
        argv = ["sh", "-c", script, self._pid, self._tool, f"--graph={remote}", *words]
        self._running = True
        found = try_twice(
            lambda: self._transport.run(argv, timeout_s=timeout_s),
            self.device.name,
            self.stop,
            self._warnings,
        )
        self._running = False
        if found.exit_code != 0:
            raise self._died(found)
        return parse_benchmark_model((found.stdout + b"\n" + found.stderr).decode("utf-8", "replace"))

    def _died(self, found: Completed) -> RunnerError:
        hints = {
            137: "the device may have run out of memory",
            132: "the binary is for a newer CPU",
            126: "the binary is for another CPU",
        }
        return RunnerError(
            f"{self.device.name}: benchmark_model ended with exit code {found.exit_code}: "
            f"{found.tail or 'no message'}",
            hint=hints.get(found.exit_code),
        )

    def _result(
        self, outputs: Mapping[str, list[BenchmarkOutput]], threads: int, baseline: str
    ) -> dict[str, Any]:
        """Return the runner's latency result, one sample per process."""
        samples = {key: [round(o.typical_us * 1e3) for o in found] for key, found in outputs.items()}
        blocks = {key: [[value] for value in values] for key, values in samples.items()}
        return {
            "schema_version": 1,
            "ok": True,
            "task": "latency",
            "batch_size": 1,
            "baseline": baseline,
            "artifacts": {key: _describe(found, samples[key], threads) for key, found in outputs.items()},
            "comparisons": {
                key: compare(blocks[baseline], blocks[key]) for key in outputs if key != baseline
            },
            "timed_region": "Interpreter.Invoke, as benchmark_model times it; random inputs",
            "environment": self.environment(),
            "warnings": self._warnings,
        }


def _describe(outputs: list[BenchmarkOutput], samples: list[int], threads: int) -> dict[str, Any]:
    """Return one file's entry; load and first inference are the first process's."""
    first = outputs[0]
    what = "median" if first.median_us is not None else "average"
    summary = summarize(samples)
    first_ms = None if first.first_us is None else first.first_us / 1e3
    warmup_ms = None if first.warmup_us is None else first.warmup_us / 1e3
    return {
        "runtime": "litert",
        "runtime_package": "benchmark_model",
        "runtime_version": "benchmark_model",
        "threads": threads,
        "import_ms": None,
        "load_ms": first.init_ms,
        "first_ms": first_ms,
        "phases": {"import_ms": None, "load_ms": first.init_ms, "first_ms": first_ms, "warmup_ms": warmup_ms},
        "warmup_ns": [],
        "samples_ns": samples,
        "block_lengths": [1] * len(samples),
        **summary,
        "p95_of_first_process_ms": None if first.p95_us is None else first.p95_us / 1e3,
        "num_runs": sum(output.count for output in outputs),
        "peak_rss_bytes": None,
        "baseline_rss_bytes": None,
        "profile": None,
        "delegate": first.delegate,
        "trace": [],
        "cpu": None,
        "taints": [],
        "warnings": [f"benchmark_model keeps no raw samples: each sample is the {what} of one process"],
    }
