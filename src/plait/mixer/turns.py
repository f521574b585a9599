"""One live model, several people and a background: whoever acts on it has it alone, and what is out of date lets go of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

from plait.results.progress import Progress

T = TypeVar("T")
_LOOK = 0.1  # seconds between two looks, while waiting, at whether it is still wanted


class Superseded(Exception):
    """What was being computed is not wanted any more."""


class GiveWay(Exception):
    """An answer is waited for; what runs in the background begins again later."""


class Turns:
    """Turns on a model, in no order but that the background waits until no other work does.

    It is the `Progress` of all that runs within a turn, so that long work can be left at every step.

    Args:
        shown: receives the same stages and steps; None for none.
    """

    def __init__(self, shown: Progress | None = None) -> None:
        self.shown = shown
        self._free = threading.Condition()
        self._taken, self._waiting = False, 0
        self._stop: Callable[[], bool] = lambda: False
        self._behind = False

    @contextmanager
    def turn(self, stop: Callable[[], bool], *, behind: bool = False) -> Iterator[None]:
        """Have the model alone in the block.

        Args:
            stop: whether the work is not wanted any more.
            behind: whether it gives way to others.

        Raises:
            Superseded: while it waits, or within the block at the next step, when `stop` says so.
            GiveWay: the same for work in the background that others wait for.
        """
        with self._free:
            self._waiting += not behind
            try:
                while self._taken or (behind and self._waiting):
                    if stop():
                        raise Superseded
                    self._free.wait(_LOOK)
            finally:
                self._waiting -= not behind
            self._taken, self._stop, self._behind = True, stop, behind
        try:
            self.check()
            yield
        finally:
            with self._free:
                self._taken = False
                self._free.notify_all()

    def check(self) -> None:
        """Leave the work of this turn where it is not wanted, or has to wait."""
        if self._stop():
            raise Superseded
        if self._behind and self._waiting:
            raise GiveWay

    def start(self, stage: str, total: int, unit: str = "steps") -> None:
        """Begin a stage."""
        self.check()
        if self.shown is not None:
            self.shown.start(stage, total, unit)

    def advance(self, steps: int = 1) -> None:
        """Report steps done."""
        if self.shown is not None:
            self.shown.advance(steps)
        self.check()

    def finish(self) -> None:
        """End a stage."""
        if self.shown is not None:
            self.shown.finish()


class Latest:
    """Of what one person asks for, the last; all before it is out of date."""

    def __init__(self) -> None:
        self._last = object()

    def begin(self) -> Callable[[], bool]:
        """Ask for something new; return what says whether it is out of date by now."""
        own = object()
        self._last = own  # one step: of several threads exactly one is the last
        return lambda: self._last is not own


def streamed(work: Callable[[Callable[[T], object]], object]) -> Iterator[T]:
    """Yield what some work reports, while it is at it in a thread of its own; raise what it raises.

    Args:
        work: called with what it reports to.
    """
    reported: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()

    def run() -> None:
        try:
            work(lambda value: reported.put((value,)))
        except BaseException as error:
            reported.put(error)
        else:
            reported.put(None)

    threading.Thread(target=run, daemon=True).start()
    while (one := reported.get()) is not None:
        if isinstance(one, BaseException):
            raise one
        yield one[0]
