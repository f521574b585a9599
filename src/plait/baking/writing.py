"""All shards by several threads; what is written is hashed and flushed during the work."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from plait.baking.deltas import ModuleMerge
from plait.baking.digests import GrowingDigest
from plait.baking.shards import OutShard, OutTensor
from plait.baking.tensors import ShardTensorBuilder
from plait.checkpoints.checkpoint import BaseCheckpoint
from plait.deferred import Tensor
from plait.errors import AdapterError, PlanError
from plait.merging.combine import Combiner
from plait.merging.inventory import Inventory
from plait.results.progress import Progress
from plait.results.threads import one_thread_each
from plait.tensorfiles.blocks import CopySourceError, bytes_of, copy_range, write_at
from plait.tensorfiles.flushing import Flusher
from plait.tensorfiles.reader import TensorFile, check_unchanged

_RUN = 1 << 26  # bytes that one thread copies at a time; a long run is shared


class _StoppedError(Exception):
    """Another thread has failed."""


class ShardFolder(Protocol):
    """A folder of shards; see `BakeJournal`."""

    model: Path
    finished: dict[str, tuple[int, str]]

    def holds(self, shard: str) -> bool:
        """Return whether a finished shard is as it was."""

    def finish(self, shard: str, size: int, sha256: str) -> None:
        """Note a finished shard, which is on disk or, as expected, emptied."""


@dataclass
class ShardWriter:
    """Writes shards into a folder.

    Attributes:
        checkpoint: the base.
        inventory: the adapters.
        combiner: merges.
        builder: makes changed tensors.
        journal: where, and what is finished there.
        workers: threads; never change a byte.
        progress: receives the bytes done.
        expected: shard → sha256: one that comes out so is emptied at once, and not flushed. Only what differs is looked at.
    """

    checkpoint: BaseCheckpoint
    inventory: Inventory
    combiner: Combiner
    builder: ShardTensorBuilder
    journal: ShardFolder
    workers: int
    progress: Progress
    expected: Mapping[str, str] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _talk: threading.Lock = field(default_factory=threading.Lock)

    def write(self, shards: Sequence[OutShard]) -> dict[str, str]:
        """Write every shard that is not finished yet; return file → sha256."""
        self.progress.start("bake", sum(s.size for s in shards), "B")
        opened: list[_Open] = []
        try:
            # flushing waits for the disk, and keeps no thread from computing
            with ThreadPoolExecutor(self.workers, "plait-flush") as flushing, one_thread_each(self.workers) as pool:
                try:
                    for done in [pool.submit(self._check, s) for s in shards if s.name in self.journal.finished]:
                        done.result()
                    todo = deque(s for s in shards if s.name not in self.journal.finished)
                    self._process_jobs(todo, opened, pool, flushing)
                except BaseException:
                    self._stop.set()
                    raise
        finally:
            for one in opened:
                one.close(keep=one.shard.name in self.journal.finished)
            self.progress.finish()
        return {s.name: self.journal.finished[s.name][1] for s in shards}

    def _process_jobs(
        self, todo: deque[OutShard], opened: list[_Open], pool: ThreadPoolExecutor, flushing: ThreadPoolExecutor
    ) -> None:
        """Keep all threads busy with jobs of as many files as there are threads.

        Several files at a time, because a file system lets one thread write to a file at a time.
        """
        running: dict[Future[None], _Open] = {}  # jobs
        flushed: dict[Future[None], _Open] = {}  # files that are made
        while todo or opened:
            while len(opened) - len(flushed) < self.workers and todo:
                opened.append(self._open(todo.popleft()))
            while len(running) < self.workers + 1 and (ready := [o for o in opened if o.jobs]):
                one = min(ready, key=lambda o: o.running)
                running[pool.submit(self._run_job, one.jobs.popleft(), one)] = one
                one.running += 1
            for one in opened:
                if not one.running and not one.jobs and one not in flushed.values():
                    flushed[flushing.submit(self._finish, one)] = one
            done, _ = wait({*running, *flushed}, return_when=FIRST_COMPLETED)
            _raise_first(done, {*running, *flushed})
            for future in done & running.keys():
                running.pop(future).running -= 1
            for future in done & flushed.keys():
                one = flushed.pop(future)
                opened.remove(one)
                one.close(keep=True)

    def _run_job(self, job: _Job, one: _Open) -> None:
        """Do one job of a file, and hash as far as the file is complete now."""
        job.do(one)
        for start, count in job.pieces:
            one.digest.written(start, count)
            if not self.expected:
                one.flusher.wrote(count)
        one.digest.catch_up()

    def _check(self, shard: OutShard) -> None:
        """Take over a shard of an earlier run that is as the journal records; any other is made again."""
        if self.journal.holds(shard.name):
            self._advance(shard.size)

    def _open(self, shard: OutShard) -> _Open:
        path = self.journal.model / shard.name
        path.parent.mkdir(parents=True, exist_ok=True)
        one = _Open(shard, path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666), deque(self._jobs(shard)))
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(one.handle, 0, shard.size)  # a full disk is found now
            os.pwrite(one.handle, shard.lead, 0)
        except BaseException:
            one.close(keep=False)
            raise
        one.digest.written(0, len(shard.lead))
        self._advance(len(shard.lead))
        return one

    def _finish(self, one: _Open) -> None:
        if not self.expected:
            one.flusher.begin()
        digest = one.digest.finish(one.shard.size)
        if digest == self.expected.get(one.shard.name):
            os.ftruncate(one.handle, 0)
        else:
            one.flusher.finish()
        with self._talk:
            self.journal.finish(one.shard.name, one.shard.size, digest)

    def _advance(self, count: int) -> None:
        if self._stop.is_set():
            raise _StoppedError
        with self._talk:
            self.progress.advance(count)

    def _jobs(self, shard: OutShard) -> list[_Job]:
        """Return the work on a file, in its order: long runs of copied bytes; tensors together that need the same merges."""
        jobs = [_Job(partial(self._copy, run), ((run.position, run.count),)) for run in _runs(self.checkpoint, shard)]
        groups: dict[object, list[OutTensor]] = {}
        for tensor in shard.tensors:
            if not tensor.copied:
                groups.setdefault(frozenset(tensor.change.targets) or tensor.name, []).append(tensor)
        jobs += [
            _Job(partial(self._make_tensor, group), tuple((t.start, t.nbytes) for t in group)) for group in groups.values()
        ]
        return sorted(jobs, key=lambda job: job.pieces)

    def _make_tensor(self, tensors: Sequence[OutTensor], one: _Open) -> None:
        def write(position: int, values: Tensor) -> None:
            data = bytes_of(values)
            write_at(one.handle, position, data)
            one.digest.passing(position, data)
            self._advance(len(data))

        targets = tensors[0].change.targets
        merges = {t: ModuleMerge(self.combiner, self.inventory, t) for t in targets}
        for tensor in tensors:
            try:
                self.builder.make(tensor, merges, write)
            except _StoppedError:
                raise
            except PlanError as error:
                read = ", ".join(map(str, [self.checkpoint.located.folder, *(a.folder for a in self.inventory.adapters)]))
                raise PlanError(f"{error} What was read is in {read}.") from None
            except Exception as error:
                error.add_note(f"while baking tensor {tensor.name!r}")
                raise

    def _copy(self, run: _Run, one: _Open) -> None:
        try:
            with run.file.path.open("rb", buffering=0) as source:
                check_unchanged(source.fileno(), run.file)
                copy_range(source.fileno(), run.start, one.handle, run.position, run.count, self._advance)
        except CopySourceError as error:
            raise AdapterError(f"{run.file.path}: {error}. Fetch the base model again.") from None


@dataclass(frozen=True)
class _Job:
    """Work on an open file, and the pieces (start, bytes) that it fills."""

    do: Callable[[_Open], None]
    pieces: tuple[tuple[int, int], ...]


@dataclass(eq=False)
class _Open:
    """A file being written."""

    shard: OutShard
    path: Path
    handle: int
    jobs: deque[_Job]
    running: int = 0

    def __post_init__(self) -> None:
        self.digest = GrowingDigest(self.handle)
        self.flusher = Flusher(self.handle)

    def close(self, *, keep: bool) -> None:
        self.flusher.close()
        os.close(self.handle)
        if not keep:
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Run:
    file: TensorFile
    start: int
    position: int
    count: int


def _runs(checkpoint: BaseCheckpoint, shard: OutShard) -> Iterator[_Run]:
    """Yield the copied tensors of a shard, neighbors joined, long runs cut."""
    joined: list[_Run] = []
    for tensor in shard.tensors:
        if not tensor.copied or tensor.source is None or not tensor.nbytes:
            continue
        file, start = checkpoint.home[tensor.source].file, checkpoint.info(tensor.source).start
        last = joined[-1] if joined else None
        if last and (file, start, tensor.start) == (last.file, last.start + last.count, last.position + last.count):
            joined[-1] = replace(last, count=last.count + tensor.nbytes)
        else:
            joined.append(_Run(file, start, tensor.start, tensor.nbytes))
    for run in joined:
        for done in range(0, run.count, _RUN):
            yield _Run(run.file, run.start + done, run.position + done, min(_RUN, run.count - done))


def _raise_first(done: Iterable[Future[None]], running: Iterable[Future[None]]) -> None:
    """When one has failed, wait for the others to stop and raise what failed first, not what was stopped by it."""
    errors = [e for f in done if (e := f.exception()) is not None]
    if errors:
        for future in running:
            future.cancel()
        raise min(errors, key=lambda e: isinstance(e, _StoppedError))
