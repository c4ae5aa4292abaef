"""A fresh folder on a board, held by one bench at a time and removed afterwards.

The lock is a symbolic link on the board whose target names the owner: making one is atomic, also on Android,
and it holds its text from the first moment. An owner on this machine that is no longer alive loses it at
once, with whatever it left there; one elsewhere six hours after it took it.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import re
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from edgecnn.devices.transport import Completed, Transport, transfer_failure
from edgecnn.errors import DeviceError, DeviceTimeoutError, TransportError

SETUP_TIMEOUT_S = 60.0
STALE_MINUTES = 360

SETUP = f"""
umask 077
base=${{1:-${{TMPDIR:-/tmp}}}}
mkdir -p -- "$base" && cd -- "$base" && base=$(pwd) || exit 81
locks=${{TMPDIR:-/tmp}}
[ -d "$locks" ] && [ -w "$locks" ] || locks=$base
lock=$locks/edgecnn.lock
drop() {{
  case ${{1##*:}} in
  ''|*[!0-9a-f]*) ;;
  *) for d in "$base"/edgecnn."${{1##*:}}".*; do
      [ -f "$d/pid" ] && kill -9 "-$(cat "$d/pid")" 2>/dev/null
      rm -rf -- "$d"
    done ;;
  esac
  [ "$(readlink "$lock")" = "$1" ] && rm -f -- "$lock"
}}
if [ -n "$(find "$lock" -mmin +{STALE_MINUTES} 2>/dev/null)" ]; then drop "$(readlink "$lock")"; fi
if [ -n "$3" ]; then drop "$3"; fi
[ "$3" = "$2" ] && [ "$4" = end ] && exit 0
if ! ln -sn -- "$2" "$lock"; then
  owner=$(readlink "$lock") || exit 81
  printf '%s\\n%s\\n' "$lock" "$owner"
  exit 82
fi
folder=$(mktemp -d "$base/edgecnn.${{2##*:}}.XXXXXX") || {{ rm -f -- "$lock"; exit 81; }}
printf '%s\\n%s\\n' "$lock" "$folder"
"""
"""Arguments: workdir or empty, owner, an owner known to be dead or empty, "end" to only clean up.

Exit code 81: nothing can be written there; 82: somebody holds the lock.
"""

REMOVE = 'rm -rf -- "$1"; [ "$(readlink "$2")" = "$3" ] && rm -f -- "$2"; [ ! -e "$1" ]'

CANNOT_WRITE, HELD = 81, 82

_OWNER = re.compile(r"(?P<user>[^@]*)@(?P<host>[^:]*):(?P<pid>\d+):(?P<start>\d+):(?P<token>[0-9a-f]+)")


@dataclass(frozen=True)
class Workspace:
    """A folder on a board that this process holds.

    Attributes:
        folder: absolute path there.
        lock: path of the lock there.
        owner: what the lock says.
        warnings: a lost connection, in words.
    """

    folder: str
    lock: str
    owner: str
    warnings: tuple[str, ...] = ()


def open_workspace(transport: Transport, workdir: str) -> Workspace:
    """Take the board's lock and make a fresh folder there.

    Args:
        transport: to the board.
        workdir: folder to make it in; empty for the board's temporary one.

    Raises:
        DeviceError: if another bench holds the board, or nothing can be written there.
    """
    owner = owner_name()
    try:
        try:
            return _take(transport, workdir, owner, "")
        except TransportError as error:  # what was made before it is removed and made again
            workspace = _take(transport, workdir, owner, owner)
            return replace(workspace, warnings=(f"{error.message}; tried once more",))
    except (KeyboardInterrupt, DeviceTimeoutError):
        with contextlib.suppress(DeviceError):
            transport.run(_words(workdir, owner, owner, "end"), timeout_s=SETUP_TIMEOUT_S)
        raise


def _take(transport: Transport, workdir: str, owner: str, dead: str) -> Workspace:
    for attempt in range(3):
        found = transport.run(_words(workdir, owner, dead, ""), timeout_s=SETUP_TIMEOUT_S)
        lines = found.stdout.decode("utf-8", "replace").splitlines()
        if found.exit_code == 0 and len(lines) == 2:
            return Workspace(lines[1], lines[0], owner)
        if found.exit_code != HELD or len(lines) != 2:
            break
        if attempt == 2 or not owner_is_dead(lines[1]):
            raise _held(transport.name, *lines)
        dead = lines[1]
    raise _no_folder(transport.name, workdir, found)


def _words(workdir: str, owner: str, dead: str, end: str) -> list[str]:
    return ["sh", "-c", SETUP, "sh", workdir, owner, dead, end]


def close_workspace(transport: Transport, workspace: Workspace) -> None:
    """Remove the folder and give the lock back.

    Raises:
        DeviceError: if the board cannot be reached, or the folder is still there.
    """
    words = ["sh", "-c", REMOVE, "sh", workspace.folder, workspace.lock, workspace.owner]
    found = transport.run(words, timeout_s=SETUP_TIMEOUT_S)
    if found.exit_code != 0:
        raise DeviceError(f"{workspace.folder} on {transport.name} cannot be removed: {found.tail}")


def owner_name() -> str:
    """Return who this process is: user@host:pid:start:token."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    pid = os.getpid()
    user = re.sub(r"[^\w.-]", "_", user)
    return f"{user}@{platform.node()}:{pid}:{_process_start(pid) or 0}:{uuid.uuid4().hex[:8]}"


def owner_is_dead(owner: str) -> bool:
    """Return whether a lock's owner was a process of this machine that no longer runs.

    Example:
        >>> owner_is_dead("ada@some-other-machine:17:5:ab"), owner_is_dead(owner_name())
        (False, False)
    """
    match = _OWNER.fullmatch(owner)
    if match is None or match["host"] != platform.node():
        return False
    pid = int(match["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    start = _process_start(pid)
    return start is not None and match["start"] != "0" and start != match["start"]


def _process_start(pid: int) -> str | None:
    """Return when a process started, in the kernel's ticks since boot; tells a reused number apart."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def _held(name: str, lock: str, owner: str) -> DeviceError:
    match = _OWNER.fullmatch(owner)
    holder = f"{match['user']}@{match['host']}, process {match['pid']}" if match else owner
    return DeviceError(
        f"{name} is in use by {holder}, and two benches at once would disturb each other",
        hint=f"wait for it to end; if it is gone for good, remove {lock} on the board",
    )


def _no_folder(name: str, workdir: str, found: Completed) -> DeviceError:
    if found.exit_code == CANNOT_WRITE:
        return transfer_failure(name, workdir or "its temporary folder", found)
    return DeviceError(
        f"no folder could be made on {name} (exit code {found.exit_code}): {found.tail or 'no message'}",
        hint="does its login shell run sh?",
    )
