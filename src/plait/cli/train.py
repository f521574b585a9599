"""`plait train`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.options import Cluster, Json

if TYPE_CHECKING:
    from plait.training.estimate import Forecast
    from plait.training.phases import TrainingPlan
    from plait.training.results import TrainResult


def train(
    phases: Annotated[Path, typer.Argument(metavar="PHASES.yaml", help="What to train.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help=r"Folder of everything. \[artifacts/trained/<file>]", show_default=False),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PHASE", help="Train this phase and stop; may be given again.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help=r"Phases side by side, each a process. \[1]", show_default=False)
    ] = None,
    cluster: Cluster = None,
    base_id: Annotated[
        str | None, typer.Option("--base-id", help="Base model, in place of the file's.", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Set any key of the file: --set arguments.max_steps=10"),
    ] = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="Also evaluate every adapter on every task.")] = False,
    load_dtype: Annotated[str, typer.Option(help="Dtype of the base model in evaluation (plait eval --help).")] = "auto",
    device_map: Annotated[str, typer.Option(help="In evaluation, as transformers takes it: auto, cpu, cuda:0.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="In evaluation: run code that comes with the base's weights.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show phases, steps, tokens and disk; train nothing.")] = False,
    json: Json = False,
) -> None:
    """Train one adapter per phase, merge them, and report what the merge kept of each.

    Killed at any moment, the same command continues. A phase that fails does not stop the others: exit code 1.

    Example: plait train examples/phases.yaml -o trained

    Example: plait train phases.yaml --set arguments.max_steps=10 --dry-run -o trained
    """
    from plait.cli.console import ProgressBars, print_json
    from plait.cli.stopping import noting_on_stop
    from plait.commands.train import TrainOrder
    from plait.hub.pretrained import LoadOptions

    order = TrainOrder(
        phases,
        out=out,
        only=only or [],
        workers=workers,
        cluster=cluster,
        base=base_id,
        sets=set_ or [],
        matrix=matrix,
        load=LoadOptions(load_dtype, device_map, trust_remote_code),
    )
    plan = order.training
    if dry_run:
        found = order.plan()
        if json:
            print_json({"base_model": plan.base, "out": str(plan.out), "phases": [f.model_dump(mode="json") for f in found]})
        else:
            _show_forecast(plan, found)
        return
    stopped = noting_on_stop(lambda: _kept(plan))
    with redirect_stdout(sys.stderr), stopped, closing(ProgressBars()) as bars:  # trackers and trainers print what they like
        result = order.run(bars)
    if json:
        print_json(result.model_dump(mode="json"))
    else:
        _show(result, order.folder)
    settings = [("-o", out), ("--base-id", base_id), *(("--set", text) for text in set_ or [])]
    words = [str(word) for flag, value in settings if value for word in (flag, value)]
    _print_result(result, shlex.join(["plait", "train", str(phases), *words]))
    if not result.ok:
        raise typer.Exit(1)


def _kept(plan: TrainingPlan) -> str:
    from plait.training.folder import TRAINING_RECORD

    done = sum((p.folder / TRAINING_RECORD).is_file() for p in plan.phases)
    return (
        f"{done} of {len(plan.phases)} phases are finished and kept in {plan.out}; the same command continues with the others."
    )


def _show_forecast(plan: TrainingPlan, found: Sequence[Forecast]) -> None:

    from plait.cli.console import new_table, out, print_notes, print_table, size

    lora = plan.phases[0].job.lora
    kind = "" if lora is None else f" · LoRA r {lora.r}, alpha {lora.alpha:g}, {found[0].parameters / 1e6:.2f} M parameters"
    out().print(f"[bold]{plan.base}[/bold]{kind}", soft_wrap=True)
    table = new_table(
        ("phase", "state", "data", "examples", "steps", "tokens", "disk"), left=("phase", "state", "data"), overflow="fold"
    )
    for f in found:
        lost = "".join([f" (− {f.left_out})" * bool(f.left_out), f" ({f.truncated} cut)" * bool(f.truncated)])
        table.add_row(f.name, f.state, f.data, f"{f.examples}{lost}", str(f.steps), _tokens(f.tokens), size(f.bytes))
    todo = [f for f in found if f.state != "done"]
    table.add_row(
        "to do",
        "",
        "",
        "",
        str(sum(f.steps for f in todo)),
        _tokens(sum(f.tokens for f in todo)),
        size(sum(f.bytes for f in todo)),
    )
    print_table(table, out())
    recipe = plan.recipe
    out().print(
        f"then: merge by {recipe.method_name} in {recipe.space_name}, evaluate on {len(recipe.tasks)} tasks → {plan.out}",
        soft_wrap=True,  # the path is not broken
    )
    print_notes(plan.notes)


def _tokens(count: int) -> str:
    """Return a number of tokens; of images and sounds there are none."""
    return f"{count:,}" if count else "–"


def _show(result: TrainResult, place: Path) -> None:

    from plait.cli.console import new_table, out, print_table
    from plait.cli.evaluate import show_evaluation

    table = new_table(("phase", "state", "examples", "steps", "tokens", "seconds", "last loss"), left=("phase", "state"))
    for p in result.phases:
        state = f"[bold red]{p.state}[/bold red]" if p.state == "failed" else p.state
        numbers = [p.examples, p.steps, p.tokens or None]
        seconds = "–" if p.seconds is None else f"{p.seconds:.1f}"
        loss = "–" if p.loss is None else f"{p.loss:.3f}"
        table.add_row(p.name, state, *("–" if n is None else str(n) for n in numbers), seconds, loss)
    print_table(table, out())
    if result.evaluation is not None:
        out().print()
        show_evaluation(result.evaluation)
    for name in filter(None, (result.merged, result.report)):
        out().print(f"[dim]{place / name}[/dim]", soft_wrap=True)


def _print_result(result: TrainResult, command: str) -> None:
    """Print on stderr what is worth knowing, what failed, and what to run then: the command with the same settings."""
    from plait.cli.console import err, print_notes

    print_notes((*result.notes, *(f"{p.name}: {n}" for p in result.phases for n in p.notes)))
    for phase in result.failed:
        err().print(f"[bold red]failed:[/bold red] {phase.name}: ", end="")
        err().print(str(phase.error), markup=False, soft_wrap=True)
    waiting = [p.name for p in result.phases if p.state == "waiting"]
    if result.failed:
        err().print(f"The other phases are kept. After it is fixed, this command trains what is missing and merges: {command}",
                    markup=False, soft_wrap=True)  # fmt: skip
    elif result.merged is None:
        rest = f" ({', '.join(waiting)} to do)" if waiting else ""
        err().print(f"Nothing is merged yet{rest}; this command does the rest: {command}", markup=False, soft_wrap=True)
