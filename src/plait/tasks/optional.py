"""Packages that only some tasks need, and what to install when one is missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from plait.errors import TaskError


def optional(module: str, extra: str, why: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: dotted name.
        extra: of plait, that installs it.
        why: what needs it, such as `metric 'wer'`.

    Raises:
        TaskError: it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise TaskError(f"{why} needs the package {error.name!r}: python -m pip install 'plait[{extra}]'") from None
