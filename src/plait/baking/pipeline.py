"""recipe + base → plan → shards → full model under its final name: the one function of the command line and Python."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from plait.baking.card import model_card
from plait.baking.digests import base_digests
from plait.baking.identity import bake_digest
from plait.baking.journal import BakeJournal, open_journal
from plait.baking.on_cluster import check_nodes, write_on_nodes
from plait.baking.plan import Bake, BakeOptions, BakePlan, prepare_bake
from plait.baking.record import BakeRecord
from plait.baking.tensors import ShardTensorBuilder
from plait.baking.writing import ShardWriter
from plait.cluster.connection import connected
from plait.errors import OutputError
from plait.merging.engine import Engine
from plait.merging.heads import write_heads
from plait.merging.moments import MomentsOf
from plait.merging.pipeline import input_folders
from plait.merging.record import adapter_inputs, sources, write_records
from plait.notices import noting_completed
from plait.recipes.naming import naming_its_file
from plait.recipes.schema import Heads, Recipe
from plait.recipes.writing import recipe_json
from plait.records import ShortRepr
from plait.results.digests import sha256
from plait.results.disk import check_not_an_input, check_space, write_failure
from plait.results.lock import LOCK, Lock, locked_input, new_lock, output_digests
from plait.results.progress import Progress, SilentProgress
from plait.results.records import ModuleRecord, write_json
from plait.results.staging import checking_output
from plait.results.threads import worker_count
from plait.version import __version__


@dataclass(frozen=True, repr=False)
class BakeResult(ShortRepr):
    """A finished bake.

    Attributes:
        folder: where the model is.
        plan: what was to happen.
        record: what happened.
        url: where it was pushed; None when it was not.
    """

    folder: Path
    plan: BakePlan
    record: BakeRecord
    url: str | None = None


@naming_its_file
def plan_bake(
    recipe: Recipe,
    options: BakeOptions | None = None,
    *,
    out: Path | None = None,
    folder: Path | None = None,
    force: bool = False,
    workers: int | None = None,
    moments: MomentsOf | None = None,
) -> BakePlan:
    """Return what `run_bake` would do with the same arguments; reads headers, no tensor.

    Raises:
        PlaitError: as `run_bake`.
    """
    return _prepared(recipe, options or BakeOptions(), out, folder, worker_count(workers), moments, force=force).plan


@naming_its_file
def run_bake(  # noqa: PLR0913 (all that a bake depends on)
    recipe: Recipe,
    options: BakeOptions | None = None,
    *,
    out: Path,
    folder: Path | None = None,
    force: bool = False,
    workers: int | None = None,
    moments: MomentsOf | None = None,
    progress: Progress | None = None,
    cluster: str | None = None,
    known: Mapping[Path, str] | None = None,
    expected: Mapping[str, str] | None = None,
) -> BakeResult:
    """Write base + merge as a full model.

    Killed at any moment, the same call continues with what was finished; `out` appears when it is complete.

    Args:
        recipe: what is merged, with its base model.
        options: dtype, size of files and device.
        out: where to write.
        folder: what the recipe's relative paths are relative to; the current folder when None.
        force: replace a model at `out`.
        workers: threads; never change a byte.
        moments: second moments of inputs, in place of files that the recipe names. A bake with them starts from the
            beginning when it was killed, since it is not known whether the function is the same one.
        progress: receives the bytes done.
        cluster: address of the cluster on whose nodes files are made; this process when None.
        known: input file → sha256, of those that were hashed just now.
        expected: file of the model → sha256, where it is made to be compared: one that comes out so is left empty, so that
            few are on the disk at a time. Not with `cluster`.

    Raises:
        PlaitError: anything wrong with what the user gave; nothing is written at `out` then.
    """
    started = time.perf_counter()
    options, threads, known = options or BakeOptions(), worker_count(workers), known or {}
    progress = progress or SilentProgress()
    with ExitStack() as stack:
        nodes = None if cluster is None else stack.enter_context(connected(cluster))
        bake = _prepared(recipe, options, out, folder, threads, moments, force=force)
        if nodes is not None:
            check_nodes(nodes, bake, out)
        journal = stack.enter_context(open_journal(out, force=force))
        stack.enter_context(_explained(out, journal, len(bake.shards)))
        with ThreadPoolExecutor(min(4, len(bake.inventory.adapters)), "plait-sha256") as pool:
            paths = [a.file.path for a in bake.inventory.adapters]
            digests = list(pool.map(lambda path: known.get(path) or sha256(path), paths))
        digest = bake_digest(bake, digests, recipe_json(bake.recipe))
        journal.begin(digest)
        resumed = tuple(sorted(journal.finished))
        left = bake.plan.output_bytes - sum(size for size, _ in journal.finished.values())
        if expected:  # of as many files as are made and finished at a time
            left = sum(sorted(shard.size for shard in bake.shards)[-2 * threads :])
        check_space(out, left, what="the model", on=journal.folder, advice="--dtype bfloat16")
        with base_digests(bake.checkpoint, bake.shards, known, read=options.hash_base) as digests_of_base:
            if nodes is not None:
                shards = write_on_nodes(nodes, bake, digest, journal, threads=workers, progress=progress)
            else:
                combiner = Engine(bake.inventory, bake.merge, workers=threads, progress=progress).prepare()
                builder = ShardTensorBuilder(bake.checkpoint, bake.device, journal.folder)
                writer = ShardWriter(
                    bake.checkpoint, bake.inventory, combiner, builder, journal, threads, progress, expected or {}
                )
                shards = writer.write(bake.shards)
            bake.auxiliary.write(journal.model)
            _write_heads(bake, journal.model)
            record = _record(bake, digests, shards, resumed, started)
            (journal.model / "README.md").write_text(model_card(bake, record), encoding="utf-8")
            lock = _lock(bake, digests, shards, digests_of_base(shards), journal.model, out)
        write_json(journal.model / LOCK, lock)
        write_records(journal.model, record)
        journal.publish(force=force)
    return BakeResult(out, bake.plan, record)


def _prepared(
    recipe: Recipe,
    options: BakeOptions,
    out: Path | None,
    folder: Path | None,
    workers: int,
    moments: MomentsOf | None,
    *,
    force: bool,
) -> Bake:
    """Prepare a bake; refuse an output that cannot be written, or is an input."""
    with checking_output(out, force=force):
        bake = prepare_bake(recipe, options, folder=folder, workers=workers, moments=moments)
    inputs = input_folders(bake.inventory) | {"the base model": bake.checkpoint.located.path}
    check_not_an_input(out, inputs, command="bake")
    return bake


def _write_heads(bake: Bake, folder: Path) -> None:
    """Write what is kept separate, without the copies of the base's tensors that adapters hold."""
    separate = bake.placement.separate
    adapters = [
        replace(a, full_tensors={p: a.full_tensors[p] for p in separate.get(a.name, ())}) for a in bake.inventory.adapters
    ]
    write_heads(adapters, Heads(), folder)


