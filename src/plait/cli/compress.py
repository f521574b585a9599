"""`plait compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compress(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help=r"FOLDER or org/repo\[@revision]\[/subfolder].", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write.", show_default=False)],
    rank: Annotated[str | None, typer.Option(help="The new rank, or energy:0.99.", show_default=False)] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="Lowest rank that keeps this share of ‖ΔW‖² in every module; the same as --rank energy:SHARE.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    layout: Annotated[str, typer.Option(help="uniform: one rank for all modules; pattern: each its own.")] = "uniform",
    base_id: Annotated[
        str | None, typer.Option("--base-id", help="Base model; needed for DoRA only.", show_default=False)
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Modules worked on at a time.", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter at --out.")] = False,
) -> None:
    """Write one adapter at a lower rank, with the energy that this keeps.

    Example: plait compress ./adapter --rank 16 -o small
    """
    from plait.cli.console import ProgressBars, print_json
    from plait.cli.merge import show_result
    from plait.commands.compress import CompressOrder

    settings = {"dtype": dtype, "layout": layout, "base_model": base_id}
    result = CompressOrder(adapter, out, rank, energy, settings, force, workers).run(ProgressBars())
    if json:
        print_json({"folder": str(result.folder), **result.record.model_dump(mode="json")})
    else:
        show_result(result)
