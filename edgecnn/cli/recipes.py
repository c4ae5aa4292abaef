"""The commands `edgecnn recipes list` and `edgecnn recipes show`."""

from __future__ import annotations

import click


@click.group(short_help="List and show recipes.")
def recipes() -> None:
    """List and show recipes: named lists of passes with their parameters."""


@recipes.command("list")
def list_() -> None:
    """List the recipes in ./recipes, their files in brackets, and those shipped with edgecnn."""
    from edgecnn.recipe import describe_recipe, list_recipes

    found = list_recipes()
    width = max(map(len, found), default=0)
    for name, path in found.items():
        own = "" if path.is_absolute() else f"  [{path}]"
        click.echo(f"{name:<{width}}  {describe_recipe(path)}{own}")


@recipes.command()
@click.argument("name")
def show(name: str) -> None:
    """Check the recipe NAME, or a file, and print it with every parameter written out.

    Where a pass's own packages are not installed, it is printed as it is written.
    """
    from edgecnn.recipe import Recipe, find_recipe

    try:
        click.echo(Recipe.load(name).to_toml(), nl=False)
    except ModuleNotFoundError as error:
        if (error.name or "edgecnn").partition(".")[0] == "edgecnn":
            raise
        click.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)
        said = f"as it is written: without {error.name} it cannot be checked, and defaults are not known"
        click.echo(said, err=True)
