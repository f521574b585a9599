"""`plait tasks`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.options import Json

if TYPE_CHECKING:
    from plait.tasks.checking import SplitCheck, TaskCheck

tasks_app = typer.Typer(no_args_is_help=True, help="Tasks: what is asked of a model, and on which data.")


@tasks_app.callback()
def _tasks() -> None:
    """Keep `check` a sub-command while it is the only one."""


@tasks_app.command("check")
def check(
    tasks: Annotated[list[Path], typer.Argument(help="Task files (.yaml), or lm_eval:NAME.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "--base-id",
            help="Model whose tokenizer and chat template are used: FOLDER or org/repo.",
            show_default=False,
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model's tokenizer.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what a task asks: rendered examples, token counts, label balance, overlap between splits.

    Exit code 2 when calibration, validation and test are not disjoint.

    Example: plait tasks check tasks/langid.yaml --model HuggingFaceTB/SmolLM2-135M-Instruct

    Example: plait tasks check tasks/intent.yaml tasks/langid.yaml --json
    """
    from plait.cli.console import print_json
    from plait.commands.tasks import CheckTasksOrder

    checks = CheckTasksOrder(tasks, model, trust_remote_code).run()
    if json:
        print_json({"tasks": [c.model_dump(mode="json") for c in checks]})
    else:
        for found in checks:
            _show(found)
    if not all(c.ok for c in checks):
        raise typer.Exit(2)


def _show(found: TaskCheck) -> None:

    from plait.cli.console import new_table, out, print_notes

    console = out()
    console.print(f"[bold]{found.name}[/bold] · {found.kind} · {found.metric} · adapter {found.adapter}")
    table = new_table(("split", "examples", "duplicates", "majority", "prompt tokens", "answer tokens"), left=("split",))
    for name, split in found.splits.items():
        majority = "–" if split.majority is None else f"{split.majority:.1%}"
        table.add_row(name, str(split.examples), str(split.duplicates), majority, *_token_cells(split))
    console.print(table)
    for name, split in found.splits.items():
        if split.targets is not None:
            counts = ", ".join(f"{label} {count}" for label, count in split.targets.items())
            console.print(f"{name}: {counts}", markup=False)
        if split.images is not None:
            sizes = " / ".join(f"{w} × {h}" for w, h in (split.images.smallest, split.images.median, split.images.largest))
            kinds = ", ".join(f"{count} {kind}" for kind, count in split.images.formats.items())
            console.print(f"{name}: images of {sizes} pixels ({kinds}, {split.images.bytes / 1e6:.1f} MB)", markup=False)
        if split.sounds is not None:
            seconds = " / ".join(f"{n:.1f}" for n in (split.sounds.shortest, split.sounds.median, split.sounds.longest))
            rates = ", ".join(f"{count} of {rate} Hz" for rate, count in split.sounds.rates.items())
            console.print(f"{name}: sounds of {seconds} seconds ({rates})  {_bars(split.sounds.counts)}", markup=False)
    for name, split in list(found.splits.items())[-1:]:
        for rendered in split.rendered:
            console.print(f"\n[dim]{name}, as the model reads it, up to the answer:[/dim]")
            console.print(rendered.prompt + f"⟦{rendered.target}⟧", markup=False, soft_wrap=True)
    for overlap in found.overlaps:
        word = "[bold red]error:[/bold red]" if overlap.forbidden else "[dim]note:[/dim]"
        console.print(word, end=" ")
        console.print(f"{overlap}.", markup=False)
    print_notes(found.notes, console)
    console.print()


def _bars(counts: Sequence[int]) -> str:
    """Return a histogram as text; what there is any of has a bar."""
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // max(counts))] for count in counts)


def _token_cells(split: SplitCheck) -> tuple[str, str]:
    t: Any = split.tokens
    if t is None:
        return "–", "–"
    cut = f" ({t.truncated} cut)" if t.truncated else ""
    return f"{t.shortest} / {t.median} / {t.longest}{cut}", f"≤ {t.longest_answer}" if t.longest_answer else "–"
