"""`plait bake`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.options import (
    Cluster,
    DryRun,
    Keys,
    Loading,
    Moments,
    Out,
    Pushing,
    RecipeOrAdapters,
    Writing,
    with_options,
)

if TYPE_CHECKING:
    from plait.baking.pipeline import BakeResult
    from plait.baking.plan import BakePlan, TensorPlan


@with_options("bake")
def bake(
    inputs: RecipeOrAdapters,
    out: Out,
    moments: Moments = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help=r"Dtype of the model: float32, bfloat16, float16, float64. \[as the base]",
            show_default=False,
        ),
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option(
            "--shard-size", metavar="SIZE", help=r"Largest file, such as 5GB. \[the base's files]", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Where deltas are added up: cpu, cuda, …")] = "cpu",
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Read a quantized base (fp8, mxfp4) as the plain model that it encodes.")
    ] = False,
    hash_base: Annotated[
        bool,
        typer.Option(
            "--hash-base/--no-hash-base",
            help="Hash the base's files where their sha256 is not known; without, the lock names them, and plait verify cannot "
            "tell whether they have changed.",
        ),
    ] = True,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="PROMPTS", help="Then compare its logits with the live merge on these prompts.", show_default=False
        ),
    ] = None,
    cluster: Cluster = None,
    dry_run: DryRun = False,
    *,
    pushing: Pushing,
    loading: Loading,
    writing: Writing,
    keys: Keys,
) -> None:
    """Write base model + adapters as a full model, shard by shard; killed, the same command continues.

    Example: plait bake math=./a code=./b --weights 0.7 0.3 --base-id org/model -o model

    Example: plait bake merged --base-id ./base --dequantize --dry-run -o model
    """
    from plait.cli.console import ProgressBars, print_json, warnings_as_notes
    from plait.cli.verify import show_parity
    from plait.commands.bake import BakeOrder
    from plait.hub.pretrained import LoadOptions

    order = BakeOrder(
        request=keys.request(inputs, moments),
        out=out,
        dtype=dtype,
        shard_size=shard_size,
        device=device,
        dequantize=dequantize,
        hash_base=hash_base,
        force=writing.force,
        workers=writing.workers,
        prompts=check,
        push_to=pushing.push_baked_repo,
        private=pushing.private,
        load=LoadOptions(*loading),
        cluster=cluster,
    )
    with warnings_as_notes():
        order.check()
    if dry_run:
        plan = order.plan()
        print_json(plan.model_dump(mode="json")) if writing.json else show_bake_plan(plan, out)
        return
    result = order.run(ProgressBars())
    if writing.json:
        print_json(bake_json(result) | ({} if result.parity is None else {"parity": result.parity.model_dump(mode="json")}))
        return
    show_bake(result)
    if result.parity is not None:
        show_parity(result.parity)


def bake_json(result: BakeResult) -> dict[str, object]:
    """Return a result as plain values."""
    return {"folder": str(result.folder), "url": result.url, **result.record.model_dump(mode="json")}


def show_bake_plan(plan: BakePlan, out: Path) -> None:
    """Show what would be written, and what it takes."""
    from plait.cli.console import new_table, print_notes, size
    from plait.cli.console import out as console
    from plait.results.disk import free_space

    names = " + ".join(plan.adapters)
    console().print(f"[bold]{plan.base}[/bold] with [bold]{names}[/bold]: {plan.method} in {plan.space} space")
    table = new_table(("file", "size", "copied", "changed"), left=("file", "changed"), overflow="fold")
    for shard in plan.shards:
        table.add_row(shard.name, size(shard.size), size(shard.copied), _changed(shard.tensors))
    console().print(table)
    carried = ", ".join(f"{name} ({source})" if source != "base" else name for name, source in plan.carried.items())
    console().print(f"\nalso copied: {carried or 'nothing'}", markup=False)
    console().print(
        f"{plan.target_modules} target modules, each in its place · {size(plan.output_bytes)} to write, "
        f"{size(free_space(out)[1])} free · about {size(plan.peak_bytes)} of memory"
    )
    print_notes(plan.notes)


def show_bake(result: BakeResult) -> None:
    """Show where the model is and what was done."""
    from plait.cli.console import out, print_notes, size

    console, record = out(), result.record
    console.print(f"[bold]{record.base_model}[/bold] with [bold]{' + '.join(result.plan.adapters)}[/bold] → ", end="")
    console.print(str(result.folder), markup=False)
    resumed = f" · {len(record.resumed)} of {len(record.shards)} files were finished before" if record.resumed else ""
    console.print(
        f"{record.method} in {record.space} space · {len(record.modules)} target modules · {size(record.bytes_copied)} copied, "
        f"{size(record.bytes_changed)} changed · {record.seconds:.1f} s{resumed}"
    )
    if result.url:
        console.print(f"pushed to {result.url}")
    print_notes(result.plan.notes)


def _changed(tensors: tuple[TensorPlan, ...]) -> str:
    """Group tensors that differ in their numbers only, for people; `--json` has every one."""
    from collections import Counter

    from plait.cli.console import without_numbers

    counts = Counter((without_numbers(t.name), t.how) for t in tensors)
    return "\n".join(f"{name} ({count}): {how}" for (name, how), count in counts.items()) or "nothing"
