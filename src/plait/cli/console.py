"""What all commands print with: two consoles, a progress bar, sizes in words."""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class _Unpadded:
    """A text file that keeps the spaces at the ends of lines to itself: tables are padded to a width that no pipe has."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        return self._file.write(re.sub(r" +$", "", text, flags=re.MULTILINE) if text.endswith("\n") else text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def out() -> Console:
    """Return the console of results (stdout); in a pipe, lines end where their text ends."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, file=cast(TextIO, _Unpadded(sys.stdout)))


def err() -> Console:
    """Return the console of everything else (stderr)."""
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def warnings_as_notes(wanted: type[Warning] = Warning) -> Iterator[None]:
    """Print what is warned of within the block as notes on stderr, at once: what takes long is announced before it is done.

    A text is printed once, however often it is warned of.
    """
    printed: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, wanted):
            shown(message, category, filename, lineno, file, line)
        elif (text := str(message)) not in printed:
            printed.add(text)
            err().print(f"note: {text}", style="dim", markup=False, soft_wrap=True)

    with warnings.catch_warnings():
        shown, warnings.showwarning = warnings.showwarning, show
        warnings.simplefilter("always", wanted)
        yield


class ProgressBars:
    """Progress on stderr: a bar on a terminal, a line per stage elsewhere."""

    def __init__(self) -> None:
        self._console = err()
        self._bar: Progress | None = None
        self._task: Any = None
        self._stage = ""
        self._unit = ""
        self._steps = 0
        self._started = 0.0

    def start(self, stage: str, total: int, unit: str = "steps") -> None:
        """Begin a stage."""
        self._stage, self._steps, self._unit, self._started = stage, total, unit, time.perf_counter()
        if self._console.is_terminal:
            count: tuple[ProgressColumn, ...] = (MofNCompleteColumn(),)
            if unit == "B":
                count = (DownloadColumn(), TransferSpeedColumn())
            columns = (TextColumn("{task.description:>8}"), BarColumn(), *count, TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task(stage, total=total)
            self._bar.start()

    def advance(self, steps: int = 1) -> None:
        """Report steps done."""
        if self._bar is not None:
            self._bar.advance(self._task, steps)

    def finish(self) -> None:
        """End the stage."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._steps:
            amount = size(self._steps) if self._unit == "B" else f"{self._steps} {self._unit}"
            self._console.print(f"{self._stage}: {amount} in {time.perf_counter() - self._started:.1f} s")
            self._steps = 0


def size(count: float | None) -> str:
    """Return a number of bytes in words."""
    if count is None:
        return "known at run time"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
