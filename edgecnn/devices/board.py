"""Requests on a board that has Python: the runner and the files are sent there.

Each file goes there once by its sha256, one request runs at a time, and a result counts only when all of it
arrived. A lost connection is tried once more, and the result says so.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from edgecnn.devices.local import PATH_KEYS, absolute_paths, read_result
from edgecnn.devices.profile import Device
from edgecnn.devices.transport import Completed, Transport
from edgecnn.devices.workspace import SETUP_TIMEOUT_S, Workspace
from edgecnn.devices.zipapp import build_zipapp
from edgecnn.errors import DeviceError, DeviceTimeoutError, RunnerError, TransportError

T = TypeVar("T")

KEPT_INPUT_BYTES = 64 * 2**20
"""Inputs and labels kept on a board for the next request; a board's disk is often its memory."""

GRACE_S = 30
RETRY_AFTER_S = 1.0
MIN_PYTHON = (3, 9)

RUN = """
import os, runpy, signal, sys
os.setsid()
with open(sys.argv[1], "w") as stream:
    stream.write(str(os.getpid()))
signal.alarm(int(sys.argv[2]))
os.chdir(sys.argv[3])
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Arguments: pid file, seconds, folder, zipapp, request, result. The alarm ends a run whose host is gone."""

STOP = (
    '[ -f "$1" ] || exit 0; p=$(cat "$1"); kill -9 "-$p" 2>/dev/null || kill -9 "$p" 2>/dev/null; rm -f "$1"'
)

