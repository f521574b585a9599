"""Files of rows that are small and hold much, or make one wait: refused by name, under limits of memory and time."""

from __future__ import annotations

import csv
import gzip
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest

from plait import parsing
from plait.errors import TaskError
from plait.parsing import read_text
from plait.tasks import rows
from plait.tasks.rows import read_file
from plait.tasks.workers import EndedError, Worker

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def small(monkeypatch):
    """A small file may be unpacked to 1 MB, and a line may have as much."""
    monkeypatch.setattr(rows, "_SMALL_BYTES", 1 << 20)


def one_text(size: int, count: int) -> object:
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(count, dtype=np.int32)), ["x" * size])


def one_list(count: int) -> object:
    return pyarrow.ListArray.from_arrays(
        pyarrow.array([0, count], pyarrow.int32()), pyarrow.array(np.zeros(count, dtype=np.int8))
    )


def nested(levels: int) -> object:
    found = pyarrow.array([1])
    for _ in range(levels):
        found = pyarrow.StructArray.from_arrays([found], ["f"])
    return found


def texts(size: int, count: int) -> object:
    return pyarrow.array(["x" * size] * count)


BOMBS = {
    "one text many times": (one_text(5000, 2000), {}),
    "texts that go on from one another": (texts(5000, 1000), {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}),
    "rows of nothing": (pyarrow.nulls(100_000), {}),
    "a long list": (one_list(2_000_000), {}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_holds_much_is_refused(tmp_path, small, name):
    file, (column, how) = tmp_path / "rows.parquet", BOMBS[name]
    parquet.write_table(pyarrow.table({"text": column}), file, **how)
    assert file.stat().st_size < 100_000
    with pytest.raises(TaskError, match=r"rows\.parquet: its rows have more than 1 MB, the limit for a file of its size"):
        read_file(file)


def test_a_file_whose_rows_do_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_DECODING_BYTES", 400 << 20)
    parquet.write_table(pyarrow.table({"text": one_text(1 << 17, 4096)}), tmp_path / "rows.parquet")
    with pytest.raises(TaskError, match=r"rows\.parquet: this cannot be read as parquet: it needs more than 400 MB of memory"):
        read_file(tmp_path / "rows.parquet")


def test_columns_that_are_nested_deeply_are_refused(tmp_path):
    parquet.write_table(pyarrow.table({"text": nested(300)}), tmp_path / "rows.parquet")
    with pytest.raises(TaskError, match=r"rows\.parquet: .*nested"):
        read_file(tmp_path / "rows.parquet")


def test_a_large_file_may_hold_more(tmp_path, small):
    drawn = random.Random(0)
    large = [drawn.randbytes(200).hex() for _ in range(6000)]
    parquet.write_table(pyarrow.table({"text": large}), tmp_path / "rows.parquet")
    assert [row["text"] for row in read_file(tmp_path / "rows.parquet")] == large


def test_a_process_that_ends_is_a_refusal():
    worker = Worker("parquet_worker.py", "reads parquet", lambda code: f"signal {-code}")
    worker._process.kill()
    with pytest.raises(EndedError, match="signal 9"):
        list(worker.request(("rows.parquet",)))
    assert not worker.is_open


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_a_packed_file_is_refused(tmp_path, ending):
    (tmp_path / f"t.{ending}").write_bytes(gzip.compress(b"{}" * 1000))
    with pytest.raises(TaskError, match=rf"t\.{ending}: this is packed by gzip"):
        read_file(tmp_path / f"t.{ending}")
    with pytest.raises(TaskError, match=r"'\.gz' is not read; allowed: \.jsonl, \.json, \.csv, \.parquet"):
        read_file(tmp_path / f"t.{ending}.gz")


def test_a_file_that_is_one_line_is_not_read_to_its_end(tmp_path):
    file = tmp_path / "t.jsonl"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(TaskError, match=r"t\.jsonl:1: a line of more than 64 MB"):
        read_file(file)


def test_a_document_of_many_rows_is_refused(tmp_path):
    with (tmp_path / "t.json").open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(TaskError, match=r"t\.json: larger than 512 MB.* One row per line \(\.jsonl\) may have more"):
        read_file(tmp_path / "t.json")


def test_rows_that_memory_cannot_hold_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_MOST_BYTES", 100_000)
    (tmp_path / "t.jsonl").write_text("{}\n" * 2000)
    with pytest.raises(TaskError, match=r"t\.jsonl: its rows have more than"):
        read_file(tmp_path / "t.jsonl")


def test_a_cell_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_TEXT_BYTES", 10_000)
    (tmp_path / "t.csv").write_text('text\n"' + "a\n" * 6000)
    before = csv.field_size_limit()
    with pytest.raises(TaskError, match=r"t\.csv:\d+: this cannot be read as CSV: field larger than field limit \(10000\)"):
        read_file(tmp_path / "t.csv")
    assert csv.field_size_limit() == before, "of the process, which is not plait's alone"


def test_columns_of_one_name(tmp_path):
    (tmp_path / "t.csv").write_text("text,text,label\na,b,yes\n")
    with pytest.raises(TaskError, match=r"t\.csv:1: two columns are called 'text'\."):
        read_file(tmp_path / "t.csv")


def test_lines_end_as_csv_has_it(tmp_path):
    (tmp_path / "t.csv").write_bytes(b'\xef\xbb\xbftext,label\r"a\r\nb",yes\rc,no\r\nd,no\n')
    assert [tuple(row.values()) for row in read_file(tmp_path / "t.csv")] == [("a\r\nb", "yes"), ("c", "no"), ("d", "no")]


def test_text_that_is_not_utf8_is_refused_with_its_place(tmp_path):
    (tmp_path / "t.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(TaskError, match=r"t\.jsonl: this is not text in UTF-8 \(byte 16\)"):
        read_file(tmp_path / "t.jsonl")


def silent_pipe(path: Path, first: bytes) -> int:
    """Make a pipe whose writer writes something and then nothing, and stays."""
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY)
    os.write(writer, first)
    os.close(reader) if not first else None
    return writer


@pytest.mark.parametrize("first", [b"", b"version: 1\n"])
def test_a_pipe_whose_writer_is_silent_is_not_waited_for(tmp_path, monkeypatch, first):
    monkeypatch.setattr(parsing, "_PATIENCE", 0.05)
    writer = silent_pipe(tmp_path / "recipe.yaml", first)
    with pytest.raises(TaskError, match=r"recipe\.yaml: nothing was written to this pipe for 0\.05 s"):
        read_text(tmp_path / "recipe.yaml", TaskError)
    os.close(writer)


def test_a_pipe_is_read_to_its_end(tmp_path):
    os.mkfifo(tmp_path / "recipe.yaml")
    text = "a: 1\n" * 50_000  # more than a pipe holds
    ready = os.open(tmp_path / "recipe.yaml", os.O_RDWR)  # so that there is a writer from the beginning
    writing = threading.Thread(target=lambda: (os.write(ready, text.encode()), os.close(ready)))
    writing.start()
    assert read_text(tmp_path / "recipe.yaml", TaskError) == text
    writing.join()
