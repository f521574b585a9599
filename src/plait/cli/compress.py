"""`plait compress`."""

from __future__ import annotations

from typing import Annotated

import typer

from plait.cli.options import Energy, Force, Json, Keys, Out, Workers, with_recipe_keys


@with_recipe_keys("compress")
def compress(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help=r"FOLDER or org/repo\[@revision]\[/subfolder].", show_default=False)
    ],
    out: Out,
    energy: Energy = None,
    workers: Workers = None,
    json: Json = False,
    force: Force = False,
    *,
    keys: Keys,
) -> None:
    """Write one adapter at a lower rank, with the energy that this keeps.

    Example: plait compress ./adapter --rank 16 -o small
    """
    from plait.cli.console import ProgressBars, print_json
    from plait.cli.merge import show_result
    from plait.commands.compress import CompressOrder

    settings = keys.settings
    result = CompressOrder(adapter, out, settings.pop("rank", None), energy, settings, force, workers).run(ProgressBars())
    if json:
        print_json({"folder": str(result.folder), **result.record.model_dump(mode="json")})
    else:
        show_result(result)
