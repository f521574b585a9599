"""`plait verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.options import Json, Workers

if TYPE_CHECKING:
    from plait.verification.parity import ParityReport
    from plait.verification.rebuild import RebuiltFile
    from plait.verification.verify import Verification

_SHOWN = 8


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a result: one with a plait.lock.", show_default=False)],
    rebuild: Annotated[
        bool, typer.Option("--rebuild/--no-rebuild", help="Make it again (in TMPDIR) and compare; or check hashes only.")
    ] = True,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="NAME=PATH", help="Where an input is now.", show_default=False),
    ] = None,
    parity: Annotated[
        Path | None,
        typer.Option(
            help='Prompts, one per line, or .jsonl with "prompt": compare logits with the live merge.', show_default=False
        ),
    ] = None,
    base_id: Annotated[str | None, typer.Option("--base-id", help="Base model for --parity.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="Where --parity computes.")] = "cpu",
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Check a result against its plait.lock: files, inputs, and the result made again. Exit code 0 when all is equal, else 2.

    Example: plait verify merged

    Example: plait verify model --parity prompts.txt --no-rebuild
    """
    from plait.cli.arguments import named_paths
    from plait.cli.console import ProgressBars, print_json
    from plait.commands.verify import VerifyOrder

    places = named_paths("--input", inputs or [])
    found = VerifyOrder(folder, rebuild, places, parity, base_id, device, workers).run(ProgressBars())
    if json:
        print_json({"ok": found.ok, **found.model_dump(mode="json")})
    else:
        _show(found)
    if not found.ok:
        raise typer.Exit(2)


def _show(found: Verification) -> None:
    from plait.cli.console import out

    _show_files(found)
    _show_inputs(found)
    _show_rebuilt(found)
    if found.versions and any(r.state != "equal" for r in found.rebuilt or ()):
        versions = ", ".join(f"{name} {then} → {now}" for name, (then, now) in found.versions.items())
        out().print(f"versions {versions}: other versions and machines may round otherwise", markup=False)
    if found.parity is not None:
        show_parity(found.parity)
    word = "[green]verified[/green]" if found.ok else "[red]not verified[/red]"
    inputs = "" if any(i.state != "equal" for i in found.inputs) else " and inputs" if found.rebuilt is None else ", inputs"
    what = f"files{inputs}{'' if found.rebuilt is None else ' and the rebuilt result'}"
    out().print(f"{word}: {what} are what plait.lock says" if found.ok else f"{word}: see above")


def _show_files(found: Verification) -> None:
    from plait.cli.console import out

    words = {"changed": "changed since it was written", "missing": "missing", "extra": "not written by plait",
             "outside": "a link out of the folder, or not a file", "damaged": "a record that cannot be read"}  # fmt: skip
    wrong = [f for f in found.files if f.state != "equal"]
    equal = len(found.files) - len(wrong)
    out().print(f"files    {equal} of {sum(f.state != 'extra' for f in found.files)} are as written")
    for file in wrong[:_SHOWN]:
        out().print(f"  {file.name}: {words[file.state]}", style="red", markup=False)
    _show_more(len(wrong))


def _show_inputs(found: Verification) -> None:
    from plait.cli.console import out

    equal = sum(i.state == "equal" for i in found.inputs)
    out().print(f"inputs   {equal} of {len(found.inputs)} are found and unchanged")
    for item in [i for i in found.inputs if i.state != "equal"][:_SHOWN]:
        missing = f"{'unknown' if item.found else 'not found'}: {item.detail}"
        detail = f"changed: {item.detail} in {item.path}" if item.state == "changed" else missing
        out().print(f"  {item.name}: {detail}", style="red" if item.state == "changed" else "yellow", markup=False)


def _show_rebuilt(found: Verification) -> None:
    from plait.cli.console import out

    if found.rebuilt is None:
        out().print(f"rebuild  not done{': ' + found.not_rebuilt if found.not_rebuilt else ''}", markup=False)
        return
    wrong = [r for r in found.rebuilt if r.state != "equal"]
    out().print(f"rebuild  {len(found.rebuilt) - len(wrong)} of {len(found.rebuilt)} files come out the same")
    for file in wrong[:_SHOWN]:
        out().print(f"  {file.name}: {_difference(file)}", style="red", markup=False)
    _show_more(len(wrong))
    for file in found.rebuilt:
        if file.state == "equal" and file.tensors is not None:
            out().print(f"  {file.name}: the folder's own has {_tensor_difference(file)}", style="red", markup=False)


def _tensor_difference(file: RebuiltFile) -> str:
    return f"{file.tensors} other tensors, off by at most {file.difference:.3g} ({file.where})"


def _difference(file: RebuiltFile) -> str:
    if file.state != "differs":
        return {"missing": "is not made", "extra": "is made, and not in the lock"}[file.state]
    if file.difference is None:
        return "comes out different"
    if not file.tensors:
        return "comes out different from the lock, and equal to the folder's file"
    return f"comes out with {_tensor_difference(file)}"


def show_parity(report: ParityReport) -> None:
    """Show how a result acts against the live merge."""
    from plait.cli.console import new_table, out

    count = report.comparisons[0].overall.positions
    out().print(f"\nparity   {report.prompts} prompts, {count} positions; live result: {report.reference}", markup=False)
    table = new_table(("compared", "dtype", "max |Δlogit|", "mean KL", "top-1", "worst prompt"), left=("compared", "dtype"))
    for row in report.comparisons:
        overall = row.overall
        figures = (f"{overall.max_difference:.2g}", f"{overall.mean_kl:.2g}", f"{overall.top1:.2%}", str(row.worst_prompt))
        table.add_row(row.what, row.dtype, *figures)
    out().print(table)
    if any(row.what == "rounding alone" for row in report.comparisons):
        out().print("rounding alone: the live result against itself in float32", style="dim")


def _show_more(count: int) -> None:
    from plait.cli.console import out

    if count > _SHOWN:
        out().print(f"  and {count - _SHOWN} more; --json lists them")
