"""`plait tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from plait.tuning.pipeline import TuneResult
    from plait.tuning.record import TuneRecord


def tune(
    inputs: Annotated[
        list[str], typer.Argument(metavar="RECIPE|ADAPTER...", help="A recipe, or several adapters.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the adapter.", show_default=False)],
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", metavar="TASK...", help="Task files; the recipe's otherwise.", show_default=False),
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="split, lines (generic ones that plait ships), template (the bare prompt), or TASK=FILE (.txt, .jsonl, …). "
            r"\[split]",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help=r"Texts per task, at most. \[128]", show_default=False)] = None,
    split: Annotated[
        str | None, typer.Option(help=r"Of the tasks. \[calibration where there is one, else train]", show_default=False)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=0, help=r"Updates; 0 for the closed form at its best scale. \[48]", show_default=False)
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help=r"\[0.0005]", show_default=False)] = None,
    rank: Annotated[str | None, typer.Option(help=r"Of the adapter. \[the largest source's]", show_default=False)] = None,
    method: Annotated[str | None, typer.Option(help=r"Merge that it starts from. \[regmean]", show_default=False)] = None,
    scale: Annotated[
        float | None, typer.Option(help=r"Factor on the start. \[the one nearest to the adapters]", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help=r"Of texts and order. \[0]", show_default=False)] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also let a fresh LoRA learn the same, for comparison (doubles the time).")
    ] = False,
    controls: Annotated[
        bool, typer.Option("--controls", help="The same, and random adapters of equal norms (three times the time).")
    ] = False,
    objective: Annotated[
        str | None,
        typer.Option(
            help=r"distill, hidden, adamerging; with labels: gradient, supermerge, regret_smoothmax. \[distill]",
            show_default=False,
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(help=r"factors, or coefficients. \[factors, without --granularity]", show_default=False),
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            "--granularity",
            "--coefficients",
            help="Learn coefficients per task, layer, module or direction: a plain recipe anyone can run.",
            show_default=False,
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(help="Of coefficients: raw, projected, sigmoid, tanh, softmax, simplex_scaled.", show_default=False),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set any recipe key: --set tune.prompts=8")
    ] = None,
    base_id: Annotated[str | None, typer.Option("--base-id", help="Base model.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help=r"Of the written tensors. \[float32]", show_default=False)] = None,
    load_dtype: Annotated[str, typer.Option(help="Of the base in memory; auto: as it is stored.")] = "auto",
    device_map: Annotated[str, typer.Option(help="As transformers takes it: auto, cpu, cuda:0, balanced.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the base's weights.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Modules merged at a time.", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a result at --out.")] = False,
) -> None:
    """Merge adapters, and let the merge learn from unlabeled texts what it lost.

    Every task's own adapter is the teacher; no label is read. Without texts of yours: --texts lines.

    Example: plait tune ./intent ./langid --tasks tasks/intent.yaml tasks/langid.yaml -o tuned
    """
    from plait.cli.arguments import task_files
    from plait.cli.calibrate import text_source
    from plait.cli.console import ProgressBars, print_json
    from plait.commands.tune import TuneOrder
    from plait.tuning.pipeline import TuneOptions

    kind, files = text_source(texts or [])
    spec: dict[str, Any] = {"texts": kind, "files": files or None, "count": count, "split": split, "steps": steps}
    spec |= {"learning_rate": learning_rate, "seed": seed}
    spec |= {"objective": objective, "train": train, "granularity": granularity, "link": link}
    settings: dict[str, Any] = {"method": method, "scale": scale, "rank": rank, "dtype": dtype, "base_model": base_id}
    settings["tune"] = {key: value for key, value in spec.items() if value is not None}
    options = TuneOptions(None, load_dtype, device_map, trust_remote_code, control, controls, workers)
    order = TuneOrder(inputs, out, task_files(tasks or []) or None, settings, set_ or [], options, force)
    result = order.run(ProgressBars())
    if json:
        print_json({"folder": str(result.folder), **result.record.model_dump(mode="json")})
    else:
        _show(result)


def _show(result: TuneResult) -> None:
    from rich.table import Table

    from plait.cli.console import err, out, size

    console, record = out(), result.record
    written = sum(p.stat().st_size for p in result.folder.rglob("*") if p.is_file())
    console.print(f"[bold]{' + '.join(s['name'] for s in record.sources)}[/bold] → [bold]{result.folder}[/bold]")
    seconds = sum(record.seconds.values())
    console.print(f"rank {record.rank} · scale {record.scale:.3g} · step {record.kept_step} of {len(record.losses)} kept · "
                  f"{size(written)} · {seconds:.0f} s")  # fmt: skip
    table = Table(box=None, header_style="bold", pad_edge=False)
    others = {"fresh LoRA": record.control, "random": record.random}
    shown = {"tuned": record.kept} | {name: c.held for name, c in others.items() if c is not None}
    for name in ("task", "texts", "base", record.recipe["method"]["name"], *shown):
        table.add_column(name, justify="left" if name in ("task", "texts") else "right")
    for t in record.texts:
        cells = [record.base[t.task], record.start.divergence[t.task], *(h.divergence[t.task] for h in shown.values())]
        table.add_row(t.task, f"{t.count}, {t.source}", *(f"{value:.3g}" for value in cells))
    shares = [1.0, record.start.share, *(h.share for h in shown.values())]
    table.add_row("share of the base's", "", *(f"{share:.1%}" for share in shares))
    console.print(table)
    console.print("[dim]KL from each task's own adapter on held-out texts, in nats: 0 answers as the adapter does.[/dim]")
    _show_distance(record)
    for note in record.notes:
        err().print(f"note: {note}", style="dim", markup=False)


def _show_distance(record: TuneRecord) -> None:
    from plait.cli.console import out

    out().print(
        f"[dim]moved by {record.distance:.0%} of its start's norm; {record.outside:.1%} of its energy is outside of what the "
        "adapters span[/dim]"
    )
