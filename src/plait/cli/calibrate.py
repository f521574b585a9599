"""`plait calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from plait.calibration.pipeline import CalibrateResult
    from plait.calibration.record import CalibratedTexts, CalibrationPlan


def calibrate(
    inputs: Annotated[
        list[str], typer.Argument(metavar="RECIPE|ADAPTER...", help="A recipe, or several adapters.", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write the moments.", show_default=False)] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", metavar="TASK...", help="Task files; the recipe's otherwise.", show_default=False),
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="split, lines (generic ones that plait ships), template (the bare prompt), or TASK=FILE (.txt, .jsonl, …). "
            r"\[split where a task has calibration or train, else lines]",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help=r"Texts per task, at most. \[32]", show_default=False)] = None,
    split: Annotated[
        str | None, typer.Option(help=r"Of the tasks. \[calibration where there is one, else train]", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help=r"Of texts and tokens. \[0]", show_default=False)] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Set any recipe key: --set calibration.tokens=1024"),
    ] = None,
    base_id: Annotated[str | None, typer.Option("--base-id", help="Base model.", show_default=False)] = None,
    load_dtype: Annotated[str, typer.Option(help="Of the base in memory; auto: as it is stored.")] = "auto",
    device_map: Annotated[str, typer.Option(help="As transformers takes it: auto, cpu, cuda:0, balanced.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the base's weights.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print texts and sizes, and write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a result at --out.")] = False,
) -> None:
    """Take the second moments that regmean and ssr need: each adapter reads its own task's texts. No label is read.

    Example: plait calibrate ./intent ./langid --tasks tasks/intent.yaml tasks/langid.yaml -o moments
    """
    from plait.calibration.request import CalibrateOptions
    from plait.cli.arguments import task_files
    from plait.cli.console import ProgressBars, print_json, warnings_as_notes
    from plait.commands.calibrate import CalibrateOrder

    kind, files = text_source(texts or [])
    spec = {"texts": kind, "files": files or None, "count": count, "split": split, "seed": seed}
    options = CalibrateOptions(None, load_dtype, device_map, trust_remote_code)
    order = CalibrateOrder(inputs, task_files(tasks or []) or None, out, base_id, spec, set_ or [], options, force)
    with warnings_as_notes():
        if dry_run:
            plan = order.plan()
            print_json(plan.model_dump(mode="json")) if json else _show_plan(plan)
            return
        result = order.run(ProgressBars())
    if json:
        print_json({"folder": str(result.folder), **result.record.model_dump(mode="json")})
    else:
        _show(result)


def text_source(given: list[str]) -> tuple[str | None, dict[str, str]]:
    """Return the kind of texts that `--texts` names, and task → file.

    Raises:
        RecipeError: neither.
    """
    from plait.errors import RecipeError

    files, kinds = {}, []
    for text in given:
        name, sign, path = text.partition("=")
        if sign and name and path:
            files[name] = path
        else:
            kinds.append(text)
    if len(kinds) > 1 or any(kind not in ("split", "lines", "template") for kind in kinds):
        found = ", ".join(kinds)
        raise RecipeError(f"--texts must be split, lines or template, and TASK=FILE for single tasks; got {found}.")
    return (kinds[0] if kinds else None), files


def _show_plan(plan: CalibrationPlan) -> None:
    from plait.cli.console import out, size

    _show_texts(plan.texts)
    modules = next(iter(plan.adapters.values()))
    out().print(f"{modules} modules of {len(plan.adapters)} adapters · at most {size(plan.bytes)} to write")
    if plan.left_out:
        out().print(f"left out, since their inputs cannot be collected: {', '.join(plan.left_out)}", markup=False)


def _show(result: CalibrateResult) -> None:
    from rich.table import Table

    from plait.cli.console import err, out, size

    record = result.record
    _show_texts(record.texts)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("moments", "tokens", "modules", "matrices", "as rows", "size", ""):
        table.add_column(name, justify="left" if name in ("moments", "") else "right")
    for a in record.adapters:
        counts = (a.tokens, a.modules, a.stored - a.rows, a.rows)
        table.add_row(a.file, *map(str, counts), size(a.bytes), "of an earlier run" if a.reused else "")
    out().print(table)
    out().print(f"{result.folder} · {size(record.bytes)} · {record.seconds:.1f} s", soft_wrap=True)
    for note in record.notes:
        err().print(f"note: {note}", style="dim", markup=False)


def _show_texts(texts: tuple[CalibratedTexts, ...]) -> None:
    from plait.cli.console import out

    for t in texts:
        out().print(f"{t.task}: {t.count} texts, {t.source}, read by {t.adapter}, such as", markup=False)
        for text in t.shown:
            out().print(f"  {text.strip()[-110:]!r}", style="dim", markup=False)
