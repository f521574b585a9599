"""A finished folder and its lock: whether every file is as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from plait.errors import AdapterError
from plait.merging.record import LOCK, LOCK_VERSION, RECORD, SUMMARY, Lock, sha256
from plait.parsing import as_record, read_object, shown
from plait.records import Record

CARD = "README.md"
State = Literal["equal", "changed", "missing", "extra"]
_BESIDE = (LOCK, RECORD, SUMMARY)
_LEFT_BY_THE_HUB = (".gitattributes", ".cache", ".git")


class FileCheck(Record):
    """One file of a result.

    Attributes:
        name: its path in the folder.
        state: against the lock.
    """

    name: str
    state: State


def read_lock(folder: Path) -> Lock:
    """Return the lock of a result.

    Raises:
        AdapterError: there is none, or it cannot be read.
    """
    path = folder / LOCK
    if not folder.is_dir():
        raise AdapterError(f"{folder}: there is no such folder. Give the folder of a merge, a bake or an extraction.")
    if not path.is_file():
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise AdapterError(
            f"{folder}: there is no {LOCK}, so this is no whole result of plait. It holds: {held}. Give the folder that "
            "`plait merge`, `bake`, `compress` or `extract` wrote."
        )
    advice = "Make the result again."
    data = read_object(path, AdapterError, advice=advice)
    if data.get("version", LOCK_VERSION) != LOCK_VERSION:
        raise AdapterError(f"{path}: a lock of version {shown(data['version'])}; this plait reads {LOCK_VERSION}. {advice}")
    return as_record(Lock, data, str(path), AdapterError, what="a lock", advice=advice)


def check_files(folder: Path, lock: Lock) -> tuple[FileCheck, ...]:
    """Compare every file with the lock; lock, run record and what the Hub's tools leave beside them are no part of it."""
    here = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    names = {p.as_posix() for p in here if p.as_posix() not in _BESIDE and p.parts[0] not in _LEFT_BY_THE_HUB}
    return tuple(
        FileCheck(name=name, state=_state(folder / name, lock.outputs.get(name))) for name in sorted(names | {*lock.outputs})
    )


def is_whole(folder: Path) -> bool:
    """Return whether a folder holds exactly what its lock says."""
    try:
        return all(file.state == "equal" for file in check_files(folder, read_lock(folder)))
    except AdapterError:
        return False


def _state(path: Path, digest: str | None) -> State:
    if digest is None:
        return "extra"
    if not path.is_file():
        return "missing"
    return "equal" if sha256(path) == digest else "changed"
