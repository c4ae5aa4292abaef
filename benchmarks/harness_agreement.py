"""Does the runner measure what others measure, does it repeat, and what does it cost?

    python -m benchmarks.harness_agreement [FILE.tflite] [--pairs 40] [--runs 100] [--threads 1] [--json FILE]

1. The runner's median beside that of LiteRT's own tool (`ai_edge_litert.tools.benchmark_litert_model`) on one
   file. Both run in short fresh processes that alternate, the order turned from pair to pair, so that what
   else the machine does falls on both alike; each pair gives one ratio, and the figure is their median with
   its 95 % interval. The quiet half of the pairs, the one with the fewest involuntary context switches in the
   worse of the two processes, is also given by itself: that criterion knows nothing of latencies. Aim: the
   interval lies within 3 %.
2. Ten comparisons of a file with itself by `edgecnn.bench`. Aim: at most one claims a difference.
3. Time per inference that the runner adds outside the runtime's call, with a runtime that does nothing. Aim:
   under 5 us.
4. Size of the zipapp that goes to a board.

The tool rounds what it reports to 0.01 ms; here it is started so that it does not. Its 5th percentile is
compared too, which other work on the machine raises less than the median. Where the machine does other
work, `chrt --rr 1` in front of the command gives these processes a core. It feeds uniform noise and the
runner normal noise of the same shape; times of dense kernels do not depend on it. Without a file,
torchvision's MobileNetV2 is written as float TFLite.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgecnn.bench import BenchOptions, bench
from edgecnn.devices.local import run_local
from edgecnn.devices.zipapp import build_zipapp
from edgecnn.runner.session import Session
from edgecnn.runner.statistics import median, median_interval

TOOL = "ai_edge_litert.tools.benchmark_litert_model"
RUN_TOOL = f"""
import {TOOL} as tool
tool.round = lambda value, digits=None: value
tool.main()
"""
"""Its main, with its results as it measured them."""

TOLERANCE = 0.03
WARMUP_RUNS = 20
TIMEOUT_S = 600.0
OVERHEAD_RUNS = 200_000


class NullSession(Session):
    """A session whose runtime does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces = [{}]

    def _bind(self, piece: Any) -> None:
        pass

    def _execute(self) -> None:
        pass

    def _read(self) -> list[Any]:
        return []

    def _release(self) -> None:
        pass


def default_file(folder: Path) -> Path:
    """Write MobileNetV2 as float TFLite, seeded random weights."""
    from benchmarks import nets
    from edgecnn.export.files import FileOptions, write_model
    from edgecnn.graph.build import build_program
    from edgecnn.graph.folding import FoldBatchNorm
    from edgecnn.judgement import stage_file
    from edgecnn.load import LoadOptions, load_model
    from edgecnn.pipeline import PassContext

    net = nets.build_net("mobilenet_v2", folder / "weights.pt")
    model = load_model(net, LoadOptions(input_shape=(3, nets.SIDE, nets.SIDE)))
    program = build_program(FoldBatchNorm().run(model, PassContext()))
    return stage_file(write_model(program, "tflite", model.spec, FileOptions()), folder, model, "float")


@dataclass(frozen=True)
class Timed:
    """What one process of a harness measured.

    Attributes:
        median_ms: of its timed runs.
        p5_ms: their 5th percentile.
        switches_per_s: involuntary context switches per second of processor time, start-up included.
    """

    median_ms: float
    p5_ms: float
    switches_per_s: float


