"""A result as it may be published: its files, and what tells of its making without the folders of this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plait.errors import AdapterError
from plait.merging.record import LOCK, RECORD, SUMMARY, Lock, write_json
from plait.parsing import read_json
from plait.verification.lock import CARD

_LOCAL = ("/", "~", "./", "../")


@contextmanager
def public_copy(folder: Path, lock: Lock) -> Iterator[Path]:
    """Offer a folder of links to exactly the files of a result, with a lock and a run record that name no local folder.

    An input on this machine keeps its own name and its sha256 there. Its path leads nowhere from where the result is
    published; `plait verify --input NAME=PATH` says where it lies for someone who has it.

    Args:
        folder: the result.
        lock: of it.
    """
    with tempfile.TemporaryDirectory(prefix="plait-push-") as scratch:
        place = Path(scratch) / folder.resolve().name
        place.mkdir()
        for name in sorted({*lock.outputs, CARD, SUMMARY}):
            if (folder / name).is_file():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).symlink_to((folder / name).resolve())
        for name in (LOCK, RECORD):
            if (folder / name).is_file():
                write_json(place / name, without_folders(read_json(folder / name, AdapterError)))
        yield place


def without_folders(value: Any) -> Any:
    """Return plain values in which every local path is its last part alone."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith(_LOCAL) else value
