"""One network after the other, each in a process of its own with limits on time and memory, results as JSON
lines: what has been tried stays tried, whatever a network does to its process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LIMIT_S, LIMIT_GB = 420.0, 10.0

Row = dict[str, Any]


def report(row: Row) -> None:
    """Say how far this network has come, in case its process is stopped."""
    print("ROW " + json.dumps(row), flush=True)


def run_each(names: list[str], out: Path, work: Callable[[str], Row]) -> Iterator[Row]:
    """Yield the row of each network that `out` does not hold yet, once it is written there.

    Args:
        names: of the networks.
        out: JSON lines, appended to.
        work: from a name to its row, in a forked process; its "stage" is "done" at the end.
    """
    lines = out.read_text().splitlines() if out.exists() else []
    done = {json.loads(line)["net"] for line in lines}
    for name in names:
        if name not in done:
            row = run_one(name, work)
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            yield row


def run_one(name: str, work: Callable[[str], Row]) -> Row:
    """Run one network in a forked process with limits on time and memory."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        pid = os.fork()
        if pid == 0:
            _child(name, work, log)
        stopped = ""
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(0.2)
            if time.perf_counter() - started > LIMIT_S:
                stopped = f"longer than {LIMIT_S:.0f} s"
            elif _rss_gb(pid) > LIMIT_GB:
                stopped = f"more than {LIMIT_GB:.0f} GB"
            if stopped:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                break
        lines = log.read_text(errors="replace").splitlines()
    rows = [line[4:] for line in lines if line.startswith("ROW ")]
    row: Row = json.loads(rows[-1]) if rows else {"net": name, "stage": "load"}
    row["seconds"] = time.perf_counter() - started
    if row["stage"] != "done":
        last = [line for line in lines if line.strip() and not line.startswith("ROW ")]
        row["failure"] = stopped or (last[-1][:400] if last else "no message")
    return row


def _child(name: str, work: Callable[[str], Row], log: Path) -> None:
    """Work on one network, everything it says going into a file; never returns."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    try:
        report(work(name))
    except BaseException:  # noqa: BLE001  whatever it is, the row says it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _rss_gb(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * 4096 / 1e9
