"""The commands `edgecnn devices list` and `edgecnn devices show`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import click


@click.group(short_help="List and show device profiles.")
def devices() -> None:
    """List and show device profiles: what a machine is, how to reach it and what its runtimes read."""


@devices.command("list")
def list_() -> None:
    """List the profiles in ./devices and those shipped with edgecnn."""
    from edgecnn.devices.profile import list_devices, load_device

    names = list_devices()
    width = max(map(len, names), default=0)
    for name in names:
        click.echo(f"{name:<{width}}  {load_device(name).description}".rstrip())


@devices.command()
@click.argument("name")
def show(name: str) -> None:
    """Check the profile NAME, or a file, and print what it says."""
    from edgecnn.devices.profile import load_device

    device = load_device(name)
    rows = {field.name: getattr(device, field.name) for field in fields(device)}
    rows |= {"max_opset": device.max_opset, "max_ir_version": device.max_ir_version}
    width = max(map(len, rows))
    for key, value in rows.items():
        for line in _lines(value):
            click.echo(f"{key:<{width}}  {line}")


def _lines(value: Any) -> list[str]:
    """Return a value's text, one line per entry; nothing for a value that is not set."""
    if isinstance(value, Mapping):
        return [f"{key} {item}" for key, item in value.items()]
    if isinstance(value, tuple):
        return [" ".join(str(getattr(item, field.name)) for field in fields(item)) for item in value]
    return [] if value in (None, "") else [str(value)]
