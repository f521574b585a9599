"""Files and Hub data sets → rows: column → value.

Formats are known by the file's ending. Parquet files and the Hub need the extra `data`.
"""

from __future__ import annotations

import csv
import io
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from plait.errors import TaskError, did_you_mean, join_words
from plait.extras import optional, require
from plait.folders import expanded
from plait.parsing import MAX_TEXT_BYTES, MOST_LEVELS, check_levels, open_bytes, parse_json, read_lines, read_text
from plait.recipes.evaluation import SplitName
from plait.tasks.inputs import Row
from plait.tasks.row_files import folder_rows
from plait.tasks.schema import RowTask, Split
from plait.tasks.workers import EndedError, Worker

_MOST_BYTES = 4 << 30  # of the rows of a file, all of which are held in memory
_ROW_BYTES = 100  # of a row in memory, whatever is in it
_DOCUMENT_BYTES = 512 << 20  # of a file that is one JSON document; its values take several times as much in memory
_DECODING_BYTES = 1 << 30  # of address space that a part of a packed file is decoded in
# of a packed file: bytes that any may have, and how many there may be to one of the file
_SMALL_BYTES, _MOST_UNPACKED = 256 << 20, 100


def read_rows(task: RowTask, name: SplitName) -> list[Row]:
    """Return the rows of one split, in their order.

    Raises:
        TaskError: the task has no such split, or its data cannot be read.
    """
    split = task.splits.get(name)
    if task.data is None:
        raise TaskError(
            f"task {task.name!r} has no data, only a prompt: it can be calibrated, tuned and merged with, but there is no "
            f"split {name!r} to read. Add 'data', 'splits' and 'target' to its file."
        )
    if split is None:
        raise TaskError(f"task {task.name!r} has no split {name!r}; it has {', '.join(task.splits)}.")
    if task.data.hub is not None:
        where, source = f"task {task.name!r}", split.source or name
        rows = read_hub(task.data.hub, source, config=task.data.config, revision=task.data.revision, where=where)
    else:
        rows = _local_rows(task, Path(str(task.data.path)), split, name)
    if split.rows is not None:
        first, end = split.rows
        if end > len(rows):
            raise TaskError(f"task {task.name!r}: split {name!r} takes rows {first} to {end}, but there are {len(rows)}.")
        rows = rows[first:end]
    if not rows:
        raise TaskError(f"task {task.name!r}: split {name!r} is empty.")
    return rows


def _local_rows(task: RowTask, place: Path, split: Split, name: SplitName) -> list[Row]:
    column = task.file_column
    if column is not None and split.source is not None and (place / split.source).is_dir():
        return folder_rows(place / split.source, column)
    return rows_of_file(task, _file(task, place, split, name))


def rows_of_file(task: RowTask, file: Path, *, besides: Sequence[str] = ()) -> list[Row]:
    """Return the rows of one file; their paths of images or sounds begin at its folder. Arguments and errors as `read_file`."""
    rows, column = read_file(file, besides=besides), task.file_column
    return rows if column is None else [_beside(row, column.name, file.parent) for row in rows]


def _beside(row: Row, column: str, folder: Path) -> Row:
    """Return a row whose paths of files start at the folder of the rows."""
    value = row.get(column)
    if isinstance(value, (list, tuple)):
        return {**row, column: [_beside({column: one}, column, folder)[column] for one in value]}
    return {**row, column: str(folder / expanded(value))} if isinstance(value, str) and value else row


def _file(task: RowTask, place: Path, split: Split, name: SplitName) -> Path:
    if place.is_file():
        if split.source is not None:
            raise TaskError(f"task {task.name!r}: {place} is a file; splits of it are given by 'rows', not by a source.")
        return place
    if split.source is None:
        raise TaskError(f"task {task.name!r}: split {name!r} names no file of {place}.")
    file = place / split.source
    if not file.is_file():
        there = sorted(p.name for p in place.iterdir()) if place.is_dir() else []
        raise TaskError(f"task {task.name!r}: {file}: there is no such file.{did_you_mean(file.name, there)}")
    return file


def read_file(file: Path, *, besides: Sequence[str] = ()) -> list[Row]:
    """Return the rows of one file.

    Args:
        file: its ending says how it is read.
        besides: endings that the caller reads itself, for the message.

    Raises:
        TaskError: its ending is not known, or it cannot be read.
    """
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise TaskError(f"{file}: {file.suffix or 'no ending'!r} is not read; allowed: {', '.join((*_READERS, *besides))}.")
    try:
        return reader(file)
    except UnicodeDecodeError as error:
        raise TaskError(f"{file}: this is not text in UTF-8 (byte {error.start}).") from None
    except OSError as error:
        raise TaskError(f"{file}: {error.strerror or error}.") from None


