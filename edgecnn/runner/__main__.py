"""Run one request: python -m edgecnn.runner REQUEST.json RESULT.json.

The result is written to a temporary name and renamed.
Exit code 0: done; 1: the result says what failed; 2: usage.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

from .failure import MissingRuntimeFailure, RunFailure, first_line
from .request import Request, read_request

SCHEMA_VERSION = 1


def main(arguments: Optional[List[str]] = None) -> int:
    """Run the request in the first file and write the result to the second.

    Args:
        arguments: [request path, result path]; None takes the command line's.

    Returns:
        The process exit code.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m edgecnn.runner REQUEST.json RESULT.json\n")
        return 2
    try:
        result = _run(read_request(Path(arguments[0])))
    except RunFailure as failure:
        result = _failed(failure.to_dict())
    except MemoryError:
        result = _failed(
            {"type": "MemoryError", "message": "out of memory", "hint": "use a smaller batch_size"}
        )
    except OSError as error:
        result = _failed({"type": type(error).__name__, "message": first_line(error), "hint": None})
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    try:
        write_result(Path(arguments[1]), result)
    except OSError as error:
        sys.stderr.write(f"result {arguments[1]} cannot be written: {first_line(error)}\n")
        return 1
    return 0 if result["ok"] else 1


def write_result(path: Path, result: Dict[str, Any]) -> None:
    """Write JSON under a temporary name and rename it, so that a reader never sees half a file.

    Raises:
        OSError: if it cannot be written.
    """
    temporary = path.with_name(path.name + ".part")
    encoder = json.JSONEncoder(allow_nan=False, default=lambda pieces: pieces.listed())
    with temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(
            encoder.iterencode(result)
        )  # bit by bit: the samples of a long run are never all here
    temporary.replace(path)


def _run(request: Request) -> Dict[str, Any]:
    if request.task == "probe":
        from .probe import run_probe

        return {"schema_version": SCHEMA_VERSION, "ok": True, "task": "probe", **run_probe(request)}
    try:
        # Imported here, so that a machine without NumPy can be probed.
        from .tasks import execute
    except ImportError as error:
        raise MissingRuntimeFailure(
            f"numpy cannot be imported by {sys.executable}: {first_line(error)}", hint="pip install numpy"
        ) from error
    return {"schema_version": SCHEMA_VERSION, **execute(request)}


def _failed(error: Dict[str, Any]) -> Dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "ok": False, "error": error}


if __name__ == "__main__":
    sys.exit(main())
