"""A finished folder and its lock: whether every file is as it was written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

from plait.errors import AdapterError
from plait.folders import OutsideError, entries, file_in, open_in
from plait.parsing import read_object
from plait.records import Record
from plait.results.lock import LOCK, RUN_RECORD, SUMMARY, Lock, read_lock

FileState = Literal["equal", "changed", "missing", "extra", "outside", "damaged"]
_NOT_LOCKED = (LOCK, RUN_RECORD, SUMMARY)
_LEFT_BY_THE_HUB = (".gitattributes", ".cache", ".git")


class FileCheck(Record):
    """One file of a result.

    Attributes:
        name: its path in the folder.
        state: against the lock; `outside` for a link that leads out of the folder and for what is not a file: nothing of it
            is read; `damaged` for a record that cannot be read.
    """

    name: str
    state: FileState


def check_files(folder: Path, lock: Lock) -> tuple[FileCheck, ...]:
    """Compare every file with the lock; what the Hub's tools leave next to them is not part of it.

    Run record and summary hold times and notes, so that no lock has their hashes: they are among the files found where they
    cannot be read.
    """
    names = {n for n in entries(folder) if n not in _NOT_LOCKED and n.split("/")[0] not in _LEFT_BY_THE_HUB}
    states = {name: _state(folder, name, lock.outputs.get(name)) for name in sorted(names | {*lock.outputs})}
    records = {name: _record_state(folder, name) for name in (RUN_RECORD, SUMMARY) if os.path.lexists(folder / name)}
    states |= {name: state for name, state in records.items() if state != "equal"}
    return tuple(FileCheck(name=name, state=state) for name, state in states.items())


def is_complete(folder: Path) -> bool:
    """Return whether everything that its lock names is in a folder as it was written, whatever is next to it."""
    try:
        return all(file.state in ("equal", "extra") for file in check_files(folder, read_lock(folder)))
    except AdapterError:
        return False


def _state(folder: Path, name: str, digest: str | None) -> FileState:
    if digest is None:
        return "extra"
    if not os.path.lexists(folder / name):
        return "missing"
    try:
        with open_in(folder, name) as file:
            return "equal" if hashlib.file_digest(file, "sha256").hexdigest() == digest else "changed"
    except (OutsideError, FileNotFoundError):
        return "outside"
    except OSError as error:
        raise AdapterError(f"{folder / name}: cannot be read ({error.strerror or error}).") from None


def _record_state(folder: Path, name: str) -> FileState:
    try:
        read_object(file_in(folder, name), AdapterError)
    except AdapterError:
        return "damaged"
    except OSError:
        return "outside"
    return "equal"
