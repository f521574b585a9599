"""recipe → inventory → plan → stream → writer → run record: the one function of the command line and Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from plait.merging.adapter_output import MergedAdapter, OtherAdapter
from plait.merging.card import card
from plait.merging.delta_file import NAME as DELTA
from plait.merging.delta_file import DeltaFile
from plait.merging.engine import Engine, MergedModule, name_extreme_adapters
from plait.merging.heads import write_heads
from plait.merging.inventory import Inventory, take_inventory
from plait.merging.moments import MomentsOf, not_taken_yet
from plait.merging.output_format import served_rank, writes_peft
from plait.merging.plan import MergePlan, announce_zeros, make_plan
from plait.merging.record import RunRecord, WrittenMerge, input_digests, make_lock, module_record, sources, write_records
from plait.merging.side_by_side import SideBySide
from plait.recipes.naming import naming_its_file
from plait.recipes.schema import Recipe
from plait.recipes.writing import recipe_json
from plait.records import ShortRepr
from plait.results.disk import check_not_an_input, check_space
from plait.results.lock import LOCK
from plait.results.progress import Progress, SilentProgress
from plait.results.records import ModuleRecord, overall_kept, write_json
from plait.results.run_folders import new_run_folder
from plait.results.staging import checking_output, staged
from plait.results.threads import worker_count
from plait.tensorfiles.writer import TensorWriter
from plait.version import __version__
from plait.views import Viewed

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class MergeResult(Viewed, ShortRepr):
    """A finished merge.

    >>> result = plait.merge(["./a", "./b"], out="both")
    >>> result.folder, result.record.max_lora_rank, len(result.to_pandas())

    Attributes:
        folder: where it was written.
        plan: what was to happen.
        record: what happened.
        url: where it was pushed; None when it was not.
    """

    folder: Path
    plan: MergePlan
    record: RunRecord
    url: str | None = None


@naming_its_file
def plan_recipe(
    recipe: Recipe,
    *,
    folder: Path | None = None,
    out: Path | None = None,
    force: bool = False,
    workers: int | None = None,
    base_folder: Path | None = None,
    moments: MomentsOf | None = None,
) -> MergePlan:
    """Return what `run_recipe` would do with the same arguments; reads headers, no tensor.

    What a merge takes from the tasks' texts first (second moments, what is `auto`) is not taken; notes name it.
    """
    notes = []
    if moments is None and recipe.lacks_moments:
        moments = not_taken_yet
        notes.append(
            f"second moments are taken first: each adapter reads its tasks' texts, at most {recipe.calibration.count} of each, "
            "with the base in memory."
        )
    if recipe.tasks and (values := recipe.values_to_find):
        recipe = recipe.with_values(values)
        found, here = " and ".join(values), ", ".join(f"{name} {value:g}" for name, value in values.items())
        notes.append(f"the {found} {'is' if len(values) == 1 else 'are'} found on the tasks' texts; this plan has {here}.")
    _, plan = _planned(recipe, folder, out, worker_count(workers), moments, base_folder, force=force)
    return plan.model_copy(update={"notes": (*plan.notes, *notes)})


@naming_its_file
def run_recipe(  # noqa: PLR0913 (all that a merge depends on)
    recipe: Recipe,
    *,
    folder: Path | None = None,
    out: Path | None = None,
    force: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    base_folder: Path | None = None,
    moments: MomentsOf | None = None,
    notes: tuple[str, ...] = (),
    known: Mapping[Path, str] | None = None,
) -> MergeResult:
    """Do what a recipe says.

    Args:
        recipe: what is asked for.
        folder: what its relative paths are relative to; the current folder when None.
        out: where to write; a new run folder in the workspace (`artifacts/`) when None.
        force: replace an adapter at `out`.
        workers: modules worked on at a time; never changes a byte.
        progress: receives stages and steps.
        base_folder: of the base model, where its name does not lead there.
        moments: second moments of inputs, in place of files that the recipe names.
        notes: on the result, in addition to the plan's.
        known: input file → sha256, of those that were hashed just now.

    Raises:
        PlaitError: anything wrong with what the user gave; nothing is left under `out` then.
    """
    if out is None:
        with _claimed(recipe) as place:
            return run_recipe(
                recipe,
                folder=folder,
                out=place,
                workers=workers,
                progress=progress,
                base_folder=base_folder,
                moments=moments,
                notes=notes,
                known=known,
            )
    started = time.perf_counter()
    workers = worker_count(workers)
    inventory, plan = _planned(recipe, folder, out, workers, moments, base_folder, force=force)
    plan = plan.model_copy(update={"notes": (*plan.notes, *notes)})
    if plan.output_bytes is not None:
        check_space(out, plan.output_bytes, what="the result", advice="--rank, --dtype bfloat16")
    with staged(out, force=force) as place, ThreadPoolExecutor(1, "plait-sha256") as pool:
        digests = pool.submit(input_digests, inventory, known).result  # hashed during the work
        written = _write(inventory, plan, place, workers=workers, progress=progress or SilentProgress())
        record = _record(inventory, plan, written, digests(), started)
        (place / "README.md").write_text(card(inventory, plan, record, place), encoding="utf-8")
        lock = make_lock(inventory, digests(), place, final=out, known=written.digests)
        write_json(place / LOCK, lock)
        write_records(place, record)
    return MergeResult(out, plan, record)


def _planned(
    recipe: Recipe,
    folder: Path | None,
    out: Path | None,
    workers: int,
    moments: MomentsOf | None,
    base_folder: Path | None,
    *,
    force: bool,
) -> tuple[Inventory, MergePlan]:
    """Open the adapters and plan their merge; refuse an output that cannot be written, or is an input."""
    with checking_output(out, force=force):
        inventory = take_inventory(recipe, folder, moments, base_folder)
        plan = make_plan(inventory, workers=workers)
        announce_zeros(recipe, plan)
    check_not_an_input(out, input_folders(inventory), command="merge")
    return inventory, plan


def _write(inventory: Inventory, plan: MergePlan, place: Path, *, workers: int, progress: Progress) -> WrittenMerge:
    """Write the tensors and what belongs to them."""
    engine = Engine(inventory, plan, workers=workers, progress=progress)
    if SideBySide.fits(inventory, plan):
        return SideBySide(inventory, plan, engine, progress).write(place)
    combiner = engine.prepare()
    ranks = engine.ranks(combiner)
    write_heads(inventory.adapters, inventory.recipe.heads, place)
    done: list[ModuleRecord] = []
    if inventory.recipe.output.kind == "delta":
        dense = DeltaFile(inventory, plan)
        with TensorWriter(place / DELTA, dense.entries()) as writer:
            for merged in engine.run(combiner, ranks):
                with name_extreme_adapters(combiner, merged.target):
                    dense.write(merged, writer)
                done.append(ModuleRecord(target=merged.target, rank=None, result="dense", energy=None, kept=1.0))
        return WrittenMerge(tuple(done), None, {DELTA: writer.sha256}, combiner.notes.texts())
    exact_ranks = {m.target: m.exact_rank for m in plan.modules}

    def each(tensors: Callable[[MergedModule], T]) -> Iterator[T]:
        """Yield what is written of every module, as it is merged."""

        def finish(merged: MergedModule) -> tuple[ModuleRecord, T]:
            return module_record(merged, exact_ranks[merged.target]), tensors(merged)

        for module, written in engine.each(combiner, ranks, finish):
            done.append(module)
            yield written

    if writes_peft(inventory):
        adapter = MergedAdapter(inventory, ranks)
        digests, rank = adapter.write(place, each(adapter.tensors)), adapter.rank
    else:
        other = OtherAdapter(inventory, ranks)
        digests, rank = other.write(place, each(other.tensors)), other.rank
    return WrittenMerge(tuple(done), rank, digests, combiner.notes.texts())


def _record(
    inventory: Inventory,
    plan: MergePlan,
    written: WrittenMerge,
    digests: dict[Path, str],
    started: float,
) -> RunRecord:
    return RunRecord(
        plait=__version__,
        recipe=recipe_json(inventory.recipe),
        sources=sources(inventory, [digests[a.file.path] for a in inventory.adapters]),
        method=plan.method,
        space=plan.space,
        result=max((m.result for m in written.modules), key=("exact", "truncated", "dense").index),
        rank=written.rank,
        max_lora_rank=served_rank(inventory, written.rank),
        kept=overall_kept(written.modules),
        lowest_kept=min(m.kept for m in written.modules),
        modules=written.modules,
        notes=(*plan.notes, *written.notes),
        finished=datetime.now().astimezone().isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 3),
    )


@contextmanager
def _claimed(recipe: Recipe) -> Iterator[Path]:
    """Offer a run folder of the workspace that is ours alone: artifacts/merged/<method>/<adapters>/runs/run_<time>."""
    names = "_".join(sorted(a.name for a in recipe.adapters))
    if len(names) > 120:
        names = f"{len(recipe.adapters)}_adapters"
    runs = Path("artifacts", "merged", recipe.method_name, names, "runs")
    folder = new_run_folder(runs)
    try:
        yield folder
    finally:
        with suppress(OSError):  # folders go only while they are empty
            for place in (folder, *folder.parents):
                place.rmdir()


def input_folders(inventory: Inventory) -> dict[str, Path]:
    """Return what a merge reads and must not replace: what each is → its folder."""
    found = {f"adapter {a.name!r}": a.place for a in inventory.adapters}
    return found if inventory.base_located is None else found | {"the base model": inventory.base_located.folder}
