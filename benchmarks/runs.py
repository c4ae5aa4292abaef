"""Benchmarks of many long runs: each a process, one JSON line each; what is done is not done again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def parse(line: str) -> dict[str, Any] | None:
    """Return a line of a file as a row, or None for what a kill cut off."""
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return row


def read(path: Path) -> list[dict[str, Any]]:
    """Return the runs in a file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [row for line in lines if (row := parse(line)) is not None]


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a run to a file and bring it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * cut_off + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def is_in(job: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a run with all values of `job` is among the rows."""
    return any(all(row.get(name) == value for name, value in job.items()) for row in rows)


def run_all(
    module: str, jobs: Sequence[Mapping[str, Any]], out: Path, cache: Path, threads: int
) -> list[dict[str, Any]]:
    """Run `python -m MODULE --job JSON` for every job that `out` does not hold, and return all rows.

    Args:
        module: prints one JSON object as its last line.
        jobs: in order.
        out: file of rows.
        cache: handed on.
        threads: of each process.
    """
    left = [job for job in jobs if not is_in(job, read(out))]
    for number, job in enumerate(left, 1):
        print(f"[{number}/{len(left)}] {json.dumps(job)}", flush=True)
        command = [sys.executable, "-W", "ignore", "-m", module, "--job", json.dumps(job)]
        command += ["--threads", str(threads), "--cache", str(cache)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        finished = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        if finished.returncode:
            print(f"  failed with exit code {finished.returncode}; the others go on", flush=True)
            continue
        row = {**json.loads(finished.stdout.splitlines()[-1]), "threads": threads}
        append(out, row)
        print(
            f"  {row['accuracy_before']:.2f} -> {row['accuracy']:.2f} %, {row['train_seconds']:.0f} s",
            flush=True,
        )
    return read(out)
