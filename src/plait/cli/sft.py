"""`plait sft`."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from plait.training.sft import SftPlan, SftResult


def sft(context: typer.Context) -> None:
    """Train an adapter, or a full model, on your data with TRL; then merge it with its base and upload it, where asked for.

    Takes every flag of TRL's SFTConfig, ModelConfig and ScriptArguments, from the command line or a YAML file (--config), and:

    --dataset_name_or_path  a .jsonl, .csv or .parquet file, a folder, the Hub
    --dataset_format        messages, alpaca, …; found when left out
    --test_split_size       share held out for --eval_strategy
    --long_examples         drop or truncate what is longer than --max_length
    --merge_adapter_with_base  write base + adapter as merged_model/
    --push_to_hub, --hub_repo_id, --upload_merged_model
    --dry_run               show plan and a rendered example; train nothing
    --force                 discard another run in --output_dir
    --json                  print one JSON object on stdout
    --help_all              every flag

    With --use_peft an adapter is trained (--lora_r, --lora_alpha, --lora_target_modules all-linear, --use_dora, --load_in_4bit,
    …), without it the complete model. Killed, the same command continues. Exit code 1: training succeeded, but a merge or an
    upload after it failed.

    Example: plait sft --model_name_or_path org/model --dataset_name_or_path rows.jsonl --use_peft --output_dir run

    Example: plait sft --config run.yaml --output_dir run --dry_run
    """
    from plait.cli.console import ProgressBars, print_json
    from plait.cli.stopping import noting_on_stop
    from plait.training.arguments import all_flags

    if {"--help_all", "--help-all"} & {*context.args}:
        typer.echo(all_flags())
        return
    from plait.commands.sft import SftOrder
    from plait.training.folder import is_main_process

    order = SftOrder(context.args)
    flags, plan = order.flags, order.plan()
    is_main = is_main_process()
    if is_main:
        _show_plan(plan)
    if flags.get("dry_run"):
        if flags.get("json"):
            print_json(_plan_json(plan))
        return
    as_json = bool(flags.get("json"))
    with noting_on_stop(), redirect_stdout(sys.stderr) if as_json else nullcontext():  # trackers print what they like
        result = order.run(ProgressBars() if as_json else None)
    if is_main and as_json:
        print_json(_json(result))
    if is_main:
        _show(result)
    if result.failures:
        raise typer.Exit(1)


def _show_plan(plan: SftPlan) -> None:
    from plait.cli.console import err, print_notes
    from plait.training.sft import describe_plan

    console = err()
    for line in describe_plan(plan):
        console.print(line, markup=False, soft_wrap=True)
    given, learned = plan.example
    console.print("\nfirst example; the loss is on the text in ⟦ ⟧:", style="dim")
    console.print(given, style="dim", markup=False, end="", soft_wrap=True)
    console.print(f"⟦{learned}⟧", style="green", markup=False, soft_wrap=True)
    console.print()
    print_notes(plan.notes, console)


def _show(result: SftResult) -> None:
    from plait.cli.console import err

    console, record = err(), result.record
    losses = f", loss {record.losses[0][1]:.3g} → {record.losses[-1][1]:.3g}" if record.losses else ""
    did = "found what an earlier run trained:" if result.found else "trained"
    console.print(f"{did} {record.steps} steps on {record.examples} examples in {record.seconds:.0f} s{losses}")
    for name in ("adapter", "final_model", "merged_model"):
        if (folder := getattr(result, name)) is not None:
            console.print(f"{name:12} {folder}", markup=False, soft_wrap=True)
    if result.url:
        console.print(f"pushed to    {result.url}", markup=False, soft_wrap=True)
    for failure in result.failures:
        console.print(f"\n{failure.step} failed:", style="bold red", end=" ")
        console.print(failure.reason, markup=False, soft_wrap=True)
        console.print(f"The training is complete in {result.final_model.parent}. To do this step again:\n  {failure.command}",
                      markup=False, soft_wrap=True)  # fmt: skip


def _json(result: SftResult) -> dict[str, object]:
    from dataclasses import asdict

    folders = {name: getattr(result, name) for name in ("adapter", "final_model", "merged_model")}
    return {
        **{name: None if folder is None else str(folder) for name, folder in folders.items()},
        "found": result.found,
        "url": result.url,
        "failures": [asdict(failure) for failure in result.failures],
        "record": result.record.model_dump(mode="json"),
    }


def _plan_json(plan: SftPlan) -> dict[str, object]:
    from dataclasses import asdict

    given, learned = plan.example
    data, _ = plan.phase.encoded
    return {
        "job": plan.phase.opened.job.model_dump(mode="json"),
        "data": plan.phase.opened.data.summary,
        "examples": len(data.items),
        "left_out": data.left_out,
        "truncated": data.truncated,
        "example": {"given": given, "learnt": learned},
        "estimate": asdict(plan.estimate),
        "writes": [str(path) for path in plan.writes],
        "uploads": None if plan.uploads is None else str(plan.uploads),
        "notes": list(plan.notes),
        "finished": plan.phase.record is not None,
    }
