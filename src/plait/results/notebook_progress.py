"""Progress in a notebook: a bar per stage, and a line of it that stays."""

from __future__ import annotations

import time
from html import escape
from typing import Any

from plait.extras import optional

_EVERY = 0.1  # seconds between two drawings of a bar: a notebook gets each as a message


class NotebookProgress:
    """A listener that notebooks show; give it as `progress=` to whatever takes one.

    >>> plait.merge(["./a", "./b"], out="merged", progress=plait.NotebookProgress())

    Parts that run at a time (phases of a training) have a bar each.

    Args:
        name: of what it is about, before the name of every stage.

    Raises:
        MissingPackageError: IPython is not installed.
    """

    def __init__(self, name: str = "") -> None:
        self._display: Any = optional("IPython.display", "notebook", "NotebookProgress")
        self._name = name
        self._handle: Any = None
        self._stage, self._unit = "", ""
        self._total = self._done = 0
        self._started = self._drawn = 0.0

    def part(self, name: str) -> NotebookProgress:
        """Return the listener of one part of the work."""
        return NotebookProgress(name)

    def start(self, stage: str, total: int, unit: str = "steps") -> None:
        """Begin a stage of `total` steps."""
        self.finish()
        self._stage = f"{self._name} · {stage}" if self._name else stage
        self._total, self._unit, self._done, self._started = total, unit, 0, time.perf_counter()
        self._handle = self._display.display(self._display.HTML(self._bar()), display_id=True)
        if not total:
            self._handle = None

    def advance(self, steps: int = 1) -> None:
        """Report steps done."""
        self._done += steps
        if self._handle is not None and time.perf_counter() - self._drawn >= _EVERY:
            self._handle.update(self._display.HTML(self._bar()))

    def finish(self) -> None:
        """End the stage; its name, steps and time stay."""
        if self._handle is not None:
            self._handle.update(self._display.HTML(self._line(f"{self._amount(self._done)}, {self._seconds():.1f} s")))
            self._handle = None

    def _bar(self) -> str:
        self._drawn = time.perf_counter()
        if not self._total:
            return self._line("")
        bar = f'<progress value="{self._done}" max="{self._total}" style="width:16rem;vertical-align:middle"></progress>'
        return self._line(f"{bar} {self._amount(self._done)} of {self._amount(self._total)}")

    def _line(self, rest: str) -> str:
        return f"<div>{escape(self._stage)} {rest}</div>"

    def _amount(self, count: int) -> str:
        return f"{count / 1e6:.1f} MB" if self._unit == "B" else f"{count} {escape(self._unit)}"

    def _seconds(self) -> float:
        return time.perf_counter() - self._started
