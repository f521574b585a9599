"""`plait compress`."""

from __future__ import annotations

from typing import Annotated

import typer

from plait.cli.options import Energy, Keys, Out, Writing, with_options


@with_options("compress")
def compress(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help=r"FOLDER or org/repo\[@revision]\[/subfolder].", show_default=False)
    ],
    out: Out,
    energy: Energy = None,
    *,
    writing: Writing,
    keys: Keys,
) -> None:
    """Write one adapter at a lower rank, with the energy that this keeps.

    Example: plait compress ./adapter --rank 16 -o small

    Example: plait compress org/adapter --energy 0.99 --layout pattern -o small
    """
    from plait.cli.console import ProgressBars, print_json, print_notes
    from plait.cli.merge import show_result
    from plait.commands.compress import CompressOrder

    settings = keys.settings
    rank = settings.pop("rank", None)
    order = CompressOrder(out, rank, energy, settings, writing.force, writing.workers, adapter=adapter)
    result = order.run(ProgressBars())
    print_notes(result.record.notes)
    if writing.json:
        print_json({"folder": str(result.folder), **result.record.model_dump(mode="json")})
    else:
        show_result(result)
