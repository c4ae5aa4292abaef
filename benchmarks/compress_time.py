"""Wall time and peak memory of the whole job: a PyTorch module and a folder of JPEGs in, both int8 files out.

    python benchmarks/compress_time.py [--net mobilenet_v2] [--images 64 1024] [--threads 2] [--repeat 1]
                                       [--cache DIR] [--peers-python PYTHON] [--json FILE] [--profile]

edgecnn.compress against the chain torch.onnx.export, quant_pre_process, quantize_static,
litert_torch.convert, ai-edge-quantizer. Each job runs in a fresh process; the peers decode the same number of
JPEGs, one by one, and keep none. edgecnn's own proof (parity, agreement on held-out images) is listed apart,
since the chain has none, and its latency measurement is off. Peak memory is the process's VmHWM.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MB = 1e6
JPEG_SIDE = 256


def peak_bytes() -> int:
    """Return the largest resident set of this process so far."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def make_jpegs(cache: Path, count: int) -> Path:
    """Return a folder of `count` JPEGs, written the first time."""
    import nets
    from PIL import Image

    folder = cache / f"jpeg-{count}"
    if folder.is_dir():
        return folder
    temporary = folder.with_suffix(".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for start in range(0, count, 64):
        images = nets.smooth_pixels(min(64, count - start), 7 + start, JPEG_SIDE)
        for index, pixels in enumerate(images, start):
            Image.fromarray(pixels).save(temporary / f"{index:05d}.jpg", quality=90)
    temporary.replace(folder)
    return folder


class Stages:
    """A Progress that notes the seconds of each step and the peak memory after it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self._title: str | None = None
        self._started = time.perf_counter()

    def start(self, title: str, total: int | None) -> None:  # noqa: ARG002
        """Begin a step."""
        self.finish()
        self._title, self._started = title, time.perf_counter()

    def advance(self, n: int = 1) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """End the step."""
        if self._title is not None:
            seconds = time.perf_counter() - self._started
            self.steps.append({"step": self._title, "seconds": seconds, "peak_bytes": peak_bytes()})
        self._title = None


def run_ours(folder: Path, weights: Path, net: str, count: int, scratch: Path) -> dict[str, Any]:
    """Compress with edgecnn, calibrating on half of the images in the folder."""
    import nets

    from edgecnn.compress import CompressOptions, compress
    from edgecnn.load import LoadOptions

    module = nets.build_net(net, weights)
    imported = time.perf_counter()
    stages = Stages()
    load = LoadOptions(input_shape=(3, nets.SIDE, nets.SIDE), preprocess="imagenet")
    options = CompressOptions(load=load, num_samples=count, force=True, measure=False)
    result = compress(module, data=folder, out=scratch / "out", options=options, progress=stages)
    report = json.loads(result.report.to_json())
    if report["data"]["num_calibration"] != count:
        raise SystemExit(f"edgecnn used {report['data']['num_calibration']} images, expected {count}")
    before_proof = [s for s in stages.steps if s["step"].startswith(("load", "pass", "calib", "write"))]
    return {
        "imported": imported,
        "work_seconds": report["timings"]["work_seconds"],
        "proof_seconds": report["timings"]["proof_seconds"],
        "work_peak_bytes": before_proof[-1]["peak_bytes"],
        "steps": stages.steps,
    }


def decode(paths: list[Path]) -> Iterator[npt.NDArray[np.float32]]:
    """Yield each JPEG as ImageNet-normalized float32 (1, 3, 224, 224): short side 256, central crop."""
    import nets
    from PIL import Image

    margin = (JPEG_SIDE - nets.SIDE) // 2
    box = (margin, margin, margin + nets.SIDE, margin + nets.SIDE)
    for path in paths:
        with Image.open(path) as image:
            yield nets.normalize(np.asarray(image.convert("RGB").crop(box))[None])


def run_peers(folder: Path, weights: Path, net: str, count: int, scratch: Path) -> dict[str, Any]:
    """Make both int8 files with the peers."""
    import nets
    import peers

    peers.be_quiet()
    peers.import_all()
    module = nets.build_net(net, weights)
    imported = time.perf_counter()
    paths = sorted(folder.iterdir())[:count]
    seconds = peers.make_all(module, nets.SIDE, scratch, lambda: decode(paths))
    steps = [{"step": key, "seconds": value} for key, value in seconds.items()]
    work = time.perf_counter() - imported
    return {"imported": imported, "work_seconds": work, "proof_seconds": None, "steps": steps}


JOBS = {"edgecnn": run_ours, "peers": run_peers}


def run_child(arguments: argparse.Namespace) -> None:
    """Do one job in this process and write its figures."""
    started = time.perf_counter()
    import torch

    torch.set_num_threads(arguments.threads)
    folder, weights = make_jpegs(arguments.cache, 2 * arguments.images[0]), weights_of(arguments)
    job = JOBS[arguments.child]
    with tempfile.TemporaryDirectory(dir=arguments.cache) as scratch:
        call = (folder, weights, arguments.net, arguments.images[0], Path(scratch))
        if arguments.profile:
            import cProfile

            with cProfile.Profile() as profile:
                figures = job(*call)
            profile.dump_stats(arguments.cache / f"{arguments.child}-{arguments.images[0]}.prof")
        else:
            figures = job(*call)
    figures["import_seconds"] = figures.pop("imported") - started
    figures["peak_bytes"] = peak_bytes()
    figures.setdefault("work_peak_bytes", figures["peak_bytes"])
    arguments.json.write_text(json.dumps(figures), encoding="utf-8")


def weights_of(arguments: argparse.Namespace) -> Path:
    return Path(arguments.cache) / arguments.net / "weights.pt"


def run_job(who: str, count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one job in a fresh process and return its figures, the whole process's seconds among them."""
    python = sys.executable if who == "edgecnn" else arguments.peers_python
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [python, str(Path(__file__).resolve()), "--child", who, "--json", str(out)]
        for option in ("net", "threads", "cache"):
            command += [f"--{option}", str(getattr(arguments, option))]
        command += ["--images", str(count), *(["--profile"] if arguments.profile else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        started = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(f"{who} failed\n{done.stderr[-2000:]}")
        figures: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    # Starting Python and ending it belong to the import.
    accounted = figures["import_seconds"] + figures["work_seconds"] + (figures["proof_seconds"] or 0.0)
    figures["start_seconds"] = max(seconds - accounted, 0.0)
    figures["total_seconds"] = seconds - (figures["proof_seconds"] or 0.0)
    return figures


def print_table(rows: dict[tuple[str, int], list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    print(f"{arguments.net}, {arguments.threads} threads, median of {arguments.repeat}; seconds and MB")
    print(
        f"  {'':8s} {'images':>6s} {'total':>7s} {'start':>6s} {'import':>6s} {'work':>7s} | "
        f"{'proof':>6s} | {'peak work':>9s} {'peak':>6s}"
    )
    for (who, count), runs in rows.items():
        names = [name for name in runs[0] if name.endswith(("_bytes", "_seconds"))]
        cell = {name: statistics.median(run[name] or 0.0 for run in runs) for name in names}
        proof = f"{cell['proof_seconds']:6.1f}" if runs[0]["proof_seconds"] is not None else f"{'-':>6s}"
        print(
            f"  {who:8s} {count:6d} {cell['total_seconds']:7.1f} {cell['start_seconds']:6.1f} "
            f"{cell['import_seconds']:6.1f} {cell['work_seconds']:7.1f} | {proof} | "
            f"{cell['work_peak_bytes'] / MB:9.0f} {cell['peak_bytes'] / MB:6.0f}"
        )
    for (who, count), runs in rows.items():
        steps = "; ".join(f"{s['step']} {s['seconds']:.1f}" for s in runs[0]["steps"] if s["seconds"] >= 0.05)
        print(f"  {who} {count}: {steps}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", default="mobilenet_v2", help="of torchvision")
    parser.add_argument("--images", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--only", choices=list(JOBS), help="run one side alone")
    parser.add_argument("--cache", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--profile", action="store_true", help="leave a cProfile of each job in the cache")
    parser.add_argument("--child", choices=list(JOBS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.cache = arguments.cache.absolute()
    if arguments.child:
        run_child(arguments)
        return
    import nets

    nets.build_net(arguments.net, weights_of(arguments))
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for count in arguments.images:
        make_jpegs(arguments.cache, 2 * count)
    for _ in range(arguments.repeat):
        for count in arguments.images:
            for who in [arguments.only] if arguments.only else JOBS:
                rows.setdefault((who, count), []).append(run_job(who, count, arguments))
                print(f"{who}, {count} images: done", file=sys.stderr, flush=True)
    print_table(rows, arguments)
    if arguments.json:
        found = [{"who": who, "images": count, "runs": runs} for (who, count), runs in rows.items()]
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