def _record(bake: Bake, digests: list[str], shards: dict[str, str], resumed: tuple[str, ...], started: float) -> BakeRecord:
    copied = sum(s.copied for s in bake.plan.shards)
    return BakeRecord(
        plait=__version__,
        recipe=recipe_json(bake.recipe),
        sources=sources(bake.inventory, digests),
        method=bake.merge.method,
        space=bake.merge.space,
        result="dense",
        rank=None,
        max_lora_rank=None,
        kept=1.0,
        lowest_kept=1.0,
        modules=tuple(
            ModuleRecord(target=m.target, rank=None, result="dense", energy=None, kept=1.0) for m in bake.merge.modules
        ),
        notes=bake.plan.notes,
        finished=datetime.now().astimezone().isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 3),
        base_model=bake.plan.base,
        base_commit=bake.checkpoint.located.commit,
        dtype=bake.options.dtype,
        shards=shards,
        resumed=resumed,
        bytes_copied=copied,
        bytes_changed=bake.plan.output_bytes - copied,
    )


def _lock(bake: Bake, digests: list[str], shards: dict[str, str], base: dict[str, str | None], folder: Path, out: Path) -> Lock:
    """Make the lock; shards are not read again, their hashes are known."""
    return new_lock(
        "bake",
        recipe=recipe_json(bake.recipe),
        inputs=adapter_inputs(bake.inventory, digests, out),
        outputs=output_digests(folder, shards),
        options=bake.options.kept,
        base=locked_input(bake.checkpoint.located, base, out),
    )


@contextmanager
def _explained(out: Path, journal: BakeJournal, shards: int) -> Iterator[None]:
    """Add to an error what is left when a bake fails, and how to continue."""
    try:
        with noting_completed() as completed:
            yield
    except BaseException as error:
        if completed:  # it has its name already
            raise
        left = (
            f"{len(journal.finished)} of {shards} files are finished in {journal.folder}; the same command continues from "
            "there. Delete that folder to give them up."
        )
        if found := write_failure(error, out, journal.folder):
            if journal.finished:
                found.add_note(left)
            raise found from error
        if journal.finished and not (isinstance(error, OutputError) and hasattr(error, "__notes__")):  # it says what is left
            error.add_note(left)
        elif not isinstance(error, Exception):  # stopped by its user
            error.add_note("No file was finished; the same command starts from the beginning.")
        raise
