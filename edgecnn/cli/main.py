"""The command `edgecnn` and its exit codes.

    0    done                                   2    wrong usage
    1    an EdgeCNNError: one line and a hint   3    a budget was missed
    130  interrupted with Ctrl-C

stdout carries the result and nothing else; progress, warnings and errors go to stderr. EDGECNN_DEBUG=1 shows
the traceback of an error.
"""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Sequence

import click

from edgecnn import __version__
from edgecnn.errors import EdgeCNNError

COMMANDS = {
    "compress": "edgecnn.cli.compress:compress",
    "evaluate": "edgecnn.cli.evaluate:evaluate",
    "inspect": "edgecnn.cli.inspect:inspect",
    "recipes": "edgecnn.cli.recipes:recipes",
    "devices": "edgecnn.cli.devices:devices",
}
"""Every command by name: "module:command", imported when it is used."""

INTERRUPTED = 130


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
        code = edgecnn.main(args=arguments, prog_name="edgecnn", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted, nothing written", err=True)
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except EdgeCNNError as error:
        if os.environ.get("EDGECNN_DEBUG") == "1":
            traceback.print_exc()
        click.echo(f"{click.style('error:', fg='red', bold=True)} {error.message}", err=True)
        if error.hint:
            click.echo(f"{click.style('hint:', bold=True)} {error.hint}", err=True)
        return error.exit_code
    return code if isinstance(code, int) else 0
