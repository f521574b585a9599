"""The folder in which a model is baked: locked by one process, and found again by the next run after a kill.

`.NAME.baking/` is next to the output (`.plait-baking/` in it, where it cannot be replaced as a whole). It holds the lock,
the journal of finished shards with their sha256, and `model/`, which is renamed to the output when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plait.errors import OutputError
from plait.folders import entries as names_in
from plait.folders import file_in, file_name_problem
from plait.notices import announce
from plait.parsing import parse_json, read_text
from plait.results.digests import sha256
from plait.results.locking import locked
from plait.results.staging import baking_folder, output_problem, publish, recover

_LOCK, _JOURNAL, _MODEL = "lock", "journal.jsonl", "model"


class BakeJournal:
    """The folder, while this process holds it.

    Attributes:
        model: what will be the output.
        finished: shard → (size, sha256) of those that earlier runs, or this one, have finished.
    """

    def __init__(self, folder: Path, final: Path) -> None:
        self._folder, self._final = folder, final
        self.model = folder / _MODEL
        self.finished: dict[str, tuple[int, str]] = {}

    @property
    def folder(self) -> Path:
        """Its path."""
        return self._folder

    def begin(self, digest: str) -> None:
        """Take up what an earlier run with the same digest has finished; throw away what one with another has.

        Args:
            digest: of everything that the bytes depend on.
        """
        entries = _read(self._folder / _JOURNAL)
        if not entries or entries[0].get("digest") != digest:
            _remove(self.model)
            _remove(self._folder / _JOURNAL)
            self._note({"digest": digest})
            entries = []
        self.model.mkdir(exist_ok=True)
        for entry in entries[1:]:
            shard, size, sha256 = (entry.get(key) for key in ("shard", "size", "sha256"))
            if (
                not isinstance(shard, str)
                or file_name_problem(shard)
                or not isinstance(sha256, str)
                or not isinstance(size, int)
            ):
                continue  # a journal from elsewhere
            if self._size_of(shard) == size:
                self.finished[shard] = (size, sha256)
            else:
                announce(f"{self.model / shard} is made again: it has changed since an earlier run finished it.")
        folders = {shard.partition("/")[0] for shard in self.finished}
        for path in self.model.iterdir():
            if path.name not in folders or path.is_symlink():
                _remove(path)
        for name in list(names_in(self.model)):
            if name not in self.finished:
                _remove(self.model / name)

    def _size_of(self, shard: str) -> int | None:
        """Return the size of a file of the model; None where there is none of its own, such as a link."""
        try:
            real = file_in(self.model, shard)
        except OSError:
            return None
        return real.stat().st_size if real == Path(os.path.realpath(self.model), shard) else None

    def holds(self, shard: str) -> bool:
        """Return whether a shard that an earlier run has finished is as it was; any other is forgotten, which is announced."""
        if sha256(self.model / shard) == self.finished[shard][1]:
            return True
        announce(f"{shard} is made again: what an earlier run finished has been changed since.")
        del self.finished[shard]
        return False

    def finish(self, shard: str, size: int, sha256: str) -> None:
        """Note a finished shard; it must be on disk already."""
        self._note({"shard": shard, "size": size, "sha256": sha256})
        self.finished[shard] = (size, sha256)

    def publish(self, *, force: bool) -> None:
        """Rename the model to its final name and remove everything else.

        Raises:
            OutputError: another process has written there in the meantime; the finished model stays where it is.
        """
        try:
            publish(self.model, self._final, force=force)
        except OutputError as error:
            error.add_note(f"The finished model is {self.model}. Move it to another place, and delete {self._folder}.")
            raise
        shutil.rmtree(self._folder, ignore_errors=True)

    def _note(self, entry: dict[str, Any]) -> None:
        with (self._folder / _JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def open_journal(final: Path, *, force: bool) -> Iterator[BakeJournal]:
    """Open the folder next to an output and hold its lock; it is kept where another run can continue with it.

    Args:
        final: the output.
        force: replace a model there.

    Raises:
        OutputError: the output must not be written, or another process is baking it.
    """
    final = Path(os.path.abspath(final))  # noqa: PTH100 (resolve() would follow links)
    problem = output_problem(final, force=force)
    folder = baking_folder(final)
    if problem or folder.is_symlink():
        raise OutputError(problem or f"{folder} is a link, and models are baked there. Delete it, or choose another output.")
    with locked(folder / _LOCK, "this model is being baked", out=final):
        journal = BakeJournal(folder, final)
        recover(final, force=force)
        try:
            yield journal
        finally:
            if not journal.finished:
                shutil.rmtree(folder, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove what may be there; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read(path: Path) -> list[dict[str, Any]]:
    """Read the journal; a kill may have cut its last line off, and nothing after a line that is not an entry counts."""
    entries: list[dict[str, Any]] = []
    why = "it ends within a line"
    try:
        for line in read_text(path, OutputError).splitlines() if path.is_file() else ():
            entry = parse_json(line, str(path), OutputError)
            if not _is_entry(entry, first=not entries):
                break
            entries.append(entry)
        else:
            return entries
    except OutputError as error:
        why = str(error)
    announce(f"{path} is used up to its entry {len(entries)}; what was finished after it is made again: {why.rstrip('.')}.")
    return entries


def _is_entry(entry: Any, *, first: bool) -> bool:
    if not isinstance(entry, dict):
        return False
    if first:
        return isinstance(entry.get("digest"), str)
    shard = entry.get("shard")
    plain = isinstance(shard, str) and file_name_problem(shard) is None
    return plain and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
