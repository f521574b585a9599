"""A result as it may be published: its files, and its records without the folders of this machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plait.errors import OutputError
from plait.folders import open_in
from plait.parsing import open_bytes
from plait.recipes.documents import read_document
from plait.recipes.writing import to_yaml
from plait.results.digests import sha256
from plait.results.lock import CARD, LEARNED_RECIPE, LOCK, Lock
from plait.results.public import public_file, public_metadata, public_text, public_values
from plait.results.records import write_json
from plait.results.staging import scratch
from plait.tensorfiles.reader import SafetensorsFile

_LARGEST = 64 << 20  # bytes of a JSON file that is looked through
_PART = 16 << 20  # bytes that are copied at a time
_TENSORS = ".safetensors"


@contextmanager
def public_copy(folder: Path, lock: Lock) -> Iterator[Path]:
    """Offer a folder with exactly the files of a result, in which nothing names a local folder.

    An input on this machine keeps its own name and its sha256. Its path leads nowhere from where the result is
    published; `plait verify --input NAME=PATH` names its place for those who have it. The lock has the hashes of the files
    as they are published. Weights are not copied, links lead to them,
    unless the texts of a file's header name a folder.

    Args:
        folder: the result.
        lock: of it.

    Raises:
        OutputError: a file leads out of the folder, or cannot be read.
    """
    hidden = _folders(folder, lock)
    with scratch("push") as place:
        place = place / folder.resolve().name
        place.mkdir()
        outputs = dict(lock.outputs)
        for name in sorted(lock.files - {LOCK}):
            if os.path.lexists(folder / name):
                digest = _publish(folder, place, name, hidden)
                if digest is not None and name in outputs:
                    outputs[name] = digest
        write_json(place / LOCK, lock.model_copy(update={"outputs": outputs}))
        (place / LOCK).write_bytes(public_file(LOCK, (place / LOCK).read_bytes(), hidden))
        yield place


def public_digest(path: Path) -> str:
    """Return the sha256 that a file of a result has where it is published."""
    if path.name.endswith(_TENSORS):
        start = _public_start(path)
        return sha256(path) if start is None else _write_tensors(path, start, Path(os.devnull))
    return hashlib.sha256(public_file(path.name, path.read_bytes())).hexdigest()


def _publish(folder: Path, place: Path, name: str, hidden: list[str]) -> str | None:
    """Put one file into the public folder; return its sha256 where it is another than here."""
    target = place / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open_in(folder, name) as file:
            if not name.endswith((".json", ".md", LEARNED_RECIPE)) or os.fstat(file.fileno()).st_size > _LARGEST:
                opened = Path(f"/proc/self/fd/{file.fileno()}")  # the real place of the file
                real = opened.readlink() if opened.exists() else (folder / name).resolve()
                start = _public_start(real) if name.endswith(_TENSORS) else None
                if start is not None:
                    return _write_tensors(real, start, target)
                target.symlink_to(real)
                return None
            data = file.read()
        if name == LEARNED_RECIPE:
            found = read_document(data.decode("utf-8"), name).data
            if not isinstance(found, dict):
                raise ValueError(f"{name} is not a recipe")
            public = to_yaml(public_values(found, hidden)).encode("utf-8")
        elif name == CARD:
            text = public_text(data.decode("utf-8", "surrogateescape"), hidden)
            public = text.encode("utf-8", "surrogateescape")
        else:
            public = public_file(name, data, hidden)
    except OSError as error:
        raise OutputError(f"cannot push {folder}: {name} cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise OutputError(f"cannot push {folder}: {error}. Make the result again.") from None
    target.write_bytes(public)
    return None if public == data else hashlib.sha256(public).hexdigest()


def _public_start(path: Path) -> bytes | None:
    """Return what a tensor file begins with where it is published, up to the first tensor; None where nothing changes.

    Raises:
        ValueError: it is not such a file.
    """
    texts = SafetensorsFile(path).metadata
    changed = public_metadata(texts)
    if changed == texts:
        return None
    with open_bytes(path) as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    text = json.dumps({**header, "__metadata__": changed}, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensors(path: Path, start: bytes, target: Path) -> str:
    """Write a tensor file with another beginning; return its sha256."""
    digest = hashlib.sha256(start)
    with open_bytes(path) as source, target.open("wb") as written:
        written.write(start)
        source.seek(8 + int.from_bytes(source.read(8), "little"))
        while part := source.read(_PART):
            digest.update(part)
            written.write(part)
    return digest.hexdigest()


def _folders(folder: Path, lock: Lock) -> list[str]:
    """Return the folders that are not to be named, the longest first: home, the result's own, and those of inputs here."""
    sources = [*lock.inputs.values(), *([lock.base] if lock.base is not None else [])]
    places = [folder, *(folder / source.path for source in sources if not source.repo)]
    home = os.path.expanduser("~")  # noqa: PTH111 (as text)
    found = {home, *map(os.path.realpath, places), *(os.path.abspath(p) for p in places)}  # noqa: PTH100 (both spellings)
    return sorted((p for p in found if len(Path(p).parts) > 2 or (p == home and len(Path(p).parts) > 1)), key=len, reverse=True)
