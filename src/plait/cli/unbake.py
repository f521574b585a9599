"""`plait un-bake`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.options import Out, Writing, with_options

if TYPE_CHECKING:
    from plait.baking.unbake import UnbakeResult


@with_options()
def unbake(
    model: Annotated[str, typer.Argument(help=r"A baked model: FOLDER or org/repo\[@revision].", show_default=False)],
    adapter: Annotated[str, typer.Argument(help="The adapter to take out of it, likewise.", show_default=False)],
    out: Out,
    weight: Annotated[float | None, typer.Option(help=r"What the adapter was baked with. \[1.0]", show_default=False)] = None,
    original: Annotated[
        str | None, typer.Option(help="The model before the bake: report how far the result is from it.", show_default=False)
    ] = None,
    *,
    writing: Writing,
) -> None:
    """Take an adapter out of a baked model again, to within rounding.

    Example: plait un-bake baked ./adapter -o restored --original org/base

    Example: plait un-bake baked org/adapter --weight 0.5 -o restored
    """
    from plait.cli.console import ProgressBars, print_json
    from plait.commands.unbake import UnbakeOrder

    result = UnbakeOrder(model, adapter, out, weight, original, writing.force, writing.workers).run(ProgressBars())
    if writing.json:
        remaining = result.remaining.model_dump(mode="json") if result.remaining else None
        record = result.bake.record.model_dump(mode="json")
        summary = {"folder": str(result.bake.folder), "weight": result.weight, "remaining": remaining, "left": result.left}
        print_json({**summary, **record})
    else:
        _show(result)


def _show(result: UnbakeResult) -> None:
    from plait.cli.console import err, out
    from plait.errors import listed

    record, remaining = result.bake.record, result.remaining
    if result.left:
        err().print(
            f"note: the adapter holds {listed(result.left)} in full; the model keeps what it has there, since "
            "what a bake replaces is gone.",
            style="dim",
            markup=False,
        )
    out().print(
        f"{record.base_model} − {result.weight:g} × {record.sources[0]['name']} → {result.bake.folder} · "
        f"{len(record.modules)} target modules · {record.seconds:.1f} s",
        markup=False,
    )
    if remaining is None:
        out().print(
            "rounded twice, by the bake and now: entries come back to within about one unit in the last place of the stored "
            "dtype; --original measures it"
        )
    elif remaining.where is None:
        out().print("[green]equal[/green] to the original, every bit")
    else:
        share = remaining.unequal / remaining.entries
        out().print(
            f"rounding remains: {remaining.unequal} of {remaining.entries} entries ({share:.1%}) in {remaining.tensors} "
            f"tensors differ from the original, by at most {remaining.largest:.2g} ({remaining.where})",
            markup=False,
        )
