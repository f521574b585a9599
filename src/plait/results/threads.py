"""Work on several items at a time with the results, and the bits, of one at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from plait.deferred import torch
from plait.errors import RecipeError
from plait.results.progress import Progress

T = TypeVar("T")
R = TypeVar("R")


def worker_count(workers: int | None = None) -> int:
    """Return how many items are worked on at a time: as asked for, else the cores, at most 4.

    Raises:
        RecipeError: it is less than 1.
    """
    if workers is not None and workers < 1:
        raise RecipeError(f"--workers (workers=) must be at least 1, got {workers}.")
    return workers or max(1, min(4, os.cpu_count() or 1))


def in_order(stage: str, work: Callable[[T], R], items: Sequence[T], workers: int, progress: Progress) -> Iterator[R]:
    """Run `work` in threads of one torch thread each, and yield results in order."""
    progress.start(stage, len(items))
    try:
        with one_thread_each(workers) as pool:
            for result in pool.map(work, items):
                yield result
                progress.advance()
    finally:
        progress.finish()


def ahead(stage: str, work: Callable[[T], R], items: Sequence[T], pool: Executor, most: int, progress: Progress) -> Iterator[R]:
    """Run `work` in a pool, on so many items at a time, and yield results in order."""
    progress.start(stage, len(items))
    waiting: deque[Future[R]] = deque()
    queue = iter(items)
    try:
        while True:
            for item in queue:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= most:
                    break
            if not waiting:
                return
            yield waiting.popleft().result()
            progress.advance()
    finally:
        for future in waiting:
            future.cancel()
        progress.finish()


class InThisThread(Executor):
    """Does at once, in the caller's thread, what it is given: one worker that costs no thread."""

    def submit(self, work: Callable[..., R], /, *given: Any, **named: Any) -> Future[R]:
        """Return what came of the work; an interrupt is not kept for later."""
        future: Future[R] = Future()
        try:
            future.set_result(work(*given, **named))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Offer threads in which torch uses one thread each, so that the bytes do not depend on their number."""
    before = torch.get_num_threads()
    with ThreadPoolExecutor(workers, "plait-work", torch.set_num_threads, (1,)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(before)
