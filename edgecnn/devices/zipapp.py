"""The runner as one file: a zipapp that a board runs with `python3 FILE REQUEST.json RESULT.json`.

Its bytes depend on the runner's sources alone (names in order, one date, one mode), so that a board that
holds a file of the same sha256 needs no new one.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

PACKAGE = "edgecnn_runner"
"""What the runner's folder is called on a board."""

DATE = (1980, 1, 1, 0, 0, 0)
SHEBANG = b"#!/usr/bin/env python3\n"

MAIN = f"""import sys

if sys.version_info < (3, 9):
    sys.stderr.write("edgecnn's runner needs Python 3.9 or newer, this is %d.%d\\n" % sys.version_info[:2])
    sys.exit(3)

from {PACKAGE}.__main__ import main

sys.exit(main())
"""
"""Any Python can read this far, and say that it is too old."""


def build_zipapp(path: Path) -> str:
    """Write the runner as a zipapp, under a temporary name first.

    Args:
        path: the file to write; its folder exists.

    Returns:
        The file's sha256, hexadecimal.

    Raises:
        OSError: if it cannot be written.
    """
    data = zipapp_bytes()
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    temporary.replace(path)
    return hashlib.sha256(data).hexdigest()


def zipapp_bytes() -> bytes:
    """Return the zipapp's bytes, the same for the same sources.

    Example:
        >>> zipapp_bytes() == zipapp_bytes(), zipapp_bytes()[:2]
        (True, b'#!')
    """
    folder = Path(__file__).resolve().parent.parent / "runner"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        _add(archive, "__main__.py", MAIN.encode())
        for source in sorted(folder.glob("*.py"), key=lambda entry: entry.name):
            _add(archive, f"{PACKAGE}/{source.name}", source.read_bytes())
    return SHEBANG + stream.getvalue()


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name, DATE)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.create_system = 3  # Unix, whatever this machine is
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, data, compresslevel=9)
