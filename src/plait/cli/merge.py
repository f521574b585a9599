"""`plait merge`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.options import DryRun, Keys, Loading, Moments, Pushing, RecipeOrAdapters, Writing, with_options

if TYPE_CHECKING:
    from plait.merging.pipeline import MergeResult
    from plait.merging.plan import MergePlan
    from plait.results.records import ModuleRecord

_PROMISES = {
    "exact": "exact",
    "rank": "of a rank known beforehand",
    "deterministic": "the same bytes every time",
    "gauge_free": "a function of the deltas alone",
}


#: That the plain sum of unlike adapters keeps little is the first surprise of many.
_NO_METHOD = (
    "no --method is given: linear, the plain sum. dc_merge keeps more of unlike adapters, without data; plait tune keeps most."
)


@with_options("merge")
def merge(
    inputs: RecipeOrAdapters,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write; the workspace artifacts/ otherwise.", show_default=False)
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADAPTER",
            help=r"Add an adapter to an earlier merge: plait merge MERGED --add \[name=]NEW.",
            show_default=False,
        ),
    ] = None,
    from_merged: Annotated[
        bool, typer.Option("--from-merged", help="With --add: take the merged adapter itself, not its sources.")
    ] = False,
    input_: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="NAME=PATH", help="With --add: where a source is now.", show_default=False),
    ] = None,
    moments: Moments = None,
    dry_run: DryRun = False,
    push_adapter_repo: Annotated[
        str | None,
        typer.Option("--push-adapter-repo", metavar="REPO", help="Hub repository to upload to.", show_default=False),
    ] = None,
    bake_dir: Annotated[
        Path | None,
        typer.Option(
            "--bake-dir",
            metavar="FOLDER",
            help="Also write base + merge as a full model there (plait bake).",
            show_default=False,
        ),
    ] = None,
    *,
    pushing: Pushing,
    loading: Loading,
    writing: Writing,
    keys: Keys,
) -> None:
    """Merge LoRA adapters into one, without the base model; with --tasks, moments and scale are taken on their texts.

    Example: plait merge math=./a code=org/repo@main/checkpoint-100 --method ties --space core -o merged

    Example: plait merge recipe.yaml --set method.density=0.3 --dry-run -o merged
    """
    from plait.cli.arguments import named_paths
    from plait.cli.bake import bake_json, show_bake, show_bake_plan
    from plait.cli.console import ProgressBars, print_json, print_notes, warnings_as_notes
    from plait.commands.merge import MergeOrder
    from plait.hub.pretrained import LoadOptions

    order = MergeOrder(
        request=keys.request(inputs, moments),
        out=out,
        force=writing.force,
        workers=writing.workers,
        push_to=push_adapter_repo,
        private=pushing.private,
        add=add,
        inputs=named_paths("--input", input_ or []),
        from_merged=from_merged,
        bake_dir=bake_dir,
        push_baked_to=pushing.push_baked_repo,
        load=LoadOptions(*loading),
    )
    with warnings_as_notes():
        order.check()
    if dry_run:
        baked, plan = order.plan_bake(), order.plan()
        if writing.json:
            print_json(plan.model_dump(mode="json") | ({} if baked is None else {"bake": baked.model_dump(mode="json")}))
            return
        _show_plan(plan)
        if baked is not None and bake_dir is not None:
            show_bake_plan(baked, bake_dir)
        return
    if add is None and order.request.chooses_no_method:
        print_notes([_NO_METHOD])
    result = order.run(ProgressBars())
    print_notes(result.record.notes)
    if writing.json:
        merged = {"folder": str(result.folder), "url": result.url, **result.record.model_dump(mode="json")}
        print_json(merged | ({} if result.baked is None else {"bake": bake_json(result.baked)}))
        return
    show_result(result)
    if result.baked is not None:
        show_bake(result.baked)


def _show_plan(plan: MergePlan) -> None:
    from rich.text import Text

    from plait.cli.console import new_table, out, print_notes, size

    console = out()
    head = Text.assemble((plan.method, "bold"), " in ", (plan.space, "bold"), f" space: {plan.equation}")
    console.print(head)
    console.print(f"pipeline: {plan.pipeline}", markup=False, highlight=False)
    columns = ("target modules", "shape", "ranks", "weights", "result")
    table = new_table(columns, left=("target modules", "ranks", "weights", "result"), overflow="fold")
    for pattern, count, m in _grouped(plan):
        shape = f"{m.shape[0]}×{m.shape[1]}" + (f" ×{m.stack}" if m.stack > 1 else "")
        ranks = " ".join(str(m.ranks.get(a, "–")) for a in plan.adapters)
        weights = " ".join(f"{m.weights[a]:g}" for a in plan.adapters)
        table.add_row(f"{pattern} ({count})", shape, ranks, weights, _result_words(m.result, m.rank, m.exact_rank))
    console.print(table)
    _show_missing(plan)
    truncated = "truncated to " if plan.result == "truncated" else ""
    where = f"{truncated}rank {plan.rank}" if plan.rank else "rank decided by the energy asked for"
    if plan.result == "dense":
        where = "dense"
    console.print(
        f"\n{len(plan.modules)} target modules · {where} · {size(plan.output_bytes)} to write · "
        f"about {size(plan.peak_bytes)} of memory · {plan.passes} pass{'es' if plan.passes > 1 else ''} over the factors"
    )
    holds = [words for key, words in _PROMISES.items() if plan.promises[key]]
    fails = [f"not {words}" for key, words in _PROMISES.items() if not plan.promises[key]]
    console.print(f"promised: {', '.join([*holds, *fails])}", highlight=False)
    if plan.max_lora_rank:
        console.print(f"vLLM: --max-lora-rank {plan.max_lora_rank}")
    print_notes(plan.notes, console)


def _grouped(plan: MergePlan) -> list[tuple[str, int, Any]]:
    """Group modules that differ in their layer number only, for people; `--json` has every one."""
    from plait.cli.console import without_numbers

    groups: dict[tuple[Any, ...], tuple[str, int, Any]] = {}
    for m in plan.modules:
        pattern = without_numbers(m.target)
        key = (pattern, m.shape, tuple(m.ranks.items()), tuple(m.weights.items()), m.result, m.rank)
        first = groups.get(key, (pattern, 0, m))
        groups[key] = (pattern, first[1] + 1, first[2])
    return list(groups.values())


def _result_words(result: str, rank: int | None, exact: int) -> str:
    if result == "exact":
        return f"exact, rank {rank}"
    if result == "dense":
        return "dense"
    return f"rank {rank} of {exact}" if rank else f"rank up to {exact}"


def _show_missing(plan: MergePlan) -> None:
    from plait.cli.console import out

    missing: dict[tuple[str, ...], list[str]] = {}
    for m in plan.modules:
        if m.missing:
            missing.setdefault(m.missing, []).append(m.target)
    for names, targets in missing.items():
        out().print(f"not in {', '.join(names)}: {len(targets)} modules, such as {targets[0]}; zero there", markup=False)
    if plan.left_out:
        first = next(iter(plan.left_out))
        out().print(f"left out (merge_mode common): {len(plan.left_out)} modules, such as {first}", markup=False)


def show_result(result: MergeResult) -> None:
    """Show where the result is and what it lost."""
    from rich.text import Text

    from plait.cli.console import folder_size, out

    console, record = out(), result.record
    names = " + ".join(result.plan.adapters)
    console.print(Text.assemble((names, "bold"), " → ", (str(result.folder), "bold")), soft_wrap=True)  # paths are not broken
    rank = "dense" if record.rank is None else f"rank {record.rank}"
    console.print(
        f"{record.method} in {record.space} space · {len(record.modules)} target modules · {rank} · {record.seconds:.1f} s"
    )
    written = folder_size(result.folder)
    if record.result == "exact":
        console.print(f"[green]exact[/green]: the factors hold the complete merge · {written}")
    elif record.result == "dense":
        console.print(f"[green]dense[/green]: the complete merge is stored · {written}")
    else:
        console.print(f"[yellow]truncated[/yellow]: {record.kept:.2%} of the energy ‖ΔW‖² is kept · {written}")
        show_energy(result.record.modules)
    if record.max_lora_rank:
        console.print(f"vLLM: --max-lora-rank {record.max_lora_rank}")
    if result.url:
        console.print(f"pushed to {result.url}")


def show_energy(modules: Sequence[ModuleRecord]) -> None:
    """Show the kept energy by kind of module: where the loss is."""
    from collections import defaultdict

    from plait.cli.console import new_table, out

    kinds: dict[str, list[Any]] = defaultdict(list)
    for m in modules:
        kinds[m.target.rpartition(".")[2]].append(m)
    table = new_table(("module", "kept", "worst", "where"), left=("module", "where"))
    for kind, members in kinds.items():
        total = sum(m.energy or 0 for m in members)
        kept = sum((m.energy or 0) * m.kept for m in members) / total if total else 1.0
        worst = min(members, key=lambda m: m.kept)
        table.add_row(f"{kind} ({len(members)})", f"{kept:.1%}", f"{worst.kept:.1%}", worst.target)
    out().print(table)