def time_runner(path: Path, arguments: argparse.Namespace) -> Timed:
    """Time a file with the runner in a fresh process."""
    request = {
        "task": "latency",
        "artifacts": [{"key": "a", "path": str(path)}],
        "threads": arguments.threads,
        "min_runs": arguments.runs,
        "min_seconds": 0.0,
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    entry = run_local(request, TIMEOUT_S)["artifacts"]["a"]
    samples = np.asarray(entry["samples_ns"]) / 1e6
    return Timed(entry["median_ms"], float(np.quantile(samples, 0.05)), _switches_since(before))


def time_tool(path: Path, arguments: argparse.Namespace, folder: Path) -> Timed:
    """Time a file with LiteRT's tool in a fresh process."""
    result = folder / "tool.json"
    command = [sys.executable, "-c", RUN_TOOL, "--model", str(path), "--result_json", str(result)]
    counts = {"--num_runs": arguments.runs, "--warmup_runs": WARMUP_RUNS, "--num_threads": arguments.threads}
    words = [str(word) for pair in counts.items() for word in pair]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    if done.returncode:
        sys.exit(f"{TOOL} failed\n{done.stderr[-2000:]}")
    latency = json.loads(result.read_text(encoding="utf-8"))["latency"]
    return Timed(latency["median_ms"], latency["p5_ms"], _switches_since(before))


def _switches_since(before: resource.struct_rusage) -> float:
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (after.ru_nivcsw - before.ru_nivcsw) / max(cpu_s, 1e-3)


def agreement(path: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Alternate both harnesses on one file."""
    pairs: list[tuple[Timed, Timed]] = []
    deadline = time.monotonic() + 60 * arguments.minutes
    while len(pairs) < arguments.pairs and time.monotonic() < deadline:
        if len(pairs) % 2:
            theirs = time_tool(path, arguments, folder)
            ours = time_runner(path, arguments)
        else:
            ours = time_runner(path, arguments)
            theirs = time_tool(path, arguments, folder)
        pairs.append((ours, theirs))
        rates = f"{ours.switches_per_s:5.0f} {theirs.switches_per_s:5.0f} switches/s"
        print(
            f"  pair {len(pairs):2d}: runner {ours.median_ms:7.3f} ms   tool {theirs.median_ms:7.3f} ms   "
            f"{ours.median_ms / theirs.median_ms:.3f}   {rates}",
            flush=True,
        )
    ordered = sorted(pairs, key=lambda pair: max(timed.switches_per_s for timed in pair))
    quiet = ordered[: (len(pairs) + 1) // 2]
    return {
        "all": ratios_of(pairs),
        "quiet": ratios_of(quiet),
        "quiet_switches_per_s": max(timed.switches_per_s for timed in quiet[-1]),
        "pairs": [[dataclasses.asdict(timed) for timed in pair] for pair in pairs],
    }


def ratios_of(pairs: list[tuple[Timed, Timed]]) -> dict[str, Any]:
    """Return runner / tool of some pairs: the median of their ratios and its interval."""
    figures: dict[str, Any] = {"num_pairs": len(pairs)}
    for name in ("median_ms", "p5_ms"):
        values = [(getattr(ours, name), getattr(theirs, name)) for ours, theirs in pairs]
        ratios = [ours / theirs for ours, theirs in values]
        figures[name] = {
            "runner": median([ours for ours, _ in values]),
            "tool": median([theirs for _, theirs in values]),
            "ratio": median(ratios),
            "interval": median_interval(ratios),
        }
    return figures


def agreement_text(name: str, figures: dict[str, Any]) -> str:
    """Return the ratios of some pairs in a line."""
    parts = []
    for key, label in (("median_ms", "medians"), ("p5_ms", "5th percentiles")):
        low, high = figures[key]["interval"] or (0.0, math.inf)
        holds = "within 3 %" if low >= 1 - TOLERANCE and high <= 1 + TOLERANCE else "not shown within 3 %"
        parts.append(f"{label} {figures[key]['ratio']:.4f} [{low:.4f}, {high:.4f}] {holds}")
    return f"runner / tool, {name} {figures['num_pairs']} pairs: {'; '.join(parts)}"


def repeatability(path: Path, folder: Path, comparisons: int) -> list[dict[str, Any]]:
    """Compare a file with a copy of itself, again and again."""
    copy = folder / "copy.tflite"
    for suffix in ("", ".json"):
        source = path.with_name(path.name + suffix)
        if source.is_file():
            shutil.copyfile(source, copy.with_name(copy.name + suffix))
    found = []
    for index in range(comparisons):
        result = bench(path, copy, options=BenchOptions(num_runs=240)).comparisons[0]
        found.append(
            {"speedup": result.speedup, "low": result.low, "high": result.high, "verdict": result.verdict}
        )
        interval = f"[{result.low:.3f}, {result.high:.3f}]" if result.low and result.high else "none"
        print(f"  A/A {index + 1:2d}: {result.speedup:.4f} {interval} {result.verdict}", flush=True)
    return found


def overhead_us() -> dict[str, float]:
    """Return microseconds per timed run of a runtime that does nothing: inside what is timed, and in all."""
    session = NullSession()
    samples: list[int] = []
    gc.disable()
    began = time.perf_counter_ns()
    for _ in range(OVERHEAD_RUNS):
        start = time.perf_counter_ns()
        session.invoke()
        samples.append(time.perf_counter_ns() - start)
    whole = time.perf_counter_ns() - began
    gc.enable()
    return {"timed_us": median(samples) / 1e3, "whole_us": whole / OVERHEAD_RUNS / 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--comparisons", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=6.0, help="start no further pair after so long")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgecnn-harness-") as name:
        folder = Path(name)
        path = arguments.file or default_file(folder)
        figures: dict[str, Any] = {"file": path.name, "threads": arguments.threads}
        print(f"{path.name}, {arguments.threads} thread(s), {arguments.runs} runs a process")
        figures["agreement"] = found = agreement(path, folder, arguments)
        print(agreement_text("all", found["all"]))
        print(agreement_text(f"at most {found['quiet_switches_per_s']:.0f} switches/s,", found["quiet"]))
        figures["repeatability"] = compared = repeatability(path, folder, arguments.comparisons)
        claimed = sum(entry["verdict"] in ("faster", "slower") for entry in compared)
        print(f"A/A: {claimed} of {len(compared)} comparisons claim a difference")
        figures["overhead"] = cost = overhead_us()
        print(f"overhead per inference: {cost['timed_us']:.2f} us timed, {cost['whole_us']:.2f} us in all")
        build_zipapp(folder / "runner.pyz")
        figures["zipapp_bytes"] = (folder / "runner.pyz").stat().st_size
        print(f"zipapp: {figures['zipapp_bytes'] / 1e3:.1f} kB")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
