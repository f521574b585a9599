"""Hashes of a base model, taken once in a process: all phases of a cohort have the same one, and it may be large."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def taken_once(digest: Callable[[Path], T], folder: Path) -> T:
    """Return the digest of a folder; taken again where name, inode, size or time of any file is not as it was."""
    found = [(p.name, p.stat()) for p in sorted(folder.iterdir()) if p.is_file()]
    taken: T = _taken(digest, folder, tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found))
    return taken


@lru_cache(maxsize=8)
def _taken(digest: Callable[[Path], T], folder: Path, stamps: tuple[tuple[str, int, int, int], ...]) -> T:
    return digest(folder)
