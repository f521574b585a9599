"""`plait convert`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.options import DryRun, Force, Json, Out

if TYPE_CHECKING:
    from plait.merging.conversion import ConvertPlan


def convert(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help=r"FOLDER, FILE or org/repo\[@revision]\[/subfolder].", show_default=False)
    ],
    out: Out,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="Format to write: docs/formats.md.", show_default=False)],
    tower: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Write one component of a pipeline alone: unet, text_encoder, …", show_default=False),
    ] = None,
    base_id: Annotated[
        str | None,
        typer.Option("--base-id", help="The base model, where the adapter names none, or another.", show_default=False),
    ] = None,
    dry_run: DryRun = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write an adapter in the format of another program, with the same factors.

    Example: plait convert ./adapter --to mlx -o adapter-mlx

    Example: plait convert style.safetensors --to diffusers -o style-diffusers
    """
    from plait.cli.console import ProgressBars, print_json, print_notes
    from plait.cli.console import out as console
    from plait.commands.convert import ConvertOrder

    order = ConvertOrder(adapter=adapter, to=to, out=out, tower=tower, base_model=base_id, force=force)
    plan = order.plan() if dry_run else order.run(ProgressBars()).plan
    if json:
        print_json(({} if dry_run else {"folder": str(out)}) | plan.model_dump(mode="json"))
        return
    print_notes(plan.notes)
    console().print(_words(plan) + ("" if dry_run else f" → [bold]{out}[/bold]"), soft_wrap=True)


def _words(plan: ConvertPlan) -> str:
    from rich.markup import escape

    where = f" of {', '.join(plan.towers)}" if plan.towers else ""
    ranks = f"rank {plan.ranks[0]}" if len(plan.ranks) == 1 else f"ranks {plan.ranks[0]} to {plan.ranks[-1]}"
    text = f"{plan.adapter}: {plan.source} to {plan.to}, {plan.modules} target modules{where}, {ranks}"
    if plan.metadata:
        text += f", {len(plan.metadata)} texts of metadata"
    return escape(text)
