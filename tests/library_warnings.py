"""Sees what libraries warn of, or log, when plait itself uses something that is deprecated, whatever is filtered or quiet.

What one library says of another's use is no affair of plait's: the use is plait's where plait's own code calls the package that
complains.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

_SOURCE = str(Path(__file__).parents[1] / "src" / "plait")
_STANDARD = {"contextlib", "functools", "importlib", "logging", "warnings", "abc", "typing", "dataclasses"}
_CATEGORIES = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
_WORDS = re.compile(r"deprecat|will be removed|no longer supported|use `?\w+`? instead", re.IGNORECASE)

found: list[str] = []


def watch() -> None:
    """Begin: everything after is seen, and written into `found`."""
    warnings.warn = _watched_warn(warnings.warn)  # type: ignore[assignment]
    logging.Logger.warning = _watched_log(logging.Logger.warning)  # type: ignore[method-assign]


def _watched_warn(warn: Callable[..., None]) -> Callable[..., None]:
    def watched(message: Any, category: Any = None, stacklevel: int = 1, source: Any = None, **more: Any) -> None:
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        if issubclass(kind, _CATEGORIES):
            _note(f"{kind.__name__}: {message}", sys._getframe(1))
        warn(message, category, stacklevel + 1, source, **more)

    return watched


def _watched_log(log: Callable[..., None]) -> Callable[..., None]:
    def watched(self: logging.Logger, message: Any, *arguments: Any, **more: Any) -> None:
        if _WORDS.search(str(message)):
            _note(f"{self.name}: {message}", sys._getframe(1))
        log(self, message, *arguments, **{**more, "stacklevel": more.get("stacklevel", 1) + 1})

    return watched


def _note(text: str, frame: FrameType | None) -> None:
    """Write it down where plait has called the package that says it, directly."""
    says = _package(frame)
    while frame is not None and _package(frame) in (says, *_STANDARD):
        frame = frame.f_back
    if says != "plait" and frame is not None and _package(frame) == "plait":
        found.append(f"{frame.f_code.co_filename}:{frame.f_lineno}: {text}")


def _package(frame: FrameType | None) -> str:
    if frame is None:
        return ""
    if frame.f_code.co_filename.startswith(_SOURCE):
        return "plait"
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
