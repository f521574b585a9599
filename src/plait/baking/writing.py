"""All shards by several threads; what is finished is hashed, flushed and noted beside the next ones."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from plait.baking.checkpoint import BaseCheckpoint
from plait.baking.deltas import ModuleMerge
from plait.baking.files import SourceError, copy_range
from plait.baking.journal import Workshop
from plait.baking.making import Maker
from plait.baking.shards import OutShard, OutTensor
from plait.errors import AdapterError
from plait.merging.combine import Combiner
from plait.merging.inventory import Inventory
from plait.merging.progress import Progress

_RUN = 1 << 28  # bytes that one thread copies; a long run is shared


class _StoppedError(Exception):
    """Another thread has failed."""


@dataclass
class ShardWriter:
    """Writes shards into a workshop.

    Attributes:
        checkpoint: the base.
        inventory: the adapters.
        combiner: merges.
        maker: makes changed tensors.
        shop: where.
        workers: threads; never change a byte.
        progress: told of bytes.
    """

    checkpoint: BaseCheckpoint
    inventory: Inventory
    combiner: Combiner
    maker: Maker
    shop: Workshop
    workers: int
    progress: Progress
    _stop: threading.Event = field(default_factory=threading.Event)
    _talk: threading.Lock = field(default_factory=threading.Lock)

    def write(self, shards: Sequence[OutShard]) -> dict[str, str]:
        """Write every shard that is not finished yet; return file → sha256."""
        self.progress.start("bake", sum(s.size for s in shards), "B")
        opened: list[_Open] = []
        try:
            with _pool(self.workers) as pool:
                for done in [pool.submit(self._check, s) for s in shards if s.name in self.shop.finished]:
                    done.result()
                todo = deque(s for s in shards if s.name not in self.shop.finished)
                self._work_off(todo, opened, pool)
        except BaseException:
            self._stop.set()
            raise
        finally:
            for unfinished in opened:
                unfinished.give_up()
            self.progress.finish()
        return {s.name: self.shop.finished[s.name][1] for s in shards}

    def _work_off(self, todo: deque[OutShard], opened: list[_Open], pool: ThreadPoolExecutor) -> None:
        """Keep all threads busy with jobs of as many files as there are threads.

        Several files at a time, because a file system lets one thread write to a file at a time.
        """
        running: dict[Future[None], _Open | None] = {}
        while True:
            while len(opened) < self.workers and todo:
                opened.append(self._open(todo.popleft()))
            ready = (o for o in sorted(opened, key=lambda o: o.running) if o.jobs)
            while len(running) < self.workers + 1 and (one := next(ready, None)) is not None:
                running[pool.submit(one.jobs.popleft(), one.handle)] = one
                one.running += 1
                ready = (o for o in sorted(opened, key=lambda o: o.running) if o.jobs)
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            _raise_first(done, running)
            for future in done:
                one_done = running.pop(future)
                if one_done is None:
                    continue
                one_done.running -= 1
                if not one_done.running and not one_done.jobs:
                    opened.remove(one_done)
                    os.close(one_done.handle)
                    running[pool.submit(self._finish, one_done.shard)] = None

    def _check(self, shard: OutShard) -> None:
        """See whether a shard of an earlier run is what its journal says."""
        if _sha256(self.shop.model / shard.name) == self.shop.finished[shard.name][1]:
            self._advance(shard.size)
        else:
            del self.shop.finished[shard.name]

    def _open(self, shard: OutShard) -> _Open:
        path = self.shop.model / shard.name
        one = _Open(shard, path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666), deque(self._jobs(shard)))
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(one.handle, 0, shard.size)  # a full disk is found now
            os.pwrite(one.handle, shard.lead, 0)
        except BaseException:
            one.give_up()
            raise
        self._advance(len(shard.lead))
        return one

    def _finish(self, shard: OutShard) -> None:
        path = self.shop.model / shard.name
        digest = _sha256(path)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        with self._talk:
            self.shop.finish(shard.name, shard.size, digest)

    def _advance(self, count: int) -> None:
        if self._stop.is_set():
            raise _StoppedError
        with self._talk:
            self.progress.advance(count)

    def _jobs(self, shard: OutShard) -> Iterator[Callable[[int], None]]:
        """Yield the work on one file: long runs of copied bytes, and tensors together that need the same merges."""
        groups: dict[frozenset[str], list[OutTensor]] = {}
        for tensor in shard.tensors:
            if not tensor.copied and tensor.change.targets:
                groups.setdefault(frozenset(tensor.change.targets), []).append(tensor)
        for run in _runs(self.checkpoint, shard):
            yield partial(self._copy, run)
        for group in groups.values():
            yield partial(self._make, group)
        for tensor in shard.tensors:
            if not tensor.copied and not tensor.change.targets:
                yield partial(self._make, [tensor])

    def _make(self, tensors: Sequence[OutTensor], handle: int) -> None:
        targets = tensors[0].change.targets
        merges = {t: ModuleMerge(self.combiner, self.inventory, t) for t in targets}
        for tensor in tensors:
            try:
                self.maker.make(tensor, merges, handle, self._advance)
            except _StoppedError:
                raise
            except Exception as error:
                error.add_note(f"while baking tensor {tensor.name!r}")
                raise

    def _copy(self, run: _Run, handle: int) -> None:
        try:
            with run.path.open("rb", buffering=0) as source:
                copy_range(source.fileno(), run.start, handle, run.position, run.count, self._advance)
        except SourceError as error:
            raise AdapterError(f"{run.path}: {error}. Fetch the base model again.") from None


@dataclass
class _Open:
    """A file being written."""

    shard: OutShard
    path: Path
    handle: int
    jobs: deque[Callable[[int], None]]
    running: int = 0

    def give_up(self) -> None:
        os.close(self.handle)
        self.path.unlink(missing_ok=True)


@dataclass
class _Run:
    path: Path
    start: int
    position: int
    count: int


def _runs(checkpoint: BaseCheckpoint, shard: OutShard) -> Iterator[_Run]:
    """Yield the copied tensors of a shard, neighbours joined, long runs cut."""
    run: _Run | None = None
    for tensor in shard.tensors:
        if not tensor.copied or tensor.source is None or not tensor.nbytes:
            continue
        path, start = checkpoint.home[tensor.source].file.path, checkpoint.info(tensor.source).start
        follows = run is not None and (path, start, tensor.start) == (run.path, run.start + run.count, run.position + run.count)
        if run is not None and follows and run.count < _RUN:
            run.count += tensor.nbytes
            continue
        if run is not None:
            yield run
        run = _Run(path, start, tensor.start, tensor.nbytes)
    if run is not None:
        yield run


def _raise_first(done: Iterable[Future[None]], running: Iterable[Future[None]]) -> None:
    """When one has failed, wait for the others to stop and raise what failed first, not what was stopped by it."""
    errors = [e for f in done if (e := f.exception()) is not None]
    if errors:
        for future in running:
            future.cancel()
        raise min(errors, key=lambda e: isinstance(e, _StoppedError))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Offer threads in which torch uses one thread each, so that the bytes do not depend on their number."""
    before = torch.get_num_threads()
    with ThreadPoolExecutor(workers, "plait-bake", torch.set_num_threads, (1,)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(before)
