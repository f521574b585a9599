"""recipe + base → plan → shards → whole model under its final name: the one function behind the command line and Python."""

from __future__ import annotations

import errno
import hashlib
import json
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch

import plait
from plait.adapters.adapter import CONFIG
from plait.baking.card import model_card
from plait.baking.checkpoint import BaseCheckpoint
from plait.baking.journal import Workshop, workshop
from plait.baking.making import Maker
from plait.baking.plan import Bake, BakeOptions, BakePlan, prepare_bake
from plait.baking.record import BakeRecord
from plait.baking.writing import ShardWriter
from plait.errors import OutputError, PlaitError, RecipeError
from plait.hub.upload import push_folder
from plait.merging import record as records
from plait.merging.engine import Engine
from plait.merging.heads import write_heads
from plait.merging.pipeline import default_workers
from plait.merging.progress import Progress, Silent
from plait.merging.record import Lock, ModuleRecord
from plait.merging.staging import output_problem
from plait.recipes.schema import Recipe

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)


@dataclass(frozen=True)
class BakeResult:
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


def plan_bake(
    recipe: Recipe, options: BakeOptions | None = None, *, folder: Path | None = None, workers: int | None = None
) -> BakePlan:
    """Return what a bake would do; reads headers, no tensor.

    Raises:
        PlaitError: as `run_bake`.
    """
    return prepare_bake(recipe, options or BakeOptions(), folder=folder, workers=workers or default_workers()).plan


