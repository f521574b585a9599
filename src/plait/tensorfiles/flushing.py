"""Files that are flushed to disk while they are written, so that their end waits for little."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor

_STEP = 64 << 20  # bytes that are flushed at once


class Flusher:
    """Flushes a file in a thread of its own. Several threads may write at the same time.

    Args:
        handle: the open file; it stays the caller's, open until `close`.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._thread = ThreadPoolExecutor(1, "plait-flush")
        self._lock = threading.Lock()
        self._unflushed = 0
        self._flushing: Future[None] | None = None

    def wrote(self, count: int) -> None:
        """Note that bytes were written; flush them when they are many, and those before are on disk.

        Raises:
            OSError: those before cannot be flushed; the system reports it once.
        """
        with self._lock:
            self._unflushed += count
            if self._unflushed >= _STEP and (self._flushing is None or self._flushing.done()):
                self._begin()

    def begin(self) -> None:
        """Begin to flush everything that was written.

        Raises:
            OSError: what was written before cannot be flushed.
        """
        with self._lock:
            self._begin()

    def finish(self) -> None:
        """Flush everything that was written, and wait for it.

        Raises:
            OSError: it cannot be flushed.
        """
        with self._lock:
            if self._unflushed or self._flushing is None:
                self._begin()
            if self._flushing is not None:
                self._flushing.result()

    def close(self) -> None:
        """Wait for what is being flushed, whether it can be or not; the file may be closed then."""
        self._thread.shutdown()

    def _begin(self) -> None:
        if self._flushing is not None:
            self._flushing.result()
        self._flushing, self._unflushed = self._thread.submit(os.fsync, self._handle), 0
