"""`plait extract`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.options import Energy, Out, Writing, with_options

if TYPE_CHECKING:
    from plait.extraction.pipeline import ExtractResult
    from plait.extraction.record import ExtractRecord


@with_options()
def extract(
    base: Annotated[str, typer.Argument(help=r"The base model: FOLDER or org/repo\[@revision].", show_default=False)],
    finetuned: Annotated[str, typer.Argument(help="A full fine-tune of it, likewise.", show_default=False)],
    out: Out,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the adapter.", show_default=False)] = None,
    energy: Energy = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(help=r"Layers: q_proj,v_proj, or a pattern, '*.layers.0.*'. \[all but embeddings]", show_default=False),
    ] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Embeddings too, as lora_embedding.")] = False,
    modules_to_save: Annotated[
        bool,
        typer.Option("--modules-to-save", help="Keep in full what cannot be a LoRA: norms, and biases as lora_bias."),
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    layout: Annotated[str, typer.Option(help="uniform: one rank for all modules; pattern: each its own.")] = "uniform",
    base_id: Annotated[
        str | None, typer.Option("--base-id", help=r"The base model's name in the adapter. \[BASE]", show_default=False)
    ] = None,
    *,
    writing: Writing,
) -> None:
    """Write a LoRA adapter from a full fine-tune: what it changed, at a low rank, with the energy that this keeps.

    Example: plait extract org/base org/finetuned --rank 32 -o adapter

    Example: plait extract ./base ./finetuned --energy 0.9 --layout pattern -o adapter
    """
    from plait.cli.console import ProgressBars, print_json
    from plait.commands.extract import ExtractOrder

    settings = {
        "targets": None if targets is None else [name.strip() for text in targets for name in text.split(",")],
        "embeddings": embeddings,
        "modules_to_save": modules_to_save,
        "dtype": dtype,
        "layout": layout,
        "base_id": base_id,
    }
    order = ExtractOrder(out, rank, energy, settings, writing.force, writing.workers, base=base, finetuned=finetuned)
    result = order.run(ProgressBars())
    if writing.json:
        print_json({"folder": str(result.folder), **result.record.model_dump(mode="json")})
    else:
        _show(result)


def _show(result: ExtractResult) -> None:
    from plait.cli.console import folder_size, out, print_notes
    from plait.cli.merge import show_energy

    console, record = out(), result.record
    request = record.request
    console.print(f"[bold]{request['finetuned']}[/bold] − [bold]{request['base']}[/bold] → [bold]{result.folder}[/bold]")
    written = folder_size(result.folder)
    console.print(f"{len(record.modules)} target modules · rank {record.rank} · {written} · {record.seconds:.1f} s")
    if all(m.result == "exact" for m in record.modules):
        console.print("[green]exact[/green]: the factors hold these modules exactly")
    else:
        console.print(f"[yellow]truncated[/yellow]: {record.kept:.2%} of the energy ‖ΔW‖² of these modules is kept")
        show_energy(record.modules)
    if record.unchanged:
        console.print(f"the same in both models: {len(record.unchanged)} layers, such as {record.unchanged[0]}; left out")
    _show_leftovers(record)
    if record.max_lora_rank:
        console.print(f"vLLM: --max-lora-rank {record.max_lora_rank}")
    print_notes(record.notes)


def _show_leftovers(record: ExtractRecord) -> None:
    """Report what else changed: kept in full, or lost, with the way to keep it."""
    from plait.cli.console import out

    kept = [x for x in record.leftovers if x.kept]
    lost = [x for x in record.leftovers if not x.kept]
    if kept:
        out().print(f"kept in full: {len(kept)} changed tensors, such as {kept[0].tensor}", markup=False)
    if not lost:
        return
    hint = f"; {' and '.join(record.would_keep_more)} would keep more" if record.would_keep_more else ""
    out().print(
        f"left out: {len(lost)} other changed tensors, such as {lost[0].tensor}{hint}. "
        f"In all, {record.lost:.2%} of the difference ‖Δ‖² is not in the adapter.",
        markup=False,
    )
