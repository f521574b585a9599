"""What all commands print with: two consoles, a progress bar, sizes in words."""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleOptions, OverflowMethod, RenderableType
from rich.errors import MarkupError
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

#: Characters that command a terminal or turn the direction of text; names of files and tensors may hold them.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


_WIDEST = 100_000  # columns; a table is measured without a bound


class _Verbosity:
    """What a command prints besides its results and errors.

    Attributes:
        quiet: nothing.
    """

    quiet = False


VERBOSITY = _Verbosity()  # of the command that runs in this process


class _Console(Console):
    """A console on which text from elsewhere is shown, and commands nothing."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield what is shown, with escapes in the place of characters that would not be."""
        for segment in super().render(renderable, options):
            shown = _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), segment.text)
            yield segment if segment.control else segment._replace(text=shown)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return text with its markup; text whose brackets are not markup stays as it is."""
        try:
            return super().render_str(text, **options)
        except MarkupError:
            return super().render_str(text, **{**options, "markup": False})


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
        return _Console(highlight=False)
    return _Console(highlight=False, file=cast(TextIO, _Unpadded(sys.stdout)))


def err() -> Console:
    """Return the console of everything else (stderr)."""
    return _Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout: as it is where the stream has Unicode, with JSON's escapes elsewhere."""
    has_unicode = str(sys.stdout.encoding).lower().replace("-", "") in ("utf8", "utf16", "utf32")
    text = json.dumps(value, indent=2, ensure_ascii=not has_unicode)
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")  # of a name that is not valid Unicode


def print_notes(notes: Iterable[str], console: Console | None = None) -> None:
    """Print notes, a line each; on stderr when no console is given, unless the command is quiet."""
    for note in notes if console or not VERBOSITY.quiet else ():
        (console or err()).print(f"note: {note}", style="dim", markup=False, soft_wrap=True)


def without_numbers(name: str) -> str:
    """Return the name of a module or tensor with `*` for its numbers, for rows that show all layers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def new_table(columns: Sequence[str], *, left: Collection[str], overflow: OverflowMethod = "ellipsis") -> Table:
    """Return a table without lines; columns are aligned to the right, but for those in `left`."""
    found = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        found.add_column(name, justify="left" if name in left else "right", overflow=overflow)
    return found


def print_table(table: Table, console: Console) -> None:
    """Print a table of text; where its longest words have no place next to each other a line per cell, by rows.

    Args:
        table: whose first column names the rows.
        console: to print on.
    """
    if Measurement.get(console, console.options.update(max_width=_WIDEST), table).minimum <= console.width:
        console.print(table)
        return
    first, *others = table.columns
    for name, *cells in zip(*(column.cells for column in (first, *others)), strict=True):
        console.print(name, style="bold")
        for column, cell in zip(others, cells, strict=True):
            if cell:
                console.print(Padding(f"{column.header}: {cell}", (0, 0, 0, 2)))


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
            print_notes([text])

    with warnings.catch_warnings():
        shown, warnings.showwarning = warnings.showwarning, show
        warnings.simplefilter("always", wanted)
        yield


class ProgressBars:
    """Progress on stderr: a bar on a terminal, a line per stage elsewhere; nothing where the command is quiet."""

    def __init__(self) -> None:
        self._console = err()
        self._console.quiet = VERBOSITY.quiet
        self._bar: Progress | None = None
        self._task: Any = None
        self._stage = ""
        self._unit = ""
        self._steps = self._done = 0
        self._started = 0.0
        self._parts: Progress | None = None

    def part(self, name: str) -> _PartBar:
        """Return the progress of one part, next to which others may run: a bar each on a terminal, a line each elsewhere."""
        if self._parts is None and self._console.is_terminal:
            elapsed = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._parts = Progress(
                TextColumn("{task.description}"), BarColumn(), *elapsed, console=self._console, transient=True
            )
            self._parts.start()
        return _PartBar(name, self._console, self._parts)

    def close(self) -> None:
        """Take the bars of parts away."""
        if self._parts is not None:
            self._parts.stop()
            self._parts = None

    def start(self, stage: str, total: int, unit: str = "steps") -> None:
        """Begin a stage."""
        self.close()  # a terminal shows one set of bars at a time
        self._stage, self._steps, self._unit, self._started = stage, total, unit, time.perf_counter()
        self._done = 0
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
        self._done += steps
        if self._bar is not None:
            self._bar.advance(self._task, steps)

    def finish(self) -> None:
        """End the stage."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._steps:
            done, total = (size(n) if self._unit == "B" else str(n) for n in (self._done, self._steps))
            amount = f"{done} of {total}" if self._done < self._steps else total
            unit = "" if self._unit == "B" else f" {self._unit}"
            self._console.print(f"{self._stage}: {amount}{unit} in {time.perf_counter() - self._started:.1f} s")
            self._steps = 0


class _PartBar:
    """Progress of one part; what became of it is a line that stays."""

    def __init__(self, name: str, console: Console, bars: Progress | None) -> None:
        self._name = name
        self._console = console
        self._bars = bars
        self._task: Any = None
        self._started: float | None = None

    def start(self, stage: str, total: int, unit: str = "steps") -> None:
        """Begin a stage; one without steps is the last."""
        self.finish()
        now = time.perf_counter()
        self._started = now if self._started is None else self._started
        if not total:
            self._console.print(f"{self._name}: {stage} after {now - self._started:.0f} s", markup=False)
        elif self._bars is None:
            self._console.print(f"{self._name}: {stage}, {total} {unit}", markup=False)
        else:
            self._task = self._bars.add_task(f"{self._name} · {stage}", total=total)

    def advance(self, steps: int = 1) -> None:
        """Report steps done."""
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, steps)

    def finish(self) -> None:
        """End the stage."""
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None


def folder_size(folder: Path) -> str:
    """Return the bytes of the files of a finished folder in words, or that it cannot be read any more: that is not its end."""
    try:
        return size(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()))
    except OSError as error:
        return f"its size is not known: {error.strerror or error}"


def size(count: float | None) -> str:
    """Return a number of bytes in words."""
    if count is None:
        return "known at run time"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
