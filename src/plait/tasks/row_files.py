"""Files that rows name, or hold: encoded images and sounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from plait.errors import TaskError
from plait.parsing import open_bytes
from plait.tasks.inputs import FileColumn, Row

MOST_BYTES = 64 << 20  # of one encoded file
_MOST_IN_ALL = 4 << 30  # bytes of a split's files, which are kept in memory


def encoded_file(row: Row, column: FileColumn, where: str, problem_of: Callable[[bytes], str]) -> bytes | TaskError:
    """Return the encoded file of a row, which can be decoded; or why there is none.

    Args:
        row: holds a path, bytes, or both as `datasets` keeps them.
        column: in which.
        where: what messages call the task.
        problem_of: returns in words why bytes cannot be decoded; empty where they can.
    """
    value = row.get(column.name)
    if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        data, name = _read(Path(value)), value
    elif isinstance(value, bytes):
        data, name = value, f"of {len(value)} bytes"
    else:
        has = ", ".join(row)
        return TaskError(f"{where}: {column.kind}: column {column.name!r} is neither a path nor bytes; the row has {has}.")
    if isinstance(data, bytes) and len(data) > MOST_BYTES:
        data = _too_large(len(data))
    problem = data if isinstance(data, str) else problem_of(data)
    return TaskError(f"{where}: {column.kind} {name}: {problem}") if problem or isinstance(data, str) else data


def folder_rows(folder: Path, column: FileColumn) -> list[Row]:
    """Return a row per file of a folder that has a folder per class: its path, and the class as `label`.

    Raises:
        TaskError: there are none, or something else lies among them.
    """
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [(c.name, p) for c in classes for p in sorted(c.iterdir()) if not p.name.startswith(".")]
    _check_endings([p for _, p in files], column)
    if not files:
        raise TaskError(f"{folder}: a source that is a folder has one folder per class with its files, and there are none.")
    return [{column.name: str(p), "label": name} for name, p in files]


def folder_files(folder: Path, column: FileColumn) -> list[Row]:
    """Return a row per image or sound of a folder without classes.

    Raises:
        TaskError: there are none, or something else lies among them.
    """
    files = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]
    _check_endings(files, column)
    if not files:
        raise TaskError(f"{folder}: this folder must hold {column.kind} files, and it is empty.")
    return [{column.name: str(p)} for p in files]


def _check_endings(files: Sequence[Path], column: FileColumn) -> None:
    others = [p for p in files if p.suffix.lower() not in column.endings]
    if others:
        raise TaskError(f"{others[0]}: by its name this is not an {column.kind} file; allowed: {', '.join(column.endings)}.")


def check_total(files: Sequence[bytes], where: str) -> None:
    """Make sure that a split's files may be kept in memory.

    Raises:
        TaskError: they are too large together.
    """
    total = sum(map(len, files))
    if total > _MOST_IN_ALL:
        raise TaskError(f"{where}: its files have {total / 1e9:.1f} GB; {_MOST_IN_ALL >> 30} GB are allowed. Take 'rows'.")


def _read(path: Path) -> bytes | str:
    """Return a file's bytes, or in words why not."""
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            return _too_large(size)
        with open_bytes(path) as stream:
            return stream.read()
    except FileNotFoundError:
        return "there is no such file."
    except OSError as error:
        return f"{error.strerror or error}."


def _too_large(size: int) -> str:
    return f"it has {size / 1e6:.0f} MB; at most {MOST_BYTES >> 20} MB are read."
