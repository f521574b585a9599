"""The files of a bake, made on the nodes of a cluster and noted in one journal, the driver's.

A file is made in a folder of its own and renamed by the driver, so that a worker of a driver that was killed meets no other.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.baking.identity import bake_digest
from plait.baking.journal import BakeJournal
from plait.baking.plan import Bake, BakeOptions, prepare_bake
from plait.baking.tensors import ShardTensorBuilder
from plait.baking.writing import ShardWriter
from plait.cluster.connection import Cluster
from plait.cluster.host import Send
from plait.cluster.workers import Job, Workers
from plait.errors import OutputError, PlanError
from plait.merging.engine import Engine
from plait.merging.inventory import placed_recipe
from plait.recipes.loading import build_recipe
from plait.recipes.writing import recipe_json
from plait.results.digests import sha256
from plait.results.progress import Progress, SilentProgress

_PARTS = "parts"  # folder in the journal's, with one per file that is being made


def check_nodes(cluster: Cluster, bake: Bake, out: Path) -> None:
    """Refuse a cluster that cannot bake this, before anything is read or thrown away.

    Raises:
        PlanError: second moments come from a function, which is here only.
        PlaitError: as `Cluster.check`.
    """
    moments = bake.inventory.moments
    if moments is not None and not moments.files:
        raise PlanError("--cluster: second moments that a function gives are in this process only. Give files (moments=).")
    files = [] if moments is None else [file.path.absolute() for file in moments.files.values()]
    adapters = [place.path.absolute() for place in bake.inventory.located]
    cluster.check(out.absolute().parent, [bake.checkpoint.folder.absolute(), *adapters, *files])


def write_on_nodes(
    cluster: Cluster, bake: Bake, digest: str, journal: BakeJournal, *, threads: int | None, progress: Progress
) -> dict[str, str]:
    """Make every file that is not finished yet; return file → sha256.

    Args:
        cluster: connected, and checked.
        bake: what is made.
        digest: of everything that its bytes depend on.
        journal: where finished files are noted.
        threads: of each worker; the cores that it gets when None. They never change a byte.
        progress: receives the bytes done.

    Raises:
        PlaitError: a file cannot be made.
    """
    share = cluster.share(gpus=bake.device.type == "cuda")
    given = {
        "recipe": placed_recipe(bake.recipe, bake.inventory) | {"base_model": str(bake.checkpoint.located.path.absolute())},
        "asked": recipe_json(bake.recipe),
        "options": bake.options.model_dump(mode="json") | {"device": bake.device.type},  # a worker sees its own only
        "digest": digest,
        "threads": threads or share.cpus,
    }
    parts = journal.folder.absolute() / _PARTS
    shutil.rmtree(parts, ignore_errors=True)
    progress.start("bake", sum(shard.size for shard in bake.shards), "B")
    try:
        with Workers(cluster, NodeBaker, (given,), share, on_message=lambda _, call: progress.advance(*call)) as workers:
            for shard in bake.shards:
                if shard.name in journal.finished and journal.holds(shard.name):
                    progress.advance(shard.size)
                else:
                    part = parts / secrets.token_hex(8)
                    workers.submit(Job(part / shard.name, shard.name, "write", (shard.name, str(part))))
            while workers.open:
                ended = workers.next()
                if ended.error is not None:
                    raise ended.error
                _take(journal, ended.job.about, ended.job.name, *ended.value)
    finally:
        progress.finish()
        shutil.rmtree(parts, ignore_errors=True)
    return {shard.name: journal.finished[shard.name][1] for shard in bake.shards}


def _take(journal: BakeJournal, made: Path, name: str, size: int, sha256: str) -> None:
    """Give a file that a worker has made its name, and note it.

    Raises:
        OutputError: it is not seen here as the worker has made it.
    """
    if not made.is_file() or made.stat().st_size != size:
        raise OutputError(
            f"{made}: a node has made this file of {size} bytes, and it is not seen here. The output must be on storage that "
            "all nodes share, under the same path."
        )
    (journal.model / name).parent.mkdir(parents=True, exist_ok=True)
    os.replace(made, journal.model / name)  # noqa: PTH105 (one word for all systems)
    journal.finish(name, size, sha256)


class NodeBaker:
    """Makes files of a bake, on a node.

    Args:
        given: recipe with the folders that were found, recipe as it was asked for, options, digest and threads.

    Raises:
        OutputError: this node would make other bytes.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._threads = given["threads"]
        bake = self._bake = prepare_bake(build_recipe(given["recipe"]), BakeOptions(**given["options"]), workers=self._threads)
        digests = [sha256(adapter.file.path) for adapter in bake.inventory.adapters]
        if bake_digest(bake, digests, given["asked"]) != given["digest"]:
            raise OutputError(
                "--cluster: a node sees other files than this machine: base model, adapters or second moments differ in "
                "content, size or time of change. They must be on storage that all nodes share, under the same paths."
            )
        self._combiner = Engine(
            self._bake.inventory, self._bake.merge, workers=self._threads, progress=SilentProgress()
        ).prepare()

    def write(self, send: Send, name: str, folder: str) -> tuple[int, str]:
        """Make a file in a folder; return its size and sha256."""
        place = Path(folder)
        shutil.rmtree(place, ignore_errors=True)  # of a worker that was lost
        place.mkdir(parents=True)
        bake, part = self._bake, _Part(place)
        builder = ShardTensorBuilder(bake.checkpoint, bake.device, place)
        progress = _SentBytes(send)
        writer = ShardWriter(bake.checkpoint, bake.inventory, self._combiner, builder, part, self._threads, progress)
        writer.write([shard for shard in bake.shards if shard.name == name])
        return part.finished[name]


class _Part:
    """The folder of one file that is being made."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.finished: dict[str, tuple[int, str]] = {}

    def holds(self, shard: str) -> bool:
        return shard in self.finished

    def finish(self, shard: str, size: int, sha256: str) -> None:
        self.finished[shard] = (size, sha256)


class _SentBytes(SilentProgress):
    """Sends the bytes done."""

    def __init__(self, send: Send) -> None:
        self._send = send

    def advance(self, steps: int = 1) -> None:
        self._send((steps,))