def _jsonl(file: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            rows.append(_mapping(_parsed(line, file, number), f"{file}:{number}"))
    return rows


def _json(file: Path) -> list[Row]:
    advice = "One row per line (.jsonl) may have more."
    data = _parsed(read_text(file, TaskError, most=_DOCUMENT_BYTES, advice=advice), file)
    if not isinstance(data, list):
        raise TaskError(f"{file}: it must be a list of rows; one row per line is .jsonl.")
    return [_mapping(row, f"{file}: row {i}") for i, row in enumerate(data)]


def _csv(file: Path) -> list[Row]:
    before = csv.field_size_limit(MAX_TEXT_BYTES)  # a cell may be a long document
    rows: list[Row] = []
    reader = csv.DictReader(part for line in _lines(file) for part in io.StringIO(line, newline=""))
    try:
        if twice := [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]:
            raise TaskError(f"{file}:1: two columns are called {join_words(list(map(repr, twice)))}. Rename one of them.")
        for row in reader:
            if None in row or None in row.values():
                raise TaskError(f"{file}:{reader.line_num}: this row has other columns than the first line.")
            rows.append(row)
    except csv.Error as error:
        raise TaskError(f"{file}:{reader.line_num}: this cannot be read as CSV: {error}.") from None
    finally:
        csv.field_size_limit(before)
    return rows


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines of a file with their ends, as long as what is made of them can be held in memory."""
    size = 0
    for line in read_lines(file, TaskError):
        size += len(line) + _ROW_BYTES
        if size > _MOST_BYTES:
            raise TaskError(f"{file}: its rows have more than {_MOST_BYTES >> 30} GB, the limit for such a file.")
        yield line


def _parquet(file: Path) -> list[Row]:
    """Have a process of its own decode the file, since a small one may hold one value a billion times."""
    require(f"{file}: reading parquet", {"data": ["pyarrow"]})
    with open_bytes(file) as opened:
        most = min(_MOST_BYTES, max(_SMALL_BYTES, _MOST_UNPACKED * os.fstat(opened.fileno()).st_size))
    rows: list[Row] = []
    size = 0
    try:
        worker = Worker("parquet_worker.py", "reads parquet", _why)
        with closing(worker), closing(worker.request((str(file), _DECODING_BYTES))) as answers:
            for kind, body in answers:
                if kind == b"e":
                    raise TaskError(f"{file}: this cannot be read as parquet: {body.decode()}.")
                found = pickle.loads(body) if kind == b"r" else []
                size += len(body) + len(found) * _ROW_BYTES
                if size > most:
                    raise TaskError(f"{file}: its rows have more than {most >> 20} MB, the limit for a file of its size.")
                check_levels(found)
                rows += found
    except EndedError as ended:
        raise TaskError(f"{file}: this cannot be read as parquet: {ended}.") from None
    except RecursionError:
        raise TaskError(f"{file}: nested too deeply, more than {MOST_LEVELS} levels.") from None
    return rows


def _why(code: int) -> str | None:
    """Return why the process that reads parquet ended, of its exit code."""
    if code >= 0:
        return None
    return f"Arrow's code failed, or needed more than {_DECODING_BYTES >> 20} MB of memory (signal {-code})"


def read_hub(repo: str, split: str, *, config: str | None = None, revision: str | None = None, where: str) -> list[Row]:
    """Return the rows of one split of a data set on the Hub, or of a folder that `datasets` reads.

    Args:
        repo: `org/name`.
        split: as the data set calls it.
        config: of the data set.
        revision: commit, tag or branch.
        where: what asks, for messages.

    Raises:
        TaskError: it cannot be read.
    """
    datasets = optional("datasets", "data", f"{where}: data from the Hub")
    try:
        found = datasets.load_dataset(repo, config, split=split, revision=revision)
    except Exception as error:  # datasets and its transport raise many classes
        words = " ".join(str(error).split())
        raise TaskError(f"{where}: the data set {repo!r} (split {split!r}) cannot be read: {words}") from error
    for column, feature in (found.features or {}).items():
        if type(feature).__name__ in ("Audio", "Image"):  # as stored: a broken file is an error of its row alone
            found = found.cast_column(column, type(feature)(decode=False))
    return list(found)


def _parsed(text: str, file: Path, line: int | None = None) -> Any:
    return parse_json(text, str(file), TaskError, at=line, constants=True, nul=True)


def _mapping(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise TaskError(f"{place}: a row is a mapping (column: value), not {type(row).__name__}.")
    return row


_READERS: Mapping[str, Callable[[Path], list[Row]]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
