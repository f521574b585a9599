"""Images and sounds in chat turns: read with their rows, and where they are among the text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

from plait.errors import TaskError
from plait.tasks import images, sounds
from plait.tasks.inputs import PLACE, FileColumn, FileKind, Inputs, Row

_ENDINGS: Mapping[FileKind, tuple[str, ...]] = {"image": images.ENDINGS, "audio": sounds.ENDINGS}
_READERS: Mapping[FileKind, Callable[[Row, FileColumn, str], bytes | TaskError]] = {
    "image": images.image_bytes,
    "audio": sounds.sound_bytes,
}
_DECODERS: Mapping[FileKind, tuple[str, ...]] = {"image": ("pillow",), "audio": ("soundfile", "scipy")}
_MARK = re.compile(f"{PLACE}([0-9]+){PLACE}")


def column_of(name: str, kind: FileKind) -> FileColumn:
    """Return a column of images or sounds."""
    return FileColumn(name, kind, _ENDINGS[kind])


def decoders(kind: FileKind) -> dict[str, str]:
    """Return the packages that decode images or sounds, with their versions: what answers depend on."""
    return {name: version(name) for name in _DECODERS[kind]}


def files_of(row: Row, column: FileColumn, where: str) -> tuple[bytes, ...] | TaskError:
    """Return the encoded files of a row, one or those of a list, which can be decoded; or why there are none.

    Raises:
        MissingPackageError: the package that decodes them is not installed.
    """
    value = row.get(column.name)
    given = list(value) if isinstance(value, (list, tuple)) else [value]
    if not given:
        return TaskError(f"{where}: {column.kind}: column {column.name!r} lists no file.")
    found: list[bytes] = []
    for one in given:
        data = _READERS[column.kind]({**row, column.name: one}, column, where)
        if isinstance(data, TaskError):
            return data
        found.append(data)
    return tuple(found)


def marked(row: Row, column: FileColumn, files: tuple[bytes, ...] | TaskError) -> Row:
    """Return a row for templates, with a mark in place of every file."""
    if isinstance(files, TaskError):
        return row
    marks = [f"{PLACE}{i}{PLACE}" for i in range(len(files))]
    return {**row, column.name: marks if isinstance(row[column.name], (list, tuple)) else marks[0]}


def placed(roles: Sequence[str], texts: Sequence[str], column: FileColumn, files: tuple[bytes, ...]) -> Inputs | TaskError:
    """Return chat turns with their files, in the order in which they are read.

    Args:
        roles: of the turns.
        texts: of the turns, with marks where templates name files; where none does, all come before the first user's text.
        column: of the files.
        files: of the row.
    """
    marks = [f"{PLACE}{i}{PLACE}" for i in range(len(files))]
    texts = [text.replace(str(marks), "".join(marks)) for text in texts]  # a list that a template writes as one
    named = [int(number) for text in texts for number in _MARK.findall(text)]
    if sum(text.count(PLACE) for text in texts) != 2 * len(named):
        return TaskError(f"the text holds U+FFFC, the place of {column.kind} files in chats; take it out of the row.")
    if not named:
        first = roles.index("user")
        texts[first] = "".join(marks) + texts[first]
        named = [*range(len(files))]
    if sorted(named) != [*range(len(files))]:
        return TaskError(
            f"the row has {len(files)} {column.kind} files, and the templates name {len(named)}: each must be named once, or "
            f"none; {{{{ {column.name}[0] }}}} is the first of a list."
        )
    turns = tuple((role, _MARK.sub(PLACE, text)) for role, text in zip(roles, texts, strict=True))
    return {"messages": turns, column.kind: tuple(files[i] for i in named)}
