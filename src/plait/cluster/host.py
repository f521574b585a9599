"""What runs on the nodes: a process that makes one object and calls it, and a box for what is reported meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from plait.notices import PlaitWarning

Send = Callable[[tuple[Any, ...]], object]


class Host:
    """One worker process.

    Args:
        make: makes what does the work.
        arguments: of `make`; plain data.
        box: a `Mailbox`.
    """

    def __init__(self, make: Callable[..., Any], arguments: Sequence[Any], box: Any) -> None:
        self._make, self._arguments, self._box = make, arguments, box
        self._made: Any = None

    def begin(self) -> None:
        """Make what does the work; apart from the constructor, so that what is raised reaches the one who waits."""
        with self._announcing():
            self._made = self._make(*self._arguments)

    def run(self, number: int, method: str, arguments: Sequence[Any]) -> Any:
        """Call a method; its first argument sends plain tuples to the one who waits."""
        send: Send = partial(self._send, number)
        with self._announcing():
            return getattr(self._made, method)(send, *arguments)

    @contextmanager
    def _announcing(self) -> Iterator[None]:
        """Send what is announced in the block to the one who waits, who announces it once for all workers."""

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, PlaitWarning):
                self._send(None, (str(message),))

        with warnings.catch_warnings():
            warnings.simplefilter("always", PlaitWarning)
            warnings.showwarning = show
            yield

    def _send(self, number: int | None, call: tuple[Any, ...]) -> None:
        self._box.put.remote(number, call)  # not waited for: a box that is lost costs reports, not work


class Mailbox:
    """What workers report, until it is taken."""

    def __init__(self) -> None:
        self._items: list[tuple[int | None, tuple[Any, ...]]] = []

    def put(self, number: int | None, call: tuple[Any, ...]) -> None:
        """Add a report."""
        self._items.append((number, call))

    def take(self) -> list[tuple[int | None, tuple[Any, ...]]]:
        """Return what there is, in order, and forget it."""
        found, self._items = self._items, []
        return found
