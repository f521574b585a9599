"""`plait recipe`: schema, check, migrate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

recipe_app = typer.Typer(
    no_args_is_help=True, help="Recipes: their JSON Schema, checking one, bringing an old form up to date."
)


@recipe_app.command("schema")
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from plait.cli.console import print_json
    from plait.recipes.writing import json_schema

    print_json(json_schema())


@recipe_app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="A recipe.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print the complete recipe with every default.")] = False,
) -> None:
    """Check a recipe; every problem is listed at once, with its line."""
    from plait.cli.console import out, print_json, warnings_as_notes
    from plait.recipes.loading import load_recipe
    from plait.recipes.writing import recipe_json

    with warnings_as_notes():
        recipe = load_recipe(file)
    if json:
        print_json(recipe_json(recipe))
    else:
        names = ", ".join(a.name for a in recipe.adapters)
        out().print(f"{file}: valid. {recipe.method_name} of {names} in {recipe.space_name} space.", markup=False)


@recipe_app.command("migrate")
def migrate(
    file: Annotated[Path, typer.Argument(help="A recipe in an old form, or mergekit YAML.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write; stdout otherwise.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file there.")] = False,
) -> None:
    """Write a recipe in today's form; what changed, and where numbers will differ, goes to stderr."""
    from plait.cli.console import out as stdout
    from plait.cli.console import print_notes
    from plait.commands.recipe import MigrateOrder

    text, notes = MigrateOrder(file, out, force).run()
    print_notes(notes)
    if out is None:
        typer.echo(text, nl=False)
        return
    stdout().print(f"{file} → {out}: today's form.", markup=False, soft_wrap=True)
