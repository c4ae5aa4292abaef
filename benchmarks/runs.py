"""Benchmarks of many long runs: each a process, one JSON line each; what is done is not done again."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
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


def argument_parser(description: str | None, file_name: str, epochs: float) -> argparse.ArgumentParser:
    """Return a parser of what training benchmarks have in common.

    Args:
        description: the module's.
        file_name: of the rows, in the cache.
        epochs: by default.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = Path(tempfile.gettempdir()) / "edgecnn-cifar"
    parser.add_argument("--out", type=Path, default=cache / file_name)
    parser.add_argument("--cache", type=Path, default=cache, help="decoded images and tuned teachers")
    parser.add_argument("--epochs", type=float, default=epochs)
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train-images", type=int, default=50_000)
    parser.add_argument("--test-images", type=int, default=5_000)
    parser.add_argument("--list", action="store_true", help="only say which runs are left")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser


def carry_out(
    module: str,
    arguments: argparse.Namespace,
    jobs: Sequence[Mapping[str, Any]],
    table: Callable[[Sequence[dict[str, Any]]], None],
) -> None:
    """List, tabulate or run the jobs, as the arguments of `argument_parser` say."""
    if arguments.list:
        print(*[json.dumps(job) for job in jobs if not is_in(job, read(arguments.out))], sep="\n")
    elif arguments.table:
        table(read(arguments.out))
    else:
        table(run_all(module, jobs, arguments.out, arguments.cache, arguments.threads))
