"""Answers, kept by the hash of everything that they depend on: what is finished is never asked again.

The key holds what is put on the base (tensor files, or a complete recipe), the base with its tokenizer, the examples with
everything of the task that matters, the version of the code that asks, the libraries that compute, dtype, device and batch
size.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from plait.adapters import Adapter
from plait.errors import TaskError
from plait.notices import announce
from plait.parsing import read_text
from plait.records import Record
from plait.results.digests import sha256
from plait.results.versions import library_versions
from plait.results.writing import write_json_atomic
from plait.tasks.answers import Answer
from plait.tensorfiles.formats import TENSOR_FORMATS

#: Raised by every change of plait after which a model may answer otherwise; tests/golden holds answers of this version.
ANSWERS_VERSION = 1
_MODEL_FILES = (*(f"*{kind.suffix}" for kind in TENSOR_FORMATS), "*.json", "*.model", "*.txt", "*.jinja", "*.py")


class Answers(Record):
    """What one candidate answered to one task.

    Attributes:
        contender: name of the candidate, for people; the key is that of earlier releases, so that kept answers are still found.
        task: its name, for people.
        answers: in the order of the examples.
        sha256: of them as they are written; None of those that earlier releases kept.
    """

    contender: str
    task: str
    answers: tuple[Answer, ...]
    sha256: str | None = None

    @property
    def content(self) -> str:
        """Hash of the answers."""
        return hashlib.sha256(json.dumps([a.model_dump(mode="json") for a in self.answers]).encode()).hexdigest()


class ScoreCache:
    """A folder of `Answers`, one file per key.

    Args:
        folder: where; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def find(self, key: str, count: int) -> Answers | None:
        """Return what was kept, where it is complete: answers to so many examples."""
        if self._folder is None:
            return None
        file = self._folder / f"{key}.json"
        if not os.path.lexists(file):
            return None
        try:
            found = Answers.model_validate_json(read_text(file, TaskError))
        except TaskError as error:
            reason = str(error).removeprefix(f"{file}: ").rstrip(".")
        except ValueError:
            reason = "it is not a file of answers"
        else:
            if len(found.answers) == count and found.sha256 in (None, found.content):
                return found
            reason = f"{len(found.answers)} for {count} examples" if len(found.answers) != count else "they were changed"
        announce(f"{file} does not hold complete answers ({reason}); the model is asked again.")
        return None

    def keep(self, key: str, answers: Answers) -> None:
        """Write answers down."""
        if self._folder is not None:
            whole = answers.model_copy(update={"sha256": answers.content})
            write_json_atomic(self._folder / f"{key}.json", whole.model_dump(mode="json"))


def digest(*parts: object) -> str:
    """Return a hash of plain values; 32 hex digits."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def model_digest(folder: Path) -> str:
    """Return a hash of a model's weights, configuration, tokenizer and own code."""
    return digest(_hashes(p for pattern in _MODEL_FILES for p in folder.glob(pattern)))


def adapter_digest(adapter: Adapter) -> str:
    """Return a hash of everything that belongs to an adapter: configuration, tensors, heads."""
    others = () if adapter.is_one_file else (p for pattern in ("adapter_*", "heads/*/*") for p in adapter.folder.glob(pattern))
    return digest(_hashes({*adapter.files, *others}))


@cache
def answers_digest() -> str:
    """Return a hash of the versions that decide what is answered: plait's way of asking, and the libraries that compute."""
    return digest(ANSWERS_VERSION, library_versions("transformers"))


def _hashes(files: Iterable[Path]) -> Sequence[tuple[str, str]]:
    return [
        (
            p.name if p.parent.parent.name != "heads" else f"{p.parent.name}/{p.name}",
            file_digest(p),
        )
        for p in sorted(files)
        if p.is_file()
    ]


def file_digest(path: Path) -> str:
    """Return a file's sha256, once per process while it is unchanged: every candidate asks for those of all its inputs."""
    return _hash(path, path.stat().st_size, path.stat().st_mtime_ns)


@cache
def _hash(path: Path, size: int, changed: int) -> str:
    return sha256(path)
