"""Running requests on this machine, each in a fresh process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgecnn.devices.waiting import wait_for
from edgecnn.errors import RunnerError

PATH_KEYS = ("inputs", "outputs", "labels")
SCHEMA_VERSION = 1

Run = Callable[[Mapping[str, Any], float], dict[str, Any]]
"""Runs a request within so many seconds: `run_local`, or the `run_request` of an Executor."""

SIGNAL_HINTS = {
    "SIGKILL": "the machine may have run out of memory",
    "SIGILL": "illegal instruction: the runtime's build is for a newer CPU; install an older version",
    "SIGALRM": "it took longer than it was given",
}


def run_local(request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """Run a request in a fresh process of this interpreter.

    Args:
        request: what `python -m edgecnn.runner` takes; relative paths are relative to this process.
        timeout_s: seconds after which the process is killed.

    Returns:
        The result, its `ok` true.

    Raises:
        RunnerError: if the runner reports a failure, dies, takes too long or leaves no valid result.
    """
    with tempfile.TemporaryDirectory(prefix="edgecnn-") as name:
        folder = Path(name)
        request_path, result_path = folder / "request.json", folder / "result.json"
        request_path.write_text(json.dumps(absolute_paths(request)), encoding="utf-8")
        command = [sys.executable, "-m", "edgecnn.runner", str(request_path), str(result_path)]
        exit_code, stderr = _run(command, folder, timeout_s)
        return read_result(result_path, exit_code, stderr)


def absolute_paths(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a request with its paths made absolute, since the runner works in its own folder.

    Example:
        >>> absolute_paths({"inputs": "/data/x.npy"})
        {'inputs': '/data/x.npy'}
    """
    result = dict(request)
    for key in PATH_KEYS:
        if isinstance(result.get(key), (str, Path)) and str(result[key]):
            result[key] = str(Path(result[key]).absolute())
    artifacts = result.get("artifacts")
    if isinstance(artifacts, (list, tuple)):
        result["artifacts"] = [
            {**entry, "path": str(Path(entry["path"]).absolute())}
            if isinstance(entry, Mapping) and isinstance(entry.get("path"), (str, Path))
            else entry
            for entry in artifacts
        ]
    return result


def _run(command: list[str], folder: Path, timeout_s: float) -> tuple[int, str]:
    """Run the runner; return its exit code and the end of its stderr. Any exception kills it first."""
    package_root = str(Path(__file__).resolve().parent.parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "ORT_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join([package_root, inherited] if inherited else [package_root]),
    }
    stderr_path = folder / "stderr.txt"
    with stderr_path.open("wb") as stderr:
        # In a session of its own the child gets no Ctrl-C: this process ends it, and no traceback shows.
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            exit_code = wait_for(process, timeout_s)
        except subprocess.TimeoutExpired as error:
            raise RunnerError(
                f"the runner took longer than {timeout_s:g} s and was stopped",
                hint="fewer samples, or a longer time limit",
            ) from error
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return exit_code, stderr_path.read_text(encoding="utf-8", errors="replace")


def read_result(path: Path, exit_code: int, stderr: str) -> dict[str, Any]:
    """Read what a run left, once it is sure that it is a whole result.

    Args:
        path: of the result file, which may be missing.
        exit_code: of the runner; -n when signal n killed it.
        stderr: what it printed, for the error.

    Raises:
        RunnerError: if the run failed, died or left no valid result.
    """
    if exit_code < 0:
        name = _signal_name(-exit_code)
        raise RunnerError(
            f"the runner was killed by {name}{_tail(stderr)}",
            hint=SIGNAL_HINTS.get(name, "the model file may be damaged"),
        )
    if not path.is_file():
        raise RunnerError(f"the runner ended with exit code {exit_code} and no result{_tail(stderr)}")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunnerError(f"the runner's result is not JSON: {error}{_tail(stderr)}") from error
    if not isinstance(result, dict) or result.get("schema_version") != SCHEMA_VERSION or "ok" not in result:
        raise RunnerError(
            f"the runner's result is not one of schema_version {SCHEMA_VERSION}: {str(result)[:200]}"
        )
    if result["ok"] is not True:
        failure = result.get("error") or {}
        raise RunnerError(str(failure.get("message", "the runner failed")), hint=failure.get("hint"))
    if exit_code != 0:
        raise RunnerError(f"the runner ended with exit code {exit_code} after its result{_tail(stderr)}")
    return result


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _tail(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return f"; its last line: {lines[-1][:300]}" if lines else ""
