"""The command `edgecnn` and its exit codes.

    0    done                                   2    wrong usage
    1    an EdgeCNNError: one line and a hint   3    a budget was missed
    130  interrupted with Ctrl-C                143  terminated with SIGTERM

stdout carries the result and nothing else; progress, warnings and errors go to stderr. EDGECNN_DEBUG=1 shows
the traceback of an error, and the Python warnings of the packages underneath.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

import click

from edgecnn import __version__
from edgecnn.errors import EdgeCNNError

COMMANDS = {
    "compress": "edgecnn.cli.compress:compress",
    "evaluate": "edgecnn.cli.evaluate:evaluate",
    "inspect": "edgecnn.cli.inspect:inspect",
    "bench": "edgecnn.cli.bench:bench",
    "check": "edgecnn.cli.check:check",
    "compare": "edgecnn.cli.compare:compare",
    "recipes": "edgecnn.cli.recipes:recipes",
    "devices": "edgecnn.cli.devices:devices",
}
"""Every command by name: "module:command", imported when it is used."""

INTERRUPTED = 130
TERMINATED = 128 + signal.SIGTERM

EXTRAS = {
    "torch": "torch",
    "safetensors": "torch",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "ai_edge_litert": "tflite",
    "flatbuffers": "tflite",
}
"""The extra of edgecnn that brings each package."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which cleans up as Ctrl-C does."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names of the commands, in the order in which one meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import one command, or return None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgecnn")
def edgecnn() -> None:
    """Compress trained CNNs for small machines, and prove that it was worth it.

    \b
    edgecnn compress model.pt2 --int8 --data images/ -o out
    """  # noqa: D301


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: by default those of the process.
    """
    try:
        with _quiet(), _terminable():
            code = edgecnn.main(args=arguments, prog_name="edgecnn", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt) as error:
        if isinstance(error.__cause__ or error, Terminated):  # click turns either signal into its Abort
            click.echo("terminated; no unfinished file is left", err=True)
            return TERMINATED
        click.echo("interrupted; no unfinished file is left", err=True)
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:  # the reader of stdout has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except EdgeCNNError as error:
        _say(error.message, error.hint)
        return error.exit_code
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            return _internal(error)
        _say(f"{package} is needed here and not installed", f"pip install 'edgecnn[{EXTRAS[package]}]'")
        return 1
    except Exception as error:  # noqa: BLE001 - whoever sees it should not have to read a traceback
        return _internal(error)
    return code if isinstance(code, int) else 0


def _say(message: str, hint: str | None) -> None:
    """Print an error and its hint, and where it came from if EDGECNN_DEBUG asks for it."""
    if _debugging():
        traceback.print_exc()
    click.echo(f"{_who()}{click.style('error:', fg='red', bold=True)} {message}", err=True)
    if hint:
        click.echo(f"{click.style('hint:', bold=True)} {hint}", err=True)


def _who() -> str:
    """Return which process speaks, where torchrun started several and this is not the first."""
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return f"process {rank} of {world}: " if rank.isdigit() and int(rank) > 0 else ""


def _internal(error: Exception) -> int:
    """Say that an error was not foreseen."""
    first = str(error).strip().partition("\n")[0]
    _say(
        f"{type(error).__name__}: {first}" if first else type(error).__name__,
        "edgecnn did not foresee this: run again with EDGECNN_DEBUG=1 and report what it shows",
    )
    return 1


def _debugging() -> bool:
    return os.environ.get("EDGECNN_DEBUG") == "1"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the Python warnings of other packages off stderr; edgecnn's own are in the report."""
    with warnings.catch_warnings():
        if not _debugging() and not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM clean up like Ctrl-C: temporary files go, and so does the process that runs the files."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if earlier is None else earlier)


def _terminate(_number: int, _frame: object) -> NoReturn:
    """Raise Terminated."""
    raise Terminated