ENVIRONMENT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from edgecnn_runner.environment import describe_environment
print(json.dumps(describe_environment()))
"""


class BoardExecutor:
    """Requests on a board that has Python.

    Args:
        device: its profile.
        transport: to it.
        workspace: a fresh folder there.
    """

    def __init__(self, device: Device, transport: Transport, workspace: Workspace) -> None:
        self.device = device
        self._transport = transport
        self._folder = workspace.folder
        self._runner = f"{workspace.folder}/edgecnn_runner.pyz"
        self._pid = f"{workspace.folder}/pid"
        self._pushed: dict[str, str] = {}
        self._inputs: dict[str, int] = {}
        self._warnings = list(workspace.warnings)
        self._running = False
        self._num_requests = 0

    def start(self) -> None:
        """Check the board's Python and send the runner.

        Raises:
            DeviceError: if there is none, or it is too old.
        """
        check_python(self.device, self._transport)
        with tempfile.TemporaryDirectory(prefix="edgecnn-") as name:
            path = Path(name) / "edgecnn_runner.pyz"
            build_zipapp(path)
            self._retry(lambda: self._transport.push(path, self._runner))

    def run_request(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Run a request there; its paths are of this machine.

        Args:
            request: as for `run_local`.
            timeout_s: seconds for the run itself; transfers have limits of their own.

        Returns:
            The result; `warnings` says when the connection was lost and the request run again.

        Raises:
            RunnerError: if the runner reports a failure, dies, takes too long or leaves no valid result.
            DeviceError: if the board cannot be used any more.
        """
        self._num_requests += 1
        translated, outputs = self._translate(absolute_paths(request))
        result = self._run(translated, timeout_s)
        if outputs is not None:
            self._fetch(result, str(translated["outputs"]), outputs)
        self._forget_inputs()
        if self._warnings:
            result["warnings"] = [*result.get("warnings", []), *self._warnings]
            self._warnings = []
        return result

    def environment(self) -> dict[str, Any]:
        """Describe the board.

        Raises:
            DeviceError: if it does not answer with a description.
        """
        argv = [self.device.python, "-c", ENVIRONMENT, self._runner]
        found = self._retry(lambda: self._transport.run(argv, timeout_s=SETUP_TIMEOUT_S))
        try:
            values = json.loads(found.stdout)
        except ValueError as error:
            raise DeviceError(f"{self.device.name} cannot describe itself: {found.tail}") from error
        if not isinstance(values, dict):
            raise DeviceError(f"{self.device.name} describes itself as {str(values)[:80]}")
        return values

    def stop(self) -> None:
        """End a run that is under way.

        Raises:
            DeviceError: if the board cannot be reached.
        """
        if self._running:
            self._transport.run(["sh", "-c", STOP, "sh", self._pid], timeout_s=SETUP_TIMEOUT_S)
            self._running = False

    def _retry(self, action: Callable[[], T]) -> T:
        """Do it, once more if the connection is lost, and remember that."""
        return try_twice(action, self.device.name, self.stop, self._warnings)

    def _run(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Run a request whose files are there."""
        stem = f"{self._folder}/{self._num_requests}"
        request_path, result_path = f"{stem}.request.json", f"{stem}.result.json"
        with tempfile.TemporaryDirectory(prefix="edgecnn-") as name:
            path = Path(name) / "request.json"
            path.write_text(json.dumps(request), encoding="utf-8")
            self._retry(lambda: self._transport.push(path, request_path))
            argv = [self._folder, self._runner, request_path, result_path]
            found = self._retry(lambda: self._start_run(argv, timeout_s))
            read = ["cat", result_path]
            fetch_s = max(SETUP_TIMEOUT_S, timeout_s)  # the samples of a long run are tens of MB
            answer = self._retry(lambda: self._transport.run(read, timeout_s=fetch_s))
            self._remove(request_path, result_path, self._pid)
            local_result = Path(name) / "result.json"
            if answer.exit_code == 0:
                local_result.write_bytes(answer.stdout)
            return self._read(local_result, found)

    def _start_run(self, argv: list[str], timeout_s: float) -> Completed:
        """Run the runner there, and end it when it takes too long."""
        limit = str(int(timeout_s) + GRACE_S)
        words = ["env", "ORT_DISABLE_TELEMETRY=1", self.device.python, "-c", RUN, self._pid, limit, *argv]
        self._running = True
        try:
            found = self._transport.run(words, timeout_s=timeout_s)
        except DeviceTimeoutError as error:
            self.stop()
            raise RunnerError(
                f"the runner took longer than {timeout_s:g} s on {self.device.name} and was stopped",
                hint="is it overloaded? fewer runs or images, or a smaller network, take less time",
            ) from error
        self._running = False
        return found

    def _read(self, path: Path, found: Completed) -> dict[str, Any]:
        """Return the result in a file that came back, or raise for what the run says instead."""
        signal_number = found.exit_code - 128 if 128 < found.exit_code <= 192 else 0
        said = (found.stdout + found.stderr).decode("utf-8", "replace")
        try:
            return read_result(path, -signal_number or found.exit_code, said)
        except RunnerError as error:
            raise RunnerError(f"{self.device.name}: {error.message}", hint=error.hint) from error

    def _translate(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], Path | None]:
        """Send the files of a request and put their paths there in its place."""
        translated = dict(request)
        outputs = None
        for key in PATH_KEYS:
            if not isinstance(translated.get(key), str):
                continue
            if key == "outputs":
                outputs = Path(translated[key])
                suffix = ".npz" if outputs.suffix.lower() == ".npz" else ""
                translated[key] = f"{self._folder}/outputs{self._num_requests}{suffix}"
            else:
                path = Path(translated[key])
                translated[key] = self._send([path])
                self._inputs[translated[key]] = path.stat().st_size
        artifacts = translated.get("artifacts")
        if isinstance(artifacts, (list, tuple)):
            translated["artifacts"] = [
                {**entry, "path": self._send(_with_sidecar(Path(entry["path"])))}
                if isinstance(entry, Mapping) and isinstance(entry.get("path"), str)
                else entry
                for entry in artifacts
            ]
        return translated, outputs

    def _send(self, paths: list[Path]) -> str:
        """Send files into a folder named by their contents, unless it is there; return the first's path."""
        for path in paths:
            if not path.is_file():
                raise DeviceError(f"{path} does not exist, so it cannot be sent to {self.device.name}")
        key = hashlib.sha256("".join(_sha256(path) for path in paths).encode()).hexdigest()[:16]
        folder = f"{self._folder}/{key}"
        remote = f"{folder}/{paths[0].name}"
        if self._pushed.get(remote) != key:
            self._checked(["mkdir", "-p", folder])
            for path in paths:
                self._retry(lambda path=path: self._transport.push(path, f"{folder}/{path.name}"))  # type: ignore[misc]
            self._pushed[remote] = key
        return remote

    def _fetch(self, result: dict[str, Any], remote: str, outputs: Path) -> None:
        """Bring the arrays of a result here, and let it say so."""
        if outputs.suffix.lower() == ".npz":
            pairs = [(remote, outputs)]
        else:
            described = [entry for item in result["artifacts"].values() for entry in item["outputs"]]
            names = [str(entry["array"]) for entry in described]
            for name in names:
                if name != Path(name).name or name.startswith("."):
                    raise RunnerError(f"{self.device.name}: the result names the file {name!r}")
            pairs = [(f"{remote}/{name}", outputs / name) for name in names]
        for source, target in pairs:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(target.name + ".part")
            try:
                self._retry(lambda s=source, t=temporary: self._transport.pull(s, t))  # type: ignore[misc]
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
        result["outputs"] = str(outputs)
        self._remove(remote)

    def _forget_inputs(self) -> None:
        """Remove the oldest inputs there once they take too much room."""
        while len(self._inputs) > 0 and sum(self._inputs.values()) > KEPT_INPUT_BYTES:
            remote = next(iter(self._inputs))
            del self._inputs[remote]
            self._pushed.pop(remote, None)
            self._remove(remote.rpartition("/")[0])

    def _remove(self, *paths: str) -> None:
        self._checked(["rm", "-rf", *paths])

    def _checked(self, argv: list[str]) -> None:
        found = self._retry(lambda: self._transport.run(argv, timeout_s=SETUP_TIMEOUT_S))
        if found.exit_code != 0:
            raise DeviceError(f"{argv[0]} failed on {self.device.name}: {found.tail}")


def try_twice(action: Callable[[], T], name: str, stop: Callable[[], None], warnings: list[str]) -> T:
    """Do something on a board, once more if the connection is lost.

    Args:
        action: what to do.
        name: of the board.
        stop: ends there what the first try may have left running.
        warnings: a lost connection is added here.

    Raises:
        TransportError: if the connection is lost again.
    """
    try:
        return action()
    except TransportError as error:
        time.sleep(RETRY_AFTER_S)
        try:
            stop()
            result = action()
        except TransportError as again:
            raise TransportError(
                f"{name} went away during the run and did not come back: {again.message}", hint=again.hint
            ) from error
        warnings.append(f"{error.message}; tried once more")
        return result


def check_python(
    device: Device, transport: Transport, minimum: tuple[int, int] = MIN_PYTHON
) -> tuple[int, int]:
    """Return the version of a board's Python.

    Raises:
        DeviceError: if there is none, it does not start, or it is older than the runner needs.
    """
    script = "import sys; print('%d.%d' % sys.version_info[:2])"
    found = transport.run([device.python, "-c", script], timeout_s=SETUP_TIMEOUT_S)
    if found.exit_code in (126, 127):
        raise DeviceError(
            f"{device.name} has no Python: {device.python} is not there or cannot be run",
            hint="install Python 3.9 or newer there, or set python in its profile to the interpreter's path",
        )
    try:
        major, minor = (int(part) for part in found.text.splitlines()[-1].split("."))
    except (ValueError, IndexError) as error:
        raise DeviceError(
            f"{device.python} on {device.name} does not work (exit code {found.exit_code}): "
            f"{found.tail or 'no message'}"
        ) from error
    if (major, minor) < minimum:
        raise DeviceError(
            f"{device.name} has Python {major}.{minor}, expected 3.9 or newer",
            hint="set python in its profile to the path of a newer one",
        )
    return major, minor


def _with_sidecar(path: Path) -> list[Path]:
    sidecar = path.with_name(path.name + ".json")
    return [path, sidecar] if sidecar.is_file() else [path]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
