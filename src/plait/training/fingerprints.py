"""Hashes of a base model, taken once in a process: all phases of a cohort have the same one, and it may be large."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from plait.checkpoints.digests import weight_digests
from plait.evaluation.scores import model_digest

_Stamps: TypeAlias = tuple[tuple[str, int, int, int], ...]


def base_digest(folder: Path) -> str:
    """Return a hash of a model's weights, configuration and tokenizer."""
    return _base_digest(folder, _stamps(folder))


def base_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of a model's weights: file → hex digest."""
    return dict(_base_files(folder, _stamps(folder)))


def _stamps(folder: Path) -> _Stamps:
    """Return name, inode, size and time of every file: where they are as before, the contents are."""
    found = [(p.name, p.stat()) for p in sorted(folder.iterdir()) if p.is_file()]
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found)


@lru_cache(maxsize=4)
def _base_digest(folder: Path, stamps: _Stamps) -> str:
    return model_digest(folder)


@lru_cache(maxsize=4)
def _base_files(folder: Path, stamps: _Stamps) -> dict[str, str]:
    return weight_digests(folder)