def run_bake(
    recipe: Recipe,
    options: BakeOptions | None = None,
    *,
    out: Path,
    folder: Path | None = None,
    force: bool = False,
    workers: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> BakeResult:
    """Write base + merge as a full model.

    Killed at any moment, the same call goes on with what was finished; `out` appears when it is whole.

    Args:
        recipe: what is merged, with its base model.
        options: dtype and size of files.
        out: where to write.
        folder: what the recipe's relative paths are relative to; the current folder when None.
        force: replace a model that stands at `out`.
        workers: threads; never change a byte.
        device: where blocks are added up, as torch names it.
        progress: who listens; it is told of bytes.

    Raises:
        PlaitError: anything wrong with what the user gave; nothing stands at `out` then.
    """
    started = time.perf_counter()
    options, workers = options or BakeOptions(), workers or default_workers()
    problem = output_problem(out, force=force)
    if problem:
        raise OutputError(problem)
    where = _device(device)
    bake = prepare_bake(recipe, options, folder=folder, workers=workers)
    _check_not_an_input(bake, out)
    with workshop(out, force=force) as shop, _explained(out, shop, len(bake.shards)):
        digests = records.input_digests(bake.inventory)
        shop.begin(_digest(bake, digests, where))
        resumed = tuple(sorted(shop.finished))
        _check_space(bake, shop, out)
        with _base_digests(bake.checkpoint) as base_digests:
            shards = _write_shards(bake, shop, where, workers, progress or Silent())
            bake.companions.write(shop.model)
            _write_heads(bake, shop.model)
            record = _record(bake, digests, shards, resumed, started)
            (shop.model / "README.md").write_text(model_card(bake, record), encoding="utf-8")
            lock = _lock(bake, digests, shards, base_digests(), shop.model, out)
        records.write_json(shop.model / records.LOCK, lock)
        records.write_json(shop.model / records.RECORD, record)
        records.write_json(shop.model / records.SUMMARY, records.summary(record))
        shop.publish(force=force)
    return BakeResult(out, bake.plan, record)


def push_bake(result: BakeResult, repo: str, *, private: bool) -> BakeResult:
    """Upload a baked model; return the result with its address.

    Raises:
        OutputError: the Hub refuses; the model stands where it is.
    """
    message = f"{result.plan.base} with {', '.join(result.plan.adapters)}"
    return replace(result, url=push_folder(result.folder, repo, private=private, message=message))


def _write_shards(bake: Bake, shop: Workshop, device: torch.device, workers: int, progress: Progress) -> dict[str, str]:
    combiner = Engine(bake.inventory, bake.merge, workers=workers, progress=progress).prepare()
    maker = Maker(bake.checkpoint, device, shop.folder)
    return ShardWriter(bake.checkpoint, bake.inventory, combiner, maker, shop, workers, progress).write(bake.shards)


def _write_heads(bake: Bake, folder: Path) -> None:
    """Write what is kept apart, without the copies of the base's tensors that adapters carry."""
    apart = bake.placement.apart
    adapters = [replace(a, full_tensors={p: a.full_tensors[p] for p in apart.get(a.name, ())}) for a in bake.inventory.adapters]
    write_heads(adapters, bake.inventory.recipe.heads, folder)


def _digest(bake: Bake, adapters: list[str], device: torch.device) -> str:
    """Return a digest of everything that the bytes of the shards depend on."""
    stats = {s.name: s.file.path.stat() for s in bake.checkpoint.shards}
    said = {
        "plait": plait.__version__,
        "libraries": records.library_versions(),
        "recipe": records.recipe_json(bake.recipe),
        "options": bake.options.model_dump(mode="json"),
        "device": device.type,
        "adapters": [(d, records.sha256(a.config.path)) for d, a in zip(adapters, bake.inventory.adapters, strict=True)],
        "base": {
            s.name: (stats[s.name].st_size, stats[s.name].st_mtime_ns, hashlib.sha256(s.lead).hexdigest())
            for s in bake.checkpoint.shards
        },
        "config": bake.checkpoint.config,
        "headers": {s.name: hashlib.sha256(s.lead).hexdigest() for s in bake.shards},
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _record(bake: Bake, digests: list[str], shards: dict[str, str], resumed: tuple[str, ...], started: float) -> BakeRecord:
    copied = sum(s.copied for s in bake.plan.shards)
    return BakeRecord(
        plait=plait.__version__,
        recipe=records.recipe_json(bake.recipe),
        sources=records.sources(bake.inventory, digests),
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


def _lock(bake: Bake, digests: list[str], shards: dict[str, str], base: dict[str, str], folder: Path, out: Path) -> Lock:
    """Make the lock; shards are not read again, their hashes are known."""
    inputs = {
        a.name: records.locked_input(place, {a.file.path.name: digest, CONFIG: records.sha256(a.config.path)}, out)
        for a, place, digest in zip(bake.inventory.adapters, bake.inventory.located, digests, strict=True)
    }
    made = sorted(p for p in folder.rglob("*") if p.is_file())
    outputs = {p.relative_to(folder).as_posix(): shards.get(p.name) or records.sha256(p) for p in made}
    return Lock(
        version=1,
        plait=plait.__version__,
        python=platform.python_version(),
        libraries=records.library_versions(),
        machine=platform.machine(),
        recipe=records.recipe_json(bake.recipe),
        inputs=inputs,
        outputs=outputs,
        kind="bake",
        options=bake.options.model_dump(mode="json"),
        base=records.locked_input(bake.checkpoint.located, base, out),
    )


@contextmanager
def _base_digests(checkpoint: BaseCheckpoint) -> Iterator[Callable[[], dict[str, str]]]:
    """Hash the base beside the work; the Hub's cache names its files by their hash already."""
    with ThreadPoolExecutor(1, "plait-sha256") as pool:
        futures = {s.name: pool.submit(_sha256_of, s.file.path) for s in checkpoint.shards}
        try:
            yield lambda: {name: future.result() for name, future in futures.items()}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _sha256_of(path: Path) -> str:
    real = path.resolve()
    return real.name if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name) else records.sha256(path)


def _check_not_an_input(bake: Bake, out: Path) -> None:
    inputs = {f"adapter {a.name!r}": a.folder for a in bake.inventory.adapters} | {"the base model": bake.checkpoint.folder}
    for what, folder in inputs.items():
        if out.exists() and out.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise OutputError(f"{out} is an input of this bake ({what}). Choose another output.")


def _check_space(bake: Bake, shop: Workshop, out: Path) -> None:
    needed = bake.plan.output_bytes - sum(size for size, _ in shop.finished.values())
    free = shutil.disk_usage(shop.folder).free
    if free < needed:
        raise OutputError(
            f"{out}: the model needs {needed / 1e9:.2f} GB, {shop.folder.parent} has {free / 1e9:.2f} GB free. Free some "
            "space, choose another place, or write fewer bytes (--dtype bfloat16)."
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}. Use 'cpu', or 'cuda' where there is one."
        ) from None
    return device


@contextmanager
def _explained(out: Path, shop: Workshop, shards: int) -> Iterator[None]:
    """Say what is left when a bake fails, and that it can go on."""
    try:
        yield
    except BaseException as error:
        left = (
            f"{len(shop.finished)} of {shards} files are finished in {shop.folder}; the same command goes on from there. "
            "Delete that folder to give them up."
        )
        if isinstance(error, OSError) and not isinstance(error, PlaitError) and error.errno in _DISK_ERRORS:
            found = OutputError(f"{out} cannot be written: {error.strerror}. Free some space or choose another place.")
            if shop.finished:
                found.add_note(left)
            raise found from error
        if shop.finished:
            error.add_note(left)
        raise
