"""Does the runner measure what others measure, does it repeat, and what does it cost?

    python -m benchmarks.harness_agreement [FILE.tflite] [--pairs 10] [--runs 200] [--threads 1] [--json FILE]

1. The runner's median beside that of LiteRT's own tool (`ai_edge_litert.tools.benchmark_litert_model`) on one
   file, a fresh process each, the order turned from pair to pair. Aim: within 3 %.
2. Ten comparisons of a file with itself by `edgecnn.bench`. Aim: at most one claims a difference.
3. Time per inference that the runner adds outside the runtime's call, with a runtime that does nothing. Aim:
   under 5 us.
4. Size of the zipapp that goes to a board.

The tool prints its median in steps of 0.01 ms, so the file should take a few ms; without one, torchvision's
MobileNetV2 is written as float TFLite. The tool feeds uniform noise and the runner normal noise of the same
shape; times of dense kernels do not depend on it.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edgecnn.bench import BenchOptions, bench
from edgecnn.devices.local import run_local
from edgecnn.devices.zipapp import build_zipapp
from edgecnn.runner.session import Session
from edgecnn.runner.statistics import median, median_interval

TOOL = "ai_edge_litert.tools.benchmark_litert_model"
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
    from edgecnn.compress import stage_file
    from edgecnn.export.files import FileOptions, write_model
    from edgecnn.graph.build import build_program
    from edgecnn.graph.folding import FoldBatchNorm
    from edgecnn.load import LoadOptions, load_model
    from edgecnn.pipeline import PassContext

    net = nets.build_net("mobilenet_v2", folder / "weights.pt")
    model = load_model(net, LoadOptions(input_shape=(3, nets.SIDE, nets.SIDE)))
    program = build_program(FoldBatchNorm().run(model, PassContext()))
    return stage_file(write_model(program, "tflite", model.spec, FileOptions()), folder, model, "float")


def runner_median_ms(path: Path, runs: int, threads: int) -> tuple[float, list[str]]:
    """Time a file with the runner in a fresh process."""
    request = {
        "task": "latency",
        "artifacts": [{"key": "a", "path": str(path)}],
        "threads": threads,
        "min_runs": runs,
        "min_seconds": 0.0,
    }
    entry = run_local(request, TIMEOUT_S)["artifacts"]["a"]
    return entry["median_ms"], entry["taints"]


def tool_median_ms(path: Path, runs: int, threads: int, folder: Path) -> float:
    """Time a file with LiteRT's tool in a fresh process."""
    result = folder / "tool.json"
    command = [sys.executable, "-m", TOOL, "--model", str(path), "--result_json", str(result)]
    counts = ["--num_runs", str(runs), "--warmup_runs", str(WARMUP_RUNS), "--num_threads", str(threads)]
    done = subprocess.run([*command, *counts], capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    if done.returncode:
        sys.exit(f"{TOOL} failed\n{done.stderr[-2000:]}")
    return float(json.loads(result.read_text(encoding="utf-8"))["latency"]["median_ms"])


def agreement(path: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Alternate both harnesses on one file."""
    ours: list[float] = []
    theirs: list[float] = []
    tainted = 0
    for pair in range(arguments.pairs):
        for turn in (0, 1):
            if (pair + turn) % 2:
                theirs.append(tool_median_ms(path, arguments.runs, arguments.threads, folder))
                continue
            value, taints = runner_median_ms(path, arguments.runs, arguments.threads)
            ours.append(value)
            tainted += bool(taints)
        print(f"  pair {pair + 1:2d}: runner {ours[-1]:8.3f} ms   tool {theirs[-1]:8.2f} ms", flush=True)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    interval = median_interval(ratios)
    return {
        "runner_ms": median(ours),
        "tool_ms": median(theirs),
        "ratio_of_medians": median(ours) / median(theirs),
        "median_of_ratios": median(ratios),
        "interval": interval,
        "ratio_of_minima": min(ours) / min(theirs),
        "tainted_runs": tainted,
        "pairs": arguments.pairs,
    }


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
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--comparisons", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgecnn-harness-") as name:
        folder = Path(name)
        path = arguments.file or default_file(folder)
        figures: dict[str, Any] = {"file": path.name, "threads": arguments.threads}
        print(f"{path.name}, {arguments.threads} thread(s), {arguments.runs} runs a process")
        figures["agreement"] = found = agreement(path, folder, arguments)
        interval = "" if found["interval"] is None else " [{:.4f}, {:.4f}]".format(*found["interval"])
        print(
            f"runner / tool: ratio of medians {found['ratio_of_medians']:.4f}, of pairs "
            f"{found['median_of_ratios']:.4f}{interval}, of minima {found['ratio_of_minima']:.4f}; "
            f"{found['tainted_runs']} of {found['pairs']} runs said that they were disturbed"
        )
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
