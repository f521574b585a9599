"""sha256 of what a bake reads and writes: during the work, and never of the same bytes twice."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from plait.baking.shards import OutShard
from plait.checkpoints.checkpoint import BaseCheckpoint
from plait.libraries.huggingface_hub import fetched_sha256
from plait.results.digests import sha256

_CHUNK = 1 << 18  # bytes; what fits into a processor's cache


class GrowingDigest:
    """sha256 of a file that is written piece by piece, in any order, by several threads.

    A hash takes its bytes in order: what is complete from the start of the file is hashed while later pieces are made, so
    that little is left to do when the last one is there.

    Args:
        handle: the open file, readable; it stays the caller's.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._sha256 = hashlib.sha256()
        self._buffer = memoryview(bytearray(_CHUNK))
        self._pieces: dict[int, int] = {}  # start → stop of what is written beyond the mark
        self._mark = 0  # everything before it is written
        self._position = 0  # everything before it is hashed
        self._notes, self._hashing = threading.Lock(), threading.Lock()

    def written(self, start: int, count: int) -> None:
        """Note that `count` bytes from `start` on are in the file."""
        with self._notes:
            if count:
                self._pieces[start] = start + count
            while self._mark in self._pieces:
                self._mark = self._pieces.pop(self._mark)

    def passing(self, start: int, data: memoryview) -> None:
        """Hash bytes that were written at `start`, where all before them are hashed: they need not be read again."""
        if self._position == start and self._hashing.acquire(blocking=False):
            try:
                if self._position == start:
                    self._sha256.update(data)
                    self._position += len(data)
            finally:
                self._hashing.release()

    def catch_up(self) -> None:
        """Hash what has become complete; returns at once when another thread is doing so."""
        if self._hashing.acquire(blocking=False):
            try:
                while self._position < self._mark:
                    self._hash(self._mark)
            finally:
                self._hashing.release()

    def finish(self, size: int) -> str:
        """Hash the rest of the file of `size` bytes, and return the hex digest."""
        with self._hashing:
            while self._position < size:
                self._hash(size)
        return self._sha256.hexdigest()

    def _hash(self, stop: int) -> None:
        count = os.preadv(self._handle, [self._buffer[: stop - self._position]], self._position)
        if not count:
            raise OSError(errno.EIO, "a file that was just written ends early")
        self._sha256.update(self._buffer[:count])
        self._position += count


@contextmanager
def base_digests(
    checkpoint: BaseCheckpoint, shards: Sequence[OutShard], known: Mapping[Path, str], *, read: bool = True
) -> Iterator[Callable[[Mapping[str, str]], dict[str, str | None]]]:
    """Hash the base's files during the work, but for those whose sha256 is known without reading them.

    Known are those that the Hub's tools have noted, and those that are copied unchanged: they are their result.

    Args:
        checkpoint: the base.
        shards: that are written.
        known: file → sha256, of files that were hashed before.
        read: hash the others; without, theirs are None.

    Yields:
        a function of the results' digests, file → sha256, that waits for the base's.
    """
    leads = {s.name: s.lead for s in checkpoint.shards}
    copied = {s.name for s in shards if leads.get(s.name) == s.lead and all(t.copied for t in s.tensors)}
    with ThreadPoolExecutor(1, "plait-sha256") as pool:
        files = [s.file.path for s in checkpoint.shards if s.name not in copied]

        def digest(path: Path) -> str | None:
            return known.get(path) or fetched_sha256(path) or (sha256(path) if read else None)

        futures = {path: pool.submit(digest, path) for path in files}
        try:
            yield lambda results: {
                s.source: results[s.name] if s.name in copied else futures[s.file.path].result() for s in checkpoint.shards
            }
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
