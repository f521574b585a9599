"""Packages beyond plait's core: where one is missing, the extra that brings it is named, here and in the same words for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from plait.errors import MissingPackageError


def require(why: str, needed: Mapping[str, Sequence[str]]) -> None:
    """Make sure, before any work is done, that packages can be imported; none of them is.

    Args:
        why: what needs them, such as `plait eval`; the beginning of the message.
        needed: extra of plait → the modules that it brings.

    Raises:
        MissingPackageError: some are not installed; it names all of them.
    """
    absent = {extra: [module for module in modules if not _is_there(module)] for extra, modules in needed.items()}
    absent = {extra: modules for extra, modules in absent.items() if modules}
    if absent:
        raise MissingPackageError(missing_packages(why, absent))


def optional(module: str, extra: str, why: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: dotted name.
        extra: of plait, that installs it.
        why: what needs it, such as `metric 'wer'`.

    Raises:
        MissingPackageError: it is not installed, or a package that it needs itself.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackageError(missing_packages(why, {extra: [str(error.name)]})) from None


def missing_packages(why: str, absent: Mapping[str, Sequence[str]]) -> str:
    """Return a message about packages that are not installed: who needs them, and the command that installs them."""
    names = list(dict.fromkeys(module for modules in absent.values() for module in modules))
    word = "package" if len(names) == 1 else "packages"
    command = f"python -m pip install 'plait[{','.join(absent)}]'"
    return f"{why} needs the {word} {', '.join(map(repr, names))}: {command}"


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a package above it is missing, or was put away
        return False
