"""Files and Hub data sets → rows: column → value.

Formats are known by the file's ending. Parquet files and the Hub need the extra `data`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.errors import TaskError, did_you_mean
from plait.extras import optional
from plait.parsing import open_bytes, parse_json, read_text
from plait.recipes.evaluation import SplitName
from plait.tasks.inputs import Row
from plait.tasks.schema import RowTask, Split

_MOST_BYTES = 4 << 30  # of a file with rows, which is read completely
_ROW_BYTES = 100  # of a row in memory, whatever is in it
_MOST_CHARACTERS = (1 << 31) - 1  # of one cell: what csv can count to on every system


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
        rows = read_file(_file(task, Path(str(task.data.path)), split, name))
    if split.rows is not None:
        first, end = split.rows
        if end > len(rows):
            raise TaskError(f"task {task.name!r}: split {name!r} takes rows {first} to {end}, but there are {len(rows)}.")
        rows = rows[first:end]
    if not rows:
        raise TaskError(f"task {task.name!r}: split {name!r} is empty.")
    return rows


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
    for number, line in enumerate(read_text(file, TaskError, most=_MOST_BYTES).split("\n"), 1):
        if line.strip():
            rows.append(_mapping(_parsed(line, file, number), f"{file}:{number}"))
    return rows


def _json(file: Path) -> list[Row]:
    data = _parsed(read_text(file, TaskError, most=_MOST_BYTES), file)
    if not isinstance(data, list):
        raise TaskError(f"{file}: it must be a list of rows; one row per line is .jsonl.")
    return [_mapping(row, f"{file}: row {i}") for i, row in enumerate(data)]


def _csv(file: Path) -> list[Row]:
    csv.field_size_limit(_MOST_CHARACTERS)  # a cell may be a long document
    reader = csv.DictReader(io.StringIO(read_text(file, TaskError, most=_MOST_BYTES), newline=""))
    rows: list[Row] = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise TaskError(f"{file}:{reader.line_num}: this row has other columns than the first line.")
            rows.append(row)
    except csv.Error as error:
        raise TaskError(f"{file}:{reader.line_num}: this cannot be read as CSV: {error}.") from None
    return rows


def _parquet(file: Path) -> list[Row]:
    parquet = optional("pyarrow.parquet", "data", f"{file}: reading parquet")
    rows: list[Row] = []
    size = 0
    try:
        with open_bytes(file) as stream:
            for batch in parquet.ParquetFile(stream).iter_batches():  # a small file may hold one value a billion times
                size += batch.nbytes + batch.num_rows * _ROW_BYTES
                if size > _MOST_BYTES:
                    raise TaskError(f"{file}: its rows have more than {_MOST_BYTES >> 30} GB, the limit for such a file.")
                rows += batch.to_pylist()
    except TaskError:
        raise
    except (ValueError, MemoryError) as error:  # pyarrow's own classes are kinds of them
        raise TaskError(f"{file}: this cannot be read as parquet: {error}") from None
    return rows


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
    return list(found)


def _parsed(text: str, file: Path, line: int | None = None) -> Any:
    return parse_json(text, str(file), TaskError, at=line, constants=True, nul=True)


def _mapping(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise TaskError(f"{place}: a row is a mapping (column: value), not {type(row).__name__}.")
    return row


_READERS: Mapping[str, Callable[[Path], list[Row]]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
