"""What plait does otherwise than its user may expect is announced once, with the reason."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_OWN = str(Path(__file__).parent) + os.sep
_BETWEEN = (contextlib.__file__, functools.__file__)  # a cached property calls its function through functools
_announced: set[str] = set()
_completed: ContextVar[tuple[list[Path], ...]] = ContextVar("_completed", default=())


class PlaitWarning(UserWarning):
    """Plait does something that its user may not expect (a slower path, a copy, a guess); the message says why."""


def announce(text: str, *, once: str | None = None) -> None:
    """Warn of something, once in a process; the command line prints it as a note.

    The warning points at the line outside plait that called it.

    Args:
        text: what is done otherwise, and why.
        once: what it is about: nothing more is announced about the same; the text itself when None.
    """
    about = once or text
    if about in _announced:
        return
    _announced.add(about)
    warnings.warn(text, PlaitWarning, stacklevel=frames_within())


def forget_announcements() -> None:
    """Forget what has been announced, so that it is announced again."""
    _announced.clear()


@contextmanager
def noting_completed() -> Iterator[list[Path]]:
    """Collect the outputs that get their final names in the block: what is there when it is stopped after that."""
    found: list[Path] = []
    token = _completed.set((*_completed.get(), found))
    try:
        yield found
    finally:
        _completed.reset(token)


def note_completed(out: Path) -> None:
    """Tell whoever collects them that an output is complete under its final name."""
    for found in _completed.get():
        found.append(out)


def frames_within() -> int:
    """Return the stack level of the nearest caller outside plait, as the function that asks gives it to `warnings.warn`."""
    frame = inspect.currentframe()
    frame = None if frame is None else frame.f_back
    level = 1
    while frame is not None and frame.f_back is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_OWN) and file not in _BETWEEN:
            break
        frame, level = frame.f_back, level + 1
    return level
