"""`plait tune`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.options import Keys, Loading, Out, RecipeOrSeveral, Writing, with_options

if TYPE_CHECKING:
    from plait.tuning.pipeline import TuneResult


@with_options("tune")
def tune(
    inputs: RecipeOrSeveral,
    out: Out,
    control: Annotated[
        bool, typer.Option("--control", help="Also let a fresh LoRA learn the same, for comparison (doubles the time).")
    ] = False,
    controls: Annotated[
        bool, typer.Option("--controls", help="The same, and random adapters of equal norms (three times the time).")
    ] = False,
    *,
    loading: Loading,
    writing: Writing,
    keys: Keys,
) -> None:
    """Merge adapters, and let the merge learn from unlabeled texts what it lost.

    Every task's own adapter is the teacher; no label is read. Without texts of yours: --texts lines.

    Example: plait tune ./intent ./langid --tasks tasks/intent.yaml tasks/langid.yaml -o tuned

    Example: plait tune ./intent ./langid --tasks tasks/intent.yaml tasks/langid.yaml --granularity module -o tuned
    """
    from plait.cli.console import ProgressBars, print_json
    from plait.commands.tune import START, TuneOrder
    from plait.hub.pretrained import LoadOptions
    from plait.tuning.pipeline import TuneOptions

    options = TuneOptions(LoadOptions(*loading), control, controls, writing.workers)
    request = keys.request(inputs, method=START, mixed=False)
    order = TuneOrder(request=request, out=out, options=options, force=writing.force)
    result = order.run(ProgressBars())
    if writing.json:
        print_json({"folder": str(result.folder), **result.record.model_dump(mode="json")})
    else:
        _show(result)


def _show(result: TuneResult) -> None:

    from plait.cli.console import folder_size, new_table, out, print_notes

    console, record = out(), result.record
    written = folder_size(result.folder)
    console.print(f"[bold]{' + '.join(s['name'] for s in record.sources)}[/bold] → [bold]{result.folder}[/bold]")
    seconds = sum(record.seconds.values())
    console.print(f"rank {record.rank} · scale {record.scale:.3g} · step {record.kept_step} of {len(record.losses)} kept · "
                  f"{written} · {seconds:.0f} s")  # fmt: skip
    others = {"fresh LoRA": record.control, "random": record.random}
    shown = {"tuned": record.kept} | {name: c.held for name, c in others.items() if c is not None}
    table = new_table(("task", "texts", "base", record.recipe["method"]["name"], *shown), left=("task", "texts"))
    for t in record.texts:
        cells = [record.base[t.task], record.start.divergence[t.task], *(h.divergence[t.task] for h in shown.values())]
        table.add_row(t.task, f"{t.count}, {t.source}", *(f"{value:.3g}" for value in cells))
    shares = [1.0, record.start.share, *(h.share for h in shown.values())]
    table.add_row("share of the base's", "", *(f"{share:.1%}" for share in shares))
    console.print(table)
    console.print("[dim]KL from each task's own adapter on held-out texts, in nats: 0 answers as the adapter does.[/dim]")
    moved = "its start is zero" if record.distance is None else f"moved by {record.distance:.0%} of its start's norm"
    console.print(f"[dim]{moved}; {record.outside:.1%} of its energy is outside of what the adapters span[/dim]")
    print_notes(record.notes)
