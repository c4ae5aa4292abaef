"""kill -9 at random moments of a prune + distil run, resumed each time: are the final weights the same?

    python -m benchmarks.resume_after_kill [--kills 10] [--epochs 20] [--interval 5] [--net resnet20] [--int8]
        [--threads 1] [--seed 0] [--out FILE]

Runs `edgecnn compress ... --prune 0.5 --distill --epochs E` once undisturbed, which says how long that takes.
Then starts it again and kills the process and its children with SIGKILL at a moment drawn uniformly from the
time of the undisturbed run, starts it again with --resume, kills it again, and so on until it finishes; and
all of that anew until there were as many kills as asked for. Compared: SHA-256 of all tensors in model.pt2,
and of the ONNX file. Checkpoints are written every --interval seconds, where the command itself takes 60, so
that a short run has many. Prints one JSON line per finished run; exit code 1 if one hash differs.
Needs ../shared/data. Takes about as long as (kills / 2 + 2) undisturbed runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import runs
from benchmarks.cifar_jpeg import DATA
from benchmarks.prune_accuracy import WEIGHTS
from edgecnn.load import load_model

PROGRAM = """
import sys
from edgecnn.cli.main import main
from edgecnn.train import checkpoint
for kind in (checkpoint.Checkpoint, checkpoint.Checkpoints):
    kind.__init__.__defaults__ = (*kind.__init__.__defaults__[:-1], {interval})
sys.exit(main())
"""


def command(arguments: argparse.Namespace, out: Path, resume: bool) -> list[str]:
    """Return the command line of one attempt."""
    program = PROGRAM.format(interval=arguments.interval)
    parts = [sys.executable, "-W", "ignore", "-c", program, "compress"]
    parts += [str(DATA / "weights" / WEIGHTS[arguments.net])]
    parts += ["--arch", f"benchmarks.cifar_resnet:{arguments.net}", "--input-shape", "3x32x32"]
    parts += ["--data", str(DATA / "cifar10" / "train4000.npz"), "--prune", "0.5", "--distill"]
    parts += ["--epochs", f"{arguments.epochs:g}", "--seed", str(arguments.seed), "--format", "onnx"]
    parts += ["--int8"] * arguments.int8 + ["--resume"] * resume + ["-o", str(out)]
    return parts


def attempt(arguments: argparse.Namespace, out: Path, resume: bool, limit_s: float | None) -> int | None:
    """Run once and return the exit code; None if it was killed after `limit_s` seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    with (out.parent / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            command(arguments, out, resume),
            cwd=runs.ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def hashes(out: Path) -> dict[str, str]:
    """Return SHA-256 of the tensors of model.pt2 by name, type, shape and bytes, and of the ONNX file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_model(out / "model.pt2").graph.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return {
        "weights": digest.hexdigest(),
        "onnx": hashlib.sha256((out / "model.onnx").read_bytes()).hexdigest(),
    }


def check(code: int | None, log: Path) -> None:
    if code not in (0, None):
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"edgecnn ended with exit code {code}:\n{tail}")


def has_begun(out: Path) -> bool:
    """Return whether an attempt left something to resume."""
    return (out / "checkpoints").is_dir()


def disturbed(
    arguments: argparse.Namespace, out: Path, kills: int, whole_s: float, draw: random.Random
) -> list[dict[str, Any]]:
    """Run to the end through at most `kills` kills and return where each of them hit."""
    found: list[dict[str, Any]] = []
    while True:
        resume = has_begun(out)
        limit = draw.uniform(0.0, whole_s) if len(found) < kills else None
        code = attempt(arguments, out, resume, limit)
        if code is not None:
            check(code, out.parent / "log.txt")
            return found
        left = sorted(path.name for path in out.rglob("*") if path.is_file()) if out.is_dir() else []
        found.append({"after_s": round(limit or 0.0, 1), "resumed": resume, "files": left})
        print(f"  kill {len(found)} after {limit:.1f} s, left: {', '.join(left) or 'nothing'}", flush=True)
        if "report.json" in left and not has_begun(out):
            return found  # it was done but for its exit


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--epochs", type=float, default=20.0)
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between checkpoints")
    parser.add_argument("--net", default="resnet20", choices=[*WEIGHTS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--int8", action="store_true", help="quantize as well")
    parser.add_argument("--out", type=Path, help="file to add the results to, one JSON line per run")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        check(attempt(arguments, folder / "unbroken", resume=False, limit_s=None), folder / "log.txt")
        whole_s = time.perf_counter() - started
        expected = hashes(folder / "unbroken")
        print(f"unbroken: {whole_s:.1f} s, weights {expected['weights'][:16]}", flush=True)
        kills, same = 0, True
        while kills < arguments.kills:
            out = folder / "broken"
            shutil.rmtree(out, ignore_errors=True)
            hits = disturbed(arguments, out, arguments.kills - kills, whole_s, draw)
            found = hashes(out)
            row = {"kills": hits, "same": found == expected, **found, "unbroken_s": whole_s}
            same, kills = same and found == expected, kills + len(hits)
            print(json.dumps(row), flush=True)
            if arguments.out:
                runs.append(arguments.out, {**row, "epochs": arguments.epochs, "net": arguments.net})
    print(f"{kills} kills: {'every run ended with the same weights' if same else 'THE WEIGHTS DIFFER'}")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
